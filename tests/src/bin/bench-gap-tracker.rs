//! `bench-gap-tracker`: what the gap tracker costs for each frame, in order and at random, and how much memory it keeps.
//!
//! Run it as `cargo run --release -p strandline-tests --bin bench-gap-tracker`. By default 10⁹ frames; beside the
//! tracker it measures two other ways to keep intervals (a sorted vector, a B-tree), because the choice of a ring of
//! bits rests on this comparison. The time of making the order itself is measured alone and subtracted.

use std::collections::BTreeMap;
use std::fs;
use std::hint::black_box;
use std::time::{Duration, Instant};

use clap::Parser;
use strandline_actors::machines::gap_tracker::{GapTracker, Inserted};
use strandline_actors::runtime::clock;
use strandline_messages::limits::SEQUENCE_WINDOW;

/// Measures the gap tracker.
#[derive(Parser)]
struct Arguments {
    /// Frames given to the tracker, for each order.
    #[arg(long, default_value_t = 1_000_000_000)]
    frames: u64,
    /// Frames given to each of the alternatives.
    #[arg(long, default_value_t = 20_000_000)]
    alternative_frames: u64,
}

/// Whatever can take in sequence numbers.
trait Tracker {
    /// Takes in one number.
    fn take(&mut self, sequence: u64);
    /// Every number below is in.
    fn complete_to(&self) -> u64;
    /// Bytes of memory held.
    fn bytes(&self) -> usize;
}

struct Ring(GapTracker, Instant);

impl Tracker for Ring {
    fn take(&mut self, sequence: u64) {
        assert_eq!(self.0.insert(self.1, sequence), Inserted::New);
    }

    fn complete_to(&self) -> u64 {
        self.0.watermark()
    }

    fn bytes(&self) -> usize {
        self.0.memory_bytes()
    }
}

/// Intervals (first, one past the last) in a sorted vector.
#[derive(Default)]
struct SortedVector {
    watermark: u64,
    intervals: Vec<(u64, u64)>,
}

impl Tracker for SortedVector {
    fn take(&mut self, sequence: u64) {
        let at = self.intervals.partition_point(|interval| interval.1 < sequence);
        match self.intervals.get_mut(at) {
            Some(interval) if interval.1 == sequence => {
                interval.1 += 1;
                let end = interval.1;
                if let Some(&(start, next_end)) = self.intervals.get(at + 1)
                    && start == end
                {
                    self.intervals.remove(at + 1);
                    if let Some(interval) = self.intervals.get_mut(at) {
                        interval.1 = next_end;
                    }
                }
            }
            Some(interval) if interval.0 == sequence + 1 => interval.0 = sequence,
            _ => self.intervals.insert(at, (sequence, sequence + 1)),
        }
        if let Some(&(start, end)) = self.intervals.first()
            && start == self.watermark
        {
            self.watermark = end;
            self.intervals.remove(0);
        }
    }

    fn complete_to(&self) -> u64 {
        self.watermark
    }

    fn bytes(&self) -> usize {
        size_of::<Self>() + self.intervals.capacity() * size_of::<(u64, u64)>()
    }
}

/// Intervals in a B-tree: first → one past the last.
#[derive(Default)]
struct Tree {
    watermark: u64,
    intervals: BTreeMap<u64, u64>,
    intervals_most: usize,
}

impl Tracker for Tree {
    fn take(&mut self, sequence: u64) {
        let end = self.intervals.remove(&(sequence + 1)).unwrap_or(sequence + 1);
        if sequence == self.watermark {
            self.watermark = end;
            return;
        }
        match self.intervals.range_mut(..sequence).next_back() {
            Some((_, before)) if *before == sequence => *before = end,
            _ => {
                self.intervals.insert(sequence, end);
            }
        }
        self.intervals_most = self.intervals_most.max(self.intervals.len());
    }

    fn complete_to(&self) -> u64 {
        self.watermark
    }

    fn bytes(&self) -> usize {
        size_of::<Self>() + self.intervals_most * 2 * size_of::<u64>()
    }
}

/// Feeds 0..`frames` in a random order in which no number comes `SEQUENCE_WINDOW` or more before a lower one.
///
/// A reservoir of half a window: each step delivers a random one and puts the next number in its place. One that has
/// waited too long is delivered first.
fn at_random(frames: u64, mut deliver: impl FnMut(u64)) {
    let places = SEQUENCE_WINDOW / 2;
    let mut waiting: Vec<u64> = (0..places.min(frames)).collect();
    // The reservoir again by age, as a queue of (number, place); entries that were delivered are skipped.
    let mut oldest = 0u64;
    let mut delivered = vec![false; usize::try_from(2 * SEQUENCE_WINDOW).unwrap_or(0)];
    let slot = |sequence: u64| usize::try_from(sequence % (2 * SEQUENCE_WINDOW)).unwrap_or(0);
    let mut place_of: Vec<usize> = (0..delivered.len()).collect();
    let mut random = 0x2545_f491_4f6c_dd1du64;
    let mut next = waiting.len() as u64;
    while !waiting.is_empty() {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let mut place = usize::try_from((u128::from(random) * waiting.len() as u128) >> 64).unwrap_or(0);
        if next - oldest >= SEQUENCE_WINDOW {
            place = place_of.get(slot(oldest)).copied().unwrap_or(0);
        }
        let Some(sequence) = waiting.get(place).copied() else { return };
        deliver(sequence);
        if let Some(flag) = delivered.get_mut(slot(sequence)) {
            *flag = true;
        }
        while oldest < next && delivered.get(slot(oldest)).copied().unwrap_or(false) {
            if let Some(flag) = delivered.get_mut(slot(oldest)) {
                *flag = false;
            }
            oldest += 1;
        }
        let incoming = if next < frames {
            next += 1;
            if let Some(seat) = waiting.get_mut(place) {
                *seat = next - 1;
            }
            Some(next - 1)
        } else {
            waiting.swap_remove(place);
            waiting.get(place).copied()
        };
        if let Some(seat) = incoming.and_then(|moved| place_of.get_mut(slot(moved))) {
            *seat = place;
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "a count of frames is far below 2^53")]
fn ns_per_frame(took: Duration, frames: u64) -> f64 {
    took.as_secs_f64() * 1e9 / frames as f64
}

fn timed(work: impl FnOnce()) -> Duration {
    let start = clock::now();
    work();
    clock::now().saturating_duration_since(start)
}

fn measure(name: &str, frames: u64, make: impl Fn() -> Box<dyn Tracker>) {
    let mut tracker = make();
    let in_order = timed(|| (0..frames).for_each(|sequence| tracker.take(sequence)));
    assert_eq!(tracker.complete_to(), frames, "{name} lost count in order");

    let making = timed(|| {
        at_random(frames, |sequence| {
            black_box(sequence);
        });
    });
    let mut tracker = make();
    let random = timed(|| at_random(frames, |sequence| tracker.take(sequence))).saturating_sub(making);
    assert_eq!(tracker.complete_to(), frames, "{name} lost count at random");
    println!(
        "{name:<14} {frames:>13} frames   in order {:>6.1} ns   at random {:>6.1} ns   {:>7} bytes",
        ns_per_frame(in_order, frames),
        ns_per_frame(random, frames),
        tracker.bytes()
    );
}

fn main() {
    let arguments = Arguments::parse();
    println!("nanoseconds for each frame; random order inside a window of {SEQUENCE_WINDOW}");
    let others = arguments.alternative_frames;
    measure("sorted vector", others, || Box::new(SortedVector::default()));
    measure("B-tree", others, || Box::new(Tree::default()));
    measure("ring of bits", arguments.frames, || Box::new(Ring(GapTracker::new(SEQUENCE_WINDOW), clock::now())));
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    if let Some(line) = status.lines().find(|line| line.starts_with("VmHWM")) {
        println!("whole process, {line}");
    }
}
