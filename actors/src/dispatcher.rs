//! `Dispatcher`: the agent's sealed blocks from the pipeline to the streams.
//!
//! Owns the send window and the stream pool. Closing its queue closes nothing else: streams go on until every block is
//! acknowledged durable, and only then are they asked to drain, each closing its own socket (s02, s16). It ends when the
//! queue is closed, the window is empty and every stream has closed. It must not touch a socket.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use actix::{Actor, AsyncContext, Context, Handler, Recipient, ResponseFuture, SpawnHandle};
use bytes::Bytes;
use futures_util::FutureExt;
use strandline_messages::StreamIndex;
use strandline_messages::limits;
use strandline_messages::mail::{DispatchBlock, SendBlock, StreamEvent, StreamFact};
use strandline_messages::wire::{Ack, BlockFrame, SequenceRange};
use tokio::sync::oneshot;
use tracing::{debug, warn};

use crate::machines::send_window::SendWindow;
use crate::planted::{self, Bug};
use crate::runtime::budget::ByteBudget;
use crate::runtime::clock;
use crate::stream_pool::{PoolSettings, Reaction, SessionGrant, StreamPool};

/// The session that blocks belong to from now on. Blocks not acknowledged by an earlier one are sent again.
#[derive(actix::Message, Clone, Debug)]
#[rtype(result = "()")]
pub struct UseSession(pub SessionGrant);

/// What the control channel learned when it re-attached.
#[derive(actix::Message, Clone, Debug)]
#[rtype(result = "()")]
pub struct LearnDurable(pub Ack);

/// The server misses these.
#[derive(actix::Message, Clone, Debug)]
#[rtype(result = "()")]
pub struct SendAgain(pub Vec<SequenceRange>);

/// How many blocks does the session have? What `Commit` declares.
#[derive(actix::Message, Clone, Copy, Debug)]
#[rtype(result = "u64")]
pub struct CountBlocks;

/// No more blocks follow. Answered when every block is durable and every socket closed.
#[derive(actix::Message, Clone, Copy, Debug)]
#[rtype(result = "()")]
pub struct FinishDispatch;

/// The session is over: forget every block, close every socket. Answered when they are closed.
#[derive(actix::Message, Clone, Copy, Debug)]
#[rtype(result = "()")]
pub struct AbandonDispatch;

/// To the job: the blocks cannot be delivered any more.
#[derive(actix::Message, Clone, Debug)]
#[rtype(result = "()")]
pub struct DispatchFailed(pub String);

/// What others may look at without asking.
#[derive(Debug, Default)]
pub struct DispatchCounters {
    /// Bytes of blocks acknowledged durable.
    pub bytes_durable: AtomicU64,
    /// Blocks acknowledged durable.
    pub blocks_durable: AtomicU64,
    /// Streams live now.
    pub streams: AtomicU64,
    /// Connections made after the first of each stream.
    pub reconnects: AtomicU64,
}

/// See the module.
pub struct Dispatcher {
    window: SendWindow<Bytes>,
    pool: StreamPool,
    budget: ByteBudget,
    counters: Arc<DispatchCounters>,
    job: Recipient<DispatchFailed>,
    started: bool,
    /// When it looks again whether a stream is to be connected.
    retry: Option<(Instant, SpawnHandle)>,
    waiting: Vec<oneshot::Sender<()>>,
    abandoned: bool,
}

impl Dispatcher {
    /// No session yet. `budget` is what the pipeline reserves from; acknowledged blocks give back to it.
    pub fn new(
        settings: PoolSettings,
        budget: ByteBudget,
        counters: Arc<DispatchCounters>,
        job: Recipient<DispatchFailed>,
    ) -> Self {
        Self {
            window: SendWindow::new(limits::SEQUENCE_WINDOW),
            pool: StreamPool::new(settings),
            budget,
            counters,
            job,
            started: false,
            retry: None,
            waiting: Vec::new(),
            abandoned: false,
        }
    }

    fn has_work(&self) -> bool {
        self.started && !self.abandoned && self.window.blocks() > 0
    }

    /// Connects what is due and deals out what waits.
    fn pump(&mut self, ctx: &mut Context<Self>) {
        if self.has_work() {
            self.pool.wake(&ctx.address().recipient(), clock::now());
            self.deal();
        }
        self.finish_when_drained();
        self.await_retry(ctx);
        self.count();
    }

    /// Comes back when the next stream may be connected, if there is work for it.
    fn await_retry(&mut self, ctx: &mut Context<Self>) {
        let now = clock::now();
        let next = if self.has_work() { self.pool.next_retry().filter(|at| *at > now) } else { None };
        if next == self.retry.map(|(at, _)| at) {
            return;
        }
        if let Some((_, timer)) = self.retry.take() {
            ctx.cancel_future(timer);
        }
        self.retry = next.map(|at| {
            let pump = |dispatcher: &mut Self, ctx: &mut Context<Self>| {
                dispatcher.retry = None;
                dispatcher.pump(ctx);
            };
            (at, ctx.run_later(at.saturating_duration_since(now), pump))
        });
    }

    fn count(&self) {
        self.counters.streams.store(self.pool.live().count() as u64, Ordering::Relaxed);
        self.counters.reconnects.store(self.pool.reconnects(), Ordering::Relaxed);
    }

    /// Gives each block to the stream that carries the fewest, of those that have room. A socket takes more than its
    /// connection has carried: streams that are asked in turn would hold the whole window between a few of them.
    fn deal(&mut self) {
        while self.window.has_next()
            && let Some(index) = self.least_laden()
            && let Some((sequence, block)) = self.window.next_for(index)
        {
            self.pool.send(index, SendBlock(BlockFrame { sequence, block }));
        }
    }

    fn least_laden(&self) -> Option<StreamIndex> {
        let with_room = self.pool.live().filter(|index| self.pool.has_room(*index));
        with_room.min_by_key(|index| self.window.in_flight(*index))
    }

    fn acknowledge(&mut self, ack: &Ack) {
        let ranges: Vec<_> = ack.ranges.iter().map(|range| range.start..range.end).collect();
        let done = self.window.acknowledge(ack.watermark, &ranges);
        if done.blocks.is_empty() {
            return;
        }
        self.budget.release(usize::try_from(done.bytes).unwrap_or(usize::MAX));
        self.counters.bytes_durable.fetch_add(done.bytes, Ordering::Relaxed);
        self.counters.blocks_durable.fetch_add(done.blocks.len() as u64, Ordering::Relaxed);
    }

    fn finish_when_drained(&mut self) {
        if self.waiting.is_empty() || !(self.abandoned || self.window.is_drained()) {
            return;
        }
        self.pool.drain();
        if self.pool.is_closed() {
            for waiting in self.waiting.drain(..) {
                // Whoever waited may have been interrupted.
                let _ = waiting.send(());
            }
        }
    }

    fn wait(&mut self, ctx: &mut Context<Self>) -> ResponseFuture<()> {
        let (sender, receiver) = oneshot::channel();
        self.waiting.push(sender);
        self.pump(ctx);
        async move { receiver.await.unwrap_or(()) }.boxed_local()
    }

    fn react(&mut self, reaction: Reaction, ctx: &mut Context<Self>) {
        match reaction {
            Reaction::Nothing => {}
            Reaction::Ready(_) => {
                self.deal();
                self.count();
            }
            Reaction::Lost(index, reason) => {
                let orphans = self.window.stream_lost(index);
                debug!(stream = index.0, orphans, reason, "stream lost; its blocks go to the others");
                self.pump(ctx);
            }
            Reaction::GaveUp(reason) => {
                warn!(reason, "a stream gave up");
                self.job.do_send(DispatchFailed(reason));
            }
            Reaction::Closed => self.pump(ctx),
        }
    }
}

impl Actor for Dispatcher {
    type Context = Context<Self>;
}

impl Handler<UseSession> for Dispatcher {
    type Result = ();

    fn handle(&mut self, UseSession(grant): UseSession, ctx: &mut Context<Self>) {
        if std::mem::replace(&mut self.started, true) {
            self.window.restart();
        }
        self.pool.adopt(grant);
        self.pump(ctx);
    }
}

impl Handler<DispatchBlock> for Dispatcher {
    type Result = ();

    fn handle(&mut self, DispatchBlock(block): DispatchBlock, ctx: &mut Context<Self>) {
        let bytes = block.len() as u64;
        if self.abandoned || self.window.push(block, bytes).is_err() {
            return self.budget.release(usize::try_from(bytes).unwrap_or(usize::MAX));
        }
        self.pump(ctx);
    }
}

impl Handler<StreamEvent> for Dispatcher {
    type Result = ();

    fn handle(&mut self, event: StreamEvent, ctx: &mut Context<Self>) {
        let reaction = self.pool.handle(&event, clock::now());
        if let StreamFact::Acknowledged(ack) = &event.fact
            && self.pool.is_current(&event)
        {
            self.acknowledge(ack);
            self.pump(ctx);
        }
        self.react(reaction, ctx);
    }
}

impl Handler<LearnDurable> for Dispatcher {
    type Result = ();

    fn handle(&mut self, LearnDurable(ack): LearnDurable, ctx: &mut Context<Self>) {
        self.acknowledge(&ack);
        self.pump(ctx);
    }
}

impl Handler<SendAgain> for Dispatcher {
    type Result = ();

    fn handle(&mut self, SendAgain(ranges): SendAgain, ctx: &mut Context<Self>) {
        let ranges: Vec<_> = ranges.iter().map(|range| range.start..range.end).collect();
        self.window.retransmit(&ranges);
        self.pump(ctx);
    }
}

impl Handler<CountBlocks> for Dispatcher {
    type Result = u64;

    fn handle(&mut self, _: CountBlocks, _: &mut Context<Self>) -> u64 {
        let last = self.window.last_sequence().map(|last| last.0);
        last.map_or(0, |last| if planted::here(Bug::DeclaresOneBlockLess) { last } else { last + 1 })
    }
}

impl Handler<FinishDispatch> for Dispatcher {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _: FinishDispatch, ctx: &mut Context<Self>) -> Self::Result {
        self.window.close();
        self.wait(ctx)
    }
}

impl Handler<AbandonDispatch> for Dispatcher {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _: AbandonDispatch, ctx: &mut Context<Self>) -> Self::Result {
        self.abandoned = true;
        self.budget.close();
        self.wait(ctx)
    }
}
