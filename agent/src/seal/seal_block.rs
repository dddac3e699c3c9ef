//! The sealer: chunks in, a finished block out. One per thread; it reuses its buffers and compression context.

use aws_lc_rs::aead::Aad;
use strandline_actors::runtime::buffer::BlockBuffer;
use strandline_messages::format::FormatError;
use strandline_messages::format::block::{
    BlockHeaderV1, ChunkRow, Codec, DIGEST_BYTES, FIXED_HEADER_BYTES, PLAINTEXT_BYTES_MAX, TAG_BYTES, encode_row,
};
use strandline_messages::format::cursor::check_limit;
use strandline_messages::{ChunkKind, limits};
use zstd::bulk::Compressor;
use zstd::zstd_safe::CParameter;

use super::SealError;
use super::body::Body;
use super::compression::USUAL_LEVEL;
use super::data_key::{BLOCK, DataKey, zero_nonce};
use crate::keys::{Keyset, random};

/// Blocks smaller than this are compressed without asking.
const PROBE_FROM_BYTES: usize = 128 << 10;
const PROBE_SAMPLES: usize = 8;
const PROBE_SAMPLE_BYTES: usize = 4 << 10;

/// Levels that are chosen by themselves have smaller tables than zstd would make, binary logarithms of entries: at the usual
/// one they stay in a core's cache, which is worth 4 to 10 % of the time for 0.7 % of the size; above, 3 MiB less for
/// each thread cost 2 %.
const USUAL_LOGS: (u32, u32) = (16, 15);
const HIGHER_LOGS: (u32, u32) = (17, 16);

/// Seals blocks under one data key.
pub struct Sealer {
    data_key: DataKey,
    level: i32,
    compressor: Option<Compressor<'static>>,
    probe: Option<Compressor<'static>>,
    /// What the compressor wrote last, and more: a block is then as large as it must be, and not as it might have become.
    compressed: BlockBuffer,
    /// The table of the last block.
    table: Vec<u8>,
}

/// A finished block.
#[derive(Debug)]
pub struct SealedBlock {
    /// All of it.
    pub bytes: BlockBuffer,
    /// How its content was coded.
    pub codec: Codec,
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
        Self {
            data_key,
            level: zstd_level,
            compressor: None,
            probe: None,
            compressed: BlockBuffer::default(),
            table: Vec::new(),
        }
    }

    /// The session's data key: the manifest is sealed under it too.
    pub fn data_key(&self) -> &DataKey {
        &self.data_key
    }

    /// Changes the compression level from the next block on.
    pub fn set_level(&mut self, zstd_level: i32) -> Result<(), SealError> {
        if zstd_level != self.level {
            self.level = zstd_level;
            if let Some(compressor) = &mut self.compressor {
                configure(compressor, zstd_level)?;
            }
        }
        Ok(())
    }

    /// Seals `body`, the chunks of `rows`. The rows' ids are trusted. Data rows have no references.
    pub fn seal(&mut self, kind: ChunkKind, rows: &[ChunkRow], body: &mut Body) -> Result<SealedBlock, SealError> {
        let random = random()?;
        self.seal_with_random(kind, rows, body, &random)
    }

    fn seal_with_random(
        &mut self,
        kind: ChunkKind,
        rows: &[ChunkRow],
        body: &mut Body,
        random: &[u8; 32],
    ) -> Result<SealedBlock, SealError> {
        check_parts(kind, rows, body)?;
        self.table.clear();
        for row in rows {
            encode_row(kind, &row.id, &row.references, &mut self.table);
        }
        check_limit("chunk table", self.table.len() as u64, limits::BLOCK_TABLE_BYTES_MAX)?;
        let input = body.input();
        let compressed = self.compress(input)?;
        let (codec, content) = match compressed {
            Some(written) => (Codec::Zstd, self.compressed.get(..written).unwrap_or_default()),
            None => (Codec::Stored, input),
        };

        let wrapped = self.data_key.wrapped();
        let aad_bytes = FIXED_HEADER_BYTES + wrapped.len() + self.table.len();
        let mut out = BlockBuffer::with_capacity(aad_bytes + content.len() + TAG_BYTES + DIGEST_BYTES);
        out.grow(FIXED_HEADER_BYTES).fill(0);
        for section in [wrapped, &self.table, content] {
            out.extend_from_slice(section);
        }
        let header = BlockHeaderV1 {
            kind,
            codec,
            wrap_algorithm: self.data_key.wrap_algorithm(),
            wrapped_key_bytes: small(wrapped.len())?,
            chunks: small(rows.len())?,
            table_bytes: small(self.table.len())?,
            body_bytes: small(content.len() + TAG_BYTES)?,
            repository: self.data_key.repository(),
            salt: [0; 32],
            commitment: [0; 32],
        };
        encrypt(&self.data_key, header, random, aad_bytes, &mut out)?;
        Ok(SealedBlock { bytes: out, codec })
    }

    /// The length of `input` in `compressed`, if that is worth it.
    fn compress(&mut self, input: &[u8]) -> Result<Option<usize>, SealError> {
        if !self.worth_compressing(input)? {
            return Ok(None);
        }
        let bytes_max = zstd::zstd_safe::compress_bound(input.len());
        if self.compressed.len() < bytes_max {
            self.compressed.truncate(0);
            self.compressed.grow(bytes_max);
        }
        let compressor = prepared(&mut self.compressor, self.level)?;
        let written = compressor.compress_to_buffer(input, &mut *self.compressed).map_err(SealError::Compress)?;
        Ok(gains(input.len(), written).then_some(written))
    }

    /// Compresses a few samples at the fastest level: media and ciphertext gain nothing, and most of the time of a
    /// backup is compression.
    fn worth_compressing(&mut self, input: &[u8]) -> Result<bool, SealError> {
        if input.len() < PROBE_FROM_BYTES {
            return Ok(true);
        }
        let probe = prepared(&mut self.probe, 1)?;
        let mut room = [0u8; PROBE_SAMPLE_BYTES + 512];
        let stride = input.len() / PROBE_SAMPLES;
        for sample in input.chunks(stride.max(PROBE_SAMPLE_BYTES)) {
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
        let mut compressor = Compressor::new(level).map_err(SealError::Compress)?;
        configure(&mut compressor, level)?;
        *slot = Some(compressor);
    }
    slot.as_mut().ok_or(SealError::Crypto { what: "no compressor" })
}

/// Sets the level, and what belongs to it.
fn configure(compressor: &mut Compressor<'static>, level: i32) -> Result<(), SealError> {
    let (hash_log, chain_log) = match level {
        USUAL_LEVEL => USUAL_LOGS,
        5 | 6 => HIGHER_LOGS,
        // As zstd does at that level.
        _ => (0, 0),
    };
    compressor.set_compression_level(level).map_err(SealError::Compress)?;
    for parameter in [CParameter::HashLog(hash_log), CParameter::ChainLog(chain_log)] {
        compressor.set_parameter(parameter).map_err(SealError::Compress)?;
    }
    Ok(())
}

/// Derives the block's key from everything that `out` holds, fills in the header, encrypts in place, appends the digest.
fn encrypt(
    data_key: &DataKey,
    mut header: BlockHeaderV1,
    random: &[u8; 32],
    aad_bytes: usize,
    out: &mut BlockBuffer,
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

fn check_parts(kind: ChunkKind, rows: &[ChunkRow], body: &Body) -> Result<(), FormatError> {
    let invalid = |why| FormatError::Invalid { what: "block", why };
    check_limit("number of chunks in a block", rows.len() as u64, limits::BLOCK_CHUNKS_MAX)?;
    check_limit("plaintext of a block", body.input_bytes() as u64, PLAINTEXT_BYTES_MAX)?;
    if rows.is_empty() || rows.len() != body.lengths().len() {
        return Err(invalid("it has no chunks, or not one length for each"));
    }
    for length in body.lengths() {
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

    fn body(chunks: &[&[u8]]) -> Body {
        let mut body = Body::default();
        for chunk in chunks {
            body.push(chunk);
        }
        body
    }

    fn seal_one(sealer: &mut Sealer, random: &[u8; 32], plaintext: &[u8]) -> Vec<u8> {
        let rows = [ChunkRow { id: ChunkId([3; 32]), references: Vec::new() }];
        sealer.seal_with_random(ChunkKind::Data, &rows, &mut body(&[plaintext]), random).unwrap().bytes.to_vec()
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
    fn the_level_may_change_from_block_to_block() {
        let scattered = |n: u64| n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 50;
        let text: Vec<u8> = (0..50_000).flat_map(|n| (scattered(n * n) % 700).to_string().into_bytes()).collect();
        let fresh = |level| seal_one(&mut Sealer::new(&keyset(), level).unwrap(), &[7; 32], &text).len();
        let mut sealer = Sealer::new(&keyset(), 3).unwrap();
        for level in [3, 9, 1, 6, 3, 19, 3] {
            sealer.set_level(level).unwrap();
            let block = seal_one(&mut sealer, &[7; 32], &text);
            assert_eq!(block.len(), fresh(level), "level {level}");
        }
        assert!(fresh(19) < fresh(1));
    }

    #[test]
    fn parts_that_contradict_one_another_are_refused() {
        let mut sealer = Sealer::new(&keyset(), 3).unwrap();
        let row = |references| ChunkRow { id: ChunkId([3; 32]), references };
        let reference = strandline_messages::format::chunk::Reference::data(ChunkId([4; 32]));
        let mut seal =
            |rows: &[ChunkRow], chunks: &[&[u8]]| sealer.seal(ChunkKind::Data, rows, &mut body(chunks)).is_ok();
        assert!(seal(&[row(vec![])], &[b"ab"]));
        assert!(!seal(&[], &[]));
        assert!(!seal(&[row(vec![])], &[b"a", b"b"]));
        assert!(!seal(&[row(vec![]), row(vec![])], &[b"ab"]));
        assert!(!seal(&[row(vec![reference])], &[b"ab"]));
        assert!(!seal(&[row(vec![])], &[&vec![0; PLAINTEXT_BYTES_MAX]]));
        assert!(!seal(&[row(vec![])], &[&vec![0; limits::CHUNK_BYTES_MAX + 1]]));
        assert!(seal(&[row(vec![])], &[&vec![0; limits::CHUNK_BYTES_MAX]]));
    }
}
