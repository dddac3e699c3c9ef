//! Reading trees: from a snapshot's root to directory entries, file content and error lists, through a [`ChunkSource`].
//!
//! Nothing here loads a whole directory or a whole file: lists are walked node by node, and opened blocks are kept in a
//! cache of stated size.

mod block_cache;
mod listing;
mod reader;
mod seek;
mod source;
mod walk;

#[cfg(test)]
pub(crate) mod memory;
#[cfg(test)]
mod tests;

use strandline_messages::ChunkId;
use strandline_messages::format::FormatError;
use strandline_messages::format::tree::ListKind;

use crate::seal::OpenError;

pub use listing::{DirEntry, Entries, Pieces, SourceErrors};
pub use reader::{Node, Resolved, TreeReader};
pub use seek::{Leaf, UnreadablePart};
pub use source::{ChunkSource, FetchError, Fetched, Received};
pub use walk::{DEPTH_MAX, Step, Walk, WalkError};

/// Why a part of a snapshot's tree cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// The chunk did not come.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// The chunk's block is not genuine.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The chunk is not a tree node.
    #[error("tree chunk {node} is malformed: {error}")]
    Format {
        /// The chunk.
        node: ChunkId,
        /// What is wrong with it.
        error: FormatError,
    },
    /// The node belongs to another kind of list, or its level does not fit, or it names a chunk of the wrong kind.
    #[error("tree chunk {node} contradicts what refers to it: {why}")]
    Contradiction {
        /// The chunk.
        node: ChunkId,
        /// What does not fit.
        why: &'static str,
    },
    /// Directories are nested deeper than is read.
    #[error("directories are nested deeper than {max} levels; what lies below was left out")]
    TooDeep {
        /// The limit.
        max: usize,
    },
    /// There is no such path in the snapshot.
    #[error("the snapshot has no `{path}`; `strand ls` shows what it has")]
    NotFound {
        /// The path, for people.
        path: String,
    },
    /// A part of the path is not a directory.
    #[error("`{path}` is not a directory in the snapshot")]
    NotADirectory {
        /// The path, for people.
        path: String,
    },
}

impl TreeError {
    /// Whether the source itself is gone, so that going on makes no sense.
    pub fn is_lost(&self) -> bool {
        matches!(self, Self::Fetch(FetchError::Lost { .. }))
    }
}

fn list_name(kind: ListKind) -> &'static str {
    match kind {
        ListKind::Directory => "it is not a directory",
        ListKind::Content => "it is not a content list",
        ListKind::Errors => "it is not an error list",
    }
}
