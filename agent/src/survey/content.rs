//! How much of a file's content changed, chunk by chunk.

use std::io;
use std::path::PathBuf;

use strandline_messages::format::tree::{Content, EntryNode};

use super::Sorter;
use crate::trees::{DirEntry, TreeError, TreeReader};

/// Bytes of chunks that only one of two files has; a chunk that one has more often counts as often as it has more.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ContentChange {
    /// Bytes of chunks that only the later file has.
    pub added: u64,
    /// Bytes of chunks that only the earlier file has.
    pub removed: u64,
}

/// Why that cannot be told.
#[derive(Debug, thiserror::Error)]
pub enum ContentError {
    /// A list of chunks cannot be read.
    #[error(transparent)]
    Tree(#[from] TreeError),
    /// A temporary file cannot be used.
    #[error("a temporary file cannot be used: {0}")]
    Temporary(#[from] io::Error),
}

/// Compares the content of two files, each with the reader that it came from. Long lists are sorted in `directory`.
pub fn content_change(
    (before_reader, before): (&TreeReader, &DirEntry),
    (after_reader, after): (&TreeReader, &DirEntry),
    directory: PathBuf,
) -> Result<ContentChange, ContentError> {
    let mut sorter = Sorter::all(directory);
    for (reader, file, side) in [(before_reader, before, 0), (after_reader, after, 1)] {
        if let EntryNode::File { content: Content::Inline(bytes), .. } = &file.entry.node {
            sorter.push(*blake3::hash(bytes).as_bytes(), (bytes.len() as u64) << 1 | side)?;
        }
        for piece in reader.pieces(file) {
            let (id, bytes) = piece?;
            sorter.push(id.0, u64::from(bytes) << 1 | side)?;
        }
    }
    let mut change = ContentChange::default();
    let mut group: Option<([u8; 32], Group)> = None;
    for chunk in sorter.merge()? {
        let (key, value) = chunk?;
        let group = match &mut group {
            Some((of, group)) if *of == key => group,
            other => {
                if let Some((_, done)) = other.replace((key, Group::default())) {
                    done.settle(&mut change);
                }
                match other {
                    Some((_, group)) => group,
                    None => continue,
                }
            }
        };
        group.bytes = value >> 1;
        if value & 1 == 0 {
            group.before += 1;
        } else {
            group.after += 1;
        }
    }
    if let Some((_, last)) = group {
        last.settle(&mut change);
    }
    Ok(change)
}

/// How often one chunk is on either side.
#[derive(Default)]
struct Group {
    bytes: u64,
    before: u64,
    after: u64,
}

impl Group {
    fn settle(self, change: &mut ContentChange) {
        change.added += self.bytes.saturating_mul(self.after.saturating_sub(self.before));
        change.removed += self.bytes.saturating_mul(self.before.saturating_sub(self.after));
    }
}
