//! `SessionRegistry`: id → session. The only place that creates sessions and the only door for streams.
//!
//! Registration precedes join (G3): the answer to `OpenSession` is sent only after the session stands in the map, and a
//! stream can only ask to join with the token of that answer. It ends when the server stops.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use actix::{
    Actor, ActorFutureExt, Addr, AsyncContext, Context, Handler, Recipient, ResponseActFuture, ResponseFuture,
    WrapFuture,
};
use futures_util::FutureExt;
use strandline_messages::mail::Peer;
use strandline_messages::wire::{
    Attach, Attached, Committed, Message, OpenSession, RefusalCode, Refused, SessionKind, SessionOpened,
};
use strandline_messages::{AgentId, Incarnation, SessionId, SessionToken};
use tracing::{error, info, warn};

use crate::machines::session::{SessionLimits, Terminal};
use crate::planted::{self, Bug};
use crate::ports::{Host, Opening, SessionStore};
use crate::session::{
    AttachControl, MakeRoom, Observe, Push, Quiesce, Revoke, Session, SessionEnded, SessionSeed, SessionView, Supersede,
};
use crate::stream::{JoinGranted, JoinSession};

/// What sessions are given.
#[derive(Clone, Debug)]
pub struct SessionSettings {
    /// Time limits.
    pub limits: SessionLimits,
    /// Backup: window that agents are told. Bytes, at least one maximal block.
    pub window_bytes: u64,
    /// Restore: first credit. Bytes, at least one maximal block; opened blocks are several times as large.
    pub credit_bytes: u64,
    /// Most streams of one session.
    pub max_streams: u16,
    /// Most sessions of one agent. When it opens more, its oldest one that nobody is connected to ends.
    pub agent_sessions_max: usize,
    /// Where streams connect to; empty: where the control connection is.
    pub data_addresses: Vec<String>,
}

/// From a control connection: open a session for this peer.
#[derive(actix::Message)]
#[rtype(result = "Result<Registered, Refused>")]
pub struct RegisterSession {
    /// Who asks.
    pub peer: Peer,
    /// The request.
    pub request: OpenSession,
    /// What this server sent in its `Hello`.
    pub nonce: [u8; 32],
    /// Takes what the server says unasked.
    pub control: Recipient<Push>,
}

/// Answer to [`RegisterSession`].
pub struct Registered {
    /// What to tell the agent.
    pub answer: Message,
    /// The session, unless it had committed before.
    pub session: Option<(Addr<Session>, Incarnation)>,
}

/// From a control connection: find the session again.
#[derive(actix::Message)]
#[rtype(result = "Result<(Addr<Session>, Attached), Refused>")]
pub struct AttachSession {
    /// Who asks.
    pub peer: Peer,
    /// The request.
    pub attach: Attach,
    /// Takes what the server says unasked.
    pub control: Recipient<Push>,
}

/// Take no more sessions and let all streams drain.
#[derive(actix::Message)]
#[rtype(result = "()")]
pub struct StopServing;

/// The agent was revoked: its sessions end.
#[derive(actix::Message)]
#[rtype(result = "()")]
pub struct EndSessionsOf(pub AgentId);

/// The open sessions.
#[derive(actix::Message)]
#[rtype(result = "Vec<SessionView>")]
pub struct ObserveSessions;

struct Entry {
    session: Addr<Session>,
    peer: Peer,
    token: SessionToken,
    /// Counts the sessions of this registry: a smaller one is older.
    number: u64,
    store: Arc<dyn SessionStore>,
}

/// See the module.
pub struct SessionRegistry {
    host: Arc<dyn Host>,
    settings: SessionSettings,
    sessions: BTreeMap<SessionId, Entry>,
    opened: u64,
    stopping: bool,
}

impl SessionRegistry {
    /// No sessions yet.
    pub fn new(host: Arc<dyn Host>, settings: SessionSettings) -> Self {
        Self { host, settings, sessions: BTreeMap::new(), opened: 0, stopping: false }
    }

    fn find(&self, peer: &Peer, id: SessionId, token: &SessionToken) -> Result<&Entry, Refused> {
        // One answer for "does not exist", "not yours" and "wrong token": existence is not told.
        self.sessions
            .get(&id)
            .filter(|entry| entry.peer == *peer && entry.token == *token && entry.session.connected())
            .ok_or_else(|| Refused::new(RefusalCode::NoSuchSession, "the server does not have this session"))
    }

    fn refuse_if_stopping(&self) -> Result<(), Refused> {
        if self.stopping { Err(Refused::new(RefusalCode::Stopping, "the server is stopping")) } else { Ok(()) }
    }

    fn register(
        &mut self,
        id: SessionId,
        request: RegisterSession,
        opening: Opening,
        ctx: &mut Context<Self>,
    ) -> Registered {
        let store = match opening {
            Opening::AlreadyCommitted { snapshot, receipt } => {
                let answer = Message::Committed(Committed { snapshot, receipt: receipt.into() });
                return Registered { answer, session: None };
            }
            Opening::Granted { store } => store,
        };
        let old = request.request.resume_of.and_then(|old| self.sessions.get(&old));
        if let Some(old) = old.filter(|old| old.peer == request.peer) {
            old.session.do_send(Supersede);
        }
        let (peer, token) = (request.peer, SessionToken(self.host.random()));
        let kind = request.request.kind;
        info!(session = %id.short(), tenant = %peer.tenant, agent = %peer.agent.short(), ?kind, "session opened");
        let session = Session::new(SessionSeed {
            id,
            kind,
            peer: peer.clone(),
            repository: request.request.repository,
            store: Arc::clone(&store),
            limits: self.settings.limits,
            credit: self.settings.credit_bytes,
            control: request.control,
            registry: ctx.address().recipient(),
        })
        .start();
        self.opened += 1;
        let entry = Entry { session: session.clone(), peer, token, number: self.opened, store };
        if planted::here(Bug::AnswersBeforeItRegisters) {
            ctx.run_later(Duration::from_millis(200), move |registry, _| {
                registry.sessions.insert(id, entry);
            });
        } else {
            self.sessions.insert(id, entry);
        }
        let incarnation = Incarnation(1);
        let answer = Message::SessionOpened(SessionOpened {
            session: id,
            token,
            incarnation,
            window_bytes: match kind {
                SessionKind::Backup | SessionKind::Repack => self.settings.window_bytes,
                SessionKind::Restore => self.settings.credit_bytes,
            },
            max_streams: self.settings.max_streams,
            data_addresses: self.settings.data_addresses.clone(),
        });
        Registered { answer, session: Some((session, incarnation)) }
    }
}

impl SessionRegistry {
    /// The sessions of an agent that has as many as it may, the oldest first; none while it has fewer. The one that
    /// `resumed` names does not count: the new session takes its place.
    fn crowd(&self, agent: AgentId, resumed: Option<SessionId>) -> Vec<Addr<Session>> {
        let counts = |(id, entry): &(&SessionId, &Entry)| entry.peer.agent == agent && Some(**id) != resumed;
        let mut theirs: Vec<_> = self.sessions.iter().filter(counts).map(|(_, entry)| entry).collect();
        if theirs.len() < self.settings.agent_sessions_max {
            return Vec::new();
        }
        theirs.sort_by_key(|entry| entry.number);
        theirs.into_iter().map(|entry| entry.session.clone()).collect()
    }

    /// A session that broke down takes nobody with it. Its lease must not hold on for ever.
    fn bury(&mut self, id: SessionId, entry: &Entry, ctx: &mut Context<Self>) {
        error!(session = %id.short(), "the session broke down; other sessions go on");
        let recording = entry.store.end(Terminal::Failed, "the server broke down in this session".into());
        ctx.spawn(recording.into_actor(self).map(move |recorded, _, _| {
            if let Err(fault) = recorded {
                warn!(session = %id.short(), %fault, "the session's end could not be recorded");
            }
        }));
    }
}

async fn make_room(crowd: Vec<Addr<Session>>) -> Result<(), Refused> {
    let count = crowd.len();
    for session in crowd {
        // One that has ended by itself meanwhile has made room, too.
        if session.send(MakeRoom).await.unwrap_or(true) {
            return Ok(());
        }
    }
    if count == 0 {
        return Ok(());
    }
    Err(Refused::new(RefusalCode::Full, format!("this machine has {count} sessions at once, as many as it may")))
}

impl Actor for SessionRegistry {
    type Context = Context<Self>;
}

impl Handler<RegisterSession> for SessionRegistry {
    type Result = ResponseActFuture<Self, Result<Registered, Refused>>;

    fn handle(&mut self, request: RegisterSession, _: &mut Context<Self>) -> Self::Result {
        if let Err(refusal) = self.refuse_if_stopping() {
            return Box::pin(actix::fut::ready(Err(refusal)));
        }
        let [id @ .., _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _] = self.host.random();
        let id = SessionId(id);
        let host = Arc::clone(&self.host);
        let crowd = self.crowd(request.peer.agent, request.request.resume_of);
        let (peer, asked, nonce) = (request.peer.clone(), request.request.clone(), request.nonce);
        let opening = async move {
            make_room(crowd).await?;
            host.open(peer, id, asked, nonce).await
        };
        let registering = opening
            .into_actor(self)
            .map(move |opening, registry, ctx| opening.map(|opening| registry.register(id, request, opening, ctx)));
        Box::pin(registering)
    }
}

impl Handler<JoinSession> for SessionRegistry {
    type Result = ResponseFuture<Result<JoinGranted, Refused>>;

    fn handle(&mut self, request: JoinSession, _: &mut Context<Self>) -> Self::Result {
        let found = self.refuse_if_stopping().and_then(|()| {
            if request.join.index.0 >= self.settings.max_streams {
                return Err(Refused::new(RefusalCode::Invalid, "more streams than the session allows"));
            }
            self.find(&request.peer, request.join.session, &request.join.token)
        });
        match found {
            Err(refusal) => std::future::ready(Err(refusal)).boxed_local(),
            Ok(entry) => {
                let joining = entry.session.send(request);
                async move { joining.await.unwrap_or_else(|_| Err(gone())) }.boxed_local()
            }
        }
    }
}

impl Handler<AttachSession> for SessionRegistry {
    type Result = ResponseFuture<Result<(Addr<Session>, Attached), Refused>>;

    fn handle(&mut self, request: AttachSession, _: &mut Context<Self>) -> Self::Result {
        match self.find(&request.peer, request.attach.session, &request.attach.token) {
            Err(refusal) => std::future::ready(Err(refusal)).boxed_local(),
            Ok(entry) => {
                let session = entry.session.clone();
                let attaching =
                    session.send(AttachControl { known: request.attach.incarnation, control: request.control });
                async move {
                    let attached = attaching.await.unwrap_or_else(|_| Err(gone()))?;
                    Ok((session, attached))
                }
                .boxed_local()
            }
        }
    }
}

fn gone() -> Refused {
    Refused::new(RefusalCode::NoSuchSession, "the session has just ended")
}

impl Handler<SessionEnded> for SessionRegistry {
    type Result = ();

    fn handle(&mut self, ended: SessionEnded, ctx: &mut Context<Self>) {
        let Some(entry) = self.sessions.remove(&ended.session) else { return };
        // When the server stops, sessions stay open in the catalog and can be resumed.
        if !ended.recorded && !self.stopping {
            self.bury(ended.session, &entry, ctx);
        }
    }
}

impl Handler<StopServing> for SessionRegistry {
    type Result = ();

    fn handle(&mut self, _: StopServing, _: &mut Context<Self>) {
        self.stopping = true;
        for entry in self.sessions.values() {
            entry.session.do_send(Quiesce);
        }
    }
}

impl Handler<EndSessionsOf> for SessionRegistry {
    type Result = ();

    fn handle(&mut self, EndSessionsOf(agent): EndSessionsOf, _: &mut Context<Self>) {
        for entry in self.sessions.values().filter(|entry| entry.peer.agent == agent) {
            entry.session.do_send(Revoke);
        }
    }
}

impl Handler<ObserveSessions> for SessionRegistry {
    type Result = ResponseFuture<Vec<SessionView>>;

    fn handle(&mut self, _: ObserveSessions, _: &mut Context<Self>) -> Self::Result {
        let asked: Vec<_> = self.sessions.values().map(|entry| entry.session.send(Observe)).collect();
        async move {
            let mut seen = Vec::with_capacity(asked.len());
            for asking in asked {
                seen.extend(asking.await.ok().flatten());
            }
            seen.sort_by_key(|view| view.opened_ns);
            seen
        }
        .boxed_local()
    }
}
