//! The sending side of a restore session: which block is being read, which stream takes it, who waits for the answer.

use std::collections::{BTreeMap, HashMap, VecDeque};

use bytes::Bytes;
use strandline_messages::mail::SendBlock;
use strandline_messages::wire::{BlockFrame, FetchDone, Message};
use strandline_messages::{ChunkId, Sequence, StreamIndex, limits};
use tokio::sync::oneshot;

use crate::machines::fetch::{Errand, FetchQueue};
use crate::ports::{BlockPlace, StoreFault};

/// Reads of storage under way at once: enough to keep a disk busy.
const READS_MAX: usize = 8;
/// Blocks given to one stream and not yet written: one on the wire, one behind it.
const BLOCKS_AHEAD: usize = 2;

/// See the module. Bounded by the credit: nothing is read that the agent has not made room for.
pub struct Fetching {
    queue: FetchQueue,
    reading: usize,
    ready: VecDeque<(Errand, Bytes)>,
    ahead: BTreeMap<StreamIndex, usize>,
    waiting: HashMap<u32, oneshot::Sender<Message>>,
}

impl Fetching {
    /// Nothing to do yet.
    pub fn new(credit: u64) -> Self {
        Self {
            queue: FetchQueue::new(credit),
            reading: 0,
            ready: VecDeque::new(),
            ahead: BTreeMap::new(),
            waiting: HashMap::new(),
        }
    }

    /// Whether another request may be taken on.
    pub fn may_add(&self) -> bool {
        self.queue.open_requests() < limits::FETCHES_OUTSTANDING_MAX
    }

    /// Takes a request on; `answer` is told when its last block is on its way.
    pub fn add(&mut self, request: u32, wanted: &[(ChunkId, Option<BlockPlace>)], answer: oneshot::Sender<Message>) {
        self.waiting.insert(request, answer);
        let done = self.queue.add(request, wanted);
        self.tell(done);
    }

    /// The agent has made room.
    pub fn grant(&mut self, bytes: u64) {
        self.queue.grant(bytes);
    }

    /// The next block to read from storage.
    pub fn next_read(&mut self) -> Option<Errand> {
        if self.reading >= READS_MAX {
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

    /// The next block to send and the stream with the most room for it.
    pub fn next_send(&mut self) -> Option<(StreamIndex, SendBlock)> {
        let (index, ahead) = self.ahead.iter_mut().min_by_key(|(_, ahead)| **ahead)?;
        if *ahead >= BLOCKS_AHEAD {
            return None;
        }
        let (errand, block) = self.ready.pop_front()?;
        *ahead += 1;
        let index = *index;
        let sequence = Sequence(u64::from(errand.request) << 32 | u64::from(errand.ordinal));
        let done = self.queue.handed(&errand);
        self.tell(done);
        Some((index, SendBlock(BlockFrame { sequence, block })))
    }

    /// A stream has written a block.
    pub fn written(&mut self, index: StreamIndex, _: Sequence) {
        if let Some(ahead) = self.ahead.get_mut(&index) {
            *ahead = ahead.saturating_sub(1);
        }
    }

    /// A stream may be sent blocks.
    pub fn stream_joined(&mut self, index: StreamIndex) {
        self.ahead.insert(index, 0);
    }

    /// A stream is gone; the agent asks again for what it did not get.
    pub fn stream_gone(&mut self, index: StreamIndex) {
        self.ahead.remove(&index);
    }

    fn tell(&mut self, done: Option<FetchDone>) {
        if let Some(done) = done
            && let Some(answer) = self.waiting.remove(&done.request)
        {
            // Whoever asked may be gone; it will ask again over its next connection.
            let _ = answer.send(Message::FetchDone(done));
        }
    }
}
