//! What crosses a boundary in Strandline: identifiers, limits, the wire protocol, the formats on disk, and the messages
//! that actors send to one another inside a process.
//!
//! This crate decides no behaviour and does no I/O. `wire` is described byte for byte in `docs/PROTOCOL.md`, `format` in
//! `docs/FORMAT.md`.

pub mod durable;
pub mod format;
pub mod identity;
pub mod ids;
pub mod limits;
pub mod mail;
pub mod wire;

pub use durable::{Durable, DurableWriter};
pub use identity::{AuthorityHash, EnrolmentSecret, EnrolmentToken, Identity, Role, ServerAddress};
pub use ids::{
    AgentId, BlockDigest, ChunkId, ChunkKind, DomainId, Incarnation, RepositoryId, RepositoryName, Sequence, SessionId,
    SessionToken, SnapshotId, StreamIndex, TenantName,
};
