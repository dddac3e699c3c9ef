//! The bytes on disk, format 1. `docs/FORMAT.md` describes them so that a decoder can be written from it alone.
//!
//! Everything is little endian. Every decoder checks version and limits before it allocates and returns a
//! [`FormatError`]; none panics, whatever the input. Types end in the version that they encode.

pub mod block;
pub mod chunk;
pub mod cursor;
pub mod keys;
pub mod manifest;
pub mod pack;
pub mod pack_state;
pub mod receipt;
pub mod repository;
pub mod tree;

/// Why bytes are not what they were taken for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// The bytes end in the middle of a field.
    #[error("{what} ends early")]
    Truncated {
        /// What was being decoded.
        what: &'static str,
    },
    /// Bytes are left over after the last field.
    #[error("{what} has {extra} bytes too many")]
    Trailing {
        /// What was being decoded.
        what: &'static str,
        /// How many.
        extra: usize,
    },
    /// The first bytes are not this format's.
    #[error("these bytes are not a {what}")]
    Magic {
        /// What was being decoded.
        what: &'static str,
    },
    /// A version that this program does not know.
    #[error("{what} has format version {found}; this program knows {known}: use a newer Strandline")]
    Version {
        /// What was being decoded.
        what: &'static str,
        /// The version found.
        found: u16,
        /// The newest version known.
        known: u16,
    },
    /// A length or count above its limit.
    #[error("{what} is {found}, more than the limit {max}")]
    Limit {
        /// What was too large.
        what: &'static str,
        /// What the bytes say.
        found: u64,
        /// The limit (see [`crate::limits`]).
        max: u64,
    },
    /// A field with an impossible value.
    #[error("{what} is malformed: {why}")]
    Invalid {
        /// What was being decoded.
        what: &'static str,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The stored digest is not the digest of the bytes.
    #[error("{what} is damaged: its digest does not match its bytes")]
    Digest {
        /// What was being decoded.
        what: &'static str,
    },
}
