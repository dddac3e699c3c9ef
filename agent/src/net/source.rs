//! Where restored chunks come from: blocks fetched over the streams of a restore session, opened on threads of their own.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use actix::Addr;
use actix_rt::ArbiterHandle;
use bytes::Bytes;
use crossbeam_channel::{Sender, bounded};
use parking_lot::{Condvar, Mutex};
use strandline_actors::control_channel::AskError;
use strandline_actors::fetcher::{BlockTaker, BlockUsed, FetchBlocks, Fetcher};
use strandline_messages::format::block::BlockView;
use strandline_messages::{BlockDigest, ChunkId, ChunkKind, SnapshotId, limits};

use crate::keys::Keyset;
use crate::seal::{OpenedBlock, Opener};
use crate::trees::{ChunkSource, FetchError, Fetched, Received};

/// Opened data that waits for its readers or is being used, bytes. Sealed blocks cost credit, but an opened one is several
/// times as large. One more block for each opening thread, and for each fetch whose reader has nothing, may come on top.
const OPENED_BYTES_MAX: usize = 12 << 20;
/// How often it is looked whether a reader has taken its last block, while the budget is used up.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// A block on its way to a fetch's reader.
struct Arrival {
    block: Bytes,
    wanted: Arc<HashSet<ChunkId>>,
    reader: Sender<Result<Arc<OpenedBlock>, FetchError>>,
}

/// Blocks that wait to be opened. Their bytes are bounded by the session's credit.
#[derive(Default)]
struct Desk {
    state: Mutex<DeskState>,
    changed: Condvar,
}

#[derive(Default)]
struct DeskState {
    /// By the number of their fetch, oldest first: a block of a later fetch must not be in the way of an earlier one.
    waiting: BTreeMap<u64, VecDeque<Arrival>>,
    waiting_count: usize,
    opened_bytes: usize,
    closed: bool,
}

/// See the module. Shared by the sources of a session's snapshots.
pub struct BlockSource {
    fetcher: Addr<Fetcher>,
    arbiter: ArbiterHandle,
    desk: Arc<Desk>,
    openers: Vec<JoinHandle<()>>,
    fetches: AtomicU64,
    received: Arc<Mutex<Received>>,
}

/// The chunks of one snapshot.
pub struct NetworkSource {
    blocks: Arc<BlockSource>,
    /// `None`: what the session's own writer domain has.
    snapshot: Option<SnapshotId>,
}

impl NetworkSource {
    /// The chunks of `snapshot`, or of the session's own writer domain.
    pub fn new(blocks: Arc<BlockSource>, snapshot: Option<SnapshotId>) -> Self {
        Self { blocks, snapshot }
    }
}

impl BlockSource {
    /// Over `fetcher`, whose actor runs on `arbiter`; blocks are opened on `threads` threads.
    pub fn new(fetcher: Addr<Fetcher>, arbiter: ArbiterHandle, keyset: &Keyset, threads: usize) -> Self {
        let desk = Arc::new(Desk::default());
        let opener = Arc::new(Opener::new(keyset));
        let open = |_| {
            let (desk, opener, fetcher) = (Arc::clone(&desk), Arc::clone(&opener), fetcher.clone());
            std::thread::spawn(move || open_blocks(&desk, &opener, &fetcher))
        };
        let openers = (0..threads.max(1)).map(open).collect();
        Self { fetcher, arbiter, desk, openers, fetches: AtomicU64::new(0), received: Arc::default() }
    }
}

impl Drop for BlockSource {
    fn drop(&mut self) {
        self.desk.state.lock().closed = true;
        self.desk.changed.notify_all();
        for opener in self.openers.drain(..) {
            // A thread that panicked has said so already.
            let _ = opener.join();
        }
    }
}

impl Desk {
    fn put(&self, fetch: u64, arrival: Arrival) {
        let mut state = self.state.lock();
        // Every block is paid for by credit; if there are more than that allows, the peer has not kept to it.
        if state.waiting_count < limits::FETCH_IDS_MAX {
            state.waiting_count += 1;
            state.waiting.entry(fetch).or_default().push_back(arrival);
            self.changed.notify_one();
        }
    }

    /// The next block to open; waits for one. `None`: there will be none.
    fn take(&self) -> Option<Arrival> {
        let mut state = self.state.lock();
        loop {
            if state.closed {
                return None;
            }
            if let Some(arrival) = state.next() {
                return Some(arrival);
            }
            if state.waiting.is_empty() {
                self.changed.wait(&mut state);
            } else {
                // Whether that ended in time makes no difference.
                let _ = self.changed.wait_for(&mut state, LOOK_AGAIN);
            }
        }
    }
}

impl DeskState {
    /// The first block that there is room for. A fetch whose reader has nothing may always open one: its reader may be the
    /// one that the others wait for.
    fn next(&mut self) -> Option<Arrival> {
        let room = self.opened_bytes < OPENED_BYTES_MAX;
        let may = |queue: &VecDeque<Arrival>| room || queue.front().is_some_and(|first| first.reader.is_empty());
        let fetch = self.waiting.iter().find(|(_, queue)| may(queue)).map(|(fetch, _)| *fetch)?;
        let queue = self.waiting.get_mut(&fetch)?;
        let arrival = queue.pop_front();
        if queue.is_empty() {
            self.waiting.remove(&fetch);
        }
        self.waiting_count -= usize::from(arrival.is_some());
        arrival
    }
}

fn open_blocks(desk: &Arc<Desk>, opener: &Opener, fetcher: &Addr<Fetcher>) {
    while let Some(Arrival { block, wanted, reader }) = desk.take() {
        // Given back when the block has been used, or at once if it is of no use.
        let mut lease =
            Lease { fetcher: fetcher.clone(), sealed: block.len() as u64, desk: Arc::clone(desk), opened: 0 };
        let opened = match opener.open(&block) {
            Ok(mut opened) => {
                // Tree blocks stay in a cache with a bound of its own, which must not eat up the credit.
                if opened.kind() == ChunkKind::Data {
                    lease.opened = opened.memory_bytes();
                    desk.state.lock().opened_bytes += lease.opened;
                    opened.keep(Box::new(lease));
                }
                Ok(Arc::new(opened))
            }
            Err(reason) => Err(damaged(&block, &wanted, reason)),
        };
        // Never waits: the channel holds every block of its fetch. A reader that has gone away has cancelled it.
        let _ = reader.try_send(opened);
    }
}

/// What a block costs: of the session's credit, and of the room for opened ones.
struct Lease {
    fetcher: Addr<Fetcher>,
    sealed: u64,
    desk: Arc<Desk>,
    opened: usize,
}

impl Drop for Lease {
    fn drop(&mut self) {
        self.fetcher.do_send(BlockUsed(self.sealed));
        if self.opened > 0 {
            self.desk.state.lock().opened_bytes -= self.opened;
            self.desk.changed.notify_one();
        }
    }
}

fn damaged(block: &[u8], wanted: &HashSet<ChunkId>, reason: crate::seal::OpenError) -> FetchError {
    let view = BlockView::parse(block).ok();
    let held = view.iter().flat_map(BlockView::rows).filter_map(Result::ok).map(|row| row.id);
    let chunks = held.filter(|id| wanted.contains(id)).collect();
    let name = view.map_or_else(|| "of unknown name".to_owned(), |view| view.stored_digest().short());
    FetchError::Damaged { block: name, chunks, reason }
}

/// What a fetch has got so far: chunks still wanted, and blocks that came.
struct Pending {
    chunks: HashSet<ChunkId>,
    blocks: HashSet<BlockDigest>,
}

/// Passes the blocks of a fetch on to be opened.
#[derive(Clone)]
struct Taker {
    fetch: u64,
    /// In the order in which they are needed.
    order: Arc<Vec<ChunkId>>,
    wanted: Arc<HashSet<ChunkId>>,
    pending: Arc<Mutex<Pending>>,
    reader: Sender<Result<Arc<OpenedBlock>, FetchError>>,
    desk: Arc<Desk>,
    received: Arc<Mutex<Received>>,
    fetcher: Addr<Fetcher>,
}

impl BlockTaker for Taker {
    fn take(&mut self, block: Bytes) {
        {
            let mut received = self.received.lock();
            received.blocks += 1;
            received.bytes += block.len() as u64;
        }
        if self.pending.lock().note(&block) {
            let (wanted, reader) = (Arc::clone(&self.wanted), self.reader.clone());
            self.desk.put(self.fetch, Arrival { block, wanted, reader });
        } else {
            self.fetcher.do_send(BlockUsed(block.len() as u64));
        }
    }

    fn missing(&self) -> Vec<ChunkId> {
        let pending = self.pending.lock();
        self.order.iter().filter(|id| pending.chunks.contains(id)).copied().collect()
    }
}

impl Pending {
    /// Notes a block's chunks; whether the block is new. After a lost connection a block may come twice.
    fn note(&mut self, block: &[u8]) -> bool {
        let Ok(view) = BlockView::parse(block) else { return true };
        if !self.blocks.insert(view.stored_digest()) {
            return false;
        }
        for row in view.rows().filter_map(Result::ok) {
            self.chunks.remove(&row.id);
        }
        true
    }
}

impl ChunkSource for NetworkSource {
    fn fetch(&self, wanted: Vec<ChunkId>) -> Result<Fetched, FetchError> {
        let lost = |reason: String| FetchError::Lost { reason };
        let fetch = self.blocks.fetches.fetch_add(1, Ordering::Relaxed);
        // Room for a block for each chunk, and for the failure: whoever fills it never waits for its reader, so the
        // reader of one fetch cannot hold up another. The credit bounds what is in it.
        let (reader, fetched) = bounded(wanted.len() + 1);
        let names: Arc<HashSet<ChunkId>> = Arc::new(wanted.iter().copied().collect());
        let pending = Arc::new(Mutex::new(Pending { chunks: names.as_ref().clone(), blocks: HashSet::new() }));
        let blocks = &self.blocks;
        let taker = Taker {
            fetch,
            order: Arc::new(wanted),
            wanted: names,
            pending,
            reader: reader.clone(),
            desk: Arc::clone(&blocks.desk),
            received: Arc::clone(&blocks.received),
            fetcher: blocks.fetcher.clone(),
        };
        let (fetcher, snapshot) = (blocks.fetcher.clone(), self.snapshot);
        let fetching = fetcher.send(FetchBlocks { snapshot, taker: Box::new(taker.clone()) });
        let finishing = async move {
            let mut fetched = fetching.await.unwrap_or(Err(AskError::Closed));
            if matches!(&fetched, Ok(fetched) if !fetched.damage.is_empty()) {
                // Between finding a block and reading it the server may have freed it, because another copy is there.
                let again = FetchBlocks { snapshot, taker: Box::new(taker.clone()) };
                fetched = fetcher.send(again).await.unwrap_or(Err(AskError::Closed));
            }
            let failure = match fetched {
                Ok(fetched) if !fetched.damage.is_empty() => Some(FetchError::Unreadable {
                    reason: fetched.damage.trim().replace('\n', "; "),
                    chunks: taker.missing(),
                }),
                Ok(fetched) if !fetched.unknown.is_empty() => Some(FetchError::Missing { chunks: fetched.unknown }),
                Ok(_) => None,
                Err(error) => Some(lost(error.to_string())),
            };
            if let Some(failure) = failure {
                // The reader may have gone away.
                let _ = reader.try_send(Err(failure));
            }
        };
        if self.blocks.arbiter.spawn(finishing) { Ok(fetched) } else { Err(lost("the connection is closed".into())) }
    }

    fn received(&self) -> Received {
        *self.blocks.received.lock()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_fetch_comes_first_and_a_waiting_reader_gets_a_block_whatever_is_open() {
        let mut state = DeskState::default();
        let (full, _full_reader) = bounded(2);
        full.send(Err(FetchError::Lost { reason: String::new() })).unwrap();
        let (empty, _empty_reader) = bounded(2);
        let put = |state: &mut DeskState, fetch: u64, reader: &Sender<_>, name: &'static [u8]| {
            let arrival = Arrival { block: Bytes::from_static(name), wanted: Arc::default(), reader: reader.clone() };
            state.waiting_count += 1;
            state.waiting.entry(fetch).or_default().push_back(arrival);
        };
        put(&mut state, 2, &full, b"later");
        put(&mut state, 1, &full, b"first");
        put(&mut state, 3, &empty, b"wanted");
        let next = |state: &mut DeskState| state.next().map(|arrival| arrival.block);
        assert_eq!(next(&mut state).unwrap(), "first");
        state.opened_bytes = OPENED_BYTES_MAX;
        assert_eq!(next(&mut state).unwrap(), "wanted");
        assert_eq!(next(&mut state), None, "nobody waits, and there is no room");
        state.opened_bytes -= 1;
        assert_eq!(next(&mut state).unwrap(), "later");
        assert_eq!((next(&mut state), state.waiting_count), (None, 0));
    }
}
