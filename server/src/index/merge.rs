//! Which segments are merged, and how.

use std::cmp::{Ordering, Reverse};
use std::collections::BinaryHeap;
use std::collections::binary_heap::PeekMut;
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
    sources: Vec<SegmentIter<'a>>,
    /// The next entry of every source that has one. A heap, because a merge that is late may have hundreds of sources.
    heads: BinaryHeap<Reverse<Head>>,
    /// What was given last; older versions of it follow directly.
    last: Option<Entry>,
}

#[derive(Clone, Copy, Debug)]
struct Head {
    entry: Entry,
    source: usize,
}

impl Ord for Head {
    fn cmp(&self, other: &Self) -> Ordering {
        // Of one copy's versions the newest comes first.
        self.entry.key().cmp(&other.entry.key()).then(self.source.cmp(&other.source))
    }
}

impl PartialOrd for Head {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Head {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Head {}

impl<'a> Merge<'a> {
    /// Of `segments`, newest first.
    pub fn of(segments: &'a [Arc<Segment>]) -> Result<Self, IndexError> {
        let mut sources: Vec<SegmentIter<'a>> = segments.iter().map(|segment| segment.scan()).collect();
        let head = |(source, entries): (usize, &mut SegmentIter<'a>)| {
            entries.next().map(|entry| Ok(Reverse(Head { entry: entry?, source })))
        };
        let heads = sources.iter_mut().enumerate().filter_map(head).collect::<Result<_, IndexError>>()?;
        Ok(Self { sources, heads, last: None })
    }
}

impl Iterator for Merge<'_> {
    type Item = Result<Entry, IndexError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let mut least = self.heads.peek_mut()?;
            let Reverse(Head { entry, source }) = *least;
            match self.sources.get_mut(source).and_then(Iterator::next) {
                Some(Ok(entry)) => *least = Reverse(Head { entry, source }),
                Some(Err(error)) => return Some(Err(error)),
                None => {
                    PeekMut::pop(least);
                }
            }
            let repeats = self.last.is_some_and(|last| last.key() == entry.key());
            if !repeats {
                self.last = Some(entry);
                return Some(Ok(entry));
            }
        }
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
