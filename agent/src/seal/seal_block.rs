//! The sealer: chunks in, a finished block out. One per thread; it reuses its buffers and compression context.

use aws_lc_rs::aead::Aad;
use strandline_messages::ChunkKind;
use strandline_messages::format::FormatError;
use strandline_messages::format::block::{
    BlockHeaderV1, ChunkRow, Codec, DIGEST_BYTES, FIXED_HEADER_BYTES, PLAINTEXT_BYTES_MAX, TAG_BYTES, encode_row,
};
use strandline_messages::format::cursor::{Encoder, check_limit};
use strandline_messages::limits;
use zstd::bulk::Compressor;

use super::SealError;
use super::data_key::{BLOCK, DataKey, zero_nonce};
use crate::keys::{Keyset, random};

/// Blocks smaller than this are compressed without asking.
const PROBE_FROM_BYTES: usize = 128 << 10;
const PROBE_SAMPLES: usize = 8;
const PROBE_SAMPLE_BYTES: usize = 4 << 10;

/// Seals blocks under one data key.
pub struct Sealer {
    data_key: DataKey,
    level: i32,
    compressor: Option<Compressor<'static>>,
    probe: Option<Compressor<'static>>,
    input: Vec<u8>,
}

impl Clone for Sealer {
    /// The same data key and level, buffers of its own.
    fn clone(&self) -> Self {
        Self::with_data_key(self.data_key.clone(), self.level)
    }
}

impl Sealer {
    /// Makes a data key for the session. `zstd_level`: 1 is fast, 3 usual, 19 slow; 0 is zstd's default.
    pub fn new(keyset: &Keyset, zstd_level: i32) -> Result<Self, SealError> {
        Ok(Self::with_data_key(DataKey::generate(keyset)?, zstd_level))
    }

    /// Seals under an existing data key.
    pub fn with_data_key(data_key: DataKey, zstd_level: i32) -> Self {
        Self { data_key, level: zstd_level, compressor: None, probe: None, input: Vec::new() }
    }

    /// The session's data key: the manifest is sealed under it too.
    pub fn data_key(&self) -> &DataKey {
        &self.data_key
    }

    /// Changes the compression level from the next block on.
    pub fn set_level(&mut self, zstd_level: i32) {
        if zstd_level != self.level {
            self.level = zstd_level;
            self.compressor = None;
        }
    }

    /// Seals `plaintext`, the chunks of `rows` one after another with these `lengths` in bytes, and replaces `out` by the
    /// block. The rows' ids are trusted. Data rows have no references.
    pub fn seal(
        &mut self,
        kind: ChunkKind,
        rows: &[ChunkRow],
        plaintext: &[u8],
        lengths: &[u32],
        out: &mut Vec<u8>,
    ) -> Result<(), SealError> {
        let random = random()?;
        self.seal_with_random(kind, rows, plaintext, lengths, &random, out)
    }

    fn seal_with_random(
        &mut self,
        kind: ChunkKind,
        rows: &[ChunkRow],
        plaintext: &[u8],
        lengths: &[u32],
        random: &[u8; 32],
        out: &mut Vec<u8>,
    ) -> Result<(), SealError> {
        check_parts(kind, rows, plaintext, lengths)?;
        self.input.clear();
        self.input.reserve(lengths.len() * 4 + plaintext.len());
        for length in lengths {
            self.input.put_u32(*length);
        }
        self.input.extend_from_slice(plaintext);

        out.clear();
        out.resize(FIXED_HEADER_BYTES, 0);
        out.extend_from_slice(self.data_key.wrapped());
        for row in rows {
            encode_row(kind, &row.id, &row.references, out);
        }
        let aad_bytes = out.len();
        let table_bytes = aad_bytes - FIXED_HEADER_BYTES - self.data_key.wrapped().len();
        check_limit("chunk table", table_bytes as u64, limits::BLOCK_TABLE_BYTES_MAX)?;
        let codec = self.append_body(aad_bytes, out)?;
        let header = BlockHeaderV1 {
            kind,
            codec,
            wrap_algorithm: self.data_key.wrap_algorithm(),
            wrapped_key_bytes: small(self.data_key.wrapped().len())?,
            chunks: small(rows.len())?,
            table_bytes: small(table_bytes)?,
            body_bytes: small(out.len() - aad_bytes + TAG_BYTES)?,
            repository: self.data_key.repository(),
            salt: [0; 32],
            commitment: [0; 32],
        };
        encrypt(&self.data_key, header, random, aad_bytes, out)
    }

    /// Appends the codec's output to `out`, which holds `aad_bytes` so far.
    fn append_body(&mut self, aad_bytes: usize, out: &mut Vec<u8>) -> Result<Codec, SealError> {
        if self.worth_compressing()? {
            let compressor = prepared(&mut self.compressor, self.level)?;
            out.resize(aad_bytes + zstd::zstd_safe::compress_bound(self.input.len()), 0);
            let room = out.get_mut(aad_bytes..).unwrap_or_default();
            let written = compressor.compress_to_buffer(&self.input, room).map_err(SealError::Compress)?;
            if gains(self.input.len(), written) {
                out.truncate(aad_bytes + written);
                // Room for the tag and the digest, so that the block never moves.
                out.reserve(TAG_BYTES + DIGEST_BYTES);
                return Ok(Codec::Zstd);
            }
            out.truncate(aad_bytes);
        }
        out.reserve(self.input.len() + TAG_BYTES + DIGEST_BYTES);
        out.extend_from_slice(&self.input);
        Ok(Codec::Stored)
    }

    /// Compresses a few samples at the fastest level: media and ciphertext gain nothing, and most of the time of a
    /// backup is compression.
    fn worth_compressing(&mut self) -> Result<bool, SealError> {
        if self.input.len() < PROBE_FROM_BYTES {
            return Ok(true);
        }
        let probe = prepared(&mut self.probe, 1)?;
        let mut room = [0u8; PROBE_SAMPLE_BYTES + 512];
        let stride = self.input.len() / PROBE_SAMPLES;
        for sample in self.input.chunks(stride.max(PROBE_SAMPLE_BYTES)) {
            let sample = sample.get(..PROBE_SAMPLE_BYTES).unwrap_or(sample);
            let written = probe.compress_to_buffer(sample, room.as_mut_slice()).map_err(SealError::Compress)?;
            if gains(sample.len(), written) {
                return Ok(true);
            }
        }
        Ok(false)
    }
}

/// Whether compression saved at least 2 %.
fn gains(before: usize, after: usize) -> bool {
    after <= before - before / 50 && after < before
}

fn prepared<'a>(
    slot: &'a mut Option<Compressor<'static>>,
    level: i32,
) -> Result<&'a mut Compressor<'static>, SealError> {
    if slot.is_none() {
        *slot = Some(Compressor::new(level).map_err(SealError::Compress)?);
    }
    slot.as_mut().ok_or(SealError::Crypto { what: "no compressor" })
}

/// Derives the block's key from everything that `out` holds, fills in the header, encrypts in place, appends the digest.
fn encrypt(
    data_key: &DataKey,
    mut header: BlockHeaderV1,
    random: &[u8; 32],
    aad_bytes: usize,
    out: &mut Vec<u8>,
) -> Result<(), SealError> {
    let failed = |what| SealError::Crypto { what };
    let mut fixed = Vec::with_capacity(FIXED_HEADER_BYTES);
    header.encode(&mut fixed);
    let rest = out.get(FIXED_HEADER_BYTES..).unwrap_or_default();
    header.salt = data_key.salt(BLOCK, random, &[&fixed, rest]);
    let derived = data_key.derive(BLOCK, &header.salt);
    header.commitment = derived.commitment;
    fixed.clear();
    header.encode(&mut fixed);
    let (aad, body) = out.split_at_mut_checked(aad_bytes).ok_or(failed("the block has no body"))?;
    for (to, from) in aad.iter_mut().zip(&fixed) {
        *to = *from;
    }
    let cipher = derived.cipher().ok_or(failed("the block key was refused"))?;
    let tag = cipher
        .seal_in_place_separate_tag(zero_nonce(), Aad::from(&*aad), body)
        .map_err(|_| failed("the block cannot be encrypted"))?;
    out.extend_from_slice(tag.as_ref());
    let digest = blake3::hash(out);
    out.extend_from_slice(digest.as_bytes());
    Ok(())
}

fn check_parts(kind: ChunkKind, rows: &[ChunkRow], plaintext: &[u8], lengths: &[u32]) -> Result<(), FormatError> {
    let invalid = |why| FormatError::Invalid { what: "block", why };
    check_limit("number of chunks in a block", rows.len() as u64, limits::BLOCK_CHUNKS_MAX)?;
    check_limit("plaintext of a block", (plaintext.len() + lengths.len() * 4) as u64, PLAINTEXT_BYTES_MAX)?;
    if rows.is_empty() || rows.len() != lengths.len() {
        return Err(invalid("it has no chunks, or not one length for each"));
    }
    if lengths.iter().map(|&length| u64::from(length)).sum::<u64>() != plaintext.len() as u64 {
        return Err(invalid("the lengths of the chunks are not the length of the plaintext"));
    }
    for length in lengths {
        check_limit("chunk length", u64::from(*length), limits::CHUNK_BYTES_MAX)?;
    }
    for row in rows {
        check_limit("references of a tree chunk", row.references.len() as u64, limits::TREE_REFERENCES_MAX)?;
        if kind == ChunkKind::Data && !row.references.is_empty() {
            return Err(invalid("a data chunk has references"));
        }
    }
    Ok(())
}

fn small<T: TryFrom<usize>>(number: usize) -> Result<T, SealError> {
    T::try_from(number)
        .map_err(|_| FormatError::Limit { what: "a length in a block", found: number as u64, max: 0 }.into())
}

#[cfg(test)]
mod tests {
    use strandline_messages::format::block::BlockView;
    use strandline_messages::{ChunkId, RepositoryId};

    use super::*;

    fn keyset() -> Keyset {
        Keyset::create(RepositoryId([1; 16])).unwrap()
    }

    fn seal_one(sealer: &mut Sealer, random: &[u8; 32], plaintext: &[u8]) -> Vec<u8> {
        let rows = [ChunkRow { id: ChunkId([3; 32]), references: Vec::new() }];
        let mut out = Vec::new();
        let length = u32::try_from(plaintext.len()).unwrap();
        sealer.seal_with_random(ChunkKind::Data, &rows, plaintext, &[length], random, &mut out).unwrap();
        out
    }

    #[test]
    fn s51_a_cloned_process_never_seals_two_plaintexts_under_one_key() {
        let mut original = Sealer::new(&keyset(), 3).unwrap();
        let mut clone = original.clone();
        let one = seal_one(&mut original, &[7; 32], b"one plaintext");
        let two = seal_one(&mut clone, &[7; 32], b"two plaintext");
        let again = seal_one(&mut original, &[7; 32], b"one plaintext");
        let header = |block: &[u8]| BlockView::parse(block).unwrap().header;
        assert_ne!(header(&one).salt, header(&two).salt);
        assert_ne!(header(&one).commitment, header(&two).commitment);
        assert_eq!(one, again, "the same bytes and the same random give the same block");
    }

    #[test]
    fn incompressible_blocks_are_stored_and_text_is_compressed() {
        let mut sealer = Sealer::new(&keyset(), 3).unwrap();
        let mut noise = vec![0u8; 300 << 10];
        getrandom::fill(&mut noise).unwrap();
        for plaintext in [&noise[..], &noise[..1000], b"", b"x"] {
            let block = seal_one(&mut sealer, &[7; 32], plaintext);
            assert_eq!(BlockView::parse(&block).unwrap().header.codec, Codec::Stored);
        }
        let text = b"the same line again and again\n".repeat(10_000);
        let block = seal_one(&mut sealer, &[7; 32], &text);
        assert_eq!(BlockView::parse(&block).unwrap().header.codec, Codec::Zstd);
        assert!(block.len() < text.len() / 10);
        noise[..64 << 10].copy_from_slice(&text[..64 << 10]);
        let block = seal_one(&mut sealer, &[7; 32], &noise);
        assert_eq!(BlockView::parse(&block).unwrap().header.codec, Codec::Zstd, "one compressible part is enough");
    }

    #[test]
    fn parts_that_contradict_one_another_are_refused() {
        let mut sealer = Sealer::new(&keyset(), 3).unwrap();
        let row = |references| ChunkRow { id: ChunkId([3; 32]), references };
        let reference = strandline_messages::format::chunk::Reference::data(ChunkId([4; 32]));
        let mut out = Vec::new();
        let mut seal = |rows: &[ChunkRow], plaintext: &[u8], lengths: &[u32]| {
            sealer.seal(ChunkKind::Data, rows, plaintext, lengths, &mut out).is_ok()
        };
        assert!(seal(&[row(vec![])], b"ab", &[2]));
        assert!(!seal(&[], b"", &[]));
        assert!(!seal(&[row(vec![])], b"ab", &[3]));
        assert!(!seal(&[row(vec![])], b"ab", &[1, 1]));
        assert!(!seal(&[row(vec![reference])], b"ab", &[2]));
        let large = vec![0; PLAINTEXT_BYTES_MAX];
        assert!(!seal(&[row(vec![])], &large, &[u32::try_from(large.len()).unwrap()]));
        let maximal = vec![0; limits::CHUNK_BYTES_MAX];
        assert!(seal(&[row(vec![])], &maximal, &[u32::try_from(maximal.len()).unwrap()]));
    }
}
