//! The one place that asks for the time.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Monotonic time, of the same clock as the runtime's timers: for time-outs and rates. A simulation holds both.
pub fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// Wall time since 1970 by this machine's clock; before 1970 it is zero. For people and file names, never for safety.
#[expect(clippy::disallowed_methods, reason = "this is the place that wraps it")]
pub fn wall() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// Wall time in nanoseconds since 1970.
pub fn wall_ns() -> i64 {
    i64::try_from(wall().as_nanos()).unwrap_or(i64::MAX)
}
