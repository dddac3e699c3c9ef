//! Walking the source: what there is, in an order that the file cache can follow.
//!
//! A walk is depth first, parents before children, names in bytewise order within each directory. Everything is reached
//! through descriptors, so paths may be longer than `PATH_MAX` and a symbolic link put where a directory was is not
//! followed. Whatever cannot be read becomes a [`ScanEvent::Problem`], and the walk goes on.
//!
//! Memory: the directories on the current path and a bounded look-ahead; names of huge directories spill to disk.

pub mod dir;
pub mod exclude;
pub mod flush;
pub mod ignore_file;
pub mod list;
pub mod markers;
pub mod meta;
pub mod names;
pub mod owners;
pub mod roots;
pub mod walk;

use std::sync::Arc;

use self::dir::Dir;
use self::meta::Meta;
use self::names::Name;

/// One step of a walk.
#[derive(Debug)]
pub enum ScanEvent {
    /// A directory begins; its entries follow, then [`ScanEvent::Leave`].
    Enter {
        /// The directory it is in.
        parent: Arc<Dir>,
        /// The directory itself, if it could be opened.
        dir: Option<Arc<Dir>>,
        /// Its name.
        name: Name,
        /// Its metadata.
        meta: Meta,
    },
    /// The directory entered last ends.
    Leave,
    /// Anything that is not a directory.
    Node {
        /// The directory it is in.
        parent: Arc<Dir>,
        /// Its name.
        name: Name,
        /// Its metadata when it was listed.
        meta: Meta,
    },
    /// Something could not be read.
    Problem {
        /// Full path, raw.
        path: Vec<u8>,
        /// What happened, for people.
        message: String,
    },
}
