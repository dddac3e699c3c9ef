//! The assembler: consumes parts in scan order; builds trees, the error list and the new file cache; passes chunks on.

use std::collections::HashMap;
use std::mem;

use strandline_messages::format::manifest::Totals;
use strandline_messages::format::tree::{EntryNode, Hole};
use strandline_messages::ids::ChunkId;

use super::blocks::Emitter;
use super::items::{Node, NodeContent, Part, Step};
use super::progress::Progress;
use super::reader::FileReader;
use super::trees::{ContentBuilder, DirectoryBuilder, ErrorListBuilder, FileContent, NewEntry, NewNode};
use super::{BackupError, ChunkKeys};
use crate::cache::{CacheWriter, CachedContentRef, FilePiece, Identity};
use crate::scan::owners::Owners;
use rustix::fs::FileType;

/// Hardlinked files remembered per generation, and bytes of their chunk lists.
const LINKS: usize = 32_768;
const LINK_BYTES: usize = 8 << 20;

/// The content of a file that has further links.
#[derive(Clone, Debug)]
struct LinkedContent {
    identity: Identity,
    content: FileContent,
    holes: Vec<Hole>,
    size: u64,
    cacheable: bool,
}

#[derive(Debug, Default)]
struct Links {
    young: HashMap<(u64, u64), LinkedContent>,
    old: HashMap<(u64, u64), LinkedContent>,
    young_bytes: usize,
}

impl Links {
    fn get(&self, key: (u64, u64)) -> Option<&LinkedContent> {
        self.young.get(&key).or_else(|| self.old.get(&key))
    }

    fn insert(&mut self, key: (u64, u64), content: LinkedContent) {
        if self.young.len() >= LINKS || self.young_bytes >= LINK_BYTES {
            mem::swap(&mut self.young, &mut self.old);
            self.young.clear();
            self.young_bytes = 0;
        }
        let pieces = if let FileContent::Pieces(pieces) = &content.content { pieces.len() } else { 0 };
        self.young_bytes += pieces * size_of::<FilePiece>() + content.holes.len() * size_of::<Hole>();
        self.young.insert(key, content);
    }
}

/// What the assembly came to.
#[derive(Debug)]
pub struct Assembled {
    /// Top node of the root directory.
    pub root: ChunkId,
    /// Top node of the error list.
    pub errors_root: Option<ChunkId>,
    /// Counts, without those that `Progress` keeps: files read, new bytes, stored bytes.
    pub totals: Totals,
    /// The new cache's records, all written.
    pub cache: CacheWriter,
}

/// Consumes parts.
#[derive(Debug)]
pub struct Assembler<'a> {
    emitter: Emitter<'a>,
    reader: Option<FileReader<'a>>,
    progress: &'a Progress,
    name_key: [u8; 32],
    owners: Owners,
    cache: CacheWriter,
    top: DirectoryBuilder,
    frames: Vec<(Box<Node>, DirectoryBuilder)>,
    content: ContentBuilder,
    errors: ErrorListBuilder,
    links: Links,
    totals: Totals,
}

impl<'a> Assembler<'a> {
    /// `reader` reads further links of files whose content has been forgotten.
    pub fn new(
        emitter: Emitter<'a>,
        reader: FileReader<'a>,
        progress: &'a Progress,
        keys: &ChunkKeys,
        cache: CacheWriter,
    ) -> Self {
        Self {
            emitter,
            reader: Some(reader),
            progress,
            name_key: blake3::derive_key("strandline 1 boundaries of directories", &keys.id_key),
            owners: Owners::of_this_machine(),
            cache,
            top: DirectoryBuilder::default(),
            frames: Vec::new(),
            content: ContentBuilder::default(),
            errors: ErrorListBuilder::default(),
            links: Links::default(),
            totals: Totals::default(),
        }
    }

    /// Consumes the next part in scan order.
    pub fn part(&mut self, part: Part) -> Result<(), BackupError> {
        let Part { data, chunks, steps } = part;
        if !chunks.is_empty() {
            self.emitter.data(data, &chunks)?;
        }
        let mut chunks = chunks.into_iter();
        let mut done = 0;
        for (end, step) in steps {
            for (id, bytes) in chunks.by_ref().take(end - done) {
                self.content.add(FilePiece { id, bytes }, &mut self.emitter)?;
            }
            done = end;
            self.step(step)?;
        }
        for (id, bytes) in chunks {
            self.content.add(FilePiece { id, bytes }, &mut self.emitter)?;
        }
        Ok(())
    }

    /// Ends the snapshot: root directory, error list, last blocks.
    pub fn finish(mut self) -> Result<Assembled, BackupError> {
        while !self.frames.is_empty() {
            self.leave()?;
        }
        let root = self.top.finish(&mut self.emitter)?;
        let mut totals = self.totals;
        totals.errors = self.errors.count();
        let errors_root = self.errors.finish(&mut self.emitter)?;
        self.emitter.finish()?;
        Ok(Assembled { root, errors_root, totals, cache: self.cache })
    }

    fn step(&mut self, step: Step) -> Result<(), BackupError> {
        match step {
            Step::Enter(mut node) => {
                self.report(&mut node)?;
                self.remember(true, &node, CachedContentRef::None);
                self.totals.directories += 1;
                self.progress.directories.add(1);
                self.frames.push((node, DirectoryBuilder::default()));
                Ok(())
            }
            Step::Leave => self.leave(),
            Step::Node(node) => self.node(node),
            Step::Problem { path, message } => {
                self.content.clear();
                self.problem(path, message)
            }
        }
    }

    fn problem(&mut self, path: Vec<u8>, message: String) -> Result<(), BackupError> {
        self.progress.tell_issue(&path, &message);
        self.errors.add(path, message, &mut self.emitter)
    }

    fn report(&mut self, node: &mut Node) -> Result<(), BackupError> {
        for message in mem::take(&mut node.problems) {
            let path = node.place.parent.path_of(&node.name);
            self.problem(path, message)?;
        }
        Ok(())
    }

    fn leave(&mut self) -> Result<(), BackupError> {
        let Some((node, builder)) = self.frames.pop() else { return Ok(()) };
        let id = builder.finish(&mut self.emitter)?;
        self.add(*node, NewNode::Directory(id))
    }

    fn add(&mut self, node: Node, new: NewNode) -> Result<(), BackupError> {
        let Node { name, meta, xattrs, .. } = node;
        let owners = &self.owners;
        let builder = self.frames.last_mut().map_or(&mut self.top, |(_, builder)| builder);
        let entry = NewEntry { name: &name, meta: &meta, xattrs, node: new };
        builder.add(entry, || owners.owner(meta.uid, meta.gid), &self.name_key, &mut self.emitter)
    }

    fn remember(&mut self, directory: bool, node: &Node, content: CachedContentRef<'_>) {
        if node.cacheable {
            let identity = Identity::of(&node.meta);
            let depth = self.frames.len();
            self.cache.put(depth, directory, &node.name, &identity, &node.xattrs, &node.holes, content);
        }
    }

    fn node(&mut self, mut node: Box<Node>) -> Result<(), BackupError> {
        self.report(&mut node)?;
        if node.meta.is_file() {
            return self.file(node);
        }
        let other = match (node.meta.file_type(), mem::replace(&mut node.content, NodeContent::None)) {
            (FileType::Symlink, NodeContent::Target(target)) => {
                self.remember(false, &node, CachedContentRef::Inline(&target));
                EntryNode::Symlink { target }
            }
            (file_type, _) => {
                self.remember(false, &node, CachedContentRef::None);
                let (major, minor) = (node.meta.major, node.meta.minor);
                match file_type {
                    FileType::Fifo => EntryNode::Fifo,
                    FileType::Socket => EntryNode::Socket,
                    FileType::CharacterDevice => EntryNode::CharDevice { major, minor },
                    FileType::BlockDevice => EntryNode::BlockDevice { major, minor },
                    _ => {
                        let path = node.place.parent.path_of(&node.name);
                        return self.problem(path, "its type is unknown to this program".into());
                    }
                }
            }
        };
        self.totals.others += 1;
        self.progress.others.add(1);
        self.add(*node, NewNode::Other(other))
    }

    fn file(&mut self, mut node: Box<Node>) -> Result<(), BackupError> {
        let key = (node.meta.device, node.meta.inode);
        let content = match mem::replace(&mut node.content, NodeContent::None) {
            NodeContent::Inline(bytes) => FileContent::Inline(bytes),
            NodeContent::Pieces(pieces) => FileContent::Pieces(pieces),
            NodeContent::List(id) => FileContent::List(id),
            NodeContent::SameInode => {
                let identity = Identity::of(&node.meta);
                match self.links.get(key).filter(|linked| linked.identity == identity).cloned() {
                    Some(linked) => {
                        node.holes = linked.holes;
                        node.meta.size = linked.size;
                        node.cacheable &= linked.cacheable;
                        linked.content
                    }
                    None => return self.read_again(node),
                }
            }
            _ => self.content.finish(&mut self.emitter)?,
        };
        if node.meta.links > 1 && !node.unchanged && self.links.get(key).is_none() {
            let linked = LinkedContent {
                identity: Identity::of(&node.meta),
                content: content.clone(),
                holes: node.holes.clone(),
                size: node.meta.size,
                cacheable: node.cacheable,
            };
            self.links.insert(key, linked);
        }
        self.remember(
            false,
            &node,
            match &content {
                FileContent::Inline(bytes) => CachedContentRef::Inline(bytes),
                FileContent::Pieces(pieces) => CachedContentRef::Pieces(pieces),
                FileContent::List(id) => CachedContentRef::List(*id),
            },
        );
        let size = node.meta.size;
        self.totals.files += 1;
        self.totals.bytes += size;
        self.progress.files.add(1);
        self.progress.bytes.add(size);
        self.progress.files_unchanged.add(u64::from(node.unchanged));
        let holes = mem::take(&mut node.holes);
        self.add(*node, NewNode::File { size, content, holes })
    }

    // A further link of a file whose content is no longer remembered, or has changed since.
    fn read_again(&mut self, mut node: Box<Node>) -> Result<(), BackupError> {
        let Some(mut reader) = self.reader.take() else { return Err(BackupError::Stopped) };
        node.content = NodeContent::Unread;
        let mut out = |part| self.part(part);
        let read = reader.process(Step::Node(node), &mut out).and_then(|()| reader.flush(&mut out));
        self.reader = Some(reader);
        read
    }
}
