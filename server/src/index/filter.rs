//! The filter of a segment: a split-block Bloom filter, 12 bits per key (Putze, Sanders, Singler: "Cache-, Hash- and
//! Space-Efficient Bloom Filters", 2007). Says "not here" for about 99.5 % of the ids that are not.
//!
//! The block is chosen by the id's leading bits unmixed, so that a sorted batch of ids walks the filter in order. Ids are
//! keyed hashes; a writer that forges ids slows down the lookups of its own ids only.

use std::io::{self, Read, Write};

use strandline_messages::ChunkId;

const BITS_PER_KEY: usize = 12;
const WORDS: usize = 8;
const BLOCK_BITS: usize = WORDS * 64;
const BLOCK_BYTES: usize = WORDS * 8;

/// A filter over the ids of one segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    blocks: Vec<[u64; WORDS]>,
}

impl Filter {
    /// Empty, with room for `keys` ids.
    pub fn with_capacity(keys: usize) -> Self {
        Self { blocks: vec![[0; WORDS]; (keys * BITS_PER_KEY).div_ceil(BLOCK_BITS).max(1)] }
    }

    /// Adds an id.
    pub fn insert(&mut self, id: &ChunkId) {
        let (block, mask) = self.place(id);
        if let Some(block) = self.blocks.get_mut(block) {
            block.iter_mut().zip(mask).for_each(|(word, bit)| *word |= bit);
        }
    }

    /// `false`: the id was certainly not added.
    pub fn may_contain(&self, id: &ChunkId) -> bool {
        let (block, mask) = self.place(id);
        self.blocks.get(block).is_some_and(|block| block.iter().zip(mask).all(|(word, bit)| word & bit != 0))
    }

    /// Its length as [`Filter::write`] writes it, bytes.
    pub fn encoded_bytes(&self) -> usize {
        self.blocks.len() * BLOCK_BYTES
    }

    /// Writes the words, little endian; never holds them a second time.
    pub fn write(&self, out: &mut impl Write) -> io::Result<()> {
        self.blocks.iter().flatten().try_for_each(|word| out.write_all(&word.to_le_bytes()))
    }

    /// Reads a filter of `bytes` bytes; [`io::ErrorKind::InvalidData`] if that is not a whole number of blocks.
    pub fn read(input: &mut impl Read, bytes: u64) -> io::Result<Self> {
        let blocks = usize::try_from(bytes / BLOCK_BYTES as u64).unwrap_or(0);
        if blocks == 0 || !bytes.is_multiple_of(BLOCK_BYTES as u64) {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut filter = Self { blocks: vec![[0; WORDS]; blocks] };
        for word in filter.blocks.iter_mut().flatten() {
            let mut bytes = [0; 8];
            input.read_exact(&mut bytes)?;
            *word = u64::from_le_bytes(bytes);
        }
        Ok(filter)
    }

    fn place(&self, id: &ChunkId) -> (usize, [u64; WORDS]) {
        let (lead, rest) = id.as_bytes().split_first_chunk::<8>().unwrap_or((&[0; 8], &[]));
        let second = rest.first_chunk::<8>().copied().unwrap_or_default();
        let scaled = (u128::from(u64::from_be_bytes(*lead)) * self.blocks.len() as u128) >> 64;
        let hash = mix(u64::from_le_bytes(second));
        let mut mask = [0; WORDS];
        for (i, bit) in mask.iter_mut().enumerate() {
            *bit = 1 << ((hash >> (6 * i)) & 63);
        }
        (usize::try_from(scaled).unwrap_or(usize::MAX), mask)
    }
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
        let mut filter = Filter::with_capacity(20_000);
        (0..20_000).for_each(|i| filter.insert(&id(i)));
        let filter = read(&written(&filter)).unwrap();
        assert!((0..20_000).all(|i| filter.may_contain(&id(i))));
        let wrong = (20_000..120_000).filter(|&i| filter.may_contain(&id(i))).count();
        assert!(wrong < 1500, "{wrong} of 100000 strangers pass");
    }

    #[test]
    fn a_cut_filter_is_refused() {
        let bytes = written(&Filter::with_capacity(100));
        assert!(read(&bytes[..bytes.len() - 8]).is_err());
        assert!(read(&[]).is_err());
        assert!(Filter::read(&mut &bytes[8..], bytes.len() as u64).is_err());
    }
}
