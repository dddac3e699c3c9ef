//! Administration: typed requests and replies, answered by the running server through a socket in its data directory or,
//! when none runs, by the command itself; both through the same [`AdminHandler`].

mod handler;
mod keeper;
pub mod repositories;
mod socket;
pub mod values;

use std::collections::BTreeMap;
use std::future::Future;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use strandline_messages::{AgentId, TenantName};

use crate::tenancy::{AgentRecord, TenantRecord};
use repositories::{RepositoryReply, RepositoryRequest};

pub use handler::{Administrator, Idle, ServerState, ask_engine};
pub use socket::{AdminError, AdminSocket, SOCKET_NAME, ask};

/// What an administrator asks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum AdminRequest {
    /// Add a tenant.
    TenantAdd {
        /// Its name.
        name: TenantName,
    },
    /// All tenants.
    TenantList {},
    /// Make an enrolment token.
    TokenCreate {
        /// For which tenant.
        tenant: TenantName,
        /// How long it is good.
        #[serde(with = "humantime_serde")]
        valid_for: Duration,
    },
    /// The agents of a tenant, or of all.
    AgentList {
        /// Which tenant.
        tenant: Option<TenantName>,
    },
    /// Bar an agent for ever.
    AgentRevoke {
        /// Which one.
        #[serde(with = "crate::tenancy::hexadecimal")]
        agent: AgentId,
    },
    /// What is going on.
    Status {},
    /// Something about repositories.
    Repository(RepositoryRequest),
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum AdminReply {
    /// The tenant that was added.
    Tenant(TenantRecord),
    /// Tenants by name.
    Tenants {
        /// All of them.
        tenants: Vec<TenantRecord>,
    },
    /// A new token.
    Token(TokenCreated),
    /// Agents by tenant, label and id.
    Agents {
        /// All that were asked for.
        agents: Vec<AgentRecord>,
    },
    /// The agent that was revoked.
    Agent(AgentRecord),
    /// What is going on.
    Status(Box<StatusReport>),
    /// About repositories.
    Repository(RepositoryReply),
    /// It could not be done.
    Failed {
        /// The command's exit code (DESIGN 8).
        exit_code: u8,
        /// For people.
        message: String,
    },
}

/// A new enrolment token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TokenCreated {
    /// The line to hand to the machine.
    pub token: String,
    /// The tenant it is for.
    pub tenant: TenantName,
    /// End of its validity, ns since 1970.
    pub expires_ns: i64,
    /// Where the machine will look for the server.
    pub addresses: Vec<String>,
}

/// What is going on.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReport {
    /// Version of the program that answers.
    pub version: String,
    /// Whether a server is running; if not, the command looked for itself.
    pub running: bool,
    /// Addresses it listens on.
    pub listen: Vec<String>,
    /// Seconds since it was started.
    pub uptime_s: Option<u64>,
    /// Open sessions, oldest first.
    pub sessions: Vec<SessionStatus>,
    /// How many of them are in which state.
    pub sessions_by_state: BTreeMap<String, u64>,
    /// Open data streams.
    pub streams: u64,
    /// Tenants by name.
    pub tenants: Vec<TenantRecord>,
    /// Repositories by tenant and name.
    pub repositories: Vec<RepositoryStatus>,
    /// Free bytes of the data directory's file system.
    pub free_bytes: u64,
    /// Size of the data directory's file system, bytes.
    pub total_bytes: u64,
    /// End of the authority's certificate, seconds since 1970.
    pub authority_expires_s: i64,
    /// End of the server's certificate, seconds since 1970; only of a running server.
    pub certificate_expires_s: Option<i64>,
}

/// An open session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionStatus {
    /// Its id, hexadecimal.
    pub id: String,
    /// `backup` or `restore`.
    pub kind: String,
    /// Its tenant.
    pub tenant: String,
    /// Its repository's name.
    pub repository: String,
    /// Its agent's id, hexadecimal.
    pub agent: String,
    /// The session machine's state, in its own words.
    pub state: String,
    /// Open data streams.
    pub streams: u16,
    /// When it was opened, ns since 1970.
    pub opened_ns: i64,
    /// Blocks durable without a gap.
    pub watermark: u64,
}

/// A repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryStatus {
    /// Its tenant.
    pub tenant: String,
    /// Its name.
    pub name: String,
    /// Its id, hexadecimal.
    pub id: String,
    /// Snapshots.
    pub snapshots: u64,
    /// Bytes of its packs.
    pub stored_bytes: u64,
}

/// Answers administrators. Never fails as such: a failure is a reply.
pub trait AdminHandler {
    /// Answers one request.
    fn handle(&self, request: AdminRequest) -> impl Future<Output = AdminReply>;
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
