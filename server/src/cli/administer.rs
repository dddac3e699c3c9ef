//! Commands that ask: of the running server through its socket, else of the data directory itself.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use strandline_actors::runtime::clock;

use super::{AgentCommand, Command, EXIT_NO_REPOSITORY, TenantCommand, TokenCommand, repositories};
use crate::admin::repositories::RepositoryRequest;
use crate::admin::values::RepositoryPath;
use crate::admin::{AdminError, AdminHandler, AdminReply, AdminRequest, Administrator, Idle, ask, ask_engine};
use crate::catalog::Catalog;
use crate::config::Config;
use crate::engine::{Engine, EngineOptions};
use crate::pki::Authority;
use crate::storage::StorageError;
use crate::storage::layout::DataPaths;
use crate::storage::lock::DirectoryLock;
use crate::tenancy::Tenancy;

/// The administrator's request was refused.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(crate) struct Refused {
    pub(super) exit_code: u8,
    message: String,
}

impl Refused {
    /// There is no such repository.
    pub(crate) fn no_repository(path: &RepositoryPath) -> Self {
        let list = "`strand-server repository list` shows those that there are";
        Self { exit_code: EXIT_NO_REPOSITORY, message: format!("there is no repository `{path}`; {list}") }
    }
}

/// How often lock and socket are tried again.
const RETRY: Duration = Duration::from_millis(100);

/// The request that a command stands for; none if it is no such command.
pub(super) fn request(command: Command) -> anyhow::Result<Option<AdminRequest>> {
    Ok(match command {
        Command::Tenant(TenantCommand::Add { name }) => Some(AdminRequest::TenantAdd { name }),
        Command::Tenant(TenantCommand::List) => Some(AdminRequest::TenantList {}),
        Command::Token(TokenCommand::Create { tenant, valid_for }) => {
            Some(AdminRequest::TokenCreate { tenant, valid_for })
        }
        Command::Agent(AgentCommand::List { tenant }) => Some(AdminRequest::AgentList { tenant }),
        Command::Agent(AgentCommand::Revoke { agent }) => Some(AdminRequest::AgentRevoke { agent }),
        Command::Repository(command) => Some(repositories::repository(command)?),
        Command::Snapshot(command) => Some(repositories::snapshot(command)?),
        Command::Gc(arguments) => Some(repositories::gc(arguments)),
        Command::Scrub(arguments) => Some(repositories::scrub(arguments)),
        Command::Status => Some(AdminRequest::Status {}),
        Command::Init(_)
        | Command::Serve
        | Command::Completions { .. }
        | Command::Catalog(_)
        | Command::Repair(_)
        | Command::Inspect(_) => None,
    })
}

/// Gets the answer. Whoever holds the lock without a socket (a command like this one, a server that is starting) is
/// waited for.
pub(super) async fn administer(
    data: &Path,
    config_path: &Path,
    lock_wait: Duration,
    request: AdminRequest,
) -> anyhow::Result<AdminReply> {
    let deadline = clock::now().checked_add(lock_wait);
    let reply = loop {
        match ask(data, &request).await {
            Ok(reply) => break reply,
            Err(AdminError::NotRunning { .. }) => {}
            Err(error) => return Err(error.into()),
        }
        // Before the lock, which would be made: a directory that is none of ours is left as it is.
        let config = match request {
            AdminRequest::Repository(_) => {
                ensure_repositories(data)?;
                None
            }
            _ => Some(Config::load(config_path)?),
        };
        let lock = match DirectoryLock::take(data, &DataPaths::new(data).lock(), Duration::ZERO) {
            Err(StorageError::Locked { .. }) if deadline.is_none_or(|deadline| clock::now() < deadline) => {
                tokio::time::sleep(RETRY).await;
                continue;
            }
            taken => taken?,
        };
        break match (config, request) {
            (_, AdminRequest::Repository(request)) => with_repositories(data, lock, request).await?,
            (Some(config), request) => directly(data, config, lock, request).await?,
            (None, _) => anyhow::bail!("the configuration was not read"),
        };
    };
    match reply {
        AdminReply::Failed { exit_code, message } => Err(Refused { exit_code, message }.into()),
        reply => Ok(reply),
    }
}

/// A data directory, or a repository in a local directory, which needs neither configuration nor authority.
pub(super) fn ensure_repositories(data: &Path) -> anyhow::Result<()> {
    if DataPaths::new(data).storage().is_dir() {
        return Ok(());
    }
    Err(Refused {
        exit_code: EXIT_NO_REPOSITORY,
        message: format!(
            "{} holds no repositories: give the data directory of a server, or a repository directory, as --data",
            data.display()
        ),
    }
    .into())
}

async fn with_repositories(data: &Path, lock: DirectoryLock, request: RepositoryRequest) -> anyhow::Result<AdminReply> {
    let engine = Engine::open_locked(data, lock, EngineOptions::default()).await?;
    let reply = ask_engine(&engine, request).await;
    engine.close().await?;
    Ok(reply)
}

async fn directly(
    data: &Path,
    config: Config,
    _lock: DirectoryLock,
    request: AdminRequest,
) -> anyhow::Result<AdminReply> {
    let authority = Arc::new(Authority::load(data)?);
    let catalog = Catalog::open(&DataPaths::new(data).catalog()).await?;
    let tenancy = Tenancy::open(catalog.pool().clone(), data).await?;
    let reply = Administrator::new(data.to_owned(), config, tenancy, authority, Idle).handle(request).await;
    catalog.close().await?;
    Ok(reply)
}
