//! Identifiers. Each is its own type, so that a chunk id cannot be passed where a snapshot id is meant.

use std::fmt;
use std::str::FromStr;

use data_encoding::HEXLOWER;
use serde::{Deserialize, Serialize};

use crate::limits;

/// Why a text is not the identifier it was taken for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// Not lower-case hexadecimal of the right length.
    #[error("`{text}` is not a {what}: expected {expected} lower-case hexadecimal digits")]
    NotHex {
        /// What was expected.
        what: &'static str,
        /// The text as given, cut to 80 characters.
        text: String,
        /// How many digits.
        expected: usize,
    },
    /// Not a legal name.
    #[error(
        "`{text}` is not a {what}: use 1 to {max} of a-z, 0-9, `-`, `_` and `.`, beginning with a letter or a digit"
    )]
    NotAName {
        /// What was expected.
        what: &'static str,
        /// The text as given, cut to 80 characters.
        text: String,
        /// The longest allowed.
        max: usize,
    },
}

fn shortened(text: &str) -> String {
    text.chars().take(80).collect()
}

macro_rules! byte_id {
    ($(#[$doc:meta])* $name:ident, $len:literal, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name(pub [u8; $len]);

        impl $name {
            /// Length in bytes.
            pub const LEN: usize = $len;

            /// The bytes.
            pub fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }

            /// From a slice of exactly [`Self::LEN`] bytes.
            pub fn from_slice(bytes: &[u8]) -> Option<Self> {
                bytes.try_into().ok().map(Self)
            }

            /// The first eight hexadecimal digits, for people.
            pub fn short(&self) -> String {
                let mut text = self.to_string();
                text.truncate(8);
                text
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&HEXLOWER.encode(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({})", stringify!($name), HEXLOWER.encode(&self.0))
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                HEXLOWER
                    .decode(text.as_bytes())
                    .ok()
                    .and_then(|bytes| Self::from_slice(&bytes))
                    .ok_or_else(|| IdError::NotHex { what: $what, text: shortened(text), expected: 2 * $len })
            }
        }
    };
}

byte_id!(
    /// A chunk: keyed BLAKE3-256 over kind, plaintext and references (`format::chunk`).
    ChunkId, 32, "chunk id"
);
byte_id!(
    /// A snapshot: BLAKE3-256 of its signed manifest.
    SnapshotId, 32, "snapshot id"
);
byte_id!(
    /// A block's digest: BLAKE3-256 of everything before it in the block.
    BlockDigest, 32, "block digest"
);
byte_id!(
    /// A repository: random, made with its keyset.
    RepositoryId, 16, "repository id"
);
byte_id!(
    /// A session: random, made by the server's session registry.
    SessionId, 16, "session id"
);
byte_id!(
    /// An enrolled machine: random, made at enrolment, part of its certificate.
    AgentId, 16, "agent id"
);
byte_id!(
    /// A writer domain: zero for agents with the full capability, else derived from the writer's public key.
    DomainId, 16, "writer domain"
);

impl DomainId {
    /// The domain that all agents with the full capability share.
    pub const FULL: Self = Self([0; 16]);
}

/// What lets a stream join a session. Made by the server with the session, sent once, never logged.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SessionToken(pub [u8; 32]);

impl fmt::Debug for SessionToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SessionToken(…)")
    }
}

/// A block's place in its session, counted from 0. Belongs to the session, not to a stream.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Sequence(pub u64);

/// Which attachment of an agent to a session; issued by the server, growing by one at each re-attachment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Incarnation(pub u32);

/// A stream's number within its session, counted from 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct StreamIndex(pub u16);

/// What a chunk holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[repr(u8)]
pub enum ChunkKind {
    /// A piece of file content.
    Data = 1,
    /// One node of a directory, or of a long list of references.
    Tree = 2,
}

impl ChunkKind {
    /// From its byte on disk.
    pub fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Data),
            2 => Some(Self::Tree),
            _ => None,
        }
    }
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                let legal = |c: u8| c.is_ascii_lowercase() || c.is_ascii_digit();
                let bytes = text.as_bytes();
                let starts_well = bytes.first().is_some_and(|&c| legal(c));
                let all_legal = bytes.iter().all(|&c| legal(c) || matches!(c, b'-' | b'_' | b'.'));
                if starts_well && all_legal && bytes.len() <= limits::NAME_BYTES_MAX {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(IdError::NotAName { what: $what, text: shortened(text), max: limits::NAME_BYTES_MAX })
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = IdError;

            fn try_from(text: String) -> Result<Self, IdError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// A tenant's name: the isolation unit. Comes from the certificate alone.
    TenantName, "tenant name"
);
name!(
    /// A repository's name, unique within its tenant.
    RepositoryName, "repository name"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_reads_back_what_it_prints() {
        let id = ChunkId([0xab; 32]);
        assert_eq!(id.to_string().parse::<ChunkId>().unwrap(), id);
        assert!("abcd".parse::<ChunkId>().is_err());
        assert!("AB".repeat(32).parse::<ChunkId>().is_err());
    }

    #[test]
    fn a_name_cannot_leave_its_directory() {
        for bad in ["", ".", "..", "../x", "a/b", "-x", "A", "a b", "a\n", &"x".repeat(65)] {
            assert!(bad.parse::<TenantName>().is_err(), "{bad:?}");
        }
        assert!("web-01.example_x".parse::<RepositoryName>().is_ok());
    }

    #[test]
    fn a_token_is_never_printed() {
        assert_eq!(format!("{:?}", SessionToken([7; 32])), "SessionToken(…)");
    }
}
