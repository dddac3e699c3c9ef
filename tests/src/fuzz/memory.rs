//! How much memory a decoder takes, if somebody measures.
//!
//! Counting needs an allocator of its own, which a library should not choose for every program that it is linked into: the
//! test and the campaign install one and say here how to ask it.

use std::sync::OnceLock;

/// Runs a function and says the most bytes that the thread held for it at any moment.
pub type Meter = fn(&mut dyn FnMut()) -> u64;

static METER: OnceLock<Meter> = OnceLock::new();

/// From now on [`within`] measures. Later calls change nothing.
pub fn measure_with(meter: Meter) {
    let _ = METER.set(meter);
}

/// Runs `work` and panics if this thread held more than `bytes_max` bytes for it at any moment.
pub fn within<T>(bytes_max: usize, mut work: impl FnMut() -> T) -> T {
    let Some(meter) = METER.get() else { return work() };
    let mut result = None;
    let held = meter(&mut || result = Some(work()));
    assert!(held <= bytes_max as u64, "{held} bytes of memory were taken at once; the bound is {bytes_max}");
    // The meter runs what it is given once.
    result.unwrap_or_else(work)
}
