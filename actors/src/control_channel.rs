//! `ControlChannel`: the agent's end of its control connection.
//!
//! Owns the connection of the moment and the requests that are not answered yet. It reconnects, re-attaches its session,
//! opens another one with `resume_of` where the server has lost it, and sends unanswered requests again: its callers see
//! an answer or a lasting failure, never a lost connection (G6). It ends when its owner closes it.

mod attachment;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::{
    Actor, ActorContext, ActorFutureExt, AsyncContext, Context, Handler, Recipient, ResponseFuture, SpawnHandle,
    WrapFuture,
};
use futures_util::FutureExt;
use strandline_messages::wire::{
    Attach, Committed, Defer, Hello, Message, OpenSession, Ping, Pong, Purpose, RefusalCode, Refused, SessionOpened,
    Tag,
};
use strandline_messages::{Incarnation, SessionId};
use tokio::sync::oneshot;
use tracing::{debug, warn};

use crate::dispatcher::{DispatchFailed, LearnDurable, SendAgain, UseSession};
use crate::machines::reconnect::{Next, Policy, Reconnect};
use crate::planted::{self, Bug};
use crate::runtime::clock;
use crate::runtime::link::{FrameArrived, Link, ReadEnded, Wrote};
use crate::runtime::transport::{ConnectFault, Connection, Connector, open};

const TICK: Duration = Duration::from_secs(1);
/// Quiet for so long: ping.
const PING_AFTER: Duration = Duration::from_secs(15);
/// Nothing heard for so long although pinged: the connection is lost.
const SILENCE_MAX: Duration = Duration::from_mins(1);
/// How long closing in good order may take.
const CLOSE_MAX: Duration = Duration::from_secs(2);

/// Makes an `OpenSession` for a server's nonce; the second argument is the session that it resumes.
pub type SessionOpener = Arc<dyn Fn(&[u8; 32], Option<SessionId>) -> OpenSession + Send + Sync>;

/// Ask the server. Answered with its reply, or with why there never will be one.
#[derive(actix::Message)]
#[rtype(result = "Result<Message, AskError>")]
pub struct AskServer(pub Message);

/// Ask the server for something that must be proved on the connection that it is asked on.
#[derive(actix::Message)]
#[rtype(result = "Result<Message, AskError>")]
pub struct AskProved(pub Prover);

/// Makes a request for a server's nonce.
pub type Prover = Arc<dyn Fn(&[u8; 32]) -> Message + Send + Sync>;

/// Open a session and keep it alive across connections.
#[derive(actix::Message)]
#[rtype(result = "Result<SessionOpened, AskError>")]
pub struct BeginSession {
    /// Makes the request.
    pub opener: SessionOpener,
    /// Is told of the session, and of those that replace it.
    pub dispatcher: Option<Dispatching>,
}

/// Where a session's news go.
#[derive(Clone)]
pub struct Dispatching {
    /// The session that streams join.
    pub session: Recipient<UseSession>,
    /// What is durable.
    pub durable: Recipient<LearnDurable>,
    /// What the server misses.
    pub again: Recipient<SendAgain>,
    /// The session is lost for good.
    pub failed: Recipient<DispatchFailed>,
}

/// The session is over: its connection may be lost without consequence.
#[derive(actix::Message)]
#[rtype(result = "()")]
pub struct ForgetSession;

/// Close in good order. Answered when closed.
#[derive(actix::Message)]
#[rtype(result = "()")]
pub struct CloseChannel;

/// Say no more to the server that does not need an answer (credit).
#[derive(actix::Message)]
#[rtype(result = "()")]
pub struct TellServer(pub Message);

/// Why there is no answer.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AskError {
    /// The server refused.
    #[error("{0}")]
    Refused(Refused),
    /// The server cannot be reached, and trying again was given up or is useless.
    #[error("{0}")]
    Unreachable(ConnectFault),
    /// Another session has replaced the one that the request was about: ask again.
    #[error("the session was replaced after the server had lost it")]
    Replaced,
    /// The channel was closed.
    #[error("the connection was closed")]
    Closed,
}

/// A request, or what makes it anew for each connection.
#[derive(Clone)]
enum Request {
    Fixed(Message),
    Proved(Prover),
}

impl Request {
    fn on(&self, nonce: &[u8; 32]) -> Message {
        match self {
            Self::Fixed(message) => message.clone(),
            Self::Proved(prover) => prover(nonce),
        }
    }
}

struct Pending {
    request: Request,
    reply: oneshot::Sender<Result<Message, AskError>>,
}

struct Attachment {
    opener: SessionOpener,
    dispatcher: Option<Dispatching>,
    /// `None` until the server has opened it.
    opened: Option<SessionOpened>,
    incarnation: Incarnation,
    /// The server had committed it before it lost it.
    committed: Option<Committed>,
}

/// What a tag of this channel's own requests means.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Own {
    Attach(Tag),
    Resume(Tag),
}

impl Own {
    fn tag(self) -> Tag {
        match self {
            Self::Attach(tag) | Self::Resume(tag) => tag,
        }
    }
}

/// See the module.
pub struct ControlChannel {
    connector: Arc<dyn Connector>,
    policy: Policy,
    reconnect: Reconnect,
    link: Option<Link>,
    nonce: [u8; 32],
    /// Requests may be sent: the connection is greeted and, if there is a session, attached.
    ready: bool,
    own: Option<Own>,
    next_tag: u32,
    pending: BTreeMap<Tag, Pending>,
    /// What the server wants to be asked later, on this connection.
    deferrals: BTreeMap<Tag, SpawnHandle>,
    opening: Option<(Tag, oneshot::Sender<Result<SessionOpened, AskError>>)>,
    attachment: Option<Attachment>,
    heard: Instant,
    pinged: bool,
    fault: Option<AskError>,
    closing: Option<(Instant, oneshot::Sender<()>)>,
}

impl ControlChannel {
    /// Connects at once. `first`: patience until the first connection; `later`: patience within a session.
    pub fn new(connector: Arc<dyn Connector>, first: Policy, later: Policy, seed: u64) -> Self {
        Self {
            connector,
            policy: later,
            reconnect: Reconnect::new(first, seed),
            link: None,
            nonce: [0; 32],
            ready: false,
            own: None,
            next_tag: 0,
            pending: BTreeMap::new(),
            deferrals: BTreeMap::new(),
            opening: None,
            attachment: None,
            heard: clock::now(),
            pinged: false,
            fault: None,
            closing: None,
        }
    }

    fn tag(&mut self) -> Tag {
        self.next_tag = self.next_tag.wrapping_add(1).max(1);
        Tag(self.next_tag)
    }

    fn send(&mut self, tag: Tag, message: &Message, ctx: &mut Context<Self>) {
        let sent = self.link.as_ref().map(|link| link.send(tag, message));
        if let Some(Err(error)) = sent {
            self.lost(&error.to_string(), ctx);
        }
    }

    fn request(&mut self, request: Request, ctx: &mut Context<Self>) -> ResponseFuture<Result<Message, AskError>> {
        if let Some(fault) = &self.fault {
            return std::future::ready(Err(fault.clone())).boxed_local();
        }
        let (reply, answer) = oneshot::channel();
        let tag = self.tag();
        self.pending.insert(tag, Pending { request, reply });
        if self.ready {
            self.ask(tag, ctx);
        }
        async move { answer.await.unwrap_or(Err(AskError::Closed)) }.boxed_local()
    }

    fn connect(&mut self, ctx: &mut Context<Self>) {
        let connector = Arc::clone(&self.connector);
        let connecting = async move { open(connector.as_ref(), None, Purpose::Control).await };
        ctx.spawn(connecting.into_actor(self).map(|opened, channel, ctx| match opened {
            Ok((connection, hello)) => channel.connected(connection, &hello, ctx),
            Err(fault) => channel.connect_failed(fault, ctx),
        }));
    }

    fn connected(&mut self, connection: Connection, hello: &Hello, ctx: &mut Context<Self>) {
        let now = clock::now();
        if self.closing.is_some() {
            return ctx.stop();
        }
        debug!(server = hello.software, "connected");
        self.reconnect.connected(now);
        self.heard = now;
        self.pinged = false;
        self.nonce = self.connector.authority().map_or(hello.nonce, |authority| authority.bind(&hello.nonce));
        self.link = Some(Link::spawn(connection, None, None, ctx));
        if self.attachment.as_ref().is_some_and(|attachment| attachment.opened.is_some()) {
            let tag = self.tag();
            self.own = Some(Own::Attach(tag));
            self.ask(tag, ctx);
        } else {
            self.become_ready(ctx);
        }
    }

    /// Whether an answer with this tag is expected.
    fn awaits(&self, tag: Tag) -> bool {
        let own = self.own.map(Own::tag);
        let opening = self.opening.as_ref().map(|(opening, _)| *opening);
        own == Some(tag) || opening == Some(tag) || self.pending.contains_key(&tag)
    }

    /// What was asked under this tag and is not answered, as it is asked on the connection of the moment.
    fn asked(&self, tag: Tag) -> Option<Message> {
        if let (Some(own), Some(attachment)) = (self.own.filter(|own| own.tag() == tag), &self.attachment) {
            return match (own, &attachment.opened) {
                (Own::Attach(_), Some(SessionOpened { session, token, .. })) => {
                    let (session, token, incarnation) = (*session, *token, attachment.incarnation);
                    Some(Message::Attach(Attach { session, token, incarnation }))
                }
                (Own::Resume(_), opened) => {
                    let old = opened.as_ref().map(|opened| opened.session);
                    let old = old.filter(|_| !planted::here(Bug::ForgetsTheOldSession));
                    Some(Message::OpenSession((attachment.opener)(&self.nonce, old)))
                }
                (Own::Attach(_), None) => None,
            };
        }
        if let (Some((opening, _)), Some(attachment)) = (&self.opening, &self.attachment)
            && *opening == tag
        {
            return Some(Message::OpenSession((attachment.opener)(&self.nonce, None)));
        }
        self.pending.get(&tag).map(|pending| pending.request.on(&self.nonce))
    }

    fn ask(&mut self, tag: Tag, ctx: &mut Context<Self>) {
        match self.asked(tag) {
            Some(message) => self.send(tag, &message, ctx),
            // The session was forgotten meanwhile: there is nothing to attach to, and everything else may be asked.
            None if self.own.is_some_and(|own| own.tag() == tag) => self.become_ready(ctx),
            None => {}
        }
    }

    /// The server wants to be asked again later. Another connection asks by itself.
    fn deferred(&mut self, tag: Tag, defer: Defer, ctx: &mut Context<Self>) {
        if !self.awaits(tag) {
            return;
        }
        let now = clock::now();
        let Next::RetryAt(at) = self.reconnect.deferred(now, Duration::from_millis(defer.milliseconds)) else { return };
        debug!(milliseconds = defer.milliseconds, "the server asks to wait");
        let asking = ctx.run_later(at.saturating_duration_since(now), move |channel, ctx| {
            channel.deferrals.remove(&tag);
            channel.ask(tag, ctx);
        });
        if let Some(earlier) = self.deferrals.insert(tag, asking) {
            ctx.cancel_future(earlier);
        }
    }

    fn become_ready(&mut self, ctx: &mut Context<Self>) {
        self.ready = true;
        self.own = None;
        if let Some(tag) = self.opening.as_ref().map(|(tag, _)| *tag) {
            self.ask(tag, ctx);
        }
        let again: Vec<_> = self.pending.keys().copied().collect();
        for tag in again.into_iter().filter(|_| !planted::here(Bug::ForgetsUnansweredRequests)) {
            self.ask(tag, ctx);
        }
    }

    fn connect_failed(&mut self, fault: ConnectFault, ctx: &mut Context<Self>) {
        match self.reconnect.failed(clock::now()) {
            Next::RetryAt(at) if fault.retry && self.closing.is_none() => {
                debug!(%fault, "connecting failed; trying again");
                let wait = at.saturating_duration_since(clock::now());
                ctx.run_later(wait, Self::connect);
            }
            _ => self.fail(&AskError::Unreachable(fault), ctx),
        }
    }

    /// The connection of the moment is lost; everything that is not answered is asked again over the next one.
    fn lost(&mut self, reason: &str, ctx: &mut Context<Self>) {
        let Some(link) = self.link.take() else { return };
        link.cut(ctx);
        for (_, asking) in std::mem::take(&mut self.deferrals) {
            ctx.cancel_future(asking);
        }
        self.ready = false;
        self.own = None;
        if self.closing.is_some() {
            return ctx.stop();
        }
        if self.attachment.is_some() {
            warn!(reason, "the control connection was lost; reconnecting");
        }
        let fault = ConnectFault::passing(format!("the connection to {} was lost: {reason}", self.connector.target()));
        self.connect_failed(fault, ctx);
    }

    /// Nothing will be answered any more.
    fn fail(&mut self, error: &AskError, ctx: &mut Context<Self>) {
        self.fault = Some(error.clone());
        if let Some(dispatcher) = self.attachment.as_ref().and_then(|attachment| attachment.dispatcher.as_ref()) {
            dispatcher.failed.do_send(DispatchFailed(error.to_string()));
        }
        for (_, pending) in std::mem::take(&mut self.pending) {
            // Whoever asked may have stopped waiting.
            let _ = pending.reply.send(Err(error.clone()));
        }
        if let Some((_, reply)) = self.opening.take() {
            let _ = reply.send(Err(error.clone()));
        }
        if self.closing.is_some() {
            ctx.stop();
        }
    }

    fn receive(&mut self, tag: Tag, message: Message, ctx: &mut Context<Self>) {
        self.heard = clock::now();
        self.pinged = false;
        if let Message::Defer(defer) = message {
            return self.deferred(tag, defer, ctx);
        }
        match self.own {
            Some(Own::Attach(own)) if own == tag => return self.attach_answered(message, ctx),
            Some(Own::Resume(own)) if own == tag => return self.resume_answered(message, ctx),
            _ => {}
        }
        if self.opening.as_ref().is_some_and(|(own, _)| *own == tag) {
            return self.open_answered(message);
        }
        match (message, self.pending.contains_key(&tag)) {
            (message, true) => self.answer(tag, message),
            (Message::Ping(ping), false) => {
                let pong = Pong { stamp: ping.stamp };
                self.send(tag, &Message::Pong(pong), ctx);
            }
            (Message::Retransmit(retransmit), false) => {
                if let Some(dispatcher) = self.attachment.as_ref().and_then(|a| a.dispatcher.as_ref()) {
                    dispatcher.again.do_send(SendAgain(retransmit.ranges));
                }
            }
            (Message::Refused(refusal), false) => self.refused_unasked(refusal, ctx),
            _ => {}
        }
    }

    fn answer(&mut self, tag: Tag, message: Message) {
        self.reconnect.progressed(clock::now());
        if let Some(pending) = self.pending.remove(&tag) {
            let answer = match message {
                Message::Refused(refusal) => Err(AskError::Refused(refusal)),
                other => Ok(other),
            };
            let _ = pending.reply.send(answer);
        }
    }

    /// The server says on its own that it stops, or that the session has ended.
    fn refused_unasked(&mut self, refusal: Refused, ctx: &mut Context<Self>) {
        if refusal.code == RefusalCode::Stopping {
            self.lost(&refusal.message, ctx);
        } else if self.attachment.is_some() {
            self.fail(&AskError::Refused(refusal), ctx);
        }
    }

    fn tick(&mut self, ctx: &mut Context<Self>) {
        let now = clock::now();
        if self.closing.as_ref().is_some_and(|(since, _)| now.saturating_duration_since(*since) >= CLOSE_MAX) {
            return ctx.stop();
        }
        let Some(link) = &self.link else { return };
        if link.take_progress() {
            self.heard = now;
        }
        let quiet = now.saturating_duration_since(self.heard);
        if quiet >= SILENCE_MAX && !planted::here(Bug::WaitsForAStalledServer) {
            self.lost("the server says nothing", ctx);
        } else if quiet >= PING_AFTER && !self.pinged {
            self.pinged = true;
            self.send(Tag::default(), &Message::Ping(Ping { stamp: 0 }), ctx);
        }
    }
}

impl Actor for ControlChannel {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        // Its callers bound what they ask; the mailbox must take bursts of queries.
        ctx.set_mailbox_capacity(64);
        ctx.run_interval(TICK, Self::tick);
        self.connect(ctx);
    }

    fn stopped(&mut self, ctx: &mut Context<Self>) {
        if let Some((_, closed)) = self.closing.take() {
            let _ = closed.send(());
        }
        self.fail(&AskError::Closed, ctx);
    }
}

impl Handler<AskServer> for ControlChannel {
    type Result = ResponseFuture<Result<Message, AskError>>;

    fn handle(&mut self, AskServer(message): AskServer, ctx: &mut Context<Self>) -> Self::Result {
        let committed = self.attachment.as_ref().and_then(|attachment| attachment.committed.clone());
        if let (Message::Commit(_), Some(committed)) = (&message, committed) {
            return std::future::ready(Ok(Message::Committed(committed))).boxed_local();
        }
        self.request(Request::Fixed(message), ctx)
    }
}

impl Handler<AskProved> for ControlChannel {
    type Result = ResponseFuture<Result<Message, AskError>>;

    fn handle(&mut self, AskProved(prover): AskProved, ctx: &mut Context<Self>) -> Self::Result {
        self.request(Request::Proved(prover), ctx)
    }
}

impl Handler<BeginSession> for ControlChannel {
    type Result = ResponseFuture<Result<SessionOpened, AskError>>;

    fn handle(&mut self, begin: BeginSession, ctx: &mut Context<Self>) -> Self::Result {
        if let Some(fault) = &self.fault {
            return std::future::ready(Err(fault.clone())).boxed_local();
        }
        let (reply, answer) = oneshot::channel();
        let tag = self.tag();
        self.opening = Some((tag, reply));
        self.attachment = Some(Attachment {
            opener: begin.opener,
            dispatcher: begin.dispatcher,
            opened: None,
            incarnation: Incarnation(0),
            committed: None,
        });
        if self.ready {
            self.ask(tag, ctx);
        }
        async move { answer.await.unwrap_or(Err(AskError::Closed)) }.boxed_local()
    }
}

impl Handler<TellServer> for ControlChannel {
    type Result = ();

    fn handle(&mut self, TellServer(message): TellServer, ctx: &mut Context<Self>) {
        if self.ready {
            self.send(Tag::default(), &message, ctx);
        }
    }
}

impl Handler<ForgetSession> for ControlChannel {
    type Result = ();

    fn handle(&mut self, _: ForgetSession, _: &mut Context<Self>) {
        self.attachment = None;
    }
}

impl Handler<CloseChannel> for ControlChannel {
    type Result = ResponseFuture<()>;

    fn handle(&mut self, _: CloseChannel, ctx: &mut Context<Self>) -> Self::Result {
        let (sender, receiver) = oneshot::channel();
        self.attachment = None;
        self.closing = Some((clock::now(), sender));
        if !matches!(self.link.as_ref().map(Link::close), Some(Ok(()))) {
            ctx.stop();
        }
        async move { receiver.await.unwrap_or(()) }.boxed_local()
    }
}

impl Handler<FrameArrived> for ControlChannel {
    type Result = ();

    fn handle(&mut self, arrived: FrameArrived, ctx: &mut Context<Self>) {
        match Message::decode(&arrived.frame) {
            Ok((tag, message)) => self.receive(tag, message, ctx),
            Err(error) => self.lost(&error.to_string(), ctx),
        }
    }
}

impl Handler<ReadEnded> for ControlChannel {
    type Result = ();

    fn handle(&mut self, ended: ReadEnded, ctx: &mut Context<Self>) {
        match ended {
            ReadEnded::InOrder => self.lost("closed by the server", ctx),
            ReadEnded::Broken(reason) | ReadEnded::Malformed(reason) => self.lost(&reason, ctx),
        }
    }
}

impl Handler<Wrote> for ControlChannel {
    type Result = ();

    fn handle(&mut self, wrote: Wrote, ctx: &mut Context<Self>) {
        match wrote {
            Wrote::Failed(reason) => self.lost(&reason, ctx),
            // Closing: the server's half follows, or the tick ends the wait.
            Wrote::Closed | Wrote::Idle | Wrote::Block(_) => {}
        }
    }
}
