//! One message of every kind, one operation of every kind, and connections that begin with them.

use anyhow::Result;
use bytes::Bytes;
use serde_bytes::ByteBuf;
use strandline_messages::wire::manage::{
    Deletion, GcReport, KeptSnapshot, Manage, Managed, Operation, Outcome, PartlyDeadBlock, ScrubReport, ScrubSubset,
    SnapshotTags,
};
use strandline_messages::wire::message::kinds;
use strandline_messages::wire::{
    AbortSession, Ack, Attach, Attached, BlockFrame, Carried, ChunksKnown, Commit, Committed, CreateRepository, Credit,
    Defer, DescribeRepository, Enroll, Enrolled, FetchChunks, FetchDone, Frame, FrameHeader, Hello, Join, JoinReason,
    KeepingRules, ListSnapshots, ListedSnapshot, Message, MissingChunks, OpenSession, Ping, Pong, Purpose, QueryChunks,
    Receipt, RefusalCode, Refused, Renew, RepositoryDescribed, RepositoryStatus, Retransmit, SequenceRange,
    SessionKind, SessionOpened, SessionStatus, SnapshotsListed, StatusReported, Tag,
};
use strandline_messages::{
    AgentId, DomainId, Incarnation, RepositoryName, Sequence, SessionId, SessionToken, SnapshotId, StreamIndex,
    TenantName,
};

use super::Seed;

fn bytes(len: usize) -> ByteBuf {
    ByteBuf::from(vec![7; len])
}

fn tags() -> SnapshotTags {
    SnapshotTags {
        snapshot: SnapshotId([1; 32]),
        tags: vec!["daily".into(), "x".into()],
        at_ns: -1,
        writer: bytes(97),
        signature: bytes(64),
    }
}

fn operation_samples() -> Vec<(&'static str, Operation)> {
    let subset = |subset| Operation::Scrub { subset };
    vec![
        ("delete", Operation::DeleteSnapshots { snapshots: bytes(64), reason: "old".into() }),
        ("undelete", Operation::UndeleteSnapshots { snapshots: bytes(32) }),
        ("protect", Operation::ProtectSnapshots { snapshots: bytes(32), protected: true }),
        ("tag", Operation::TagSnapshot(tags())),
        ("add_slot", Operation::AddSlot { slot: bytes(40) }),
        ("remove_slot", Operation::RemoveSlot { slot: [3; 16] }),
        ("report_damage", Operation::ReportDamage { snapshot: SnapshotId([1; 32]), blocks: bytes(128) }),
        ("collect", Operation::CollectGarbage { dry_run: true, purge: false }),
        ("scrub_all", subset(ScrubSubset::All)),
        ("scrub_part", subset(ScrubSubset::Part { part: 1, of: 7 })),
        ("scrub_share", subset(ScrubSubset::Share { permille: 5 })),
        ("scrub_bytes", subset(ScrubSubset::Bytes { bytes: 1 << 40 })),
        ("partly_dead", Operation::ListPartlyDead { skip: 1, limit: 2 }),
        ("supersede", Operation::Supersede { blocks: bytes(16) }),
    ]
}

fn outcomes() -> Vec<Outcome> {
    let kept = KeptSnapshot { snapshot: SnapshotId([1; 32]), reason: "protected".into() };
    let block =
        PartlyDeadBlock { pack: 1, offset: 96, bytes: 1000, chunks: 3, domain: DomainId::FULL, needed: bytes(32) };
    let scrub =
        ScrubReport { damaged: vec!["pack 1".into()], affected: vec![SnapshotId([1; 32])], ..Default::default() };
    vec![
        Outcome::Done,
        Outcome::Kept { kept: vec![kept] },
        Outcome::Collected(GcReport::default()),
        Outcome::Scrubbed(scrub),
        Outcome::PartlyDead { blocks: vec![block] },
    ]
}

/// One message of every kind.
#[expect(clippy::too_many_lines, reason = "a list of all kinds")]
fn message_samples() -> Result<Vec<Message>> {
    let repository: RepositoryName = "main".parse()?;
    let tenant: TenantName = "acme".parse()?;
    let (session, token, agent) = (SessionId([1; 16]), SessionToken([2; 32]), AgentId([3; 16]));
    let ranges = vec![SequenceRange { start: 2, end: 4 }, SequenceRange { start: 9, end: 10 }];
    let deletion = Deletion { deleted_ns: 1, final_ns: 2, agent, reason: "old".into() };
    let listed = |deletion| ListedSnapshot {
        order: 1,
        manifest: bytes(30),
        receipt: bytes(20),
        tags: Some(tags()),
        protected: false,
        deletion,
    };
    let operation = Operation::RemoveSlot { slot: [3; 16] }.encode()?.into();
    let mut samples = vec![
        Message::Hello(greeting(Purpose::Control)),
        Message::Refused(Refused::new(RefusalCode::Stopping, "stopping")),
        Message::Defer(Defer { milliseconds: 5 }),
        Message::Ping(Ping { stamp: 1 }),
        Message::Pong(Pong { stamp: 1 }),
        Message::DescribeRepository(DescribeRepository { repository: repository.clone() }),
        Message::RepositoryDescribed(RepositoryDescribed {
            file: bytes(153),
            slots: vec![bytes(20), bytes(3)],
            keeping: KeepingRules::default(),
        }),
        Message::CreateRepository(CreateRepository { file: bytes(153), slots: vec![bytes(20)] }),
        Message::RepositoryCreated,
        Message::ListSnapshots(ListSnapshots {
            repository: repository.clone(),
            deleted: true,
            after_order: 1,
            limit: 9,
        }),
        Message::SnapshotsListed(SnapshotsListed { snapshots: vec![listed(None), listed(Some(deletion))] }),
        Message::GetStatus,
        Message::StatusReported(StatusReported {
            software: "strandline".into(),
            tenant: tenant.clone(),
            agent,
            uptime_seconds: 1,
            free_bytes: 2,
            repositories: vec![RepositoryStatus {
                name: repository.clone(),
                snapshots: 1,
                deleted: 0,
                stored_bytes: 2,
                condemned_blocks: 3,
                blocks: 4,
                chunks: 5,
                damaged_blocks: 6,
            }],
            sessions: vec![SessionStatus {
                session,
                repository: repository.clone(),
                agent,
                state: "open".into(),
                streams: 1,
                watermark: 2,
            }],
        }),
        Message::Manage(Manage { repository: repository.clone(), writer: bytes(97), proof: bytes(64), operation }),
        Message::OpenSession(OpenSession {
            kind: SessionKind::Backup,
            repository,
            resume_of: Some(session),
            writer: bytes(97),
            proof: bytes(64),
        }),
        Message::SessionOpened(SessionOpened {
            session,
            token,
            incarnation: Incarnation(1),
            window_bytes: 1 << 26,
            max_streams: 8,
            data_addresses: vec!["[::1]:9847".into()],
        }),
        Message::QueryChunks(QueryChunks { ids: bytes(64) }),
        Message::ChunksKnown(ChunksKnown { bitmap: bytes(2) }),
        Message::Attach(Attach { session, token, incarnation: Incarnation(1) }),
        Message::Attached(Attached { incarnation: Incarnation(2), watermark: 1, ranges: ranges.clone() }),
        Message::Retransmit(Retransmit { ranges: ranges.clone() }),
        Message::Commit(Commit { manifest: bytes(30), blocks: 3 }),
        Message::Committed(Committed { snapshot: SnapshotId([1; 32]), receipt: bytes(20) }),
        Message::MissingChunks(MissingChunks { ids: bytes(32), more: true }),
        Message::AbortSession(AbortSession { reason: "stop".into() }),
        Message::SessionAborted,
        Message::FetchChunks(FetchChunks { request: 1, snapshot: SnapshotId([0; 32]), ids: bytes(64) }),
        Message::FetchDone(FetchDone {
            request: 1,
            blocks: 2,
            carried: vec![Carried { stream: StreamIndex(1), incarnation: Incarnation(1), blocks: 2 }],
            unknown: bytes(32),
            damage: "none".into(),
        }),
        Message::Credit(Credit {
            granted: 1 << 20,
            receipts: vec![Receipt { stream: StreamIndex(1), over_before: Incarnation(2), received: 9 }],
        }),
        Message::Join(Join {
            session,
            token,
            index: StreamIndex(0),
            incarnation: Incarnation(1),
            reason: JoinReason::First,
        }),
        Message::Joined,
        Message::Ack(Ack { watermark: 1, ranges }),
        Message::Drain,
        Message::Drained,
        Message::Enroll(Enroll { secret: bytes(32), request: bytes(40), label: "host".into() }),
        Message::Enrolled(Enrolled { tenant, agent, certificate: bytes(40), authority: bytes(40) }),
        Message::Renew(Renew { request: bytes(40) }),
    ];
    samples.extend(outcomes().into_iter().map(|outcome| Message::Managed(Managed { outcome })));
    Ok(samples)
}

fn greeting(purpose: Purpose) -> Hello {
    strandline_actors::runtime::transport::hello(purpose, [7; 32])
}

/// Of the target `messages`.
pub(super) fn messages() -> Result<Vec<Seed>> {
    let samples = message_samples()?;
    let seed = |(number, message): (usize, &Message)| -> Result<Seed> {
        let frame = message.to_frame(Tag(1))?;
        let name = format!("{}-{number:02}", message.name());
        Ok((name, [&frame.kind.to_le_bytes()[..], &frame.body].concat()))
    };
    samples.iter().enumerate().map(seed).collect()
}

/// Of the target `operations`.
pub(super) fn operations() -> Result<Vec<Seed>> {
    operation_samples().into_iter().map(|(name, operation)| Ok((name.to_owned(), operation.encode()?))).collect()
}

/// Of the target `frames`.
pub(super) fn frames() -> Result<Vec<Seed>> {
    let mut control = vec![5];
    for message in [Message::Hello(greeting(Purpose::Control)), Message::GetStatus, Message::Ping(Ping { stamp: 1 })] {
        control.extend_from_slice(&message.to_frame(Tag(1))?.encode());
    }
    let block = BlockFrame { sequence: Sequence(3), block: Bytes::from_static(b"STRBLOCK and so on") };
    let mut data = vec![1];
    data.extend_from_slice(&block.head());
    data.extend_from_slice(&block.block);
    data.extend_from_slice(&Message::Drain.to_frame(Tag(0))?.encode());
    let unknown =
        |flags| [&[3][..], &Frame { kind: 0x7fff, flags, body: Bytes::from_static(b"future") }.encode()].concat();
    Ok(super::named([("control", control), ("data", data), ("skipped", unknown(0)), ("critical", unknown(1))]))
}

/// Of the target `handshake`.
pub(super) fn handshake() -> Result<Vec<Seed>> {
    let wire = |side: u8, message: Message| -> Result<Vec<u8>> {
        Ok([&[side][..], &message.to_frame(Tag(0))?.encode()].concat())
    };
    let later = Hello { version_min: 2, version_max: 3, ..greeting(Purpose::Data) };
    let skipped = Frame { kind: 0x7fff, flags: 0, body: Bytes::from_static(b"future") }.encode();
    let hello = Message::Hello(greeting(Purpose::Control)).to_frame(Tag(0))?.encode();
    Ok(super::named([
        ("control", wire(0, Message::Hello(greeting(Purpose::Control)))?),
        ("data", wire(0, Message::Hello(greeting(Purpose::Data)))?),
        ("later", wire(0, Message::Hello(later))?),
        ("other", wire(0, Message::GetStatus)?),
        ("skipped", [&[0][..], &skipped, &hello].concat()),
        (
            "claimed",
            [&[0][..], &FrameHeader { len: 1 << 20, kind: kinds::HELLO, flags: 1 }.encode(), b"and so on"].concat(),
        ),
        ("answered", wire(1, Message::Hello(greeting(Purpose::Control)))?),
        ("refused", wire(1, Message::Refused(Refused::new(RefusalCode::Version, "no")))?),
    ]))
}

/// Of the target `machines`: steps as a good peer takes them.
pub(super) fn machines() -> Vec<Seed> {
    let huge = [&[0xff][..], &u64::MAX.to_le_bytes()].concat();
    super::named([
        ("window", vec![0, 0, 1, 2, 3, 0x13, 3, 4, 1, 2, 3, 0, 0, 0x16, 5, 0, 9, 3, 4, 3, 0, 0, 0, 0, 7, 3]),
        ("window-huge", [&[0, 0, 1, 3, 3, 4][..], &huge, &[0], &huge, &[0, 0]].concat()),
        ("tracker", vec![1, 0, 1, 3, 5, 2, 4, 63, 9, 8, 7]),
        ("tracker-huge", [&[1, 0][..], &huge, &[1]].concat()),
        ("queue", [&[2][..], &[0xff, 0, 0, 16, 0, 0, 0, 0, 0], &[0, 7, 5, 2, 3, 1, 100, 2, 0, 8, 7, 2, 2]].concat()),
    ])
}
