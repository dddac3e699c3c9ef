//! A message of every kind that the protocol has, aimed at something that belongs to somebody else.

use std::sync::Arc;

use anyhow::Result;
use strandline_actors::runtime::transport::hello;
use strandline_agent::keys::Keyset;
use strandline_messages::wire::manage::{Manage, Managed, Operation, Outcome};
use strandline_messages::wire::message::kinds;
use strandline_messages::wire::{
    AbortSession, Ack, Attach, Attached, ChunksKnown, Commit, Committed, CreateRepository, Credit, Defer,
    DescribeRepository, Enroll, Enrolled, FetchChunks, FetchDone, FindSnapshot, Frame, KeepingRules, ListSnapshots,
    Message, MissingChunks, OpenSession, Ping, Pong, Purpose, QueryChunks, RefusalCode, Refused, Renew,
    RepositoryDescribed, Retransmit, SessionKind, SessionOpened, SnapshotFate, SnapshotFound, SnapshotsListed,
    StatusReported, Tag, join_ids,
};
use strandline_messages::{AgentId, Incarnation};

use crate::victim::{Target, block_frame, join_message};

/// The tag of every probe.
pub const TAG: Tag = Tag(77);

/// What the one who asks has to ask with.
pub struct Means {
    /// Keys: stolen, forged, or his own.
    pub keys: Arc<Keyset>,
    /// The server's nonce on this connection.
    pub nonce: [u8; 32],
    /// A request for a certificate (PKCS #10, DER), for a key that is not enrolled.
    pub request: Vec<u8>,
    /// The kind of session that he asks for.
    pub session: SessionKind,
}

/// A frame of this kind aimed at `target`; `None` if there is none yet: every kind has to have one.
pub fn probe(kind: u16, target: &Target, means: &Means) -> Result<Option<Frame>> {
    if kind == kinds::BLOCK {
        return Ok(Some(block_frame(0, &target.block)));
    }
    Ok(match message(kind, target, means)? {
        Some(message) => Some(message.to_frame(TAG)?),
        None => None,
    })
}

fn message(kind: u16, target: &Target, means: &Means) -> Result<Option<Message>> {
    let (session, token, snapshot) = (target.session, target.token, target.snapshot);
    let repository = target.repository.clone();
    let ids = join_ids(&target.chunks);
    let writer = means.keys.encoded_certificate().into();
    Ok(Some(match kind {
        kinds::HELLO => Message::Hello(hello(Purpose::Control, [0; 32])),
        kinds::DESCRIBE_REPOSITORY => Message::DescribeRepository(DescribeRepository { repository }),
        kinds::CREATE_REPOSITORY => {
            let slots = target.slots.iter().map(|slot| slot.clone().into()).collect();
            Message::CreateRepository(CreateRepository { file: target.file.encode().into(), slots })
        }
        kinds::LIST_SNAPSHOTS => {
            Message::ListSnapshots(ListSnapshots { repository, deleted: false, after_order: 0, limit: 10 })
        }
        kinds::FIND_SNAPSHOT => Message::FindSnapshot(FindSnapshot { repository, snapshot }),
        kinds::GET_STATUS => Message::GetStatus,
        kinds::MANAGE => {
            // Needs the full capability, and does no harm where it is there. All operations: see `operations`.
            let snapshots = snapshot.as_bytes().to_vec().into();
            let operation = Operation::ProtectSnapshots { snapshots, protected: true }.encode()?;
            let proof = means.keys.sign_manage_proof(&means.nonce, &operation)?.to_vec().into();
            Message::Manage(Manage { repository, writer, proof, operation: operation.into() })
        }
        kinds::OPEN_SESSION => Message::OpenSession(OpenSession {
            kind: means.session,
            repository,
            resume_of: Some(session),
            writer,
            proof: means.keys.sign_session_proof(&means.nonce)?.to_vec().into(),
        }),
        kinds::QUERY_CHUNKS => Message::QueryChunks(QueryChunks { ids }),
        kinds::ATTACH => Message::Attach(Attach { session, token, incarnation: Incarnation(1) }),
        kinds::COMMIT => Message::Commit(Commit { manifest: target.manifest.clone().into(), blocks: 0 }),
        kinds::ABORT_SESSION => Message::AbortSession(AbortSession { reason: "because".into() }),
        kinds::FETCH_CHUNKS => Message::FetchChunks(FetchChunks { request: 1, snapshot, ids }),
        kinds::CREDIT => Message::Credit(Credit { granted: 1 << 20, receipts: Vec::new() }),
        kinds::JOIN => join_message(session, token),
        kinds::ENROLL => Message::Enroll(Enroll {
            secret: token.0.to_vec().into(),
            request: means.request.clone().into(),
            label: "somebody".into(),
        }),
        kinds::RENEW => Message::Renew(Renew { request: means.request.clone().into() }),
        other => return Ok(from_the_server(other, target)),
    }))
}

/// What only a server says.
fn from_the_server(kind: u16, target: &Target) -> Option<Message> {
    let Target { session, token, snapshot, .. } = *target;
    let ids = join_ids(&target.chunks);
    Some(match kind {
        kinds::REFUSED => Message::Refused(Refused::new(RefusalCode::Stopping, "no")),
        kinds::DEFER => Message::Defer(Defer { milliseconds: 1 }),
        kinds::PING => Message::Ping(Ping { stamp: 1 }),
        kinds::PONG => Message::Pong(Pong { stamp: 1 }),
        kinds::REPOSITORY_DESCRIBED => Message::RepositoryDescribed(RepositoryDescribed {
            file: target.file.encode().into(),
            slots: Vec::new(),
            keeping: KeepingRules::default(),
        }),
        kinds::REPOSITORY_CREATED => Message::RepositoryCreated,
        kinds::SNAPSHOTS_LISTED => Message::SnapshotsListed(SnapshotsListed { snapshots: Vec::new() }),
        kinds::SNAPSHOT_FOUND => Message::SnapshotFound(SnapshotFound { fate: SnapshotFate::Kept }),
        kinds::STATUS_REPORTED => Message::StatusReported(StatusReported {
            software: String::new(),
            tenant: "acme".parse().ok()?,
            agent: AgentId([1; 16]),
            uptime_seconds: 1,
            free_bytes: 1,
            repositories: Vec::new(),
            sessions: Vec::new(),
        }),
        kinds::MANAGED => Message::Managed(Managed { outcome: Outcome::Done }),
        kinds::SESSION_OPENED => Message::SessionOpened(SessionOpened {
            session,
            token,
            incarnation: Incarnation(1),
            window_bytes: 1 << 20,
            max_streams: 1,
            data_addresses: Vec::new(),
        }),
        kinds::CHUNKS_KNOWN => Message::ChunksKnown(ChunksKnown { bitmap: vec![3].into() }),
        kinds::ATTACHED => {
            Message::Attached(Attached { incarnation: Incarnation(2), watermark: 1, ranges: Vec::new() })
        }
        kinds::RETRANSMIT => Message::Retransmit(Retransmit { ranges: Vec::new() }),
        kinds::COMMITTED => Message::Committed(Committed { snapshot, receipt: vec![1].into() }),
        kinds::MISSING_CHUNKS => Message::MissingChunks(MissingChunks { ids, more: false }),
        kinds::SESSION_ABORTED => Message::SessionAborted,
        kinds::FETCH_DONE => Message::FetchDone(FetchDone {
            request: 1,
            blocks: 0,
            carried: Vec::new(),
            unknown: Vec::new().into(),
            damage: String::new(),
        }),
        kinds::JOINED => Message::Joined,
        kinds::ACK => Message::Ack(Ack { watermark: 9, ranges: Vec::new() }),
        kinds::DRAIN => Message::Drain,
        kinds::DRAINED => Message::Drained,
        kinds::ENROLLED => Message::Enrolled(Enrolled {
            tenant: "acme".parse().ok()?,
            agent: AgentId([1; 16]),
            certificate: vec![1].into(),
            authority: vec![1].into(),
        }),
        _ => return None,
    })
}
