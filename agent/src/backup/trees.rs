//! Building tree nodes: directories, long content lists and the error list, as levels with content-defined boundaries.
//!
//! A node ends where the content says so, so that one changed name or chunk changes one node per level, or where a limit
//! is reached. Memory: one unfinished node per level of one list; for directories, one such list per directory on the path
//! from the root to where the scan is.

use std::collections::HashMap;
use std::mem;

use strandline_messages::format::chunk::Reference;
use strandline_messages::format::tree::{
    Content, Entry, EntryNode, Hole, IndexChild, ListKind, NodeBody, Owner, Piece, SourceError, Timestamp, TreeNodeV1,
    Xattr,
};
use strandline_messages::ids::ChunkId;
use strandline_messages::limits;

use super::BackupError;
use crate::cache::{FilePiece, PIECES_MAX};
use crate::scan::meta::Meta;

/// A node is closed by its content only once it holds this many items.
const ITEMS_MIN: usize = 1024;
/// Then each item ends it with a probability of 1 / 2^BOUNDARY_BITS.
const BOUNDARY_MASK: u32 = (1 << 10) - 1;
/// Most items and references of one node.
const ITEMS_MAX: usize = limits::TREE_ENTRIES_MAX;
const REFERENCES_MAX: usize = limits::TREE_REFERENCES_MAX;
/// Bytes at which a node is closed.
const NODE_BYTES_MAX: usize = 1 << 20;
/// Longest path in an error list, bytes; longer ones are cut.
const ERROR_PATH_BYTES_MAX: usize = 64 << 10;

/// Takes finished nodes, children before parents.
pub trait NodeSink {
    /// Stores a node; returns its chunk id.
    fn node(&mut self, node: &TreeNodeV1, references: Vec<Reference>) -> Result<ChunkId, BackupError>;
}

/// References of one node, each once.
#[derive(Debug, Default)]
struct References {
    list: Vec<Reference>,
    positions: HashMap<Reference, u32>,
}

impl References {
    fn position(&mut self, reference: Reference) -> u32 {
        let next = number(self.list.len());
        let position = *self.positions.entry(reference).or_insert(next);
        if position == next {
            self.list.push(reference);
        }
        position
    }

    fn take(&mut self) -> Vec<Reference> {
        self.positions.clear();
        mem::take(&mut self.list)
    }
}

fn number(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

fn ends_node(bytes: [u8; 4]) -> bool {
    u32::from_le_bytes(bytes) & BOUNDARY_MASK == 0
}

fn head(id: &ChunkId) -> [u8; 4] {
    id.as_bytes().first_chunk().copied().unwrap_or_default()
}

/// A finished node, as its parent sees it.
#[derive(Debug)]
struct Child {
    id: ChunkId,
    weight: u64,
    first_name: Vec<u8>,
}

#[derive(Debug, Default)]
struct Level {
    children: Vec<IndexChild>,
    references: References,
    bytes: usize,
    weight: u64,
}

impl Level {
    fn add(&mut self, child: Child) {
        self.bytes += child.first_name.len() + 16;
        self.weight += child.weight;
        let position = self.references.position(Reference::tree(child.id));
        self.children.push(IndexChild { position, weight: child.weight, first_name: child.first_name });
    }

    fn full(&self, last: &ChunkId) -> bool {
        let items = self.children.len();
        items >= ITEMS_MIN && ends_node(head(last)) || items >= ITEMS_MAX || self.bytes >= NODE_BYTES_MAX
    }

    fn close(&mut self, kind: ListKind, level: usize, sink: &mut dyn NodeSink) -> Result<Child, BackupError> {
        let children = mem::take(&mut self.children);
        let first_name = children.first().map(|child| child.first_name.clone()).unwrap_or_default();
        let body = NodeBody::Index { level: u8::try_from(level).unwrap_or(u8::MAX), children };
        let id = sink.node(&TreeNodeV1 { kind, body }, self.references.take())?;
        self.bytes = 0;
        Ok(Child { id, weight: mem::take(&mut self.weight), first_name })
    }
}

/// The index levels above the lowest nodes. With at least 1,024 children per node, eight levels are never reached.
#[derive(Debug)]
struct Levels {
    kind: ListKind,
    levels: Vec<Level>,
}

impl Levels {
    fn new(kind: ListKind) -> Self {
        Self { kind, levels: Vec::new() }
    }

    fn add(&mut self, child: Child, sink: &mut dyn NodeSink) -> Result<(), BackupError> {
        let mut carry = Some(child);
        let mut index = 0;
        while let Some(child) = carry.take() {
            if index == self.levels.len() {
                self.levels.push(Level::default());
            }
            let Some(level) = self.levels.get_mut(index) else { break };
            let id = child.id;
            level.add(child);
            index += 1;
            if level.full(&id) {
                carry = Some(level.close(self.kind, index, sink)?);
            }
        }
        Ok(())
    }

    // The top of the list, given its last node of the lowest level.
    fn finish(&mut self, last: Child, sink: &mut dyn NodeSink) -> Result<ChunkId, BackupError> {
        let count = self.levels.len();
        let mut carry = last;
        for (index, level) in self.levels.iter_mut().enumerate() {
            let id = carry.id;
            level.add(carry);
            if index + 1 == count && level.children.len() == 1 {
                return Ok(id);
            }
            carry = level.close(self.kind, index + 1, sink)?;
        }
        Ok(carry.id)
    }
}

/// One entry to be put into a directory.
#[derive(Debug)]
pub struct NewEntry<'a> {
    /// Its name; names must come in ascending order.
    pub name: &'a [u8],
    /// Its metadata.
    pub meta: &'a Meta,
    /// Its extended attributes.
    pub xattrs: Vec<Xattr>,
    /// Its content.
    pub node: NewNode,
}

/// What a new entry is, with chunk ids instead of positions.
#[derive(Debug)]
pub enum NewNode {
    /// A regular file.
    File {
        /// Length as saved.
        size: u64,
        /// Where its bytes are.
        content: FileContent,
        /// Its holes.
        holes: Vec<Hole>,
    },
    /// A directory by its top node.
    Directory(ChunkId),
    /// Anything else, as it stands in the entry.
    Other(EntryNode),
}

/// Where the bytes of a file are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FileContent {
    /// In the entry.
    Inline(Vec<u8>),
    /// In at most [`PIECES_MAX`] chunks.
    Pieces(Vec<FilePiece>),
    /// In a list with this top node.
    List(ChunkId),
}

/// Builds one directory.
#[derive(Debug)]
pub struct DirectoryBuilder {
    entries: Vec<Entry>,
    owners: Vec<Owner>,
    owner_positions: HashMap<(u32, u32), u32>,
    references: References,
    bytes: usize,
    levels: Levels,
}

impl Default for DirectoryBuilder {
    fn default() -> Self {
        Self {
            entries: Vec::new(),
            owners: Vec::new(),
            owner_positions: HashMap::new(),
            references: References::default(),
            bytes: 0,
            levels: Levels::new(ListKind::Directory),
        }
    }
}

impl DirectoryBuilder {
    /// Adds an entry. `owner` looks up names; `name_key` decides boundaries.
    pub fn add(
        &mut self,
        entry: NewEntry<'_>,
        owner: impl FnOnce() -> Owner,
        name_key: &[u8; 32],
        sink: &mut dyn NodeSink,
    ) -> Result<(), BackupError> {
        let (references, bytes) = entry.cost();
        let would_overflow =
            self.references.list.len() + references > REFERENCES_MAX || self.bytes + bytes > NODE_BYTES_MAX;
        if would_overflow && !self.entries.is_empty() {
            let child = self.close(sink)?;
            self.levels.add(child, sink)?;
        }
        self.bytes += bytes;
        let owner = self.owner(entry.meta, owner);
        let node = match entry.node {
            NewNode::Directory(id) => EntryNode::Directory { position: self.references.position(Reference::tree(id)) },
            NewNode::Other(node) => node,
            NewNode::File { size, content, holes } => {
                let content = match content {
                    FileContent::Inline(bytes) => Content::Inline(bytes),
                    FileContent::Pieces(pieces) => {
                        let piece = |piece: &FilePiece| Piece {
                            position: self.references.position(Reference::data(piece.id)),
                            bytes: piece.bytes,
                        };
                        Content::Pieces(pieces.iter().map(piece).collect())
                    }
                    FileContent::List(id) => Content::List { position: self.references.position(Reference::tree(id)) },
                };
                EntryNode::File { size, content, holes }
            }
        };
        let legal = |time: Timestamp| Timestamp { nanos: time.nanos.min(999_999_999), ..time };
        self.entries.push(Entry {
            name: entry.name.to_vec(),
            mode: entry.meta.permissions(),
            owner,
            mtime: legal(entry.meta.mtime),
            ctime: legal(entry.meta.ctime),
            inode: entry.meta.inode,
            device: entry.meta.device,
            links: entry.meta.links.max(1),
            xattrs: entry.xattrs,
            node,
        });
        let items = self.entries.len();
        let boundary =
            || blake3::keyed_hash(name_key, entry.name).as_bytes().first_chunk().copied().unwrap_or_default();
        if items >= ITEMS_MAX || items >= ITEMS_MIN && ends_node(boundary()) {
            let child = self.close(sink)?;
            self.levels.add(child, sink)?;
        }
        Ok(())
    }

    /// Ends the directory; returns its top node.
    pub fn finish(mut self, sink: &mut dyn NodeSink) -> Result<ChunkId, BackupError> {
        if self.entries.is_empty()
            && let Some(id) = self.levels.finish_without_last(sink)?
        {
            return Ok(id);
        }
        let last = self.close(sink)?;
        self.levels.finish(last, sink)
    }

    fn owner(&mut self, meta: &Meta, owner: impl FnOnce() -> Owner) -> u32 {
        let next = number(self.owners.len());
        let position = *self.owner_positions.entry((meta.uid, meta.gid)).or_insert(next);
        if position == next {
            let owner = owner();
            self.bytes += owner.user.len() + owner.group.len() + 12;
            self.owners.push(owner);
        }
        position
    }

    fn close(&mut self, sink: &mut dyn NodeSink) -> Result<Child, BackupError> {
        let entries = mem::take(&mut self.entries);
        let first_name = entries.first().map(|entry| entry.name.clone()).unwrap_or_default();
        let weight = entries.len() as u64;
        self.owner_positions.clear();
        self.bytes = 0;
        let body = NodeBody::Directory { owners: mem::take(&mut self.owners), entries };
        let id = sink.node(&TreeNodeV1 { kind: ListKind::Directory, body }, self.references.take())?;
        Ok(Child { id, weight, first_name })
    }
}

impl NewEntry<'_> {
    // At most so many references, and about so many bytes.
    fn cost(&self) -> (usize, usize) {
        let xattrs: usize = self.xattrs.iter().map(|xattr| xattr.name.len() + xattr.value.len() + 6).sum();
        let (references, bytes) = match &self.node {
            NewNode::File { content, holes, .. } => match content {
                FileContent::Inline(bytes) => (0, bytes.len() + holes.len() * 12),
                FileContent::Pieces(pieces) => (pieces.len(), pieces.len() * 6 + holes.len() * 12),
                FileContent::List(_) => (1, 6 + holes.len() * 12),
            },
            NewNode::Directory(_) => (1, 6),
            NewNode::Other(EntryNode::Symlink { target }) => (0, target.len() + 3),
            NewNode::Other(_) => (0, 10),
        };
        (references, self.name.len() + xattrs + bytes + 48)
    }
}

impl Levels {
    // The top of a list whose last node of the lowest level is in the levels already; `None` if there are none.
    fn finish_without_last(&mut self, sink: &mut dyn NodeSink) -> Result<Option<ChunkId>, BackupError> {
        let count = self.levels.len();
        let mut carry: Option<Child> = None;
        for (index, level) in self.levels.iter_mut().enumerate() {
            if let Some(child) = carry.take() {
                level.add(child);
            }
            if index + 1 == count
                && level.children.len() == 1
                && let Some(reference) = level.references.list.first()
            {
                return Ok(Some(reference.id));
            }
            if !level.children.is_empty() {
                carry = Some(level.close(self.kind, index + 1, sink)?);
            }
        }
        Ok(carry.map(|child| child.id))
    }
}

/// Collects the chunks of one file: in memory while they fit the directory entry, as list nodes beyond.
#[derive(Debug)]
pub struct ContentBuilder {
    pieces: Vec<FilePiece>,
    listed: bool,
    levels: Levels,
}

impl Default for ContentBuilder {
    fn default() -> Self {
        Self { pieces: Vec::new(), listed: false, levels: Levels::new(ListKind::Content) }
    }
}

impl ContentBuilder {
    /// Appends a chunk.
    pub fn add(&mut self, piece: FilePiece, sink: &mut dyn NodeSink) -> Result<(), BackupError> {
        self.pieces.push(piece);
        let items = self.pieces.len();
        if items > PIECES_MAX && (ends_node(head(&piece.id)) || items >= ITEMS_MAX) {
            let child = self.close(sink)?;
            self.levels.add(child, sink)?;
            self.listed = true;
        }
        Ok(())
    }

    /// Ends the file and begins the next.
    pub fn finish(&mut self, sink: &mut dyn NodeSink) -> Result<FileContent, BackupError> {
        if !self.listed && self.pieces.len() <= PIECES_MAX {
            return Ok(FileContent::Pieces(mem::take(&mut self.pieces)));
        }
        let top = if self.pieces.is_empty() { self.levels.finish_without_last(sink)? } else { None };
        let top = if let Some(top) = top {
            top
        } else {
            let last = self.close(sink)?;
            self.levels.finish(last, sink)?
        };
        self.clear();
        Ok(FileContent::List(top))
    }

    /// Forgets the file.
    pub fn clear(&mut self) {
        *self = Self::default();
    }

    fn close(&mut self, sink: &mut dyn NodeSink) -> Result<Child, BackupError> {
        let mut references = References::default();
        let mut weight = 0;
        let mut pieces = Vec::with_capacity(self.pieces.len());
        for piece in self.pieces.drain(..) {
            weight += u64::from(piece.bytes);
            pieces.push(Piece { position: references.position(Reference::data(piece.id)), bytes: piece.bytes });
        }
        let node = TreeNodeV1 { kind: ListKind::Content, body: NodeBody::Content(pieces) };
        Ok(Child { id: sink.node(&node, references.take())?, weight, first_name: Vec::new() })
    }
}

/// Collects what could not be saved.
#[derive(Debug)]
pub struct ErrorListBuilder {
    errors: Vec<SourceError>,
    bytes: usize,
    count: u64,
    levels: Levels,
}

impl Default for ErrorListBuilder {
    fn default() -> Self {
        Self { errors: Vec::new(), bytes: 0, count: 0, levels: Levels::new(ListKind::Errors) }
    }
}

impl ErrorListBuilder {
    /// Appends an error.
    pub fn add(&mut self, mut path: Vec<u8>, mut message: String, sink: &mut dyn NodeSink) -> Result<(), BackupError> {
        path.truncate(ERROR_PATH_BYTES_MAX);
        message.truncate(message.floor_char_boundary(limits::TEXT_BYTES_MAX));
        self.bytes += path.len() + message.len() + 6;
        self.count += 1;
        self.errors.push(SourceError { path, message });
        if self.errors.len() >= ITEMS_MAX || self.bytes >= NODE_BYTES_MAX {
            let child = self.close(sink)?;
            self.levels.add(child, sink)?;
        }
        Ok(())
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.count
    }

    /// Ends the list; its top node, if there are any errors.
    pub fn finish(mut self, sink: &mut dyn NodeSink) -> Result<Option<ChunkId>, BackupError> {
        if self.errors.is_empty() {
            return self.levels.finish_without_last(sink);
        }
        let last = self.close(sink)?;
        self.levels.finish(last, sink).map(Some)
    }

    fn close(&mut self, sink: &mut dyn NodeSink) -> Result<Child, BackupError> {
        self.bytes = 0;
        let errors = mem::take(&mut self.errors);
        let weight = errors.len() as u64;
        let node = TreeNodeV1 { kind: ListKind::Errors, body: NodeBody::Errors(errors) };
        Ok(Child { id: sink.node(&node, Vec::new())?, weight, first_name: Vec::new() })
    }
}

#[cfg(test)]
mod tests;
