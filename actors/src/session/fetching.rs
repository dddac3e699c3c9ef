//! The sending side of a restore session: which block is being read, which stream takes it, who waits for the answer.

use std::collections::{BTreeMap, HashMap, VecDeque};

use bytes::Bytes;
use strandline_messages::mail::SendBlock;
use strandline_messages::wire::{BlockFrame, Credit, FetchDone, Message};
use strandline_messages::{ChunkId, Incarnation, Sequence, StreamIndex, limits};
use tokio::sync::oneshot;

use crate::machines::fetch::{Errand, FetchQueue};
use crate::planted::{self, Bug};
use crate::ports::{BlockPlace, StoreFault};

/// Blocks being read from storage, and read but not yet given to a stream: enough to keep a disk busy, and what a restore
/// costs in memory beside what its streams hold.
const READS_MAX: usize = 8;
/// Blocks given to one stream and not yet written: one on the wire, one behind it.
const BLOCKS_AHEAD: usize = 2;

/// Where each wanted chunk is.
type Located = Vec<(ChunkId, Option<BlockPlace>)>;

/// What a stream carries.
#[derive(Clone, Copy, Default)]
struct Lane {
    /// Which connection of it.
    incarnation: Incarnation,
    /// Blocks given to it and not yet written.
    ahead: usize,
    /// When it was last given one, counted in blocks.
    turn: u64,
}

/// See the module. Bounded by the credit: nothing is read that the agent has not made room for.
pub struct Fetching {
    /// Requests that are being located, or wait for an earlier one that is. The agent uses what it asked for in this order:
    /// blocks of a later request must not take the credit that an earlier one needs.
    asked: VecDeque<(u32, Option<Located>)>,
    queue: FetchQueue,
    reading: usize,
    ready: VecDeque<(Errand, Bytes)>,
    lanes: BTreeMap<StreamIndex, Lane>,
    turn: u64,
    waiting: HashMap<u32, oneshot::Sender<Message>>,
    /// The last answers, which an agent whose connection was lost asks for again: it has no more open than these.
    answered: VecDeque<FetchDone>,
}

impl Fetching {
    /// Nothing to do yet.
    pub fn new(credit: u64) -> Self {
        Self {
            asked: VecDeque::new(),
            queue: FetchQueue::new(credit),
            reading: 0,
            ready: VecDeque::new(),
            lanes: BTreeMap::new(),
            turn: 0,
            waiting: HashMap::new(),
            answered: VecDeque::new(),
        }
    }

    /// Whether this request may be taken on.
    pub fn may_add(&self, request: u32) -> bool {
        self.waiting.contains_key(&request)
            || self.asked.len() + self.queue.open_requests() < limits::FETCHES_OUTSTANDING_MAX
    }

    /// Gives a request its place in the order; `answer` is told when its last block is on its way. Whether it is new: one that
    /// comes again over another connection is answered, and its blocks are sent, once. The agent counts them.
    pub fn ask(&mut self, request: u32, answer: oneshot::Sender<Message>) -> bool {
        let done = self.answered.iter().find(|done| done.request == request);
        if let Some(done) = done.filter(|_| !planted::here(Bug::ServesTheSameFetchTwice)) {
            // Whoever asks may be gone again.
            let _ = answer.send(Message::FetchDone(done.clone()));
            return false;
        }
        if self.waiting.insert(request, answer).is_some() && !planted::here(Bug::ServesTheSameFetchTwice) {
            return false;
        }
        self.asked.push_back((request, None));
        true
    }

    /// It is known where the request's chunks are. It is taken on once every earlier one is.
    pub fn located(&mut self, request: u32, wanted: Located) {
        if let Some((_, place)) = self.asked.iter_mut().find(|(asked, place)| *asked == request && place.is_none()) {
            *place = Some(wanted);
        }
        self.take_on();
    }

    /// The request's chunks cannot be located.
    pub fn refuse(&mut self, request: u32, answer: Message) {
        self.asked.retain(|(asked, place)| *asked != request || place.is_some());
        if let Some(waiting) = self.waiting.remove(&request) {
            // Whoever asked may be gone.
            let _ = waiting.send(answer);
        }
        self.take_on();
    }

    fn take_on(&mut self) {
        while let Some((request, Some(wanted))) = self.asked.pop_front_if(|(_, place)| place.is_some()) {
            let done = self.queue.add(request, &wanted);
            self.tell(done);
        }
    }

    /// The agent has made room, or says what came over connections that are over.
    pub fn grant(&mut self, credit: &Credit) {
        self.queue.grant(credit.granted);
        for receipt in &credit.receipts {
            self.queue.settle(receipt);
        }
        let queue = &self.queue;
        self.lanes.retain(|index, lane| queue.may_carry(*index, lane.incarnation));
    }

    /// The next block to read from storage.
    pub fn next_read(&mut self) -> Option<Errand> {
        if self.reading + self.ready.len() >= READS_MAX {
            return None;
        }
        let errand = self.queue.next_errand()?;
        self.reading += 1;
        Some(errand)
    }

    /// A read has ended.
    pub fn read_ended(&mut self, errand: Errand, block: Result<Bytes, StoreFault>) {
        self.reading = self.reading.saturating_sub(1);
        match block {
            Ok(block) => self.ready.push_back((errand, block)),
            Err(fault) => {
                let done = self.queue.failed(&errand, &fault.to_string());
                self.tell(done);
            }
        }
    }

    /// The next block to send and the stream with the most room for it. Of several, whose turn it is: sockets take more than
    /// their connections have carried, so that streams with long queues look as empty as idle ones.
    pub fn next_send(&mut self) -> Option<(StreamIndex, SendBlock)> {
        let (&index, lane) = self.lanes.iter_mut().min_by_key(|(_, lane)| (lane.ahead, lane.turn))?;
        if lane.ahead >= BLOCKS_AHEAD {
            return None;
        }
        let (errand, block) = self.ready.pop_front()?;
        self.turn += 1;
        *lane = Lane { ahead: lane.ahead + 1, turn: self.turn, ..*lane };
        let incarnation = lane.incarnation;
        let sequence = Sequence(u64::from(errand.request) << 32 | u64::from(errand.ordinal));
        let done = self.queue.handed(&errand, index, incarnation);
        self.tell(done);
        Some((index, SendBlock(BlockFrame { sequence, block })))
    }

    /// A stream has written a block.
    pub fn written(&mut self, index: StreamIndex, _: Sequence) {
        if let Some(lane) = self.lanes.get_mut(&index) {
            lane.ahead = lane.ahead.saturating_sub(1);
        }
    }

    /// A stream may be sent blocks, unless the agent has called this connection over before it joined.
    pub fn stream_joined(&mut self, index: StreamIndex, incarnation: Incarnation) {
        if self.queue.may_carry(index, incarnation) {
            self.lanes.insert(index, Lane { incarnation, ..Lane::default() });
        }
    }

    /// A stream is gone; the agent asks again for what it did not get.
    pub fn stream_gone(&mut self, index: StreamIndex) {
        self.lanes.remove(&index);
    }

    fn tell(&mut self, done: Option<FetchDone>) {
        let Some(done) = done else { return };
        if let Some(answer) = self.waiting.remove(&done.request) {
            // Whoever asked may be gone; it will ask again over its next connection.
            let _ = answer.send(Message::FetchDone(done.clone()));
        }
        self.answered.push_back(done);
        if self.answered.len() > limits::FETCHES_OUTSTANDING_MAX {
            self.answered.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wanted(offset: u32) -> Located {
        vec![(ChunkId([1; 32]), Some(BlockPlace { pack: 1, offset, bytes: 1 << 20 }))]
    }

    #[test]
    fn a_request_that_is_located_first_does_not_overtake_an_earlier_one() {
        let mut fetching = Fetching::new(1 << 20);
        let (answers, _kept): (Vec<_>, Vec<_>) = (0..3).map(|_| oneshot::channel()).unzip();
        for (request, answer) in (1..).zip(answers) {
            fetching.ask(request, answer);
        }
        fetching.located(2, wanted(2));
        assert_eq!(fetching.next_read(), None, "the first would find the credit used up");
        fetching.located(3, wanted(3));
        fetching.located(1, wanted(1));
        assert_eq!(fetching.next_read().map(|errand| errand.request), Some(1));
        fetching.grant(&Credit { granted: 1 << 20, receipts: Vec::new() });
        assert_eq!(fetching.next_read().map(|errand| errand.request), Some(2));
    }

    #[test]
    fn s06_a_request_that_comes_again_is_served_once_and_answered_to_whoever_asked_last() {
        let mut fetching = Fetching::new(1 << 20);
        fetching.stream_joined(StreamIndex(0), Incarnation(1));
        let (lost, _) = oneshot::channel();
        assert!(fetching.ask(1, lost));
        let (second, mut answered) = oneshot::channel();
        assert!(!fetching.ask(1, second), "it is being served");
        fetching.located(1, wanted(1));
        let errand = fetching.next_read().unwrap();
        fetching.read_ended(errand, Ok(Bytes::from_static(b"block")));
        assert!(fetching.next_send().is_some());
        assert!(matches!(answered.try_recv(), Ok(Message::FetchDone(done)) if done.blocks == 1));
        let (third, mut answered) = oneshot::channel();
        assert!(!fetching.ask(1, third), "it has been served");
        assert!(matches!(answered.try_recv(), Ok(Message::FetchDone(done)) if done.blocks == 1));
        assert_eq!((fetching.next_read(), fetching.next_send().is_none()), (None, true));
    }

    #[test]
    fn streams_that_seem_equally_free_take_turns() {
        let mut fetching = Fetching::new(100 << 20);
        for index in 0..3 {
            fetching.stream_joined(StreamIndex(index), Incarnation(1));
        }
        fetching.ask(1, oneshot::channel().0);
        let places = (0..9u32).flat_map(|i| wanted(i << 20));
        fetching.located(1, places.collect());
        let mut given = Vec::new();
        for _ in 0..9 {
            let errand = fetching.next_read().unwrap();
            fetching.read_ended(errand, Ok(Bytes::from_static(b"block")));
            let (index, SendBlock(frame)) = fetching.next_send().unwrap();
            // Their sockets take every block at once.
            fetching.written(index, frame.sequence);
            given.push(index.0);
        }
        assert_eq!(given, [0, 1, 2, 0, 1, 2, 0, 1, 2]);
    }

    #[test]
    fn a_request_that_cannot_be_located_holds_nobody_up() {
        let mut fetching = Fetching::new(1 << 20);
        let (first, mut answered) = oneshot::channel();
        fetching.ask(1, first);
        fetching.ask(2, oneshot::channel().0);
        fetching.located(2, wanted(2));
        fetching.refuse(1, Message::Joined);
        assert!(answered.try_recv().is_ok());
        assert_eq!(fetching.next_read().map(|errand| errand.request), Some(2));
    }
}
