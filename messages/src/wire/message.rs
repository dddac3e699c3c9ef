//! All messages by kind number, their encoding into frames, and the limits of their lists and texts.

use super::frame::{FLAG_CRITICAL, Frame};
use super::manage::{Manage, Managed, Outcome};
use super::types::{
    AbortSession, Ack, Attach, Attached, ChunksKnown, Commit, Committed, CreateRepository, Credit, Defer,
    DescribeRepository, Enroll, Enrolled, FetchChunks, FetchDone, FindSnapshot, Hello, Join, ListSnapshots,
    MissingChunks, OpenSession, Ping, Pong, QueryChunks, Refused, Renew, RepositoryDescribed, Retransmit,
    SessionOpened, SnapshotFound, SnapshotsListed, StatusReported,
};
use super::{WireError, codec};
use crate::ids::ChunkId;
use crate::limits;

/// Pairs a reply with its request on one connection. Zero: neither.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Tag(pub u32);

macro_rules! messages {
    ($($(#[$doc:meta])* $kind:literal $constant:ident $variant:ident $(($body:ty))?),+ $(,)?) => {
        /// Kind numbers. A number is never used again for something else.
        pub mod kinds {
            $($(#[$doc])* pub const $constant: u16 = $kind;)+
            /// A block on a data stream (`wire::frame::BlockFrame`); the only kind whose body is not a message.
            pub const BLOCK: u16 = 0x0042;
            /// Every kind with its name.
            pub const ALL: &[(u16, &str)] = &[$(($constant, stringify!($variant)),)+ (BLOCK, "Block")];
        }

        /// Every message of the protocol.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Message {
            $($(#[$doc])* $variant $(($body))?,)+
        }

        impl Message {
            /// Kind number.
            pub fn kind(&self) -> u16 {
                match self { $(messages!(@pattern $variant $(($body))?) => kinds::$constant,)+ }
            }

            /// Name, for logs and errors.
            pub fn name(&self) -> &'static str {
                match self { $(messages!(@pattern $variant $(($body))?) => stringify!($variant),)+ }
            }

            fn encode_body(&self, out: &mut Vec<u8>) -> Result<(), WireError> {
                match self { $(messages!(@bind $variant body $(($body))?) => messages!(@encode $variant body out $(($body))?),)+ }
            }

            fn decode_body(kind: u16, body: &[u8]) -> Result<Self, WireError> {
                match kind {
                    $(kinds::$constant => messages!(@decode $variant body $(($body))?),)+
                    _ => Err(WireError::UnknownCritical { kind }),
                }
            }
        }

        /// Whether this program knows the kind.
        pub fn is_known_kind(kind: u16) -> bool {
            matches!(kind, $(kinds::$constant)|+ | kinds::BLOCK)
        }
    };
    (@pattern $variant:ident ($body:ty)) => { Message::$variant(_) };
    (@pattern $variant:ident) => { Message::$variant };
    (@bind $variant:ident $name:ident ($body:ty)) => { Message::$variant($name) };
    (@bind $variant:ident $name:ident) => { Message::$variant };
    (@encode $variant:ident $name:ident $out:ident ($body:ty)) => { codec::encode(stringify!($variant), $name, $out) };
    (@encode $variant:ident $name:ident $out:ident) => { Ok(()) };
    (@decode $variant:ident $name:ident ($body:ty)) => { Ok(Message::$variant(codec::decode(stringify!($variant), $name)?)) };
    (@decode $variant:ident $name:ident) => {
        if $name.is_empty() { Ok(Message::$variant) } else {
            Err(WireError::Malformed { what: stringify!($variant), why: "it has no body".into() })
        }
    };
}

messages! {
    /// Both: first message of every connection.
    0x0001 HELLO Hello(Hello),
    /// Server: the request was refused.
    0x0002 REFUSED Refused(Refused),
    /// Server: ask again later.
    0x0003 DEFER Defer(Defer),
    /// Both: are you there?
    0x0004 PING Ping(Ping),
    /// Both: yes.
    0x0005 PONG Pong(Pong),
    /// Agent: a repository's public file and key slots.
    0x0010 DESCRIBE_REPOSITORY DescribeRepository(DescribeRepository),
    /// Server: answer.
    0x0011 REPOSITORY_DESCRIBED RepositoryDescribed(RepositoryDescribed),
    /// Agent: make a repository.
    0x0012 CREATE_REPOSITORY CreateRepository(CreateRepository),
    /// Server: it exists and is durable.
    0x0013 REPOSITORY_CREATED RepositoryCreated,
    /// Agent: list snapshots.
    0x0014 LIST_SNAPSHOTS ListSnapshots(ListSnapshots),
    /// Server: a page of them.
    0x0015 SNAPSHOTS_LISTED SnapshotsListed(SnapshotsListed),
    /// Agent: how is the server?
    0x0016 GET_STATUS GetStatus,
    /// Server: so.
    0x0017 STATUS_REPORTED StatusReported(StatusReported),
    /// Agent: change what a repository keeps.
    0x0018 MANAGE Manage(Manage),
    /// Server: what that came to.
    0x0019 MANAGED Managed(Managed),
    /// Agent: what became of a snapshot?
    0x001a FIND_SNAPSHOT FindSnapshot(FindSnapshot),
    /// Server: this.
    0x001b SNAPSHOT_FOUND SnapshotFound(SnapshotFound),
    /// Agent: open a session.
    0x0020 OPEN_SESSION OpenSession(OpenSession),
    /// Server: it is registered.
    0x0021 SESSION_OPENED SessionOpened(SessionOpened),
    /// Agent: which of these chunks are known?
    0x0022 QUERY_CHUNKS QueryChunks(QueryChunks),
    /// Server: these.
    0x0023 CHUNKS_KNOWN ChunksKnown(ChunksKnown),
    /// Agent: this connection now speaks for the session.
    0x0024 ATTACH Attach(Attach),
    /// Server: yes, and this much is durable.
    0x0025 ATTACHED Attached(Attached),
    /// Server: send these again.
    0x0026 RETRANSMIT Retransmit(Retransmit),
    /// Agent: make it a snapshot.
    0x0027 COMMIT Commit(Commit),
    /// Server: done; the snapshot's receipt.
    0x0028 COMMITTED Committed(Committed),
    /// Server: not yet, these chunks are not known.
    0x0029 MISSING_CHUNKS MissingChunks(MissingChunks),
    /// Agent: end the session without a snapshot.
    0x002a ABORT_SESSION AbortSession(AbortSession),
    /// Server: ended.
    0x002b SESSION_ABORTED SessionAborted,
    /// Agent: send blocks that hold these chunks.
    0x002c FETCH_CHUNKS FetchChunks(FetchChunks),
    /// Server: all of them are on their way.
    0x002d FETCH_DONE FetchDone(FetchDone),
    /// Agent: so many more bytes may come.
    0x002e CREDIT Credit(Credit),
    /// Agent, on a data connection: join a session.
    0x0040 JOIN Join(Join),
    /// Server: joined.
    0x0041 JOINED Joined,
    /// Server: these blocks are durable.
    0x0043 ACK Ack(Ack),
    /// Agent: nothing more will be sent on this stream.
    0x0044 DRAIN Drain,
    /// Server: nothing more will be sent on this stream; close it.
    0x0045 DRAINED Drained,
    /// Agent, on the enrolment ALPN: a client certificate, please.
    0x0050 ENROLL Enroll(Enroll),
    /// Server: here it is.
    0x0051 ENROLLED Enrolled(Enrolled),
    /// Agent: a new certificate for the key in use, please. Answered with `Enrolled`.
    0x0052 RENEW Renew(Renew),
}

impl Message {
    /// The frame that carries this message: `tag u32`, then the bincode body. All kinds of version 1 are critical.
    pub fn to_frame(&self, tag: Tag) -> Result<Frame, WireError> {
        let mut body = tag.0.to_le_bytes().to_vec();
        self.encode_body(&mut body)?;
        if body.len() > limits::CONTROL_BYTES_MAX {
            return Err(self.too_much("the whole message"));
        }
        Ok(Frame { kind: self.kind(), flags: FLAG_CRITICAL, body: body.into() })
    }

    /// Reads a frame and checks every list and text against its limit.
    pub fn decode(frame: &Frame) -> Result<(Tag, Self), WireError> {
        let (tag, body) = frame
            .body
            .split_first_chunk()
            .ok_or(WireError::Malformed { what: "message", why: "shorter than its tag".into() })?;
        let message = Self::decode_body(frame.kind, body)?;
        message.check()?;
        Ok((Tag(u32::from_le_bytes(*tag)), message))
    }

    fn too_much(&self, part: &str) -> WireError {
        WireError::Malformed { what: self.name(), why: format!("{part} exceeds its limit") }
    }

    fn check(&self) -> Result<(), WireError> {
        let within = |part: &str, len: usize, max: usize| {
            if len <= max { Ok(()) } else { Err(self.too_much(part)) }
        };
        let ids = |bytes: &[u8], max: usize| {
            if bytes.len().is_multiple_of(ChunkId::LEN) {
                Ok(())
            } else {
                Err(self.too_much("a list of ids not of 32 bytes"))
            }
            .and_then(|()| within("a list of ids", bytes.len() / ChunkId::LEN, max))
        };
        match self {
            Self::Hello(m) => within("software", m.software.len(), limits::TEXT_BYTES_MAX),
            Self::Refused(m) => within("message", m.message.len(), limits::TEXT_BYTES_MAX),
            Self::RepositoryDescribed(RepositoryDescribed { slots, .. })
            | Self::CreateRepository(CreateRepository { slots, .. }) => {
                within("key slots", slots.len(), limits::KEY_SLOTS_MAX)?;
                slots.iter().try_for_each(|slot| within("a key slot", slot.len(), limits::KEY_SLOT_BYTES_MAX))
            }
            Self::SnapshotsListed(m) => {
                within("snapshots", m.snapshots.len(), limits::LIST_PAGE_MAX)?;
                m.snapshots.iter().try_for_each(|s| {
                    within("a manifest", s.manifest.len(), limits::MANIFEST_BYTES_MAX)?;
                    within("tags", s.tags.as_ref().map_or(0, |tags| tags.tags.len()), limits::TAGS_MAX)
                })
            }
            Self::StatusReported(m) => {
                within("software", m.software.len(), limits::TEXT_BYTES_MAX)?;
                within("repositories", m.repositories.len(), limits::STATUS_ROWS_MAX)?;
                within("sessions", m.sessions.len(), limits::STATUS_ROWS_MAX)
            }
            Self::Manage(m) => within("operation", m.operation.len(), limits::CONTROL_BYTES_MAX),
            Self::Managed(m) => match &m.outcome {
                Outcome::Kept { kept } => within("snapshots", kept.len(), limits::MANAGED_SNAPSHOTS_MAX),
                Outcome::PartlyDead { blocks } => within("blocks", blocks.len(), limits::PARTLY_DEAD_MAX),
                Outcome::Scrubbed(report) => {
                    within("damaged blocks", report.damaged.len(), limits::DAMAGE_ROWS_MAX)?;
                    within("affected snapshots", report.affected.len(), limits::DAMAGE_ROWS_MAX)
                }
                Outcome::Done | Outcome::Collected(_) => Ok(()),
            },
            Self::Renew(m) => within("certificate request", m.request.len(), limits::CERTIFICATE_BYTES_MAX),
            Self::Enrolled(m) => {
                within("certificate", m.certificate.len(), limits::CERTIFICATE_BYTES_MAX)?;
                within("authority", m.authority.len(), limits::CERTIFICATE_BYTES_MAX)
            }
            Self::SessionOpened(m) => {
                within("data addresses", m.data_addresses.len(), limits::DATA_ADDRESSES_MAX)?;
                m.data_addresses.iter().try_for_each(|a| within("an address", a.len(), limits::ADDRESS_BYTES_MAX))
            }
            Self::QueryChunks(m) => ids(&m.ids, limits::QUERY_IDS_MAX),
            Self::ChunksKnown(m) => within("bitmap", m.bitmap.len(), limits::QUERY_IDS_MAX / 8),
            Self::Attached(Attached { ranges, .. })
            | Self::Retransmit(Retransmit { ranges })
            | Self::Ack(Ack { ranges, .. }) => within("ranges", ranges.len(), limits::RANGES_MAX),
            Self::Commit(m) => within("manifest", m.manifest.len(), limits::MANIFEST_BYTES_MAX),
            Self::MissingChunks(m) => ids(&m.ids, limits::MISSING_IDS_MAX),
            Self::AbortSession(m) => within("reason", m.reason.len(), limits::TEXT_BYTES_MAX),
            Self::FetchChunks(m) => ids(&m.ids, limits::FETCH_IDS_MAX),
            Self::FetchDone(m) => {
                within("damage", m.damage.len(), limits::TEXT_BYTES_MAX)?;
                within("streams", m.carried.len(), limits::STREAMS_MAX.into())?;
                ids(&m.unknown, limits::FETCH_IDS_MAX)
            }
            Self::Credit(m) => within("streams", m.receipts.len(), limits::STREAMS_MAX.into()),
            Self::Enroll(m) => {
                within("secret", m.secret.len(), limits::TOKEN_BYTES_MAX)?;
                within("certificate request", m.request.len(), limits::CERTIFICATE_BYTES_MAX)?;
                within("label", m.label.len(), limits::FILE_NAME_BYTES_MAX)
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_bytes::ByteBuf;

    use super::*;
    use crate::ids::{Incarnation, SessionId, SessionToken, StreamIndex};
    use crate::wire::types::{JoinReason, SequenceRange};

    fn samples() -> Vec<Message> {
        vec![
            Message::GetStatus,
            Message::Ping(Ping { stamp: 9 }),
            Message::Ack(Ack { watermark: 5, ranges: vec![SequenceRange { start: 7, end: 9 }] }),
            Message::QueryChunks(QueryChunks { ids: ByteBuf::from(vec![7; 64]) }),
            Message::Join(Join {
                session: SessionId([1; 16]),
                token: SessionToken([2; 32]),
                index: StreamIndex(3),
                incarnation: Incarnation(4),
                reason: JoinReason::First,
            }),
        ]
    }

    #[test]
    fn messages_read_back_with_their_tags() {
        for message in samples() {
            let frame = message.to_frame(Tag(77)).unwrap();
            assert_eq!(Message::decode(&frame).unwrap(), (Tag(77), message));
        }
    }

    #[test]
    fn the_bytes_of_a_join_are_those_of_the_document() {
        let frame = samples().pop().unwrap().to_frame(Tag(1)).unwrap();
        let mut expected = vec![1, 0, 0, 0];
        expected.extend_from_slice(&[1; 16]);
        expected.extend_from_slice(&[2; 32]);
        expected.extend_from_slice(&[3, 0, 4, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&frame.body[..], &expected[..]);
    }

    #[test]
    fn s43_a_list_beyond_its_limit_and_trailing_bytes_are_refused() {
        let many = Message::QueryChunks(QueryChunks { ids: ByteBuf::from(vec![0; 32 * (limits::QUERY_IDS_MAX + 1)]) });
        assert!(Message::decode(&many.to_frame(Tag(0)).unwrap()).is_err());
        let odd = Message::QueryChunks(QueryChunks { ids: ByteBuf::from(vec![0; 33]) });
        assert!(Message::decode(&odd.to_frame(Tag(0)).unwrap()).is_err());

        let mut frame = Message::GetStatus.to_frame(Tag(0)).unwrap();
        frame.body = [&frame.body[..], &[0]].concat().into();
        assert!(Message::decode(&frame).is_err());
    }

    #[test]
    fn s43_a_length_that_lies_allocates_nothing() {
        let mut body = 0u32.to_le_bytes().to_vec();
        body.extend_from_slice(&u64::MAX.to_le_bytes());
        let frame = Frame { kind: kinds::QUERY_CHUNKS, flags: 0, body: body.into() };
        assert!(Message::decode(&frame).is_err());
    }
}
