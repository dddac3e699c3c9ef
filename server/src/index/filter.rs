//! The filter of a segment: a split-block Bloom filter, 12 bits per key (Putze, Sanders, Singler: "Cache-, Hash- and
//! Space-Efficient Bloom Filters", 2007). Says "not here" for about 99.5 % of the ids that are not.
//!
//! The block is chosen by the id's leading bits unmixed, so that a sorted batch of ids walks the filter in order. Ids are
//! keyed hashes; a writer that forges ids slows down the lookups of its own ids only.

use std::io::{self, Read, Write};

use memmap2::MmapMut;
use strandline_messages::ChunkId;

const BITS_PER_KEY: usize = 12;
const WORDS: usize = 8;
const WORD_BYTES: usize = 8;
const BLOCK_BITS: usize = WORDS * 64;
const BLOCK_BYTES: usize = WORDS * WORD_BYTES;

type Block = [u8; BLOCK_BYTES];

/// A filter over the ids of one segment.
///
/// Filters are the most that an index holds, and merges replace large ones: they lie in mappings of their own, because an
/// allocator would keep what they leave.
#[derive(Debug)]
pub struct Filter {
    /// Blocks of words, little endian, as in the file.
    bytes: MmapMut,
}

impl Filter {
    /// Empty, with room for `keys` ids. Fails if the system has no memory.
    pub fn with_capacity(keys: usize) -> io::Result<Self> {
        Self::of_blocks(keys.saturating_mul(BITS_PER_KEY).div_ceil(BLOCK_BITS).max(1))
    }

    fn of_blocks(blocks: usize) -> io::Result<Self> {
        let bytes = blocks.checked_mul(BLOCK_BYTES).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { bytes: MmapMut::map_anon(bytes)? })
    }

    fn blocks(&self) -> &[Block] {
        self.bytes.as_chunks().0
    }

    /// Adds an id.
    pub fn insert(&mut self, id: &ChunkId) {
        let (block, mask) = place(id, self.blocks().len());
        let (blocks, _) = self.bytes.as_chunks_mut::<BLOCK_BYTES>();
        if let Some(block) = blocks.get_mut(block) {
            let (words, _) = block.as_chunks_mut::<WORD_BYTES>();
            words.iter_mut().zip(mask).for_each(|(word, bit)| *word = (u64::from_le_bytes(*word) | bit).to_le_bytes());
        }
    }

    /// `false`: the id was certainly not added.
    pub fn may_contain(&self, id: &ChunkId) -> bool {
        let blocks = self.blocks();
        let (block, mask) = place(id, blocks.len());
        let in_block = |block: &Block| {
            let (words, _) = block.as_chunks::<WORD_BYTES>();
            words.iter().zip(mask).all(|(word, bit)| u64::from_le_bytes(*word) & bit != 0)
        };
        blocks.get(block).is_some_and(in_block)
    }

    /// Its length as [`Filter::write`] writes it, bytes.
    pub fn encoded_bytes(&self) -> usize {
        self.bytes.len()
    }

    /// Writes the words.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        out.write_all(&self.bytes)
    }

    /// Reads a filter of `bytes` bytes; [`io::ErrorKind::InvalidData`] if that is not a whole number of blocks.
    pub fn read(input: &mut impl Read, bytes: u64) -> io::Result<Self> {
        let blocks = usize::try_from(bytes / BLOCK_BYTES as u64).unwrap_or(0);
        if blocks == 0 || !bytes.is_multiple_of(BLOCK_BYTES as u64) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut filter = Self::of_blocks(blocks)?;
        input.read_exact(&mut filter.bytes)?;
        Ok(filter)
    }
}

/// The block of an id, and its bit in each of the block's words.
fn place(id: &ChunkId, blocks: usize) -> (usize, [u64; WORDS]) {
    let (lead, rest) = id.as_bytes().split_first_chunk::<8>().unwrap_or((&[0; 8], &[]));
    let second = rest.first_chunk::<8>().copied().unwrap_or_default();
    let scaled = (u128::from(u64::from_be_bytes(*lead)) * blocks as u128) >> 64;
    let hash = mix(u64::from_le_bytes(second));
    let mut mask = [0; WORDS];
    for (i, bit) in mask.iter_mut().enumerate() {
        *bit = 1 << ((hash >> (6 * i)) & 63);
    }
    (usize::try_from(scaled).unwrap_or(usize::MAX), mask)
}

// The finaliser of SplitMix64.
fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(i: u32) -> ChunkId {
        ChunkId(*blake3::hash(&i.to_le_bytes()).as_bytes())
    }

    fn written(filter: &Filter) -> Vec<u8> {
        let mut bytes = Vec::new();
        filter.write(&mut bytes).unwrap();
        assert_eq!(bytes.len(), filter.encoded_bytes());
        bytes
    }

    fn read(bytes: &[u8]) -> io::Result<Filter> {
        Filter::read(&mut &bytes[..], bytes.len() as u64)
    }

    #[test]
    fn every_id_added_is_found_and_few_others_are() {
        let mut filter = Filter::with_capacity(20_000).unwrap();
        (0..20_000).for_each(|i| filter.insert(&id(i)));
        let filter = read(&written(&filter)).unwrap();
        assert!((0..20_000).all(|i| filter.may_contain(&id(i))));
        let wrong = (20_000..120_000).filter(|&i| filter.may_contain(&id(i))).count();
        assert!(wrong < 1500, "{wrong} of 100000 strangers pass");
    }

    #[test]
    fn a_cut_filter_is_refused() {
        let bytes = written(&Filter::with_capacity(100).unwrap());
        assert!(read(&bytes[..bytes.len() - 8]).is_err());
        assert!(read(&[]).is_err());
        assert!(Filter::read(&mut &bytes[8..], bytes.len() as u64).is_err());
    }
}
