//! Lists node by node: directory entries, content pieces, error lists.

use std::sync::Arc;
use std::vec;

use strandline_messages::format::chunk::Reference;
use strandline_messages::format::tree::{Content, Entry, EntryNode, ListKind, NodeBody, Owner, Piece, SourceError};
use strandline_messages::{ChunkId, ChunkKind};

use super::reader::{AHEAD_MAX, Node, TreeReader, child};
use super::{TreeError, list_name};

/// A directory entry with what it needs to be understood alone.
#[derive(Debug, Clone)]
pub struct DirEntry {
    /// The entry.
    pub entry: Entry,
    node: ChunkId,
    owners: Arc<[Owner]>,
    references: Arc<[Reference]>,
}

impl DirEntry {
    /// The entries of a level-0 directory node; none of any other node.
    pub(super) fn all_of(node: Node) -> impl Iterator<Item = Self> {
        let (owners, entries) = match node.node.body {
            NodeBody::Directory { owners, entries } => (owners, entries),
            _ => (Vec::new(), Vec::new()),
        };
        let owners: Arc<[Owner]> = owners.into();
        let (id, references) = (node.id, node.references);
        entries.into_iter().map(move |entry| Self {
            entry,
            node: id,
            owners: Arc::clone(&owners),
            references: Arc::clone(&references),
        })
    }

    /// Who owns it, by number and by name.
    pub fn owner(&self) -> Owner {
        self.owners.get(self.entry.owner as usize).cloned().unwrap_or_default()
    }

    /// The chunk at `position` of the visible references, which must be of `kind`.
    pub fn child(&self, position: u32, kind: ChunkKind) -> Result<ChunkId, TreeError> {
        child(self.node, &self.references, position, kind)
    }
}

/// The level-0 nodes of a list, in order. After an error it goes on with the next node.
pub(super) struct Leaves {
    reader: TreeReader,
    kind: ListKind,
    top: Option<ChunkId>,
    /// Nodes of other lists that will be needed soon: fetched along with the top node.
    ahead: Vec<ChunkId>,
    stack: Vec<Frame>,
    last_name: Vec<u8>,
}

struct Frame {
    level: u8,
    children: vec::IntoIter<ChunkId>,
}

impl Leaves {
    pub(super) fn new(reader: TreeReader, top: ChunkId, kind: ListKind) -> Self {
        Self { reader, kind, top: Some(top), ahead: Vec::new(), stack: Vec::new(), last_name: Vec::new() }
    }

    fn enter(&mut self, id: ChunkId, level_above: u8, ahead: &[ChunkId]) -> Result<Option<Node>, TreeError> {
        let node = self.reader.node(id, ahead)?;
        if node.node.kind != self.kind {
            return Err(TreeError::Contradiction { node: id, why: list_name(self.kind) });
        }
        match &node.node.body {
            NodeBody::Index { level, children } => {
                if *level >= level_above {
                    return Err(TreeError::Contradiction { node: id, why: "the levels of a list do not descend" });
                }
                let ids: Result<Vec<_>, _> = children.iter().map(|child| node.index_child(child)).collect();
                self.stack.push(Frame { level: *level, children: ids?.into_iter() });
                Ok(None)
            }
            NodeBody::Directory { entries, .. } => {
                // Within a node the decoder has checked the order; names that come twice would let a link and a
                // directory of one name follow one another.
                if entries.first().is_some_and(|first| !self.last_name.is_empty() && first.name <= self.last_name) {
                    return Err(TreeError::Contradiction { node: id, why: "its names do not follow those before it" });
                }
                if let Some(last) = entries.last() {
                    self.last_name.clone_from(&last.name);
                }
                Ok(Some(node))
            }
            NodeBody::Content(_) | NodeBody::Errors(_) => Ok(Some(node)),
        }
    }
}

impl Iterator for Leaves {
    type Item = Result<Node, TreeError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (id, level, ahead) = match (self.top.take(), self.stack.last_mut()) {
                (Some(top), _) => (top, u8::MAX, std::mem::take(&mut self.ahead)),
                (None, None) => return None,
                (None, Some(frame)) => {
                    let Some(id) = frame.children.next() else {
                        self.stack.pop();
                        continue;
                    };
                    let ahead = frame.children.as_slice().iter().take(AHEAD_MAX).copied().collect();
                    (id, frame.level, ahead)
                }
            };
            match self.enter(id, level, &ahead) {
                Ok(None) => {}
                Ok(Some(node)) => return Some(Ok(node)),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// The entries of one directory. After an error it goes on behind the part that cannot be read.
pub struct Entries {
    leaves: Leaves,
    current: vec::IntoIter<DirEntry>,
}

impl Entries {
    pub(super) fn new(reader: &TreeReader, directory: ChunkId) -> Self {
        Self { leaves: reader.leaves(directory, ListKind::Directory), current: Vec::new().into_iter() }
    }

    /// Top nodes of directories that come soon, to be fetched along with the next one.
    pub(super) fn directories_ahead(&self) -> Vec<ChunkId> {
        let directories = self.current.as_slice().iter().filter_map(|entry| entry.directory_top().ok().flatten());
        directories.take(AHEAD_MAX).collect()
    }

    /// Fetches these top nodes along with this directory's, so that walking siblings takes one fetch.
    pub(super) fn with_ahead(mut self, ahead: Vec<ChunkId>) -> Self {
        self.leaves.ahead = ahead;
        self
    }
}

impl Iterator for Entries {
    type Item = Result<DirEntry, TreeError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(entry) = self.current.next() {
                return Some(Ok(entry));
            }
            match self.leaves.next()? {
                Ok(node) => self.current = DirEntry::all_of(node).collect::<Vec<_>>().into_iter(),
                Err(error) => return Some(Err(error)),
            }
        }
    }
}

/// The content pieces of one file: chunk and length in bytes. Ends after an error: what follows has no known offset.
pub struct Pieces {
    leaves: Option<Leaves>,
    node: ChunkId,
    references: Arc<[Reference]>,
    current: vec::IntoIter<Piece>,
    error: Option<TreeError>,
}

impl Pieces {
    pub(super) fn new(reader: &TreeReader, file: &DirEntry) -> Self {
        let mut pieces = Self {
            leaves: None,
            node: file.node,
            references: Arc::clone(&file.references),
            current: Vec::new().into_iter(),
            error: None,
        };
        match &file.entry.node {
            EntryNode::File { content: Content::Pieces(list), .. } => pieces.current = list.clone().into_iter(),
            EntryNode::File { content: Content::List { position }, .. } => {
                match file.child(*position, ChunkKind::Tree) {
                    Ok(top) => pieces.leaves = Some(reader.leaves(top, ListKind::Content)),
                    Err(error) => pieces.error = Some(error),
                }
            }
            _ => {}
        }
        pieces
    }

    fn advance(&mut self) -> Result<Option<(ChunkId, u32)>, TreeError> {
        if let Some(error) = self.error.take() {
            return Err(error);
        }
        loop {
            if let Some(piece) = self.current.next() {
                let id = child(self.node, &self.references, piece.position, ChunkKind::Data)?;
                return Ok(Some((id, piece.bytes)));
            }
            let Some(leaf) = self.leaves.as_mut().and_then(Iterator::next) else { return Ok(None) };
            let leaf = leaf?;
            self.node = leaf.id;
            self.references = leaf.references;
            if let NodeBody::Content(list) = leaf.node.body {
                self.current = list.into_iter();
            }
        }
    }
}

impl Iterator for Pieces {
    type Item = Result<(ChunkId, u32), TreeError>;

    fn next(&mut self) -> Option<Self::Item> {
        let next = self.advance();
        if next.is_err() {
            self.leaves = None;
            self.current = Vec::new().into_iter();
        }
        next.transpose()
    }
}

/// The entries of a snapshot's error list.
pub struct SourceErrors {
    leaves: Leaves,
    current: vec::IntoIter<SourceError>,
}

impl SourceErrors {
    pub(super) fn new(reader: &TreeReader, top: ChunkId) -> Self {
        Self { leaves: reader.leaves(top, ListKind::Errors), current: Vec::new().into_iter() }
    }
}

impl Iterator for SourceErrors {
    type Item = Result<SourceError, TreeError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(error) = self.current.next() {
                return Some(Ok(error));
            }
            match self.leaves.next()? {
                Ok(node) => {
                    if let NodeBody::Errors(errors) = node.node.body {
                        self.current = errors.into_iter();
                    }
                }
                Err(error) => return Some(Err(error)),
            }
        }
    }
}
