//! The server inside the agent's process, for a repository that is a local directory: same frames, no port.
//!
//! The only module that knows the server's crate. Engine and server actors run on an arbiter of their own; connections
//! are in-process pipes.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use actix_rt::{Arbiter, ArbiterHandle};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use strandline_actors::machines::session::SessionLimits;
use strandline_actors::machines::stream::StreamLimits;
use strandline_actors::runtime::transport::{ConnectFault, Connection, Connector};
use strandline_actors::session_registry::SessionSettings;
use strandline_messages::mail::Peer;
use strandline_messages::{AgentId, limits};
use strandline_server::core::{CREDIT_BYTES, CoreSettings, ServerCore};
use strandline_server::engine::{Engine, EngineError, EngineOptions};
use tokio::sync::oneshot;

/// What an in-process pipe holds before its writer waits, bytes.
const PIPE_BYTES: usize = 1 << 20;
/// The tenant of a directory that has no other.
pub const LOCAL_TENANT: &str = "local";
/// The name of the repository in such a directory.
pub const LOCAL_REPOSITORY: &str = "main";

/// Why a directory cannot be used as a repository.
#[derive(Debug, thiserror::Error)]
pub enum EmbeddedError {
    /// The engine says.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The directory is something else already.
    #[error("{} holds other files and no repository; nothing was changed: choose an empty or a new directory", path.display())]
    NotARepository {
        /// The directory.
        path: PathBuf,
    },
    /// There is nothing there.
    #[error("there is no repository in {}; `strand backup -r {} PATH…` makes one", path.display(), path.display())]
    Missing {
        /// The directory.
        path: PathBuf,
    },
    /// The thread of the embedded server ended.
    #[error("the embedded server ended early; run the command again")]
    Ended,
}

impl EmbeddedError {
    /// Whether another process has the directory.
    pub fn is_busy(&self) -> bool {
        matches!(self, Self::Engine(EngineError::Locked { .. }))
    }
}

/// Whether `directory` holds a repository.
pub fn is_repository(directory: &Path) -> bool {
    directory.join("storage").is_dir()
}

/// A running embedded server.
pub struct Embedded {
    arbiter: Arbiter,
    core: ServerCore,
    engine: Arc<Engine>,
    directory: PathBuf,
}

impl Embedded {
    /// Opens the directory, making it if `create` allows; waits for its lock at most `lock_wait`.
    pub async fn open(directory: &Path, create: bool, lock_wait: Duration) -> Result<Self, EmbeddedError> {
        check_directory(directory, create)?;
        let arbiter = Arbiter::new();
        let (reply, opened) = oneshot::channel();
        let path = directory.to_owned();
        let opening = async move {
            let options = EngineOptions { lock_wait };
            let opened = match Engine::open(&path, options).await {
                Err(error) => Err(error),
                Ok(engine) => {
                    let engine = Arc::new(engine);
                    let core = ServerCore::start(Arc::clone(&engine), settings());
                    // The agents of a directory's sessions live in the process that opened it.
                    core.expire_left_open(&engine, "the process that ran it has ended").await;
                    Ok((core, engine))
                }
            };
            // Whoever waits is in this process.
            let _ = reply.send(opened);
        };
        if !arbiter.spawn(opening) {
            return Err(EmbeddedError::Ended);
        }
        let (core, engine) = opened.await.map_err(|_| EmbeddedError::Ended)??;
        Ok(Self { arbiter, core, engine, directory: directory.to_owned() })
    }

    /// Connects to it.
    pub fn connector(&self) -> Arc<dyn Connector> {
        Arc::new(PipeConnector {
            core: self.core.clone(),
            arbiter: self.arbiter.handle(),
            target: self.directory.display().to_string(),
        })
    }

    /// Writes everything out and lets go of the directory.
    pub async fn close(self) -> Result<(), EmbeddedError> {
        let (reply, closed) = oneshot::channel();
        let (core, engine) = (self.core, self.engine);
        self.arbiter.spawn(async move {
            core.stop().await;
            let _ = reply.send(engine.close().await);
        });
        let closed = closed.await.map_err(|_| EmbeddedError::Ended)?;
        self.arbiter.stop();
        // The thread has nothing left to do but to end.
        let _ = self.arbiter.join();
        Ok(closed?)
    }
}

fn check_directory(directory: &Path, create: bool) -> Result<(), EmbeddedError> {
    if is_repository(directory) {
        return Ok(());
    }
    if !create {
        return Err(EmbeddedError::Missing { path: directory.to_owned() });
    }
    let entries = std::fs::read_dir(directory).map(|mut entries| entries.next().is_some());
    match entries {
        Ok(true) => Err(EmbeddedError::NotARepository { path: directory.to_owned() }),
        // Missing or empty; anything else the engine reports when it makes the directory.
        _ => Ok(()),
    }
}

fn settings() -> CoreSettings {
    CoreSettings {
        sessions: SessionSettings {
            limits: SessionLimits::default(),
            window_bytes: 64 << 20,
            credit_bytes: CREDIT_BYTES,
            max_streams: limits::STREAMS_MAX,
            agent_sessions_max: usize::MAX,
            data_addresses: Vec::new(),
        },
        streams: StreamLimits::default(),
        receive_bytes: 32 << 20,
        authority: None,
    }
}

struct PipeConnector {
    core: ServerCore,
    arbiter: ArbiterHandle,
    target: String,
}

impl Connector for PipeConnector {
    fn connect(&self, _address: Option<String>) -> BoxFuture<'static, Result<Connection, ConnectFault>> {
        let (core, arbiter, target) = (self.core.clone(), self.arbiter.clone(), self.target.clone());
        async move {
            let ended = || ConnectFault::lasting(format!("the embedded server of {target} has ended"));
            let Ok(tenant) = LOCAL_TENANT.parse() else { return Err(ended()) };
            let (ours, theirs) = tokio::io::duplex(PIPE_BYTES);
            let serving = async move {
                let peer = Peer { tenant, agent: AgentId([0; 16]) };
                if let Err(error) = core.serve(Box::new(theirs), peer).await {
                    tracing::warn!(%error, "an in-process connection ended in its greeting");
                }
            };
            if arbiter.spawn(serving) { Ok(Box::new(ours) as Connection) } else { Err(ended()) }
        }
        .boxed()
    }

    fn target(&self) -> String {
        self.target.clone()
    }
}
