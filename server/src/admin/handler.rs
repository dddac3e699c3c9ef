//! The one implementation of the administration commands.

use std::collections::BTreeMap;
use std::future::{Future, ready};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use strandline_actors::runtime::clock;
use strandline_messages::AgentId;
use strandline_messages::identity::EnrolmentToken;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::repositories::RepositoryRequest;
use super::{
    AdminHandler, AdminReply, AdminRequest, RepositoryStatus, SessionStatus, StatusReport, TokenCreated, keeper,
};
use crate::cli::{EXIT_FAILED, EXIT_LOCKED};
use crate::config::Config;
use crate::engine::{Engine, EngineError};
use crate::pki::Authority;
use crate::tenancy::{Tenancy, TenancyError};

/// What the commands ask of the process that they run in.
pub trait ServerState {
    /// Time since the server was started; none if no server runs.
    fn uptime(&self) -> Option<Duration>;
    /// Open sessions, oldest first.
    fn sessions(&self) -> impl Future<Output = Vec<SessionStatus>>;
    /// End of the certificate in use, seconds since 1970.
    fn certificate_expires_s(&self) -> Option<i64>;
    /// Repositories by tenant and name; or why they cannot be listed, for people.
    fn repositories(&self) -> impl Future<Output = Result<Vec<RepositoryStatus>, String>>;
    /// The open repositories; none if nothing but the identities is open.
    fn engine(&self) -> Option<&Engine>;
    /// Settings or results that maintenance goes by have changed.
    fn maintenance_changed(&self);
    /// An agent was revoked: its connections are to be closed.
    fn revoked(&self, agent: AgentId);
}

/// No server runs, and nothing but the identities is open.
#[derive(Debug, Clone, Copy, Default)]
pub struct Idle;

impl ServerState for Idle {
    fn uptime(&self) -> Option<Duration> {
        None
    }

    fn sessions(&self) -> impl Future<Output = Vec<SessionStatus>> {
        ready(Vec::new())
    }

    fn certificate_expires_s(&self) -> Option<i64> {
        None
    }

    fn repositories(&self) -> impl Future<Output = Result<Vec<RepositoryStatus>, String>> {
        ready(Ok(Vec::new()))
    }

    fn engine(&self) -> Option<&Engine> {
        None
    }

    fn maintenance_changed(&self) {}

    fn revoked(&self, _agent: AgentId) {}
}

/// Answers every administration request.
#[derive(Debug)]
pub struct Administrator<S> {
    data: PathBuf,
    config: Config,
    tenancy: Tenancy,
    authority: Arc<Authority>,
    state: S,
    /// Each long command that is under way holds one.
    long: Semaphore,
}

/// Commands that may take hours and are under way at once. Fewer than the connections that are served: whoever only asks is
/// always answered.
const LONG_MAX: usize = 8;

impl<S: ServerState> Administrator<S> {
    /// For the data directory `data`.
    pub fn new(data: PathBuf, config: Config, tenancy: Tenancy, authority: Arc<Authority>, state: S) -> Self {
        Self { data, config, tenancy, authority, state, long: Semaphore::new(LONG_MAX) }
    }

    async fn answer(&self, request: AdminRequest) -> Result<AdminReply, Failure> {
        match request {
            AdminRequest::TenantAdd { name } => Ok(AdminReply::Tenant(self.tenancy.add_tenant(&name).await?)),
            AdminRequest::TenantList {} => Ok(AdminReply::Tenants { tenants: self.tenancy.tenants().await? }),
            AdminRequest::TokenCreate { tenant, valid_for } => {
                let addresses = self.config.advertised();
                if addresses.is_empty() {
                    return Err(Failure::new(
                        "the configuration gives no address to put into the token: set `advertise`".to_owned(),
                    ));
                }
                let (secret, expires_ns) = self.tenancy.create_token(&tenant, valid_for).await?;
                let texts = addresses.iter().map(ToString::to_string).collect();
                let token = EnrolmentToken { addresses, authority: self.authority.hash(), secret }.to_string();
                Ok(AdminReply::Token(TokenCreated { token, tenant, expires_ns, addresses: texts }))
            }
            AdminRequest::AgentList { tenant } => {
                Ok(AdminReply::Agents { agents: self.tenancy.agents(tenant.as_ref()).await? })
            }
            AdminRequest::AgentRevoke { agent } => {
                let record = self.tenancy.revoke(agent).await?;
                tracing::info!(%agent, tenant = %record.tenant, "agent revoked");
                self.state.revoked(agent);
                Ok(AdminReply::Agent(record))
            }
            AdminRequest::Status {} => Ok(AdminReply::Status(Box::new(self.status().await?))),
            AdminRequest::Repository(request) => {
                let engine = self.state.engine();
                let engine = engine.ok_or_else(|| Failure::new("the repositories are not open".to_owned()))?;
                let _one_of_few = if request.is_long() { Some(self.take_long()?) } else { None };
                let reply = keeper::answer(engine, request).await?;
                self.state.maintenance_changed();
                Ok(AdminReply::Repository(reply))
            }
        }
    }

    fn take_long(&self) -> Result<SemaphorePermit<'_>, Failure> {
        self.long.try_acquire().map_err(|_| Failure {
            exit_code: EXIT_LOCKED,
            message: format!(
                "{LONG_MAX} collections and scrubs are under way already; nothing was done; try again later"
            ),
        })
    }

    async fn status(&self) -> Result<StatusReport, Failure> {
        let sessions = self.state.sessions().await;
        let mut sessions_by_state = BTreeMap::new();
        for session in &sessions {
            *sessions_by_state.entry(session.state.clone()).or_default() += 1;
        }
        let uptime = self.state.uptime();
        let space = rustix::fs::statvfs(&self.data).map_err(|error| {
            Failure::new(format!("cannot ask for the free space of {}: {error}", self.data.display()))
        })?;
        Ok(StatusReport {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            running: uptime.is_some(),
            listen: self.config.listen.iter().map(ToString::to_string).collect(),
            uptime_s: uptime.map(|uptime| uptime.as_secs()),
            sessions_by_state,
            streams: sessions.iter().map(|session| u64::from(session.streams)).sum(),
            sessions,
            tenants: self.tenancy.tenants().await?,
            repositories: self.state.repositories().await.map_err(Failure::new)?,
            free_bytes: space.f_bavail.saturating_mul(space.f_frsize),
            total_bytes: space.f_blocks.saturating_mul(space.f_frsize),
            authority_expires_s: self.authority.expires_s(),
            certificate_expires_s: self.state.certificate_expires_s(),
        })
    }
}

impl<S: ServerState> AdminHandler for Administrator<S> {
    async fn handle(&self, request: AdminRequest) -> AdminReply {
        let started = clock::now();
        let reply = self.answer(request).await;
        tracing::debug!(ms = started.elapsed().as_millis(), ok = reply.is_ok(), "administration request");
        reply.unwrap_or_else(AdminReply::from)
    }
}

/// Answers a request about repositories for a command that has opened them.
pub async fn ask_engine(engine: &Engine, request: RepositoryRequest) -> AdminReply {
    keeper::answer(engine, request).await.map_or_else(AdminReply::from, AdminReply::Repository)
}

/// Why a request was not carried out.
pub(super) struct Failure {
    /// The command's exit code.
    pub exit_code: u8,
    /// For people.
    pub message: String,
}

impl Failure {
    /// With exit code 1.
    pub fn new(message: String) -> Self {
        Self { exit_code: EXIT_FAILED, message }
    }
}

impl From<Failure> for AdminReply {
    fn from(Failure { exit_code, message }: Failure) -> Self {
        Self::Failed { exit_code, message }
    }
}

impl From<TenancyError> for Failure {
    fn from(error: TenancyError) -> Self {
        Self::new(error.to_string())
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        Self::new(error.to_string())
    }
}
