//! Sealing and opening: blocks, and the manifests of snapshots.
//!
//! A data key is made per session and wrapped to the repository's public key. Every block and every manifest derives its
//! own key from it by a salt that depends on the bytes to be sealed, so a key never meets two plaintexts, not even when a
//! virtual machine is cloned in the middle of a session.

mod body;
mod compression;
mod data_key;
mod manifest;
mod open;
mod seal_block;

use strandline_messages::format::FormatError;
use strandline_messages::{BlockDigest, ChunkId, RepositoryId};

use crate::keys::KeyError;

pub use body::Body;
pub use compression::{Compression, LevelControl, Sealing, USUAL_LEVEL};
pub use data_key::DataKey;
pub use manifest::{ManifestFields, open_manifest, sign_manifest, verify_manifest};
pub use open::{OpenedBlock, OpenedChunk, Opener};
pub use seal_block::{SealedBlock, Sealer};

/// Why a block or a manifest cannot be sealed.
#[derive(Debug, thiserror::Error)]
pub enum SealError {
    /// The keyset cannot do it, or there are no random bytes.
    #[error(transparent)]
    Key(#[from] KeyError),
    /// A limit of the format is exceeded or parts contradict one another; nothing was sealed.
    #[error("{0}; nothing was sealed")]
    Format(#[from] FormatError),
    /// The compressor failed.
    #[error("compressing a block failed: {0}; nothing was sealed")]
    Compress(std::io::Error),
    /// The cryptographic library refused.
    #[error("sealing failed: {what}; nothing was sealed")]
    Crypto {
        /// What was being done.
        what: &'static str,
    },
}

/// Why a block or a manifest cannot be opened. None of its bytes have been used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Not a well-formed block or manifest, or its digest does not match.
    #[error("{0}")]
    Format(#[from] FormatError),
    /// It belongs to another repository.
    #[error("{what} belongs to repository {found}, not to {expected}")]
    ForeignRepository {
        /// A block or a manifest.
        what: &'static str,
        /// Ours.
        expected: RepositoryId,
        /// The one in its header.
        found: RepositoryId,
    },
    /// Wrapped by an algorithm that this program does not know.
    #[error(
        "the data key is wrapped by algorithm {algorithm}, which this program does not know: use a newer Strandline"
    )]
    UnknownWrapping {
        /// Its number.
        algorithm: u8,
    },
    /// This keyset may not read.
    #[error(
        "this key may only write, so it cannot open what was saved; use a key with the read or the full capability"
    )]
    NoReadCapability,
    /// The data key does not unwrap.
    #[error("the data key of {what} cannot be unwrapped: it was made for another key or forged")]
    Unwrap {
        /// A block or a manifest.
        what: &'static str,
    },
    /// The key commitment does not match the derived key.
    #[error("the key commitment of {what} does not match: its header was changed")]
    Commitment {
        /// A block or a manifest.
        what: &'static str,
    },
    /// The authentication tag does not match.
    #[error("{what} was changed: its authentication tag does not match")]
    Tag {
        /// A block or a manifest.
        what: &'static str,
    },
    /// The body does not decompress within the limit.
    #[error("the body of block {block} does not decompress to at most {max} bytes")]
    Decompress {
        /// The block.
        block: BlockDigest,
        /// The limit, bytes.
        max: usize,
    },
    /// A chunk is not the chunk that its id names: content, kind or references differ.
    #[error(
        "block {block} holds something else under the id of chunk {chunk}: it was damaged before sealing or forged"
    )]
    WrongChunk {
        /// The block.
        block: BlockDigest,
        /// The chunk.
        chunk: ChunkId,
    },
    /// The signature or the writer's certificate does not hold.
    #[error("the snapshot manifest is not genuine: {why}")]
    Signature {
        /// What does not hold.
        why: &'static str,
    },
}

impl OpenError {
    pub(crate) fn invalid(what: &'static str, why: &'static str) -> Self {
        Self::Format(FormatError::Invalid { what, why })
    }
}
