//! `ControlHost`: the server's end of one control connection.
//!
//! Owns the connection (inside its link), answers what needs no session from the [`Host`], and passes the rest to the
//! session that it speaks for. It ends when the connection ends; the session goes on. It never waits for data streams:
//! every request is answered on its own, in whatever order the answers come (no deadlock).

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::{Actor, ActorContext, ActorFutureExt, Addr, AsyncContext, Context, Handler, Running, WrapFuture};
use strandline_messages::mail::Peer;
use strandline_messages::wire::{Attach, Message, OpenSession, Pong, RefusalCode, Refused, Tag};
use strandline_messages::{ChunkId, Incarnation, limits};
use tracing::{debug, info, warn};

use crate::ports::Host;
use crate::runtime::clock;
use crate::runtime::link::{FrameArrived, Link, ReadEnded, Wrote};
use crate::runtime::transport::Connection;
use crate::session::{Ask, ControlGone, Push, Session};
use crate::session_registry::{AttachSession, RegisterSession, SessionRegistry};

/// An agent that says nothing for so long is gone: it pings four times as often.
const SILENCE_MAX: Duration = Duration::from_mins(1);
/// Requests under way at once; more than an agent's query credit needs.
const REQUESTS_MAX: usize = 48;
const TICK: Duration = Duration::from_secs(1);

/// Tell the agent that the server stops, and close.
#[derive(actix::Message)]
#[rtype(result = "()")]
pub struct CloseControl;

/// See the module.
pub struct ControlHost {
    connection: Option<Connection>,
    peer: Peer,
    nonce: [u8; 32],
    host: Arc<dyn Host>,
    registry: Addr<SessionRegistry>,
    session: Option<(Addr<Session>, Incarnation)>,
    /// A session is being opened or attached to.
    entering: bool,
    link: Option<Link>,
    requests: usize,
    /// Ids of queries under way.
    queried: usize,
    heard: Instant,
    closing: Option<Instant>,
}

impl ControlHost {
    /// Starts on the current arbiter with a greeted connection. `nonce`: what this server sent in its `Hello`.
    pub fn start_with(
        connection: Connection,
        peer: Peer,
        nonce: [u8; 32],
        host: Arc<dyn Host>,
        registry: Addr<SessionRegistry>,
    ) -> Addr<Self> {
        Self {
            connection: Some(connection),
            peer,
            nonce,
            host,
            registry,
            session: None,
            entering: false,
            link: None,
            requests: 0,
            queried: 0,
            heard: clock::now(),
            closing: None,
        }
        .start()
    }

    fn reply(&mut self, tag: Tag, message: &Message, ctx: &mut Context<Self>) {
        if let Message::Refused(refusal) = message {
            self.note(refusal);
        }
        let sent = self.link.as_ref().map(|link| link.send(tag, message));
        if let Some(Err(error)) = sent {
            self.break_off(&error.to_string(), ctx);
        }
    }

    /// What an honest agent is refused in the course of things is no warning.
    fn note(&self, Refused { code, message }: &Refused) {
        let (tenant, agent) = (&self.peer.tenant, self.peer.agent.short());
        match code {
            RefusalCode::Invalid | RefusalCode::NotPermitted => {
                warn!(%tenant, %agent, ?code, reason = message, "request refused");
            }
            RefusalCode::Stopping => {}
            _ => info!(%tenant, %agent, ?code, reason = message, "request answered with a refusal"),
        }
    }

    fn break_off(&mut self, reason: &str, ctx: &mut Context<Self>) {
        debug!(agent = %self.peer.agent.short(), reason, "control connection ends");
        self.close(ctx);
    }

    fn close(&mut self, ctx: &mut Context<Self>) {
        if self.closing.replace(clock::now()).is_none() && !matches!(self.link.as_ref().map(Link::close), Some(Ok(())))
        {
            ctx.stop();
        }
    }

    fn receive(&mut self, tag: Tag, message: Message, ctx: &mut Context<Self>) {
        match message {
            Message::Ping(ping) => {
                self.reply(tag, &Message::Pong(Pong { stamp: ping.stamp }), ctx);
            }
            Message::Pong(_) => {}
            Message::OpenSession(request) => self.open_session(tag, request, ctx),
            Message::Attach(attach) => self.attach(tag, attach, ctx),
            Message::Credit(_) => {
                if let Some((session, incarnation)) = &self.session {
                    // Bounded by the blocks that the session sent.
                    session.do_send(Ask(*incarnation, message));
                }
            }
            Message::QueryChunks(_) | Message::Commit(_) | Message::AbortSession(_) | Message::FetchChunks(_) => {
                self.ask_session(tag, message, ctx);
            }
            other => self.ask_host(tag, other, ctx),
        }
    }

    fn begin(&mut self, tag: Tag, ctx: &mut Context<Self>) -> bool {
        let room = self.requests < REQUESTS_MAX;
        if room {
            self.requests += 1;
        } else {
            let refusal = Refused::new(RefusalCode::Invalid, "too many requests under way");
            self.reply(tag, &Message::Refused(refusal), ctx);
        }
        room
    }

    fn finish(&mut self, tag: Tag, answer: &Message, ctx: &mut Context<Self>) {
        self.requests = self.requests.saturating_sub(1);
        self.reply(tag, answer, ctx);
    }

    /// One connection speaks for one session at most.
    fn enter(&mut self, tag: Tag, ctx: &mut Context<Self>) -> bool {
        if self.entering || self.session.is_some() {
            let refusal = Refused::new(RefusalCode::Invalid, "this connection speaks for a session already");
            self.reply(tag, &Message::Refused(refusal), ctx);
            return false;
        }
        self.entering = self.begin(tag, ctx);
        self.entering
    }

    fn open_session(&mut self, tag: Tag, request: OpenSession, ctx: &mut Context<Self>) {
        if !self.enter(tag, ctx) {
            return;
        }
        let (peer, nonce, control) = (self.peer.clone(), self.nonce, ctx.address().recipient());
        let opening = self.registry.send(RegisterSession { peer, request, nonce, control });
        ctx.spawn(opening.into_actor(self).map(move |opened, control, ctx| {
            control.entering = false;
            let answer = match opened {
                Ok(Ok(registered)) => {
                    control.session = registered.session;
                    registered.answer
                }
                Ok(Err(refusal)) => Message::Refused(refusal),
                Err(_) => stopping(),
            };
            control.finish(tag, &answer, ctx);
        }));
    }

    fn attach(&mut self, tag: Tag, attach: Attach, ctx: &mut Context<Self>) {
        if !self.enter(tag, ctx) {
            return;
        }
        let control = ctx.address().recipient();
        let attaching = self.registry.send(AttachSession { peer: self.peer.clone(), attach, control });
        ctx.spawn(attaching.into_actor(self).map(move |attached, control, ctx| {
            control.entering = false;
            let answer = match attached {
                Ok(Ok((session, attached))) => {
                    control.session = Some((session, attached.incarnation));
                    Message::Attached(attached)
                }
                Ok(Err(refusal)) => Message::Refused(refusal),
                Err(_) => stopping(),
            };
            control.finish(tag, &answer, ctx);
        }));
    }

    fn ask_session(&mut self, tag: Tag, request: Message, ctx: &mut Context<Self>) {
        let queried = match &request {
            Message::QueryChunks(query) => query.ids.len() / ChunkId::LEN,
            _ => 0,
        };
        if self.queried + queried > limits::QUERY_IDS_OUTSTANDING_MAX {
            let refusal = Refused::new(RefusalCode::Invalid, "more ids under way than the credit for queries allows");
            return self.reply(tag, &Message::Refused(refusal), ctx);
        }
        let Some((session, incarnation)) = self.session.clone() else {
            let refusal = Refused::new(RefusalCode::NoSuchSession, "this connection speaks for no session");
            return self.reply(tag, &Message::Refused(refusal), ctx);
        };
        if !self.begin(tag, ctx) {
            return;
        }
        self.queried += queried;
        let asking = session.send(Ask(incarnation, request));
        ctx.spawn(asking.into_actor(self).map(move |answer, control, ctx| {
            control.queried -= queried;
            let gone = |_| Message::Refused(Refused::new(RefusalCode::NoSuchSession, "the session has ended"));
            control.finish(tag, &answer.unwrap_or_else(gone), ctx);
        }));
    }

    fn ask_host(&mut self, tag: Tag, request: Message, ctx: &mut Context<Self>) {
        if !self.begin(tag, ctx) {
            return;
        }
        let answering = self.host.answer(self.peer.clone(), request, self.nonce);
        ctx.spawn(answering.into_actor(self).map(move |answer, control, ctx| {
            control.finish(tag, &answer.unwrap_or_else(Message::Refused), ctx);
        }));
    }
}

fn stopping() -> Message {
    Message::Refused(Refused::new(RefusalCode::Stopping, "the server is stopping"))
}

impl Actor for ControlHost {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        if let Some(connection) = self.connection.take() {
            self.link = Some(Link::spawn(connection, None, None, ctx));
        }
        ctx.run_interval(TICK, |control, ctx| {
            let now = clock::now();
            if control.link.as_ref().is_some_and(Link::take_progress) {
                control.heard = now;
            }
            if control.closing.is_some_and(|since| now.saturating_duration_since(since) > 2 * TICK) {
                ctx.stop();
            } else if now.saturating_duration_since(control.heard) >= SILENCE_MAX {
                control.break_off("the agent says nothing", ctx);
            }
        });
    }

    fn stopping(&mut self, _: &mut Context<Self>) -> Running {
        if let Some((session, incarnation)) = self.session.take() {
            session.do_send(ControlGone(incarnation));
        }
        Running::Stop
    }
}

impl Handler<FrameArrived> for ControlHost {
    type Result = ();

    fn handle(&mut self, arrived: FrameArrived, ctx: &mut Context<Self>) {
        match Message::decode(&arrived.frame) {
            Ok((tag, message)) => self.receive(tag, message, ctx),
            Err(error) => {
                let refusal = Refused::new(RefusalCode::Invalid, error.to_string());
                self.reply(Tag::default(), &Message::Refused(refusal), ctx);
                self.break_off(&error.to_string(), ctx);
            }
        }
    }
}

impl Handler<ReadEnded> for ControlHost {
    type Result = ();

    fn handle(&mut self, ended: ReadEnded, ctx: &mut Context<Self>) {
        match ended {
            ReadEnded::InOrder => self.break_off("closed by the agent", ctx),
            ReadEnded::Broken(reason) => self.break_off(&reason, ctx),
            ReadEnded::Malformed(reason) => {
                self.note(&Refused::new(RefusalCode::Invalid, reason.as_str()));
                self.break_off(&reason, ctx);
            }
        }
    }
}

impl Handler<Wrote> for ControlHost {
    type Result = ();

    fn handle(&mut self, wrote: Wrote, ctx: &mut Context<Self>) {
        if matches!(wrote, Wrote::Closed | Wrote::Failed(_)) {
            ctx.stop();
        }
    }
}

impl Handler<Push> for ControlHost {
    type Result = ();

    fn handle(&mut self, Push(message): Push, ctx: &mut Context<Self>) {
        self.reply(Tag::default(), &message, ctx);
        if matches!(&message, Message::Refused(refusal) if refusal.code == RefusalCode::Superseded) {
            // Whatever this connection still asks is not for the session any more.
            self.session = None;
            self.close(ctx);
        }
    }
}

impl Handler<CloseControl> for ControlHost {
    type Result = ();

    fn handle(&mut self, _: CloseControl, ctx: &mut Context<Self>) {
        self.reply(Tag::default(), &stopping(), ctx);
        self.close(ctx);
    }
}
