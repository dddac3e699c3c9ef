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
use strandline_messages::{BlockDigest, ChunkId, limits};

use crate::keys::Keyset;
use crate::seal::{OpenedBlock, Opener};
use crate::trees::{ChunkSource, FetchError, Fetched};

/// Opened blocks that one fetch may have waiting for its reader: with credit, this bounds memory.
const OPENED_AHEAD: usize = 8;

/// A block on its way to a fetch's reader.
struct Arrival {
    block: Bytes,
    wanted: Arc<HashSet<ChunkId>>,
    reader: Sender<Result<Arc<OpenedBlock>, FetchError>>,
}

/// See the module.
pub struct NetworkSource {
    fetcher: Addr<Fetcher>,
    arbiter: ArbiterHandle,
    arrivals: Option<Sender<Arrival>>,
    openers: Vec<JoinHandle<()>>,
}

impl NetworkSource {
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

impl Drop for NetworkSource {
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
        let opened = opener.open(&block).map(Arc::new).map_err(|reason| damaged(&block, &wanted, reason));
        // A reader that has gone away has cancelled its fetch; the credit goes back either way.
        let _ = reader.send(opened);
        fetcher.do_send(BlockUsed(block.len() as u64));
    }
}

fn damaged(block: &[u8], wanted: &HashSet<ChunkId>, reason: crate::seal::OpenError) -> FetchError {
    let view = BlockView::parse(block).ok();
    let held = view.iter().flat_map(BlockView::rows).filter_map(Result::ok).map(|row| row.id);
    let chunks = held.filter(|id| wanted.contains(id)).collect();
    let name = view.map_or_else(|| "of unknown name".to_owned(), |view| view.stored_digest().short());
    FetchError::Damaged { block: name, chunks, reason }
}

impl ChunkSource for NetworkSource {
    fn fetch(&self, wanted: Vec<ChunkId>) -> Result<Fetched, FetchError> {
        let lost = |reason: String| FetchError::Lost { reason };
        let Some(arrivals) = self.arrivals.clone() else { return Err(lost("the session has ended".into())) };
        let (reader, fetched) = bounded(OPENED_AHEAD);
        let names = Arc::new(wanted.iter().copied().collect::<HashSet<_>>());
        let seen: Mutex<HashSet<BlockDigest>> = Mutex::default();
        let taker = {
            let (reader, wanted) = (reader.clone(), Arc::clone(&names));
            Box::new(move |block: Bytes| {
                // After a lost connection a block may come twice.
                let digest = BlockView::parse(&block).ok().map(|view| view.stored_digest());
                if digest.is_none_or(|digest| seen.lock().insert(digest)) {
                    let arrival = Arrival { block, wanted: Arc::clone(&wanted), reader: reader.clone() };
                    // The queue holds what the credit allows; if it is full, the peer has not kept to its credit.
                    let _ = arrivals.try_send(arrival);
                }
            })
        };
        let fetching = self.fetcher.send(FetchBlocks { ids: wanted, taker });
        let finishing = async move {
            let failure = match fetching.await.unwrap_or(Err(AskError::Closed)) {
                Ok(fetched) if !fetched.unknown.is_empty() => Some(FetchError::Missing { chunks: fetched.unknown }),
                Ok(fetched) if !fetched.damage.is_empty() => Some(lost(fetched.damage)),
                Ok(_) => None,
                Err(error) => Some(lost(error.to_string())),
            };
            if let Some(failure) = failure {
                // The reader may be slow, and the arbiter must not wait for it.
                std::thread::spawn(move || drop(reader.send(Err(failure))));
            }
        };
        if self.arbiter.spawn(finishing) { Ok(fetched) } else { Err(lost("the connection is closed".into())) }
    }
}
