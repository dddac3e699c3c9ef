//! `Fetcher`: the agent's side of a restore session.
//!
//! Owns the session's streams and the requests that are not answered in full. Blocks go to whoever asked as they come. The
//! server says what it handed to which connection: a block that has not come, and whose connection is over, is lost. What is
//! missing of its request then is asked for again, and its credit is not used. Credit bounds what is under way: it is given
//! back when a block has been used, so a slow disk slows the server down. It ends when its owner finishes it.

use std::collections::BTreeMap;
use std::time::Duration;

use actix::{Actor, ActorFutureExt, Addr, AsyncContext, Context, Handler, ResponseFuture, WrapFuture};
use bytes::Bytes;
use futures_util::FutureExt;
use strandline_messages::limits;
use strandline_messages::mail::{StreamEvent, StreamFact};
use strandline_messages::wire::{
    BlockFrame, Carried, Credit, FetchChunks, FetchDone, Message, Receipt, RefusalCode, Refused, join_ids, split_ids,
};
use strandline_messages::{ChunkId, Incarnation, SnapshotId, StreamIndex};
use tokio::sync::oneshot;
use tracing::{debug, warn};

use crate::control_channel::{AskError, AskServer, ControlChannel, TellServer};
use crate::dispatcher::{DispatchFailed, FinishDispatch, LearnDurable, SendAgain, UseSession};
use crate::machines::stream_ledger::NewestBlocks;
use crate::planted::{self, Bug};
use crate::runtime::clock;
use crate::stream_pool::{PoolSettings, Reaction, StreamPool};

const TICK: Duration = Duration::from_millis(100);

/// Takes a request's blocks as they come.
pub trait BlockTaker: Send {
    /// A block has come; the same one may come twice after a lost connection. Must not wait: credit bounds how many come.
    fn take(&mut self, block: Bytes);
    /// The wanted chunks that no block has held so far, in the order in which they are needed, at most
    /// `limits::FETCH_IDS_MAX`.
    fn missing(&self) -> Vec<ChunkId>;
}

/// Fetch blocks that hold what the taker misses. Answered when all of them have been handed over.
#[derive(actix::Message)]
#[rtype(result = "Result<Fetched, AskError>")]
pub struct FetchBlocks {
    /// The snapshot that needs them; `None`: whatever the session's own writer domain has.
    pub snapshot: Option<SnapshotId>,
    /// Takes the blocks.
    pub taker: Box<dyn BlockTaker>,
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
    taker: Box<dyn BlockTaker>,
    reply: oneshot::Sender<Result<Fetched, AskError>>,
    arrived: u32,
    came: NewestBlocks,
    done: Option<FetchDone>,
}

impl Request {
    /// Whether nothing more of it can come: all that was handed to connections that are not over has come.
    fn is_over(&self, done: &FetchDone, pool: &StreamPool) -> bool {
        let over = |carried: &Carried| carried.incarnation < pool.over_before(carried.stream);
        done.carried.iter().all(|carried| self.came.has(carried) || over(carried))
    }
}

/// What came over one stream, bytes of credit.
#[derive(Default)]
struct Lane {
    incarnation: Incarnation,
    /// Over its newest connection that anything came over.
    newest: u64,
    /// Over those before.
    earlier: u64,
}

impl Lane {
    fn arrived(&mut self, incarnation: Incarnation, cost: u64) {
        if self.incarnation != incarnation {
            self.earlier += std::mem::take(&mut self.newest);
            self.incarnation = incarnation;
        }
        self.newest += cost;
    }

    /// What came over connections before this one.
    fn received_before(&self, incarnation: Incarnation) -> u64 {
        if self.incarnation < incarnation { self.earlier + self.newest } else { self.earlier }
    }
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
    /// Whether it looks again soon.
    ticking: bool,
    lanes: BTreeMap<StreamIndex, Lane>,
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
            ticking: false,
            lanes: BTreeMap::new(),
            finishing: Vec::new(),
        }
    }

    /// Asks for what a request misses, under a number of its own.
    fn ask(&mut self, request: Request, ctx: &mut Context<Self>) {
        self.next_request = self.next_request.wrapping_add(1);
        let number = self.next_request;
        let snapshot = request.snapshot.unwrap_or(SnapshotId([0; 32]));
        let ids = join_ids(&request.taker.missing());
        self.requests.insert(number, request);
        self.wake(ctx);
        let fetch = Message::FetchChunks(FetchChunks { request: number, snapshot, ids });
        let asking = self.control.send(AskServer(fetch));
        ctx.spawn(asking.into_actor(self).map(move |answer, fetcher, ctx| match answer {
            Ok(Ok(Message::FetchDone(done))) => fetcher.done(number, done, ctx),
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

    fn done(&mut self, number: u32, done: FetchDone, ctx: &mut Context<Self>) {
        if let Some(request) = self.requests.get_mut(&number) {
            request.done = Some(done);
            self.settle(number, ctx);
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

    fn arrived(&mut self, stream: StreamIndex, incarnation: Incarnation, frame: BlockFrame, ctx: &mut Context<Self>) {
        let number = u32::try_from(frame.sequence.0 >> 32).unwrap_or(u32::MAX);
        let cost = Credit::cost(frame.block.len() as u64);
        self.lanes.entry(stream).or_default().arrived(incarnation, cost);
        self.in_use += cost;
        let Some(request) = self.requests.get_mut(&number) else {
            // Whoever wanted it has given up.
            return self.used(cost, ctx);
        };
        request.arrived += 1;
        request.came.count(stream, incarnation);
        request.taker.take(frame.block);
        self.settle(number, ctx);
    }

    /// Answers a request of which everything has come; asks again for what is missing if the rest cannot come any more.
    fn settle(&mut self, number: u32, ctx: &mut Context<Self>) {
        let Some(request) = self.requests.get(&number) else { return };
        let Some(done) = &request.done else { return };
        let complete = request.arrived >= done.blocks;
        if !complete && (planted::here(Bug::NeverFetchesAgain) || !request.is_over(done, &self.pool)) {
            return;
        }
        let Some(mut request) = self.requests.remove(&number) else { return };
        let Some(done) = request.done.take() else { return };
        if complete || request.taker.missing().is_empty() {
            let unknown = split_ids(&done.unknown, limits::FETCH_IDS_MAX).unwrap_or_default();
            // Whoever asked may have stopped waiting.
            let _ = request.reply.send(Ok(Fetched { unknown, damage: done.damage }));
            return;
        }
        warn!(blocks = done.blocks - request.arrived, "blocks were lost with a connection; fetching them again");
        self.ask(Request { arrived: 0, came: NewestBlocks::default(), ..request }, ctx);
    }

    /// A connection is over: what it carried of a request and did not bring is lost, and so is the credit that it cost.
    fn connection_over(&mut self, ctx: &mut Context<Self>) {
        if !self.requests.is_empty() {
            self.tell();
        }
        let numbers: Vec<_> = self.requests.keys().copied().collect();
        for number in numbers {
            self.settle(number, ctx);
        }
    }

    fn used(&mut self, cost: u64, ctx: &mut Context<Self>) {
        self.in_use = self.in_use.saturating_sub(cost);
        let granted_before = self.of_older_session.min(cost);
        self.of_older_session -= granted_before;
        self.granted = self.granted.saturating_add(cost - granted_before);
        self.pay(1 << 20);
        self.keep_ticking(ctx);
    }

    fn pay(&mut self, least: u64) {
        if self.granted - self.told >= least {
            self.tell();
        }
    }

    fn tell(&mut self) {
        self.told = self.granted;
        let receipt = |stream: StreamIndex| {
            let over_before = self.pool.over_before(stream);
            let received = self.lanes.get(&stream).map_or(0, |lane| lane.received_before(over_before));
            Receipt { stream, over_before, received }
        };
        let receipts = self.pool.indexes().map(receipt).collect();
        self.control.do_send(TellServer(Message::Credit(Credit { granted: self.granted, receipts })));
    }

    /// Looks after what is not answered and what is not told, again and again while there is any.
    fn keep_ticking(&mut self, ctx: &mut Context<Self>) {
        let has_work = !self.requests.is_empty() || self.granted > self.told;
        if has_work && !std::mem::replace(&mut self.ticking, true) {
            ctx.run_later(TICK, |fetcher, ctx| {
                fetcher.ticking = false;
                fetcher.wake(ctx);
                fetcher.pay(1);
                fetcher.keep_ticking(ctx);
            });
        }
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
}

impl Handler<UseSession> for Fetcher {
    type Result = ();

    fn handle(&mut self, UseSession(grant): UseSession, ctx: &mut Context<Self>) {
        let is_another = std::mem::replace(&mut self.started, true);
        self.pool.adopt(grant);
        if is_another {
            // It begins with fresh credit, and counts the blocks of a request from the first. What the old one has answered is
            // asked for again; what it has not, the control channel asks again by itself.
            (self.granted, self.told) = (0, 0);
            self.of_older_session = self.in_use;
            self.lanes.clear();
            for request in self.requests.values_mut() {
                (request.arrived, request.came) = (0, NewestBlocks::default());
            }
            self.connection_over(ctx);
        }
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

    fn handle(&mut self, FetchBlocks { snapshot, taker }: FetchBlocks, ctx: &mut Context<Self>) -> Self::Result {
        let (reply, answer) = oneshot::channel();
        let request = Request { snapshot, taker, reply, arrived: 0, came: NewestBlocks::default(), done: None };
        self.ask(request, ctx);
        self.keep_ticking(ctx);
        async move { answer.await.unwrap_or(Err(AskError::Closed)) }.boxed_local()
    }
}

impl Handler<BlockUsed> for Fetcher {
    type Result = ();

    fn handle(&mut self, BlockUsed(bytes): BlockUsed, ctx: &mut Context<Self>) {
        self.used(Credit::cost(bytes), ctx);
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
                self.connection_over(ctx);
                self.wake(ctx);
            }
            Reaction::GaveUp(reason) => self.fail_all(&reason),
            Reaction::Closed => {
                self.connection_over(ctx);
                self.finish_when_closed();
            }
            Reaction::Nothing | Reaction::Ready(_) => {}
        }
        if let StreamFact::Arrived(block) = event.fact
            && is_current
        {
            self.arrived(event.index, event.incarnation, block, ctx);
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
