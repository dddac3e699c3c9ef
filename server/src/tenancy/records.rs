//! What the tables say: tenants, agents, and whether an agent may come in.

use serde::{Deserialize, Serialize};
use strandline_messages::{AgentId, TenantName};

use super::{Tenancy, TenancyError};

/// A tenant.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TenantRecord {
    /// Its name.
    pub name: TenantName,
    /// When it was added, ns since 1970.
    pub created_ns: i64,
    /// Agents enrolled and not revoked.
    pub agents: u64,
}

/// Whether an agent may come in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AgentState {
    /// It may.
    Enrolled,
    /// Its certificate has ended; it must enrol again.
    Expired,
    /// It was barred for ever.
    Revoked,
}

/// An agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentRecord {
    /// Its id, hexadecimal in JSON.
    #[serde(with = "hexadecimal")]
    pub id: AgentId,
    /// Its tenant.
    pub tenant: TenantName,
    /// Host name that it gave when it enrolled.
    pub label: String,
    /// When it enrolled, ns since 1970.
    pub enrolled_ns: i64,
    /// End of its certificate, ns since 1970.
    pub expires_ns: i64,
    /// When it was last here, ns since 1970.
    pub last_seen_ns: Option<i64>,
    /// When it was revoked, ns since 1970.
    pub revoked_ns: Option<i64>,
}

impl AgentRecord {
    /// Whether it may come in at `now_ns`.
    pub fn state(&self, now_ns: i64) -> AgentState {
        match self.revoked_ns {
            Some(_) => AgentState::Revoked,
            None if self.expires_ns <= now_ns => AgentState::Expired,
            None => AgentState::Enrolled,
        }
    }
}

/// An [`AgentId`] as hexadecimal text.
pub(crate) mod hexadecimal {
    use serde::{Deserialize, Deserializer, Serializer, de::Error};
    use strandline_messages::AgentId;

    /// As text.
    pub fn serialize<S: Serializer>(id: &AgentId, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(id)
    }

    /// From text.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<AgentId, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(D::Error::custom)
    }
}

type AgentRow = (Vec<u8>, String, String, i64, i64, Option<i64>, Option<i64>);

impl Tenancy {
    /// All tenants by name.
    pub async fn tenants(&self) -> Result<Vec<TenantRecord>, TenancyError> {
        let rows: Vec<(String, i64, i64)> = sqlx::query_as(
            "SELECT name, created_ns, (SELECT count(*) FROM agents WHERE tenant = name AND revoked_ns IS NULL)
             FROM tenants ORDER BY name",
        )
        .fetch_all(&self.pool)
        .await?;
        rows.into_iter()
            .map(|(name, created_ns, agents)| {
                Ok(TenantRecord {
                    name: name.parse().map_err(broken)?,
                    created_ns,
                    agents: u64::try_from(agents).unwrap_or(0),
                })
            })
            .collect()
    }

    /// The agents of one tenant, or of all, by tenant, label and id. Memory grows with the number of agents.
    pub async fn agents(&self, tenant: Option<&TenantName>) -> Result<Vec<AgentRecord>, TenancyError> {
        let rows: Vec<AgentRow> = sqlx::query_as(
            "SELECT id, tenant, label, enrolled_ns, expires_ns, last_seen_ns, revoked_ns FROM agents
             WHERE ?1 IS NULL OR tenant = ?1 ORDER BY tenant, label, id",
        )
        .bind(tenant.map(TenantName::as_str))
        .fetch_all(&self.pool)
        .await?;
        if rows.is_empty()
            && let Some(tenant) = tenant
        {
            let mut transaction = self.pool.begin().await?;
            if !super::tenant_exists(&mut transaction, tenant).await? {
                return Err(TenancyError::NoSuchTenant(tenant.clone()));
            }
        }
        rows.into_iter().map(record).collect()
    }

    /// One agent.
    pub async fn agent(&self, agent: AgentId) -> Result<Option<AgentRecord>, TenancyError> {
        let row: Option<AgentRow> = sqlx::query_as(
            "SELECT id, tenant, label, enrolled_ns, expires_ns, last_seen_ns, revoked_ns FROM agents WHERE id = ?",
        )
        .bind(agent.as_bytes().as_slice())
        .fetch_optional(&self.pool)
        .await?;
        row.map(record).transpose()
    }

    /// Whether this agent, in this tenant, with this public key (BLAKE3-256 of it) is enrolled and not revoked. To be
    /// asked after every handshake: a certificate stays valid when its agent is revoked.
    pub async fn is_enrolled(
        &self,
        agent: AgentId,
        tenant: &TenantName,
        key_hash: &[u8; 32],
    ) -> Result<bool, TenancyError> {
        let found: Option<(i64,)> =
            sqlx::query_as("SELECT 1 FROM agents WHERE id = ? AND tenant = ? AND key_hash = ? AND revoked_ns IS NULL")
                .bind(agent.as_bytes().as_slice())
                .bind(tenant.as_str())
                .bind(key_hash.as_slice())
                .fetch_optional(&self.pool)
                .await?;
        Ok(found.is_some())
    }
}

fn record(row: AgentRow) -> Result<AgentRecord, TenancyError> {
    let (id, tenant, label, enrolled_ns, expires_ns, last_seen_ns, revoked_ns) = row;
    Ok(AgentRecord {
        id: AgentId::from_slice(&id).ok_or_else(|| broken("an agent id is not 16 bytes"))?,
        tenant: tenant.parse().map_err(broken)?,
        label,
        enrolled_ns,
        expires_ns,
        last_seen_ns,
        revoked_ns,
    })
}

fn broken(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> TenancyError {
    TenancyError::Catalog(sqlx::Error::Decode(why.into()))
}
