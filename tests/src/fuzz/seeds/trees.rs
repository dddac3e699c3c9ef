//! Tree nodes, and snapshots made of them, harmless and not.

use strandline_messages::format::tree::{
    Content, Entry, EntryNode, Hole, IndexChild, ListKind, NodeBody, Owner, Piece, SourceError, Timestamp, TreeNodeV1,
    Xattr,
};

use super::Seed;
use crate::fuzz::snapshot::CONTENT;

fn entry(name: &str, node: EntryNode) -> Entry {
    let is_directory = matches!(node, EntryNode::Directory { .. });
    Entry {
        name: name.into(),
        mode: if is_directory { 0o755 } else { 0o644 },
        owner: 0,
        mtime: Timestamp { seconds: 1_700_000_000, nanos: 5 },
        ctime: Timestamp { seconds: 1_700_000_001, nanos: 0 },
        inode: 12,
        device: 3,
        links: 1,
        xattrs: Vec::new(),
        node,
    }
}

fn inline(name: &str, bytes: &[u8]) -> Entry {
    let content = Content::Inline(bytes.to_vec());
    entry(name, EntryNode::File { size: bytes.len() as u64, content, holes: Vec::new() })
}

fn pieces() -> Vec<Piece> {
    let piece = |(position, bytes): (usize, &&[u8])| {
        Some(Piece { position: u32::try_from(position).ok()?, bytes: u32::try_from(bytes.len()).ok()? })
    };
    CONTENT.iter().enumerate().filter_map(piece).collect()
}

fn chunked(name: &str, holes: Vec<Hole>) -> Entry {
    let bytes: usize = CONTENT.iter().map(|bytes| bytes.len()).sum();
    let size = bytes as u64 + holes.iter().map(|hole| hole.bytes).sum::<u64>();
    entry(name, EntryNode::File { size, content: Content::Pieces(pieces()), holes })
}

fn link(name: &str, target: &str) -> Entry {
    entry(name, EntryNode::Symlink { target: target.into() })
}

fn below(name: &str, position: u32) -> Entry {
    entry(name, EntryNode::Directory { position })
}

fn directory(entries: Vec<Entry>) -> Vec<u8> {
    // Other owners than our own are only for those who may give files away.
    let owners = vec![Owner { uid: 0, gid: 0, user: b"root".to_vec(), group: Vec::new() }];
    TreeNodeV1 { kind: ListKind::Directory, body: NodeBody::Directory { owners, entries } }.encode()
}

fn index(kind: ListKind, names: &[(u32, &str)]) -> Vec<u8> {
    let child =
        |(position, name): &(u32, &str)| IndexChild { position: *position, weight: 9, first_name: (*name).into() };
    TreeNodeV1 { kind, body: NodeBody::Index { level: 1, children: names.iter().map(child).collect() } }.encode()
}

fn rich() -> Vec<u8> {
    let attributes = vec![Xattr { name: b"user.x".to_vec(), value: vec![0, 255] }];
    directory(vec![
        Entry { xattrs: attributes, ..inline("a", b"hi\n") },
        chunked("b", vec![Hole { offset: 4, bytes: 4096 }]),
        entry("c", EntryNode::File { size: 4100, content: Content::List { position: 2 }, holes: Vec::new() }),
        below("d", 2),
        link("e", "../\u{fe}"),
        entry("f", EntryNode::Fifo),
        entry("g", EntryNode::Socket),
        entry("h", EntryNode::CharDevice { major: 1, minor: 3 }),
        entry("i", EntryNode::BlockDevice { major: 7, minor: 99 }),
        Entry { links: 2, ..inline("j", b"linked") },
        Entry { links: 2, ..inline("k", b"linked") },
    ])
}

/// Of the target `tree`.
pub(super) fn tree() -> Vec<Seed> {
    let content = TreeNodeV1 { kind: ListKind::Content, body: NodeBody::Content(pieces()) }.encode();
    let errors = vec![SourceError { path: b"/x".to_vec(), message: "permission denied".into() }];
    let errors = TreeNodeV1 { kind: ListKind::Errors, body: NodeBody::Errors(errors) }.encode();
    let with = |references: u16, node: Vec<u8>| [&references.to_le_bytes()[..], &node].concat();
    super::named([
        ("directory", with(4, rich())),
        ("empty", with(0, directory(Vec::new()))),
        ("content", with(2, content)),
        ("errors", with(0, errors)),
        ("index", with(5, index(ListKind::Directory, &[(2, "a"), (3, "m")]))),
        ("parent", with(3, directory(vec![below("..", 2)]))),
        ("itself", with(3, directory(vec![below(".", 2)]))),
        ("nameless", with(0, directory(vec![inline("", b"")]))),
        ("slash", with(0, directory(vec![inline("a/b", b"")]))),
        ("nul", with(0, directory(vec![inline("a\0b", b"")]))),
        ("parent-index", with(5, index(ListKind::Directory, &[(2, ".."), (3, "m")]))),
        ("pieces", with(9, index(ListKind::Content, &[(2, ""), (3, "")]))),
    ])
}

/// A snapshot of these nodes, restored with these wishes.
fn snapshot(form: u8, pattern: &str, subpath: &str, nodes: &[Vec<u8>]) -> Vec<u8> {
    let mut out = vec![form];
    for text in [pattern, subpath] {
        out.push(u8::try_from(text.len()).unwrap_or(0));
        out.extend_from_slice(text.as_bytes());
    }
    for node in nodes {
        out.extend_from_slice(&u16::try_from(node.len()).unwrap_or(0).to_le_bytes());
        out.extend_from_slice(node);
    }
    out
}

/// Of the targets `restore` and `export`.
pub(super) fn snapshots() -> Vec<Seed> {
    let leaf = directory(vec![inline("a", b"new"), chunked("b", Vec::new()), inline("precious", b"overwritten")]);
    // Names that the target has already, as links to a place outside of it.
    let over_links = directory(vec![
        inline("a", b"new"),
        below("b", 2),
        below("c", 2),
        below("d", 2),
        Entry { mode: 0o4755, ..inline("e", b"new") },
        Entry { links: 2, ..inline("twin", b"new") },
    ]);
    // A link, and behind it, in the next node of the same directory, a directory of that name.
    let first = directory(vec![link("b", "../outside")]);
    let second = directory(vec![below("b", 4)]);
    let twice = index(ListKind::Directory, &[(3, "b"), (2, "b")]);
    let content = TreeNodeV1 { kind: ListKind::Content, body: NodeBody::Content(pieces()) }.encode();
    let deep = directory(vec![below("deeper", 2), link("up", "../../../outside")]);
    let list = directory(vec![entry(
        "c",
        EntryNode::File { size: 4100, content: Content::List { position: 2 }, holes: Vec::new() },
    )]);
    super::named([
        ("rich", snapshot(0, "", "", &[leaf.clone(), rich()])),
        ("over-links", snapshot(0x40, "", "", &[leaf.clone(), over_links.clone()])),
        ("in-place", snapshot(0x44, "", "", &[leaf.clone(), over_links.clone()])),
        ("if-changed", snapshot(0x61, "", "", &[leaf.clone(), over_links.clone()])),
        ("never", snapshot(0x42, "", "", &[leaf.clone(), over_links.clone()])),
        ("delete", snapshot(0x50, "", "", &[leaf.clone(), over_links.clone()])),
        ("pattern", snapshot(0x40, "/c/*", "", &[leaf.clone(), over_links.clone()])),
        ("exclude", snapshot(0x50, "!*.keep", "", &[leaf.clone(), over_links])),
        ("subpath", snapshot(0x20, "", "deeper/deeper", &[leaf.clone(), deep.clone(), deep.clone()])),
        ("parent", snapshot(0, "", "", &[leaf.clone(), directory(vec![below("..", 2)])])),
        (
            "parents",
            snapshot(
                0x44,
                "",
                "",
                &[leaf.clone(), directory(vec![below("outside", 2)]), directory(vec![below("..", 2)])],
            ),
        ),
        ("outside", snapshot(0, "", "../outside", &[leaf.clone(), deep])),
        ("twice", snapshot(0x40, "", "", &[leaf, first, second, twice])),
        ("sparse", snapshot(0x28, "", "", &[directory(vec![chunked("b", vec![Hole { offset: 4, bytes: 1 << 20 }])])])),
        ("list", snapshot(0x20, "", "", &[content, list])),
    ])
}
