//! Which segments are merged, and how.

use std::iter::Peekable;
use std::sync::Arc;

use super::IndexError;
use super::entry::Entry;
use super::segment::{Segment, SegmentIter};

/// Fewest segments that are worth a merge.
const MERGE_MIN: usize = 4;

/// How many of the newest segments to merge: the longest run whose oldest member is no larger than the others together, so
/// that sizes at least double from one segment to the next older one.
pub fn merge_due(sizes: &[u64]) -> Option<usize> {
    let mut sum = 0;
    let mut due = None;
    for (place, &size) in sizes.iter().enumerate() {
        if place + 1 >= MERGE_MIN && size <= sum {
            due = Some(place + 1);
        }
        sum += size;
    }
    due
}

/// Entries of several segments (newest first) in order; of one copy's versions only the newest.
#[derive(Debug)]
pub struct Merge<'a> {
    heads: Vec<Peekable<SegmentIter<'a>>>,
}

impl<'a> Merge<'a> {
    /// Of `segments`, newest first.
    pub fn of(segments: &'a [Arc<Segment>]) -> Self {
        Self { heads: segments.iter().map(|segment| segment.scan().peekable()).collect() }
    }
}

impl Iterator for Merge<'_> {
    type Item = Result<Entry, IndexError>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut least: Option<Entry> = None;
        for head in &mut self.heads {
            match head.peek() {
                Some(Err(_)) => return head.next(),
                Some(Ok(entry)) if least.is_none_or(|other| entry.key() < other.key()) => least = Some(*entry),
                None | Some(Ok(_)) => {}
            }
        }
        let winner = least?;
        for head in &mut self.heads {
            if matches!(head.peek(), Some(Ok(entry)) if entry.key() == winner.key()) {
                head.next();
            }
        }
        Some(Ok(winner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_number_of_segments_stays_small() {
        let mut sizes: Vec<u64> = Vec::new();
        for _ in 0..10_000 {
            sizes.insert(0, 1);
            while let Some(count) = merge_due(&sizes) {
                let merged = sizes.drain(..count).sum();
                sizes.insert(0, merged);
            }
            assert!(sizes.len() <= 14 + MERGE_MIN, "{sizes:?}");
        }
        assert_eq!(sizes.iter().sum::<u64>(), 10_000);
    }
}
