//! Files of snapshots, counted as they would be restored, or by distinct content.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use strandline_messages::ChunkId;
use strandline_messages::format::tree::{Content, Entry, EntryNode};

use super::{Look, Recent, Sorter};
use crate::trees::{ChunkSource, DirEntry, Step, WalkError};

/// Directories that are remembered: about 50 MiB.
const KNOWN_MAX: usize = 400_000;

/// What was counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileTotals {
    /// Regular files by name; or distinct contents.
    pub files: u64,
    /// Directories.
    pub directories: u64,
    /// Links, devices, pipes, sockets.
    pub others: u64,
    /// Bytes of the files, holes included.
    pub bytes: u64,
}

impl std::ops::AddAssign for FileTotals {
    fn add_assign(&mut self, other: Self) {
        self.files += other.files;
        self.directories += other.directories;
        self.others += other.others;
        self.bytes = self.bytes.saturating_add(other.bytes);
    }
}

/// Counts what restoring a snapshot would write: every name, but the bytes of hard links once.
///
/// Directories without hard links that were counted before are not read again.
pub struct RestoreSize {
    look: Look,
    directory: PathBuf,
    known: Recent<ChunkId, FileTotals>,
}

/// A directory that the walk is in.
struct Frame {
    top: ChunkId,
    totals: FileTotals,
    /// Whether its totals stand alone: no hard links, nothing unreadable.
    whole: bool,
}

impl RestoreSize {
    /// With temporary files in `directory`.
    pub fn new(directory: PathBuf) -> Self {
        Self { look: Look::new(), directory, known: Recent::new(KNOWN_MAX) }
    }

    /// Counts the snapshot with this root. `problem` is told which parts cannot be read.
    pub fn snapshot(
        &mut self,
        source: Arc<dyn ChunkSource>,
        root: ChunkId,
        mut problem: impl FnMut(WalkError),
    ) -> io::Result<FileTotals> {
        self.look.switch.to(source);
        if let Some(known) = self.known.get(&root) {
            return Ok(known);
        }
        let mut inodes = Sorter::distinct(self.directory.clone());
        let mut frames = vec![Frame { top: root, totals: FileTotals::default(), whole: true }];
        let mut walk = self.look.reader.walk(root, &[]);
        while let Some(step) = walk.next() {
            let Some(frame) = frames.last_mut() else { break };
            match step {
                Ok((_, Step::Enter(entry))) => {
                    frame.totals.directories += 1;
                    let Ok(Some(top)) = entry.directory_top() else { continue };
                    if let Some(known) = self.known.get(&top) {
                        frame.totals += known;
                        walk.skip_directory();
                    } else {
                        frames.push(Frame { top, totals: FileTotals::default(), whole: true });
                    }
                }
                Ok((_, Step::Entry(entry))) => frame.count(&entry, &mut inodes)?,
                Ok((_, Step::Leave)) => self.leave(&mut frames),
                Err(error) => {
                    frame.whole = false;
                    let lost = error.error.is_lost();
                    problem(error);
                    if lost {
                        break;
                    }
                }
            }
        }
        let mut totals = FileTotals::default();
        for frame in &frames {
            totals += frame.totals;
        }
        if let [_] = frames.as_slice() {
            self.leave(&mut frames);
        }
        for inode in inodes.merge()? {
            totals.bytes = totals.bytes.saturating_add(inode?.1);
        }
        Ok(totals)
    }

    fn leave(&mut self, frames: &mut Vec<Frame>) {
        let Some(done) = frames.pop() else { return };
        if done.whole {
            self.known.insert(done.top, done.totals);
        }
        if let Some(around) = frames.last_mut() {
            around.totals += done.totals;
            around.whole &= done.whole;
        }
    }
}

impl Frame {
    fn count(&mut self, entry: &DirEntry, inodes: &mut Sorter) -> io::Result<()> {
        let entry = &entry.entry;
        let EntryNode::File { size, .. } = &entry.node else {
            self.totals.others += 1;
            return Ok(());
        };
        self.totals.files += 1;
        if entry.links < 2 {
            self.totals.bytes = self.totals.bytes.saturating_add(*size);
            return Ok(());
        }
        self.whole = false;
        let inode = [entry.device.to_le_bytes(), entry.inode.to_le_bytes()];
        inodes.push(*blake3::hash(inode.as_flattened()).as_bytes(), *size)
    }
}

/// Counts the distinct contents of the files of many snapshots.
pub struct UniqueFiles {
    look: Look,
    seen: Recent<ChunkId, ()>,
    contents: Sorter,
}

impl UniqueFiles {
    /// With temporary files in `directory`.
    pub fn new(directory: PathBuf) -> Self {
        Self { look: Look::new(), seen: Recent::new(KNOWN_MAX), contents: Sorter::distinct(directory) }
    }

    /// Shows it the snapshot with this root. `problem` is told which parts cannot be read.
    pub fn snapshot(
        &mut self,
        source: Arc<dyn ChunkSource>,
        root: ChunkId,
        mut problem: impl FnMut(WalkError),
    ) -> io::Result<()> {
        self.look.switch.to(source);
        let mut walk = self.look.reader.walk(root, &[]);
        while let Some(step) = walk.next() {
            match step {
                Ok((_, Step::Enter(entry))) => {
                    if let Ok(Some(top)) = entry.directory_top()
                        && self.seen.get(&top).is_some()
                    {
                        walk.skip_directory();
                    } else if let Ok(Some(top)) = entry.directory_top() {
                        self.seen.insert(top, ());
                    }
                }
                Ok((_, Step::Entry(entry))) => {
                    if let EntryNode::File { size, .. } = &entry.entry.node {
                        self.contents.push(content_key(&entry), *size)?;
                    }
                }
                Ok((_, Step::Leave)) => {}
                Err(error) => {
                    let lost = error.error.is_lost();
                    problem(error);
                    if lost {
                        break;
                    }
                }
            }
        }
        Ok(())
    }

    /// What all of them came to.
    pub fn finish(self) -> io::Result<FileTotals> {
        let mut totals = FileTotals::default();
        for content in self.contents.merge()? {
            totals.files += 1;
            totals.bytes = totals.bytes.saturating_add(content?.1);
        }
        Ok(totals)
    }
}

/// Equal for files with equal content: the same bytes are cut into the same chunks.
fn content_key(file: &DirEntry) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    let Entry { node: EntryNode::File { size, content, holes }, .. } = &file.entry else { return [0; 32] };
    hasher.update(&size.to_le_bytes());
    for hole in holes {
        hasher.update(&hole.offset.to_le_bytes()).update(&hole.bytes.to_le_bytes());
    }
    match content {
        Content::Inline(bytes) => {
            hasher.update(b"inline").update(bytes);
        }
        Content::Pieces(pieces) => {
            hasher.update(b"pieces");
            for piece in pieces {
                if let Ok(id) = file.child(piece.position, strandline_messages::ChunkKind::Data) {
                    hasher.update(id.as_bytes());
                }
            }
        }
        Content::List { position } => {
            hasher.update(b"list");
            if let Ok(id) = file.child(*position, strandline_messages::ChunkKind::Tree) {
                hasher.update(id.as_bytes());
            }
        }
    }
    *hasher.finalize().as_bytes()
}
