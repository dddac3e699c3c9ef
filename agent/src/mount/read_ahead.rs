//! Reading ahead of sequential readers: who is one, how far ahead to be, and the threads that fetch.

use std::ops::Range;
use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, bounded};
use parking_lot::Mutex;

use super::content::Contents;
use super::item::{Body, Item};
use super::node::View;

/// Threads that fetch ahead. Each has one fetch under way; most places of a mount's fetches stay free for what is waited for.
const THREADS: usize = 2;
/// Ranges that wait to be fetched. More are not fetched ahead: they are fetched when they are needed.
const QUEUE_MAX: usize = 16;
/// How far a reader may be from where it was expected: the kernel asks for several parts at once, in any order.
const SLACK: u64 = 1 << 20;
/// Read in sequence before anything is fetched ahead.
const START: u64 = 256 << 10;
/// Shortest and longest distance ahead, bytes.
const WINDOW_MIN: u64 = 1 << 20;
const WINDOW_MAX: u64 = 8 << 20;

/// What is known of one open file's reader.
#[derive(Debug, Default)]
pub(super) struct Sequence {
    /// Behind what was read furthest in this run.
    next: u64,
    run: u64,
    /// Behind what was asked for ahead.
    asked: u64,
}

impl Sequence {
    /// A read; gives what to fetch ahead, at most `window_max` bytes away.
    pub(super) fn note(&mut self, offset: u64, bytes: u64, window_max: u64) -> Option<Range<u64>> {
        let end = offset.saturating_add(bytes);
        if offset <= self.next.saturating_add(SLACK) && end.saturating_add(SLACK) >= self.next {
            self.run = self.run.saturating_add(bytes);
            self.next = self.next.max(end);
        } else {
            *self = Self { next: end, run: bytes, asked: end };
        }
        if self.run < START {
            return None;
        }
        let window = self.run.saturating_mul(2).clamp(WINDOW_MIN.min(window_max), window_max);
        let (from, to) = (self.asked.max(self.next), self.next.saturating_add(window));
        if to.saturating_sub(from) < window / 2 {
            return None;
        }
        self.asked = to;
        Some(from..to)
    }
}

/// An open file.
pub(super) struct OpenFile {
    pub(super) view: Arc<View>,
    pub(super) item: Arc<Item>,
    pub(super) sequence: Mutex<Sequence>,
}

struct Job {
    file: Arc<OpenFile>,
    range: Range<u64>,
}

/// The threads. They end when it is dropped, after what they are fetching.
pub(super) struct ReadAhead {
    jobs: Option<Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
    window_max: u64,
}

impl ReadAhead {
    /// All that is fetched ahead at once takes at most half of a cache of `cache_bytes`.
    pub(super) fn new(contents: &Arc<Contents>, cache_bytes: usize) -> Self {
        let (sender, receiver) = bounded::<Job>(QUEUE_MAX);
        let start = |_| {
            let (receiver, contents) = (receiver.clone(), Arc::clone(contents));
            std::thread::spawn(move || {
                for Job { file, range } in receiver {
                    if let Body::File { extents, content } = &file.item.body {
                        contents.prefetch(file.view.snapshot(), extents, content, range);
                    }
                }
            })
        };
        let window_max = WINDOW_MAX.min(cache_bytes as u64 / 2 / (THREADS as u64 + 1));
        Self { jobs: Some(sender), threads: (0..THREADS).map(start).collect(), window_max }
    }

    /// A part of the file is being read.
    pub(super) fn note(&self, file: &Arc<OpenFile>, offset: u64, bytes: u64) {
        let Some(range) = file.sequence.lock().note(offset, bytes, self.window_max) else { return };
        if let Some(jobs) = &self.jobs {
            // If the queue is full the readers are ahead of the network anyway.
            let _ = jobs.try_send(Job { file: Arc::clone(file), range });
        }
    }
}

impl Drop for ReadAhead {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so already.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PART: u64 = 128 << 10;

    #[test]
    fn a_sequential_reader_is_always_ahead_of_itself_and_nothing_is_asked_for_twice() {
        let mut sequence = Sequence::default();
        let mut asked = 0;
        for part in 0..200 {
            // The kernel asks for neighbouring parts in any order.
            let offset = (part ^ 1) * PART;
            if let Some(range) = sequence.note(offset, PART, WINDOW_MAX) {
                assert!(range.start >= asked, "{range:?} after {asked}");
                asked = range.end;
            }
            if part > 4 {
                assert!(asked >= offset + PART + WINDOW_MIN / 2, "part {part}: only up to {asked}");
                assert!(asked <= offset + 2 * PART + WINDOW_MAX);
            }
        }
    }

    #[test]
    fn nothing_is_fetched_ahead_of_a_random_reader() {
        let mut sequence = Sequence::default();
        for jump in 1..100 {
            assert_eq!(sequence.note(jump * 7 * SLACK % (1 << 40), PART, WINDOW_MAX), None);
        }
    }
}
