//! How a repository keeps its snapshots and looks after itself: set by the server's administrator, journalled in the storage.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use strandline_actors::machines::retention::Policy;

const DAY: Duration = Duration::from_hours(24);

/// Settings of one repository. Every one has a default.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RepositorySettings {
    /// How long a deleted snapshot can be brought back.
    #[serde(with = "humantime_serde")]
    pub undelete: Duration,
    /// Before it is this old, by the server's clock, nobody can delete a snapshot.
    #[serde(with = "humantime_serde")]
    pub min_retention: Duration,
    /// Whether agents with the full capability may delete snapshots.
    pub agents_may_delete: bool,
    /// How long blocks of a session that ended without a snapshot are kept for its next attempt.
    #[serde(with = "humantime_serde")]
    pub keep_uncommitted: Duration,
    /// How often the server collects garbage by itself; zero: never.
    #[serde(with = "humantime_serde")]
    pub gc_every: Duration,
    /// How often the server reads every block again; zero: never.
    #[serde(with = "humantime_serde")]
    pub scrub_every: Duration,
    /// Most bytes a second that such reading takes from the disk; zero: no limit.
    pub scrub_bytes_per_second: u64,
    /// A pack whose live bytes are fewer than this many percent of its blocks' bytes is emptied and removed.
    pub compact_below_percent: u8,
    /// Which snapshots the server keeps by its own policy; it deletes the others. None: all.
    pub retention: Option<Box<Policy>>,
    /// How often the server applies that policy; zero: never.
    #[serde(with = "humantime_serde")]
    pub retention_every: Duration,
}

impl Default for RepositorySettings {
    fn default() -> Self {
        Self {
            undelete: 7 * DAY,
            min_retention: Duration::ZERO,
            agents_may_delete: true,
            keep_uncommitted: 7 * DAY,
            gc_every: DAY,
            scrub_every: 30 * DAY,
            scrub_bytes_per_second: 64 << 20,
            compact_below_percent: 20,
            retention: None,
            retention_every: DAY,
        }
    }
}

/// A duration in the catalog's nanoseconds.
pub(crate) fn nanoseconds(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}
