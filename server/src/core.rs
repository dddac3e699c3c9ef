//! The server without its sockets: registry, control connections and streams over any [`Connection`].
//!
//! `listener` feeds it TLS connections; an agent's embedded server feeds it in-process pipes. Each accepted connection is
//! greeted and then owned by exactly one actor.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, Addr};
use parking_lot::Mutex;
use strandline_actors::control_host::{CloseControl, ControlHost};
use strandline_actors::machines::session::SessionLimits;
use strandline_actors::machines::stream::StreamLimits;
use strandline_actors::ports::Host;
use strandline_actors::runtime::clock;
use strandline_actors::runtime::transport::{Connection, LinkError, accept};
use strandline_actors::session_registry::{
    EndSessionsOf, ObserveSessions, SessionRegistry, SessionSettings, StopServing,
};
use strandline_actors::stream::{Origin, Stream};
use strandline_messages::identity::AuthorityHash;
use strandline_messages::mail::Peer;
use strandline_messages::wire::Purpose;
use strandline_messages::{AgentId, SessionId};
use tokio::sync::Semaphore;

use crate::config::Config;
use crate::engine::{Engine, SessionEnd};
use crate::host::{EngineHost, Renewer};

/// How long streams may take to drain when the server stops.
const DRAIN_MAX: Duration = Duration::from_secs(7);
/// How long control connections may take to close after that.
const CLOSE_MAX: Duration = Duration::from_secs(2);

/// First credit of a restore session, bytes: more than one maximal block. Opened blocks are several times as large.
pub const CREDIT_BYTES: u64 = 16 << 20;

/// Limits of the sessions of one server.
#[derive(Clone, Debug)]
pub struct CoreSettings {
    /// What sessions are given.
    pub sessions: SessionSettings,
    /// Time limits of streams.
    pub streams: StreamLimits,
    /// Bytes of received blocks that all streams together may hold before they are durable.
    pub receive_bytes: usize,
    /// Who vouches for the server; nobody does within one process.
    pub authority: Option<AuthorityHash>,
}

impl CoreSettings {
    /// Of a server that `authority` vouches for.
    pub fn new(config: &Config, authority: AuthorityHash) -> Self {
        Self {
            authority: Some(authority),
            sessions: SessionSettings {
                limits: SessionLimits { grace: config.session_grace, ..SessionLimits::default() },
                window_bytes: config.window_bytes,
                credit_bytes: CREDIT_BYTES,
                max_streams: config.max_streams,
                agent_sessions_max: config.limits.sessions_per_agent,
                data_addresses: Vec::new(),
            },
            streams: StreamLimits { progress: config.progress_timeout, ..StreamLimits::default() },
            receive_bytes: usize::try_from(config.receive_bytes).unwrap_or(usize::MAX),
        }
    }
}

/// The control connections that were accepted; those that have ended are removed when another comes.
type Controls = Vec<(AgentId, Addr<ControlHost>)>;

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct ServerCore {
    host: Arc<EngineHost>,
    registry: Addr<SessionRegistry>,
    streams: StreamLimits,
    authority: Option<AuthorityHash>,
    budget: Arc<Semaphore>,
    controls: Arc<Mutex<Controls>>,
}

impl ServerCore {
    /// Starts the registry on the current arbiter.
    pub fn start(engine: Arc<Engine>, settings: CoreSettings) -> Self {
        let host = Arc::new(EngineHost::new(engine));
        let registry = SessionRegistry::new(Arc::clone(&host) as Arc<dyn Host>, settings.sessions).start();
        host.observe(registry.clone());
        // A semaphore counts at most 2³² of a permit; blocks are counted in bytes.
        let bytes = settings.receive_bytes.min(Semaphore::MAX_PERMITS >> 4);
        Self {
            host,
            registry,
            streams: settings.streams,
            authority: settings.authority,
            budget: Arc::new(Semaphore::new(bytes)),
            controls: Arc::default(),
        }
    }

    /// Knows the sessions.
    pub fn registry(&self) -> &Addr<SessionRegistry> {
        &self.registry
    }

    /// From now on agents may renew their certificates.
    pub fn renew_with(&self, renewer: Renewer) {
        self.host.renew_with(renewer);
    }

    /// How long the server has been running.
    pub fn uptime(&self) -> Duration {
        clock::now().saturating_duration_since(self.host.started())
    }

    /// Greets a connection and gives it to its actor, on the current arbiter.
    pub async fn serve(&self, mut connection: Connection, peer: Peer) -> Result<(), LinkError> {
        let nonce = self.host.random();
        let hello = accept(&mut connection, nonce).await?;
        match hello.purpose {
            Purpose::Control => {
                let host = Arc::clone(&self.host) as Arc<dyn Host>;
                let agent = peer.agent;
                let nonce = self.authority.map_or(nonce, |authority| authority.bind(&nonce));
                let control = ControlHost::start_with(connection, peer, nonce, host, self.registry.clone());
                let mut controls = self.controls.lock();
                controls.retain(|(_, known)| known.connected());
                controls.push((agent, control));
            }
            Purpose::Data => {
                let registry = self.registry.clone().recipient();
                let budget = Arc::clone(&self.budget);
                Stream::start_on(None, Origin::Accepted { connection, peer, registry, budget }, self.streams);
            }
        }
        Ok(())
    }

    /// Ends the sessions of an agent that was revoked and closes its control connections.
    pub fn close_agent(&self, agent: AgentId) {
        self.registry.do_send(EndSessionsOf(agent));
        for (_, control) in self.controls.lock().iter().filter(|(known, _)| *known == agent) {
            control.do_send(CloseControl);
        }
    }

    /// Ends the sessions that an earlier process left open and nobody has resumed: their leases would hold on for ever.
    pub async fn expire_left_open(&self, engine: &Engine, reason: &str) {
        let seen = self.registry.send(ObserveSessions).await.unwrap_or_default();
        let alive: HashSet<SessionId> = seen.iter().map(|view| view.status.session).collect();
        for repository in engine.all() {
            let left = match repository.open_leases().await {
                Ok(leases) => leases.into_iter().filter(|lease| !alive.contains(&lease.session)),
                Err(error) => {
                    tracing::warn!(%error, "sessions that were left open cannot be listed");
                    continue;
                }
            };
            for lease in left {
                tracing::info!(session = %lease.session.short(), reason, "session ended");
                if let Err(error) = repository.end_session(&lease, SessionEnd::Expired, reason).await {
                    tracing::warn!(%error, "a session that was left open could not be ended");
                }
            }
        }
    }

    /// Takes no more sessions, lets streams drain to the acknowledged point, then closes the control connections.
    pub async fn stop(&self) {
        // The registry ends only with the process, so it takes the message.
        let _ = self.registry.send(StopServing).await;
        let deadline = clock::now() + DRAIN_MAX;
        while self.open_streams().await > 0 && clock::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        for (_, control) in self.controls.lock().iter() {
            control.do_send(CloseControl);
        }
        let deadline = clock::now() + CLOSE_MAX;
        while self.controls.lock().iter().any(|(_, control)| control.connected()) && clock::now() < deadline {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn open_streams(&self) -> u64 {
        let seen = self.registry.send(ObserveSessions).await.unwrap_or_default();
        seen.iter().map(|view| u64::from(view.status.streams)).sum()
    }
}
