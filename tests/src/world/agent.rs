//! An agent's process: the shipped control channel and dispatcher, and a pipeline that is as simple as possible.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use actix::{Actor, Addr};
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use strandline_actors::control_channel::{
    AskError, AskServer, BeginSession, CloseChannel, ControlChannel, Dispatching, ForgetSession, SessionOpener,
};
use strandline_actors::dispatcher::{
    AbandonDispatch, CountBlocks, DispatchCounters, DispatchFailed, Dispatcher, FinishDispatch, LearnDurable,
};
use strandline_actors::machines::reconnect::Policy;
use strandline_actors::machines::stream::StreamLimits;
use strandline_actors::runtime::budget::ByteBudget;
use strandline_actors::runtime::transport::{ConnectFault, Connection, Connector};
use strandline_actors::stream_pool::PoolSettings;
use strandline_messages::mail::{DispatchBlock, Peer};
use strandline_messages::wire::{Ack, Commit, Message, OpenSession, QueryChunks, SessionKind, join_ids, unpack_bitmap};
use strandline_messages::{AgentId, ChunkId};

use super::net::{Net, Processes};
use super::oracle::{Oracle, RunNumber};
use super::server::ServerProcess;
use super::storage::{block_of, snapshot_of};
use crate::random::Random;

/// Unacknowledged bytes after which the pipeline waits.
const WINDOW_BYTES: u64 = 48 << 10;
/// How soon it looks whether it may go on, and how long it pauses between looks after a long wait: a stalled connection is
/// given up after a minute.
const LOOK: Duration = Duration::from_millis(5);
const LOOK_MAX: Duration = Duration::from_secs(1);
/// Ids in one query.
const QUERY_IDS: usize = 64;

/// The server of the moment, if one runs.
pub type ServerSlot = Arc<Mutex<Option<ServerProcess>>>;

/// One process of an agent.
#[derive(Clone)]
pub struct AgentProcess {
    /// Counted over all that were started.
    pub number: u64,
    /// Which agent it is.
    pub agent: usize,
    /// Whether it lives.
    pub alive: Arc<AtomicBool>,
    /// Where it connects to.
    pub server: ServerSlot,
    /// What carries its connections.
    pub net: Net,
    /// Data streams of its sessions.
    pub streams: u16,
}

/// What is to be backed up. Its chunks are those that a restore must bring back.
pub struct Job {
    /// The chunks that the snapshot needs.
    pub ids: Vec<ChunkId>,
    /// The manifest: different for every run.
    pub manifest: Bytes,
    /// A block is longer than what stands in it by at most so much.
    pub block_bytes: usize,
    /// How long the pipeline has nothing to send after its first block: a long scan.
    pub pause: Duration,
}

impl AgentProcess {
    fn peer(&self) -> Peer {
        let number = u8::try_from(self.agent).unwrap_or(u8::MAX);
        // The name is valid.
        let tenant = "simulated".parse().unwrap_or_else(|_| std::process::abort());
        Peer { tenant, agent: AgentId([number; 16]) }
    }

    /// A control channel.
    pub fn control(&self, random: &mut Random) -> Addr<ControlChannel> {
        let policy = Policy::default();
        ControlChannel::new(Arc::new(self.clone()), policy, policy, random.number()).start()
    }

    /// How streams are made.
    pub fn pool(&self, random: &mut Random) -> PoolSettings {
        PoolSettings {
            connector: Arc::new(self.clone()),
            streams: self.streams,
            limits: StreamLimits::default(),
            upload: None,
            arbiters: Vec::new(),
            policy: Policy::default(),
            seed: random.number(),
        }
    }
}

/// Opens sessions of this kind.
pub fn opener(kind: SessionKind) -> SessionOpener {
    Arc::new(move |_: &[u8; 32], resume_of| OpenSession {
        kind,
        repository: "main".parse().unwrap_or_else(|_| std::process::abort()),
        resume_of,
        writer: vec![0; 97].into(),
        proof: vec![0; 64].into(),
    })
}

impl Connector for AgentProcess {
    fn connect(&self, _address: Option<String>) -> BoxFuture<'static, Result<Connection, ConnectFault>> {
        let process = self.clone();
        async move {
            tokio::time::sleep(process.net.some_latency()).await;
            if !process.alive.load(Ordering::SeqCst) {
                return Err(ConnectFault::lasting("this process is dead"));
            }
            let Some(server) = process.server.lock().clone() else {
                return Err(ConnectFault::passing("nobody listens"));
            };
            let (ours, theirs) = process.net.connect(Processes { agent: process.number, server: server.number });
            let peer = process.peer();
            actix_rt::spawn(server.serve(Box::new(theirs), peer));
            Ok(Box::new(ours) as Connection)
        }
        .boxed()
    }

    fn target(&self) -> String {
        "the simulated server".into()
    }
}

/// Takes the dispatcher's bad news.
struct Fate(Arc<Mutex<Option<String>>>);

impl Actor for Fate {
    type Context = actix::Context<Self>;
}

impl actix::Handler<DispatchFailed> for Fate {
    type Result = ();

    fn handle(&mut self, DispatchFailed(reason): DispatchFailed, _: &mut actix::Context<Self>) {
        self.0.lock().get_or_insert(reason);
    }
}

/// A backup under way.
struct Run {
    control: Addr<ControlChannel>,
    dispatcher: Addr<Dispatcher>,
    counters: Arc<DispatchCounters>,
    fate: Arc<Mutex<Option<String>>>,
    oracle: Oracle,
    number: RunNumber,
    random: Random,
    block_bytes: usize,
    sent_bytes: u64,
}

/// Makes one backup. An error is a backup that ended without a snapshot, with the reason that its user would be told.
pub async fn back_up(process: AgentProcess, job: &Job, oracle: &Oracle, mut random: Random) -> Result<(), String> {
    let control = process.control(&mut random);
    let counters: Arc<DispatchCounters> = Arc::default();
    let fate: Arc<Mutex<Option<String>>> = Arc::default();
    let bad_news = Fate(Arc::clone(&fate)).start();
    let budget = ByteBudget::new(64 << 20);
    let dispatcher =
        Dispatcher::new(process.pool(&mut random), budget, Arc::clone(&counters), bad_news.clone().recipient()).start();
    let number = oracle.begins(Arc::clone(&counters));
    let run = Run {
        control,
        dispatcher,
        counters,
        fate,
        oracle: oracle.clone(),
        number,
        random,
        block_bytes: job.block_bytes,
        sent_bytes: 0,
    };
    run.finish(job, bad_news).await
}

impl Run {
    async fn finish(mut self, job: &Job, bad_news: Addr<Fate>) -> Result<(), String> {
        let result = self.work(job, bad_news).await;
        if result.is_ok() {
            self.or_fate(self.dispatcher.send(FinishDispatch)).await?.map_err(|error| error.to_string())?;
            self.oracle.finished(self.number);
        } else {
            self.control.do_send(ForgetSession);
            // Closing what is left is bounded by the streams' own limits.
            let _ = self.dispatcher.send(AbandonDispatch).await;
        }
        let _ = self.control.send(CloseChannel).await;
        result
    }

    async fn work(&mut self, job: &Job, bad_news: Addr<Fate>) -> Result<(), String> {
        let dispatching = Dispatching {
            session: self.dispatcher.clone().recipient(),
            durable: self.dispatcher.clone().recipient(),
            again: self.dispatcher.clone().recipient(),
            failed: bad_news.recipient(),
        };
        let begin = BeginSession { opener: opener(SessionKind::Backup), dispatcher: Some(dispatching) };
        self.control.send(begin).await.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
        let mut pause = job.pause;
        for ids in job.ids.chunks(QUERY_IDS) {
            let known = self.known(ids).await?;
            let unknown: Vec<ChunkId> = ids.iter().zip(known).filter(|(_, known)| !known).map(|(id, _)| *id).collect();
            self.send(&unknown).await?;
            self.or_fate(tokio::time::sleep(std::mem::take(&mut pause))).await?;
        }
        loop {
            let blocks = self.dispatcher.send(CountBlocks).await.map_err(|error| error.to_string())?;
            let commit = Message::Commit(Commit { manifest: job.manifest.to_vec().into(), blocks });
            match self.ask(commit).await? {
                Ok(Message::Committed(committed)) => {
                    if committed.snapshot != snapshot_of(&job.manifest) {
                        self.oracle.broke(&format!("{} was committed instead", committed.snapshot));
                    }
                    self.oracle.committed(committed.snapshot, &job.ids);
                    // It is the acknowledgement of every block; no stream can hear others any more.
                    let everything = Ack { watermark: blocks, ranges: Vec::new() };
                    let _ = self.dispatcher.send(LearnDurable(everything)).await;
                    return Ok(());
                }
                Ok(Message::MissingChunks(missing)) => {
                    let count = missing.ids.len() / 32;
                    self.oracle.broke(&format!("{count} chunks are missing that were acknowledged or known"));
                    return Err("chunks are missing".into());
                }
                Ok(other) => return Err(format!("Commit was answered with {}", other.name())),
                Err(AskError::Replaced) => {}
                Err(error) => return Err(error.to_string()),
            }
        }
    }

    async fn known(&self, ids: &[ChunkId]) -> Result<Vec<bool>, String> {
        let query = Message::QueryChunks(QueryChunks { ids: join_ids(ids) });
        match self.ask(query).await? {
            Ok(Message::ChunksKnown(known)) => {
                unpack_bitmap(&known.bitmap, ids.len()).ok_or_else(|| "a bitmap of another length".to_owned())
            }
            Ok(other) => Err(format!("QueryChunks was answered with {}", other.name())),
            Err(error) => Err(error.to_string()),
        }
    }

    async fn ask(&self, message: Message) -> Result<Result<Message, AskError>, String> {
        self.or_fate(self.control.send(AskServer(message))).await?.map_err(|error| error.to_string())
    }

    /// Sends chunks as blocks, within the window.
    async fn send(&mut self, mut ids: &[ChunkId]) -> Result<(), String> {
        while !ids.is_empty() {
            let (now, rest) = ids.split_at((1 + self.random.index(8)).min(ids.len()));
            let block = block_of(now, 40 + self.random.index(self.block_bytes));
            self.sent_bytes += block.len() as u64;
            self.oracle.sends(self.number, now);
            self.dispatcher.do_send(DispatchBlock(block));
            let mut waited = Duration::ZERO;
            while self.sent_bytes - self.counters.bytes_durable.load(Ordering::Relaxed) > WINDOW_BYTES {
                let pause = (waited / 20).clamp(LOOK, LOOK_MAX);
                self.or_fate(tokio::time::sleep(pause)).await?;
                waited += pause;
            }
            ids = rest;
        }
        Ok(())
    }

    /// Waits for something, but not longer than the dispatcher has hope.
    async fn or_fate<T>(&self, wanted: impl Future<Output = T>) -> Result<T, String> {
        tokio::pin!(wanted);
        loop {
            if let Some(reason) = self.fate.lock().clone() {
                return Err(reason);
            }
            if let Ok(came) = tokio::time::timeout(Duration::from_secs(1), &mut wanted).await {
                return Ok(came);
            }
        }
    }
}
