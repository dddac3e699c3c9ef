//! A snapshot's tree, or a part of it, as one stream: the bytes of a file, a tar or a zip archive.
//!
//! A planner thread walks the tree in order and cuts what is to be written into windows (`window`); each window is one
//! fetch, whose wanted chunks are taken out of the blocks as they come. The calling thread writes one window while the next
//! is fetched. Every chunk's id is verified. At the first thing that cannot be read the export ends with an error that
//! names path and block, and without what ends an archive: nothing that is incomplete looks complete.
//!
//! Memory: the tree cache, and two windows of [`ExportOptions::window_bytes`].

mod item;
mod links;
mod plan;
mod raw;
mod tar;
mod window;
mod zip;

#[cfg(test)]
mod tests;

use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use strandline_messages::ChunkId;
use strandline_messages::format::tree::EntryNode;

use crate::trees::{ChunkSource, DirEntry, Resolved, TreeError, TreeReader};

use item::Item;

/// Opened tree blocks kept, bytes.
const TREE_CACHE_BYTES: usize = 16 << 20;
/// Most remarks that are kept one by one; the rest is counted.
const REMARKS_MAX: usize = 100;

/// Kinds of archives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Archive {
    /// POSIX.1-2001 (pax).
    Tar,
    /// With zip64 where it is needed, and Unix attributes.
    Zip,
}

/// How to export.
#[derive(Clone, Debug)]
pub struct ExportOptions {
    /// Existing directory for temporary files.
    pub temporary: PathBuf,
    /// Content of one window, bytes.
    pub window_bytes: u64,
    /// Set to stop soon.
    pub cancel: Arc<AtomicBool>,
}

impl ExportOptions {
    /// Windows of 32 MiB, temporary files in `temporary`.
    pub fn new(temporary: PathBuf) -> Self {
        Self { temporary, window_bytes: 32 << 20, cancel: Arc::default() }
    }
}

/// What was written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exported {
    /// Names in the archive; 1 for a single file.
    pub entries: u64,
    /// Bytes of file content, holes not counted.
    pub bytes: u64,
    /// Entries that this kind of archive cannot hold.
    pub left_out: u64,
    /// Files that hold less or more than their entries say.
    pub flaws: u64,
    /// The first left out entries and flaws: raw path and reason.
    pub remarks: Vec<(Vec<u8>, String)>,
}

/// Why an export ended early.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The path cannot be found or read.
    #[error("{0}; nothing was written")]
    Path(TreeError),
    /// A link, device, pipe or socket has no content.
    #[error("`{path}` is neither a file nor a directory, so it has no content to write; nothing was written")]
    NoContent {
        /// The path, for people.
        path: String,
    },
    /// Something on the way cannot be read.
    #[error("/{path}: {reason}; the output ends there and is not complete")]
    Unreadable {
        /// The path in the snapshot, for people.
        path: String,
        /// What happened, naming the block.
        reason: String,
    },
    /// The entry cannot be put into this kind of archive.
    #[error("/{path} does not fit into this kind of archive: {why}; the output ends there and is not complete")]
    DoesNotFit {
        /// The path in the snapshot, for people.
        path: String,
        /// What does not fit.
        why: &'static str,
    },
    /// The output.
    #[error("the output cannot be written: {0}")]
    Output(io::Error),
    /// A temporary file.
    #[error("a temporary file cannot be used: {0}; the output is not complete")]
    Temporary(io::Error),
    /// [`ExportOptions::cancel`] was set.
    #[error("stopped; the output is not complete")]
    Cancelled,
}

impl ExportError {
    fn unreadable(path: &[u8], reason: &str) -> Self {
        // What went wrong with a block ends with what a restore would do; here nothing follows.
        let reason = reason.trim_end_matches("; everything else can be restored").to_owned();
        Self::Unreadable { path: for_people(path), reason }
    }

    /// Whether whoever read the output has gone away.
    pub fn is_closed_pipe(&self) -> bool {
        matches!(self, Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe)
    }
}

/// Something found in a snapshot, ready to be written.
pub struct Export {
    reader: TreeReader,
    start: Start,
    /// Path in the snapshot of what is exported, without `/` at the ends.
    path: Vec<u8>,
    archive: Option<Archive>,
}

enum Start {
    Directory { top: ChunkId, entry: Option<Box<DirEntry>> },
    Entry(Box<DirEntry>),
}

impl Export {
    /// Finds `path` (empty: everything) below `root`. A directory becomes a tar archive if nothing else is said, a file is
    /// written as it is unless `archive` asks for an archive of one.
    pub fn find(
        source: Arc<dyn ChunkSource>,
        root: ChunkId,
        path: &[u8],
        archive: Option<Archive>,
    ) -> Result<Self, ExportError> {
        let reader = TreeReader::new(source, TREE_CACHE_BYTES);
        let names = path.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".");
        let path = names.collect::<Vec<_>>().join(&b'/');
        let start = match reader.resolve(root, &path).map_err(ExportError::Path)? {
            Resolved::Root(top) => Start::Directory { top, entry: None },
            Resolved::Entry(entry) => match entry.directory_top().map_err(ExportError::Path)? {
                Some(top) => Start::Directory { top, entry: Some(entry) },
                None => Start::Entry(entry),
            },
        };
        let archive = match &start {
            Start::Directory { .. } => Some(archive.unwrap_or(Archive::Tar)),
            Start::Entry(entry) => {
                if archive.is_none() && !matches!(entry.entry.node, EntryNode::File { .. }) {
                    return Err(ExportError::NoContent { path: format!("/{}", String::from_utf8_lossy(&path)) });
                }
                archive
            }
        };
        Ok(Self { reader, start, path, archive })
    }

    /// Whether an archive will be written, and which.
    pub fn archive(&self) -> Option<Archive> {
        self.archive
    }

    /// Writes it. The caller flushes `out`.
    pub fn write(&self, out: &mut dyn Write, options: &ExportOptions) -> Result<Exported, ExportError> {
        match self.archive {
            None => window::run(self, options, &mut raw::Raw::new(out)),
            Some(Archive::Tar) => window::run(self, options, &mut tar::Tar::new(out)),
            Some(Archive::Zip) => window::run(self, options, &mut zip::Zip::new(out, &options.temporary)),
        }
    }
}

/// Whether a sink holds an entry.
enum Taken {
    Yes,
    /// It cannot, and why.
    No(&'static str),
    /// This kind of archive does without it.
    Unneeded,
}

/// What is written: told of each entry, then of its content, then that it is over.
trait Sink {
    /// Whether two names of one file can be written as such.
    const HARD_LINKS: bool;

    /// The next entry. Exactly [`Item::content_bytes`] bytes follow.
    fn begin(&mut self, item: Item) -> Result<Taken, ExportError>;

    /// Bytes of the content stream: those outside of holes.
    fn content(&mut self, bytes: &[u8]) -> Result<(), ExportError>;

    /// The entry is over. Called for those that were taken.
    fn end(&mut self) -> Result<(), ExportError>;

    /// Everything is written: what ends an archive.
    fn finish(&mut self) -> Result<(), ExportError>;
}

fn put(out: &mut dyn Write, bytes: &[u8]) -> Result<(), ExportError> {
    out.write_all(bytes).map_err(ExportError::Output)
}

fn for_people(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}
