//! Every block of the sealed packs, and a number for every chunk in them: what a collection marks in bitmaps instead of
//! keeping ids.
//!
//! Memory: 16 bytes for each block (about 1 MiB of data) and one bit for each chunk and bitmap.

use std::fs::File;

use strandline_messages::{ChunkKind, DomainId};

use super::super::EngineError;
use super::super::state::State;
use crate::catalog::repositories::BlockPlace;
use crate::storage::StorageError;
use crate::storage::pack_file;

/// A block of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    pub offset: u32,
    pub bytes: u32,
    /// The number of its first chunk, counted within its pack.
    first: u32,
    pub chunks: u16,
    pub kind: ChunkKind,
}

/// The blocks of a pack, by ascending offset.
#[derive(Debug)]
pub(crate) struct PackBlocks {
    pub number: u32,
    pub domain: DomainId,
    pub blocks: Vec<Block>,
    /// The number of its first chunk.
    first: u64,
}

/// See the module.
#[derive(Debug, Default)]
pub(crate) struct Inventory {
    pub packs: Vec<PackBlocks>,
    pub chunks: u64,
}

/// A block by its places in the inventory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockIndex {
    pub pack: usize,
    pub block: usize,
}

impl Inventory {
    /// Of the packs that are sealed. One whose footer cannot be trusted is left out: nothing in it will be freed.
    pub fn take(state: &State) -> Result<Self, EngineError> {
        let mut inventory = Self::default();
        for info in state.pack_infos().into_iter().filter(|info| info.sealed) {
            let path = state.paths.pack(info.number);
            let file = File::open(&path).map_err(StorageError::io("open", &path))?;
            let Some((footer, _)) = pack_file::read_footer(&file, &path)? else {
                tracing::warn!(
                    pack = info.number,
                    "a pack's footer is damaged; nothing in it is freed; `strand-server repair` makes it anew"
                );
                continue;
            };
            let mut first = 0u32;
            let mut blocks = Vec::with_capacity(footer.blocks.len());
            for entry in footer.blocks {
                let (offset, bytes, chunks, kind) = (entry.offset, entry.bytes, entry.chunks, entry.kind);
                blocks.push(Block { offset, bytes, first, chunks, kind });
                first = first.saturating_add(chunks.into());
            }
            let (number, domain) = (info.number, info.domain);
            inventory.packs.push(PackBlocks { number, domain, blocks, first: inventory.chunks });
            inventory.chunks += u64::from(first);
        }
        Ok(inventory)
    }

    /// Where the block at `offset` of pack `number` stands.
    pub fn find(&self, (number, offset): BlockPlace) -> Option<BlockIndex> {
        let pack = self.packs.binary_search_by_key(&number, |pack| pack.number).ok()?;
        let blocks = &self.packs.get(pack)?.blocks;
        let block = blocks.binary_search_by_key(&offset, |block| block.offset).ok()?;
        Some(BlockIndex { pack, block })
    }

    /// The numbers of a block's chunks.
    pub fn chunks_of(&self, at: BlockIndex) -> std::ops::Range<u64> {
        let pack = self.packs.get(at.pack);
        match pack.and_then(|pack| Some((pack.first, pack.blocks.get(at.block)?))) {
            Some((first, block)) => {
                let start = first + u64::from(block.first);
                start..start + u64::from(block.chunks)
            }
            None => 0..0,
        }
    }

    /// The number of the chunk at `position` of a block.
    pub fn chunk(&self, at: BlockIndex, position: u16) -> Option<u64> {
        let chunks = self.chunks_of(at);
        let chunk = chunks.start + u64::from(position);
        chunks.contains(&chunk).then_some(chunk)
    }

    /// All blocks, packs and offsets ascending.
    pub fn blocks(&self) -> impl DoubleEndedIterator<Item = (BlockIndex, &PackBlocks, &Block)> {
        self.packs.iter().enumerate().flat_map(|(at, pack)| {
            pack.blocks.iter().enumerate().map(move |(block, found)| (BlockIndex { pack: at, block }, pack, found))
        })
    }
}

/// A bit for every chunk of an inventory.
#[derive(Clone, Debug, Default)]
pub(crate) struct Bitmap {
    words: Vec<u64>,
}

impl Bitmap {
    pub fn new(bits: u64) -> Self {
        Self { words: vec![0; usize::try_from(bits.div_ceil(64)).unwrap_or(usize::MAX)] }
    }

    fn place(bit: u64) -> (usize, u64) {
        (usize::try_from(bit / 64).unwrap_or(usize::MAX), 1 << (bit % 64))
    }

    pub fn get(&self, bit: u64) -> bool {
        let (word, mask) = Self::place(bit);
        self.words.get(word).is_some_and(|word| word & mask != 0)
    }

    /// Sets the bit; whether it was not set before.
    pub fn set(&mut self, bit: u64) -> bool {
        let (word, mask) = Self::place(bit);
        let Some(word) = self.words.get_mut(word) else { return false };
        let new = *word & mask == 0;
        *word |= mask;
        new
    }

    /// How many bits of the range are set.
    pub fn count(&self, range: std::ops::Range<u64>) -> u64 {
        range.filter(|&bit| self.get(bit)).count() as u64
    }

    pub fn total(&self) -> u64 {
        self.words.iter().map(|word| u64::from(word.count_ones())).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_are_set_once_and_counted() {
        let mut bits = Bitmap::new(130);
        assert!(bits.set(0) && bits.set(64) && bits.set(129));
        assert!(!bits.set(64));
        assert_eq!(bits.count(0..130), 3);
        assert_eq!(bits.count(1..65), 1);
        assert_eq!(bits.total(), 3);
        assert!(!bits.set(1000) && !bits.get(1000));
    }
}
