//! Distinct chunks of many snapshots, counted exactly.
//!
//! Every chunk goes through a sort on disk; tree chunks that were read lately are not read again.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::vec;

use strandline_messages::format::tree::{Content, EntryNode, NodeBody, Piece};
use strandline_messages::{ChunkId, ChunkKind};

use super::{Look, Recent, Sorter};
use crate::trees::{ChunkSource, Node, TreeError};

/// Tree chunks that are remembered as read: about 25 MiB.
const SEEN_MAX: usize = 400_000;

/// Distinct chunks and the length of their plaintext.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ChunkTotals {
    /// Chunks of file content.
    pub data_chunks: u64,
    /// Their bytes.
    pub data_bytes: u64,
    /// Parts of directories and lists; small files stand in them.
    pub tree_chunks: u64,
    /// Their bytes.
    pub tree_bytes: u64,
}

/// Counts the distinct chunks of the snapshots that it is shown.
pub struct UniqueChunks {
    look: Look,
    seen: Recent<ChunkId, ()>,
    sorter: Sorter,
}

impl UniqueChunks {
    /// With temporary files in `directory`.
    pub fn new(directory: PathBuf) -> Self {
        Self { look: Look::new(), seen: Recent::new(SEEN_MAX), sorter: Sorter::distinct(directory) }
    }

    /// Shows it everything below `top`, a root or an error list. `problem` is told which parts cannot be read.
    pub fn tree(
        &mut self,
        source: Arc<dyn ChunkSource>,
        top: ChunkId,
        mut problem: impl FnMut(TreeError),
    ) -> io::Result<()> {
        self.look.switch.to(source);
        // Children still to be read, a list for each level.
        let mut levels: Vec<vec::IntoIter<ChunkId>> = vec![vec![top].into_iter()];
        while let Some(level) = levels.last_mut() {
            let Some(id) = level.next() else {
                levels.pop();
                continue;
            };
            if self.seen.get(&id).is_some() {
                continue;
            }
            self.seen.insert(id, ());
            match self.look.reader.node(id, level.as_slice()) {
                Ok(node) => levels.push(self.node(&node)?.into_iter()),
                Err(error) if error.is_lost() => {
                    problem(error);
                    return Ok(());
                }
                Err(error) => problem(error),
            }
        }
        Ok(())
    }

    /// Notes a tree chunk and its content; returns the tree chunks that it refers to.
    fn node(&mut self, node: &Node) -> io::Result<Vec<ChunkId>> {
        self.sorter.push(node.id.0, (node.bytes as u64) << 1 | 1)?;
        match &node.node.body {
            NodeBody::Directory { entries, .. } => {
                for entry in entries {
                    if let EntryNode::File { content: Content::Pieces(pieces), .. } = &entry.node {
                        self.pieces(node, pieces)?;
                    }
                }
            }
            NodeBody::Content(pieces) => self.pieces(node, pieces)?,
            NodeBody::Errors(_) | NodeBody::Index { .. } => {}
        }
        let trees = node.references.iter().filter(|reference| reference.kind == ChunkKind::Tree);
        Ok(trees.map(|reference| reference.id).collect())
    }

    fn pieces(&mut self, node: &Node, pieces: &[Piece]) -> io::Result<()> {
        for piece in pieces {
            // A position without a reference was refused when the node was decoded.
            if let Some(reference) = node.references.get(piece.position as usize) {
                self.sorter.push(reference.id.0, u64::from(piece.bytes) << 1)?;
            }
        }
        Ok(())
    }

    /// What all of them came to.
    pub fn finish(self) -> io::Result<ChunkTotals> {
        let mut totals = ChunkTotals::default();
        for chunk in self.sorter.merge()? {
            let (_, value) = chunk?;
            let (chunks, bytes) = if value & 1 == 1 {
                (&mut totals.tree_chunks, &mut totals.tree_bytes)
            } else {
                (&mut totals.data_chunks, &mut totals.data_bytes)
            };
            *chunks += 1;
            *bytes += value >> 1;
        }
        Ok(totals)
    }
}
