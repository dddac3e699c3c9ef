//! What can go wrong in the engine.

use std::path::PathBuf;
use std::sync::Arc;

use strandline_messages::{RepositoryName, SessionId, SnapshotId, TenantName};

use crate::catalog::CatalogError;
use crate::index::IndexError;
use crate::storage::StorageError;

/// Why the engine did not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// Another process owns the data directory.
    #[error("{path} is in use by {holder}; nothing was changed; wait for it to end or raise --lock-wait", path = .path.display())]
    Locked {
        /// The data directory.
        path: PathBuf,
        /// Who holds it.
        holder: String,
    },
    /// The tenant has no repository of that name.
    #[error("there is no repository `{name}`; `strand init` makes one, `strand status` lists those of your tenant")]
    NoSuchRepository {
        /// The tenant.
        tenant: TenantName,
        /// The name.
        name: RepositoryName,
    },
    /// The repository has no such snapshot.
    #[error("there is no snapshot {snapshot}; it may have been deleted; `strand snapshots` lists those that are kept")]
    NoSuchSnapshot {
        /// The snapshot.
        snapshot: SnapshotId,
    },
    /// The tenant has a repository of that name or id.
    #[error("the repository `{name}` exists already; nothing was changed; use it, or choose another name")]
    AlreadyExists {
        /// The tenant.
        tenant: TenantName,
        /// The name.
        name: RepositoryName,
    },
    /// The repository could not be opened when the server started.
    #[error(
        "the repository `{name}` cannot be used: {reason}; its files were left as they are; remove the cause and restart the server"
    )]
    Unusable {
        /// The name.
        name: RepositoryName,
        /// What was met.
        reason: Arc<EngineError>,
    },
    /// A key slot is not one of this repository's.
    #[error("the repository was not created: a key slot is not acceptable: {reason}; nothing was stored")]
    BadSlot {
        /// Why.
        reason: String,
    },
    /// A key slot cannot be added.
    #[error("the key slot was not added: {reason}; the repository and its other slots are as they were")]
    SlotNotAdded {
        /// Why.
        reason: String,
    },
    /// The repository has no such key slot.
    #[error("there is no key slot {id}; nothing was changed; `strand key list` shows those that there are")]
    NoSuchSlot {
        /// Its id, 32 hexadecimal digits.
        id: String,
    },
    /// Without this slot nobody could open the repository.
    #[error("key slot {id} was not removed: no other one is left that a key could open; add another one first")]
    LastSlot {
        /// Its id, 32 hexadecimal digits.
        id: String,
    },
    /// The session does not hold its lease any more.
    #[error("session {session} has ended or was superseded; what it stored is safe; start the backup again")]
    Fenced {
        /// The session.
        session: SessionId,
    },
    /// The session id was used before.
    #[error("session {session} was opened before; nothing was changed; a session id is used once")]
    SessionExists {
        /// The session.
        session: SessionId,
    },
    /// Commit and maintenance kept overtaking each other.
    #[error(
        "the snapshot was not committed: maintenance changed the repository {attempts} times while it was checked; everything sent is safe; commit again"
    )]
    Busy {
        /// How often it was tried.
        attempts: usize,
    },
    /// A worker thread was lost.
    #[error("an internal task ended early ({reason}); what was acknowledged is safe; try again")]
    Interrupted {
        /// What the runtime said.
        reason: String,
    },
    /// The system has no random numbers, or the signing key is unusable.
    #[error("the server's signing key cannot be used: {reason}; stored backups are intact")]
    Key {
        /// Why.
        reason: String,
    },
    /// The storage failed.
    #[error(transparent)]
    Storage(StorageError),
    /// The chunk index failed.
    #[error(transparent)]
    Index(#[from] IndexError),
    /// The catalog failed.
    #[error(transparent)]
    Catalog(#[from] CatalogError),
}

impl EngineError {
    /// Whether space or quota is exhausted: the answer is to make room, not to look for a fault.
    pub fn is_full(&self) -> bool {
        match self {
            Self::Storage(StorageError::Io { source, .. }) => {
                matches!(source.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded)
            }
            _ => false,
        }
    }
}

impl From<StorageError> for EngineError {
    fn from(error: StorageError) -> Self {
        match error {
            StorageError::Locked { path, holder } => Self::Locked { path, holder },
            other => Self::Storage(other),
        }
    }
}
