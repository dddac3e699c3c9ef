//! The server process: takes the data directory, opens what it needs, runs until it is told to stop.
//!
//! Order at the start: lock, catalog, identities, certificates, administration socket. At the end the reverse, by drop.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use strandline_actors::runtime::clock;
use strandline_messages::AgentId;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::admin::{AdminSocket, Administrator, Idle, RepositoryStatus, ServerState, SessionStatus};
use crate::config::Config;
use crate::data_dir::{DataLock, open_catalog};
use crate::pki::Authority;
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
#[derive(Debug)]
struct Serving {
    since: Instant,
    certificate: Arc<ServerCertificate>,
}

impl ServerState for Serving {
    fn uptime(&self) -> Option<Duration> {
        Some(clock::now().saturating_duration_since(self.since))
    }

    fn sessions(&self) -> Vec<SessionStatus> {
        Idle.sessions()
    }

    fn certificate_expires_s(&self) -> Option<i64> {
        Some(self.certificate.expires_s())
    }

    fn repositories(&self) -> impl Future<Output = Result<Vec<RepositoryStatus>, String>> {
        Idle.repositories()
    }

    fn revoked(&self, agent: AgentId) {
        Idle.revoked(agent);
    }
}

/// Runs the server until SIGTERM or SIGINT.
pub async fn serve(options: ServeOptions) -> anyhow::Result<()> {
    let ServeOptions { data, config_path, config, lock_wait } = options;
    let mut signals = Signals::listen().context("cannot listen to signals")?;
    let _lock = DataLock::take(&data, lock_wait).await?;
    let tenancy = Tenancy::open(open_catalog(&data).await?, &data).await?;
    let authority = Arc::new(Authority::load(&data)?);
    let certificate = Arc::new(ServerCertificate::new(authority.server(&config.names)?)?);
    let _tls = server_config(&authority, Arc::clone(&certificate))?;
    let state = Serving { since: clock::now(), certificate: Arc::clone(&certificate) };
    let administrator = Administrator::new(data.clone(), config.clone(), tenancy, Arc::clone(&authority), state);
    let socket = AdminSocket::bind(&data)?;
    tracing::info!(data = %data.display(), listen = ?config.listen, "server started");

    let mut names = config.names.clone();
    let mut administration = std::pin::pin!(socket.serve(&administrator));
    loop {
        tokio::select! {
            never = &mut administration => match never {},
            told = signals.next() => match told {
                Told::Stop => break,
                Told::Reload => names = reload(&config_path, &config, names),
            },
            () = tokio::time::sleep(CERTIFICATE_CHECK) => {}
        }
        refresh_certificate(&authority, &certificate, &names);
    }
    tracing::info!("server stopped");
    Ok(())
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
