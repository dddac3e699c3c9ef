//! Content-defined chunking: where a file is cut.
//!
//! FastCDC (2020, two bytes per step, normalisation level 1) over a gear table that is secret: its 256 words come from the
//! repository's chunker secret through BLAKE3, so that the lengths of chunks do not tell which file was saved. The same
//! secret and sizes give the same cuts on every machine.

use std::borrow::Cow;

use fastcdc::v2020::{Normalization, cut_gear, select_masks};
use strandline_messages::format::repository::ChunkingV1;

/// Longest content that stands in its directory entry instead of in a chunk, bytes. An entry with a chunk costs about 75
/// bytes of references and table rows, so a few hundred bytes of content are best stored with the names.
pub const INLINE_BYTES: usize = 256;

/// The sizes of a new repository.
pub fn default_chunking() -> ChunkingV1 {
    ChunkingV1 { minimum: 16 << 10, average: 64 << 10, maximum: 256 << 10, block_plaintext: 2 << 20 }
}

/// Finds cuts. Cheap to share between threads.
#[derive(Debug)]
pub struct Cutter {
    minimum: usize,
    average: usize,
    maximum: usize,
    mask_s: u64,
    mask_l: u64,
    gear: Cow<'static, [u64]>,
    gear_shifted: Cow<'static, [u64]>,
}

impl Cutter {
    /// For a repository's sizes (checked by [`ChunkingV1::check`]) and its chunker secret.
    pub fn new(chunking: &ChunkingV1, secret: &[u8; 32]) -> Self {
        let mut bytes = [0; 256 * 8];
        blake3::Hasher::new_derive_key("strandline 1 gear table of the chunker")
            .update(secret)
            .finalize_xof()
            .fill(&mut bytes);
        let gear: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word)).collect();
        let gear_shifted = gear.iter().map(|word| word << 1).collect();
        let average = chunking.average as usize;
        let (mask_s, mask_l) = select_masks(average, Normalization::Level1);
        Self {
            minimum: chunking.minimum as usize,
            average,
            maximum: chunking.maximum as usize,
            mask_s,
            mask_l,
            gear: Cow::Owned(gear),
            gear_shifted: Cow::Owned(gear_shifted),
        }
    }

    /// Files up to this length are one chunk, bytes.
    pub fn minimum(&self) -> usize {
        self.minimum
    }

    /// Longest chunk, bytes.
    pub fn maximum(&self) -> usize {
        self.maximum
    }

    /// Length of the first chunk of `window`, which must hold [`Cutter::maximum`] bytes or all that are left of the
    /// file. At least 1 unless `window` is empty.
    pub fn first_chunk(&self, window: &[u8]) -> usize {
        if window.len() <= self.minimum {
            return window.len();
        }
        let (_, length) = cut_gear(
            window,
            self.minimum,
            self.average,
            self.maximum,
            self.mask_s,
            self.mask_l,
            self.mask_s << 1,
            self.mask_l << 1,
            &self.gear,
            &self.gear_shifted,
        );
        length.clamp(1, window.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: u64, bytes: usize) -> Vec<u8> {
        let mut out = vec![0; bytes];
        blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
        out
    }

    fn cuts(cutter: &Cutter, data: &[u8]) -> Vec<usize> {
        let mut rest = data;
        let mut cuts = Vec::new();
        while !rest.is_empty() {
            let window = &rest[..rest.len().min(cutter.maximum())];
            let length = cutter.first_chunk(window);
            cuts.push(length);
            rest = &rest[length..];
        }
        cuts
    }

    #[test]
    fn chunks_keep_their_sizes_and_find_their_cuts_again_after_an_insertion() {
        let sizes = default_chunking();
        sizes.check().unwrap();
        let cutter = Cutter::new(&sizes, &[7; 32]);
        let data = noise(1, 8 << 20);
        let before = cuts(&cutter, &data);
        assert_eq!(before.iter().sum::<usize>(), data.len());
        for &length in &before[..before.len() - 1] {
            assert!((16 << 10..=256 << 10).contains(&length));
        }
        let average = data.len() / before.len();
        assert!((40 << 10..120 << 10).contains(&average), "{average}");
        let mut shifted = noise(2, 1000);
        shifted.extend_from_slice(&data);
        let after = cuts(&cutter, &shifted);
        let common = before.iter().rev().zip(after.iter().rev()).take_while(|(a, b)| a == b).count();
        assert!(common + 5 > before.len(), "{common} of {}", before.len());
    }

    #[test]
    fn another_secret_cuts_elsewhere() {
        let data = noise(1, 4 << 20);
        let cut = |secret: u8| cuts(&Cutter::new(&default_chunking(), &[secret; 32]), &data);
        assert_eq!(cut(1), cut(1));
        assert_ne!(cut(1), cut(2));
    }

    #[test]
    fn short_and_monotonous_data_is_cut_within_the_limits() {
        let cutter = Cutter::new(&default_chunking(), &[7; 32]);
        assert_eq!(cutter.first_chunk(&[]), 0);
        assert_eq!(cutter.first_chunk(&[0; 16 << 10]), 16 << 10);
        assert!(cutter.first_chunk(&vec![0; 1 << 20]) <= 256 << 10);
    }
}
