//! What the pipeline needs from others: somebody who knows which chunks the server has, somebody who seals blocks,
//! somebody who takes them.

use std::any::Any;

use bytes::Bytes;
use strandline_actors::runtime::buffer::BlockBuffer;
use strandline_messages::format::block::{ChunkRow, Codec};
use strandline_messages::ids::{ChunkId, ChunkKind};

use super::BackupError;
use crate::seal::{Body, SealedBlock};

/// Asks the server, pipelined. Used by two threads of the pipeline, one at a time.
pub trait ChunkOracle: Send {
    /// Sends a query of 1 to `QUERY_IDS_MAX` ids. The pipeline never has more than `QUERY_IDS_OUTSTANDING_MAX` ids
    /// unanswered, so this should not wait.
    fn query(&mut self, ids: Vec<ChunkId>) -> Result<Box<dyn QueryTicket>, BackupError>;
}

/// An oracle that two threads share. An object of its own, so that borrowing it says nothing about what the oracle borrows.
pub(crate) trait SharedOracle: Sync {
    /// [`ChunkOracle::query`].
    fn ask(&self, ids: Vec<ChunkId>) -> Result<Box<dyn QueryTicket>, BackupError>;
}

impl SharedOracle for parking_lot::Mutex<Box<dyn ChunkOracle + '_>> {
    fn ask(&self, ids: Vec<ChunkId>) -> Result<Box<dyn QueryTicket>, BackupError> {
        self.lock().query(ids)
    }
}

/// A query under way. Tickets are answered in the order of their queries.
pub trait QueryTicket: Send {
    /// Whether [`QueryTicket::wait`] would return at once.
    fn ready(&self) -> bool;

    /// One answer per id, in order: whether the server knows the chunk. Returns with an error when the session ends.
    fn wait(self: Box<Self>) -> Result<Vec<bool>, BackupError>;
}

/// Room for one block in the send window; dropping it gives the room back. The value belongs to the sink that made it.
pub struct Permit(pub Box<dyn Any + Send>);

impl std::fmt::Debug for Permit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Permit")
    }
}

/// Takes sealed blocks. Room is reserved before a block is sealed, so that sealed bytes never exceed the window.
pub trait BlockSink: Send + Sync {
    /// Waits until the send window has room for a block of at most `bytes`. Returns with an error when the session ends.
    fn reserve(&self, bytes: usize) -> Result<Permit, BackupError>;

    /// Takes a block. Called by several threads in any order; blocks of trees come from one thread, children first.
    fn send(&self, permit: Permit, block: Bytes) -> Result<(), BackupError>;
}

/// Seals blocks; one per sealing thread, so that it can reuse its buffers.
pub trait BlockSealer: Send {
    /// The level of zstd from the next block on, if it compresses at all.
    fn set_level(&mut self, _level: i32) -> Result<(), BackupError> {
        Ok(())
    }

    /// Seals `body`, which holds one chunk for each of `rows`.
    fn seal(&mut self, kind: ChunkKind, rows: &[ChunkRow], body: &mut Body) -> Result<SealedBlock, BackupError>;
}

/// Makes one sealer per sealing thread.
pub trait SealerFactory: Sync {
    /// A new sealer.
    fn sealer(&self) -> Result<Box<dyn BlockSealer>, BackupError>;
}

impl<F: Fn() -> Result<Box<dyn BlockSealer>, BackupError> + Sync> SealerFactory for F {
    fn sealer(&self) -> Result<Box<dyn BlockSealer>, BackupError> {
        self()
    }
}

/// The three together.
pub struct Ports<'a> {
    /// Knows what the server has.
    pub oracle: Box<dyn ChunkOracle + 'a>,
    /// Takes blocks.
    pub sink: &'a dyn BlockSink,
    /// Makes sealers.
    pub sealers: &'a dyn SealerFactory,
}

impl std::fmt::Debug for Ports<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Ports")
    }
}

/// A sink for dry runs: counts nothing, keeps nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct DiscardingSink;

impl BlockSink for DiscardingSink {
    fn reserve(&self, _bytes: usize) -> Result<Permit, BackupError> {
        Ok(Permit(Box::new(())))
    }

    fn send(&self, _permit: Permit, _block: Bytes) -> Result<(), BackupError> {
        Ok(())
    }
}

/// A sealer for dry runs: seals nothing. Blocks come out empty, so stored bytes are not counted.
#[derive(Clone, Copy, Debug, Default)]
pub struct NullSealer;

impl BlockSealer for NullSealer {
    fn seal(&mut self, _kind: ChunkKind, _rows: &[ChunkRow], _body: &mut Body) -> Result<SealedBlock, BackupError> {
        Ok(SealedBlock { bytes: BlockBuffer::default(), codec: Codec::Stored })
    }
}
