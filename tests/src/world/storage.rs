//! The server's storage and catalog as the actors' ports see them, on a disk that forgets what was not synced.
//!
//! One repository, shared by all agents. A chunk is there when a block that has it is durable; nothing is ever freed. Blocks
//! keep their bytes, so that restores get what was stored and nothing else.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use strandline_actors::machines::session::Terminal;
use strandline_actors::planted::{self, Bug};
use strandline_actors::ports::{BlockPlace, CommitOutcome, Host, Opening, SessionStore, StoreFault};
use strandline_actors::runtime::clock;
use strandline_messages::mail::Peer;
use strandline_messages::wire::{Message, OpenSession, RefusalCode, Refused};
use strandline_messages::{AgentId, ChunkId, Durable, DurableWriter, Sequence, SessionId, SnapshotId};

use super::World;
use super::plan::Plan;
use crate::random::Random;

const ID_BYTES: usize = 32;

/// A block of these chunks, `bytes` long at least.
pub fn block_of(ids: &[ChunkId], bytes: usize) -> Bytes {
    let mut block = Vec::with_capacity(bytes.max(4 + ids.len() * ID_BYTES));
    block.extend_from_slice(&u32::try_from(ids.len()).unwrap_or(0).to_le_bytes());
    for id in ids {
        block.extend_from_slice(id.as_bytes());
    }
    block.resize(block.len().max(bytes), 0);
    block.into()
}

/// The chunks of a block; `None` if it is none.
pub fn chunks_of(block: &[u8]) -> Option<Vec<ChunkId>> {
    let (count, rest) = block.split_first_chunk::<4>()?;
    let ids = rest.get(..u32::from_le_bytes(*count) as usize * ID_BYTES)?;
    Some(ids.as_chunks::<ID_BYTES>().0.iter().copied().map(ChunkId).collect())
}

/// How a session stands in the catalog.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Row {
    /// Its lease is good.
    Open,
    /// Another carries on for it.
    Superseded,
    /// It made a snapshot.
    Committed(SnapshotId),
    /// It ended without one.
    Ended(Terminal),
}

/// What is on the disk whatever happens.
#[derive(Debug, Default)]
pub struct Durably {
    /// Blocks by the number of their write.
    pub blocks: BTreeMap<u32, Bytes>,
    /// Chunks with a copy, and the block that has it.
    pub chunks: BTreeMap<ChunkId, u32>,
    /// Committed manifests by their id: the chunks that they need.
    pub snapshots: BTreeMap<SnapshotId, Vec<ChunkId>>,
    /// Sessions.
    pub sessions: BTreeMap<SessionId, (AgentId, Row)>,
}

impl Durably {
    fn keep(&mut self, write: u32, block: Bytes) {
        for id in chunks_of(&block).unwrap_or_default() {
            self.chunks.insert(id, write);
        }
        self.blocks.insert(write, block);
    }
}

/// What a server process has in the page cache: blocks written and not synced.
type Volatile = BTreeMap<u32, Bytes>;

/// The disk, over all server processes.
#[derive(Clone)]
pub struct Disk {
    world: World,
    plan: Arc<Plan>,
    durably: Arc<Mutex<Durably>>,
    /// Writes so far, of all processes.
    writes: Arc<AtomicU32>,
    /// Until when writing fails, and whether because the disk is full.
    failing: Arc<Mutex<Option<(std::time::Instant, bool)>>>,
}

impl Disk {
    /// Empty.
    pub fn new(world: &World, plan: Plan) -> Self {
        Self {
            world: world.clone(),
            plan: Arc::new(plan),
            durably: Arc::default(),
            writes: Arc::default(),
            failing: Arc::default(),
        }
    }

    /// Looks at what is durable.
    pub fn look<T>(&self, at: impl FnOnce(&Durably) -> T) -> T {
        at(&self.durably.lock())
    }

    /// Writing fails for so long.
    pub fn fail(&self, how_long: Duration, full: bool) {
        *self.failing.lock() = Some((clock::now() + how_long, full));
    }

    fn fault(&self) -> Option<StoreFault> {
        let failing = *self.failing.lock();
        failing.filter(|(until, _)| clock::now() < *until).map(|(_, full)| {
            if full {
                StoreFault::Full("the disk is full".into())
            } else {
                StoreFault::Failed("the disk reports an error".into())
            }
        })
    }
}

/// The host of one server process. After its death nothing that it does reaches the disk, and nothing comes back.
pub struct SimHost {
    disk: Disk,
    alive: AtomicBool,
    volatile: Mutex<Volatile>,
    random: Mutex<Random>,
}

impl SimHost {
    /// A process that has just started.
    pub fn new(disk: &Disk) -> Arc<Self> {
        Arc::new(Self {
            disk: disk.clone(),
            alive: AtomicBool::new(true),
            volatile: Mutex::default(),
            random: Mutex::new(disk.world.fork()),
        })
    }

    /// Kills it. Of what was written and not synced, some may have reached the disk all the same.
    pub fn kill(&self) {
        self.alive.store(false, Ordering::SeqCst);
        let written = std::mem::take(&mut *self.volatile.lock());
        let mut durably = self.disk.durably.lock();
        for (write, block) in written {
            if self.random.lock().percent(50) {
                durably.keep(write, block);
            }
        }
    }

    /// Waits for ever if the process is dead.
    async fn live(&self) {
        if !self.alive.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
    }

    async fn take_time(&self) {
        let most = self.disk.plan.disk.as_micros().try_into().unwrap_or(u64::MAX);
        let time = Duration::from_micros(self.random.lock().below(most));
        tokio::time::sleep(time).await;
        self.live().await;
    }

    /// What was written is durable from now on.
    fn sync(&self, write: u32) {
        if let Some(block) = self.volatile.lock().remove(&write) {
            self.disk.durably.lock().keep(write, block);
        }
    }

    /// Whether a chunk is in a block that was written and not synced.
    fn is_written(&self, id: &ChunkId) -> bool {
        self.volatile.lock().values().any(|block| chunks_of(block).unwrap_or_default().contains(id))
    }

    fn row(&self, session: &SessionId) -> Option<Row> {
        self.disk.durably.lock().sessions.get(session).map(|(_, row)| *row)
    }
}

impl Host for SimHostRef {
    fn open(
        &self,
        peer: Peer,
        session: SessionId,
        request: OpenSession,
        _nonce: [u8; 32],
    ) -> BoxFuture<'static, Result<Opening, Refused>> {
        let host = Arc::clone(&self.0);
        async move {
            host.take_time().await;
            let mut durably = host.disk.durably.lock();
            if let Some((agent, row)) = request.resume_of.and_then(|old| durably.sessions.get_mut(&old))
                && *agent == peer.agent
            {
                match *row {
                    Row::Committed(snapshot) => {
                        return Ok(Opening::AlreadyCommitted { snapshot, receipt: vec![7; 9] });
                    }
                    Row::Open => *row = Row::Superseded,
                    Row::Superseded | Row::Ended(_) => {}
                }
            }
            durably.sessions.insert(session, (peer.agent, Row::Open));
            host.disk.world.tell(|| format!("lease of {} for agent {}", session.short(), peer.agent.short()));
            drop(durably);
            Ok(Opening::Granted { store: Arc::new(SimStore { host, session }) })
        }
        .boxed()
    }

    fn answer(&self, _: Peer, request: Message, _: [u8; 32]) -> BoxFuture<'static, Result<Message, Refused>> {
        let text = format!("{} is not imitated", request.name());
        async move { Err(Refused::new(RefusalCode::Invalid, text)) }.boxed()
    }

    fn random(&self) -> [u8; 32] {
        let mut random = self.0.random.lock();
        let mut bytes = [0; 32];
        for part in bytes.as_chunks_mut::<8>().0 {
            *part = random.number().to_le_bytes();
        }
        bytes
    }
}

/// The host as the actors hold it.
pub struct SimHostRef(pub Arc<SimHost>);

/// One session's storage.
struct SimStore {
    host: Arc<SimHost>,
    session: SessionId,
}

impl DurableWriter for SimStore {}

impl SimStore {
    fn part(&self) -> Self {
        Self { host: Arc::clone(&self.host), session: self.session }
    }

    /// The lease: nobody else carries on for this session, and it has no end yet.
    fn fence(&self) -> Result<(), StoreFault> {
        match self.host.row(&self.session) {
            Some(Row::Open) => Ok(()),
            row => Err(StoreFault::Failed(format!("the session's lease is gone: {row:?}"))),
        }
    }

    async fn store_block(self, sequence: Sequence, block: Bytes) -> Result<Durable<Sequence>, StoreFault> {
        chunks_of(&block).ok_or_else(|| StoreFault::BadBlock("not a block".into()))?;
        self.host.take_time().await;
        self.fence()?;
        let fault = self.host.disk.fault();
        let write = self.host.disk.writes.fetch_add(1, Ordering::Relaxed);
        self.host.volatile.lock().insert(write, block);
        if planted::here(Bug::ConfirmsBeforeItSyncs) {
            let host = Arc::clone(&self.host);
            actix_rt::spawn(async move {
                host.take_time().await;
                host.sync(write);
            });
            return Ok(Durable::confirmed_by(&self, sequence));
        }
        self.host.take_time().await;
        if let Some(fault) = fault.or_else(|| self.host.disk.fault()) {
            if planted::here(Bug::ConfirmsInSpiteOfErrors) {
                return Ok(Durable::confirmed_by(&self, sequence));
            }
            // Whether the bytes are there nobody knows.
            return Err(fault);
        }
        self.host.sync(write);
        Ok(Durable::confirmed_by(&self, sequence))
    }

    async fn commit_manifest(self, manifest: Bytes) -> Result<CommitOutcome, StoreFault> {
        self.host.take_time().await;
        let Some(ids) = chunks_of(&manifest) else {
            return Ok(CommitOutcome::Refused { reason: "not a manifest".into() });
        };
        let snapshot = snapshot_of(&manifest);
        {
            let mut durably = self.host.disk.durably.lock();
            let missing: Vec<ChunkId> =
                ids.iter().filter(|id| !durably.chunks.contains_key(*id)).copied().take(100).collect();
            if !missing.is_empty() {
                return Ok(CommitOutcome::Missing { ids: missing, more: false });
            }
            match durably.sessions.get_mut(&self.session) {
                Some((_, row)) if matches!(row, Row::Open) => *row = Row::Committed(snapshot),
                Some((_, Row::Committed(known))) if *known == snapshot => {}
                other => return Err(StoreFault::Failed(format!("the session's lease is gone: {other:?}"))),
            }
            durably.snapshots.insert(snapshot, ids);
        }
        self.host.take_time().await;
        Ok(CommitOutcome::Committed { snapshot, receipt: vec![7; 9] })
    }
}

/// A snapshot's id: enough of a hash to tell manifests apart.
pub fn snapshot_of(manifest: &[u8]) -> SnapshotId {
    let mut id = [0; 32];
    let mut state = Random::new(manifest.len() as u64);
    for byte in manifest {
        state = Random::new(state.number() ^ u64::from(*byte));
    }
    for part in id.as_chunks_mut::<8>().0 {
        *part = state.number().to_le_bytes();
    }
    SnapshotId(id)
}

impl SessionStore for SimStore {
    fn known(&self, ids: Vec<ChunkId>) -> BoxFuture<'static, Result<Vec<bool>, StoreFault>> {
        let store = self.part();
        async move {
            store.host.take_time().await;
            store.fence()?;
            let durably = store.host.disk.durably.lock();
            let early = |id| planted::here(Bug::KnowsWhatIsNotDurable) && store.host.is_written(id);
            Ok(ids.iter().map(|id| durably.chunks.contains_key(id) || early(id)).collect())
        }
        .boxed()
    }

    fn store(&self, sequence: Sequence, block: Bytes) -> BoxFuture<'static, Result<Durable<Sequence>, StoreFault>> {
        self.part().store_block(sequence, block).boxed()
    }

    fn commit(&self, manifest: Bytes) -> BoxFuture<'static, Result<CommitOutcome, StoreFault>> {
        self.part().commit_manifest(manifest).boxed()
    }

    fn end(&self, terminal: Terminal, _reason: String) -> BoxFuture<'static, Result<(), StoreFault>> {
        let store = self.part();
        async move {
            store.host.take_time().await;
            let mut durably = store.host.disk.durably.lock();
            if let Some((_, row @ Row::Open)) = durably.sessions.get_mut(&store.session) {
                *row = Row::Ended(terminal);
            }
            store.host.disk.world.tell(|| format!("{} ends: {terminal:?}", store.session.short()));
            Ok(())
        }
        .boxed()
    }

    fn locate(
        &self,
        _: Option<SnapshotId>,
        ids: Vec<ChunkId>,
    ) -> BoxFuture<'static, Result<Vec<Option<BlockPlace>>, StoreFault>> {
        let store = self.part();
        async move {
            store.host.take_time().await;
            let durably = store.host.disk.durably.lock();
            let place = |id| {
                let write = *durably.chunks.get(id)?;
                let bytes = durably.blocks.get(&write)?.len();
                Some(BlockPlace { pack: write, offset: 0, bytes: u32::try_from(bytes).unwrap_or(u32::MAX) })
            };
            Ok(ids.iter().map(place).collect())
        }
        .boxed()
    }

    fn read(&self, place: BlockPlace) -> BoxFuture<'static, Result<Bytes, StoreFault>> {
        let store = self.part();
        async move {
            store.host.take_time().await;
            let block = store.host.disk.durably.lock().blocks.get(&place.pack).cloned();
            block.ok_or_else(|| StoreFault::Failed("no such block".into()))
        }
        .boxed()
    }
}
