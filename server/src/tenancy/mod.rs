//! Tenants, enrolled agents and enrolment tokens.
//!
//! The tables (migration 0002) answer; the journal in the storage remembers. An event is journalled and fsynced before
//! its transaction commits, and the journal is replayed whenever the tables are opened, so that the two agree after any
//! crash and a rebuilt catalog knows every tenant, every agent and every revocation. Tokens are not journalled: after a
//! rebuild there are none, and new ones are made.

mod enrol;
pub mod journal;
mod records;
mod replay;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::Mutex;
use sqlx::{Sqlite, SqlitePool, Transaction};
use strandline_actors::runtime::clock;
use strandline_messages::identity::EnrolmentSecret;
use strandline_messages::{AgentId, TenantName};

use crate::failpoint;

pub use enrol::{EnrolError, Enrolled, Machine, enrol, renew};
pub(crate) use journal::JOURNAL_NAME;
use journal::{AgentIdText, Event, Journal};
pub(crate) use records::hexadecimal;
pub use records::{AgentRecord, AgentState, TenantRecord};

/// The schema of the whole catalog: every part's migrations, run once, whoever comes first.
pub static MIGRATIONS: sqlx::migrate::Migrator = sqlx::migrate!("./migrations");

/// How long a token is good if nothing else is said, and at most.
pub const TOKEN_VALIDITY_MAX: Duration = Duration::from_hours(1);
/// Longest label (host name) of an agent that is stored, bytes.
pub const LABEL_BYTES_MAX: usize = 256;
/// Used and expired tokens are forgotten after this long; until then the log can say why they were refused.
const TOKEN_MEMORY: Duration = Duration::from_hours(24 * 30);

/// Why something about identities could not be done.
#[derive(Debug, thiserror::Error)]
pub enum TenancyError {
    /// The tables could not be read or written.
    #[error("the catalog does not answer: {0}. Nothing was changed")]
    Catalog(#[from] sqlx::Error),
    /// The schema could not be brought up to date.
    #[error("the catalog's schema cannot be brought up to date: {0}. Was it written by a newer version?")]
    Migration(#[from] sqlx::migrate::MigrateError),
    /// The journal could not be read or written.
    #[error("cannot write the journal of identities {}: {source}. Nothing was changed", path.display())]
    Journal {
        /// The journal.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The catalog is empty and the journal that it should be filled from is damaged.
    #[error(
        "{} is damaged (lines {lines:?}) and the catalog is new: a damaged line may have revoked an agent, so nobody is \
         let in. Restore the file from a copy",
        path.display()
    )]
    JournalDamaged {
        /// The journal.
        path: PathBuf,
        /// Numbers of the damaged lines, from 1.
        lines: Vec<u64>,
    },
    /// The tenant is there already.
    #[error("the tenant `{0}` exists already; nothing was changed")]
    TenantExists(TenantName),
    /// The name is kept for something else.
    #[error("`{0}` is the name of a file in the storage and cannot be a tenant; choose another")]
    TenantReserved(TenantName),
    /// There is no such tenant.
    #[error(
        "there is no tenant `{0}`: `strand-server tenant list` shows them, `strand-server tenant add {0}` makes it"
    )]
    NoSuchTenant(TenantName),
    /// There is no such agent.
    #[error("there is no agent {0}: `strand-server agent list` shows them")]
    NoSuchAgent(AgentId),
    /// A token may not live that long.
    #[error(
        "a token is good for at most {}: it enrols a machine for whoever holds it",
        humantime::format_duration(TOKEN_VALIDITY_MAX)
    )]
    TokenTooLong,
    /// The system gave no random bytes.
    #[error("the system gives no random bytes: {0}")]
    Random(#[from] getrandom::Error),
    /// A background thread died.
    #[error("a worker thread of this process died; see the log")]
    Worker,
}

/// The identities of one data directory. Clones share everything.
#[derive(Debug, Clone)]
pub struct Tenancy {
    pool: SqlitePool,
    journal: Arc<Mutex<Journal>>,
}

impl Tenancy {
    /// Brings the schema up to date and the tables in line with the journal in `data`/storage. The caller holds the data
    /// directory's lock.
    pub async fn open(pool: SqlitePool, data: &Path) -> Result<Self, TenancyError> {
        MIGRATIONS.run(&pool).await?;
        let storage = data.join("storage");
        let path = storage.join(JOURNAL_NAME);
        let opened = tokio::task::spawn_blocking(move || {
            let journal = Journal::open(&storage.join(JOURNAL_NAME))?;
            let replay = journal.replay()?;
            Ok((journal, replay))
        });
        let opened = opened.await.map_err(|_| TenancyError::Worker)?;
        let (journal, said) = opened.map_err(|source| TenancyError::Journal { path: path.clone(), source })?;
        let tenancy = Self { pool, journal: Arc::new(Mutex::new(journal)) };
        tenancy.replay(said, path).await?;
        Ok(tenancy)
    }

    /// Adds a tenant.
    pub async fn add_tenant(&self, tenant: &TenantName) -> Result<TenantRecord, TenancyError> {
        if tenant.as_str() == JOURNAL_NAME {
            return Err(TenancyError::TenantReserved(tenant.clone()));
        }
        let created_ns = clock::wall_ns();
        let mut transaction = self.begin().await?;
        let added = sqlx::query("INSERT INTO tenants (name, created_ns) VALUES (?, ?) ON CONFLICT DO NOTHING")
            .bind(tenant.as_str())
            .bind(created_ns)
            .execute(&mut *transaction)
            .await?;
        if added.rows_affected() == 0 {
            return Err(TenancyError::TenantExists(tenant.clone()));
        }
        self.remember(Event::TenantAdded { tenant: tenant.clone(), at_ns: created_ns }).await?;
        commit(transaction).await?;
        Ok(TenantRecord { name: tenant.clone(), created_ns, agents: 0 })
    }

    /// Makes a single-use enrolment secret for `tenant`, good for `valid_for` (at most an hour). Only its hash is kept.
    /// Returns it with the end of its validity, ns since 1970.
    pub async fn create_token(
        &self,
        tenant: &TenantName,
        valid_for: Duration,
    ) -> Result<(EnrolmentSecret, i64), TenancyError> {
        if valid_for > TOKEN_VALIDITY_MAX {
            return Err(TenancyError::TokenTooLong);
        }
        let mut secret = EnrolmentSecret([0; 32]);
        getrandom::fill(&mut secret.0)?;
        let now_ns = clock::wall_ns();
        let expires_ns = now_ns.saturating_add(ns(valid_for));
        let mut transaction = self.begin().await?;
        if !tenant_exists(&mut transaction, tenant).await? {
            return Err(TenancyError::NoSuchTenant(tenant.clone()));
        }
        sqlx::query("DELETE FROM tokens WHERE expires_ns < ?")
            .bind(now_ns.saturating_sub(ns(TOKEN_MEMORY)))
            .execute(&mut *transaction)
            .await?;
        sqlx::query("INSERT INTO tokens (hash, tenant, created_ns, expires_ns) VALUES (?, ?, ?, ?)")
            .bind(token_hash(&secret))
            .bind(tenant.as_str())
            .bind(now_ns)
            .bind(expires_ns)
            .execute(&mut *transaction)
            .await?;
        commit(transaction).await?;
        Ok((secret, expires_ns))
    }

    /// Bars an agent for ever. Revoking it again changes nothing. Its open sessions are the caller's to end.
    pub async fn revoke(&self, agent: AgentId) -> Result<AgentRecord, TenancyError> {
        let at_ns = clock::wall_ns();
        let mut transaction = self.begin().await?;
        let known: Option<(Option<i64>,)> = sqlx::query_as("SELECT revoked_ns FROM agents WHERE id = ?")
            .bind(agent.as_bytes().as_slice())
            .fetch_optional(&mut *transaction)
            .await?;
        let (revoked_ns,) = known.ok_or(TenancyError::NoSuchAgent(agent))?;
        if revoked_ns.is_none() {
            self.remember(Event::AgentRevoked { agent: AgentIdText(agent), at_ns }).await?;
            sqlx::query("UPDATE agents SET revoked_ns = ? WHERE id = ?")
                .bind(at_ns)
                .bind(agent.as_bytes().as_slice())
                .execute(&mut *transaction)
                .await?;
        }
        commit(transaction).await?;
        self.agent(agent).await?.ok_or(TenancyError::NoSuchAgent(agent))
    }

    /// Notes that an agent was here at `now_ns`. Not journalled.
    pub async fn seen(&self, agent: AgentId, now_ns: i64) -> Result<(), TenancyError> {
        sqlx::query("UPDATE agents SET last_seen_ns = ? WHERE id = ?")
            .bind(now_ns)
            .bind(agent.as_bytes().as_slice())
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    async fn begin(&self) -> Result<Transaction<'static, Sqlite>, TenancyError> {
        // The write lock first: nothing read inside may be out of date when it is acted on.
        Ok(self.pool.begin_with("BEGIN IMMEDIATE").await?)
    }

    async fn remember(&self, event: Event) -> Result<(), TenancyError> {
        let journal = Arc::clone(&self.journal);
        let written = tokio::task::spawn_blocking(move || {
            let mut journal = journal.lock();
            journal.append(&event).map_err(|source| TenancyError::Journal { path: journal.path().to_owned(), source })
        });
        written.await.map_err(|_| TenancyError::Worker)?
    }
}

/// Ends a transaction that [`Tenancy::begin`] began.
async fn commit(transaction: Transaction<'static, Sqlite>) -> Result<(), sqlx::Error> {
    failpoint::reached("identities/committing");
    transaction.commit().await?;
    failpoint::reached("identities/committed");
    Ok(())
}

async fn tenant_exists(
    transaction: &mut Transaction<'static, Sqlite>,
    tenant: &TenantName,
) -> Result<bool, TenancyError> {
    let found: Option<(i64,)> = sqlx::query_as("SELECT 1 FROM tenants WHERE name = ?")
        .bind(tenant.as_str())
        .fetch_optional(&mut **transaction)
        .await?;
    Ok(found.is_some())
}

fn token_hash(secret: &EnrolmentSecret) -> Vec<u8> {
    blake3::hash(&secret.0).as_bytes().to_vec()
}

fn ns(duration: Duration) -> i64 {
    i64::try_from(duration.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
