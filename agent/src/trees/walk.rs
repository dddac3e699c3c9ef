//! Walking a tree: depth first, names in order, one open list per level.

use strandline_messages::ChunkId;
use strandline_messages::format::tree::EntryNode;

use super::TreeError;
use super::listing::{DirEntry, Entries};
use super::reader::TreeReader;

/// Deepest nesting of directories that is walked. Each level holds at most one list node in memory.
pub const DEPTH_MAX: usize = 2048;

/// One step of a walk.
#[derive(Debug)]
pub enum Step {
    /// A directory; its entries follow, then [`Step::Leave`], unless [`Walk::skip_directory`] is called now.
    Enter(DirEntry),
    /// The end of the directory entered last and not yet left.
    Leave,
    /// Anything else.
    Entry(DirEntry),
}

/// A part of the tree that cannot be walked. The walk goes on behind it.
#[derive(Debug, thiserror::Error)]
#[error("{}: {error}", String::from_utf8_lossy(path))]
pub struct WalkError {
    /// The directory concerned.
    pub path: Vec<u8>,
    /// What happened.
    pub error: Box<TreeError>,
}

/// Iterates over everything below a directory: path and step. The path of a [`Step::Leave`] is the directory's.
pub struct Walk {
    reader: TreeReader,
    path: Vec<u8>,
    frames: Vec<Frame>,
    fetches_ahead: bool,
}

struct Frame {
    entries: Entries,
    /// Length of the path of this directory's parent.
    parent_bytes: usize,
}

impl Walk {
    pub(super) fn new(reader: TreeReader, directory: ChunkId, path: &[u8]) -> Self {
        let entries = reader.entries(directory);
        Self {
            reader,
            path: path.to_vec(),
            frames: vec![Frame { entries, parent_bytes: path.len() }],
            fetches_ahead: true,
        }
    }

    /// Fetches no directories ahead: for a walk that skips most of them.
    #[must_use]
    pub fn selective(mut self) -> Self {
        self.fetches_ahead = false;
        self
    }

    /// Called after [`Step::Enter`]: neither the directory's entries nor its [`Step::Leave`] will follow.
    pub fn skip_directory(&mut self) {
        if self.frames.len() > 1 {
            self.pop();
        }
    }

    fn pop(&mut self) {
        if let Some(frame) = self.frames.pop() {
            self.path.truncate(frame.parent_bytes);
        }
    }

    fn enter(&mut self, entry: DirEntry, top: ChunkId) -> Result<(Vec<u8>, Step), WalkError> {
        let path = self.path_of(&entry.entry.name);
        if self.frames.len() >= DEPTH_MAX {
            return Err(WalkError { path, error: Box::new(TreeError::TooDeep { max: DEPTH_MAX }) });
        }
        let above = self.frames.last().filter(|_| self.fetches_ahead);
        let ahead = above.map(|frame| frame.entries.directories_ahead()).unwrap_or_default();
        let entries = self.reader.entries(top).with_ahead(ahead);
        self.frames.push(Frame { entries, parent_bytes: self.path.len() });
        self.path.clone_from(&path);
        Ok((path, Step::Enter(entry)))
    }

    fn path_of(&self, name: &[u8]) -> Vec<u8> {
        let mut path = Vec::with_capacity(self.path.len() + 1 + name.len());
        path.extend_from_slice(&self.path);
        if !path.is_empty() {
            path.push(b'/');
        }
        path.extend_from_slice(name);
        path
    }
}

impl Iterator for Walk {
    type Item = Result<(Vec<u8>, Step), WalkError>;

    fn next(&mut self) -> Option<Self::Item> {
        let frame = self.frames.last_mut()?;
        let entry = match frame.entries.next() {
            Some(Ok(entry)) => entry,
            Some(Err(error)) => return Some(Err(WalkError { path: self.path.clone(), error: error.into() })),
            None => {
                let path = self.path.clone();
                self.pop();
                return if self.frames.is_empty() { None } else { Some(Ok((path, Step::Leave))) };
            }
        };
        if !matches!(entry.entry.node, EntryNode::Directory { .. }) {
            return Some(Ok((self.path_of(&entry.entry.name), Step::Entry(entry))));
        }
        match entry.directory_top() {
            Ok(Some(top)) => Some(self.enter(entry, top)),
            Ok(None) => Some(Ok((self.path_of(&entry.entry.name), Step::Entry(entry)))),
            Err(error) => Some(Err(WalkError { path: self.path_of(&entry.entry.name), error: error.into() })),
        }
    }
}
