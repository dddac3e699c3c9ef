//! Scenario 20: protocol 1 as it was first released, byte for byte. What is recorded in `tests/fixtures/protocol-v1` is read
//! by this version as what it was written from, and written by it as the same bytes.
//!
//! `cargo test -p strandline-messages --test protocol_v1 -- --ignored` writes the fixtures; see `tests/fixtures/README.md`
//! for when that is allowed.

#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail their test by panicking")]

mod samples;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use bytes::{Bytes, BytesMut};
use data_encoding::HEXLOWER;
use strandline_messages::wire::message::kinds;
use strandline_messages::wire::{
    Ack, BlockFrame, Commit, Committed, Frame, FrameDecoder, JoinReason, Message, Ping, Purpose, SessionKind, Tag,
    WireError,
};
use strandline_messages::{Sequence, SnapshotId};

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("tests/fixtures/protocol-v1").join(name)
}

/// A frame of the fixtures: who says it on which connection, its name, its bytes.
#[derive(Debug, PartialEq)]
struct Line {
    said: String,
    bytes: Vec<u8>,
}

impl Line {
    fn of(said: &str, name: &str, bytes: &[u8]) -> Self {
        Self { said: format!("{said} {name}"), bytes: bytes.to_vec() }
    }

    fn print(&self) -> String {
        format!("{}: {}\n", self.said, HEXLOWER.encode(&self.bytes))
    }
}

fn read(name: &str) -> Vec<Line> {
    let text = std::fs::read_to_string(fixture(name)).unwrap_or_else(|error| panic!("{name}: {error}"));
    let line = |line: &str| {
        let (said, hex) = line.split_once(": ").unwrap_or_else(|| panic!("{line}"));
        Line { said: said.to_owned(), bytes: HEXLOWER.decode(hex.as_bytes()).unwrap() }
    };
    text.lines().map(line).collect()
}

/// Tag of the `number`-th message.
fn tag(number: usize) -> Tag {
    Tag(u32::try_from(number).unwrap() * 3)
}

/// Every message, each with a tag of its own, and a block.
fn messages() -> Vec<Line> {
    let all = samples::all();
    let frame = |(number, message): (usize, &Message)| {
        Line::of("any", message.name(), &message.to_frame(tag(number)).unwrap().encode())
    };
    let mut lines: Vec<Line> = all.iter().enumerate().map(frame).collect();
    lines.push(Line::of("any", "Block", &block(1 << 33 | 5)));
    lines
}

fn block(sequence: u64) -> Vec<u8> {
    let frame = BlockFrame { sequence: Sequence(sequence), block: Bytes::from_static(b"a block is opaque here") };
    [&frame.head(), &frame.block[..]].concat()
}

/// A backup of one block, on its two connections.
fn session() -> Vec<Line> {
    let said: [(&str, u32, Message); 16] = [
        ("agent control", 0, samples::hello(Purpose::Control, 0)),
        ("server control", 0, samples::hello(Purpose::Control, 0xa1)),
        ("agent control", 1, samples::open(SessionKind::Backup, None)),
        ("server control", 1, samples::opened(&[])),
        ("agent data", 0, samples::hello(Purpose::Data, 0)),
        ("server data", 0, samples::hello(Purpose::Data, 0xa2)),
        ("agent data", 0, samples::join(JoinReason::First)),
        ("server data", 0, Message::Joined),
        ("agent data", 0, Message::GetStatus),
        ("server data", 0, Message::Ack(Ack { watermark: 1, ranges: Vec::new() })),
        ("agent control", 2, Message::Commit(Commit { manifest: vec![0xd2; 40].into(), blocks: 1 })),
        (
            "server control",
            2,
            Message::Committed(Committed { snapshot: SnapshotId([0xc3; 32]), receipt: vec![0xd3; 20].into() }),
        ),
        ("agent data", 0, Message::Drain),
        ("server data", 0, Message::Ack(Ack { watermark: 1, ranges: Vec::new() })),
        ("server data", 0, Message::Drained),
        ("agent control", 0, Message::Ping(Ping { stamp: 1 })),
    ];
    let line = |(said, tag, message): (&str, u32, Message)| match message {
        // Stands for the block.
        Message::GetStatus => Line::of(said, "Block", &block(0)),
        message => Line::of(said, message.name(), &message.to_frame(Tag(tag)).unwrap().encode()),
    };
    said.into_iter().map(line).collect()
}

#[test]
fn s20_every_message_of_protocol_1_is_read_and_written_as_it_was_first_released() {
    let recorded = read("messages.txt");
    for (expected, recorded) in messages().iter().zip(&recorded) {
        assert_eq!(expected, recorded, "this version writes other bytes");
    }
    let all = samples::all();
    assert_eq!(recorded.len(), all.len() + 1, "a message was added: record it, beside those that are there");
    let mut seen = BTreeSet::new();
    for (number, line) in recorded.iter().enumerate() {
        let frame = FrameDecoder::default().next(&mut BytesMut::from(&line.bytes[..])).unwrap().unwrap();
        seen.insert(frame.kind);
        match all.get(number) {
            Some(message) => assert_eq!(Message::decode(&frame).unwrap(), (tag(number), message.clone())),
            None => assert_eq!(BlockFrame::from_frame(frame).unwrap().sequence, Sequence(1 << 33 | 5)),
        }
    }
    for (kind, name) in kinds::ALL {
        assert!(seen.contains(kind), "no {name} is recorded");
    }
}

#[test]
fn s20_a_recorded_session_is_read_from_each_connection_as_one_stream_of_bytes() {
    let recorded = read("session.txt");
    assert_eq!(recorded, session());
    for side in ["agent control", "server control", "agent data", "server data"] {
        let lines: Vec<_> = recorded.iter().filter(|line| line.said.starts_with(side)).collect();
        let bytes: Vec<u8> = lines.iter().flat_map(|line| line.bytes.clone()).collect();
        let (mut decoder, mut buffer, mut names) = (FrameDecoder::default(), BytesMut::new(), Vec::new());
        for piece in bytes.chunks(7) {
            buffer.extend_from_slice(piece);
            while let Some(frame) = decoder.next(&mut buffer).unwrap() {
                let is_block = frame.kind == kinds::BLOCK;
                names.push(if is_block { "Block" } else { Message::decode(&frame).unwrap().1.name() });
            }
        }
        assert!(decoder.is_between_frames(&buffer));
        let expected: Vec<_> = lines.iter().map(|line| line.said.rsplit_once(' ').unwrap().1).collect();
        assert_eq!(names, expected);
    }
}

#[test]
fn s20_what_a_newer_version_adds_is_skipped_or_refused_as_its_flag_says() {
    let newer = |flags| Frame { kind: 0x0077, flags, body: Bytes::from_static(b"of protocol 2") }.encode();
    let known = samples::hello(Purpose::Control, 1).to_frame(Tag(0)).unwrap();
    let mut buffer = BytesMut::from(&[&newer(0)[..], &newer(0x80), &known.encode()].concat()[..]);
    assert_eq!(FrameDecoder::default().next(&mut buffer).unwrap(), Some(known));
    let mut buffer = BytesMut::from(&newer(1)[..]);
    assert_eq!(FrameDecoder::default().next(&mut buffer), Err(WireError::UnknownCritical { kind: 0x0077 }));
    // A field more is not a message of version 1: versions are negotiated, not guessed.
    let mut longer = samples::hello(Purpose::Control, 1).to_frame(Tag(0)).unwrap();
    longer.body = [&longer.body[..], &[0]].concat().into();
    assert!(Message::decode(&longer).is_err());
}

#[test]
#[ignore = "writes the fixtures; see tests/fixtures/README.md"]
fn write_the_fixtures_of_protocol_1() {
    std::fs::create_dir_all(fixture("")).unwrap();
    for (name, lines) in [("messages.txt", messages()), ("session.txt", session())] {
        std::fs::write(fixture(name), lines.iter().map(Line::print).collect::<String>()).unwrap();
    }
}
