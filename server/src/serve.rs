//! The server process: takes the data directory, opens what it needs, runs until it is told to stop.
//!
//! Order at the start: lock, catalog, identities, certificates, administration socket. At the end the reverse, by drop.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, Addr};
use actix_rt::Arbiter;
use anyhow::Context;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use strandline_actors::session::SessionView;
use strandline_actors::session_registry::ObserveSessions;
use strandline_messages::AgentId;
use strandline_messages::wire::SessionKind;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_rustls::TlsAcceptor;

use crate::admin::{AdminError, AdminSocket, Administrator, RepositoryStatus, ServerState, SessionStatus};
use crate::admission::Admission;
use crate::config::{Config, Limits};
use crate::core::{CoreSettings, ServerCore};
use crate::engine::{Engine, EngineOptions};
use crate::host::Renewer;
use crate::listener::{Door, Listener, StopListening};
use crate::maintenance::{LookAgain, Maintenance, StopMaintenance};
use crate::pki::Authority;
use crate::storage::files::is_no_room;
use crate::tenancy::Tenancy;
use crate::tls::{ServerCertificate, server_config};

/// How often it is looked whether the server's certificate is near its end.
const CERTIFICATE_CHECK: Duration = Duration::from_hours(24);

/// What a server is started with.
#[derive(Debug, Clone)]
pub struct ServeOptions {
    /// The data directory.
    pub data: PathBuf,
    /// The configuration file, read again at SIGHUP.
    pub config_path: PathBuf,
    /// The configuration as read.
    pub config: Config,
    /// How long to wait for the data directory's lock.
    pub lock_wait: Duration,
}

/// What the operating system told the process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// SIGTERM or SIGINT: finish and end.
    Stop,
    /// SIGHUP: read the configuration again.
    Reload,
}

/// The signals that a server minds.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// From now on these signals no longer end the process by themselves.
    pub fn listen() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// The next one. Can be dropped and called again without losing any.
    pub async fn next(&mut self) -> Told {
        tokio::select! {
            _ = self.terminate.recv() => Told::Stop,
            _ = self.interrupt.recv() => Told::Stop,
            _ = self.hangup.recv() => Told::Reload,
        }
    }
}

/// What the running server tells administrators.
struct Serving {
    core: ServerCore,
    engine: Arc<Engine>,
    tenancy: Tenancy,
    certificate: Arc<ServerCertificate>,
    maintenance: Addr<Maintenance>,
}

impl ServerState for Serving {
    fn uptime(&self) -> Option<Duration> {
        Some(self.core.uptime())
    }

    async fn sessions(&self) -> Vec<SessionStatus> {
        // The registry ends only with the process.
        let seen = self.core.registry().send(ObserveSessions).await.unwrap_or_default();
        let status = |view: SessionView| SessionStatus {
            id: view.status.session.to_string(),
            kind: match view.kind {
                SessionKind::Backup => "backup".to_owned(),
                SessionKind::Restore => "restore".to_owned(),
                SessionKind::Repack => "repack".to_owned(),
            },
            tenant: view.peer.tenant.to_string(),
            repository: view.status.repository.to_string(),
            agent: view.peer.agent.to_string(),
            state: view.status.state,
            streams: view.status.streams,
            opened_ns: view.opened_ns,
            watermark: view.status.watermark,
        };
        seen.into_iter().map(status).collect()
    }

    fn certificate_expires_s(&self) -> Option<i64> {
        Some(self.certificate.expires_s())
    }

    async fn repositories(&self) -> Result<Vec<RepositoryStatus>, String> {
        let mut found = Vec::new();
        for tenant in self.tenancy.tenants().await.map_err(|error| error.to_string())? {
            for file in self.engine.repositories(&tenant.name).await.map_err(|error| error.to_string())? {
                let repository = self.engine.repository(&tenant.name, &file.name).await;
                let repository = repository.map_err(|error| error.to_string())?;
                let totals = repository.totals().await.map_err(|error| error.to_string())?;
                found.push(RepositoryStatus {
                    tenant: tenant.name.to_string(),
                    name: file.name.to_string(),
                    id: file.id.to_string(),
                    snapshots: totals.snapshots,
                    stored_bytes: totals.stored_bytes,
                });
            }
        }
        Ok(found)
    }

    fn engine(&self) -> Option<&Engine> {
        Some(&self.engine)
    }

    fn maintenance_changed(&self) {
        // As many as there are administrators' connections.
        self.maintenance.do_send(LookAgain);
    }

    fn revoked(&self, agent: AgentId) {
        self.core.close_agent(agent);
    }
}

/// Runs the server until SIGTERM or SIGINT.
pub async fn serve(options: ServeOptions) -> anyhow::Result<()> {
    let ServeOptions { data, config_path, config, lock_wait } = options;
    let mut signals = Signals::listen().context("cannot listen to signals")?;
    let descriptors = raise_descriptor_limit();
    let engine = Arc::new(Engine::open(&data, EngineOptions { lock_wait }).await?);
    let tenancy = Tenancy::open(engine.pool().clone(), &data).await?;
    let authority = Arc::new(Authority::load(&data)?);
    let certificate = Arc::new(ServerCertificate::new(authority.server(&config.names)?)?);
    let core = ServerCore::start(Arc::clone(&engine), CoreSettings::new(&config, authority.hash()));
    core.renew_with(Renewer {
        tenancy: tenancy.clone(),
        authority: Arc::clone(&authority),
        validity: config.certificates.agent_validity,
    });
    let door = Arc::new(Door {
        tls: TlsAcceptor::from(server_config(&authority, Arc::clone(&certificate))?),
        tenancy: tenancy.clone(),
        authority: Arc::clone(&authority),
        agent_validity: config.certificates.agent_validity,
        core: core.clone(),
        admission: Admission::new(within(config.limits.clone(), descriptors)),
    });
    let workers: Vec<_> = (0..worker_count()).map(|_| Arbiter::new()).collect();
    let listener = Listener::bind(&config.listen, door, workers.iter().map(Arbiter::handle).collect())?;
    let addresses = listener.addresses();
    let listener = listener.start();
    let maintenance = Maintenance::new(Arc::clone(&engine)).start();
    let state = Serving {
        core: core.clone(),
        engine: Arc::clone(&engine),
        tenancy: tenancy.clone(),
        certificate: Arc::clone(&certificate),
        maintenance: maintenance.clone(),
    };
    // A port that the system chose is the one to put into tokens.
    let told = Config { listen: addresses.clone(), ..config.clone() };
    let administrator = Administrator::new(data.clone(), told, tenancy, Arc::clone(&authority), state);
    let socket = match AdminSocket::bind(&data) {
        Err(AdminError::Io { path, source }) if is_no_room(&source) => {
            tracing::warn!(data = %path.display(), error = %source, "no administration while this server runs");
            None
        }
        other => Some(other?),
    };
    tracing::info!(data = %data.display(), listening = ?addresses, "server started");

    let mut grace = std::pin::pin!(tokio::time::sleep(config.session_grace));
    let mut swept = false;
    let mut names = config.names.clone();
    let mut administration = std::pin::pin!(async {
        match &socket {
            Some(socket) => socket.serve(&administrator).await,
            None => std::future::pending().await,
        }
    });
    loop {
        tokio::select! {
            never = &mut administration => match never {},
            told = signals.next() => match told {
                Told::Stop => break,
                Told::Reload => names = reload(&config_path, &config, names),
            },
            () = &mut grace, if !swept => {
                swept = true;
                core.expire_left_open(&engine, "the server was restarted and the agent did not come back").await;
            }
            () = tokio::time::sleep(CERTIFICATE_CHECK) => {}
        }
        refresh_certificate(&authority, &certificate, &names);
    }
    tracing::info!("stopping: no new connections, streams drain to the acknowledged point");
    // The listener ends only with the process.
    let _ = listener.send(StopListening).await;
    let _ = maintenance.send(StopMaintenance).await;
    core.stop().await;
    for worker in workers {
        worker.stop();
    }
    // What administrators asked for holds what the engine needs for closing; it is told to stop, and must be able to.
    tokio::select! {
        never = &mut administration => match never {},
        closed = engine.close() => closed?,
    }
    tracing::info!("server stopped");
    Ok(())
}

/// Threads for connections: one per processor.
fn worker_count() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from)
}

/// Every connection is a descriptor: as many as the system allows. Returns how many that are; `None`: any number.
fn raise_descriptor_limit() -> Option<u64> {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "the limit of open descriptors could not be raised");
    }
    getrlimit(Resource::Nofile).current
}

/// A quarter of the descriptors is left for packs and catalog: a server that cannot open them serves nobody.
fn within(mut limits: Limits, descriptors: Option<u64>) -> Limits {
    let most = descriptors.map_or(usize::MAX, |most| usize::try_from(most / 4 * 3).unwrap_or(usize::MAX));
    limits.connections = limits.connections.min(most);
    limits
}

/// Reads the configuration again. The certificate's names take effect at once; returns them. A configuration that cannot
/// be used changes nothing.
fn reload(path: &Path, running: &Config, names: Vec<String>) -> Vec<String> {
    match Config::load(path) {
        Ok(new) => {
            if (Config { names: running.names.clone(), ..new.clone() }) != *running {
                tracing::warn!(
                    "the configuration has changed in more than `names`: the rest takes effect at the next start"
                );
            }
            new.names
        }
        Err(error) => {
            tracing::error!(%error, "the configuration was not read again; the server goes on with the old one");
            names
        }
    }
}

/// Makes a new server certificate if the names have changed or its end is near; an error leaves the one in use.
pub fn refresh_certificate(authority: &Authority, certificate: &ServerCertificate, names: &[String]) {
    let replaced = authority.server(names).map_err(anyhow::Error::from);
    match replaced.and_then(|identity| Ok(certificate.replace(identity)?)) {
        Ok(true) => tracing::info!(?names, "new server certificate"),
        Ok(false) => {}
        Err(error) => {
            tracing::error!(%error, "the server's certificate could not be renewed; the one in use stays");
        }
    }
}
