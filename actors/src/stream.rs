//! `Stream`: one data connection of a session, on either side.
//!
//! Owns the socket (inside its [`Link`]); nobody else can close it, and it is closed on every path, because both halves
//! live in this actor and die with it. It ends when its machine says `Stop`: after drain → close_notify → FIN, or after a
//! fault. Its owner (dispatcher, fetcher or session) may ask it to drain, and nothing else. It must not decide which
//! block goes where, and it keeps no block: unacknowledged blocks belong to the session (G5).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use actix::{Actor, ActorContext, ActorFutureExt, Addr, AsyncContext, Context, Handler, Recipient, WrapFuture};
use actix_rt::ArbiterHandle;
use strandline_messages::mail::{
    BlockStored, DrainStream, Peer, SendAck, SendBlock, StoreFailed, StreamEvent, StreamFact,
};
use strandline_messages::wire::{BlockFrame, Join, Message, Ping, Pong, Purpose, Refused, Tag};
use strandline_messages::{Incarnation, Sequence, StreamIndex, limits};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tracing::{debug, warn};

use crate::machines::stream::{Input, Output, Role, StreamLimits, StreamMachine};
use crate::ports::{SessionStore, StoreFault};
use crate::runtime::clock;
use crate::runtime::link::{FrameArrived, Link, ReadEnded, Wrote};
use crate::runtime::transport::{Connection, Connector, UploadLimit, open};

/// How often the machine is told the time.
const TICK: Duration = Duration::from_secs(1);

/// Acceptor: asks the registry whether the stream may join. The registry answers only for registered sessions (G3).
#[derive(actix::Message)]
#[rtype(result = "Result<JoinGranted, Refused>")]
pub struct JoinSession {
    /// The client's certificate says.
    pub peer: Peer,
    /// The client's request.
    pub join: Join,
    /// The stream.
    pub stream: Addr<Stream>,
}

/// The session takes the stream.
pub struct JoinGranted {
    /// The session.
    pub owner: Recipient<StreamEvent>,
    /// Where blocks go; `None` in restore sessions, where the agent sends none.
    pub intake: Option<Intake>,
}

/// Where an acceptor's blocks go.
#[derive(Clone)]
pub struct Intake {
    /// Makes them durable.
    pub store: Arc<dyn SessionStore>,
    /// Is told when one is.
    pub tracker: Recipient<BlockStored>,
    /// Is told when storage cannot.
    pub session: Recipient<StoreFailed>,
    /// The tracker's watermark.
    pub watermark: Arc<AtomicU64>,
}

/// How a stream begins.
pub enum Origin {
    /// Agent: connect, greet, join.
    Connect {
        /// Makes the connection.
        connector: Arc<dyn Connector>,
        /// A data address from `SessionOpened`, else the server's own.
        address: Option<String>,
        /// The join to send.
        join: Join,
        /// Who owns the stream.
        owner: Recipient<StreamEvent>,
        /// Upload limit shared with other streams.
        limit: UploadLimit,
    },
    /// Server: a greeted connection whose client will join.
    Accepted {
        /// The connection.
        connection: Connection,
        /// The client's certificate says.
        peer: Peer,
        /// Knows the sessions.
        registry: Recipient<JoinSession>,
        /// Bounds the bytes of blocks in memory on this stream.
        budget: Arc<Semaphore>,
    },
}

/// See the module.
pub struct Stream {
    origin: Option<Origin>,
    role: Role,
    machine: StreamMachine,
    index: StreamIndex,
    incarnation: Incarnation,
    owner: Option<Recipient<StreamEvent>>,
    /// Acceptor: who is at the other end.
    peer: Option<Peer>,
    /// Acceptor, until it is asked.
    registry: Option<Recipient<JoinSession>>,
    intake: Option<Intake>,
    link: Option<Link>,
    /// Blocks received and not yet durable.
    storing: usize,
    /// The writer has nothing queued.
    written_out: bool,
    /// A block became durable and the acknowledgement that says so has not been given to the writer.
    unannounced: bool,
    refusal: Option<Refused>,
}

impl Stream {
    /// Starts on `arbiter`, or on the current one.
    pub fn start_on(arbiter: Option<&ArbiterHandle>, origin: Origin, stream_limits: StreamLimits) -> Addr<Self> {
        match arbiter {
            Some(arbiter) => Self::start_in_arbiter(arbiter, move |_| Self::new(origin, stream_limits)),
            None => Self::new(origin, stream_limits).start(),
        }
    }

    fn new(origin: Origin, stream_limits: StreamLimits) -> Self {
        let (role, index, incarnation) = match &origin {
            Origin::Connect { join, .. } => (Role::Initiator, join.index, join.incarnation),
            Origin::Accepted { .. } => (Role::Acceptor, StreamIndex(0), Incarnation(0)),
        };
        Self {
            origin: Some(origin),
            role,
            machine: StreamMachine::new(role, stream_limits, clock::now()),
            index,
            incarnation,
            owner: None,
            peer: None,
            registry: None,
            intake: None,
            link: None,
            storing: 0,
            written_out: true,
            unannounced: false,
            refusal: None,
        }
    }

    fn feed(&mut self, input: Input, ctx: &mut Context<Self>) {
        self.machine.handle(clock::now(), input);
        while let Some(output) = self.machine.poll_output() {
            self.carry_out(output, ctx);
        }
    }

    fn carry_out(&mut self, output: Output, ctx: &mut Context<Self>) {
        match output {
            // The join itself is queued when the connection is made: it needs the origin's request.
            Output::SendJoin => {}
            Output::SendJoined => {
                self.send(&Message::Joined, ctx);
                self.report(StreamFact::Joined);
            }
            Output::SendDrain => self.send(&Message::Drain, ctx),
            Output::SendDrained => self.send(&Message::Drained, ctx),
            Output::SendPing => self.send(&Message::Ping(Ping { stamp: 0 }), ctx),
            Output::Lost(reason) => {
                debug!(stream = self.index.0, reason, "stream lost");
                let refusal = self.refusal.take();
                self.report(StreamFact::Lost { reason, refusal });
            }
            Output::Close => self.close(ctx),
            Output::Stop { clean } => {
                self.report(StreamFact::Ended { clean });
                self.link = None;
                ctx.stop();
            }
        }
    }

    /// The peer does not keep to the protocol. A server's log names it.
    fn offended(&mut self, reason: String, ctx: &mut Context<Self>) {
        if let Some(peer) = &self.peer {
            let (tenant, agent) = (&peer.tenant, peer.agent.short());
            warn!(%tenant, %agent, stream = self.index.0, reason, "data connection refused");
        }
        self.feed(Input::Fault(reason), ctx);
    }

    fn close(&mut self, ctx: &mut Context<Self>) {
        if !matches!(self.link.as_ref().map(Link::close), Some(Ok(()))) {
            // Never connected, or the writer has ended: there is no half left that could be closed in order.
            ctx.notify(Wrote::Closed);
            ctx.notify(ReadEnded::InOrder);
        }
    }

    fn send(&mut self, message: &Message, ctx: &mut Context<Self>) {
        self.written_out = false;
        let sent = self.link.as_ref().map(|link| link.send(Tag::default(), message));
        if let Some(Err(error)) = sent {
            self.feed(Input::Fault(error.to_string()), ctx);
        }
    }

    // Events per stream are bounded: each block causes two, each acknowledgement and each change of state one.
    fn report(&self, fact: StreamFact) {
        if let Some(owner) = &self.owner {
            owner.do_send(StreamEvent { index: self.index, incarnation: self.incarnation, fact });
        }
    }

    fn connect(
        &mut self,
        connector: Arc<dyn Connector>,
        address: Option<String>,
        join: Join,
        limit: UploadLimit,
        ctx: &mut Context<Self>,
    ) {
        let connecting = async move { open(connector.as_ref(), address, Purpose::Data).await };
        ctx.spawn(connecting.into_actor(self).map(move |opened, stream, ctx| match opened {
            Ok((connection, _hello)) => {
                stream.link = Some(Link::spawn(connection, None, limit, ctx));
                stream.feed(Input::Connected, ctx);
                stream.send(&Message::Join(join), ctx);
            }
            Err(fault) => {
                stream.refusal = fault.refusal;
                stream.feed(Input::Fault(fault.message), ctx);
            }
        }));
    }

    fn receive(&mut self, message: Message, ctx: &mut Context<Self>) {
        match message {
            Message::Join(join) => self.ask_registry(join, ctx),
            // What only a server says would make an agent's connection a member of no session.
            Message::Joined | Message::Ack(_) | Message::Drained | Message::Refused(_)
                if self.role == Role::Acceptor =>
            {
                self.offended(format!("{} is not for an agent to say", message.name()), ctx);
            }
            Message::Joined => {
                self.feed(Input::Joined, ctx);
                if self.machine.is_active() {
                    self.report(StreamFact::Joined);
                }
            }
            Message::Ack(ack) => self.report(StreamFact::Acknowledged(ack)),
            Message::Drain => {
                self.feed(Input::PeerDrain, ctx);
                self.settle(ctx);
            }
            Message::Drained => self.feed(Input::PeerDrained, ctx),
            Message::Ping(ping) => self.send(&Message::Pong(Pong { stamp: ping.stamp }), ctx),
            Message::Pong(_) => {}
            Message::Refused(refusal) => {
                self.refusal = Some(refusal.clone());
                self.feed(Input::Fault(refusal.message), ctx);
            }
            other => self.offended(format!("{} does not belong on a data stream", other.name()), ctx),
        }
    }

    fn ask_registry(&mut self, join: Join, ctx: &mut Context<Self>) {
        let (Some(peer), Some(registry)) = (self.peer.clone(), self.registry.take()) else {
            return self.offended("the peer joined twice".into(), ctx);
        };
        (self.index, self.incarnation) = (join.index, join.incarnation);
        let asking = registry.send(JoinSession { peer, join, stream: ctx.address() });
        ctx.spawn(asking.into_actor(self).map(|answer, stream, ctx| match answer {
            Ok(Ok(granted)) => {
                stream.owner = Some(granted.owner);
                stream.intake = granted.intake;
                stream.feed(Input::Joined, ctx);
            }
            Ok(Err(refusal)) => {
                let peer = stream.peer.as_ref().map(|peer| (peer.tenant.to_string(), peer.agent.short()));
                warn!(stream = stream.index.0, ?peer, reason = refusal.message, "join refused");
                stream.send(&Message::Refused(refusal.clone()), ctx);
                stream.feed(Input::Fault(refusal.message), ctx);
            }
            Err(_) => stream.feed(Input::Fault("the server is stopping".into()), ctx),
        }));
    }

    fn take_block(&mut self, block: BlockFrame, permit: Option<OwnedSemaphorePermit>, ctx: &mut Context<Self>) {
        let Some(intake) = &self.intake else {
            // An initiator's owner bounds these by its credit.
            if self.role == Role::Initiator && self.machine.is_active() {
                return self.report(StreamFact::Arrived(block));
            }
            return self.offended("a block that nobody asked for".into(), ctx);
        };
        let window_end = intake.watermark.load(Ordering::Acquire).saturating_add(limits::SEQUENCE_WINDOW);
        if block.sequence.0 >= window_end {
            let reason = format!("block {} lies beyond the window, which ends at {window_end}", block.sequence.0);
            return self.offended(reason, ctx);
        }
        self.storing += 1;
        let storing = intake.store.store(block.sequence, block.block);
        ctx.spawn(storing.into_actor(self).map(move |stored, stream, ctx| {
            drop(permit);
            stream.storing -= 1;
            stream.stored(block.sequence, stored, ctx);
        }));
    }

    fn stored(
        &mut self,
        sequence: Sequence,
        stored: Result<strandline_messages::Durable<Sequence>, StoreFault>,
        ctx: &mut Context<Self>,
    ) {
        let Some(intake) = &self.intake else { return };
        match stored {
            Ok(durable) => {
                intake.tracker.do_send(BlockStored(durable));
                self.unannounced = true;
            }
            Err(StoreFault::BadBlock(reason)) => self.offended(format!("block {}: {reason}", sequence.0), ctx),
            Err(fault) => {
                let full = matches!(fault, StoreFault::Full(_));
                intake.session.do_send(StoreFailed { full, reason: fault.to_string() });
            }
        }
    }

    /// A draining acceptor answers once nothing is being stored and the last acknowledgement is written.
    fn settle(&mut self, ctx: &mut Context<Self>) {
        if self.storing == 0 && self.written_out && !self.unannounced {
            self.feed(Input::Settled, ctx);
        }
    }
}

impl Actor for Stream {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        ctx.run_interval(TICK, |stream, ctx| {
            if stream.link.as_ref().is_some_and(Link::take_progress) {
                stream.feed(Input::Progress, ctx);
            }
            let is_orphan = stream.owner.as_ref().is_some_and(|owner| !owner.connected());
            if is_orphan && stream.role == Role::Acceptor {
                stream.feed(Input::Fault("the session is gone".into()), ctx);
            }
            stream.feed(Input::Tick, ctx);
        });
        match self.origin.take() {
            Some(Origin::Connect { connector, address, join, owner, limit }) => {
                self.owner = Some(owner);
                self.connect(connector, address, join, limit, ctx);
            }
            Some(Origin::Accepted { connection, peer, registry, budget }) => {
                (self.peer, self.registry) = (Some(peer), Some(registry));
                self.link = Some(Link::spawn(connection, Some(budget), None, ctx));
                self.feed(Input::Connected, ctx);
            }
            None => ctx.stop(),
        }
    }
}

impl Handler<FrameArrived> for Stream {
    type Result = ();

    fn handle(&mut self, FrameArrived { frame, permit }: FrameArrived, ctx: &mut Context<Self>) {
        let taken = if frame.kind == strandline_messages::wire::message::kinds::BLOCK {
            BlockFrame::from_frame(frame).map(|block| self.take_block(block, permit, ctx))
        } else {
            Message::decode(&frame).map(|(_tag, message)| self.receive(message, ctx))
        };
        if let Err(error) = taken {
            self.offended(error.to_string(), ctx);
        }
    }
}

impl Handler<ReadEnded> for Stream {
    type Result = ();

    fn handle(&mut self, ended: ReadEnded, ctx: &mut Context<Self>) {
        match ended {
            ReadEnded::InOrder => self.feed(Input::PeerClosed, ctx),
            ReadEnded::Broken(reason) => self.feed(Input::Fault(reason), ctx),
            ReadEnded::Malformed(reason) => self.offended(reason, ctx),
        }
    }
}

impl Handler<Wrote> for Stream {
    type Result = ();

    fn handle(&mut self, wrote: Wrote, ctx: &mut Context<Self>) {
        match wrote {
            Wrote::Block(block) => self.report(StreamFact::Written(block.sequence)),
            Wrote::Idle => {
                self.written_out = true;
                self.settle(ctx);
            }
            Wrote::Closed => self.feed(Input::Closed, ctx),
            Wrote::Failed(reason) => {
                self.feed(Input::Fault(reason), ctx);
                // The writer is gone, so nobody else will say that our half is closed.
                self.feed(Input::Closed, ctx);
            }
        }
    }
}

impl Handler<SendBlock> for Stream {
    type Result = ();

    fn handle(&mut self, SendBlock(block): SendBlock, ctx: &mut Context<Self>) {
        let sent = self.link.as_ref().map(|link| link.send_block(block));
        if let Some(Err(error)) = sent {
            self.feed(Input::Fault(error.to_string()), ctx);
        }
    }
}

impl Handler<SendAck> for Stream {
    type Result = ();

    fn handle(&mut self, SendAck(ack): SendAck, ctx: &mut Context<Self>) {
        self.written_out = false;
        self.unannounced = false;
        let sent = self.link.as_ref().map(|link| link.send_ack(ack));
        if let Some(Err(error)) = sent {
            self.feed(Input::Fault(error.to_string()), ctx);
        }
    }
}

impl Handler<DrainStream> for Stream {
    type Result = ();

    fn handle(&mut self, _: DrainStream, ctx: &mut Context<Self>) {
        self.feed(Input::DrainAsked, ctx);
    }
}
