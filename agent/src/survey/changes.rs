//! What differs between two trees: a walk through both in the order of names, which reads no subtree that is the same in both.
//!
//! Memory: one list node for each side and level, and the two readers' caches.

use std::cmp::Ordering;
use std::iter::Peekable;

use strandline_messages::ChunkId;
use strandline_messages::ChunkKind;
use strandline_messages::format::tree::{Content, EntryNode, Piece};

use crate::trees::{DEPTH_MAX, DirEntry, Entries, Resolved, TreeError, TreeReader, WalkError};

/// Kinds of changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Only in the later tree.
    Added,
    /// Only in the earlier tree.
    Removed,
    /// Other content, link target or device.
    Modified,
    /// The same content, but another mode, owner, modification time or extended attribute.
    Metadata,
    /// Something else of the same name.
    Type,
}

/// One change.
#[derive(Debug)]
pub struct Changed<'a> {
    /// What kind.
    pub change: Change,
    /// Path in the snapshots.
    pub path: &'a [u8],
    /// The earlier entry.
    pub before: Option<&'a DirEntry>,
    /// The later entry.
    pub after: Option<&'a DirEntry>,
}

/// How many of one kind of entries.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Added.
    pub added: u64,
    /// Removed.
    pub removed: u64,
    /// Changed in content; directories never are.
    pub changed: u64,
}

/// What the changes came to. What changed its type is removed as the one and added as the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Regular files.
    pub files: Counts,
    /// Directories.
    pub directories: Counts,
    /// Everything else.
    pub others: Counts,
    /// Entries with the same content and other attributes.
    pub metadata: u64,
    /// Bytes of added files, and what changed files have more.
    pub bytes_added: u64,
    /// Bytes of removed files, and what changed files have less.
    pub bytes_removed: u64,
    /// Directories that could not be compared to their end.
    pub problems: u64,
}

/// Compares two directories, or entries; `None` is nothing. `path` is put before every path. `found` is told each change, and
/// which directories cannot be read (what is left of them is passed over); the first error that it returns ends it.
pub fn compare<E>(
    before: (&TreeReader, Option<&Resolved>),
    after: (&TreeReader, Option<&Resolved>),
    path: &[u8],
    mut found: impl FnMut(Result<Changed<'_>, WalkError>) -> Result<(), E>,
) -> Result<Changes, E> {
    let mut comparing = Comparing {
        before: before.0,
        after: after.0,
        path: path.to_vec(),
        frames: Vec::new(),
        changes: Changes::default(),
        found: &mut found,
    };
    comparing.start(before.1, after.1)?;
    while let Some(frame) = comparing.frames.last_mut() {
        let next = frame.next();
        comparing.step(next)?;
    }
    Ok(comparing.changes)
}

struct Comparing<'a, F> {
    before: &'a TreeReader,
    after: &'a TreeReader,
    path: Vec<u8>,
    frames: Vec<Frame>,
    changes: Changes,
    found: &'a mut F,
}

/// A directory that is being compared, or listed if only one side has it.
struct Frame {
    before: Option<Peekable<Entries>>,
    after: Option<Peekable<Entries>>,
    /// Length of the path of the directory around it.
    parent_bytes: usize,
}

/// The next name of a directory. A side without it is `None`.
type Next = Result<Option<(Option<DirEntry>, Option<DirEntry>)>, TreeError>;

impl Frame {
    fn next(&mut self) -> Next {
        let before = peek(&mut self.before)?;
        let after = peek(&mut self.after)?;
        let order = match (before, after) {
            (None, None) => return Ok(None),
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(before), Some(after)) => before.cmp(after),
        };
        let before = if order.is_le() { take(&mut self.before)? } else { None };
        let after = if order.is_ge() { take(&mut self.after)? } else { None };
        Ok(Some((before, after)))
    }
}

fn peek(side: &mut Option<Peekable<Entries>>) -> Result<Option<&[u8]>, TreeError> {
    match side.as_mut().and_then(Peekable::peek) {
        None => Ok(None),
        Some(Ok(entry)) => Ok(Some(&entry.entry.name)),
        Some(Err(error)) => Err(error.clone()),
    }
}

fn take(side: &mut Option<Peekable<Entries>>) -> Result<Option<DirEntry>, TreeError> {
    side.as_mut().and_then(Iterator::next).transpose()
}

impl<E, F: FnMut(Result<Changed<'_>, WalkError>) -> Result<(), E>> Comparing<'_, F> {
    fn start(&mut self, before: Option<&Resolved>, after: Option<&Resolved>) -> Result<(), E> {
        let root = |side: Option<&Resolved>| match side {
            Some(Resolved::Root(top)) => Some(*top),
            _ => None,
        };
        match (root(before), root(after)) {
            (None, None) => self.pair(entry(before), entry(after), self.path.len()),
            // A root has no attributes of its own: only what lies below counts.
            (before_root, after_root) => {
                let top = |root: Option<ChunkId>, entry: Option<&DirEntry>| match (root, entry) {
                    (Some(root), _) => Ok(Some(root)),
                    (None, Some(entry)) => entry.directory_top(),
                    (None, None) => Ok(None),
                };
                match (top(before_root, entry(before)), top(after_root, entry(after))) {
                    (Ok(before), Ok(after)) if before == after => Ok(()),
                    (Ok(before), Ok(after)) => self.enter(before, after, self.path.len()),
                    (Err(error), _) | (_, Err(error)) => self.problem(error),
                }
            }
        }
    }

    fn step(&mut self, next: Next) -> Result<(), E> {
        let (before, after) = match next {
            Ok(Some(pair)) => pair,
            Ok(None) => {
                self.leave();
                return Ok(());
            }
            // Without the rest of one side, names of the other would seem to be added or removed.
            Err(error) => {
                let told = self.problem(error);
                self.leave();
                return told;
            }
        };
        let parent_bytes = self.path.len();
        if let Some(entry) = before.as_ref().or(after.as_ref()) {
            if !self.path.is_empty() {
                self.path.push(b'/');
            }
            self.path.extend_from_slice(&entry.entry.name);
        }
        let depth = self.frames.len();
        self.pair(before.as_ref(), after.as_ref(), parent_bytes)?;
        if self.frames.len() == depth {
            self.path.truncate(parent_bytes);
        }
        Ok(())
    }

    /// Compares what has the current path.
    fn pair(&mut self, before: Option<&DirEntry>, after: Option<&DirEntry>, parent_bytes: usize) -> Result<(), E> {
        let change = match (before, after) {
            (None, None) => return Ok(()),
            (Some(_), None) => Some(Change::Removed),
            (None, Some(_)) => Some(Change::Added),
            (Some(before), Some(after)) => difference(before, after),
        };
        if let Some(change) = change {
            self.changes.note(change, before, after);
            (self.found)(Ok(Changed { change, path: &self.path, before, after }))?;
        }
        let top = |entry: Option<&DirEntry>| entry.map_or(Ok(None), DirEntry::directory_top);
        match (top(before), top(after)) {
            (Ok(before), Ok(after)) if before == after => Ok(()),
            (Ok(before), Ok(after)) => self.enter(before, after, parent_bytes),
            (Err(error), _) | (_, Err(error)) => self.problem(error),
        }
    }

    fn enter(&mut self, before: Option<ChunkId>, after: Option<ChunkId>, parent_bytes: usize) -> Result<(), E> {
        if self.frames.len() >= DEPTH_MAX {
            return self.problem(TreeError::TooDeep { max: DEPTH_MAX });
        }
        let entries = |reader: &TreeReader, top: Option<ChunkId>| top.map(|top| reader.entries(top).peekable());
        let (before, after) = (entries(self.before, before), entries(self.after, after));
        self.frames.push(Frame { before, after, parent_bytes });
        Ok(())
    }

    fn leave(&mut self) {
        if let Some(frame) = self.frames.pop() {
            self.path.truncate(frame.parent_bytes);
        }
    }

    fn problem(&mut self, error: TreeError) -> Result<(), E> {
        self.changes.problems += 1;
        (self.found)(Err(WalkError { path: self.path.clone(), error: Box::new(error) }))
    }
}

impl Changes {
    fn note(&mut self, change: Change, before: Option<&DirEntry>, after: Option<&DirEntry>) {
        if change == Change::Metadata {
            self.metadata += 1;
            return;
        }
        let (old, new) = (before.map_or(0, size), after.map_or(0, size));
        if change == Change::Modified {
            self.bytes_added += new.saturating_sub(old);
            self.bytes_removed += old.saturating_sub(new);
            if let Some(after) = after {
                self.of(after).changed += 1;
            }
            return;
        }
        self.bytes_added += new;
        self.bytes_removed += old;
        if let Some(before) = before {
            self.of(before).removed += 1;
        }
        if let Some(after) = after {
            self.of(after).added += 1;
        }
    }

    fn of(&mut self, entry: &DirEntry) -> &mut Counts {
        match entry.entry.node {
            EntryNode::File { .. } => &mut self.files,
            EntryNode::Directory { .. } => &mut self.directories,
            _ => &mut self.others,
        }
    }
}

fn entry(side: Option<&Resolved>) -> Option<&DirEntry> {
    match side {
        Some(Resolved::Entry(entry)) => Some(entry),
        _ => None,
    }
}

fn size(entry: &DirEntry) -> u64 {
    match entry.entry.node {
        EntryNode::File { size, .. } => size,
        _ => 0,
    }
}

/// What differs between two entries of one name, not looking into directories.
fn difference(before: &DirEntry, after: &DirEntry) -> Option<Change> {
    use EntryNode::{BlockDevice, CharDevice, Directory, Fifo, File, Socket, Symlink};
    let same = match (&before.entry.node, &after.entry.node) {
        (File { size, content, holes }, File { size: later_size, content: later, holes: later_holes }) => {
            size == later_size && holes == later_holes && same_content((before, content), (after, later))
        }
        (Directory { .. }, Directory { .. }) | (Fifo, Fifo) | (Socket, Socket) => true,
        (Symlink { target }, Symlink { target: later }) => target == later,
        (CharDevice { .. }, CharDevice { .. }) | (BlockDevice { .. }, BlockDevice { .. }) => {
            before.entry.node == after.entry.node
        }
        _ => return Some(Change::Type),
    };
    if !same {
        return Some(Change::Modified);
    }
    let (a, b) = (&before.entry, &after.entry);
    let alike = a.mode == b.mode && a.mtime == b.mtime && a.xattrs == b.xattrs && before.owner() == after.owner();
    (!alike).then_some(Change::Metadata)
}

/// The same bytes are cut into the same chunks, and the same chunks listed in the same nodes.
fn same_content((before, content): (&DirEntry, &Content), (after, later): (&DirEntry, &Content)) -> bool {
    let chunk = |file: &DirEntry, piece: &Piece| file.child(piece.position, ChunkKind::Data).ok();
    match (content, later) {
        (Content::Inline(a), Content::Inline(b)) => a == b,
        (Content::Pieces(a), Content::Pieces(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| chunk(before, a) == chunk(after, b))
        }
        (Content::List { position: a }, Content::List { position: b }) => {
            before.child(*a, ChunkKind::Tree).ok() == after.child(*b, ChunkKind::Tree).ok()
        }
        _ => false,
    }
}
