//! The pack writer: the only thing that makes blocks durable, and so the only [`DurableWriter`].
//!
//! One thread per repository, started with the first block, owns the open packs (one per writer domain). It gathers queued
//! blocks into a group, appends them with one vectored write, syncs once, has them indexed, and only then confirms every one
//! of them. While one group is being synced the next one gathers in the queue; when the queue is empty the thread waits for
//! more no longer than its last sync took (waiting and syncing then cost at most twice the better of the two), at most
//! `group_commit_wait`, and not at all once somebody asked for a flush.
//!
//! Bounds: the queue holds at most [`QUEUE_BYTES_MAX`] of block bytes (callers wait for room, which is the backpressure that
//! the streams see); at most [`OPEN_PACKS_MAX`] packs are open; a pack's list of footer entries is at most
//! `PACK_BLOCKS_MAX` × 48 bytes.
//!
//! After an error on a pack's file that file is never written or synced again; recovery seals it at the next start. A failed
//! sync or write is tried once more in a new pack; a full disk is not.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use parking_lot::Mutex;
use strandline_actors::runtime::clock;
use strandline_messages::format::FormatError;
use strandline_messages::format::block::BlockHeaderV1;
use strandline_messages::format::pack::{FooterEntry, PACK_HEADER_BYTES, PackHeaderV1};
use strandline_messages::{
    BlockDigest, ChunkId, ChunkKind, DomainId, Durable, DurableWriter, RepositoryId, Sequence, SessionId, limits,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use super::files::FileOps;
use super::layout::RepositoryPaths;
use super::pack_file::{self, PackInfo};
use super::store_error::StoreError;

/// Most bytes of blocks that wait to be written, per repository.
pub const QUEUE_BYTES_MAX: usize = 64 << 20;
/// The queue's credit is counted in this many bytes.
const CREDIT_BYTES: usize = 1024;
/// Most jobs in the queue: every block holds at least one credit; the rest is room for requests without blocks.
const QUEUE_JOBS_MAX: usize = QUEUE_BYTES_MAX / CREDIT_BYTES + 16;
/// Most packs open for writing, per repository.
pub const OPEN_PACKS_MAX: usize = 64;

/// How groups are formed.
#[derive(Clone, Copy, Debug)]
pub struct PackWriterOptions {
    /// A group is written when it holds this many bytes.
    pub group_commit_bytes: usize,
    /// Or when its first block has waited this long.
    pub group_commit_wait: Duration,
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
    /// A pack was opened or sealed.
    fn pack_changed(&self, info: PackInfo);
    /// A pack in which nothing was ever confirmed was removed.
    fn pack_gone(&self, number: u32);
}

type Reply = oneshot::Sender<Result<Durable<Sequence>, StoreError>>;
type Key = (SessionId, Sequence);

enum Job {
    Block(Box<NewBlock>, OwnedSemaphorePermit),
    Wake,
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
    fn confirm(&self, sequence: Sequence) -> Durable<Sequence> {
        Durable::confirmed_by(self, sequence)
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
        self.shared.confirm(sequence)
    }

    /// Asks for the blocks queued so far to be written now.
    pub fn flush(&self) {
        if let Running::Thread(queue, _) = &*self.running.lock() {
            // A full queue means that the thread is writing anyway.
            let _ = queue.try_send(Job::Wake);
        }
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
        let mut worker =
            Worker { shared: Arc::clone(&self.shared), open: HashMap::new(), last_sync: Duration::ZERO, uses: 0 };
        let name = format!("packs-{}", self.shared.repository.short());
        let thread = std::thread::Builder::new().name(name).spawn(move || worker.run(&jobs));
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

struct OpenPack {
    info: PackInfo,
    file: File,
    entries: Vec<FooterEntry>,
    /// Counts the groups, to find the pack that has been quiet longest.
    used: u64,
}

struct Worker {
    shared: Arc<Shared>,
    open: HashMap<DomainId, OpenPack>,
    last_sync: Duration,
    uses: u64,
}

type Queued = (Box<NewBlock>, OwnedSemaphorePermit);

/// What the writer does after a group.
enum Then {
    GoOn,
    Seal(oneshot::Sender<()>),
    End,
}

impl Worker {
    fn run(&mut self, jobs: &Receiver<Job>) {
        let mut open = true;
        while open {
            let Ok(first) = jobs.recv() else { return };
            let (group, then) = self.gather(first, jobs);
            self.commit(group);
            match then {
                Then::GoOn => {}
                Then::Seal(asker) => {
                    self.seal_all();
                    // Whoever asked may have gone away.
                    let _ = asker.send(());
                }
                Then::End => open = false,
            }
        }
        self.seal_all();
    }

    fn seal_all(&mut self) {
        let domains: Vec<DomainId> = self.open.keys().copied().collect();
        for domain in domains {
            self.seal(domain);
        }
    }

    /// Collects the next group, and what to do after it.
    fn gather(&self, first: Job, jobs: &Receiver<Job>) -> (Vec<Queued>, Then) {
        let options = self.shared.options;
        let deadline = clock::now() + self.last_sync.min(options.group_commit_wait);
        let mut group = Vec::new();
        let mut bytes = 0;
        let mut lingers = true;
        let mut next = Some(first);
        while let Some(job) = next {
            match job {
                Job::Block(block, permit) => {
                    bytes += block.bytes.len();
                    group.push((block, permit));
                }
                Job::Wake => lingers = false,
                Job::Seal(asker) => return (group, Then::Seal(asker)),
                Job::Close => return (group, Then::End),
            }
            if bytes >= options.group_commit_bytes {
                break;
            }
            next = match jobs.try_recv() {
                Ok(job) => Some(job),
                Err(_) if lingers => jobs.recv_deadline(deadline).ok(),
                Err(_) => None,
            };
        }
        (group, Then::GoOn)
    }

    fn commit(&mut self, group: Vec<Queued>) {
        let mut domains: Vec<(DomainId, Vec<Queued>)> = Vec::new();
        for queued in group {
            let domain = queued.0.domain;
            match domains.iter_mut().find(|(known, _)| *known == domain) {
                Some((_, blocks)) => blocks.push(queued),
                None => domains.push((domain, vec![queued])),
            }
        }
        for (domain, blocks) in domains {
            self.commit_domain(domain, blocks);
        }
    }

    fn commit_domain(&mut self, domain: DomainId, mut blocks: Vec<Queued>) {
        while !blocks.is_empty() {
            let result = self.write_part(domain, &blocks).or_else(|error| {
                self.abandon(domain);
                match error {
                    StoreError::Io { source } => {
                        tracing::error!(%domain, error = %source, "a pack was closed after an error; its blocks go to a new one");
                        self.write_part(domain, &blocks).inspect_err(|_| self.abandon(domain))
                    }
                    other => Err(other),
                }
            });
            match result {
                Ok(count) => {
                    for (block, _permit) in blocks.drain(..count.clamp(1, blocks.len())) {
                        self.answer(&block, None);
                    }
                }
                Err(error) => {
                    tracing::error!(%domain, %error, "blocks were not stored");
                    for (block, _permit) in blocks.drain(..) {
                        self.answer(&block, Some(&error));
                    }
                }
            }
        }
    }

    /// Appends as many of `blocks` as the open pack takes, syncs and indexes them; how many (at least one).
    fn write_part(&mut self, domain: DomainId, blocks: &[Queued]) -> Result<usize, StoreError> {
        let first = blocks.first().map_or(0, |(block, _)| block.bytes.len());
        if self.open.get(&domain).is_some_and(|pack| !self.fits(pack.info.blocks_end.into(), pack.entries.len(), first))
        {
            self.seal(domain);
        }
        self.uses += 1;
        let mut pack = match self.open.remove(&domain) {
            Some(pack) => pack,
            None => self.open_pack(domain)?,
        };
        pack.used = self.uses;
        let start = u64::from(pack.info.blocks_end);
        let (mut end, mut parts, mut stored) = (start, Vec::new(), Vec::new());
        let mut entries = Vec::new();
        for (block, _) in blocks {
            if !parts.is_empty() && !self.fits(end, pack.entries.len() + parts.len(), block.bytes.len()) {
                break;
            }
            let (entry, stored_block) = placed(block, end)?;
            end += u64::from(entry.bytes);
            parts.push(block.bytes.clone());
            entries.push(entry);
            stored.push(stored_block);
        }
        let path = self.shared.paths.pack(pack.info.number);
        let mut sync_time = Duration::ZERO;
        let room = self.shared.ops.ensure_room(&pack.file, end - start);
        let written = room.and_then(|()| self.shared.ops.write_at(&pack.file, &path, &parts, start)).and_then(|()| {
            let began = clock::now();
            self.shared.ops.sync(&pack.file, &path)?;
            sync_time = began.elapsed();
            Ok(())
        });
        if let Err(error) = written {
            if pack.entries.is_empty() {
                // An agent that keeps trying on a full disk would otherwise leave a pack without blocks each time.
                self.remove(pack.info.number, &path);
            }
            return Err(StoreError::from_io(error));
        }
        self.last_sync = sync_time;
        pack.entries.append(&mut entries);
        pack.info.blocks_end = u32::try_from(end).map_err(|_| too_large())?;
        pack.info.file_bytes = end;
        pack.info.blocks = u32::try_from(pack.entries.len()).map_err(|_| too_large())?;
        let indexed = self.shared.sink.stored(pack.info, &stored);
        indexed.map_err(|reason| StoreError::Index { reason: reason.into() })?;
        self.open.insert(domain, pack);
        Ok(stored.len())
    }

    fn fits(&self, end: u64, entries: usize, block_bytes: usize) -> bool {
        let empty = end <= PACK_HEADER_BYTES as u64;
        empty || (end + block_bytes as u64 <= self.shared.options.pack_bytes_max && entries < limits::PACK_BLOCKS_MAX)
    }

    fn open_pack(&mut self, domain: DomainId) -> Result<OpenPack, StoreError> {
        if self.open.len() >= OPEN_PACKS_MAX {
            let quiet = self.open.iter().min_by_key(|(_, pack)| pack.used).map(|(&domain, _)| domain);
            if let Some(quiet) = quiet {
                self.seal(quiet);
            }
        }
        let shared = &self.shared;
        let number = shared.next_pack.fetch_add(1, Ordering::Relaxed);
        let path = shared.paths.pack(number);
        let header = PackHeaderV1 { repository: shared.repository, domain, number, created_ns: clock::wall_ns() };
        let header = Bytes::from(header.encode());
        let end = header.len() as u64;
        let file = shared.ops.create(&path).map_err(StoreError::from_io)?;
        let begun = shared.ops.write_at(&file, &path, &[header], 0).and_then(|()| {
            shared.ops.sync(&file, &path)?;
            shared.ops.sync_directory(&shared.paths.packs())
        });
        if let Err(error) = begun {
            self.remove(number, &path);
            return Err(StoreError::from_io(error));
        }
        let blocks_end = u32::try_from(end).map_err(|_| too_large())?;
        let info = PackInfo { number, domain, sealed: false, file_bytes: end, blocks_end, blocks: 0 };
        shared.sink.pack_changed(info);
        Ok(OpenPack { info, file, entries: Vec::new(), used: self.uses })
    }

    /// Writes the footer of the domain's open pack and closes it. If that fails, recovery does it at the next start.
    fn seal(&mut self, domain: DomainId) {
        let Some(pack) = self.open.remove(&domain) else { return };
        let path = self.shared.paths.pack(pack.info.number);
        let end = u64::from(pack.info.blocks_end);
        match pack_file::seal(self.shared.ops.as_ref(), &pack.file, &path, &pack.entries, end) {
            Ok(file_bytes) => self.shared.sink.pack_changed(PackInfo { sealed: true, file_bytes, ..pack.info }),
            Err(error) => {
                tracing::warn!(pack = pack.info.number, %error, "a pack could not be sealed; its blocks are intact, the next start seals it");
            }
        }
    }

    fn remove(&self, number: u32, path: &Path) {
        // If even this fails, the next start seals the pack or sets it aside.
        let _ = std::fs::remove_file(path);
        self.shared.sink.pack_gone(number);
    }

    fn abandon(&mut self, domain: DomainId) {
        self.open.remove(&domain);
    }

    fn answer(&self, block: &NewBlock, error: Option<&StoreError>) {
        let replies = self.shared.waiting.lock().remove(&(block.session, block.sequence)).unwrap_or_default();
        for reply in replies {
            // A caller that went away does not need its answer.
            let _ = reply.send(match error {
                None => Ok(self.shared.confirm(block.sequence)),
                Some(error) => Err(error.clone()),
            });
        }
    }
}

fn placed(block: &NewBlock, at: u64) -> Result<(FooterEntry, StoredBlock), StoreError> {
    let offset = u32::try_from(at).map_err(|_| too_large())?;
    let bytes = u32::try_from(block.bytes.len()).map_err(|_| too_large())?;
    let chunks = u16::try_from(block.ids.len()).map_err(|_| too_large())?;
    let (kind, digest) = (block.header.kind, block.digest);
    let entry = FooterEntry { offset, bytes, kind, chunks, digest };
    let (session, sequence, ids) = (block.session, block.sequence, block.ids.clone());
    Ok((entry, StoredBlock { session, sequence, kind, offset, bytes, ids }))
}

fn too_large() -> StoreError {
    StoreError::Refused(FormatError::Invalid { what: "block", why: "too large for a pack" })
}
