//! `Session`: one backup or restore on the server. It outlives every connection (G6).
//!
//! Owns the session machine, the store behind its lease, its gap tracker and the list of its streams. The registry
//! starts it; it stops itself after its terminal state is recorded and nobody is connected any more. It must not touch a
//! socket: streams close themselves.

mod fetching;
mod requests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use actix::{
    Actor, ActorContext, ActorFutureExt, Addr, AsyncContext, Context, Handler, Recipient, ResponseFuture, WrapFuture,
};
use bytes::Bytes;
use futures_util::FutureExt;
use strandline_messages::mail::{
    DrainStream, DurableState, HolesFound, Peer, ReportDurable, StoreFailed, StreamEvent, StreamFact, WatermarkMoved,
};
use strandline_messages::wire::{Attached, Message, RefusalCode, Refused, SessionKind, SessionStatus};
use strandline_messages::{Incarnation, RepositoryName, SessionId, SnapshotId, StreamIndex};
use tokio::sync::oneshot;
use tracing::{debug, info, warn};

use crate::gap_tracker::{AddListener, GapTracker, RemoveListener, StopTracking};
use crate::machines::session::{Input, Output, SessionLimits, SessionMachine, Terminal};
use crate::planted::{self, Bug};
use crate::ports::SessionStore;
use crate::runtime::clock;
use crate::stream::{Intake, JoinGranted, JoinSession, Stream};
use fetching::Fetching;

const TICK: Duration = Duration::from_secs(1);

/// From the control connection of this incarnation: a request of the agent; the answer goes back to it.
#[derive(actix::Message)]
#[rtype(result = "Message")]
pub struct Ask(pub Incarnation, pub Message);

/// From a control connection: let me speak for the session.
#[derive(actix::Message)]
#[rtype(result = "Result<Attached, Refused>")]
pub struct AttachControl {
    /// The incarnation that the agent last had.
    pub known: Incarnation,
    /// Takes what the server says unasked.
    pub control: Recipient<Push>,
}

/// To a control connection: tell the agent this, unasked.
#[derive(actix::Message, Clone)]
#[rtype(result = "()")]
pub struct Push(pub Message);

/// From a control connection: it is gone.
#[derive(actix::Message)]
#[rtype(result = "()")]
pub struct ControlGone(pub Incarnation);

/// From the registry: another session carries on for this one; its lease is not this session's any more.
#[derive(actix::Message)]
#[rtype(result = "()")]
pub struct Supersede;

/// From the registry: the agent was revoked.
#[derive(actix::Message)]
#[rtype(result = "()")]
pub struct Revoke;

/// From the registry: its agent has more sessions than the server keeps for one. One that nobody is connected to ends.
/// Whether there is room now.
#[derive(actix::Message)]
#[rtype(result = "bool")]
pub struct MakeRoom;

/// From the registry: the server stops. The session stays open in the catalog; its streams drain.
#[derive(actix::Message)]
#[rtype(result = "()")]
pub struct Quiesce;

/// From anybody: how are you? `None` after the end.
#[derive(actix::Message)]
#[rtype(result = "Option<SessionView>")]
pub struct Observe;

/// The observable state of a session.
#[derive(Clone, Debug)]
pub struct SessionView {
    /// Whose it is.
    pub peer: Peer,
    /// Backup or restore.
    pub kind: SessionKind,
    /// When it was opened, ns since 1970.
    pub opened_ns: i64,
    /// What agents of its tenant may know.
    pub status: SessionStatus,
}

/// To the registry: forget this session.
#[derive(actix::Message)]
#[rtype(result = "()")]
pub struct SessionEnded {
    /// Which.
    pub session: SessionId,
    /// Whether how it ended stands in the catalog. Not so if it broke down on a bug of ours.
    pub recorded: bool,
}

/// What a session is made of.
pub struct SessionSeed {
    /// Its id.
    pub id: SessionId,
    /// Backup or restore.
    pub kind: SessionKind,
    /// Whose it is.
    pub peer: Peer,
    /// The repository's name.
    pub repository: RepositoryName,
    /// Its storage.
    pub store: Arc<dyn SessionStore>,
    /// Time limits.
    pub limits: SessionLimits,
    /// First credit of a restore, bytes.
    pub credit: u64,
    /// Takes what the server says unasked.
    pub control: Recipient<Push>,
    /// Is told when it is over.
    pub registry: Recipient<SessionEnded>,
}

struct Joined {
    incarnation: Incarnation,
    stream: Addr<Stream>,
}

/// See the module.
pub struct Session {
    seed: SessionSeed,
    machine: SessionMachine,
    control: Option<Recipient<Push>>,
    tracker: Option<Addr<GapTracker>>,
    watermark: Arc<AtomicU64>,
    streams: BTreeMap<StreamIndex, Joined>,
    fetching: Fetching,
    manifest: Option<Bytes>,
    /// Whoever asked for the commit's outcome; the same request may have come over several connections.
    waiting: Vec<oneshot::Sender<Message>>,
    committed: Option<(SnapshotId, Vec<u8>)>,
    ended_because: String,
    /// Whether the end stands in the catalog, and who waits for that.
    recorded: bool,
    recording: Vec<oneshot::Sender<()>>,
    superseded: bool,
    full: bool,
    opened_ns: i64,
}

impl Session {
    /// A session that has its lease and is about to be registered.
    pub fn new(seed: SessionSeed) -> Self {
        Self {
            machine: SessionMachine::new(seed.limits, clock::now()),
            control: Some(seed.control.clone()),
            tracker: None,
            watermark: Arc::default(),
            streams: BTreeMap::new(),
            fetching: Fetching::new(seed.credit),
            manifest: None,
            waiting: Vec::new(),
            committed: None,
            ended_because: String::new(),
            recorded: false,
            recording: Vec::new(),
            superseded: false,
            full: false,
            opened_ns: clock::wall_ns(),
            seed,
        }
    }

    fn feed(&mut self, input: Input, ctx: &mut Context<Self>) {
        self.machine.handle(clock::now(), input);
        while let Some(output) = self.machine.poll_output() {
            match output {
                Output::StartCommit => self.start_commit(ctx),
                Output::CommitTooLate(_) if planted::here(Bug::ForgetsTheOutcome) => {}
                Output::CommitTooLate(_) => {
                    let answer = self.outcome();
                    self.answer_waiting(&answer);
                }
                Output::End(terminal, reason) => self.end(terminal, reason, ctx),
            }
        }
    }

    fn end(&mut self, terminal: Terminal, reason: String, ctx: &mut Context<Self>) {
        info!(session = %self.seed.id.short(), state = self.machine.state_name(), reason, "session ended");
        self.ended_because.clone_from(&reason);
        let recording = if self.committed.is_some() || self.superseded {
            // The commit's own transaction, or the one that moved the lease, has recorded it.
            std::future::ready(Ok(())).boxed()
        } else {
            self.seed.store.end(terminal, reason)
        };
        let answer = self.outcome();
        self.answer_waiting(&answer);
        if terminal != Terminal::Committed {
            if let Some(control) = &self.control {
                control.do_send(Push(answer));
            }
            self.drain_streams();
        }
        ctx.spawn(recording.into_actor(self).map(|recorded, session, ctx| {
            if let Err(fault) = recorded {
                warn!(session = %session.seed.id.short(), %fault, "the session's end could not be recorded");
            }
            session.recorded = true;
            for waiting in session.recording.drain(..) {
                // Whoever asked may be gone.
                let _ = waiting.send(());
            }
            session.stop_when_alone(ctx);
        }));
        // Whoever is still connected then has been told how it ended; the catalog tells everybody else.
        ctx.run_later(self.seed.limits.grace, |_, ctx| ctx.stop());
    }

    fn drain_streams(&self) {
        for joined in self.streams.values() {
            joined.stream.do_send(DrainStream);
        }
    }

    fn stop_when_alone(&mut self, ctx: &mut Context<Self>) {
        // Its lease is given back with the record: before that, it holds a collection up.
        if self.machine.ended().is_some() && self.recorded && self.streams.is_empty() && self.control.is_none() {
            ctx.stop();
        }
    }

    fn join(&mut self, request: JoinSession, ctx: &mut Context<Self>) -> Result<JoinGranted, Refused> {
        // A stream that was slow to connect may come when the others have done its work: it joins, and drains.
        if self.machine.ended().is_some_and(|terminal| terminal != Terminal::Committed) {
            return Err(Refused::new(RefusalCode::Ended, format!("the session has ended: {}", self.ended_because)));
        }
        let (index, incarnation) = (request.join.index, request.join.incarnation);
        match self.streams.get(&index) {
            Some(known) if known.incarnation >= incarnation => {
                return Err(Refused::new(RefusalCode::Superseded, "a newer connection has taken this stream's place"));
            }
            // The old connection's late events carry its own incarnation and change nothing any more.
            Some(known) => {
                known.stream.do_send(DrainStream);
                self.fetching.stream_gone(index);
            }
            None => self.machine.handle(clock::now(), Input::StreamJoined),
        }
        if let Some(tracker) = &self.tracker {
            tracker.do_send(AddListener(index, request.stream.clone().recipient()));
        }
        self.streams.insert(index, Joined { incarnation, stream: request.stream });
        let intake = self.tracker.clone().map(|tracker| Intake {
            store: Arc::clone(&self.seed.store),
            tracker: tracker.recipient(),
            session: ctx.address().recipient(),
            watermark: Arc::clone(&self.watermark),
        });
        Ok(JoinGranted { owner: ctx.address().recipient(), intake })
    }

    fn tick(&mut self, ctx: &mut Context<Self>) {
        if !planted::here(Bug::OverlooksDeadConnections) {
            self.notice_dead_connections(ctx);
        }
        self.feed(Input::Tick, ctx);
        self.stop_when_alone(ctx);
    }

    /// A connection may end before it learns that it belongs to the session: then it says nothing when it goes.
    fn notice_dead_connections(&mut self, ctx: &mut Context<Self>) {
        if self.control.as_ref().is_some_and(|control| !control.connected()) {
            self.control = None;
            self.feed(Input::ControlLost(self.machine.incarnation()), ctx);
        }
        let dead: Vec<_> = self.streams.iter().filter(|(_, joined)| !joined.stream.connected()).collect();
        let dead: Vec<_> = dead.into_iter().map(|(index, joined)| (*index, joined.incarnation)).collect();
        for (index, incarnation) in dead {
            self.stream_gone(index, incarnation, ctx);
        }
    }

    /// Whether the event comes from the newest connection of its stream.
    fn is_current(&self, event: &StreamEvent) -> bool {
        self.streams.get(&event.index).is_some_and(|known| known.incarnation == event.incarnation)
    }

    fn stream_gone(&mut self, index: StreamIndex, incarnation: Incarnation, ctx: &mut Context<Self>) {
        if self.streams.get(&index).is_none_or(|known| known.incarnation != incarnation) {
            return;
        }
        self.streams.remove(&index);
        self.fetching.stream_gone(index);
        if let Some(tracker) = &self.tracker {
            tracker.do_send(RemoveListener(index));
        }
        self.feed(Input::StreamLeft, ctx);
        self.pump(ctx);
        self.stop_when_alone(ctx);
    }
}

fn refused(code: RefusalCode, text: impl Into<String>) -> Message {
    Message::Refused(Refused::new(code, text))
}

impl Actor for Session {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        if self.seed.kind != SessionKind::Restore {
            let (moved, holes) = (ctx.address().recipient(), ctx.address().recipient());
            self.tracker = Some(GapTracker::new(Arc::clone(&self.watermark), moved, holes).start());
        }
        ctx.run_interval(TICK, Self::tick);
    }

    fn stopped(&mut self, _: &mut Context<Self>) {
        if let Some(tracker) = self.tracker.take() {
            tracker.do_send(StopTracking);
        }
        self.seed.registry.do_send(SessionEnded { session: self.seed.id, recorded: self.recorded });
    }
}

impl Handler<Ask> for Session {
    type Result = ResponseFuture<Message>;

    fn handle(&mut self, Ask(incarnation, request): Ask, ctx: &mut Context<Self>) -> Self::Result {
        if !self.machine.asks(incarnation) {
            let text = "another connection speaks for this session since: this one is superseded";
            return std::future::ready(refused(RefusalCode::Superseded, text)).boxed_local();
        }
        if let Message::Credit(credit) = request {
            self.fetching.grant(&credit);
            self.pump(ctx);
            return std::future::ready(Message::Credit(credit)).boxed_local();
        }
        self.ask(request, ctx)
    }
}

impl Handler<AttachControl> for Session {
    type Result = ResponseFuture<Result<Attached, Refused>>;

    fn handle(&mut self, request: AttachControl, _: &mut Context<Self>) -> Self::Result {
        // It ended while nobody was connected: the agent must hear of that now, because nobody will say it again.
        if self.committed.is_none()
            && self.machine.ended().is_some()
            && let Message::Refused(refusal) = self.outcome()
        {
            return std::future::ready(Err(refusal)).boxed_local();
        }
        let Some(incarnation) = self.machine.attach(request.known) else {
            let text = "another connection speaks for this session since: this one is superseded";
            return std::future::ready(Err(Refused::new(RefusalCode::Superseded, text))).boxed_local();
        };
        if let Some(old) = self.control.replace(request.control) {
            let text = "another connection speaks for this session since";
            old.do_send(Push(Message::Refused(Refused::new(RefusalCode::Superseded, text))));
        }
        let tracker = self.tracker.clone();
        async move {
            let nothing = DurableState { watermark: 0, ranges: Vec::new() };
            let durable = match tracker {
                Some(tracker) => tracker.send(ReportDurable).await.unwrap_or(nothing),
                None => nothing,
            };
            Ok(Attached { incarnation, watermark: durable.watermark, ranges: durable.ranges })
        }
        .boxed_local()
    }
}

impl Handler<ControlGone> for Session {
    type Result = ();

    fn handle(&mut self, ControlGone(incarnation): ControlGone, ctx: &mut Context<Self>) {
        if incarnation == self.machine.incarnation() {
            self.control = None;
        }
        self.feed(Input::ControlLost(incarnation), ctx);
        self.stop_when_alone(ctx);
    }
}

impl Handler<JoinSession> for Session {
    type Result = Result<JoinGranted, Refused>;

    fn handle(&mut self, request: JoinSession, ctx: &mut Context<Self>) -> Self::Result {
        self.join(request, ctx)
    }
}

impl Handler<StreamEvent> for Session {
    type Result = ();

    fn handle(&mut self, event: StreamEvent, ctx: &mut Context<Self>) {
        match &event.fact {
            StreamFact::Joined if self.is_current(&event) => {
                self.fetching.stream_joined(event.index, event.incarnation);
                self.pump(ctx);
            }
            StreamFact::Written(sequence) => {
                if self.is_current(&event) {
                    self.fetching.written(event.index, *sequence);
                }
                self.feed(Input::BlockSent, ctx);
                self.pump(ctx);
            }
            StreamFact::Lost { reason, .. } => {
                warn!(session = %self.seed.id.short(), stream = event.index.0, reason, "stream lost");
                self.stream_gone(event.index, event.incarnation, ctx);
            }
            StreamFact::Ended { clean } => {
                debug!(session = %self.seed.id.short(), stream = event.index.0, clean, "stream closed");
                self.stream_gone(event.index, event.incarnation, ctx);
            }
            StreamFact::Joined | StreamFact::Acknowledged(_) | StreamFact::Arrived(_) => {}
        }
    }
}

impl Handler<WatermarkMoved> for Session {
    type Result = ();

    fn handle(&mut self, WatermarkMoved(watermark): WatermarkMoved, ctx: &mut Context<Self>) {
        self.feed(Input::Watermark(watermark), ctx);
    }
}

impl Handler<HolesFound> for Session {
    type Result = ();

    fn handle(&mut self, HolesFound(retransmit): HolesFound, _: &mut Context<Self>) {
        if let Some(control) = &self.control {
            control.do_send(Push(Message::Retransmit(retransmit)));
        }
    }
}

impl Handler<StoreFailed> for Session {
    type Result = ();

    fn handle(&mut self, failed: StoreFailed, ctx: &mut Context<Self>) {
        self.full |= failed.full;
        self.feed(Input::BlockLost(failed.reason), ctx);
    }
}

impl Handler<Revoke> for Session {
    type Result = ();

    fn handle(&mut self, _: Revoke, ctx: &mut Context<Self>) {
        self.feed(Input::Fault("the agent was revoked".into()), ctx);
    }
}

impl Handler<Supersede> for Session {
    type Result = ();

    fn handle(&mut self, _: Supersede, ctx: &mut Context<Self>) {
        self.superseded = true;
        self.feed(Input::Fault("superseded: another session carries on for it".into()), ctx);
    }
}

impl Handler<MakeRoom> for Session {
    type Result = bool;

    fn handle(&mut self, _: MakeRoom, ctx: &mut Context<Self>) -> bool {
        if self.machine.is_abandoned() {
            self.feed(Input::Fault("nobody was connected, and the machine opened too many other sessions".into()), ctx);
        }
        self.machine.ended().is_some()
    }
}

impl Handler<Quiesce> for Session {
    type Result = ();

    fn handle(&mut self, _: Quiesce, _: &mut Context<Self>) {
        self.drain_streams();
    }
}

impl Handler<Observe> for Session {
    type Result = Option<SessionView>;

    fn handle(&mut self, _: Observe, _: &mut Context<Self>) -> Self::Result {
        let status = SessionStatus {
            session: self.seed.id,
            repository: self.seed.repository.clone(),
            agent: self.seed.peer.agent,
            state: self.machine.state_name().to_owned(),
            streams: u16::try_from(self.streams.len()).unwrap_or(u16::MAX),
            watermark: self.watermark.load(Ordering::Acquire),
        };
        let view =
            SessionView { peer: self.seed.peer.clone(), kind: self.seed.kind, opened_ns: self.opened_ns, status };
        self.machine.ended().is_none().then_some(view)
    }
}
