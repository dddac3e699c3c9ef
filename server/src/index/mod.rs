//! The chunk index: where every copy of every chunk lies. Derived data: packs are the truth, and any doubt about the index is
//! settled by building it again.
//!
//! [`ChunkIndex`] is what the engine needs; [`engine::SegmentIndex`] is our engine for it. All 32 bytes of an id are compared
//! before anything is called found; filters only ever say "not here".

pub mod cache;
pub mod engine;
pub mod entry;
pub mod filter;
pub mod manifest;
pub mod memory;
pub mod merge;
pub mod segment;

use std::io;
use std::path::{Path, PathBuf};

use strandline_messages::{ChunkId, DomainId};

pub use entry::Copy;

/// Most copies of one chunk that a lookup returns, newest first; older ones are not looked at.
pub const COPIES_MAX: usize = 256;

/// Why the index could not answer or take something.
#[derive(Debug, thiserror::Error)]
pub enum IndexError {
    /// The operating system refused.
    #[error("cannot {doing} the chunk index at {path}: {source}; backups are intact, the index is derived from them", path = .path.display())]
    Io {
        /// What was being done.
        doing: &'static str,
        /// To which file.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A file of the index is not what was written.
    #[error("the chunk index at {path} is damaged ({why}); backups are intact; restart the server, it builds the index again", path = .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// No more writer domains fit.
    #[error(
        "the repository has reached {} writer domains, the most its chunk index can tell apart; nothing was changed",
        u16::MAX
    )]
    TooManyDomains,
    /// New entries cannot be written to disk, so no more are taken.
    #[error("the chunk index cannot write to disk ({reason}); backups are intact; free space on the server's disk")]
    Stuck {
        /// What the last attempt met.
        reason: String,
    },
}

impl IndexError {
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { doing, path, source }
    }

    pub(crate) fn damaged(path: &Path, why: &'static str) -> Self {
        Self::Damaged { path: path.to_path_buf(), why }
    }
}

/// The copies found for a list of ids, without an allocation per id.
#[derive(Clone, Debug, Default)]
pub struct Found {
    /// (position of the id in the question, copy); ascending by position, newest copy first.
    rows: Vec<(u32, Copy)>,
}

impl Found {
    pub(crate) fn new(rows: Vec<(u32, Copy)>) -> Self {
        Self { rows }
    }

    /// The copies of the id at `position` of the question, newest first.
    pub fn copies(&self, position: usize) -> impl Iterator<Item = &Copy> {
        let position = u32::try_from(position).unwrap_or(u32::MAX);
        let start = self.rows.partition_point(|(at, _)| *at < position);
        self.rows.iter().skip(start).take_while(move |(at, _)| *at == position).map(|(_, copy)| copy)
    }

    /// All (position, copy) pairs, ascending by position, newest copy first.
    pub fn rows(&self) -> &[(u32, Copy)] {
        &self.rows
    }
}

/// The index of one repository. Every method blocks the calling thread; none may be called from an arbiter.
pub trait ChunkIndex: Send + Sync + std::fmt::Debug {
    /// Indexes the chunks of durable blocks of pack `pack`, which is thereby indexed up to `covered` (bytes from its start).
    fn insert(&self, domain: DomainId, pack: u32, covered: u32, copies: &[(ChunkId, Copy)]) -> Result<(), IndexError>;
    /// Replaces the complete flag of copies that are indexed already.
    fn flag(&self, domain: DomainId, copies: &[(ChunkId, Copy)], complete: bool) -> Result<(), IndexError>;
    /// Finds the copies of `ids` in `domain`.
    fn find(&self, domain: DomainId, ids: &[ChunkId]) -> Result<Found, IndexError>;
    /// How far pack `pack` is indexed in what survives a crash, bytes from its start.
    fn covered(&self, pack: u32) -> u32;
    /// The packs for which [`ChunkIndex::covered`] is not zero.
    fn covered_packs(&self) -> Vec<u32>;
    /// Forgets every copy in a pack that is about to be removed, durably. Its number never comes again.
    fn drop_pack(&self, pack: u32) -> Result<(), IndexError>;
    /// The chunks that are indexed in the block at `offset` of `pack`, found by looking at every entry there is.
    fn chunks_at(&self, pack: u32, offset: u32) -> Result<Vec<ChunkId>, IndexError>;
    /// The domains that have copies.
    fn domains(&self) -> Vec<DomainId>;
    /// How many entries there are; copies whose flag was changed may count twice until segments are merged.
    fn entries(&self) -> u64;
    /// Writes everything to disk: for changes that must not be lost in a crash, as inserts may be.
    fn sync(&self) -> Result<(), IndexError>;
    /// Begins to write what is in memory only, if it is worth a segment: nobody may come for long, and there may be many
    /// repositories.
    fn relieve(&self) -> Result<(), IndexError>;
    /// Writes everything to disk and stops the background work. Later inserts are errors, lookups still work.
    fn close(&self) -> Result<(), IndexError>;
}
