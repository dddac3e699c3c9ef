//! The journal of identities in the storage: what tenants and agents there are, and who was revoked, so that a catalog
//! that was lost is rebuilt closed, not open.

use serde::{Deserialize, Serialize};
use strandline_messages::{AgentId, TenantName};

/// The journal's name inside the storage directory. No tenant may have it.
pub const JOURNAL_NAME: &str = "identities.journal";

/// The open journal.
pub type Journal = crate::storage::journal::Journal<Event>;

/// What can happen to identities.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case", deny_unknown_fields)]
pub enum Event {
    /// A tenant was added.
    TenantAdded {
        /// Its name.
        tenant: TenantName,
        /// When, ns since 1970.
        at_ns: i64,
    },
    /// An agent redeemed a token.
    AgentEnrolled {
        /// The agent.
        agent: AgentIdText,
        /// Its tenant.
        tenant: TenantName,
        /// Host name that it gave.
        label: String,
        /// BLAKE3-256 of its public key, hexadecimal.
        key_hash: String,
        /// When, ns since 1970.
        at_ns: i64,
        /// End of its certificate, ns since 1970.
        expires_ns: i64,
    },
    /// An agent got a new certificate for the key that it enrolled with.
    AgentRenewed {
        /// The agent.
        agent: AgentIdText,
        /// When, ns since 1970.
        at_ns: i64,
        /// End of its certificate, ns since 1970.
        expires_ns: i64,
    },
    /// An agent was revoked, for ever.
    AgentRevoked {
        /// The agent.
        agent: AgentIdText,
        /// When, ns since 1970.
        at_ns: i64,
    },
}

/// An agent id as hexadecimal text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AgentIdText(pub AgentId);

impl TryFrom<String> for AgentIdText {
    type Error = strandline_messages::ids::IdError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse().map(Self)
    }
}

impl From<AgentIdText> for String {
    fn from(id: AgentIdText) -> Self {
        id.0.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::journal::Replay;

    #[test]
    fn every_kind_of_event_reads_back() {
        let tenant: TenantName = "acme".parse().unwrap();
        let agent = AgentIdText(AgentId([9; 16]));
        let events = [
            Event::TenantAdded { tenant: tenant.clone(), at_ns: 1 },
            Event::AgentEnrolled {
                agent,
                tenant,
                label: "line\nbreak \u{2028}".into(),
                key_hash: "00".repeat(32),
                at_ns: 2,
                expires_ns: 3,
            },
            Event::AgentRenewed { agent, at_ns: 4, expires_ns: 5 },
            Event::AgentRevoked { agent, at_ns: 6 },
        ];
        let storage = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(&storage.path().join(JOURNAL_NAME)).unwrap();
        for event in &events {
            journal.append(event).unwrap();
        }
        assert_eq!(journal.replay().unwrap(), Replay { events: events.to_vec(), damaged: vec![] });
    }
}
