//! Which sequence numbers of one session are in: a watermark, and the intervals above it.
//!
//! Owned by the server's `GapTracker` actor, which feeds it *durable* numbers only (G1), never merely received ones.
//!
//! Invariants:
//! - every number below `watermark` is in, and `watermark` itself is not;
//! - `watermark ≤ end ≤ watermark + window`, and no number at or above `end` is in;
//! - memory is fixed when the tracker is made, whatever happens later: one bit for each number of the window and one
//!   time for each 64 of them (about 3 KiB for a window of 4096). Nothing grows with frames, gaps or duplicates.
//!
//! Inside is a ring of bits, not a list of intervals: measured by `benches/machines.rs`, it costs about 5 ns a number in
//! order and at random alike, where a B-tree of intervals costs more than 100 ns at random and, at its worst, holds more
//! memory.

use std::ops::Range;
use std::time::{Duration, Instant};

const BITS: u64 = u64::BITS as u64;

/// The widest window that a tracker keeps; a wider one that is asked for is cut to this. Bounds memory to 300 KiB.
pub const WINDOW_MAX: u64 = 1 << 20;

/// What became of a sequence number given to [`GapTracker::insert`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// It was missing and is now in.
    New,
    /// It was in already. Harmless: acknowledge again.
    Duplicate,
    /// It is at or above watermark + window. Not remembered: refuse the frame.
    BeyondWindow,
}

/// 64 consecutive sequence numbers.
#[derive(Clone, Copy, Debug, Default)]
struct Word {
    /// Bit `n` is set when the word's number `n` is in.
    bits: u64,
    /// When a new number of this word came in, or numbers of it came to be missing, whichever was last.
    moved: Option<Instant>,
}

/// The durable sequence numbers of one session. See the module's text.
#[derive(Clone, Debug)]
pub struct GapTracker {
    /// How far above the watermark a number may be. At least 1, at most [`WINDOW_MAX`].
    window: u64,
    /// Every number below is in.
    watermark: u64,
    /// One above the highest number that is in; the watermark when there is none above it.
    end: u64,
    /// Words `watermark / 64 ..= (watermark + window) / 64`, each at its number modulo the ring's length (a power of
    /// two). Words outside of that are zero.
    ring: Box<[Word]>,
    /// When a new number last came in.
    progressed: Option<Instant>,
}

impl GapTracker {
    /// Nothing is in yet; numbers are accepted below `window` (1 to [`WINDOW_MAX`]; other values are moved into that).
    pub fn new(window: u64) -> Self {
        Self::starting_at(window, 0)
    }

    fn starting_at(window: u64, watermark: u64) -> Self {
        let window = window.clamp(1, WINDOW_MAX);
        let words = usize::try_from(window / BITS + 2).unwrap_or(usize::MAX).next_power_of_two();
        let mut tracker = Self {
            window,
            watermark,
            end: watermark,
            ring: vec![Word::default(); words].into_boxed_slice(),
            progressed: None,
        };
        let below = mask_below(watermark % BITS);
        tracker.update(watermark / BITS, |word| word.bits = below);
        tracker
    }

    /// Notes that `sequence` is durable, at `now`.
    pub fn insert(&mut self, now: Instant, sequence: u64) -> Inserted {
        if sequence < self.watermark {
            return Inserted::Duplicate;
        }
        // The last number of all is refused, so that `watermark` and `end` can always be one above it.
        if sequence - self.watermark >= self.window || sequence == u64::MAX {
            return Inserted::BeyondWindow;
        }
        let (number, bit) = (sequence / BITS, 1u64 << (sequence % BITS));
        if self.word(number).bits & bit != 0 {
            return Inserted::Duplicate;
        }
        if sequence >= self.end {
            // Whatever was jumped over is missing from now on.
            for jumped in self.end / BITS..number {
                self.update(jumped, |word| word.moved = Some(now));
            }
            self.end = sequence + 1;
        }
        self.update(number, |word| {
            word.bits |= bit;
            word.moved = Some(now);
        });
        self.progressed = Some(now);
        if sequence == self.watermark {
            self.advance();
        }
        Inserted::New
    }

    /// Moves the watermark over everything contiguous, and gives the words that it leaves back to the ring.
    fn advance(&mut self) {
        loop {
            let number = self.watermark / BITS;
            let contiguous = u64::from(self.word(number).bits.trailing_ones());
            self.watermark = number * BITS + contiguous;
            if contiguous < BITS {
                break;
            }
            self.update(number, |word| *word = Word::default());
        }
        self.end = self.end.max(self.watermark);
    }

    /// Every sequence number below this one is in, and this one is not.
    pub fn watermark(&self) -> u64 {
        self.watermark
    }

    /// One above the highest sequence number that is in.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// The window: numbers at or above `watermark() + window()` are refused.
    pub fn window(&self) -> u64 {
        self.window
    }

    /// When a number that was missing last came in; `None` before the first.
    pub fn last_progress(&self) -> Option<Instant> {
        self.progressed
    }

    /// What is in above the watermark: half-open ranges, ascending, none touching another. At most window / 2 of them.
    pub fn intervals(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut from = self.watermark;
        std::iter::from_fn(move || {
            let start = self.find(from, true);
            let stop = self.find(start, false);
            from = stop;
            (start < stop).then_some(start..stop)
        })
    }

    /// What is missing below the highest number that is in: half-open ranges, ascending, at most `limit` of them.
    pub fn gaps(&self, limit: usize) -> Vec<Range<u64>> {
        self.missing().take(limit).collect()
    }

    fn missing(&self) -> impl Iterator<Item = Range<u64>> + '_ {
        let mut from = self.watermark;
        std::iter::from_fn(move || {
            let start = self.find(from, false);
            let stop = self.find(start, true);
            from = stop;
            (start < stop).then_some(start..stop)
        })
    }

    /// The parts of gaps that have made no progress for `patience`: at most `limit` half-open ranges, ascending.
    ///
    /// Progress is what counts, never the age of the session or of the gap (G8): a gap is as old as the later of the
    /// moment when it came to be and the last arrival among the same 64 numbers. What is returned counts as moved at
    /// `now`, so the same hole is reported once in each `patience` and not at every tick.
    pub fn holes_older_than(&mut self, now: Instant, patience: Duration, limit: usize) -> Vec<Range<u64>> {
        let old = |word: Word| word.moved.is_some_and(|moved| now.saturating_duration_since(moved) >= patience);
        let mut holes: Vec<Range<u64>> = Vec::new();
        'search: for gap in self.missing() {
            let mut start = gap.start;
            while start < gap.end {
                let stop = gap.end.min(next_word(start));
                if old(self.word(start / BITS)) {
                    let full = holes.len() >= limit;
                    match holes.last_mut() {
                        Some(last) if last.end == start => last.end = stop,
                        _ if full => break 'search,
                        _ => holes.push(start..stop),
                    }
                }
                start = stop;
            }
        }
        for hole in &holes {
            for number in hole.start / BITS..=(hole.end - 1) / BITS {
                self.update(number, |word| word.moved = Some(now));
            }
        }
        holes
    }

    /// Bytes of memory that the tracker holds, itself included. Constant.
    pub fn memory_bytes(&self) -> usize {
        size_of::<Self>() + size_of_val::<[Word]>(&self.ring)
    }

    /// The first number at or above `from` that is in (`present`) or missing (not `present`); `end` if there is none.
    fn find(&self, from: u64, present: bool) -> u64 {
        let mut at = from;
        while at < self.end {
            let bits = self.word(at / BITS).bits;
            let wanted = (if present { bits } else { !bits }) & !mask_below(at % BITS);
            if wanted != 0 {
                return (at / BITS * BITS + u64::from(wanted.trailing_zeros())).min(self.end);
            }
            at = next_word(at);
        }
        self.end
    }

    fn slot(&self, number: u64) -> usize {
        // The ring's length is a power of two, so the low bits of `number` are its remainder.
        usize::try_from(number & (self.ring.len() as u64 - 1)).unwrap_or(0)
    }

    fn word(&self, number: u64) -> Word {
        self.ring.get(self.slot(number)).copied().unwrap_or_default()
    }

    fn update(&mut self, number: u64, change: impl FnOnce(&mut Word)) {
        let slot = self.slot(number);
        if let Some(word) = self.ring.get_mut(slot) {
            change(word);
        }
    }
}

/// The first number of the word after the one that holds `number`.
fn next_word(number: u64) -> u64 {
    (number / BITS + 1).saturating_mul(BITS)
}

/// The lowest `count` bits, of 0 to 63.
fn mask_below(count: u64) -> u64 {
    (1 << count) - 1
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a list of one range is meant")]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;
    use crate::runtime::clock;

    /// The same by brute force: every number remembered.
    #[derive(Default)]
    struct Naive {
        window: u64,
        first: u64,
        seen: BTreeSet<u64>,
    }

    impl Naive {
        fn watermark(&self) -> u64 {
            (self.first..u64::MAX).find(|n| !self.seen.contains(n)).unwrap()
        }

        fn insert(&mut self, sequence: u64) -> Inserted {
            let watermark = self.watermark();
            if sequence < watermark || self.seen.contains(&sequence) {
                Inserted::Duplicate
            } else if sequence - watermark >= self.window {
                Inserted::BeyondWindow
            } else {
                self.seen.insert(sequence);
                Inserted::New
            }
        }

        fn ranges(numbers: impl Iterator<Item = u64>) -> Vec<Range<u64>> {
            let mut ranges: Vec<Range<u64>> = Vec::new();
            for n in numbers {
                match ranges.last_mut() {
                    Some(last) if last.end == n => last.end += 1,
                    _ => ranges.push(n..n + 1),
                }
            }
            ranges
        }

        fn intervals(&self) -> Vec<Range<u64>> {
            let watermark = self.watermark();
            Self::ranges(self.seen.iter().copied().filter(|&n| n > watermark))
        }

        fn gaps(&self) -> Vec<Range<u64>> {
            let end = self.seen.last().map_or(self.first, |n| n + 1);
            Self::ranges((self.first..end).filter(|n| !self.seen.contains(n)))
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(400))]

        #[test]
        fn it_agrees_with_a_set_of_everything_seen(
            window in 1u64..300,
            first in prop_oneof![Just(0u64), 0u64..200, Just(1 << 40)],
            steps in prop::collection::vec(0u64..330, 0..400),
        ) {
            let now = clock::now();
            let mut tracker = GapTracker::starting_at(window, first);
            let mut naive = Naive { window, first, ..Naive::default() };
            let memory = tracker.memory_bytes();
            for step in steps {
                // Around the watermark: some below it, most inside the window, some beyond.
                let sequence = (tracker.watermark() + step).saturating_sub(20);
                if sequence < first { continue; }
                prop_assert_eq!(tracker.insert(now, sequence), naive.insert(sequence));
                prop_assert_eq!(tracker.watermark(), naive.watermark());
                prop_assert_eq!(tracker.intervals().collect::<Vec<_>>(), naive.intervals());
                prop_assert_eq!(tracker.gaps(usize::MAX), naive.gaps());
                prop_assert!(tracker.end() <= tracker.watermark() + window);
            }
            prop_assert_eq!(tracker.memory_bytes(), memory);
        }
    }

    #[test]
    fn s03_ten_million_frames_in_random_order_need_constant_memory() {
        const WINDOW: usize = 4096;
        let frames = 10_000_000u64;
        let now = clock::now();
        let mut tracker = GapTracker::new(WINDOW as u64);
        let memory = tracker.memory_bytes();
        assert!(memory < 8192, "{memory} bytes for a window of 4096");
        let mut state = 7u64;
        let mut random = move || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        // A reservoir of numbers not delivered yet: the lowest goes out when the window would be left, else any.
        let mut waiting: Vec<u64> = (0..WINDOW as u64 / 2).collect();
        let mut next = waiting.len() as u64;
        let mut holes_most = 0;
        while !waiting.is_empty() {
            let pick = usize::try_from(random() % waiting.len() as u64).unwrap();
            let sequence = waiting[pick];
            if sequence >= tracker.watermark() + WINDOW as u64 {
                assert_eq!(tracker.insert(now, sequence), Inserted::BeyondWindow);
                let lowest = waiting.iter().position(|&n| n == tracker.watermark()).unwrap();
                assert_eq!(tracker.insert(now, waiting[lowest]), Inserted::New);
                refill(&mut waiting, lowest, &mut next, frames);
                continue;
            }
            assert_eq!(tracker.insert(now, sequence), Inserted::New);
            refill(&mut waiting, pick, &mut next, frames);
            if next.is_multiple_of(65_536) {
                holes_most = holes_most.max(tracker.gaps(usize::MAX).len());
            }
        }
        assert!(holes_most > 100, "the order was not random: {holes_most} holes");
        assert!(tracker.watermark() > frames - 1);
        assert!(tracker.watermark() <= frames);
        assert_eq!(tracker.intervals().next(), None);
        assert_eq!(tracker.memory_bytes(), memory);
    }

    fn refill(waiting: &mut Vec<u64>, taken: usize, next: &mut u64, frames: u64) {
        if *next < frames {
            waiting[taken] = *next;
            *next += 1;
        } else {
            waiting.swap_remove(taken);
        }
    }

    #[test]
    fn s03_a_frame_beyond_the_window_is_refused_and_forgotten() {
        let now = clock::now();
        let mut tracker = GapTracker::new(100);
        assert_eq!(tracker.insert(now, 100), Inserted::BeyondWindow);
        assert_eq!(tracker.insert(now, u64::MAX), Inserted::BeyondWindow);
        assert_eq!(tracker.end(), 0);
        assert_eq!(tracker.insert(now, 99), Inserted::New);
        assert_eq!(tracker.insert(now, 0), Inserted::New);
        assert_eq!(tracker.insert(now, 100), Inserted::New);
        assert_eq!(tracker.gaps(9), [1..99]);
    }

    #[test]
    fn s09_completion_is_the_watermark_passing_the_last_sequence_and_nothing_else() {
        let now = clock::now();
        let mut tracker = GapTracker::new(4096);
        assert!(tracker.watermark() == 0, "nothing has arrived, so nothing is complete");
        for sequence in (1..=9).rev() {
            tracker.insert(now, sequence);
            assert!(tracker.watermark() <= 9, "number 0 is missing");
        }
        tracker.insert(now, 0);
        assert!(tracker.watermark() > 9);
        assert!(tracker.watermark() <= 10);
    }

    #[test]
    fn s13_a_hole_is_old_when_nothing_arrives_in_it_not_when_the_session_is_long() {
        let patience = Duration::from_mins(1);
        let mut now = clock::now();
        let mut tracker = GapTracker::new(4096);
        // Numbers 0 to 63 are missing and trickle in, each just within the patience: a slow stream, never a dead one.
        tracker.insert(now, 64);
        for sequence in (1..64).rev() {
            now += Duration::from_secs(59);
            assert_eq!(tracker.holes_older_than(now, patience, 9), []);
            assert_eq!(tracker.insert(now, sequence), Inserted::New);
        }
        now += Duration::from_secs(59);
        assert_eq!(tracker.insert(now, 30), Inserted::Duplicate);
        now += Duration::from_secs(1);
        assert_eq!(tracker.holes_older_than(now, patience, 9), [0..1], "a duplicate is not progress");
        assert_eq!(tracker.holes_older_than(now, patience, 9), [], "reported once in each patience");
        now += patience;
        assert_eq!(tracker.holes_older_than(now, patience, 9), [0..1]);
    }

    #[test]
    fn a_hole_far_below_lively_traffic_is_found_and_the_traffic_is_not() {
        let patience = Duration::from_secs(30);
        let mut now = clock::now();
        let mut tracker = GapTracker::new(4096);
        for sequence in (0..2000).filter(|n| n % 12 != 5) {
            tracker.insert(now, sequence);
            now += Duration::from_millis(50);
        }
        let holes = tracker.holes_older_than(now, patience, usize::MAX);
        assert!(holes.iter().all(|hole| hole.end - hole.start == 1 && hole.start % 12 == 5));
        assert_eq!(holes.first(), Some(&(5..6)));
        // 30 s are the last 600 or so numbers: their holes are young.
        let last = holes.last().unwrap().start;
        assert!((1200..1400).contains(&last), "{last}");
        assert_eq!(tracker.clone().holes_older_than(now + patience, patience, 3).len(), 3);
    }

    #[test]
    fn a_hole_in_which_nothing_ever_arrived_grows_old_from_the_moment_it_was_jumped_over() {
        let patience = Duration::from_secs(30);
        let start = clock::now();
        let mut tracker = GapTracker::new(4096);
        tracker.insert(start, 10);
        tracker.insert(start + Duration::from_secs(10), 1000);
        assert_eq!(tracker.holes_older_than(start + Duration::from_secs(39), patience, 9), []);
        let later = start + Duration::from_secs(40);
        assert_eq!(tracker.clone().holes_older_than(later, patience, 1), [0..10]);
        assert_eq!(tracker.holes_older_than(later, patience, 9), [0..10, 11..1000]);
    }

    #[test]
    fn the_clock_going_backwards_makes_no_hole_old() {
        let before = clock::now();
        let mut tracker = GapTracker::new(64);
        tracker.insert(before + Duration::from_secs(999), 3);
        assert_eq!(tracker.holes_older_than(before, Duration::from_secs(1), 9), []);
    }

    #[test]
    fn the_highest_numbers_of_all_are_tracked_without_overflow() {
        let now = clock::now();
        let mut tracker = GapTracker::starting_at(100, u64::MAX - 3);
        assert_eq!(tracker.insert(now, u64::MAX), Inserted::BeyondWindow);
        for sequence in u64::MAX - 3..u64::MAX {
            assert_eq!(tracker.insert(now, sequence), Inserted::New);
        }
        assert_eq!(tracker.watermark(), u64::MAX);
        assert_eq!(tracker.insert(now, u64::MAX), Inserted::BeyondWindow);
        assert_eq!(tracker.gaps(1), []);
    }
}
