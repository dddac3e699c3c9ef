//! `Fetcher`: the agent's side of a restore session.
//!
//! Owns the session's streams and the requests that are not answered in full. Blocks go to whoever asked as they come;
//! what was on a stream when it died is asked for again. Credit bounds what is under way: it is given back when a block
//! has been used, so a slow disk slows the server down. It ends when its owner finishes it.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use actix::{Actor, ActorFutureExt, Addr, AsyncContext, Context, Handler, ResponseFuture, WrapFuture};
use bytes::Bytes;
use futures_util::FutureExt;
use strandline_messages::limits;
use strandline_messages::mail::{StreamEvent, StreamFact};
use strandline_messages::wire::{
    BlockFrame, Credit, FetchChunks, FetchDone, Message, RefusalCode, Refused, join_ids, split_ids,
};
use strandline_messages::{ChunkId, SnapshotId};
use tokio::sync::oneshot;
use tracing::{debug, warn};

use crate::control_channel::{AskError, AskServer, ControlChannel, TellServer};
use crate::dispatcher::{DispatchFailed, FinishDispatch, LearnDurable, SendAgain, UseSession};
use crate::planted::{self, Bug};
use crate::runtime::clock;
use crate::stream_pool::{PoolSettings, Reaction, StreamPool};

const TICK: Duration = Duration::from_millis(100);
/// After a lost stream: how long nothing may arrive before what is missing is asked for again.
const QUIET: Duration = Duration::from_secs(2);

/// How often one lost stream may cost a maximal block of credit: more than a socket's buffers hold.
const REGRANTS_PER_LOSS: u64 = 4;

/// Takes a request's blocks as they come. Must not block: credit bounds how many can wait.
pub type BlockTaker = Box<dyn FnMut(Bytes) + Send>;

/// Fetch blocks that hold these chunks. Answered when all of them have been handed over.
#[derive(actix::Message)]
#[rtype(result = "Result<Fetched, AskError>")]
pub struct FetchBlocks {
    /// The snapshot that needs them; `None`: whatever the session's own writer domain has.
    pub snapshot: Option<SnapshotId>,
    /// Wanted ids in the order in which they are needed, at most `limits::FETCH_IDS_MAX`.
    pub ids: Vec<ChunkId>,
    /// Takes the blocks; the same block may come twice after a lost connection.
    pub taker: BlockTaker,
}

/// What could not be fetched.
#[derive(Clone, Debug, Default)]
pub struct Fetched {
    /// Ids of which the server has no copy.
    pub unknown: Vec<ChunkId>,
    /// Blocks that the server could not read, for people; empty if none.
    pub damage: String,
}

/// A block of this length has been used: the server may send as much again.
#[derive(actix::Message, Clone, Copy)]
#[rtype(result = "()")]
pub struct BlockUsed(pub u64);

struct Request {
    snapshot: Option<SnapshotId>,
    ids: Vec<ChunkId>,
    taker: BlockTaker,
    reply: oneshot::Sender<Result<Fetched, AskError>>,
    arrived: u32,
    cost: u64,
    done: Option<FetchDone>,
    heard: Instant,
}

/// See the module.
pub struct Fetcher {
    pool: StreamPool,
    control: Addr<ControlChannel>,
    requests: BTreeMap<u32, Request>,
    next_request: u32,
    /// Credit granted to this session in all, and how much of that the server was told of: in pieces worth a message.
    granted: u64,
    told: u64,
    /// What blocks that came and are not used yet have cost; and how much of it an older session granted.
    in_use: u64,
    of_older_session: u64,
    started: bool,
    /// Streams lost so far: a request that is not answered in full is asked again only after a loss.
    losses: u64,
    /// How often credit that was lost with streams has been granted anew.
    regrants: u64,
    finishing: Vec<oneshot::Sender<()>>,
}

impl Fetcher {
    /// No session yet.
    pub fn new(settings: PoolSettings, control: Addr<ControlChannel>) -> Self {
        Self {
            pool: StreamPool::new(settings),
            control,
            requests: BTreeMap::new(),
            next_request: 0,
            granted: 0,
            told: 0,
            in_use: 0,
            of_older_session: 0,
            started: false,
            losses: 0,
            regrants: 0,
            finishing: Vec::new(),
        }
    }

    fn ask(&mut self, number: u32, snapshot: Option<SnapshotId>, ids: &[ChunkId], ctx: &mut Context<Self>) {
        self.wake(ctx);
        let snapshot = snapshot.unwrap_or(SnapshotId([0; 32]));
        let fetch = Message::FetchChunks(FetchChunks { request: number, snapshot, ids: join_ids(ids) });
        let asking = self.control.send(AskServer(fetch));
        ctx.spawn(asking.into_actor(self).map(move |answer, fetcher, _| match answer {
            Ok(Ok(Message::FetchDone(done))) => fetcher.done(number, done),
            Ok(Ok(other)) => {
                let text = format!("the server answered FetchChunks with {}", other.name());
                fetcher.failed(number, AskError::Refused(Refused::new(RefusalCode::Internal, text)));
            }
            Ok(Err(error)) => fetcher.failed(number, error),
            Err(_) => fetcher.failed(number, AskError::Closed),
        }));
    }

    fn wake(&mut self, ctx: &mut Context<Self>) {
        if self.started && !self.requests.is_empty() {
            self.pool.wake(&ctx.address().recipient(), clock::now());
        }
    }

    fn done(&mut self, number: u32, done: FetchDone) {
        if let Some(request) = self.requests.get_mut(&number) {
            request.done = Some(done);
            request.heard = clock::now();
            self.finish_if_complete(number);
        }
    }

    fn failed(&mut self, number: u32, error: AskError) {
        if let Some(request) = self.requests.remove(&number) {
            // Whoever asked may have stopped waiting.
            let _ = request.reply.send(Err(error));
        }
    }

    fn fail_all(&mut self, reason: &str) {
        let refusal = Refused::new(RefusalCode::Internal, reason);
        let numbers: Vec<_> = self.requests.keys().copied().collect();
        for number in numbers {
            self.failed(number, AskError::Refused(refusal.clone()));
        }
    }

    fn arrived(&mut self, frame: BlockFrame) {
        let number = u32::try_from(frame.sequence.0 >> 32).unwrap_or(u32::MAX);
        let cost = Credit::cost(frame.block.len() as u64);
        let Some(request) = self.requests.get_mut(&number) else {
            // It was asked for again in the meantime; its credit has been given back then.
            return;
        };
        request.arrived += 1;
        request.cost += cost;
        self.in_use += cost;
        request.heard = clock::now();
        (request.taker)(frame.block);
        self.finish_if_complete(number);
    }

    fn finish_if_complete(&mut self, number: u32) {
        let complete = self
            .requests
            .get(&number)
            .is_some_and(|request| request.done.as_ref().is_some_and(|done| request.arrived >= done.blocks));
        if complete && let Some(Request { done: Some(done), reply, .. }) = self.requests.remove(&number) {
            let unknown = split_ids(&done.unknown, limits::FETCH_IDS_MAX).unwrap_or_default();
            let _ = reply.send(Ok(Fetched { unknown, damage: done.damage }));
        }
    }

    /// Blocks that were lost with a stream took their credit with them; without credit the server cannot finish what was
    /// asked. After a loss, each quiet spell grants one maximal block anew, a few times per lost stream.
    fn grant_lost_credit(&mut self) {
        let now = clock::now();
        let starved =
            |request: &Request| request.done.is_none() && now.saturating_duration_since(request.heard) >= QUIET;
        if self.regrants < REGRANTS_PER_LOSS * self.losses
            && self.requests.values().any(starved)
            && !planted::here(Bug::LosesCreditWithStreams)
        {
            self.regrants += 1;
            self.granted = self.granted.saturating_add(limits::BLOCK_BYTES_MAX as u64);
            for request in self.requests.values_mut() {
                request.heard = now;
            }
        }
    }

    /// Asks again for what was on streams that died.
    fn ask_again(&mut self, ctx: &mut Context<Self>) {
        let now = clock::now();
        if self.losses == 0 || planted::here(Bug::NeverFetchesAgain) {
            return;
        }
        self.grant_lost_credit();
        let stuck = |request: &Request| request.done.is_some() && now.saturating_duration_since(request.heard) >= QUIET;
        let numbers: Vec<_> =
            self.requests.iter().filter(|(_, request)| stuck(request)).map(|(number, _)| *number).collect();
        for number in numbers {
            let Some(mut request) = self.requests.remove(&number) else { continue };
            let lost = request.done.take().map_or(0, |done| done.cost.saturating_sub(request.cost));
            warn!(bytes = lost, "blocks were lost with a stream; fetching them again");
            if !planted::here(Bug::LosesCreditWithStreams) {
                // The server said how much: its numbers may be anything.
                self.granted = self.granted.saturating_add(lost);
            }
            self.next_request = self.next_request.wrapping_add(1);
            let again = self.next_request;
            let (snapshot, ids) = (request.snapshot, request.ids.clone());
            self.requests.insert(again, Request { arrived: 0, cost: 0, done: None, heard: now, ..request });
            self.pay(1);
            self.ask(again, snapshot, &ids, ctx);
        }
    }

    fn pay(&mut self, least: u64) {
        if self.granted - self.told >= least {
            self.tell();
        }
    }

    fn tell(&mut self) {
        self.told = self.granted;
        self.control.do_send(TellServer(Message::Credit(Credit { granted: self.granted })));
    }

    fn finish_when_closed(&mut self) {
        if !self.finishing.is_empty() && self.pool.is_closed() {
            for waiting in self.finishing.drain(..) {
                let _ = waiting.send(());
            }
        }
    }
}

impl Actor for Fetcher {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        ctx.run_interval(TICK, |fetcher, ctx| {
            fetcher.wake(ctx);
            fetcher.ask_again(ctx);
            fetcher.pay(1);
        });
    }
}

impl Handler<UseSession> for Fetcher {
    type Result = ();

    fn handle(&mut self, UseSession(grant): UseSession, ctx: &mut Context<Self>) {
        // Another session begins with fresh credit; what the old one had under way is asked for again.
        if std::mem::replace(&mut self.started, true) {
            self.losses += 1;
            (self.granted, self.told) = (0, 0);
            self.of_older_session = self.in_use;
            for request in self.requests.values_mut() {
                // One that the old session has answered is asked again when nothing comes; nothing of the new credit is lost.
                request.arrived = 0;
                request.cost = request.done.as_ref().map_or(0, |done| done.cost);
            }
        }
        self.pool.adopt(grant);
        self.wake(ctx);
    }
}

/// A restore session has nothing durable to learn. But the server is there again, and may not have heard of the last credit.
impl Handler<LearnDurable> for Fetcher {
    type Result = ();

    fn handle(&mut self, _: LearnDurable, _: &mut Context<Self>) {
        if !planted::here(Bug::LosesCreditWithConnections) {
            self.tell();
        }
    }
}

/// A restore session sends nothing.
impl Handler<SendAgain> for Fetcher {
    type Result = ();

    fn handle(&mut self, _: SendAgain, _: &mut Context<Self>) {}
}

impl Handler<DispatchFailed> for Fetcher {
    type Result = ();

    fn handle(&mut self, DispatchFailed(reason): DispatchFailed, _: &mut Context<Self>) {
        self.fail_all(&reason);
    }
}

impl Handler<FetchBlocks> for Fetcher {
    type Result = ResponseFuture<Result<Fetched, AskError>>;

    fn handle(&mut self, FetchBlocks { snapshot, ids, taker }: FetchBlocks, ctx: &mut Context<Self>) -> Self::Result {
        self.next_request = self.next_request.wrapping_add(1);
        let number = self.next_request;
        let (reply, answer) = oneshot::channel();
        let (ids_kept, heard) = (ids.clone(), clock::now());
        let request = Request { snapshot, ids: ids_kept, taker, reply, arrived: 0, cost: 0, done: None, heard };
        self.requests.insert(number, request);
        self.ask(number, snapshot, &ids, ctx);
        async move { answer.await.unwrap_or(Err(AskError::Closed)) }.boxed_local()
    }
}

impl Handler<BlockUsed> for Fetcher {
    type Result = ();

    fn handle(&mut self, BlockUsed(bytes): BlockUsed, _: &mut Context<Self>) {
        let cost = Credit::cost(bytes);
        self.in_use = self.in_use.saturating_sub(cost);
        let granted_before = self.of_older_session.min(cost);
        self.of_older_session -= granted_before;
        self.granted = self.granted.saturating_add(cost - granted_before);
        self.pay(1 << 20);
    }
}

impl Handler<StreamEvent> for Fetcher {
    type Result = ();

    fn handle(&mut self, event: StreamEvent, ctx: &mut Context<Self>) {
        // What an older session sent is sent again by the next: it counts the blocks of a request from the first.
        let is_current = self.pool.is_current(&event);
        match self.pool.handle(&event, clock::now()) {
            Reaction::Lost(index, reason) => {
                debug!(stream = index.0, reason, "stream lost");
                self.losses += 1;
                self.wake(ctx);
            }
            Reaction::GaveUp(reason) => self.fail_all(&reason),
            Reaction::Closed => self.finish_when_closed(),
            Reaction::Nothing | Reaction::Ready(_) => {}
        }
        if let StreamFact::Arrived(block) = event.fact
            && is_current
        {
            self.arrived(block);
        }
    }
}

impl Handler<FinishDispatch> for Fetcher {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _: FinishDispatch, _: &mut Context<Self>) -> Self::Result {
        let (sender, receiver) = oneshot::channel();
        self.finishing.push(sender);
        // Whoever still waits for blocks has been given up by the owner; what it holds is let go of.
        self.fail_all("the session is being closed");
        self.pool.drain();
        self.finish_when_closed();
        async move { receiver.await.unwrap_or(()) }.boxed_local()
    }
}
