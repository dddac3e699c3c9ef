//! The filter of a segment: a split-block Bloom filter, 12 bits per key (Putze, Sanders, Singler: "Cache-, Hash- and
//! Space-Efficient Bloom Filters", 2007). Says "not here" for about 99.5 % of the ids that are not.
//!
//! The block is chosen by the id's leading bits unmixed, so that a sorted batch of ids walks the filter in order. Ids are
//! keyed hashes; a writer that forges ids slows down the lookups of its own ids only.

use strandline_messages::ChunkId;

const BITS_PER_KEY: usize = 12;
const WORDS: usize = 8;
const BLOCK_BITS: usize = WORDS * 64;

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

    /// Length of [`Filter::encode`], bytes.
    pub fn encoded_bytes(&self) -> usize {
        self.blocks.len() * WORDS * 8
    }

    /// The words, little endian.
    pub fn encode(&self) -> Vec<u8> {
        self.blocks.iter().flatten().flat_map(|word| word.to_le_bytes()).collect()
    }

    /// From its words; `None` if the length is not a whole number of blocks.
    pub fn decode(bytes: &[u8]) -> Option<Self> {
        let (words, rest) = bytes.as_chunks::<8>();
        if words.is_empty() || !rest.is_empty() || words.len() % WORDS != 0 {
            return None;
        }
        let block = |words: &[[u8; 8]]| {
            let mut block = [0; WORDS];
            block.iter_mut().zip(words).for_each(|(word, bytes)| *word = u64::from_le_bytes(*bytes));
            block
        };
        Some(Self { blocks: words.chunks(WORDS).map(block).collect() })
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

    #[test]
    fn every_id_added_is_found_and_few_others_are() {
        let mut filter = Filter::with_capacity(20_000);
        (0..20_000).for_each(|i| filter.insert(&id(i)));
        let filter = Filter::decode(&filter.encode()).unwrap();
        assert!((0..20_000).all(|i| filter.may_contain(&id(i))));
        let wrong = (20_000..120_000).filter(|&i| filter.may_contain(&id(i))).count();
        assert!(wrong < 1500, "{wrong} of 100000 strangers pass");
    }

    #[test]
    fn a_cut_filter_is_refused() {
        let bytes = Filter::with_capacity(100).encode();
        assert!(Filter::decode(&bytes[..bytes.len() - 8]).is_none());
        assert!(Filter::decode(&[]).is_none());
    }
}
