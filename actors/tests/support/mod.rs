//! A server in memory: the real actors over in-process pipes, with a store that keeps blocks in a map.

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use actix::{Actor, Addr};
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use strandline_actors::control_channel::{
    AskError, AskServer, BeginSession, CloseChannel, ControlChannel, Dispatching,
};
use strandline_actors::control_host::ControlHost;
use strandline_actors::dispatcher::{CountBlocks, DispatchCounters, DispatchFailed, Dispatcher, FinishDispatch};
use strandline_actors::machines::reconnect::Policy;
use strandline_actors::machines::session::{SessionLimits, Terminal};
use strandline_actors::machines::stream::StreamLimits;
use strandline_actors::ports::{BlockPlace, CommitOutcome, Host, Opening, SessionStore, StoreFault};
use strandline_actors::runtime::budget::ByteBudget;
use strandline_actors::runtime::transport::{ConnectFault, Connection, Connector, accept};
use strandline_actors::session_registry::{ObserveSessions, SessionRegistry, SessionSettings};
use strandline_actors::stream::{Origin, Stream};
use strandline_actors::stream_pool::PoolSettings;
use strandline_messages::mail::{DispatchBlock, Peer};
use strandline_messages::wire::{Commit, Message, OpenSession, Purpose, Refused, SessionKind};
use strandline_messages::{AgentId, ChunkId, Durable, DurableWriter, Sequence, SessionId, SnapshotId};
use tokio::io::{AsyncRead, AsyncWrite, DuplexStream, ReadBuf};
use tokio::sync::Semaphore;

/// What the server keeps, over all sessions.
#[derive(Default)]
pub struct Kept {
    /// Blocks by session.
    pub blocks: BTreeMap<SessionId, BTreeMap<u64, Bytes>>,
    /// Committed manifests.
    pub snapshots: Vec<Bytes>,
    /// Terminal states.
    pub ended: Vec<(SessionId, Terminal)>,
}

/// A host in memory.
#[derive(Default)]
pub struct MemoryHost {
    pub kept: Arc<Mutex<Kept>>,
    random: AtomicU64,
}

/// Whoever asks for this chunk finds a bug of ours.
pub const POISON: ChunkId = ChunkId([0xbb; 32]);

struct MemoryStore {
    session: SessionId,
    kept: Arc<Mutex<Kept>>,
}

impl DurableWriter for MemoryStore {}

impl SessionStore for MemoryStore {
    fn known(&self, ids: Vec<ChunkId>) -> BoxFuture<'static, Result<Vec<bool>, StoreFault>> {
        assert!(!ids.contains(&POISON), "planted: the session actor panics");
        async move { Ok(vec![false; ids.len()]) }.boxed()
    }

    fn store(&self, sequence: Sequence, block: Bytes) -> BoxFuture<'static, Result<Durable<Sequence>, StoreFault>> {
        self.kept.lock().blocks.entry(self.session).or_default().insert(sequence.0, block);
        let durable = Durable::confirmed_by(self, sequence);
        async move {
            tokio::task::yield_now().await;
            Ok(durable)
        }
        .boxed()
    }

    fn commit(&self, manifest: Bytes) -> BoxFuture<'static, Result<CommitOutcome, StoreFault>> {
        let snapshot = SnapshotId(id_of(&manifest));
        self.kept.lock().snapshots.push(manifest);
        async move { Ok(CommitOutcome::Committed { snapshot, receipt: vec![7; 9] }) }.boxed()
    }

    fn end(&self, terminal: Terminal, _reason: String) -> BoxFuture<'static, Result<(), StoreFault>> {
        self.kept.lock().ended.push((self.session, terminal));
        async { Ok(()) }.boxed()
    }

    fn locate(
        &self,
        _: Option<SnapshotId>,
        ids: Vec<ChunkId>,
    ) -> BoxFuture<'static, Result<Vec<Option<BlockPlace>>, StoreFault>> {
        async move { Ok(vec![None; ids.len()]) }.boxed()
    }

    fn read(&self, _place: BlockPlace) -> BoxFuture<'static, Result<Bytes, StoreFault>> {
        async { Err(StoreFault::Failed("nothing is there".into())) }.boxed()
    }
}

// Enough of a hash for a snapshot id that tests tell apart.
fn id_of(bytes: &[u8]) -> [u8; 32] {
    let mut id = [0; 32];
    for (i, byte) in bytes.iter().enumerate() {
        id[i % 32] ^= byte.rotate_left(u32::try_from(i % 8).unwrap());
    }
    id
}

impl Host for MemoryHost {
    fn open(
        &self,
        _peer: Peer,
        session: SessionId,
        _request: OpenSession,
        _nonce: [u8; 32],
    ) -> BoxFuture<'static, Result<Opening, Refused>> {
        let kept = Arc::clone(&self.kept);
        async move { Ok(Opening::Granted { store: Arc::new(MemoryStore { session, kept }) }) }.boxed()
    }

    fn answer(&self, _peer: Peer, _request: Message, _: [u8; 32]) -> BoxFuture<'static, Result<Message, Refused>> {
        async { Ok(Message::RepositoryCreated) }.boxed()
    }

    fn random(&self) -> [u8; 32] {
        let number = self.random.fetch_add(1, Ordering::Relaxed) + 1;
        let mut bytes = [0xa5; 32];
        bytes[..8].copy_from_slice(&number.to_le_bytes());
        bytes
    }
}

/// Opens a backup session.
pub fn begin(dispatcher: Option<Dispatching>) -> BeginSession {
    let opener = Arc::new(|_: &[u8; 32], resume_of| OpenSession {
        kind: SessionKind::Backup,
        repository: "main".parse().unwrap(),
        resume_of,
        writer: vec![0; 97].into(),
        proof: vec![0; 64].into(),
    });
    BeginSession { opener, dispatcher }
}

/// The server's actors on the current arbiter.
#[derive(Clone)]
pub struct Server {
    pub host: Arc<MemoryHost>,
    registry: Addr<SessionRegistry>,
    budget: Arc<Semaphore>,
}

impl Server {
    pub fn start(max_streams: u16) -> Self {
        let host = Arc::new(MemoryHost::default());
        let settings = SessionSettings {
            limits: SessionLimits::default(),
            window_bytes: 64 << 20,
            credit_bytes: 16 << 20,
            max_streams,
            agent_sessions_max: usize::MAX,
            data_addresses: Vec::new(),
        };
        let registry = SessionRegistry::new(Arc::clone(&host) as Arc<dyn Host>, settings).start();
        Self { host, registry, budget: Arc::new(Semaphore::new(8 << 20)) }
    }

    /// How many sessions are open.
    pub async fn sessions(&self) -> usize {
        self.registry.send(ObserveSessions).await.unwrap().len()
    }

    async fn serve(self, mut connection: Connection) {
        let nonce = self.host.random();
        let peer = Peer { tenant: "test".parse().unwrap(), agent: AgentId([1; 16]) };
        let Ok(hello) = accept(&mut connection, nonce).await else { return };
        match hello.purpose {
            Purpose::Control => {
                ControlHost::start_with(connection, peer, nonce, self.host.clone() as Arc<dyn Host>, self.registry);
            }
            Purpose::Data => {
                let registry = self.registry.recipient();
                let origin = Origin::Accepted { connection, peer, registry, budget: self.budget };
                Stream::start_on(None, origin, StreamLimits::default());
            }
        }
    }
}

/// How a connection breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Break {
    /// The peer's end is read.
    Finish,
    /// Reading and writing fail.
    Reset,
}

/// Cuts one connection after so many bytes in one direction.
#[derive(Clone, Copy, Debug)]
pub struct Cut {
    /// Which connection, counted from 0.
    pub connection: u32,
    /// Whether the agent's writing is counted, or its reading.
    pub writing: bool,
    /// After so many bytes.
    pub after: usize,
    /// How.
    pub how: Break,
}

/// Makes pipes to the server; may cut some.
pub struct Pipes {
    server: Server,
    pipe_bytes: usize,
    cuts: Vec<Cut>,
    made: AtomicU32,
}

impl Pipes {
    pub fn new(server: Server, pipe_bytes: usize, cuts: Vec<Cut>) -> Arc<Self> {
        Arc::new(Self { server, pipe_bytes, cuts, made: AtomicU32::new(0) })
    }

    pub fn made(&self) -> u32 {
        self.made.load(Ordering::Relaxed)
    }
}

impl Connector for Pipes {
    fn connect(&self, _address: Option<String>) -> BoxFuture<'static, Result<Connection, ConnectFault>> {
        let number = self.made.fetch_add(1, Ordering::Relaxed);
        let (ours, theirs) = tokio::io::duplex(self.pipe_bytes);
        actix_rt::spawn(self.server.clone().serve(Box::new(theirs)));
        let cut = self.cuts.iter().find(|cut| cut.connection == number).copied();
        async move { Ok(Box::new(CutPipe { pipe: Some(ours), cut, moved: 0 }) as Connection) }.boxed()
    }

    fn target(&self) -> String {
        "memory".into()
    }
}

/// A pipe that breaks where it is told to; the other end sees its end.
struct CutPipe {
    pipe: Option<DuplexStream>,
    cut: Option<Cut>,
    moved: usize,
}

impl CutPipe {
    fn room(&self, writing: bool) -> usize {
        match self.cut {
            Some(cut) if cut.writing == writing => cut.after - self.moved,
            _ => usize::MAX,
        }
    }

    fn broken(&mut self) -> io::Result<()> {
        self.pipe = None;
        match self.cut.map(|cut| cut.how) {
            Some(Break::Finish) => Ok(()),
            _ => Err(io::ErrorKind::ConnectionReset.into()),
        }
    }
}

impl AsyncRead for CutPipe {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let room = self.room(false);
        if room == 0 || self.pipe.is_none() {
            return Poll::Ready(self.broken());
        }
        let mut bytes = vec![0; room.min(buf.remaining()).min(8192)];
        let mut part = ReadBuf::new(&mut bytes);
        let polled = Pin::new(self.pipe.as_mut().unwrap()).poll_read(cx, &mut part);
        let read = part.filled().len();
        buf.put_slice(part.filled());
        if self.cut.is_some_and(|cut| !cut.writing) {
            self.moved += read;
        }
        polled
    }
}

impl AsyncWrite for CutPipe {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let room = self.room(true);
        if room == 0 || self.pipe.is_none() {
            self.pipe = None;
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let part = &bytes[..bytes.len().min(room)];
        let polled = Pin::new(self.pipe.as_mut().unwrap()).poll_write(cx, part);
        if let (Poll::Ready(Ok(written)), Some(true)) = (&polled, self.cut.map(|cut| cut.writing)) {
            self.moved += written;
        }
        polled
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.pipe.as_mut() {
            Some(pipe) => Pin::new(pipe).poll_flush(cx),
            None => Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.pipe.as_mut() {
            Some(pipe) => Pin::new(pipe).poll_shutdown(cx),
            None => Poll::Ready(Ok(())),
        }
    }
}

/// Ends a test's agent when its blocks cannot be delivered.
pub struct Fate(pub Arc<Mutex<Option<String>>>);

impl Actor for Fate {
    type Context = actix::Context<Self>;
}

impl actix::Handler<DispatchFailed> for Fate {
    type Result = ();

    fn handle(&mut self, DispatchFailed(reason): DispatchFailed, _: &mut actix::Context<Self>) {
        self.0.lock().get_or_insert(reason);
    }
}

/// One agent of a test.
pub struct Agent {
    pub control: Addr<ControlChannel>,
    pub dispatcher: Addr<Dispatcher>,
    pub counters: Arc<DispatchCounters>,
    pub fate: Arc<Mutex<Option<String>>>,
}

/// Patience that fits a test.
fn patience() -> Policy {
    Policy { base: Duration::from_millis(1), cap: Duration::from_millis(5), ..Policy::default() }
}

impl Agent {
    /// Connects and opens a session.
    pub async fn begin(connector: Arc<dyn Connector>, streams: u16) -> Result<Self, AskError> {
        let control = ControlChannel::new(Arc::clone(&connector), patience(), patience(), 1).start();
        let counters: Arc<DispatchCounters> = Arc::default();
        let fate: Arc<Mutex<Option<String>>> = Arc::default();
        let job = Fate(Arc::clone(&fate)).start();
        let pool = PoolSettings {
            connector,
            streams,
            limits: StreamLimits::default(),
            upload: None,
            arbiters: Vec::new(),
            policy: patience(),
            seed: 1,
        };
        let budget = ByteBudget::new(64 << 20);
        let dispatcher = Dispatcher::new(pool, budget, Arc::clone(&counters), job.clone().recipient()).start();
        let news = Dispatching {
            session: dispatcher.clone().recipient(),
            durable: dispatcher.clone().recipient(),
            again: dispatcher.clone().recipient(),
            failed: job.recipient(),
        };
        control.send(begin(Some(news))).await.unwrap()?;
        Ok(Self { control, dispatcher, counters, fate })
    }

    /// Sends blocks, commits, closes every socket.
    pub async fn back_up(self, blocks: u64, bytes: usize) -> Result<(), AskError> {
        for number in 0..blocks {
            let mut block = vec![0; bytes];
            block[..8].copy_from_slice(&number.to_le_bytes());
            self.dispatcher.do_send(DispatchBlock(block.into()));
        }
        loop {
            let count = self.dispatcher.send(CountBlocks).await.unwrap();
            let commit = Commit { manifest: vec![9; 40].into(), blocks: count };
            match self.control.send(AskServer(Message::Commit(commit))).await.unwrap() {
                Ok(Message::Committed(_)) => break,
                Ok(other) => panic!("{}", other.name()),
                Err(AskError::Replaced) => {}
                Err(error) => return Err(error),
            }
        }
        self.dispatcher.send(FinishDispatch).await.unwrap();
        self.control.send(CloseChannel).await.unwrap();
        assert_eq!(*self.fate.lock(), None);
        Ok(())
    }
}
