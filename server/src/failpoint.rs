//! Places at which a test lets the server die, or its disk lie: after every write, at every sync, around every rename, removal
//! and commit.
//!
//! In the programs that are shipped both functions do nothing and are inlined away. With the feature `failpoints`, for
//! `strand-server-failpoints` alone, they do what `STRAND_FAILPOINT` says (see `armed`).

#[cfg(feature = "failpoints")]
mod armed;

use std::io;

/// The process got to `place`; it may end here, as by `kill -9`.
#[inline]
pub(crate) fn reached(place: &'static str) {
    #[cfg(feature = "failpoints")]
    armed::reached(place);
    #[cfg(not(feature = "failpoints"))]
    let _ = place;
}

/// Makes bytes or names durable with `sync`, which may fail here, or be left out; or the process ends right after it.
#[inline]
pub(crate) fn sync(place: &'static str, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    #[cfg(feature = "failpoints")]
    return armed::sync(place, sync);
    #[cfg(not(feature = "failpoints"))]
    {
        let _ = place;
        sync()
    }
}
