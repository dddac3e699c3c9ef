//! One process at a time works on a data directory: the lock, and the catalog behind it.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use sqlx::SqlitePool;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous};
use strandline_actors::runtime::clock;

/// The lock file's name inside the data directory.
pub const LOCK_NAME: &str = "LOCK";
/// How often a held lock is tried again.
const RETRY: Duration = Duration::from_millis(100);

/// Why a data directory cannot be worked on.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// Another process has it.
    #[error("{} is in use by {holder}; nothing was changed. Try again later, or wait longer with --lock-wait", path.display())]
    Locked {
        /// The lock file.
        path: PathBuf,
        /// What the holder wrote about itself.
        holder: String,
    },
    /// There is no such directory, or no access to it.
    #[error("cannot open {}: {source}. If there is no server yet, run `strand-server init`", path.display())]
    Open {
        /// The file or directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The catalog cannot be opened.
    #[error("cannot open the catalog in {}: {source}", path.display())]
    Catalog {
        /// The data directory.
        path: PathBuf,
        /// The database's reason.
        source: sqlx::Error,
    },
}

/// The exclusive right to a data directory, until dropped.
#[derive(Debug)]
pub struct DataLock {
    _file: File,
}

impl DataLock {
    /// Takes the lock of `data`, which must exist; waits for at most `wait`.
    pub async fn take(data: &Path, wait: Duration) -> Result<Self, DataDirError> {
        let deadline = clock::now().checked_add(wait);
        loop {
            match Self::try_take(data)? {
                Ok(lock) => return Ok(lock),
                Err(holder) if deadline.is_some_and(|deadline| clock::now() >= deadline) => {
                    return Err(DataDirError::Locked { path: data.join(LOCK_NAME), holder });
                }
                Err(_) => tokio::time::sleep(RETRY).await,
            }
        }
    }

    /// Takes the lock now, or says who has it.
    pub fn try_take(data: &Path) -> Result<Result<Self, String>, DataDirError> {
        let path = data.join(LOCK_NAME);
        let failed = |source| DataDirError::Open { path: path.clone(), source };
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                let note = format!("strand-server, process {}\n", std::process::id());
                file.set_len(0)
                    .and_then(|()| file.rewind())
                    .and_then(|()| file.write_all(note.as_bytes()))
                    .map_err(failed)?;
                Ok(Ok(Self { _file: file }))
            }
            Err(Errno::WOULDBLOCK) => {
                let mut holder = String::new();
                // What it says is for people only: an unreadable note is no reason to fail.
                let _ = file.take(200).read_to_string(&mut holder);
                let holder = holder.trim();
                Ok(Err(if holder.is_empty() { "another process".to_owned() } else { holder.to_owned() }))
            }
            Err(error) => Err(failed(error.into())),
        }
    }
}

/// Opens the catalog of `data`; the caller holds the lock.
pub async fn open_catalog(data: &Path) -> Result<SqlitePool, DataDirError> {
    let options = SqliteConnectOptions::new()
        .filename(data.join("catalog.sqlite"))
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        .synchronous(SqliteSynchronous::Normal)
        .foreign_keys(true);
    SqlitePool::connect_with(options).await.map_err(|source| DataDirError::Catalog { path: data.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_second_process_is_told_who_holds_the_directory() {
        let data = tempfile::tempdir().unwrap();
        let held = DataLock::take(data.path(), Duration::ZERO).await.unwrap();
        let refused = DataLock::take(data.path(), Duration::from_millis(150)).await.unwrap_err();
        let pid = std::process::id().to_string();
        assert!(matches!(&refused, DataDirError::Locked { holder, .. } if holder.contains(&pid)), "{refused}");
        drop(held);
        DataLock::take(data.path(), Duration::ZERO).await.unwrap();
        let missing = DataLock::take(&data.path().join("x"), Duration::ZERO).await.unwrap_err();
        assert!(matches!(missing, DataDirError::Open { .. }));
    }
}
