//! Where chunks come from: the network, an embedded server, or memory.

use std::sync::Arc;

use crossbeam_channel::Receiver;
use strandline_messages::ChunkId;

use crate::seal::{OpenError, OpenedBlock};

/// The answer to one fetch: blocks as they come. The channel closes after the last.
pub type Fetched = Receiver<Result<Arc<OpenedBlock>, FetchError>>;

/// Answers requests for chunks with opened blocks.
///
/// Contract: `wanted` has at most [`strandline_messages::limits::FETCH_IDS_MAX`] ids, in the order in which they are
/// needed. The blocks on the channel, in any order, together hold all of them and may hold more; each block comes at most
/// once per fetch. Chunks that cannot be had are named by [`FetchError::Missing`] or [`FetchError::Damaged`]
/// on the channel, and the rest still comes; after [`FetchError::Lost`] nothing comes. The channel is bounded: a slow reader
/// holds the source back. Dropping the receiver cancels the fetch. `fetch` is called from plain threads and may block;
/// several fetches may be under way at once.
pub trait ChunkSource: Send + Sync {
    /// Starts to fetch `wanted`.
    fn fetch(&self, wanted: Vec<ChunkId>) -> Result<Fetched, FetchError>;

    /// What has come so far, to whoever shares the source. Nothing, if the source does not count.
    fn received(&self) -> Received {
        Received::default()
    }
}

/// Blocks that came, sealed as they are in the repository.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Received {
    /// How many.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// Why chunks did not come.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FetchError {
    /// The repository does not have them.
    #[error(
        "the repository lacks {}; everything else can be restored", naming(.chunks)
    )]
    Missing {
        /// The chunks.
        chunks: Vec<ChunkId>,
    },
    /// A block came but could not be opened, or holds wrong chunks.
    #[error("block {block} is damaged: {reason}; everything else can be restored")]
    Damaged {
        /// The block, as precisely as it could be told.
        block: String,
        /// Wanted chunks that it should have held, as far as known.
        chunks: Vec<ChunkId>,
        /// What is wrong with it.
        reason: OpenError,
    },
    /// The server holds them but cannot read them.
    #[error("{reason}; everything else can be restored")]
    Unreadable {
        /// What the server says, naming pack and offset.
        reason: String,
        /// The chunks.
        chunks: Vec<ChunkId>,
    },
    /// The connection or the repository is gone.
    #[error(
        "the repository cannot be read any more: {reason}; what was restored so far is intact; run the command again"
    )]
    Lost {
        /// What happened.
        reason: String,
    },
}

impl FetchError {
    /// Whether the error names this chunk.
    pub fn concerns(&self, id: &ChunkId) -> bool {
        match self {
            Self::Missing { chunks } | Self::Damaged { chunks, .. } | Self::Unreadable { chunks, .. } => {
                chunks.contains(id)
            }
            Self::Lost { .. } => true,
        }
    }
}

fn naming(chunks: &[ChunkId]) -> String {
    match chunks {
        [] => "chunks".into(),
        [one] => format!("chunk {one}"),
        [first, rest @ ..] => format!("chunk {first} and {} more", rest.len()),
    }
}
