//! The wire protocol: frames, messages, and the one codec module. `docs/PROTOCOL.md` is the byte-exact description.

pub mod codec;
pub mod frame;
pub mod manage;
pub mod message;
pub mod types;

pub use frame::{BlockFrame, Frame, FrameDecoder, FrameHeader};
pub use message::{Message, Tag};
pub use types::*;

/// The protocol version that this program speaks.
pub const PROTOCOL_VERSION: u16 = 1;
/// The oldest protocol version that this program still speaks.
pub const PROTOCOL_VERSION_MIN: u16 = 1;

/// Why bytes from a peer are not the protocol. Always ends the connection; its blocks are sent again on another.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// A frame's length exceeds the limit of its kind.
    #[error("a frame of kind {kind:#06x} claims {found} bytes; the limit is {max}")]
    FrameTooLong {
        /// The frame's kind.
        kind: u16,
        /// The length claimed.
        found: u64,
        /// The limit.
        max: u64,
    },
    /// A critical kind that this program does not know.
    #[error("the peer requires a frame of kind {kind:#06x} that this version does not know: use a newer Strandline")]
    UnknownCritical {
        /// The frame's kind.
        kind: u16,
    },
    /// A message's body is not what its kind says.
    #[error("malformed {what}: {why}")]
    Malformed {
        /// The message.
        what: &'static str,
        /// What is wrong.
        why: String,
    },
    /// A message that is not allowed here and now.
    #[error("unexpected {what}: {why}")]
    Unexpected {
        /// The message.
        what: &'static str,
        /// Why it is not allowed.
        why: &'static str,
    },
    /// The two sides have no protocol version in common.
    #[error(
        "no common protocol version: the peer speaks {min} to {max}, this program {PROTOCOL_VERSION_MIN} to {PROTOCOL_VERSION}"
    )]
    NoCommonVersion {
        /// The peer's oldest.
        min: u16,
        /// The peer's newest.
        max: u16,
    },
}
