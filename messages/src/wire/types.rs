//! The bodies of the messages. Every list and text is checked against its limit after decoding (`check`).

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use crate::ids::{
    AgentId, ChunkId, Incarnation, RepositoryName, SessionId, SessionToken, SnapshotId, StreamIndex, TenantName,
};
use crate::limits;
use crate::wire::manage::{Deletion, SnapshotTags};

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Purpose {
    /// Control messages: requests, replies, one session at most.
    Control,
    /// One data stream.
    Data,
}

/// First message of both sides on every connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// Oldest protocol version spoken.
    pub version_min: u16,
    /// Newest protocol version spoken. Both sides use the smaller of their newest.
    pub version_max: u16,
    /// Bit set of optional capabilities; unknown bits are ignored. None is defined in version 1.
    pub capabilities: u64,
    /// Program and version, for logs.
    pub software: String,
    /// Fresh random bytes; a client signs the server's to prove its writer key.
    pub nonce: [u8; 32],
    /// What the connection is for (the server repeats the client's).
    pub purpose: Purpose,
}

/// Asks for a repository's public file and key slots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescribeRepository {
    /// Its name within the tenant.
    pub repository: RepositoryName,
}

/// Answer to [`DescribeRepository`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryDescribed {
    /// The repository file (`format::repository`).
    pub file: ByteBuf,
    /// Its key slots (`format::keys`).
    pub slots: Vec<ByteBuf>,
    /// How it keeps its snapshots.
    pub keeping: KeepingRules,
}

/// Makes a repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CreateRepository {
    /// The repository file.
    pub file: ByteBuf,
    /// Its first key slots, at least one.
    pub slots: Vec<ByteBuf>,
}

/// How a repository keeps its snapshots.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeepingRules {
    /// How long a deleted snapshot can be brought back, seconds.
    pub undelete_s: u64,
    /// Before it is this old, by the server's clock, nobody can delete a snapshot; seconds.
    pub min_retention_s: u64,
    /// Whether agents with the full capability may delete snapshots.
    pub agents_may_delete: bool,
}

/// Asks for snapshots in the order of their commits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListSnapshots {
    /// The repository.
    pub repository: RepositoryName,
    /// The deleted ones that can still be brought back, instead of those that are kept.
    pub deleted: bool,
    /// Only snapshots after this place in the order; 0 for all.
    pub after_order: u64,
    /// At most so many.
    pub limit: u32,
}

/// One snapshot of a listing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedSnapshot {
    /// Its place in the order of commits.
    pub order: u64,
    /// The signed manifest.
    pub manifest: ByteBuf,
    /// The server's receipt.
    pub receipt: ByteBuf,
    /// Tags that replace those of the manifest.
    pub tags: Option<SnapshotTags>,
    /// Nobody can delete it.
    pub protected: bool,
    /// That it was deleted.
    pub deletion: Option<Deletion>,
}

/// Answer to [`ListSnapshots`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotsListed {
    /// A page in ascending order; shorter than its limit does not mean the last: ask until it is empty.
    pub snapshots: Vec<ListedSnapshot>,
}

/// Asks what became of a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FindSnapshot {
    /// The repository.
    pub repository: RepositoryName,
    /// The snapshot.
    pub snapshot: SnapshotId,
}

/// Answer to [`FindSnapshot`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotFound {
    /// What became of it.
    pub fate: SnapshotFate,
}

/// What became of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotFate {
    /// There never was one, as far as the server remembers. An agent that was given its receipt knows better.
    Unknown,
    /// It is kept.
    Kept,
    /// It was deleted and can be brought back.
    Deleted,
    /// It was deleted and is gone for good.
    Purged,
}

/// Answer to `GetStatus`: what a tenant's agent may know of the server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReported {
    /// Program and version.
    pub software: String,
    /// The tenant that the server takes the asking agent for.
    pub tenant: TenantName,
    /// The agent's id.
    pub agent: AgentId,
    /// Seconds since the server started.
    pub uptime_seconds: u64,
    /// Free bytes of the storage.
    pub free_bytes: u64,
    /// The tenant's repositories.
    pub repositories: Vec<RepositoryStatus>,
    /// The tenant's open sessions.
    pub sessions: Vec<SessionStatus>,
}

/// One repository in a status report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryStatus {
    /// Its name.
    pub name: RepositoryName,
    /// Snapshots kept.
    pub snapshots: u64,
    /// Deleted snapshots that can be brought back.
    pub deleted: u64,
    /// Bytes that packs take on disk.
    pub stored_bytes: u64,
    /// Blocks that wait to be freed.
    pub condemned_blocks: u64,
    /// Blocks, without those that were freed.
    pub blocks: u64,
    /// Copies of chunks in the index; those whose flag changed may count twice for a while.
    pub chunks: u64,
    /// Blocks that were found damaged and withdrawn.
    pub damaged_blocks: u64,
}

/// One open session in a status report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionStatus {
    /// Its id.
    pub session: SessionId,
    /// The repository's name.
    pub repository: RepositoryName,
    /// The agent.
    pub agent: AgentId,
    /// State of the session machine.
    pub state: String,
    /// Streams joined.
    pub streams: u16,
    /// Blocks durable without a gap.
    pub watermark: u64,
}

/// What a session is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SessionKind {
    /// The agent sends blocks and commits a snapshot.
    Backup,
    /// The agent fetches chunks.
    Restore,
    /// The agent stores chunks again that the server has, so that blocks that are mostly dead can be freed. Every block is
    /// stored, whatever is known.
    Repack,
}

/// Opens a session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenSession {
    /// Backup or restore.
    pub kind: SessionKind,
    /// The repository.
    pub repository: RepositoryName,
    /// The session that the server has lost, if this one carries on for it.
    pub resume_of: Option<SessionId>,
    /// The writer certificate (97 bytes, `format::keys`).
    pub writer: ByteBuf,
    /// Ed25519 signature (64 bytes) of the writer key over `open_session_proof(server nonce, repository id)`.
    pub proof: ByteBuf,
}

/// The session is registered; streams may join with the token.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SessionOpened {
    /// Its id.
    pub session: SessionId,
    /// What lets streams join.
    pub token: SessionToken,
    /// First incarnation.
    pub incarnation: Incarnation,
    /// Backup: most unacknowledged bytes the agent should keep under way. Restore: initial credit, bytes.
    pub window_bytes: u64,
    /// Most streams of this session.
    pub max_streams: u16,
    /// Where streams connect to; empty means: where the control connection is.
    pub data_addresses: Vec<String>,
}

/// Which of these chunks are known?
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueryChunks {
    /// Ids of 32 bytes each, one after another.
    pub ids: ByteBuf,
}

/// Answer to [`QueryChunks`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChunksKnown {
    /// One bit per id, least significant first; 1 = known. Spare bits are zero.
    pub bitmap: ByteBuf,
}

/// Re-attaches a control connection to its session.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// The session.
    pub session: SessionId,
    /// Its token.
    pub token: SessionToken,
    /// The incarnation that the agent last had.
    pub incarnation: Incarnation,
}

/// A half-open range of sequence numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SequenceRange {
    /// First.
    pub start: u64,
    /// One after the last.
    pub end: u64,
}

/// Answer to [`Attach`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attached {
    /// The new incarnation.
    pub incarnation: Incarnation,
    /// Every sequence number below it is durable.
    pub watermark: u64,
    /// Durable ranges above the watermark.
    pub ranges: Vec<SequenceRange>,
}

/// The server misses these for longer than its progress deadline.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Retransmit {
    /// Missing sequence numbers.
    pub ranges: Vec<SequenceRange>,
}

/// Everything has been sent: make it a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Commit {
    /// The signed manifest.
    pub manifest: ByteBuf,
    /// Number of blocks of the session: the commit waits until the watermark reaches it.
    pub blocks: u64,
}

/// The snapshot is committed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Committed {
    /// Its id.
    pub snapshot: SnapshotId,
    /// The server's signed receipt.
    pub receipt: ByteBuf,
}

/// Chunks reachable from the root are not known: read them again, send them, commit again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MissingChunks {
    /// Some of them, 32 bytes each.
    pub ids: ByteBuf,
    /// Whether there are more.
    pub more: bool,
}

/// Ends a session without a snapshot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AbortSession {
    /// Why, for people.
    pub reason: String,
}

/// Asks for blocks that hold these chunks (restore).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FetchChunks {
    /// Chosen by the agent; in the upper half of the sequence number of every block that answers it.
    pub request: u32,
    /// The snapshot that needs them: copies in its writer domain are looked for, and it is kept as long as the session lasts.
    pub snapshot: SnapshotId,
    /// Wanted ids in the order in which they are needed, 32 bytes each.
    pub ids: ByteBuf,
}

/// All blocks of a fetch have been handed to the streams.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FetchDone {
    /// The request.
    pub request: u32,
    /// How many blocks answer it.
    pub blocks: u32,
    /// What each stream was handed of them last. When all of that has come, or its connection is over, no more will.
    pub carried: Vec<Carried>,
    /// Wanted ids of which there is no copy, 32 bytes each.
    pub unknown: ByteBuf,
    /// Blocks that could not be read, for people; empty if none.
    pub damage: String,
}

/// What one stream's newest connection, of those that took part, was handed of a request. Earlier ones are over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carried {
    /// The stream.
    pub stream: StreamIndex,
    /// Which connection of it.
    pub incarnation: Incarnation,
    /// How many blocks.
    pub blocks: u32,
}

/// The agent has used blocks: so many bytes may be sent since the session began, beyond its first credit, and what was lost
/// with connections.
///
/// All of it are sums, not steps: they may be lost with a connection, or come twice. A block costs its length, but at least
/// [`Credit::BLOCK_MIN`] bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Credit {
    /// Bytes granted in all.
    pub granted: u64,
    /// What came over connections that are over: the rest of what they were handed is lost, and may be sent beyond.
    pub receipts: Vec<Receipt>,
}

/// What an agent got over those connections of a stream that are over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// The stream.
    pub stream: StreamIndex,
    /// Its connections before this one are over.
    pub over_before: Incarnation,
    /// What the blocks cost that came over them whole, bytes.
    pub received: u64,
}

impl Credit {
    /// What a block costs at least, bytes; bounds the number of blocks under way.
    pub const BLOCK_MIN: u64 = 16 << 10;

    /// What a block of `len` bytes costs.
    pub fn cost(len: u64) -> u64 {
        len.max(Self::BLOCK_MIN)
    }
}

/// Not now: ask again after this time. Does not consume retries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Defer {
    /// Milliseconds.
    pub milliseconds: u64,
}

/// Why a request was refused. On the wire a `u32`, in this order from 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "u32", into = "u32")]
pub enum RefusalCode {
    /// The request is malformed or not allowed in this state.
    Invalid,
    /// The identity may not do this. Also the answer where existence must not be told.
    NotPermitted,
    /// No such repository in this tenant.
    NoSuchRepository,
    /// The repository exists already.
    RepositoryExists,
    /// The server does not have this session (any more).
    NoSuchSession,
    /// Another incarnation has taken over.
    Superseded,
    /// Storage or quota is full.
    Full,
    /// The server is stopping.
    Stopping,
    /// No common protocol version.
    Version,
    /// The session has ended; the text says how.
    Ended,
    /// The server failed; its log says more.
    Internal,
    /// A reason that only a later version knows; the text says it. Nothing comes of asking again.
    Other(u32),
}

impl RefusalCode {
    const KNOWN: [Self; 11] = [
        Self::Invalid,
        Self::NotPermitted,
        Self::NoSuchRepository,
        Self::RepositoryExists,
        Self::NoSuchSession,
        Self::Superseded,
        Self::Full,
        Self::Stopping,
        Self::Version,
        Self::Ended,
        Self::Internal,
    ];
}

impl From<u32> for RefusalCode {
    fn from(number: u32) -> Self {
        let known = usize::try_from(number).ok().and_then(|number| Self::KNOWN.get(number).copied());
        known.unwrap_or(Self::Other(number))
    }
}

impl From<RefusalCode> for u32 {
    fn from(code: RefusalCode) -> Self {
        match code {
            RefusalCode::Other(number) => number,
            known => RefusalCode::KNOWN
                .iter()
                .zip(0..)
                .find_map(|(code, n)| (*code == known).then_some(n))
                .unwrap_or(Self::MAX),
        }
    }
}

/// A request was refused. Nothing has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refused {
    /// Why.
    pub code: RefusalCode,
    /// For people.
    pub message: String,
}

impl Refused {
    /// A refusal; the text is cut to the limit.
    pub fn new(code: RefusalCode, message: impl Into<String>) -> Self {
        let mut message = message.into();
        let mut end = message.len().min(limits::TEXT_BYTES_MAX);
        while !message.is_char_boundary(end) {
            end -= 1;
        }
        message.truncate(end);
        Self { code, message }
    }
}

/// Are you there? Sent when a connection has been quiet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ping {
    /// Returned as it is.
    pub stamp: u64,
}

/// Answer to [`Ping`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pong {
    /// The ping's stamp.
    pub stamp: u64,
}

/// Why a stream joins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum JoinReason {
    /// The session's first stream with this index.
    First,
    /// The stream with this index was lost.
    Replacement,
}

/// First message after `Hello` on a data connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    /// The session.
    pub session: SessionId,
    /// Its token, from `SessionOpened`.
    pub token: SessionToken,
    /// The stream's number in the session.
    pub index: StreamIndex,
    /// Counts the connections of this index; a newer one replaces an older one.
    pub incarnation: Incarnation,
    /// Why.
    pub reason: JoinReason,
}

/// These blocks are durable (G1).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ack {
    /// Every sequence number below it is durable.
    pub watermark: u64,
    /// Durable ranges above the watermark.
    pub ranges: Vec<SequenceRange>,
}

/// Asks for a client certificate (on the enrolment ALPN only).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enroll {
    /// The enrolment token's secret.
    pub secret: ByteBuf,
    /// PKCS #10 certificate request, DER. Only its public key is used.
    pub request: ByteBuf,
    /// Host name, for people.
    pub label: String,
}

/// Asks for a new certificate for the key in use (on a session connection).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Renew {
    /// PKCS #10 certificate request, DER, for the enrolled key.
    pub request: ByteBuf,
}

/// The certificate.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Enrolled {
    /// The tenant.
    pub tenant: TenantName,
    /// The agent's id.
    pub agent: AgentId,
    /// Client certificate, DER.
    pub certificate: ByteBuf,
    /// CA certificate, DER.
    pub authority: ByteBuf,
}

/// Splits a byte string of ids. `None` if its length is not a multiple of 32 or exceeds `max` ids.
pub fn split_ids(bytes: &[u8], max: usize) -> Option<Vec<ChunkId>> {
    let (ids, rest) = bytes.as_chunks::<32>();
    (rest.is_empty() && ids.len() <= max).then(|| ids.iter().copied().map(ChunkId).collect())
}

/// Joins ids into one byte string.
pub fn join_ids<'a>(ids: impl IntoIterator<Item = &'a ChunkId>) -> ByteBuf {
    let mut bytes = Vec::new();
    for id in ids {
        bytes.extend_from_slice(id.as_bytes());
    }
    ByteBuf::from(bytes)
}

/// Packs answers into a bitmap, least significant bit first.
pub fn pack_bitmap(known: &[bool]) -> ByteBuf {
    let pack = |bits: &[bool]| bits.iter().enumerate().fold(0u8, |byte, (i, &bit)| byte | u8::from(bit) << i);
    ByteBuf::from(known.chunks(8).map(pack).collect::<Vec<u8>>())
}

/// Unpacks `count` answers. `None` if the bitmap's length does not fit.
pub fn unpack_bitmap(bitmap: &[u8], count: usize) -> Option<Vec<bool>> {
    (bitmap.len() == count.div_ceil(8))
        .then(|| bitmap.iter().flat_map(|byte| (0..8).map(move |i| byte >> i & 1 == 1)).take(count).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::codec;

    #[test]
    fn bitmaps_read_back_at_every_length() {
        for len in 0..40usize {
            let known: Vec<bool> = (0..len).map(|i| i % 3 == 0).collect();
            let packed = pack_bitmap(&known);
            assert_eq!(unpack_bitmap(&packed, len).unwrap(), known);
            assert!(unpack_bitmap(&packed, len + 9).is_none());
        }
    }

    #[test]
    fn a_refusal_for_a_reason_of_a_later_version_is_read_with_its_text() {
        for number in [0, 10, 11, 4_000_000_000_u32] {
            let later = (number, "the quota is used up".to_owned());
            let mut bytes = Vec::new();
            codec::encode("later", &later, &mut bytes).unwrap();
            let refusal: Refused = codec::decode("Refused", &bytes).unwrap();
            assert_eq!((u32::from(refusal.code), &refusal.message), (number, &later.1));
            assert_eq!(matches!(refusal.code, RefusalCode::Other(_)), number > 10);
            let mut again = Vec::new();
            codec::encode("Refused", &refusal, &mut again).unwrap();
            assert_eq!(again, bytes);
        }
    }

    #[test]
    fn a_refusal_is_cut_between_characters() {
        let refusal = Refused::new(RefusalCode::Internal, "ö".repeat(limits::TEXT_BYTES_MAX));
        assert!(refusal.message.len() <= limits::TEXT_BYTES_MAX);
    }
}
