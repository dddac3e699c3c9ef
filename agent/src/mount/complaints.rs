//! One line in the log for each problem, however often the kernel asks again.

use std::collections::HashMap;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use strandline_actors::runtime::clock;

/// The same problem of the same path is told again only after so long.
const QUIET: Duration = Duration::from_mins(10);
/// Most problems remembered.
const KNOWN_MAX: usize = 4096;

/// See the module.
#[derive(Default)]
pub(super) struct Complaints {
    keys: RandomState,
    told: Mutex<HashMap<u64, Instant>>,
}

impl Complaints {
    /// Tells that the entry at `path` (made only if it is told) cannot be read, and why.
    pub(super) fn tell(&self, inode: u64, reason: &str, path: impl FnOnce() -> Vec<u8>) {
        if self.is_new(inode, reason) {
            let path = path();
            let path = String::from_utf8_lossy(&path);
            tracing::error!(%path, reason, "cannot be read; everything else is intact");
        }
    }

    fn is_new(&self, inode: u64, reason: &str) -> bool {
        let now = clock::now();
        let mut told = self.told.lock();
        if told.len() >= KNOWN_MAX {
            told.clear();
        }
        let before = told.insert(self.keys.hash_one((inode, reason)), now);
        before.is_none_or(|before| now.saturating_duration_since(before) >= QUIET)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_problem_is_told_once() {
        let complaints = Complaints::default();
        assert!(complaints.is_new(7, "block a is damaged"));
        assert!(!complaints.is_new(7, "block a is damaged"));
        assert!(complaints.is_new(7, "block b is damaged"));
        assert!(complaints.is_new(8, "block a is damaged"));
    }
}
