//! The agent's sealed blocks, from the moment they are sealed until the server has made them durable.
//!
//! Owned by the `Dispatcher` actor. Blocks belong to the session, not to a stream (G5): a stream only borrows them, and
//! what a dead stream did not get acknowledged goes to the next stream that asks.
//!
//! Invariants:
//! - slots hold sequences `base ..`, without a gap in numbering; the slot of an acknowledged block is empty, and the
//!   first slot is never empty, so `base` is the lowest sequence that is not acknowledged;
//! - a block that is not acknowledged is waiting to be sent, or some stream carries it, or both (a retransmission);
//! - an acknowledgement counts only for a block that has been sent under this numbering;
//! - memory is that of the blocks pushed and not acknowledged, [`SendWindow::bytes`], plus a slot for each sequence
//!   between the lowest of them and the highest. Whoever pushes keeps that bounded: it waits while `bytes()` is above
//!   its budget. No sequence at or above `base + window` is ever sent, so slots that are empty number at most `window`.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;

use strandline_messages::{Sequence, StreamIndex};

use crate::planted::{self, Bug};

/// A block was pushed after [`SendWindow::close`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "the session's queue is closed, so this block was not accepted; blocks accepted before are not affected: reopen the queue to send more"
)]
pub struct Closed;

/// What an acknowledgement achieved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Acknowledged<B> {
    /// The blocks that are durable from now on, by ascending sequence. Each block appears in one acknowledgement only.
    pub blocks: Vec<(Sequence, B)>,
    /// The bytes that they held, as given to [`SendWindow::push`].
    pub bytes: u64,
}

#[derive(Debug, Clone)]
struct Slot<B> {
    block: B,
    bytes: u64,
    /// Whether any stream ever took it under this numbering.
    sent: bool,
    /// The streams that have it in flight; usually one.
    carriers: Vec<StreamIndex>,
}

/// Sealed blocks by sequence until they are acknowledged. See the module's text. `B` is cheap to clone, as `Bytes` is.
#[derive(Debug, Clone)]
pub struct SendWindow<B> {
    /// How many sequences from the lowest unacknowledged one the receiver accepts. At least 1.
    window: u64,
    /// The sequence of the first slot.
    base: u64,
    /// `None` where acknowledged.
    slots: VecDeque<Option<Slot<B>>>,
    /// Sequences that wait to be sent, for the first time or again.
    waiting: BTreeSet<u64>,
    /// How many blocks each stream carries; a stream that carries none is absent.
    carried: BTreeMap<StreamIndex, usize>,
    /// Bytes of all slots that are not empty.
    bytes: u64,
    closed: bool,
}

impl<B: Clone> SendWindow<B> {
    /// An empty, open window whose receiver accepts `window` sequences from its watermark on
    /// (`limits::SEQUENCE_WINDOW`, or what `SessionOpened` says).
    pub fn new(window: u64) -> Self {
        Self {
            window: window.max(1),
            base: 0,
            slots: VecDeque::new(),
            waiting: BTreeSet::new(),
            carried: BTreeMap::new(),
            bytes: 0,
            closed: false,
        }
    }

    /// Accepts a sealed block that occupies `bytes` bytes of memory, and gives it the next sequence number.
    ///
    /// Never blocks and has no bound of its own: the caller admits blocks by [`Self::bytes`].
    pub fn push(&mut self, block: B, bytes: u64) -> Result<Sequence, Closed> {
        if self.closed {
            return Err(Closed);
        }
        let sequence = self.next();
        self.slots.push_back(Some(Slot { block, bytes, sent: false, carriers: Vec::new() }));
        self.waiting.insert(sequence);
        self.bytes = self.bytes.saturating_add(bytes);
        Ok(Sequence(sequence))
    }

    /// The block that `stream` sends next: the lowest that waits. It is in flight on that stream from now on.
    ///
    /// `None` when nothing waits, or when what waits lies beyond the receiver's window; ask again after the next push,
    /// acknowledgement, retransmission or lost stream. `stream` only has to be unique among the connections of the
    /// moment: a rotated stream's new connection may be given any number that is free.
    pub fn next_for(&mut self, stream: StreamIndex) -> Option<(Sequence, B)> {
        let sequence = *self.waiting.first()?;
        if sequence - self.base >= self.window {
            return None;
        }
        self.waiting.remove(&sequence);
        let slot = self.slot_mut(sequence)?;
        slot.sent = true;
        let block = slot.block.clone();
        if !slot.carriers.contains(&stream) {
            slot.carriers.push(stream);
            *self.carried.entry(stream).or_default() += 1;
        }
        Some((Sequence(sequence), block))
    }

    /// Whether [`Self::next_for`] would give a block now.
    pub fn has_next(&self) -> bool {
        self.waiting.first().is_some_and(|&sequence| sequence - self.base < self.window)
    }

    /// The receiver says that everything below `watermark` and everything in `ranges` (half-open) is durable.
    ///
    /// Harmless when repeated, out of order, empty, reversed, or about sequences that this window never sent. It must
    /// be about *this* numbering: after [`Self::restart`] drop acknowledgements that were meant for the old session.
    pub fn acknowledge(&mut self, watermark: u64, ranges: &[Range<u64>]) -> Acknowledged<B> {
        let mut done = Acknowledged { blocks: Vec::new(), bytes: 0 };
        let first = self.base;
        self.take_sent(first..watermark, &mut done);
        for range in ranges {
            self.take_sent(range.clone(), &mut done);
        }
        done.blocks.sort_unstable_by_key(|(sequence, _)| *sequence);
        while let Some(None) = self.slots.front() {
            self.slots.pop_front();
            self.base += 1;
        }
        done
    }

    fn take_sent(&mut self, range: Range<u64>, done: &mut Acknowledged<B>) {
        for sequence in self.known_part(&range) {
            let Some(place) = self.place_mut(sequence) else { continue };
            let Some(slot) = place.take_if(|slot| slot.sent) else { continue };
            self.waiting.remove(&sequence);
            for stream in slot.carriers {
                self.put_down(stream);
            }
            self.bytes = self.bytes.saturating_sub(slot.bytes);
            done.bytes = done.bytes.saturating_add(slot.bytes);
            done.blocks.push((Sequence(sequence), slot.block));
        }
    }

    /// `stream` is gone, whatever the reason: what only it carried waits to be sent by others, before anything newer.
    ///
    /// Returns how many blocks that is. A stream that is not known carried nothing.
    pub fn stream_lost(&mut self, stream: StreamIndex) -> usize {
        if self.carried.remove(&stream).is_none() || planted::here(Bug::ForgetsWhatADeadStreamCarried) {
            return 0;
        }
        let mut orphans = 0;
        for (sequence, slot) in (self.base..).zip(&mut self.slots) {
            let Some(slot) = slot else { continue };
            let before = slot.carriers.len();
            slot.carriers.retain(|carrier| *carrier != stream);
            if slot.carriers.len() < before && slot.carriers.is_empty() {
                orphans += usize::from(self.waiting.insert(sequence));
            }
        }
        orphans
    }

    /// The receiver misses `ranges` (half-open): what of them is in flight waits to be sent again, by any stream.
    ///
    /// No stream counts as carrying it any more. Returns how many blocks that is.
    pub fn retransmit(&mut self, ranges: &[Range<u64>]) -> usize {
        let mut again = 0;
        for range in ranges {
            for sequence in self.known_part(range) {
                let Some(slot) = self.slot_mut(sequence) else { continue };
                if !slot.sent {
                    continue;
                }
                let carriers = std::mem::take(&mut slot.carriers);
                for stream in carriers {
                    self.put_down(stream);
                }
                again += usize::from(self.waiting.insert(sequence));
            }
        }
        again
    }

    /// No more blocks will be pushed. Closes the queue and nothing else: streams go on until the window is drained.
    pub fn close(&mut self) {
        self.closed = true;
    }

    /// More blocks follow after all: the server answered the commit with `Missing`.
    pub fn reopen(&mut self) {
        self.closed = false;
    }

    /// Whether the queue is closed.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Closed, and every block ever pushed is acknowledged durable. Sent is not enough.
    pub fn is_drained(&self) -> bool {
        self.closed && self.slots.is_empty()
    }

    /// A new session takes over: what is not acknowledged is numbered from 0 again, in order, and waits to be sent.
    ///
    /// No stream carries anything any more. Whether the queue is closed does not change.
    pub fn restart(&mut self) {
        let forgets_sent = planted::here(Bug::ForgetsWhatTheOldSessionCarried);
        self.slots.retain(|slot| slot.as_ref().is_some_and(|slot| !(slot.sent && forgets_sent)));
        for slot in self.slots.iter_mut().flatten() {
            slot.sent = false;
            slot.carriers.clear();
        }
        self.base = 0;
        self.carried.clear();
        self.waiting = (0..self.next()).collect();
    }

    /// The blocks that are not acknowledged, by ascending sequence.
    pub fn unacknowledged(&self) -> impl Iterator<Item = (Sequence, &B)> {
        (self.base..).zip(&self.slots).filter_map(|(n, slot)| slot.as_ref().map(|slot| (Sequence(n), &slot.block)))
    }

    /// The highest sequence given out so far; `None` when this session's numbering has no block yet.
    pub fn last_sequence(&self) -> Option<Sequence> {
        self.next().checked_sub(1).map(Sequence)
    }

    /// Bytes pushed and not acknowledged.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Blocks pushed and not acknowledged.
    pub fn blocks(&self) -> usize {
        self.slots.iter().flatten().count()
    }

    /// Blocks that `stream` has in flight. A draining stream may say good-bye when it is zero.
    pub fn in_flight(&self, stream: StreamIndex) -> usize {
        self.carried.get(&stream).copied().unwrap_or(0)
    }

    /// The sequence that the next push gets.
    fn next(&self) -> u64 {
        self.base + self.slots.len() as u64
    }

    /// The part of `range` that has slots. At most as many numbers as there are slots, whatever the range says.
    fn known_part(&self, range: &Range<u64>) -> Range<u64> {
        range.start.max(self.base)..range.end.min(self.next())
    }

    fn place_mut(&mut self, sequence: u64) -> Option<&mut Option<Slot<B>>> {
        let index = usize::try_from(sequence.checked_sub(self.base)?).ok()?;
        self.slots.get_mut(index)
    }

    fn slot_mut(&mut self, sequence: u64) -> Option<&mut Slot<B>> {
        self.place_mut(sequence)?.as_mut()
    }

    fn put_down(&mut self, stream: StreamIndex) {
        if let Some(count) = self.carried.get_mut(&stream) {
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.carried.remove(&stream);
            }
        }
    }
}

#[cfg(test)]
#[expect(clippy::single_range_in_vec_init, reason = "a list of one range is meant")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::machines::gap_tracker::{GapTracker, Inserted};
    use crate::runtime::clock;

    const A: StreamIndex = StreamIndex(0);
    const B: StreamIndex = StreamIndex(1);

    fn filled(blocks: u64) -> SendWindow<u64> {
        let mut window = SendWindow::new(4096);
        for block in 0..blocks {
            assert_eq!(window.push(block, 10), Ok(Sequence(block)));
        }
        window
    }

    fn take(window: &mut SendWindow<u64>, stream: StreamIndex, count: usize) -> Vec<u64> {
        (0..count).map_while(|_| window.next_for(stream)).map(|(sequence, _)| sequence.0).collect()
    }

    #[test]
    fn s04_a_dead_streams_blocks_go_out_first_on_the_others() {
        let mut window = filled(6);
        assert_eq!(take(&mut window, A, 2), [0, 1]);
        assert_eq!(take(&mut window, B, 2), [2, 3]);
        assert_eq!(window.acknowledge(1, &[]).blocks, [(Sequence(0), 0)]);
        assert_eq!(window.stream_lost(A), 1);
        assert_eq!(window.stream_lost(A), 0, "a second loss of the same stream changes nothing");
        assert_eq!(take(&mut window, B, 9), [1, 4, 5]);
        assert_eq!((window.in_flight(A), window.in_flight(B)), (0, 5));
    }

    /// The successor joins before the old connection drains, one stream at a time (s15).
    #[test]
    fn s15_streams_that_are_replaced_one_by_one_never_empty_the_pipeline_and_send_nothing_twice() {
        let mut window = SendWindow::new(4096);
        let mut live: Vec<StreamIndex> = (0..4).map(StreamIndex).collect();
        let mut sent = Vec::new();
        for round in 0..40u16 {
            let successor = StreamIndex(4 + round);
            live.push(successor);
            for block in 0..16 {
                window.push(block, 10).unwrap();
            }
            for &stream in &live {
                sent.extend(take(&mut window, stream, 3));
            }
            // The oldest takes nothing more, and says good-bye when what it carries is acknowledged.
            let leaving = live.remove(0);
            assert!(live.iter().filter(|&&stream| window.in_flight(stream) > 0).count() >= 4, "round {round}");
            assert!(window.in_flight(leaving) > 0);
            let (done, last) = (sent.len() as u64, window.last_sequence().unwrap().0);
            window.acknowledge(done, &[]);
            assert_eq!(window.in_flight(leaving), 0);
            assert_eq!(window.stream_lost(leaving), 0, "nothing is left for others");
            assert!(last >= done);
        }
        assert!(sent.is_sorted() && sent.windows(2).all(|pair| pair[0] < pair[1]), "sent twice");
    }

    #[test]
    fn s04_a_block_that_two_streams_carry_survives_the_death_of_one_without_a_third_copy() {
        let mut window = filled(1);
        take(&mut window, A, 1);
        window.stream_lost(A);
        take(&mut window, B, 1);
        assert_eq!(window.retransmit(&[0..1]), 1);
        assert_eq!(window.retransmit(&[0..1]), 0, "asked for twice, sent once");
        assert_eq!(take(&mut window, A, 1), [0]);
        assert_eq!(window.stream_lost(B), 0);
        let done = window.acknowledge(0, &[0..1]);
        assert_eq!((done.blocks.len(), done.bytes), (1, 10));
        assert_eq!(window.acknowledge(1, &[0..1]).bytes, 0, "acknowledged once");
        assert_eq!(window.in_flight(A), 0);
    }

    #[test]
    fn s16_drained_means_acknowledged_and_never_merely_sent() {
        let mut window = filled(3);
        assert!(!window.is_drained());
        window.close();
        assert_eq!(take(&mut window, A, 9), [0, 1, 2]);
        assert!(!window.is_drained(), "everything is sent and nothing acknowledged");
        window.acknowledge(0, &[1..3]);
        assert!(!window.is_drained());
        window.stream_lost(A);
        assert_eq!(take(&mut window, B, 9), [0]);
        window.acknowledge(3, &[]);
        assert!(window.is_drained());
        assert_eq!(window.last_sequence(), Some(Sequence(2)));
        assert_eq!(window.push(9, 1), Err(Closed));
        window.reopen();
        assert!(!window.is_drained());
        assert_eq!(window.push(9, 1), Ok(Sequence(3)));
    }

    #[test]
    fn s16_an_open_queue_is_not_drained_even_when_it_is_empty() {
        let mut window = SendWindow::<u64>::new(8);
        assert!(!window.is_drained());
        assert_eq!(window.last_sequence(), None);
        window.close();
        assert!(window.is_drained());
    }

    #[test]
    fn s10_only_sequence_numbers_decide_and_bytes_never_do() {
        let mut window = SendWindow::new(8);
        for (block, bytes) in [(0u64, 0u64), (1, u64::MAX), (2, 7)] {
            window.push(block, bytes).unwrap();
        }
        take(&mut window, A, 9);
        assert_eq!(window.acknowledge(1, &[2..3]).blocks, [(Sequence(0), 0), (Sequence(2), 2)]);
        window.close();
        assert!(!window.is_drained(), "number 1 is missing, whatever the byte count says");
        window.acknowledge(3, &[]);
        assert!(window.is_drained());
    }

    #[test]
    fn nonsense_from_the_peer_acknowledges_nothing() {
        let mut window = filled(4);
        take(&mut window, A, 2);
        let reversed = Range { start: 9, end: 3 };
        let done = window.acknowledge(u64::MAX, &[u64::MAX - 1..u64::MAX, reversed.clone(), 2..4, 100..900]);
        assert_eq!(done.blocks, [(Sequence(0), 0), (Sequence(1), 1)], "numbers 2 and 3 were never sent");
        assert_eq!(window.retransmit(&[0..u64::MAX, reversed]), 0);
        assert_eq!(take(&mut window, A, 9), [2, 3]);
        assert_eq!(window.bytes(), 20);
    }

    #[test]
    fn nothing_beyond_the_receivers_window_is_sent() {
        let mut window = SendWindow::new(2);
        for block in 0..5u64 {
            window.push(block, 1).unwrap();
        }
        assert_eq!(take(&mut window, A, 9), [0, 1]);
        assert!(!window.has_next());
        window.acknowledge(0, &[1..2]);
        assert_eq!(take(&mut window, A, 9), [0u64; 0], "the watermark has not moved");
        window.acknowledge(1, &[]);
        assert!(window.has_next());
        assert_eq!(take(&mut window, A, 9), [2, 3]);
    }

    #[test]
    fn a_new_session_gets_what_is_left_numbered_from_zero() {
        let mut window = filled(6);
        take(&mut window, A, 4);
        window.acknowledge(1, &[2..3]);
        window.restart();
        let sent: Vec<_> = std::iter::from_fn(|| window.next_for(B)).collect();
        assert_eq!(sent, [(Sequence(0), 1), (Sequence(1), 3), (Sequence(2), 4), (Sequence(3), 5)]);
        assert_eq!(window.last_sequence(), Some(Sequence(3)));
        assert_eq!((window.bytes(), window.blocks()), (40, 4));
    }

    /// What may happen to a session, in any order.
    #[derive(Debug, Clone)]
    enum Event {
        Push,
        Send { stream: u16 },
        Arrive { stream: u16 },
        Acknowledge { lost: bool, whole: bool },
        Kill { streams: u16 },
        Retransmit,
        Restart,
    }

    fn event() -> impl Strategy<Value = Event> {
        prop_oneof![
            4 => Just(Event::Push),
            6 => (0..STREAMS).prop_map(|stream| Event::Send { stream }),
            6 => (0..STREAMS).prop_map(|stream| Event::Arrive { stream }),
            3 => any::<(bool, bool)>().prop_map(|(lost, whole)| Event::Acknowledge { lost, whole }),
            1 => (0..1u16 << STREAMS).prop_map(|streams| Event::Kill { streams }),
            1 => Just(Event::Retransmit),
            1 => Just(Event::Restart),
        ]
    }

    const STREAMS: u16 = 4;
    const WINDOW: u64 = 16;

    /// A sender, its streams as queues of frames under way, and a receiver that makes durable whatever arrives.
    struct Model {
        window: SendWindow<u64>,
        pushed: u64,
        wires: Vec<VecDeque<(u64, u64)>>,
        tracker: GapTracker,
        /// Blocks by number in this session, as the receiver stored them.
        stored: BTreeMap<u64, u64>,
        /// Blocks that the sender was told are durable, in all sessions.
        freed: BTreeSet<u64>,
        /// Blocks that any session of the receiver has stored.
        durable: BTreeSet<u64>,
    }

    impl Model {
        fn new() -> Self {
            Self {
                window: SendWindow::new(WINDOW),
                pushed: 0,
                wires: vec![VecDeque::new(); STREAMS.into()],
                tracker: GapTracker::new(WINDOW),
                stored: BTreeMap::new(),
                freed: BTreeSet::new(),
                durable: BTreeSet::new(),
            }
        }

        fn apply(&mut self, event: &Event) {
            match *event {
                Event::Push => {
                    self.window.push(self.pushed, 1).unwrap();
                    self.pushed += 1;
                }
                Event::Send { stream } => {
                    if let Some((sequence, block)) = self.window.next_for(StreamIndex(stream)) {
                        self.wires[usize::from(stream)].push_back((sequence.0, block));
                    }
                }
                Event::Arrive { stream } => {
                    if let Some((sequence, block)) = self.wires[usize::from(stream)].pop_front() {
                        self.arrive(sequence, block);
                    }
                }
                Event::Acknowledge { lost: true, .. } => {}
                Event::Acknowledge { lost: false, whole } => self.acknowledge(whole),
                Event::Kill { streams } => {
                    for stream in (0..STREAMS).filter(|n| streams >> n & 1 == 1) {
                        self.wires[usize::from(stream)].clear();
                        self.window.stream_lost(StreamIndex(stream));
                    }
                }
                Event::Retransmit => {
                    self.window.retransmit(&self.tracker.gaps(4));
                }
                Event::Restart => {
                    self.wires.iter_mut().for_each(VecDeque::clear);
                    self.window.restart();
                    self.tracker = GapTracker::new(WINDOW);
                    self.stored.clear();
                }
            }
            self.check();
        }

        fn arrive(&mut self, sequence: u64, block: u64) {
            match self.tracker.insert(clock::now(), sequence) {
                Inserted::New => assert_eq!(self.stored.insert(sequence, block), None),
                Inserted::Duplicate => assert_eq!(self.stored[&sequence], block, "one number, two blocks"),
                Inserted::BeyondWindow => panic!("{sequence} was sent beyond the window"),
            }
            self.durable.insert(block);
        }

        fn acknowledge(&mut self, whole: bool) {
            let ranges: Vec<_> = self.tracker.intervals().take(if whole { usize::MAX } else { 1 }).collect();
            let done = self.window.acknowledge(self.tracker.watermark(), &ranges);
            for (sequence, block) in done.blocks {
                assert_eq!(self.stored[&sequence.0], block);
                assert!(self.freed.insert(block), "block {block} was acknowledged twice");
            }
        }

        fn check(&self) {
            assert_eq!(self.window.bytes(), self.pushed - self.freed.len() as u64);
            assert_eq!(self.window.blocks() as u64, self.window.bytes());
            assert!(self.freed.is_subset(&self.durable));
            for stream in 0..STREAMS {
                let carried = self.window.slots.iter().flatten();
                let carried = carried.filter(|slot| slot.carriers.contains(&StreamIndex(stream))).count();
                assert_eq!(self.window.in_flight(StreamIndex(stream)), carried);
            }
            for (sequence, slot) in (self.window.base..).zip(&self.window.slots) {
                let Some(slot) = slot else { continue };
                assert!(
                    !slot.carriers.is_empty() || self.window.waiting.contains(&sequence),
                    "nobody will ever send {sequence}"
                );
            }
            assert!(!matches!(self.window.slots.front(), Some(None)));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(2000))]

        #[test]
        fn s04_whatever_streams_die_and_acknowledgements_are_lost_every_block_is_acknowledged_once(
            events in prop::collection::vec(event(), 0..300),
        ) {
            let mut model = Model::new();
            for event in &events {
                model.apply(event);
                prop_assert!(!model.window.is_drained());
            }
            // The network heals, with the last stream only. Everything must come to an end without another fault.
            model.window.close();
            for stream in 0..STREAMS - 1 {
                model.apply(&Event::Kill { streams: 1 << stream });
            }
            let stream = STREAMS - 1;
            for _ in 0..4 * model.pushed + 64 {
                model.apply(&Event::Send { stream });
                model.apply(&Event::Arrive { stream });
                model.apply(&Event::Acknowledge { lost: false, whole: false });
            }
            prop_assert!(model.window.is_drained());
            prop_assert_eq!(model.freed.len() as u64, model.pushed);
            if let Some(last) = model.window.last_sequence() {
                prop_assert!(model.tracker.watermark() > last.0);
            }
        }
    }
}
