//! A message of every kind of protocol 1, and of every variant of their enumerations, with contents that tell fields apart.

use serde_bytes::ByteBuf;
use strandline_messages::wire::manage::{
    Deletion, GcReport, KeptSnapshot, Manage, Managed, Operation, Outcome, PartlyDeadBlock, ScrubReport, ScrubSubset,
    SnapshotTags,
};
use strandline_messages::wire::{
    AbortSession, Ack, Attach, Attached, Carried, ChunksKnown, Commit, Committed, CreateRepository, Credit, Defer,
    DescribeRepository, Enroll, Enrolled, FetchChunks, FetchDone, FindSnapshot, Hello, Join, JoinReason, KeepingRules,
    ListSnapshots, ListedSnapshot, Message, MissingChunks, OpenSession, Ping, Pong, Purpose, QueryChunks, Receipt,
    RefusalCode, Refused, Renew, RepositoryDescribed, RepositoryStatus, Retransmit, SequenceRange, SessionKind,
    SessionOpened, SessionStatus, SnapshotFate, SnapshotFound, SnapshotsListed, StatusReported,
};
use strandline_messages::{
    AgentId, DomainId, Incarnation, RepositoryName, SessionId, SessionToken, SnapshotId, StreamIndex,
};

const SESSION: SessionId = SessionId([0xc1; 16]);
const TOKEN: SessionToken = SessionToken([0xc2; 32]);
const SNAPSHOT: SnapshotId = SnapshotId([0xc3; 32]);
const AGENT: AgentId = AgentId([0xc4; 16]);

fn main_repository() -> RepositoryName {
    "main".parse().unwrap()
}

fn bytes(byte: u8, len: usize) -> ByteBuf {
    ByteBuf::from(vec![byte; len])
}

fn ranges() -> Vec<SequenceRange> {
    vec![SequenceRange { start: 7, end: 9 }, SequenceRange { start: 11, end: 12 }]
}

fn tags() -> SnapshotTags {
    SnapshotTags {
        snapshot: SNAPSHOT,
        tags: vec!["daily".into(), "täglich".into()],
        at_ns: -5,
        writer: bytes(0xb1, 97),
        signature: bytes(0xb2, 64),
    }
}

/// A `Hello`.
pub fn hello(purpose: Purpose, nonce: u8) -> Message {
    Message::Hello(Hello {
        version_min: 1,
        version_max: 1,
        capabilities: 0,
        software: "strandline 0.1.0".into(),
        nonce: [nonce; 32],
        purpose,
    })
}

/// What opens a session.
pub fn open(kind: SessionKind, resume_of: Option<SessionId>) -> Message {
    let (writer, proof) = (bytes(0xb1, 97), bytes(0xb3, 64));
    Message::OpenSession(OpenSession { kind, repository: main_repository(), resume_of, writer, proof })
}

/// What is answered to that.
pub fn opened(data_addresses: &[&str]) -> Message {
    Message::SessionOpened(SessionOpened {
        session: SESSION,
        token: TOKEN,
        incarnation: Incarnation(1),
        window_bytes: 64 << 20,
        max_streams: 16,
        data_addresses: data_addresses.iter().map(|address| (*address).to_owned()).collect(),
    })
}

/// What joins it.
pub fn join(reason: JoinReason) -> Message {
    let (index, incarnation) = (StreamIndex(3), Incarnation(2));
    Message::Join(Join { session: SESSION, token: TOKEN, index, incarnation, reason })
}

/// Everything.
pub fn all() -> Vec<Message> {
    let mut all = session();
    all.extend(repository());
    all.extend(managing());
    all.extend(data());
    all.extend((0..).map_while(code).map(|code| Message::Refused(Refused::new(code, "why"))));
    all
}

/// Every code of refusals, by its number.
fn code(number: u32) -> Option<RefusalCode> {
    Some(match number {
        0 => RefusalCode::Invalid,
        1 => RefusalCode::NotPermitted,
        2 => RefusalCode::NoSuchRepository,
        3 => RefusalCode::RepositoryExists,
        4 => RefusalCode::NoSuchSession,
        5 => RefusalCode::Superseded,
        6 => RefusalCode::Full,
        7 => RefusalCode::Stopping,
        8 => RefusalCode::Version,
        9 => RefusalCode::Ended,
        10 => RefusalCode::Internal,
        _ => return None,
    })
}

fn session() -> Vec<Message> {
    vec![
        hello(Purpose::Control, 0),
        hello(Purpose::Data, 0xa1),
        Message::Defer(Defer { milliseconds: 250 }),
        Message::Ping(Ping { stamp: 9 }),
        Message::Pong(Pong { stamp: 9 }),
        open(SessionKind::Backup, None),
        open(SessionKind::Restore, Some(SESSION)),
        open(SessionKind::Repack, None),
        opened(&[]),
        opened(&["backup.example.com:9847", "[2001:db8::1]:443"]),
        Message::QueryChunks(QueryChunks { ids: bytes(0xd1, 96) }),
        Message::ChunksKnown(ChunksKnown { bitmap: bytes(5, 1) }),
        Message::Attach(Attach { session: SESSION, token: TOKEN, incarnation: Incarnation(4) }),
        Message::Attached(Attached { incarnation: Incarnation(5), watermark: 6, ranges: ranges() }),
        Message::Retransmit(Retransmit { ranges: ranges() }),
        Message::Commit(Commit { manifest: bytes(0xd2, 40), blocks: 13 }),
        Message::Committed(Committed { snapshot: SNAPSHOT, receipt: bytes(0xd3, 20) }),
        Message::MissingChunks(MissingChunks { ids: bytes(0xd4, 64), more: true }),
        Message::AbortSession(AbortSession { reason: "because".into() }),
        Message::SessionAborted,
        Message::FetchChunks(FetchChunks { request: 3, snapshot: SNAPSHOT, ids: bytes(0xd5, 32) }),
        Message::FetchDone(FetchDone {
            request: 3,
            blocks: 2,
            carried: vec![Carried { stream: StreamIndex(1), incarnation: Incarnation(2), blocks: 2 }],
            unknown: bytes(0xd6, 32),
            damage: "pack 1".into(),
        }),
        Message::Credit(Credit {
            granted: 1 << 20,
            receipts: vec![Receipt { stream: StreamIndex(1), over_before: Incarnation(2), received: 16_384 }],
        }),
    ]
}

fn repository() -> Vec<Message> {
    let keeping = KeepingRules { undelete_s: 604_800, min_retention_s: 60, agents_may_delete: true };
    let deletion = Deletion { deleted_ns: 1, final_ns: 2, agent: AGENT, reason: "old".into() };
    let listed = |tags, deletion| ListedSnapshot {
        order: 17,
        manifest: bytes(0xe1, 30),
        receipt: bytes(0xe2, 20),
        tags,
        protected: true,
        deletion,
    };
    let found = |fate| Message::SnapshotFound(SnapshotFound { fate });
    let status = RepositoryStatus {
        name: main_repository(),
        snapshots: 1,
        deleted: 2,
        stored_bytes: 3,
        condemned_blocks: 4,
        blocks: 5,
        chunks: 6,
        damaged_blocks: 7,
    };
    let session = SessionStatus {
        session: SESSION,
        repository: main_repository(),
        agent: AGENT,
        state: "receiving".into(),
        streams: 4,
        watermark: 99,
    };
    vec![
        Message::DescribeRepository(DescribeRepository { repository: main_repository() }),
        Message::RepositoryDescribed(RepositoryDescribed { file: bytes(1, 9), slots: vec![bytes(2, 3)], keeping }),
        Message::CreateRepository(CreateRepository { file: bytes(1, 9), slots: vec![bytes(2, 3), bytes(4, 1)] }),
        Message::RepositoryCreated,
        Message::ListSnapshots(ListSnapshots {
            repository: main_repository(),
            deleted: true,
            after_order: 16,
            limit: 256,
        }),
        Message::SnapshotsListed(SnapshotsListed {
            snapshots: vec![listed(None, None), listed(Some(tags()), Some(deletion))],
        }),
        Message::FindSnapshot(FindSnapshot { repository: main_repository(), snapshot: SNAPSHOT }),
        found(SnapshotFate::Unknown),
        found(SnapshotFate::Kept),
        found(SnapshotFate::Deleted),
        found(SnapshotFate::Purged),
        Message::GetStatus,
        Message::StatusReported(StatusReported {
            software: "strandline 0.1.0".into(),
            tenant: "acme".parse().unwrap(),
            agent: AGENT,
            uptime_seconds: 3600,
            free_bytes: 1 << 40,
            repositories: vec![status],
            sessions: vec![session],
        }),
        Message::Enroll(Enroll { secret: bytes(4, 32), request: bytes(0x30, 50), label: "host".into() }),
        Message::Enrolled(Enrolled {
            tenant: "acme".parse().unwrap(),
            agent: AGENT,
            certificate: bytes(0x30, 60),
            authority: bytes(0x31, 70),
        }),
        Message::Renew(Renew { request: bytes(0x30, 50) }),
    ]
}

/// Every operation and every outcome.
fn managing() -> Vec<Message> {
    let snapshots = || bytes(0xc3, 64);
    let operations = [
        Operation::DeleteSnapshots { snapshots: snapshots(), reason: "old".into() },
        Operation::UndeleteSnapshots { snapshots: snapshots() },
        Operation::ProtectSnapshots { snapshots: snapshots(), protected: true },
        Operation::TagSnapshot(tags()),
        Operation::AddSlot { slot: bytes(2, 30) },
        Operation::RemoveSlot { slot: [3; 16] },
        Operation::ReportDamage { snapshot: SNAPSHOT, blocks: bytes(0xf1, 64) },
        Operation::CollectGarbage { dry_run: true, purge: false },
        Operation::Scrub { subset: ScrubSubset::All },
        Operation::Scrub { subset: ScrubSubset::Part { part: 1, of: 7 } },
        Operation::Scrub { subset: ScrubSubset::Share { permille: 100 } },
        Operation::Scrub { subset: ScrubSubset::Bytes { bytes: 1 << 30 } },
        Operation::ListPartlyDead { skip: 1, limit: 256 },
        Operation::Supersede { blocks: bytes(0xf2, 16) },
    ];
    let manage = |operation: Operation| {
        Message::Manage(Manage {
            repository: main_repository(),
            writer: bytes(0xb1, 97),
            proof: bytes(0xb3, 64),
            operation: operation.encode().unwrap().into(),
        })
    };
    let report = GcReport { dry_run: true, snapshots: 1, purged: 2, blocks_young: 18, ..GcReport::default() };
    let scrub = ScrubReport {
        blocks: 1,
        bytes: 2,
        damaged: vec!["pack 1".into()],
        damaged_blocks: 3,
        damaged_packs: 4,
        withdrawn_before: 5,
        affected: vec![SNAPSHOT],
        oldest_ns: 6,
    };
    let domain = DomainId([0xf3; 16]);
    let dead = PartlyDeadBlock { pack: 1, offset: 2, bytes: 3, chunks: 4, domain, needed: bytes(0xf4, 32) };
    let outcomes = [
        Outcome::Done,
        Outcome::Kept { kept: vec![KeptSnapshot { snapshot: SNAPSHOT, reason: "protected".into() }] },
        Outcome::Collected(report),
        Outcome::Scrubbed(scrub),
        Outcome::PartlyDead { blocks: vec![dead] },
    ];
    let managed = |outcome| Message::Managed(Managed { outcome });
    operations.map(manage).into_iter().chain(outcomes.map(managed)).collect()
}

fn data() -> Vec<Message> {
    vec![
        join(JoinReason::First),
        join(JoinReason::Replacement),
        Message::Joined,
        Message::Ack(Ack { watermark: 5, ranges: ranges() }),
        Message::Drain,
        Message::Drained,
    ]
}
