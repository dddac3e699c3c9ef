//! The block: a sealed group of chunks, the unit of encryption, transfer, acknowledgement and verification.
//!
//! ```text
//! offset  size  field
//!      0     8  magic "STRBLOCK"
//!      8     2  version = 1
//!     10     1  kind: 1 data, 2 tree
//!     11     1  codec of the body's plaintext: 0 stored, 1 zstd
//!     12     1  wrap algorithm: 1 = HPKE base mode, DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM
//!     13     1  zero
//!     14     2  W  length of the wrapped data key
//!     16     4  C  number of chunks
//!     20     4  T  length of the chunk table
//!     24     4  B  length of the body (ciphertext with its 16-byte tag)
//!     28    16  repository id
//!     44    32  salt
//!     76    32  key commitment
//!    108     W  wrapped data key
//!  108+W     T  chunk table: per chunk id 32; in a tree block followed by u16 count and count × 33 bytes of references
//!      …     B  body: AES-256-GCM over the codec's output; nonce zero; everything before the body is the AAD
//!      …    32  digest: BLAKE3-256 of everything before it
//! ```
//! The codec's input is `C × u32` chunk lengths, then the chunks. Sealing and opening need the key and live in the agent.

use crate::ids::{BlockDigest, ChunkId, ChunkKind, RepositoryId};
use crate::limits;

use super::FormatError;
use super::chunk::{REFERENCE_BYTES, Reference};
use super::cursor::{Decoder, Encoder, check_limit};

/// First bytes of a block.
pub const BLOCK_MAGIC: [u8; 8] = *b"STRBLOCK";
/// Version that this module encodes.
pub const BLOCK_VERSION: u16 = 1;
/// Bytes before the wrapped data key.
pub const FIXED_HEADER_BYTES: usize = 108;
/// Bytes of the digest at the end.
pub const DIGEST_BYTES: usize = 32;
/// Bytes of the authentication tag at the end of the body.
pub const TAG_BYTES: usize = 16;
/// Most bytes of the codec's input: chunk lengths and chunks of one block.
pub const PLAINTEXT_BYTES_MAX: usize = limits::BLOCK_BODY_BYTES_MAX - TAG_BYTES;

/// How the body's plaintext is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Codec {
    /// As it is.
    Stored = 0,
    /// One zstd frame.
    Zstd = 1,
}

/// The fixed part of a block's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlockHeaderV1 {
    /// Data or tree.
    pub kind: ChunkKind,
    /// How the body's plaintext is encoded.
    pub codec: Codec,
    /// How the data key is wrapped (1 = X25519 HPKE).
    pub wrap_algorithm: u8,
    /// Length of the wrapped data key, bytes.
    pub wrapped_key_bytes: u16,
    /// Number of chunks.
    pub chunks: u32,
    /// Length of the chunk table, bytes.
    pub table_bytes: u32,
    /// Length of the body, bytes.
    pub body_bytes: u32,
    /// The repository whose keys open this block.
    pub repository: RepositoryId,
    /// Input of the block key's derivation.
    pub salt: [u8; 32],
    /// Commits to the block key; checked before decryption.
    pub commitment: [u8; 32],
}

impl BlockHeaderV1 {
    /// Appends the 108 bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&BLOCK_MAGIC);
        out.put_u16(BLOCK_VERSION);
        out.put_u8(self.kind as u8);
        out.put_u8(self.codec as u8);
        out.put_u8(self.wrap_algorithm);
        out.put_u8(0);
        out.put_u16(self.wrapped_key_bytes);
        out.put_u32(self.chunks);
        out.put_u32(self.table_bytes);
        out.put_u32(self.body_bytes);
        out.extend_from_slice(self.repository.as_bytes());
        out.extend_from_slice(&self.salt);
        out.extend_from_slice(&self.commitment);
    }

    /// Reads the 108 bytes and checks every length against its limit.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut decoder = Decoder::new(bytes, "block");
        decoder.magic(&BLOCK_MAGIC)?;
        decoder.version(BLOCK_VERSION)?;
        let kind = ChunkKind::from_byte(decoder.u8()?).ok_or_else(|| decoder.invalid("unknown kind"))?;
        let codec = match decoder.u8()? {
            0 => Codec::Stored,
            1 => Codec::Zstd,
            _ => return Err(decoder.invalid("unknown codec")),
        };
        let wrap_algorithm = decoder.u8()?;
        if decoder.u8()? != 0 {
            return Err(decoder.invalid("a reserved byte is not zero"));
        }
        let header = Self {
            kind,
            codec,
            wrap_algorithm,
            wrapped_key_bytes: decoder.u16()?,
            chunks: decoder.u32()?,
            table_bytes: decoder.u32()?,
            body_bytes: decoder.u32()?,
            repository: RepositoryId(decoder.array()?),
            salt: decoder.array()?,
            commitment: decoder.array()?,
        };
        check_limit("wrapped data key", header.wrapped_key_bytes.into(), limits::WRAPPED_KEY_BYTES_MAX)?;
        check_limit("number of chunks in a block", header.chunks.into(), limits::BLOCK_CHUNKS_MAX)?;
        check_limit("chunk table", header.table_bytes.into(), limits::BLOCK_TABLE_BYTES_MAX)?;
        check_limit("block body", header.body_bytes.into(), limits::BLOCK_BODY_BYTES_MAX)?;
        if header.chunks == 0 {
            return Err(decoder.invalid("no chunks"));
        }
        Ok(header)
    }

    /// Length of everything before the body: header, wrapped key, table.
    pub fn aad_bytes(&self) -> usize {
        FIXED_HEADER_BYTES + usize::from(self.wrapped_key_bytes) + self.table_bytes as usize
    }

    /// Length of the whole block with its digest.
    pub fn block_bytes(&self) -> usize {
        self.aad_bytes() + self.body_bytes as usize + DIGEST_BYTES
    }
}

/// One row of a chunk table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkRow {
    /// The chunk.
    pub id: ChunkId,
    /// What it refers to (always empty for data chunks).
    pub references: Vec<Reference>,
}

/// A block in memory, its parts found and its lengths checked. The digest is checked by [`BlockView::verify_digest`].
#[derive(Clone, Copy, Debug)]
pub struct BlockView<'a> {
    /// The fixed header.
    pub header: BlockHeaderV1,
    bytes: &'a [u8],
}

impl<'a> BlockView<'a> {
    /// Finds the parts of the block that `bytes` are. Checks every length, and that the table has the right number of rows.
    pub fn parse(bytes: &'a [u8]) -> Result<Self, FormatError> {
        let header = BlockHeaderV1::decode(bytes)?;
        let view = Self { header, bytes };
        match bytes.len().checked_sub(header.block_bytes()) {
            None => return Err(FormatError::Truncated { what: "block" }),
            Some(0) => {}
            Some(extra) => return Err(FormatError::Trailing { what: "block", extra }),
        }
        let mut rows = view.rows();
        for row in &mut rows {
            row?;
        }
        rows.finish()?;
        Ok(view)
    }

    /// The whole block.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// The wrapped data key.
    pub fn wrapped_key(&self) -> &'a [u8] {
        self.part(FIXED_HEADER_BYTES, usize::from(self.header.wrapped_key_bytes))
    }

    /// The chunk table.
    pub fn table(&self) -> &'a [u8] {
        self.part(FIXED_HEADER_BYTES + usize::from(self.header.wrapped_key_bytes), self.header.table_bytes as usize)
    }

    /// Everything before the body.
    pub fn aad(&self) -> &'a [u8] {
        self.part(0, self.header.aad_bytes())
    }

    /// The ciphertext with its tag.
    pub fn body(&self) -> &'a [u8] {
        self.part(self.header.aad_bytes(), self.header.body_bytes as usize)
    }

    /// The digest as stored.
    pub fn stored_digest(&self) -> BlockDigest {
        let tail = self.part(self.header.block_bytes() - DIGEST_BYTES, DIGEST_BYTES);
        BlockDigest::from_slice(tail).unwrap_or(BlockDigest([0; 32]))
    }

    /// Compares the stored digest with the bytes.
    pub fn verify_digest(&self) -> Result<BlockDigest, FormatError> {
        let stored = self.stored_digest();
        let covered = self.part(0, self.header.block_bytes() - DIGEST_BYTES);
        if blake3::hash(covered).as_bytes() == stored.as_bytes() {
            Ok(stored)
        } else {
            Err(FormatError::Digest { what: "block" })
        }
    }

    /// The rows of the chunk table, in the order of the chunks.
    pub fn rows(&self) -> TableRows<'a> {
        TableRows::new(self.header.kind, self.header.chunks, self.table())
    }

    // Lengths were compared with `bytes` in `parse`; an empty slice can only be seen by `parse` itself.
    fn part(&self, offset: usize, len: usize) -> &'a [u8] {
        self.bytes.get(offset..offset + len).unwrap_or_default()
    }
}

/// Iterates over the rows of a chunk table without copying more than one row.
#[derive(Clone, Debug)]
pub struct TableRows<'a> {
    kind: ChunkKind,
    left: u32,
    decoder: Decoder<'a>,
}

impl<'a> TableRows<'a> {
    /// Over a table of `chunks` rows as it stands in a block of `kind`.
    pub fn new(kind: ChunkKind, chunks: u32, table: &'a [u8]) -> Self {
        Self { kind, left: chunks, decoder: Decoder::new(table, "chunk table") }
    }

    fn row(&mut self) -> Result<ChunkRow, FormatError> {
        let id = ChunkId(self.decoder.array()?);
        let mut references = Vec::new();
        if self.kind == ChunkKind::Tree {
            let count = self.decoder.u16()?;
            let count = check_limit("references of a tree chunk", count.into(), limits::TREE_REFERENCES_MAX)?;
            if self.decoder.remaining() < count * REFERENCE_BYTES {
                return Err(FormatError::Truncated { what: "chunk table" });
            }
            references.reserve_exact(count);
            for _ in 0..count {
                references.push(Reference::decode(&mut self.decoder)?);
            }
        }
        Ok(ChunkRow { id, references })
    }

    /// Refuses bytes left over after the last row.
    pub fn finish(self) -> Result<(), FormatError> {
        self.decoder.finish()
    }
}

impl Iterator for TableRows<'_> {
    type Item = Result<ChunkRow, FormatError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let row = self.row();
        if row.is_err() {
            self.left = 0;
        }
        Some(row)
    }
}

/// Appends one row to a chunk table under construction.
pub fn encode_row(kind: ChunkKind, id: &ChunkId, references: &[Reference], out: &mut Vec<u8>) {
    out.extend_from_slice(id.as_bytes());
    if kind == ChunkKind::Tree {
        out.put_u16(u16::try_from(references.len()).unwrap_or(u16::MAX));
        for reference in references {
            reference.encode(out);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn sample(kind: ChunkKind) -> Vec<u8> {
        let mut table = Vec::new();
        for i in 0..3u8 {
            let references = vec![Reference::data(ChunkId([i; 32])); usize::from(i)];
            encode_row(kind, &ChunkId([i + 100; 32]), &references, &mut table);
        }
        let header = BlockHeaderV1 {
            kind,
            codec: Codec::Zstd,
            wrap_algorithm: 1,
            wrapped_key_bytes: 4,
            chunks: 3,
            table_bytes: u32::try_from(table.len()).unwrap(),
            body_bytes: 20,
            repository: RepositoryId([3; 16]),
            salt: [4; 32],
            commitment: [5; 32],
        };
        let mut bytes = Vec::new();
        header.encode(&mut bytes);
        bytes.extend_from_slice(&[6; 4]);
        bytes.extend_from_slice(&table);
        bytes.extend_from_slice(&[7; 20]);
        let digest = blake3::hash(&bytes);
        bytes.extend_from_slice(digest.as_bytes());
        bytes
    }

    #[test]
    fn a_block_reads_back() {
        for kind in [ChunkKind::Data, ChunkKind::Tree] {
            let bytes = sample(kind);
            let view = BlockView::parse(&bytes).unwrap();
            view.verify_digest().unwrap();
            assert_eq!(view.rows().count(), 3);
            assert_eq!(view.body(), &[7; 20]);
            assert_eq!(view.wrapped_key(), &[6; 4]);
        }
    }

    #[test]
    fn s30_every_flipped_byte_of_a_block_is_found() {
        let good = sample(ChunkKind::Tree);
        for i in 0..good.len() {
            let mut bad = good.clone();
            bad[i] ^= 0x40;
            let found = BlockView::parse(&bad).and_then(|view| view.verify_digest());
            assert!(found.is_err(), "flipping byte {i} went unnoticed");
        }
    }

    #[test]
    fn a_block_cut_anywhere_is_refused() {
        let good = sample(ChunkKind::Tree);
        for len in 0..good.len() {
            assert!(BlockView::parse(&good[..len]).is_err());
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(mut bytes: Vec<u8>, prefix in 0usize..200) {
            let good = sample(ChunkKind::Tree);
            let mut mixed = good[..prefix.min(good.len())].to_vec();
            mixed.append(&mut bytes);
            let _ = BlockView::parse(&mixed);
        }
    }
}
