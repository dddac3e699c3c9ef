//! Why a block was not stored. Cloned to everybody who waits for the same block.

use std::io;
use std::sync::Arc;

use strandline_messages::format::FormatError;
use strandline_messages::{RepositoryId, SessionId};

/// Why a block was not stored.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// The block is not one that this repository takes.
    #[error("the block is refused: {0}; nothing of it was stored")]
    Refused(#[from] FormatError),
    /// The block belongs to another repository.
    #[error("the block is refused: it belongs to repository {found}, not {expected}; nothing of it was stored")]
    Foreign {
        /// The repository in the block's header.
        found: RepositoryId,
        /// This repository.
        expected: RepositoryId,
    },
    /// The session no longer holds its lease.
    #[error(
        "session {session} has ended or was superseded; its blocks are not taken any more, what was acknowledged is safe"
    )]
    Fenced {
        /// The session.
        session: SessionId,
    },
    /// No space left.
    #[error(
        "the disk is full ({source}); the block was not stored, what was acknowledged is safe; free space on the server, then run the backup again"
    )]
    Full {
        /// What the operating system said.
        source: Arc<io::Error>,
    },
    /// The disk fails.
    #[error("the block could not be stored: {source}; what was acknowledged is safe; check the disk of the server")]
    Io {
        /// What the operating system said.
        source: Arc<io::Error>,
    },
    /// The block is on disk but could not be indexed, so it is not acknowledged.
    #[error("the block could not be indexed: {reason}; it was not acknowledged, what was acknowledged is safe")]
    Index {
        /// What went wrong.
        reason: Arc<str>,
    },
    /// The repository is being closed.
    #[error("the repository is being closed; what was acknowledged is safe; send the block again after the restart")]
    Closed,
}

impl StoreError {
    pub(crate) fn from_io(error: io::Error) -> Self {
        let source = Arc::new(error);
        match source.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Self::Full { source },
            _ => Self::Io { source },
        }
    }
}
