//! What the server's actors need from storage and catalog, as traits: the server implements them, tests imitate them.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use strandline_messages::mail::Peer;
use strandline_messages::wire::{Message, OpenSession, Refused};
use strandline_messages::{ChunkId, Durable, Sequence, SessionId, SnapshotId};

use crate::machines::session::Terminal;

/// Where a block stands in storage; opaque to the actors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockPlace {
    /// Pack number.
    pub pack: u32,
    /// First byte in the pack.
    pub offset: u32,
    /// Length, bytes.
    pub bytes: u32,
}

/// Why storage could not do something.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreFault {
    /// The block is not what the protocol says: the connection that brought it ends, the block is sent again.
    #[error("a block was refused: {0}")]
    BadBlock(String),
    /// Space or quota is exhausted.
    #[error("{0}")]
    Full(String),
    /// Anything else.
    #[error("{0}")]
    Failed(String),
}

/// What a commit came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommitOutcome {
    /// The snapshot is committed, now or earlier.
    Committed {
        /// Its id.
        snapshot: SnapshotId,
        /// The signed receipt.
        receipt: Vec<u8>,
    },
    /// Chunks reachable from its roots are not known.
    Missing {
        /// Some of them.
        ids: Vec<ChunkId>,
        /// Whether there are more.
        more: bool,
    },
    /// The manifest is not acceptable.
    Refused {
        /// Why, for people.
        reason: String,
    },
}

/// One session's view of its repository, behind its lease.
pub trait SessionStore: Send + Sync + 'static {
    /// Which chunks are known (DESIGN 7).
    fn known(&self, ids: Vec<ChunkId>) -> BoxFuture<'static, Result<Vec<bool>, StoreFault>>;
    /// Stores a block; resolves when it is durable and indexed.
    fn store(&self, sequence: Sequence, block: Bytes) -> BoxFuture<'static, Result<Durable<Sequence>, StoreFault>>;
    /// Verifies completeness and commits.
    fn commit(&self, manifest: Bytes) -> BoxFuture<'static, Result<CommitOutcome, StoreFault>>;
    /// Records the terminal state and ends the lease.
    fn end(&self, terminal: Terminal, reason: String) -> BoxFuture<'static, Result<(), StoreFault>>;
    /// Where copies of these chunks are, in the writer domain of `snapshot`, which is kept from now on as long as the session
    /// lasts; `None`: in the session's own domain.
    fn locate(
        &self,
        snapshot: Option<SnapshotId>,
        ids: Vec<ChunkId>,
    ) -> BoxFuture<'static, Result<Vec<Option<BlockPlace>>, StoreFault>>;
    /// A block's bytes, its digest verified.
    fn read(&self, place: BlockPlace) -> BoxFuture<'static, Result<Bytes, StoreFault>>;
}

/// What opening a session came to.
pub enum Opening {
    /// The session may be registered.
    Granted {
        /// Its storage.
        store: Arc<dyn SessionStore>,
    },
    /// The session that it resumes had committed.
    AlreadyCommitted {
        /// Its snapshot.
        snapshot: SnapshotId,
        /// Its receipt.
        receipt: Vec<u8>,
    },
}

/// The server behind the control connections.
pub trait Host: Send + Sync + 'static {
    /// Takes the lease of a session that is about to be registered. `nonce`: what this server sent in its `Hello`.
    fn open(
        &self,
        peer: Peer,
        session: SessionId,
        request: OpenSession,
        nonce: [u8; 32],
    ) -> BoxFuture<'static, Result<Opening, Refused>>;
    /// Answers a request that needs no session (repositories, snapshots, status, management). `nonce`: as in [`Host::open`].
    fn answer(&self, peer: Peer, request: Message, nonce: [u8; 32]) -> BoxFuture<'static, Result<Message, Refused>>;
    /// Fresh random bytes.
    fn random(&self) -> [u8; 32];
}
