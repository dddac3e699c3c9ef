//! Tree nodes: the plaintext of tree chunks.
//!
//! A node holds a sorted part of a directory, a part of a long list of content references, or a part of an error list.
//! Child chunks are given as *positions* in the chunk's visible references, so that the server can walk the graph
//! without a key. Lists too long for one node become levels of index nodes ([`NodeBody::Index`]), depth ≤ 8.

use crate::limits;

use super::FormatError;
use super::cursor::{Decoder, Encoder, check_limit};

/// Version that this module encodes.
pub const TREE_VERSION: u8 = 1;

/// What kind of list a node belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ListKind {
    /// The entries of one directory.
    Directory = 1,
    /// The content references of one file.
    Content = 2,
    /// The errors of one snapshot.
    Errors = 3,
}

impl ListKind {
    fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Directory),
            2 => Some(Self::Content),
            3 => Some(Self::Errors),
            _ => None,
        }
    }
}

/// One node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TreeNodeV1 {
    /// Which list it is a part of.
    pub kind: ListKind,
    /// What it holds.
    pub body: NodeBody,
}

/// What a node holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeBody {
    /// Level 0 of a directory: entries sorted by the bytes of their names.
    Directory {
        /// Users and groups that entries point to.
        owners: Vec<Owner>,
        /// The entries.
        entries: Vec<Entry>,
    },
    /// Level 0 of a content list.
    Content(Vec<Piece>),
    /// Level 0 of an error list.
    Errors(Vec<SourceError>),
    /// Level 1 to 8 of any list.
    Index {
        /// The level, ≥ 1.
        level: u8,
        /// Lower nodes in order.
        children: Vec<IndexChild>,
    },
}

/// A user and a group, by number and (where the machine knew one) by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Owner {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// User name, empty if unknown.
    pub user: Vec<u8>,
    /// Group name, empty if unknown.
    pub group: Vec<u8>,
}

/// One child of an index node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IndexChild {
    /// Position of the lower node in the visible references.
    pub position: u32,
    /// Entries (directory, errors) or content bytes (content) below it.
    pub weight: u64,
    /// Directory: the first name below it. Otherwise empty.
    pub first_name: Vec<u8>,
}

/// A piece of file content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// Position of the data chunk in the visible references.
    pub position: u32,
    /// Length of the chunk's plaintext, bytes.
    pub bytes: u32,
}

/// A point in time: seconds and nanoseconds since 1970, as the file system gave it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp {
    /// Seconds, negative before 1970.
    pub seconds: i64,
    /// Nanoseconds within the second, 0 to 999,999,999.
    pub nanos: u32,
}

/// A hole of a sparse file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hole {
    /// First byte of the hole in the file.
    pub offset: u64,
    /// Its length.
    pub bytes: u64,
}

/// An extended attribute; POSIX ACLs are the raw `system.posix_acl_access` and `system.posix_acl_default`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Xattr {
    /// Full name with its namespace.
    pub name: Vec<u8>,
    /// Raw value.
    pub value: Vec<u8>,
}

/// One directory entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Raw name, 1 to 255 bytes without `/` and NUL, neither `.` nor `..`.
    pub name: Vec<u8>,
    /// Permission bits with set-id and sticky (the lower 12 bits of `st_mode`).
    pub mode: u16,
    /// Index into the node's owners.
    pub owner: u32,
    /// Modification time.
    pub mtime: Timestamp,
    /// Status change time (not restorable; evidence).
    pub ctime: Timestamp,
    /// Inode number.
    pub inode: u64,
    /// Device number of the file system.
    pub device: u64,
    /// Number of hard links; entries of one snapshot with equal (device, inode) and links > 1 are one file.
    pub links: u32,
    /// Extended attributes, sorted by name.
    pub xattrs: Vec<Xattr>,
    /// What the entry is.
    pub node: EntryNode,
}

/// What an entry is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EntryNode {
    /// Regular file.
    File {
        /// Length as `stat` gave it, holes included.
        size: u64,
        /// Where the bytes outside of holes are.
        content: Content,
        /// Holes in ascending order, not touching one another.
        holes: Vec<Hole>,
    },
    /// Directory; `position` is its top node in the visible references.
    Directory {
        /// Position in the visible references.
        position: u32,
    },
    /// Symbolic link.
    Symlink {
        /// Raw target.
        target: Vec<u8>,
    },
    /// Named pipe.
    Fifo,
    /// Socket.
    Socket,
    /// Character device.
    CharDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
    /// Block device.
    BlockDevice {
        /// Major number.
        major: u32,
        /// Minor number.
        minor: u32,
    },
}

/// Where a file's bytes outside of holes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// In the entry itself (small or empty files).
    Inline(Vec<u8>),
    /// In these chunks, in order.
    Pieces(Vec<Piece>),
    /// In a content list whose top node stands at `position` of the visible references.
    List {
        /// Position in the visible references.
        position: u32,
    },
}

/// Something that could not be saved as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceError {
    /// Raw path.
    pub path: Vec<u8>,
    /// What happened, for people.
    pub message: String,
}

const TYPE_FILE: u8 = 1;
const TYPE_DIRECTORY: u8 = 2;
const TYPE_SYMLINK: u8 = 3;
const TYPE_FIFO: u8 = 4;
const TYPE_SOCKET: u8 = 5;
const TYPE_CHAR: u8 = 6;
const TYPE_BLOCK: u8 = 7;

const FLAG_XATTRS: u8 = 0x10;
const FLAG_LINKS: u8 = 0x20;
const FLAG_HOLES: u8 = 0x40;

const CONTENT_INLINE: u8 = 0;
const CONTENT_PIECES: u8 = 1;
const CONTENT_LIST: u8 = 2;

/// What one entry's numbers are written relative to: the entry before it in the node.
#[derive(Clone, Copy, Default)]
struct Previous {
    mtime: i64,
    inode: i64,
    device: i64,
    position: i64,
}

impl TreeNodeV1 {
    /// The node's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = vec![TREE_VERSION, self.kind as u8];
        match &self.body {
            NodeBody::Directory { owners, entries } => {
                out.put_u8(0);
                out.put_varint(owners.len() as u64);
                for owner in owners {
                    owner.encode(&mut out);
                }
                out.put_varint(entries.len() as u64);
                let mut previous = Previous::default();
                for entry in entries {
                    entry.encode(&mut previous, &mut out);
                }
            }
            NodeBody::Content(pieces) => {
                out.put_u8(0);
                encode_pieces(pieces, &mut 0, &mut out);
            }
            NodeBody::Errors(errors) => {
                out.put_u8(0);
                out.put_varint(errors.len() as u64);
                for error in errors {
                    out.put_string(&error.path);
                    out.put_string(error.message.as_bytes());
                }
            }
            NodeBody::Index { level, children } => {
                out.put_u8(*level);
                out.put_varint(children.len() as u64);
                for child in children {
                    out.put_varint(child.position.into());
                    out.put_varint(child.weight);
                    out.put_string(&child.first_name);
                }
            }
        }
        out
    }

    /// Reads a node whose chunk has `references` visible references. Checks every position, limit and order.
    pub fn decode(bytes: &[u8], references: usize) -> Result<Self, FormatError> {
        let mut decoder = Decoder::new(bytes, "tree node");
        let version = decoder.u8()?;
        if version != TREE_VERSION {
            return Err(FormatError::Version { what: "tree node", found: version.into(), known: TREE_VERSION.into() });
        }
        let kind = ListKind::from_byte(decoder.u8()?).ok_or_else(|| decoder.invalid("unknown list kind"))?;
        let level = decoder.u8()?;
        check_limit("level of a list", level.into(), limits::LIST_DEPTH_MAX.into())?;
        let body = if level > 0 {
            NodeBody::Index { level, children: decode_index(&mut decoder, kind, references)? }
        } else {
            match kind {
                ListKind::Directory => decode_directory(&mut decoder, references)?,
                ListKind::Content => NodeBody::Content(decode_pieces(&mut decoder, &mut 0, references)?),
                ListKind::Errors => NodeBody::Errors(decode_errors(&mut decoder)?),
            }
        };
        decoder.finish()?;
        Ok(Self { kind, body })
    }
}

impl Owner {
    fn encode(&self, out: &mut Vec<u8>) {
        out.put_varint(self.uid.into());
        out.put_varint(self.gid.into());
        out.put_string(&self.user);
        out.put_string(&self.group);
    }

    fn decode(decoder: &mut Decoder<'_>) -> Result<Self, FormatError> {
        Ok(Self {
            uid: small(decoder)?,
            gid: small(decoder)?,
            user: decoder.string("user name", limits::FILE_NAME_BYTES_MAX)?.to_vec(),
            group: decoder.string("group name", limits::FILE_NAME_BYTES_MAX)?.to_vec(),
        })
    }
}

impl Timestamp {
    fn encode(self, base: i64, out: &mut Vec<u8>) {
        out.put_zigzag(self.seconds.wrapping_sub(base));
        out.put_varint(self.nanos.into());
    }

    fn decode(decoder: &mut Decoder<'_>, base: i64) -> Result<Self, FormatError> {
        let seconds = decoder.zigzag()?.wrapping_add(base);
        match u32::try_from(decoder.varint()?) {
            Ok(nanos) if nanos < 1_000_000_000 => Ok(Self { seconds, nanos }),
            _ => Err(decoder.invalid("nanoseconds of a second exceed 999,999,999")),
        }
    }
}

impl Entry {
    fn encode(&self, previous: &mut Previous, out: &mut Vec<u8>) {
        let mut kind = self.node.type_byte();
        if !self.xattrs.is_empty() {
            kind |= FLAG_XATTRS;
        }
        if self.links > 1 {
            kind |= FLAG_LINKS;
        }
        if matches!(&self.node, EntryNode::File { holes, .. } if !holes.is_empty()) {
            kind |= FLAG_HOLES;
        }
        out.put_u8(kind);
        out.put_string(&self.name);
        out.put_varint(self.mode.into());
        out.put_varint(self.owner.into());
        self.mtime.encode(previous.mtime, out);
        self.ctime.encode(self.mtime.seconds, out);
        out.put_zigzag(self.inode.cast_signed().wrapping_sub(previous.inode));
        out.put_zigzag(self.device.cast_signed().wrapping_sub(previous.device));
        if self.links > 1 {
            out.put_varint(self.links.into());
        }
        if !self.xattrs.is_empty() {
            out.put_varint(self.xattrs.len() as u64);
            for xattr in &self.xattrs {
                out.put_string(&xattr.name);
                out.put_string(&xattr.value);
            }
        }
        self.node.encode(&mut previous.position, out);
        previous.mtime = self.mtime.seconds;
        previous.inode = self.inode.cast_signed();
        previous.device = self.device.cast_signed();
    }

    fn decode(decoder: &mut Decoder<'_>, previous: &mut Previous, references: usize) -> Result<Self, FormatError> {
        let kind = decoder.u8()?;
        let name = decoder.string("file name", limits::FILE_NAME_BYTES_MAX)?.to_vec();
        if !is_legal_name(&name) {
            return Err(decoder.invalid("a file name is empty, `.`, `..`, or contains `/` or NUL"));
        }
        let mode = match u16::try_from(decoder.varint()?) {
            Ok(mode) if mode <= 0o7777 => mode,
            _ => return Err(decoder.invalid("mode exceeds 12 bits")),
        };
        let owner = small(decoder)?;
        let mtime = Timestamp::decode(decoder, previous.mtime)?;
        let ctime = Timestamp::decode(decoder, mtime.seconds)?;
        let inode = decoder.zigzag()?.wrapping_add(previous.inode);
        let device = decoder.zigzag()?.wrapping_add(previous.device);
        let links = if kind & FLAG_LINKS == 0 { 1 } else { small(decoder)? };
        if kind & FLAG_LINKS != 0 && links < 2 {
            return Err(decoder.invalid("a link count below two follows"));
        }
        let xattrs = if kind & FLAG_XATTRS == 0 { Vec::new() } else { decode_xattrs(decoder)? };
        let node = EntryNode::decode(kind, decoder, &mut previous.position, references)?;
        *previous = Previous { mtime: mtime.seconds, inode, device, position: previous.position };
        Ok(Self {
            name,
            mode,
            owner,
            mtime,
            ctime,
            inode: inode.cast_unsigned(),
            device: device.cast_unsigned(),
            links,
            xattrs,
            node,
        })
    }
}

impl EntryNode {
    fn type_byte(&self) -> u8 {
        match self {
            Self::File { .. } => TYPE_FILE,
            Self::Directory { .. } => TYPE_DIRECTORY,
            Self::Symlink { .. } => TYPE_SYMLINK,
            Self::Fifo => TYPE_FIFO,
            Self::Socket => TYPE_SOCKET,
            Self::CharDevice { .. } => TYPE_CHAR,
            Self::BlockDevice { .. } => TYPE_BLOCK,
        }
    }

    fn encode(&self, next_position: &mut i64, out: &mut Vec<u8>) {
        match self {
            Self::File { size, content, holes } => {
                out.put_varint(*size);
                match content {
                    Content::Inline(bytes) => {
                        out.put_u8(CONTENT_INLINE);
                        out.put_string(bytes);
                    }
                    Content::Pieces(pieces) => {
                        out.put_u8(CONTENT_PIECES);
                        encode_pieces(pieces, next_position, out);
                    }
                    Content::List { position } => {
                        out.put_u8(CONTENT_LIST);
                        encode_position(*position, next_position, out);
                    }
                }
                if !holes.is_empty() {
                    out.put_varint(holes.len() as u64);
                    let mut end = 0;
                    for hole in holes {
                        out.put_varint(hole.offset.wrapping_sub(end));
                        out.put_varint(hole.bytes);
                        end = hole.offset.wrapping_add(hole.bytes);
                    }
                }
            }
            Self::Directory { position } => encode_position(*position, next_position, out),
            Self::Symlink { target } => out.put_string(target),
            Self::Fifo | Self::Socket => {}
            Self::CharDevice { major, minor } | Self::BlockDevice { major, minor } => {
                out.put_varint((*major).into());
                out.put_varint((*minor).into());
            }
        }
    }

    fn decode(
        kind: u8,
        decoder: &mut Decoder<'_>,
        next_position: &mut i64,
        references: usize,
    ) -> Result<Self, FormatError> {
        if kind & FLAG_HOLES != 0 && kind & 0x0f != TYPE_FILE || kind & 0x80 != 0 {
            return Err(decoder.invalid("unknown entry flags"));
        }
        match kind & 0x0f {
            TYPE_FILE => {
                let size = decoder.varint()?;
                let content = match decoder.u8()? {
                    CONTENT_INLINE => {
                        Content::Inline(decoder.string("inline content", limits::INLINE_BYTES_MAX)?.to_vec())
                    }
                    CONTENT_PIECES => Content::Pieces(decode_pieces(decoder, next_position, references)?),
                    CONTENT_LIST => Content::List { position: decode_position(decoder, next_position, references)? },
                    _ => return Err(decoder.invalid("unknown content kind")),
                };
                let holes = if kind & FLAG_HOLES == 0 { Vec::new() } else { decode_holes(decoder, size)? };
                Ok(Self::File { size, content, holes })
            }
            TYPE_DIRECTORY => Ok(Self::Directory { position: decode_position(decoder, next_position, references)? }),
            TYPE_SYMLINK => Ok(Self::Symlink {
                target: decoder.string("symbolic link target", limits::LINK_TARGET_BYTES_MAX)?.to_vec(),
            }),
            TYPE_FIFO => Ok(Self::Fifo),
            TYPE_SOCKET => Ok(Self::Socket),
            TYPE_CHAR => Ok(Self::CharDevice { major: small(decoder)?, minor: small(decoder)? }),
            TYPE_BLOCK => Ok(Self::BlockDevice { major: small(decoder)?, minor: small(decoder)? }),
            _ => Err(decoder.invalid("unknown entry type")),
        }
    }
}

/// Whether `name` can stand in a directory: 1 to 255 bytes without `/` and NUL, neither `.` nor `..`.
pub fn is_legal_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= limits::FILE_NAME_BYTES_MAX
        && name != b"."
        && name != b".."
        && !name.iter().any(|&byte| byte == b'/' || byte == 0)
}

fn small(decoder: &mut Decoder<'_>) -> Result<u32, FormatError> {
    u32::try_from(decoder.varint()?).map_err(|_| decoder.invalid("a number exceeds 32 bits"))
}

// Positions mostly follow one another, so each is written as its distance from the one after the last.
fn encode_position(position: u32, next: &mut i64, out: &mut Vec<u8>) {
    out.put_zigzag(i64::from(position) - *next);
    *next = i64::from(position) + 1;
}

fn decode_position(decoder: &mut Decoder<'_>, next: &mut i64, references: usize) -> Result<u32, FormatError> {
    let position = decoder.zigzag()?.wrapping_add(*next);
    match u32::try_from(position) {
        Ok(found) if (found as usize) < references => {
            *next = position + 1;
            Ok(found)
        }
        _ => Err(decoder.invalid("a position lies outside of the references")),
    }
}

fn encode_pieces(pieces: &[Piece], next: &mut i64, out: &mut Vec<u8>) {
    out.put_varint(pieces.len() as u64);
    for piece in pieces {
        encode_position(piece.position, next, out);
        out.put_varint(piece.bytes.into());
    }
}

fn decode_pieces(decoder: &mut Decoder<'_>, next: &mut i64, references: usize) -> Result<Vec<Piece>, FormatError> {
    let count = decoder.count("pieces of a file", limits::TREE_REFERENCES_MAX)?;
    let mut pieces = Vec::with_capacity(count.min(decoder.remaining()));
    for _ in 0..count {
        let position = decode_position(decoder, next, references)?;
        let bytes = small(decoder)?;
        check_limit("chunk length", bytes.into(), limits::CHUNK_BYTES_MAX)?;
        pieces.push(Piece { position, bytes });
    }
    Ok(pieces)
}

fn decode_holes(decoder: &mut Decoder<'_>, size: u64) -> Result<Vec<Hole>, FormatError> {
    let count = decoder.count("holes of a file", limits::TREE_ENTRIES_MAX)?;
    let mut holes = Vec::with_capacity(count.min(decoder.remaining()));
    let mut end = 0u64;
    for _ in 0..count {
        let offset = end.checked_add(decoder.varint()?);
        let bytes = decoder.varint()?;
        match offset.and_then(|offset| Some((offset, offset.checked_add(bytes)?))) {
            Some((offset, hole_end)) if hole_end <= size => {
                holes.push(Hole { offset, bytes });
                end = hole_end;
            }
            _ => return Err(decoder.invalid("a hole lies outside of its file")),
        }
    }
    Ok(holes)
}

fn decode_xattrs(decoder: &mut Decoder<'_>) -> Result<Vec<Xattr>, FormatError> {
    let count = decoder.count("extended attributes", limits::XATTRS_MAX)?;
    let mut xattrs = Vec::with_capacity(count.min(decoder.remaining()));
    for _ in 0..count {
        let name = decoder.string("extended attribute name", limits::XATTR_NAME_BYTES_MAX)?.to_vec();
        let value = decoder.string("extended attribute value", limits::XATTR_VALUE_BYTES_MAX)?.to_vec();
        xattrs.push(Xattr { name, value });
    }
    Ok(xattrs)
}

fn decode_directory(decoder: &mut Decoder<'_>, references: usize) -> Result<NodeBody, FormatError> {
    let count = decoder.count("owners of a tree node", limits::TREE_ENTRIES_MAX)?;
    let mut owners = Vec::with_capacity(count.min(decoder.remaining()));
    for _ in 0..count {
        owners.push(Owner::decode(decoder)?);
    }
    let count = decoder.count("entries of a tree node", limits::TREE_ENTRIES_MAX)?;
    let mut entries: Vec<Entry> = Vec::with_capacity(count.min(decoder.remaining()));
    let mut previous = Previous::default();
    for _ in 0..count {
        let entry = Entry::decode(decoder, &mut previous, references)?;
        if entries.last().is_some_and(|last| last.name >= entry.name) {
            return Err(decoder.invalid("entries are not in ascending order of their names"));
        }
        if entry.owner as usize >= owners.len() {
            return Err(decoder.invalid("an entry's owner does not exist"));
        }
        entries.push(entry);
    }
    Ok(NodeBody::Directory { owners, entries })
}

fn decode_errors(decoder: &mut Decoder<'_>) -> Result<Vec<SourceError>, FormatError> {
    let count = decoder.count("errors of a tree node", limits::TREE_ENTRIES_MAX)?;
    let mut errors = Vec::with_capacity(count.min(decoder.remaining()));
    for _ in 0..count {
        let path = decoder.string("path", limits::CHUNK_BYTES_MAX)?.to_vec();
        let message = decoder.text("error message", limits::TEXT_BYTES_MAX)?;
        errors.push(SourceError { path, message });
    }
    Ok(errors)
}

fn decode_index(decoder: &mut Decoder<'_>, kind: ListKind, references: usize) -> Result<Vec<IndexChild>, FormatError> {
    let count = decoder.count("children of an index node", limits::TREE_REFERENCES_MAX)?;
    let mut children: Vec<IndexChild> = Vec::with_capacity(count.min(decoder.remaining()));
    for _ in 0..count {
        let position = small(decoder)?;
        if position as usize >= references {
            return Err(decoder.invalid("a position lies outside of the references"));
        }
        let weight = decoder.varint()?;
        let first_name = decoder.string("file name", limits::FILE_NAME_BYTES_MAX)?.to_vec();
        let sorted = children.last().is_none_or(|last| last.first_name < first_name);
        if kind == ListKind::Directory && !(sorted && is_legal_name(&first_name)) {
            return Err(decoder.invalid("first names are not legal and ascending"));
        }
        children.push(IndexChild { position, weight, first_name });
    }
    Ok(children)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(name: &[u8], node: EntryNode) -> Entry {
        Entry {
            name: name.to_vec(),
            mode: 0o644,
            owner: 0,
            mtime: Timestamp { seconds: -5, nanos: 999_999_999 },
            ctime: Timestamp { seconds: 1_700_000_000, nanos: 1 },
            inode: u64::MAX,
            device: 7,
            links: 2,
            xattrs: vec![Xattr { name: b"user.x".to_vec(), value: vec![0, 255] }],
            node,
        }
    }

    fn sample() -> TreeNodeV1 {
        let piece = |position| Piece { position, bytes: 5 };
        let file = |content, holes| EntryNode::File { size: 100, content, holes };
        let hole = |offset| Hole { offset, bytes: 10 };
        let entries = vec![
            entry(b"a", file(Content::Inline(b"hi".to_vec()), vec![])),
            entry(b"b\xff", file(Content::Pieces(vec![piece(0), piece(1), piece(0)]), vec![hole(5), hole(90)])),
            entry(b"c", file(Content::List { position: 2 }, vec![])),
            entry(b"d", EntryNode::Directory { position: 3 }),
            entry(b"e", EntryNode::Symlink { target: b"../\xfe".to_vec() }),
            entry(b"f", EntryNode::Fifo),
            entry(b"g", EntryNode::Socket),
            entry(b"h", EntryNode::CharDevice { major: 1, minor: 3 }),
            entry(b"i", EntryNode::BlockDevice { major: 8, minor: 1 }),
        ];
        let owners = vec![Owner { uid: 0, gid: 7, user: b"root".to_vec(), group: vec![] }];
        TreeNodeV1 { kind: ListKind::Directory, body: NodeBody::Directory { owners, entries } }
    }

    #[test]
    fn a_directory_reads_back() {
        let node = sample();
        assert_eq!(TreeNodeV1::decode(&node.encode(), 4).unwrap(), node);
    }

    #[test]
    fn a_position_outside_the_references_is_refused() {
        assert!(TreeNodeV1::decode(&sample().encode(), 3).is_err());
    }

    #[test]
    fn s42_a_name_that_leaves_its_directory_is_refused() {
        for name in [&b".."[..], b".", b"", b"a/b", b"a\0b", &[b'x'; 256]] {
            let body =
                NodeBody::Directory { owners: vec![Owner::default()], entries: vec![entry(name, EntryNode::Fifo)] };
            let node = TreeNodeV1 { kind: ListKind::Directory, body };
            assert!(TreeNodeV1::decode(&node.encode(), 0).is_err(), "{name:?}");
        }
    }

    #[test]
    fn s43_a_link_count_that_no_encoder_writes_is_refused() {
        let bytes = |links| {
            let body = NodeBody::Directory {
                owners: vec![Owner::default()],
                entries: vec![Entry { links, xattrs: Vec::new(), ..entry(b"a", EntryNode::Fifo) }],
            };
            TreeNodeV1 { kind: ListKind::Directory, body }.encode()
        };
        let mut two = bytes(2);
        TreeNodeV1::decode(&two, 0).unwrap();
        // It is the last number of a pipe without attributes.
        for links in [0, 1] {
            *two.last_mut().unwrap() = links;
            assert!(TreeNodeV1::decode(&two, 0).is_err(), "{links}");
        }
    }

    #[test]
    fn entries_out_of_order_or_twice_are_refused() {
        for names in [[b"b", b"a"], [b"a", b"a"]] {
            let entries = names.iter().map(|name| entry(*name, EntryNode::Fifo)).collect();
            let body = NodeBody::Directory { owners: vec![Owner::default()], entries };
            assert!(TreeNodeV1::decode(&TreeNodeV1 { kind: ListKind::Directory, body }.encode(), 0).is_err());
        }
    }

    #[test]
    fn lists_and_indexes_read_back() {
        let pieces = (0..9).map(|position| Piece { position, bytes: 1 << 20 }).collect();
        let errors = vec![SourceError { path: b"/x".to_vec(), message: "permission denied".into() }];
        let child = |position: u32, name: &[u8]| IndexChild { position, weight: 8192, first_name: name.to_vec() };
        let index = |children| NodeBody::Index { level: 1, children };
        for (kind, body) in [
            (ListKind::Content, NodeBody::Content(pieces)),
            (ListKind::Errors, NodeBody::Errors(errors)),
            (ListKind::Directory, index(vec![child(0, b"a"), child(1, b"m")])),
            (ListKind::Content, index(vec![child(0, b""), child(1, b"")])),
        ] {
            let node = TreeNodeV1 { kind, body };
            assert_eq!(TreeNodeV1::decode(&node.encode(), 9).unwrap(), node);
        }
    }

    proptest! {
        #[test]
        fn s43_no_bytes_panic(tail: Vec<u8>, cut in 0usize..400, flip in 0usize..400) {
            let mut bytes = sample().encode();
            if let Some(byte) = bytes.get_mut(flip) { *byte ^= 0x81; }
            bytes.truncate(cut);
            bytes.extend(tail);
            let _ = TreeNodeV1::decode(&bytes, 4);
        }
    }
}
