//! The catalog: a SQLite database inside the data directory. This module owns the engine's tables (migration 0001) and is the
//! only place that names their columns.
//!
//! The database runs in WAL mode with `synchronous = NORMAL`: a power cut may take back the last transactions. That loses
//! nothing that was promised: manifests and receipts are synced files before their rows are committed, and the next start
//! makes the rows again.

pub mod keeping;
pub mod packs;
pub mod repositories;
pub mod sessions;
pub mod snapshots;
pub mod verified;

use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{FallocateFlags, fallocate};
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};
use sqlx::{Sqlite, SqlitePool, Transaction};
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::failpoint;

/// Connections of the pool: one writer at a time in any case, the others read.
const CONNECTIONS_MAX: u32 = 4;
/// Room that is kept for the write-ahead log: as much as it takes before SQLite writes it back, bytes.
const RESERVED_LOG_BYTES: u64 = 4 << 20;
/// How long a transaction waits for another to end.
const BUSY_WAIT: Duration = Duration::from_mins(1);

/// Why the catalog could not answer.
#[derive(Debug, thiserror::Error)]
pub enum CatalogError {
    /// The database refused.
    #[error(
        "cannot {doing} in the catalog: {source}; stored backups are intact; if the catalog is damaged, move it away and start again, it is made anew from the storage"
    )]
    Sql {
        /// What was being done.
        doing: &'static str,
        /// What the database said.
        source: sqlx::Error,
    },
    /// The tables could not be brought up to date.
    #[error(
        "cannot bring the catalog's tables up to date: {0}; stored backups are intact; was it written by a newer Strandline?"
    )]
    Migrate(#[from] sqlx::migrate::MigrateError),
    /// A row that this program cannot have written.
    #[error(
        "the catalog holds an impossible {what}; stored backups are intact; move the catalog away and start again, it is made anew from the storage"
    )]
    Impossible {
        /// The value.
        what: &'static str,
    },
}

pub(crate) fn sql(doing: &'static str) -> impl FnOnce(sqlx::Error) -> CatalogError {
    move |source| CatalogError::Sql { doing, source }
}

/// A connection to the catalog.
#[derive(Clone, Debug)]
pub struct Catalog {
    pool: SqlitePool,
    /// Writers queue here, in order and without a time limit, instead of each holding a connection while it waits.
    turn: Arc<Mutex<()>>,
}

/// A transaction that writes. Dropped without [`Write::commit`] it changes nothing.
#[derive(Debug)]
pub(crate) struct Write {
    transaction: Transaction<'static, Sqlite>,
    _turn: OwnedMutexGuard<()>,
}

impl Write {
    pub async fn commit(self) -> Result<(), sqlx::Error> {
        failpoint::reached("catalog/committing");
        self.transaction.commit().await?;
        failpoint::reached("catalog/committed");
        Ok(())
    }
}

impl Deref for Write {
    type Target = Transaction<'static, Sqlite>;

    fn deref(&self) -> &Self::Target {
        &self.transaction
    }
}

impl DerefMut for Write {
    fn deref_mut(&mut self) -> &mut Self::Target {
        &mut self.transaction
    }
}

impl Catalog {
    /// Opens the database file `path`, creating it and its tables as needed.
    pub async fn open(path: &Path) -> Result<Self, CatalogError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal)
            .foreign_keys(true)
            .busy_timeout(BUSY_WAIT);
        let pool = SqlitePoolOptions::new().max_connections(CONNECTIONS_MAX).connect_with(options).await;
        let pool = pool.map_err(sql("open the database"))?;
        failpoint::reached("catalog/opened");
        sqlx::migrate!("./migrations").run(&pool).await?;
        failpoint::reached("catalog/migrated");
        reserve_log(path);
        Ok(Self { pool, turn: Arc::default() })
    }

    /// The connections, for the tables of other parts of the server.
    pub fn pool(&self) -> &SqlitePool {
        &self.pool
    }

    /// Begins a transaction that holds the write lock from the start.
    pub(crate) async fn begin(&self) -> Result<Write, CatalogError> {
        let turn = Arc::clone(&self.turn).lock_owned().await;
        let transaction = self.pool.begin_with("BEGIN IMMEDIATE").await.map_err(sql("begin a transaction"))?;
        Ok(Write { transaction, _turn: turn })
    }

    /// Moves the write-ahead log into the database file and closes all connections.
    pub async fn close(&self) -> Result<(), CatalogError> {
        let done = sqlx::query("PRAGMA wal_checkpoint(TRUNCATE)").execute(&self.pool).await;
        failpoint::reached("catalog/checkpointed");
        self.pool.close().await;
        done.map(|_| ()).map_err(sql("write the log back"))
    }
}

/// Gives the write-ahead log of the catalog at `path` room beyond its end, so that sessions can still be opened, for listing and
/// restoring, when others fill the disk later. The log, and the room with it, is gone when the catalog is closed.
fn reserve_log(path: &Path) {
    let mut log = path.as_os_str().to_owned();
    log.push("-wal");
    let file = std::fs::File::options().write(true).open(log);
    // Without it a full disk may refuse to open sessions until the next start.
    let _ = file.map(|file| fallocate(&file, FallocateFlags::KEEP_SIZE, 0, RESERVED_LOG_BYTES));
}

/// A stored number as what it was before it was stored.
pub(crate) fn unsigned(value: i64) -> u64 {
    value.cast_unsigned()
}

/// A number as SQLite stores it.
pub(crate) fn signed(value: u64) -> i64 {
    value.cast_signed()
}

pub(crate) fn id<T>(
    what: &'static str,
    bytes: &[u8],
    from: impl FnOnce(&[u8]) -> Option<T>,
) -> Result<T, CatalogError> {
    from(bytes).ok_or(CatalogError::Impossible { what })
}

pub(crate) fn number(what: &'static str, value: i64) -> Result<u32, CatalogError> {
    u32::try_from(value).map_err(|_| CatalogError::Impossible { what })
}
