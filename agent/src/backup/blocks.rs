//! From chunks to blocks: who is known already, who was sent in this run, what goes into the next block.
//!
//! Two lanes, one for pieces of files and one for tree nodes. In each, chunks wait in order for the server's answer;
//! the unknown ones are appended to the lane's current block; a full block goes to the sealing threads.

use std::collections::{HashSet, VecDeque};
use std::mem;

use crossbeam_channel::{Receiver, Sender};
use strandline_actors::runtime::buffer::BlockBuffer;
use strandline_messages::format::block::ChunkRow;
use strandline_messages::format::chunk::{REFERENCE_BYTES, Reference, chunk_id};
use strandline_messages::format::repository::ChunkingV1;
use strandline_messages::format::tree::TreeNodeV1;
use strandline_messages::ids::{ChunkId, ChunkKind};
use strandline_messages::limits;

use super::BackupError;
use super::ports::{QueryTicket, SharedOracle};
use super::progress::Progress;
use super::trees::NodeSink;
use crate::seal::Body;

/// Most plaintext that waits for answers in the data lane, bytes; the tree lane has a quarter of it.
pub const HELD_BYTES_MAX: usize = 16 << 20;
/// A query is sent once it has so many ids or holds so many bytes.
const QUERY_IDS: usize = 1024;
const QUERY_BYTES: usize = 4 << 20;
/// Most ids of one lane that wait for an answer. Two lanes and the verifier stay within `QUERY_IDS_OUTSTANDING_MAX`.
const LANE_IDS_MAX: usize = limits::QUERY_IDS_OUTSTANDING_MAX / 4;
/// Ids remembered per generation, so that what is sent twice within a run is known without the server having it.
const RECENT_IDS: usize = 65_536;
/// Bytes of a block beside its plaintext and table, and what an incompressible body may grow by.
const BLOCK_OVERHEAD_BYTES: usize = 8192;

/// A bounded memory of ids: two generations, the older one is dropped when the younger one is full.
#[derive(Debug, Default)]
struct Recent {
    young: HashSet<ChunkId>,
    old: HashSet<ChunkId>,
}

impl Recent {
    fn contains(&self, id: &ChunkId) -> bool {
        self.young.contains(id) || self.old.contains(id)
    }

    fn insert(&mut self, id: ChunkId) {
        if self.young.len() >= RECENT_IDS {
            mem::swap(&mut self.young, &mut self.old);
            self.young.clear();
        }
        self.young.insert(id);
    }
}

/// Chunks for one block, not sealed yet.
#[derive(Debug)]
pub struct OpenBlock {
    /// Data or tree.
    pub kind: ChunkKind,
    /// The chunk table.
    pub rows: Vec<ChunkRow>,
    /// The chunks.
    pub body: Body,
    table_bytes: usize,
}

impl OpenBlock {
    /// Empty, with room for a plaintext of so many bytes.
    pub fn new(kind: ChunkKind, plaintext_max: usize) -> Self {
        Self { kind, rows: Vec::new(), body: Body::with_room(plaintext_max), table_bytes: 0 }
    }

    /// Empties it, keeping its memory.
    pub fn clear(&mut self) {
        self.rows.clear();
        self.body.clear();
        self.table_bytes = 0;
    }

    /// The most bytes that the sealed block can have.
    pub fn sealed_bytes_max(&self) -> usize {
        let body = self.body.input_bytes();
        body + body / 128 + self.table_bytes + BLOCK_OVERHEAD_BYTES
    }

    fn row_bytes(&self, references: usize) -> usize {
        ChunkId::LEN + if self.kind == ChunkKind::Tree { 2 + references * REFERENCE_BYTES } else { 0 }
    }

    /// Whether a chunk of `bytes` with so many references fits in, too; the first always does. `plaintext_max`: bytes.
    pub fn has_room(&self, bytes: usize, references: usize, plaintext_max: usize) -> bool {
        self.rows.is_empty()
            || self.body.content_bytes() + bytes <= plaintext_max
                && self.rows.len() < limits::BLOCK_CHUNKS_MAX
                && self.table_bytes + self.row_bytes(references) <= limits::BLOCK_TABLE_BYTES_MAX
    }

    /// Appends a chunk.
    pub fn push(&mut self, id: ChunkId, references: Vec<Reference>, plaintext: &[u8]) {
        self.table_bytes += self.row_bytes(references.len());
        self.rows.push(ChunkRow { id, references });
        self.body.push(plaintext);
    }
}

/// A chunk of a query: where its plaintext is.
#[derive(Debug)]
struct Waiting {
    id: ChunkId,
    buffer: usize,
    offset: usize,
    bytes: usize,
    references: Vec<Reference>,
}

/// Chunks that share a query.
#[derive(Debug, Default)]
struct Batch {
    chunks: Vec<Waiting>,
    buffers: Vec<BlockBuffer>,
    bytes: usize,
}

struct Lane {
    open: OpenBlock,
    next: Batch,
    asked: VecDeque<(Box<dyn QueryTicket>, Batch)>,
    ids_asked: usize,
    bytes_asked: usize,
    held_bytes_max: usize,
    blocks: Sender<OpenBlock>,
}

impl Lane {
    fn new(open: OpenBlock, held_bytes_max: usize, blocks: Sender<OpenBlock>) -> Self {
        Self {
            open,
            next: Batch::default(),
            asked: VecDeque::new(),
            ids_asked: 0,
            bytes_asked: 0,
            held_bytes_max,
            blocks,
        }
    }
}

/// The channels between the assembler and the sealing threads.
#[derive(Debug)]
pub struct BlockChannels {
    /// Blocks of file content, to any sealing thread.
    pub data: Sender<OpenBlock>,
    /// Blocks of tree nodes, to the one thread that keeps their order.
    pub trees: Sender<OpenBlock>,
    /// Emptied blocks that come back.
    pub emptied: Receiver<OpenBlock>,
}

/// Decides which chunks are sent, and fills blocks with them.
pub struct Emitter<'a> {
    oracle: &'a dyn SharedOracle,
    progress: &'a Progress,
    id_key: [u8; 32],
    plaintext_max: usize,
    settled: Recent,
    data: Lane,
    trees: Lane,
    emptied: Receiver<OpenBlock>,
}

impl std::fmt::Debug for Emitter<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Emitter").field("data_bytes_held", &self.data.bytes_asked).finish_non_exhaustive()
    }
}

impl<'a> Emitter<'a> {
    /// Sends blocks to `channels`.
    pub fn new(
        oracle: &'a dyn SharedOracle,
        progress: &'a Progress,
        id_key: [u8; 32],
        chunking: &ChunkingV1,
        channels: BlockChannels,
    ) -> Self {
        let plaintext_max = chunking.block_plaintext as usize;
        let open = |kind| OpenBlock::new(kind, plaintext_max);
        Self {
            oracle,
            progress,
            id_key,
            plaintext_max,
            settled: Recent::default(),
            data: Lane::new(open(ChunkKind::Data), HELD_BYTES_MAX, channels.data),
            trees: Lane::new(open(ChunkKind::Tree), HELD_BYTES_MAX / 4, channels.trees),
            emptied: channels.emptied,
        }
    }

    /// Takes pieces of files: `chunks` are the ids and lengths of what stands one after the other in `buffer`.
    pub fn data(&mut self, buffer: BlockBuffer, chunks: &[(ChunkId, u32)]) -> Result<(), BackupError> {
        // Short parts share a buffer, so that what is held is close to what is counted.
        let next = &mut self.data.next;
        let shared = next.buffers.last().filter(|last| last.capacity() - last.len() >= buffer.len());
        let (index, mut offset) = match shared {
            Some(last) => (next.buffers.len() - 1, last.len()),
            None => (next.buffers.len(), 0),
        };
        let joins = shared.is_some();
        let before = next.chunks.len();
        for &(id, bytes) in chunks {
            let bytes = bytes as usize;
            if self.settled.contains(&id) {
                self.progress.chunks_known.add(1);
            } else {
                self.data.next.chunks.push(Waiting { id, buffer: index, offset, bytes, references: Vec::new() });
            }
            offset += bytes;
        }
        let next = &mut self.data.next;
        let wanted = next.chunks.len() > before;
        if wanted {
            match next.buffers.last_mut() {
                Some(last) if joins => last.extend_from_slice(&buffer),
                _ => {
                    next.bytes += buffer.capacity();
                    next.buffers.push(buffer);
                }
            }
        }
        self.pump(ChunkKind::Data, false)
    }

    /// Sends everything that is still here, and waits for all answers. The blocks are then with the sealing threads.
    pub fn finish(mut self) -> Result<(), BackupError> {
        for kind in [ChunkKind::Data, ChunkKind::Tree] {
            self.pump(kind, true)?;
            self.send_open(kind)?;
        }
        Ok(())
    }

    fn lane(&mut self, kind: ChunkKind) -> &mut Lane {
        match kind {
            ChunkKind::Data => &mut self.data,
            ChunkKind::Tree => &mut self.trees,
        }
    }

    // Sends the next query if it is big enough, and takes the answers that are there or that must be awaited.
    fn pump(&mut self, kind: ChunkKind, all: bool) -> Result<(), BackupError> {
        let lane = self.lane(kind);
        let due = lane.next.chunks.len() >= QUERY_IDS || lane.next.bytes >= QUERY_BYTES || all;
        if due && !lane.next.chunks.is_empty() {
            let batch = mem::take(&mut lane.next);
            for ids in batch.split() {
                self.ask(kind, ids)?;
            }
        }
        loop {
            let lane = self.lane(kind);
            let Some((ticket, _)) = lane.asked.front() else { return Ok(()) };
            let must = all || lane.bytes_asked > lane.held_bytes_max;
            if !must && !ticket.ready() {
                return Ok(());
            }
            self.settle(kind)?;
        }
    }

    fn ask(&mut self, kind: ChunkKind, batch: Batch) -> Result<(), BackupError> {
        while {
            let lane = self.lane(kind);
            !lane.asked.is_empty() && lane.ids_asked + batch.chunks.len() > LANE_IDS_MAX
        } {
            self.settle(kind)?;
        }
        let ids: Vec<ChunkId> = batch.chunks.iter().map(|chunk| chunk.id).collect();
        let count = ids.len();
        let ticket = self.oracle.ask(ids)?;
        let lane = self.lane(kind);
        lane.ids_asked += count;
        lane.bytes_asked += batch.bytes;
        lane.asked.push_back((ticket, batch));
        Ok(())
    }

    // Waits for the oldest answer and appends what is unknown to the open block.
    fn settle(&mut self, kind: ChunkKind) -> Result<(), BackupError> {
        let lane = self.lane(kind);
        let Some((ticket, mut batch)) = lane.asked.pop_front() else { return Ok(()) };
        lane.ids_asked = lane.ids_asked.saturating_sub(batch.chunks.len());
        lane.bytes_asked = lane.bytes_asked.saturating_sub(batch.bytes);
        let known = ticket.wait()?;
        if known.len() != batch.chunks.len() {
            return Err(BackupError::Answer { asked: batch.chunks.len(), answered: known.len() });
        }
        for (chunk, known) in mem::take(&mut batch.chunks).into_iter().zip(known) {
            if known || self.settled.contains(&chunk.id) {
                self.progress.chunks_known.add(1);
                if known {
                    self.settled.insert(chunk.id);
                }
                continue;
            }
            let buffer = batch.buffers.get(chunk.buffer);
            let plaintext = buffer.and_then(|buffer| buffer.get(chunk.offset..chunk.offset + chunk.bytes));
            self.emit(kind, chunk.id, chunk.references, plaintext.unwrap_or_default())?;
        }
        Ok(())
    }

    fn emit(
        &mut self,
        kind: ChunkKind,
        id: ChunkId,
        references: Vec<Reference>,
        plaintext: &[u8],
    ) -> Result<(), BackupError> {
        let plaintext_max = self.plaintext_max;
        if !self.lane(kind).open.has_room(plaintext.len(), references.len(), plaintext_max) {
            self.send_open(kind)?;
        }
        self.settled.insert(id);
        self.progress.chunks_new.add(1);
        self.progress.bytes_new.add(plaintext.len() as u64);
        self.lane(kind).open.push(id, references, plaintext);
        Ok(())
    }

    fn send_open(&mut self, kind: ChunkKind) -> Result<(), BackupError> {
        if self.lane(kind).open.rows.is_empty() {
            return Ok(());
        }
        let mut empty = self.emptied.try_recv().unwrap_or_else(|_| OpenBlock::new(kind, self.plaintext_max));
        empty.kind = kind;
        let lane = self.lane(kind);
        let full = mem::replace(&mut lane.open, empty);
        lane.blocks.send(full).map_err(|_| BackupError::Stopped)
    }
}

impl NodeSink for Emitter<'_> {
    fn node(&mut self, node: &TreeNodeV1, references: Vec<Reference>) -> Result<ChunkId, BackupError> {
        let plaintext = node.encode();
        let id = chunk_id(&self.id_key, ChunkKind::Tree, &plaintext, &references);
        if self.settled.contains(&id) {
            return Ok(id);
        }
        let next = &mut self.trees.next;
        next.bytes += plaintext.len() + references.len() * REFERENCE_BYTES;
        let buffer = next.buffers.len();
        next.chunks.push(Waiting { id, buffer, offset: 0, bytes: plaintext.len(), references });
        next.buffers.push(plaintext.into());
        self.pump(ChunkKind::Tree, false)?;
        Ok(id)
    }
}

impl Batch {
    // One part can bring more ids than a query takes only if chunks are tiny; then the batch becomes several, the last
    // of which owns the buffers' bytes in the accounts while all share the order.
    fn split(self) -> Vec<Self> {
        if self.chunks.len() <= LANE_IDS_MAX.min(limits::QUERY_IDS_MAX) {
            return vec![self];
        }
        let mut batches = Vec::new();
        let mut chunks = self.chunks.into_iter().peekable();
        while chunks.peek().is_some() {
            let mut batch = Self::default();
            for mut chunk in chunks.by_ref().take(QUERY_IDS) {
                let buffer = self.buffers.get(chunk.buffer);
                let bytes = buffer.and_then(|buffer| buffer.get(chunk.offset..chunk.offset + chunk.bytes));
                chunk.buffer = batch.buffers.len();
                chunk.offset = 0;
                batch.bytes += chunk.bytes;
                batch.buffers.push(bytes.unwrap_or_default().to_vec().into());
                batch.chunks.push(chunk);
            }
            batches.push(batch);
        }
        batches
    }
}
