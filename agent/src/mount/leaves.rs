//! Decoded leaves of lists: the resumable positions of readers that come back for the next part. Bounded in number.

use std::sync::Arc;

use parking_lot::Mutex;
use strandline_messages::ChunkId;

/// Leaves kept of one kind of list. A leaf has at most 8,192 items, usually about 2,000.
const LEAVES_MAX: usize = 32;

/// A part of a list: items `start..end` of the list under `top`.
#[derive(Debug)]
pub(super) struct Part<T> {
    pub(super) start: u64,
    pub(super) end: u64,
    pub(super) items: Vec<T>,
}

/// Least recently used out first.
pub(super) struct Leaves<T> {
    kept: Mutex<Vec<(ChunkId, Arc<Part<T>>)>>,
}

impl<T> Default for Leaves<T> {
    fn default() -> Self {
        Self { kept: Mutex::default() }
    }
}

impl<T> Leaves<T> {
    /// The part of the list under `top` that holds `place`.
    pub(super) fn get(&self, top: ChunkId, place: u64) -> Option<Arc<Part<T>>> {
        let mut kept = self.kept.lock();
        let found = kept.iter().position(|(of, part)| *of == top && part.start <= place && place < part.end)?;
        let (of, part) = kept.remove(found);
        kept.push((of, Arc::clone(&part)));
        Some(part)
    }

    pub(super) fn insert(&self, top: ChunkId, part: Part<T>) -> Arc<Part<T>> {
        let part = Arc::new(part);
        let mut kept = self.kept.lock();
        if kept.len() >= LEAVES_MAX {
            kept.remove(0);
        }
        kept.push((top, Arc::clone(&part)));
        part
    }
}
