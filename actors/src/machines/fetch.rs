//! What a restore session still has to send, within the agent's credit.
//!
//! Invariants: blocks go out in the order in which they were asked for; a block is sent once per request; nothing is read
//! from storage that the credit does not cover; every request is answered exactly once, after its last block has been
//! handed to a stream.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use strandline_messages::wire::{Credit, FetchDone, Receipt, join_ids};
use strandline_messages::{ChunkId, Incarnation, StreamIndex};

use super::stream_ledger::{NewestBlocks, StreamLedger};
use crate::planted::{self, Bug};
use crate::ports::BlockPlace;

/// A block to read and send.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Errand {
    /// The request that it answers.
    pub request: u32,
    /// Its number within the request.
    pub ordinal: u32,
    /// Where it is.
    pub place: BlockPlace,
}

#[derive(Debug)]
struct Open {
    left: u32,
    sent: u32,
    carried: NewestBlocks,
    unknown: Vec<ChunkId>,
    damage: String,
}

/// See the module.
#[derive(Debug)]
pub struct FetchQueue {
    waiting: VecDeque<Errand>,
    open: BTreeMap<u32, Open>,
    credit: u64,
    /// The highest sum that the agent has granted.
    granted: u64,
    handed: StreamLedger,
}

impl FetchQueue {
    /// Nothing asked for yet; `credit` bytes may be sent.
    pub fn new(credit: u64) -> Self {
        Self { waiting: VecDeque::new(), open: BTreeMap::new(), credit, granted: 0, handed: StreamLedger::default() }
    }

    /// Requests that are not answered yet.
    pub fn open_requests(&self) -> usize {
        self.open.len()
    }

    /// Takes a request on: where each wanted id is, in order. Gives the answer at once if there is nothing to send.
    pub fn add(&mut self, request: u32, wanted: &[(ChunkId, Option<BlockPlace>)]) -> Option<FetchDone> {
        let mut places = BTreeSet::new();
        let mut open =
            Open { left: 0, sent: 0, carried: NewestBlocks::default(), unknown: Vec::new(), damage: String::new() };
        for (id, place) in wanted {
            match place {
                None => open.unknown.push(*id),
                Some(place) if places.insert(*place) => {
                    self.waiting.push_back(Errand { request, ordinal: open.left, place: *place });
                    open.left += 1;
                }
                Some(_) => {}
            }
        }
        let finished = open.left == 0;
        self.open.insert(request, open);
        if finished { self.answer(request) } else { None }
    }

    /// The agent grants so many bytes in all. An older sum that comes late, or the same again, changes nothing.
    pub fn grant(&mut self, granted: u64) {
        let more = granted.saturating_sub(self.granted);
        self.granted += more;
        self.credit = self.credit.saturating_add(more);
    }

    /// What was handed to connections that are over and did not come may be sent beyond the credit.
    pub fn settle(&mut self, receipt: &Receipt) {
        let lost = self.handed.settle(receipt);
        if !planted::here(Bug::LosesCreditWithStreams) {
            self.credit = self.credit.saturating_add(lost);
        }
    }

    /// Whether this connection may be handed blocks.
    pub fn may_carry(&self, stream: StreamIndex, incarnation: Incarnation) -> bool {
        self.handed.is_open(stream, incarnation)
    }

    /// The next block to read, if the credit covers it.
    pub fn next_errand(&mut self) -> Option<Errand> {
        let cost = Credit::cost(self.waiting.front()?.place.bytes.into());
        self.credit = self.credit.checked_sub(cost)?;
        self.waiting.pop_front()
    }

    /// The errand's block has been handed to a connection. Gives the request's answer if it was the last.
    pub fn handed(&mut self, errand: &Errand, stream: StreamIndex, incarnation: Incarnation) -> Option<FetchDone> {
        self.handed.handed(stream, incarnation, Credit::cost(errand.place.bytes.into()));
        if let Some(open) = self.open.get_mut(&errand.request) {
            open.sent += 1;
            open.carried.count(stream, incarnation);
        }
        self.finish(errand)
    }

    /// The errand's block could not be read. Gives the request's answer if it was the last.
    pub fn failed(&mut self, errand: &Errand, reason: &str) -> Option<FetchDone> {
        self.credit = self.credit.saturating_add(Credit::cost(errand.place.bytes.into()));
        if let Some(open) = self.open.get_mut(&errand.request)
            && open.damage.len() < 1024
        {
            open.damage.push_str(reason);
            open.damage.push('\n');
        }
        self.finish(errand)
    }

    fn finish(&mut self, errand: &Errand) -> Option<FetchDone> {
        let open = self.open.get_mut(&errand.request)?;
        open.left = open.left.saturating_sub(1);
        if open.left == 0 { self.answer(errand.request) } else { None }
    }

    fn answer(&mut self, request: u32) -> Option<FetchDone> {
        let open = self.open.remove(&request)?;
        Some(FetchDone {
            request,
            blocks: open.sent,
            carried: open.carried.carried(),
            unknown: join_ids(&open.unknown),
            damage: open.damage,
        })
    }
}

#[cfg(test)]
mod tests {
    use strandline_messages::wire::Carried;

    use super::*;

    #[expect(clippy::unnecessary_wraps, reason = "saves every caller a `Some`")]
    fn place(offset: u32, bytes: u32) -> Option<BlockPlace> {
        Some(BlockPlace { pack: 1, offset, bytes })
    }

    fn id(byte: u8) -> ChunkId {
        ChunkId([byte; 32])
    }

    #[test]
    fn a_block_that_holds_several_wanted_chunks_is_sent_once() {
        let mut queue = FetchQueue::new(10 << 20);
        assert_eq!(queue.add(1, &[(id(1), place(0, 9)), (id(2), place(0, 9)), (id(3), place(9, 9))]), None);
        let first = queue.next_errand().unwrap();
        let second = queue.next_errand().unwrap();
        assert_eq!((first.ordinal, second.ordinal), (0, 1));
        assert!(queue.next_errand().is_none());
        assert!(queue.handed(&first, StreamIndex(0), Incarnation(1)).is_none());
        assert_eq!(queue.handed(&second, StreamIndex(0), Incarnation(1)).unwrap().blocks, 2);
        assert_eq!(queue.open_requests(), 0);
    }

    #[test]
    fn nothing_is_read_that_the_credit_does_not_cover() {
        let mut queue = FetchQueue::new(100_000);
        queue.add(1, &[(id(1), place(0, 70_000)), (id(2), place(70_000, 70_000))]);
        assert!(queue.next_errand().is_some());
        assert!(queue.next_errand().is_none());
        queue.grant(70_000);
        assert!(queue.next_errand().is_some());
        queue.add(2, &[(id(3), place(140_000, 70_000))]);
        queue.grant(70_000);
        queue.grant(60_000);
        assert!(queue.next_errand().is_none(), "a sum that comes again grants nothing");
    }

    #[test]
    fn what_was_lost_with_a_connection_may_be_sent_again_and_no_more() {
        let mut queue = FetchQueue::new(140_000);
        let wanted: Vec<_> = (0..9u32).map(|i| (id(1), place(i * 70_000, 70_000))).collect();
        queue.add(1, &wanted);
        let hand = |queue: &mut FetchQueue, incarnation| {
            let errand = queue.next_errand();
            errand.map(|errand| queue.handed(&errand, StreamIndex(0), Incarnation(incarnation)))
        };
        assert!(hand(&mut queue, 1).is_some() && hand(&mut queue, 1).is_some() && hand(&mut queue, 1).is_none());
        let receipt = Receipt { stream: StreamIndex(0), over_before: Incarnation(2), received: 70_000 };
        queue.settle(&receipt);
        queue.settle(&receipt);
        assert!(!queue.may_carry(StreamIndex(0), Incarnation(1)) && queue.may_carry(StreamIndex(0), Incarnation(2)));
        assert!(hand(&mut queue, 2).is_some() && hand(&mut queue, 2).is_none());
    }

    #[test]
    fn the_answer_says_what_each_streams_newest_connection_was_handed() {
        let mut queue = FetchQueue::new(1 << 20);
        let wanted: Vec<_> = (0..4u32).map(|i| (id(1), place(i * 9, 9))).collect();
        queue.add(1, &wanted);
        let handed = [(0, 1), (1, 1), (1, 3), (1, 3)].map(|(stream, incarnation)| {
            let errand = queue.next_errand().unwrap();
            queue.handed(&errand, StreamIndex(stream), Incarnation(incarnation))
        });
        let carried = |stream, incarnation, blocks| Carried {
            stream: StreamIndex(stream),
            incarnation: Incarnation(incarnation),
            blocks,
        };
        let [.., Some(done)] = handed else { panic!("no answer") };
        assert_eq!((done.blocks, done.carried), (4, vec![carried(0, 1, 1), carried(1, 3, 2)]));
    }

    #[test]
    fn tiny_blocks_cost_enough_that_their_number_is_bounded() {
        let mut queue = FetchQueue::new(10 * Credit::BLOCK_MIN);
        let wanted: Vec<_> = (0..100u32).map(|i| (id(1), place(i, 1))).collect();
        queue.add(1, &wanted);
        assert_eq!(std::iter::from_fn(|| queue.next_errand()).count(), 10);
    }

    #[test]
    fn unknown_and_unreadable_chunks_are_told_and_refunded() {
        let mut queue = FetchQueue::new(20_000);
        let done = queue.add(1, &[(id(1), None)]).unwrap();
        assert_eq!((done.blocks, done.unknown.len()), (0, 32));
        queue.add(2, &[(id(1), place(0, 20_000))]);
        let errand = queue.next_errand().unwrap();
        let done = queue.failed(&errand, "pack 1 is damaged").unwrap();
        assert_eq!(done.blocks, 0);
        assert!(done.damage.contains("pack 1"));
        queue.add(3, &[(id(1), place(0, 20_000))]);
        assert!(queue.next_errand().is_some(), "the credit came back");
    }
}
