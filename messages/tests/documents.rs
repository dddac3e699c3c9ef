//! The worked examples of `docs/PROTOCOL.md` and `docs/FORMAT.md` are what the code reads and writes.

#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail their test by panicking")]

use std::path::Path;

use bytes::BytesMut;
use data_encoding::HEXLOWER;
use strandline_messages::format::repository::RepositoryV1;
use strandline_messages::format::tree::{EntryNode, NodeBody, TreeNodeV1};
use strandline_messages::wire::{FrameDecoder, Message};

fn document(name: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().join("docs").join(name);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The lines of the one fenced block of this name.
fn example(document: &str, name: &str) -> Vec<String> {
    let (_, rest) = document.split_once(&format!("```{name}\n")).unwrap_or_else(|| panic!("no example {name}"));
    rest.split_once("```").unwrap().0.lines().map(str::to_owned).collect()
}

fn bytes(hex: &str) -> Vec<u8> {
    HEXLOWER.decode(hex.replace(' ', "").as_bytes()).unwrap_or_else(|error| panic!("{hex}: {error}"))
}

#[test]
fn the_frames_of_the_protocol_document_are_those_of_the_code() {
    let lines = example(&document("PROTOCOL.md"), "frames");
    let all: Vec<u8> = lines.iter().flat_map(|line| bytes(line.split(';').next().unwrap())).collect();
    let mut buffer = BytesMut::from(&all[..]);
    let (mut decoder, mut names, mut again) = (FrameDecoder::default(), Vec::new(), Vec::new());
    while let Some(frame) = decoder.next(&mut buffer).unwrap() {
        let (tag, message) = Message::decode(&frame).unwrap();
        names.push(message.name());
        again.extend_from_slice(&message.to_frame(tag).unwrap().encode());
    }
    assert!(decoder.is_between_frames(&buffer));
    let expected =
        ["Hello", "Hello", "OpenSession", "SessionOpened", "Join", "Joined", "Ack", "Commit", "Drain", "Drained"];
    assert_eq!(names, expected);
    assert_eq!(HEXLOWER.encode(&again), HEXLOWER.encode(&all));
}

#[test]
fn the_repository_file_of_the_format_document_is_one() {
    let file = bytes(&example(&document("FORMAT.md"), "repository").concat());
    let decoded = RepositoryV1::decode(&file).unwrap();
    assert_eq!(decoded.name.as_str(), "main");
    assert_eq!(decoded.encode(), file);
}

#[test]
fn the_tree_node_of_the_format_document_is_one() {
    // A comment stands behind two spaces that follow a digit.
    let hex = |line: &String| line.trim_start().split("  ").next().unwrap().to_owned();
    let node: Vec<u8> = example(&document("FORMAT.md"), "tree").iter().flat_map(|line| bytes(&hex(line))).collect();
    let decoded = TreeNodeV1::decode(&node, 3).unwrap();
    assert_eq!(decoded.encode(), node);
    let NodeBody::Directory { entries, .. } = decoded.body else { panic!("not a directory") };
    assert!(matches!(&entries[1].node, EntryNode::File { size: 1_048_576, holes, .. } if holes.len() == 1));
    assert_eq!(entries[2].node, EntryNode::Directory { position: 2 });
}
