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
    /// The repository is being closed.
    #[error("the repository is being closed; what was done so far is complete, the next run goes on from there")]
    Stopping,
    /// A tree cannot be walked, so nothing may be called garbage.
    #[error(
        "nothing was freed: {reason}, and what lies below it cannot be told from garbage; everything intact stays readable; run `strand check` to find what is affected, then back up again to heal it, or delete the snapshots that need it"
    )]
    Unwalkable {
        /// What was met.
        reason: String,
    },
    /// A live block could not be stored again.
    #[error("a block could not be moved to another pack: {reason}; it stays where it is, nothing is lost")]
    Moving {
        /// Why.
        reason: String,
    },
    /// The repository's settings forbid it.
    #[error(
        "agents may not delete snapshots of this repository; nothing was changed; the server's own policy deletes, or its administrator"
    )]
    AgentsMayNotDelete,
    /// The repository's own policy cannot be applied.
    #[error("the repository's retention policy cannot be applied: {reason}; nothing was deleted; change or remove it")]
    BadPolicy {
        /// Why.
        reason: String,
    },
    /// Tags without the signature of a full key.
    #[error("the tags were not changed: they are not signed by a holder of the full capability")]
    BadTags,
    /// The journal of what was decided about snapshots cannot be read.
    #[error(
        "{} is damaged (lines {lines:?}): a damaged line may have deleted or protected a snapshot; nothing was changed; restore the file from a copy, or remove those lines to go on without what they said",
        path.display()
    )]
    JournalDamaged {
        /// The journal.
        path: PathBuf,
        /// Numbers of the damaged lines, from 1.
        lines: Vec<u64>,
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
        "commits and maintenance kept overtaking each other ({attempts} times); nothing was lost or freed; try again"
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
