//! Where restored chunks come from: blocks fetched over the streams of a restore session, opened on threads of their own.

use std::collections::HashSet;
use std::sync::Arc;
use std::thread::JoinHandle;

use actix::Addr;
use actix_rt::ArbiterHandle;
use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, bounded};
use parking_lot::Mutex;
use strandline_actors::control_channel::AskError;
use strandline_actors::fetcher::{BlockUsed, FetchBlocks, Fetcher};
use strandline_messages::format::block::BlockView;
use strandline_messages::{BlockDigest, ChunkId, ChunkKind, SnapshotId, limits};

use crate::keys::Keyset;
use crate::seal::{OpenedBlock, Opener};
use crate::trees::{ChunkSource, FetchError, Fetched};

/// A block on its way to a fetch's reader.
struct Arrival {
    block: Bytes,
    wanted: Arc<HashSet<ChunkId>>,
    reader: Sender<Result<Arc<OpenedBlock>, FetchError>>,
}

/// See the module. Shared by the sources of a session's snapshots.
pub struct BlockSource {
    fetcher: Addr<Fetcher>,
    arbiter: ArbiterHandle,
    arrivals: Option<Sender<Arrival>>,
    openers: Vec<JoinHandle<()>>,
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
        // Every block in the queue is paid for by credit, which costs at least `Credit::BLOCK_MIN` each.
        let (sender, receiver) = bounded::<Arrival>(limits::FETCH_IDS_MAX);
        let opener = Arc::new(Opener::new(keyset));
        let open = |_| {
            let (receiver, opener, fetcher) = (receiver.clone(), Arc::clone(&opener), fetcher.clone());
            std::thread::spawn(move || open_blocks(&receiver, &opener, &fetcher))
        };
        let openers = (0..threads.max(1)).map(open).collect();
        Self { fetcher, arbiter, arrivals: Some(sender), openers }
    }
}

impl Drop for BlockSource {
    fn drop(&mut self) {
        self.arrivals = None;
        for opener in self.openers.drain(..) {
            // A thread that panicked has said so already.
            let _ = opener.join();
        }
    }
}

fn open_blocks(arrivals: &Receiver<Arrival>, opener: &Opener, fetcher: &Addr<Fetcher>) {
    for Arrival { block, wanted, reader } in arrivals {
        // Given back when the block has been used, or at once if it is of no use.
        let credit = Credit { fetcher: fetcher.clone(), bytes: block.len() as u64 };
        let opened = match opener.open(&block) {
            Ok(mut opened) => {
                // Tree blocks stay in a cache with a bound of its own, which must not eat up the credit.
                if opened.kind() == ChunkKind::Data {
                    opened.keep(Box::new(credit));
                }
                Ok(Arc::new(opened))
            }
            Err(reason) => Err(damaged(&block, &wanted, reason)),
        };
        // Never waits: the channel holds every block of its fetch. A reader that has gone away has cancelled it.
        let _ = reader.try_send(opened);
    }
}

/// What a block cost of the session's credit.
struct Credit {
    fetcher: Addr<Fetcher>,
    bytes: u64,
}

impl Drop for Credit {
    fn drop(&mut self) {
        self.fetcher.do_send(BlockUsed(self.bytes));
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
        let Some(arrivals) = self.blocks.arrivals.clone() else { return Err(lost("the session has ended".into())) };
        // Room for a block for each chunk, and for the failure: whoever fills it never waits for its reader, so the
        // reader of one fetch cannot hold up another. The credit bounds what is in it.
        let (reader, fetched) = bounded(wanted.len() + 1);
        let names: Arc<HashSet<ChunkId>> = Arc::new(wanted.iter().copied().collect());
        let pending = Arc::new(Mutex::new(Pending { chunks: names.as_ref().clone(), blocks: HashSet::new() }));
        let taker = {
            let (reader, wanted, pending) = (reader.clone(), Arc::clone(&names), Arc::clone(&pending));
            move |block: Bytes| {
                if pending.lock().note(&block) {
                    let arrival = Arrival { block, wanted: Arc::clone(&wanted), reader: reader.clone() };
                    // The queue holds what the credit allows; if it is full, the peer has not kept to its credit.
                    let _ = arrivals.try_send(arrival);
                }
            }
        };
        let (fetcher, snapshot) = (self.blocks.fetcher.clone(), self.snapshot);
        let fetching = fetcher.send(FetchBlocks { snapshot, ids: wanted, taker: Box::new(taker.clone()) });
        let finishing = async move {
            let unread = || pending.lock().chunks.iter().copied().collect::<Vec<ChunkId>>();
            let mut fetched = fetching.await.unwrap_or(Err(AskError::Closed));
            if matches!(&fetched, Ok(fetched) if !fetched.damage.is_empty()) {
                // Between finding a block and reading it the server may have freed it, because another copy is there.
                let again = FetchBlocks { snapshot, ids: unread(), taker: Box::new(taker) };
                fetched = fetcher.send(again).await.unwrap_or(Err(AskError::Closed));
            }
            let failure = match fetched {
                Ok(fetched) if !fetched.damage.is_empty() => {
                    Some(FetchError::Unreadable { reason: fetched.damage.trim().replace('\n', "; "), chunks: unread() })
                }
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
}
