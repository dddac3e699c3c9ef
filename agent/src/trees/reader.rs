//! The tree reader: nodes by id, paths, and the ways into lists.

use std::sync::Arc;

use parking_lot::Mutex;
use strandline_messages::format::chunk::Reference;
use strandline_messages::format::tree::{EntryNode, IndexChild, ListKind, NodeBody, TreeNodeV1};
use strandline_messages::{ChunkId, ChunkKind};

use super::block_cache::BlockCache;
use super::listing::{DirEntry, Entries, Leaves, Pieces, SourceErrors};
use super::source::{ChunkSource, FetchError};
use super::walk::Walk;
use super::{TreeError, list_name};
use crate::seal::OpenedBlock;

/// Most nodes asked for ahead of need in one fetch. Few, because each may come in a block of its own.
pub(super) const AHEAD_MAX: usize = 16;

/// Reads nodes. Cheap to clone; clones share the cache.
#[derive(Clone)]
pub struct TreeReader {
    shared: Arc<Shared>,
}

struct Shared {
    source: Arc<dyn ChunkSource>,
    cache: Mutex<BlockCache>,
}

/// A decoded tree chunk with its visible references.
#[derive(Debug, Clone)]
pub struct Node {
    /// The chunk.
    pub id: ChunkId,
    /// What it says.
    pub node: TreeNodeV1,
    /// What its positions point into.
    pub references: Arc<[Reference]>,
    /// Length of the chunk's plaintext.
    pub bytes: usize,
}

/// Where a path leads.
#[derive(Debug, Clone)]
pub enum Resolved {
    /// The root directory itself: its top node.
    Root(ChunkId),
    /// An entry.
    Entry(Box<DirEntry>),
}

impl TreeReader {
    /// Reads through `source` and keeps opened tree blocks up to about `cache_bytes`.
    pub fn new(source: Arc<dyn ChunkSource>, cache_bytes: usize) -> Self {
        Self { shared: Arc::new(Shared { source, cache: Mutex::new(BlockCache::new(cache_bytes)) }) }
    }

    /// The source.
    pub fn source(&self) -> &Arc<dyn ChunkSource> {
        &self.shared.source
    }

    /// Reads a node. `ahead` are nodes that will be needed soon: they are fetched along if one must be fetched at all.
    pub fn node(&self, id: ChunkId, ahead: &[ChunkId]) -> Result<Node, TreeError> {
        let cached = self.shared.cache.lock().get(&id);
        let (block, row) = match cached {
            Some(found) => found,
            None => self.fetch(id, ahead)?,
        };
        let chunk = block.chunk(row)?;
        let node = TreeNodeV1::decode(chunk.bytes, chunk.references.len())
            .map_err(|error| TreeError::Format { node: id, error })?;
        Ok(Node { id, node, references: chunk.references.into(), bytes: chunk.bytes.len() })
    }

    fn fetch(&self, id: ChunkId, ahead: &[ChunkId]) -> Result<(Arc<OpenedBlock>, usize), TreeError> {
        let mut wanted = vec![id];
        {
            let cache = self.shared.cache.lock();
            wanted.extend(ahead.iter().filter(|other| **other != id && !cache.contains(other)).take(AHEAD_MAX));
        }
        let mut found = None;
        let mut failure = FetchError::Missing { chunks: vec![id] };
        for answer in self.shared.source.fetch(wanted)? {
            match answer {
                Ok(block) => {
                    if block.kind() == ChunkKind::Tree
                        && let Some(row) = block.rows().iter().position(|row| row.id == id)
                    {
                        found = Some((Arc::clone(&block), row));
                    }
                    self.shared.cache.lock().insert(&block);
                }
                // A damaged block may be unable to say what it held; if the node does not come, it is the likely reason.
                Err(error) if error.concerns(&id) || matches!(error, FetchError::Damaged { .. }) => failure = error,
                Err(_) => {}
            }
        }
        found.ok_or(TreeError::Fetch(failure))
    }

    /// The entries of the directory whose top node is `directory`, in the order of their names.
    pub fn entries(&self, directory: ChunkId) -> Entries {
        Entries::new(self, directory)
    }

    /// The content pieces of a file, in order: chunk and length in bytes. Inline content has none.
    pub fn pieces(&self, file: &DirEntry) -> Pieces {
        Pieces::new(self, file)
    }

    /// The error list of a snapshot.
    pub fn source_errors(&self, top: ChunkId) -> SourceErrors {
        SourceErrors::new(self, top)
    }

    /// Everything below `directory`, depth first, in the order of the names. `path` is put before every path.
    pub fn walk(&self, directory: ChunkId, path: &[u8]) -> Walk {
        Walk::new(self.clone(), directory, path)
    }

    pub(super) fn leaves(&self, top: ChunkId, kind: ListKind) -> Leaves {
        Leaves::new(self.clone(), top, kind)
    }

    /// The entry of that name in the directory, found without reading the rest of the directory.
    pub fn find(&self, directory: ChunkId, name: &[u8]) -> Result<Option<DirEntry>, TreeError> {
        let mut id = directory;
        let mut level_above = u8::MAX;
        loop {
            let node = self.node(id, &[])?;
            if node.node.kind != ListKind::Directory {
                return Err(TreeError::Contradiction { node: id, why: list_name(ListKind::Directory) });
            }
            match &node.node.body {
                NodeBody::Index { level, children } if *level < level_above => {
                    level_above = *level;
                    let after = children.partition_point(|child| child.first_name.as_slice() <= name);
                    let Some(child) = after.checked_sub(1).and_then(|place| children.get(place)) else {
                        return Ok(None);
                    };
                    id = node.child(child.position, ChunkKind::Tree)?;
                }
                NodeBody::Directory { .. } => {
                    return Ok(DirEntry::all_of(node).find(|entry| entry.entry.name == name));
                }
                _ => return Err(TreeError::Contradiction { node: id, why: "the levels of a list do not descend" }),
            }
        }
    }

    /// Follows a path of names separated by `/` from a root directory. Empty names and `.` are passed over.
    pub fn resolve(&self, root: ChunkId, path: &[u8]) -> Result<Resolved, TreeError> {
        let mut directory = Some(root);
        let mut resolved = Resolved::Root(root);
        let mut walked = Vec::new();
        for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".") {
            let for_people = |walked: &[u8]| String::from_utf8_lossy(walked).into_owned();
            let Some(top) = directory else {
                return Err(TreeError::NotADirectory { path: for_people(&walked) });
            };
            walked.push(b'/');
            walked.extend_from_slice(name);
            let entry = self.find(top, name)?.ok_or_else(|| TreeError::NotFound { path: for_people(&walked) })?;
            directory = entry.directory_top()?;
            resolved = Resolved::Entry(Box::new(entry));
        }
        Ok(resolved)
    }
}

impl Node {
    /// The chunk at `position`, which must be of `kind`.
    pub fn child(&self, position: u32, kind: ChunkKind) -> Result<ChunkId, TreeError> {
        child(self.id, &self.references, position, kind)
    }

    pub(super) fn index_child(&self, child: &IndexChild) -> Result<ChunkId, TreeError> {
        self.child(child.position, ChunkKind::Tree)
    }
}

pub(super) fn child(
    node: ChunkId,
    references: &[Reference],
    position: u32,
    kind: ChunkKind,
) -> Result<ChunkId, TreeError> {
    match references.get(position as usize) {
        Some(reference) if reference.kind == kind => Ok(reference.id),
        Some(_) => Err(TreeError::Contradiction { node, why: "a position points to a chunk of the wrong kind" }),
        None => Err(TreeError::Contradiction { node, why: "a position lies outside of the references" }),
    }
}

impl DirEntry {
    /// The top node of the directory that this entry is; `None` for anything else.
    pub fn directory_top(&self) -> Result<Option<ChunkId>, TreeError> {
        match self.entry.node {
            EntryNode::Directory { position } => self.child(position, ChunkKind::Tree).map(Some),
            _ => Ok(None),
        }
    }
}
