//! Opened tree blocks by the chunks that they hold, bounded in bytes, least recently used out first.

use std::collections::HashMap;
use std::sync::Arc;

use strandline_messages::{ChunkId, ChunkKind};

use crate::seal::OpenedBlock;

pub(super) struct BlockCache {
    bytes_max: usize,
    bytes: usize,
    clock: u64,
    blocks: HashMap<u64, Kept>,
    places: HashMap<ChunkId, (u64, usize)>,
}

struct Kept {
    block: Arc<OpenedBlock>,
    bytes: usize,
    used: u64,
}

impl BlockCache {
    pub(super) fn new(bytes_max: usize) -> Self {
        Self { bytes_max, bytes: 0, clock: 0, blocks: HashMap::new(), places: HashMap::new() }
    }

    pub(super) fn contains(&self, id: &ChunkId) -> bool {
        self.places.contains_key(id)
    }

    /// The block that holds the chunk, and the chunk's row.
    pub(super) fn get(&mut self, id: &ChunkId) -> Option<(Arc<OpenedBlock>, usize)> {
        let (number, row) = *self.places.get(id)?;
        self.clock += 1;
        let kept = self.blocks.get_mut(&number)?;
        kept.used = self.clock;
        Some((Arc::clone(&kept.block), row))
    }

    /// Keeps a tree block; others are not kept. The newest block stays even if it alone exceeds the bound.
    pub(super) fn insert(&mut self, block: &Arc<OpenedBlock>) {
        if block.kind() != ChunkKind::Tree || block.rows().iter().all(|row| self.contains(&row.id)) {
            return;
        }
        self.clock += 1;
        let number = self.clock;
        // The table of rows and places costs about as much again as the rows themselves.
        let bytes = block.memory_bytes() + block.rows().len() * 64;
        for (row, chunk) in block.rows().iter().enumerate() {
            self.places.insert(chunk.id, (number, row));
        }
        self.blocks.insert(number, Kept { block: Arc::clone(block), bytes, used: number });
        self.bytes += bytes;
        while self.bytes > self.bytes_max && self.blocks.len() > 1 {
            let oldest = self.blocks.iter().min_by_key(|(_, kept)| kept.used).map(|(number, _)| *number);
            let Some(oldest) = oldest else { break };
            self.evict(oldest);
        }
    }

    fn evict(&mut self, number: u64) {
        let Some(kept) = self.blocks.remove(&number) else { return };
        self.bytes -= kept.bytes;
        for chunk in kept.block.rows() {
            if self.places.get(&chunk.id).is_some_and(|(place, _)| *place == number) {
                self.places.remove(&chunk.id);
            }
        }
    }
}
