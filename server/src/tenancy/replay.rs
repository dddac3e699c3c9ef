//! Bringing the tables in line with the journal.

use std::path::PathBuf;

use data_encoding::HEXLOWER;
use sqlx::{Sqlite, Transaction};

use super::journal::Event;
use super::{Tenancy, TenancyError, commit};
use crate::storage::journal::Replay;

impl Tenancy {
    /// Applies every event, in order, in one transaction; what the tables know already stays as it is.
    pub(super) async fn replay(&self, said: Replay<Event>, path: PathBuf) -> Result<(), TenancyError> {
        let mut transaction = self.begin().await?;
        if !said.damaged.is_empty() {
            let (tenants,): (i64,) =
                sqlx::query_as("SELECT count(*) FROM tenants").fetch_one(&mut *transaction).await?;
            if tenants == 0 {
                return Err(TenancyError::JournalDamaged { path, lines: said.damaged });
            }
            tracing::error!(journal = %path.display(), lines = ?said.damaged,
                "the journal of identities is damaged; the catalog is intact and goes on. Restore the journal from a copy \
                 before the catalog is ever rebuilt");
        }
        for event in said.events {
            apply(&mut transaction, event).await?;
        }
        commit(transaction).await?;
        Ok(())
    }
}

async fn apply(transaction: &mut Transaction<'static, Sqlite>, event: Event) -> Result<(), TenancyError> {
    let query = match event {
        Event::TenantAdded { tenant, at_ns } => {
            sqlx::query("INSERT INTO tenants (name, created_ns) VALUES (?, ?) ON CONFLICT DO NOTHING")
                .bind(String::from(tenant))
                .bind(at_ns)
        }
        Event::AgentEnrolled { agent, tenant, label, key_hash, at_ns, expires_ns } => sqlx::query(
            "INSERT INTO agents (id, tenant, label, key_hash, enrolled_ns, expires_ns) VALUES (?, ?, ?, ?, ?, ?)
             ON CONFLICT DO NOTHING",
        )
        .bind(agent.0.as_bytes().to_vec())
        .bind(String::from(tenant))
        .bind(label)
        .bind(hash(&key_hash)?)
        .bind(at_ns)
        .bind(expires_ns),
        Event::AgentRenewed { agent, at_ns: _, expires_ns } => {
            sqlx::query("UPDATE agents SET expires_ns = ? WHERE id = ?")
                .bind(expires_ns)
                .bind(agent.0.as_bytes().to_vec())
        }
        Event::AgentRevoked { agent, at_ns } => {
            sqlx::query("UPDATE agents SET revoked_ns = coalesce(revoked_ns, ?) WHERE id = ?")
                .bind(at_ns)
                .bind(agent.0.as_bytes().to_vec())
        }
    };
    query.execute(&mut **transaction).await?;
    Ok(())
}

fn hash(hexadecimal: &str) -> Result<Vec<u8>, TenancyError> {
    HEXLOWER.decode(hexadecimal.as_bytes()).map_err(|error| TenancyError::Catalog(sqlx::Error::Decode(Box::new(error))))
}
