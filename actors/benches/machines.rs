//! The machines that every block passes: the server's gap tracker and the agent's send window.
//!
//! `cargo bench -p strandline-actors --bench machines`. Times are those of one frame.

#![expect(clippy::unwrap_used, reason = "a bench that meets an error has nothing to measure")]

use std::collections::BTreeMap;
use std::time::Instant;

use divan::{Bencher, black_box};
use strandline_actors::machines::gap_tracker::{GapTracker, Inserted};
use strandline_actors::machines::send_window::SendWindow;
use strandline_actors::runtime::clock;
use strandline_messages::StreamIndex;
use strandline_messages::limits::SEQUENCE_WINDOW;

/// Frames after which a prepared order begins again, higher up.
const ROUND: u64 = 1 << 16;
const STREAM: StreamIndex = StreamIndex(0);

fn main() {
    divan::main();
}

/// Whatever can take in sequence numbers.
trait Tracker {
    fn new(window: u64) -> Self;
    fn take(&mut self, now: Instant, sequence: u64);
}

impl Tracker for GapTracker {
    fn new(window: u64) -> Self {
        Self::new(window)
    }

    fn take(&mut self, now: Instant, sequence: u64) {
        assert_eq!(self.insert(now, sequence), Inserted::New);
    }
}

/// What the gap tracker could have been: intervals above a watermark, first → one past the last.
struct Intervals {
    watermark: u64,
    above: BTreeMap<u64, u64>,
}

impl Tracker for Intervals {
    fn new(_: u64) -> Self {
        Self { watermark: 0, above: BTreeMap::new() }
    }

    fn take(&mut self, _: Instant, sequence: u64) {
        let end = self.above.remove(&(sequence + 1)).unwrap_or(sequence + 1);
        if sequence == self.watermark {
            self.watermark = end;
            return;
        }
        match self.above.range_mut(..sequence).next_back() {
            Some((_, before)) if *before == sequence => *before = end,
            _ => {
                self.above.insert(sequence, end);
            }
        }
    }
}

/// Each number below [`ROUND`] once, none of them [`SEQUENCE_WINDOW`] or more before a lower one.
fn at_random() -> Vec<u64> {
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut order: Vec<u64> = (0..ROUND).collect();
    order.sort_by_cached_key(|sequence| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        sequence + random % SEQUENCE_WINDOW
    });
    order
}

fn track<T: Tracker>(bencher: Bencher<'_, '_>, order: &[u64]) {
    let (mut tracker, now) = (T::new(SEQUENCE_WINDOW), clock::now());
    let rounds = (0u64..).step_by(order.len());
    let mut sequences = rounds.flat_map(|first| order.iter().map(move |sequence| first + sequence));
    bencher.bench_local(move || tracker.take(now, sequences.next().unwrap()));
}

#[divan::bench(types = [GapTracker, Intervals])]
fn frame_in_order<T: Tracker>(bencher: Bencher<'_, '_>) {
    track::<T>(bencher, &(0..ROUND).collect::<Vec<_>>());
}

#[divan::bench(types = [GapTracker, Intervals])]
fn frame_at_random<T: Tracker>(bencher: Bencher<'_, '_>) {
    track::<T>(bencher, &at_random());
}

/// The worst acknowledgement: every second number of the window is missing.
#[divan::bench]
fn ranges_of_a_window_full_of_gaps(bencher: Bencher<'_, '_>) {
    let mut tracker = GapTracker::new(SEQUENCE_WINDOW);
    for sequence in (1..SEQUENCE_WINDOW).step_by(2) {
        tracker.insert(clock::now(), sequence);
    }
    bencher.bench_local(|| black_box(&tracker).intervals().count());
}

/// One block from its push to its acknowledgement, while so many others are in flight.
#[divan::bench(args = [16, 256, SEQUENCE_WINDOW - 1])]
fn block_through_the_window(bencher: Bencher<'_, '_>, in_flight: u64) {
    let mut window = SendWindow::new(SEQUENCE_WINDOW);
    let mut send = move || {
        window.push((), 1 << 20).unwrap();
        let (sequence, ()) = window.next_for(STREAM).unwrap();
        window.acknowledge((sequence.0 + 1).saturating_sub(in_flight), &[]).bytes
    };
    (0..in_flight).for_each(|_| {
        send();
    });
    bencher.bench_local(send);
}

/// A full window whose only stream is lost, and all of it taken by the next.
#[divan::bench]
fn full_window_to_another_stream(bencher: Bencher<'_, '_>) {
    let full = || {
        let mut window = SendWindow::new(SEQUENCE_WINDOW);
        for _ in 0..SEQUENCE_WINDOW {
            window.push((), 1 << 20).unwrap();
            window.next_for(STREAM);
        }
        window
    };
    bencher.with_inputs(full).bench_local_values(|mut window| {
        assert_eq!(window.stream_lost(STREAM) as u64, SEQUENCE_WINDOW);
        while window.next_for(StreamIndex(1)).is_some() {}
        window
    });
}
