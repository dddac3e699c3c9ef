//! The pack writer: the only thing that makes blocks durable, and so the only [`DurableWriter`].
//!
//! Two threads per repository, started with the first block. One (`append`) owns the open packs (one per writer domain)
//! and writes each block behind the last one as it comes. The other (`commit`) syncs what was written, has it indexed,
//! and only then confirms it. What is written while it syncs makes the next group; so a disk is never idle while there is
//! something to write, one sync serves as many blocks as came meanwhile, and nobody waits for a group to fill.
//!
//! Bounds: at most [`QUEUE_BYTES_MAX`] of block bytes are queued, written or being synced (callers wait for room, which is
//! the backpressure that the streams see); at most [`OPEN_PACKS_MAX`] packs are open; a pack's list of footer entries is at
//! most `PACK_BLOCKS_MAX` × 48 bytes.
//!
//! After an error on a pack's file that file is never written or synced again; recovery seals it at the next start. What
//! was in it and is not confirmed is tried once more in a new pack, unless the disk is full.

mod append;
mod commit;

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::thread::JoinHandle;

use bytes::Bytes;
use crossbeam_channel::{Sender, TrySendError, bounded};
use parking_lot::Mutex;
use strandline_messages::format::block::BlockHeaderV1;
use strandline_messages::{
    BlockDigest, ChunkId, ChunkKind, DomainId, Durable, DurableWriter, RepositoryId, Sequence, SessionId,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::files::FileOps;
use super::layout::RepositoryPaths;
use super::pack_file::PackInfo;
use super::store_error::StoreError;
use append::Appender;

/// Most bytes of blocks that wait to be written, per repository.
pub const QUEUE_BYTES_MAX: usize = 64 << 20;
/// Most bytes that one sync makes durable, unless one block is longer.
pub const GROUP_BYTES_MAX: usize = 16 << 20;
/// The queue's credit is counted in this many bytes.
const CREDIT_BYTES: usize = 1024;
/// Most jobs in the queue: every block holds at least one credit; the rest is room for requests without blocks.
const QUEUE_JOBS_MAX: usize = QUEUE_BYTES_MAX / CREDIT_BYTES + 16;
/// Most packs open for writing, per repository.
pub const OPEN_PACKS_MAX: usize = 64;

/// How groups are formed.
#[derive(Clone, Copy, Debug)]
pub struct PackWriterOptions {
    /// Most bytes that one sync makes durable.
    pub group_bytes_max: usize,
    /// A pack is sealed before it exceeds this, bytes.
    pub pack_bytes_max: u64,
}

/// A verified block on its way into a pack.
#[derive(Debug)]
pub struct NewBlock {
    /// The bytes; their format and digest were verified.
    pub bytes: Bytes,
    /// Its header.
    pub header: BlockHeaderV1,
    /// Its digest.
    pub digest: BlockDigest,
    /// Whose trust its chunks get.
    pub domain: DomainId,
    /// The session that sent it.
    pub session: SessionId,
    /// Its place in that session.
    pub sequence: Sequence,
    /// Its chunks in order.
    pub ids: Vec<ChunkId>,
}

/// A block that is durable.
#[derive(Debug)]
pub struct StoredBlock {
    /// The session that sent it.
    pub session: SessionId,
    /// Its place in that session.
    pub sequence: Sequence,
    /// Data or tree.
    pub kind: ChunkKind,
    /// Where it begins in its pack.
    pub offset: u32,
    /// Its length.
    pub bytes: u32,
    /// Its chunks in order.
    pub ids: Vec<ChunkId>,
}

/// Who is told of durable blocks before they are confirmed.
pub trait PackSink: Send + Sync {
    /// `blocks`, all of pack `info`, are durable up to `info.blocks_end`: index them. An error keeps them unconfirmed.
    fn stored(&self, info: PackInfo, blocks: &[StoredBlock]) -> Result<(), String>;
    /// A pack got its first durable blocks, or was sealed.
    fn pack_changed(&self, info: PackInfo);
}

type Reply = oneshot::Sender<Result<Durable<Sequence>, StoreError>>;
type Key = (SessionId, Sequence);
type Queued = (Box<NewBlock>, OwnedSemaphorePermit);

enum Job {
    Block(Box<NewBlock>, OwnedSemaphorePermit),
    /// Seal the packs that are open; answered when that is done or has failed.
    Seal(oneshot::Sender<()>),
    Close,
}

/// What the handle and the thread share: together they are the writer that may call something durable.
struct Shared {
    ops: Arc<dyn FileOps>,
    paths: RepositoryPaths,
    repository: RepositoryId,
    options: PackWriterOptions,
    sink: Arc<dyn PackSink>,
    next_pack: AtomicU32,
    /// Who waits for which block. A block sent twice while its first copy is under way is stored once; both are answered.
    waiting: Mutex<HashMap<Key, Vec<Reply>>>,
}

impl DurableWriter for Shared {}

impl Shared {
    fn confirm(&self, block: &NewBlock) {
        self.answer(block, || Ok(Durable::confirmed_by(self, block.sequence)));
    }

    fn refuse(&self, block: &NewBlock, error: &StoreError) {
        self.answer(block, || Err(error.clone()));
    }

    fn answer(&self, block: &NewBlock, answer: impl Fn() -> Result<Durable<Sequence>, StoreError>) {
        let replies = self.waiting.lock().remove(&(block.session, block.sequence)).unwrap_or_default();
        for reply in replies {
            // A caller that went away does not need its answer.
            let _ = reply.send(answer());
        }
    }
}

/// The handle. Dropping it lets the thread finish what is queued and end without sealing.
pub struct PackWriter {
    shared: Arc<Shared>,
    credit: Arc<Semaphore>,
    running: Mutex<Running>,
}

enum Running {
    Idle,
    Thread(Sender<Job>, JoinHandle<()>),
    Closed,
}

impl std::fmt::Debug for PackWriter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PackWriter").field("repository", &self.shared.repository).finish_non_exhaustive()
    }
}

impl PackWriter {
    /// Of `repository` at `paths`; new packs are numbered from `next_pack` on.
    pub fn new(
        ops: Arc<dyn FileOps>,
        paths: RepositoryPaths,
        repository: RepositoryId,
        next_pack: u32,
        options: PackWriterOptions,
        sink: Arc<dyn PackSink>,
    ) -> Self {
        let waiting = Mutex::default();
        let next_pack = AtomicU32::new(next_pack);
        let shared = Shared { ops, paths, repository, options, sink, next_pack, waiting };
        let credit = Arc::new(Semaphore::new(QUEUE_BYTES_MAX / CREDIT_BYTES));
        Self { shared: Arc::new(shared), credit, running: Mutex::new(Running::Idle) }
    }

    /// Stores a block; resolves when it is durable and indexed, or when it was given up. Waits for room in the queue.
    pub async fn store(&self, block: NewBlock) -> Result<Durable<Sequence>, StoreError> {
        let credits = u32::try_from(block.bytes.len().div_ceil(CREDIT_BYTES).max(1)).unwrap_or(u32::MAX);
        let permit = Arc::clone(&self.credit).acquire_many_owned(credits).await.map_err(|_| StoreError::Closed)?;
        let (reply, answer) = oneshot::channel();
        self.enqueue(block, permit, reply)?;
        answer.await.unwrap_or(Err(StoreError::Closed))
    }

    /// Confirms a block all of whose chunks are already durable and indexed.
    pub fn confirm_known(&self, sequence: Sequence) -> Durable<Sequence> {
        Durable::confirmed_by(self.shared.as_ref(), sequence)
    }

    /// Writes what is queued and seals the open packs; what is stored from then on goes to new ones.
    pub async fn seal_open(&self) {
        let (sealed, done) = oneshot::channel();
        let asked = match &*self.running.lock() {
            Running::Thread(queue, _) => queue.try_send(Job::Seal(sealed)).is_ok(),
            Running::Idle | Running::Closed => false,
        };
        if asked {
            // A writer that is closed meanwhile seals them, too.
            let _ = done.await;
        }
    }

    /// Writes what is queued, seals the open packs, and ends the thread. Blocks the calling thread.
    pub fn close(&self) {
        let running = std::mem::replace(&mut *self.running.lock(), Running::Closed);
        self.credit.close();
        if let Running::Thread(queue, thread) = running {
            let _ = queue.send(Job::Close);
            drop(queue);
            let _ = thread.join();
        }
        self.shared.waiting.lock().clear();
    }

    fn enqueue(&self, block: NewBlock, permit: OwnedSemaphorePermit, reply: Reply) -> Result<(), StoreError> {
        let mut running = self.running.lock();
        if matches!(*running, Running::Idle) {
            *running = self.start()?;
        }
        let Running::Thread(queue, _) = &*running else { return Err(StoreError::Closed) };
        let mut waiting = self.shared.waiting.lock();
        let key = (block.session, block.sequence);
        if let Some(others) = waiting.get_mut(&key) {
            others.push(reply);
            return Ok(());
        }
        match queue.try_send(Job::Block(Box::new(block), permit)) {
            Ok(()) => {
                waiting.insert(key, vec![reply]);
                Ok(())
            }
            Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) => Err(StoreError::Closed),
        }
    }

    fn start(&self) -> Result<Running, StoreError> {
        let (queue, jobs) = bounded(QUEUE_JOBS_MAX);
        // Without room: a batch is handed over when the committer asks for one, and grows until then.
        let (committer, batches) = bounded(0);
        let name = self.shared.repository.short();
        let shared = Arc::clone(&self.shared);
        let commits = move || commit::run(&shared, &batches);
        let commits = std::thread::Builder::new().name(format!("sync-{name}")).spawn(commits);
        let commits = commits.map_err(StoreError::from_io)?;
        let mut appender = Appender::new(Arc::clone(&self.shared));
        let thread = std::thread::Builder::new().name(format!("packs-{name}")).spawn(move || {
            appender.run(&jobs, &committer);
            drop(committer);
            // It ends when it has nothing left to commit.
            let _ = commits.join();
        });
        Ok(Running::Thread(queue, thread.map_err(StoreError::from_io)?))
    }
}

impl Drop for PackWriter {
    fn drop(&mut self) {
        let running = std::mem::replace(self.running.get_mut(), Running::Closed);
        if let Running::Thread(queue, thread) = running {
            drop(queue);
            let _ = thread.join();
        }
    }
}
