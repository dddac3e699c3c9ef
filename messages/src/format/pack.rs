//! The pack of directory storage: an append-only file of blocks that all belong to one repository and one writer domain.
//!
//! ```text
//! header   96 bytes: magic "STRPACK\0" · version u16 = 1 · 6 zero bytes · repository 16 · domain 16 · number u32 ·
//!          4 zero bytes · created i64 ns · digest 32 (BLAKE3-256 of the 64 bytes before it)
//! blocks   one after another, byte for byte as they came over the wire
//! footer   when sealed: magic "STRPFOOT" · count u32 · count × (offset u32 · length u32 · kind u8 · chunks u16 · digest 32)
//! trailer  44 bytes: footer length u32 · BLAKE3-256 of the footer · magic "STRPEND\0"
//! ```

use crate::ids::{BlockDigest, ChunkKind, DomainId, RepositoryId};
use crate::limits;

use super::FormatError;
use super::cursor::{Decoder, Encoder, check_limit};

/// First bytes of a pack.
pub const PACK_MAGIC: [u8; 8] = *b"STRPACK\0";
/// First bytes of its footer.
pub const FOOTER_MAGIC: [u8; 8] = *b"STRPFOOT";
/// Last bytes of a sealed pack.
pub const END_MAGIC: [u8; 8] = *b"STRPEND\0";
/// Version that this module encodes.
pub const PACK_VERSION: u16 = 1;
/// Bytes of the header; the first block begins here.
pub const PACK_HEADER_BYTES: usize = 96;
/// Bytes of the trailer.
pub const TRAILER_BYTES: usize = 44;
const FOOTER_ENTRY_BYTES: usize = 4 + 4 + 1 + 2 + 32;

/// The header of a pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackHeaderV1 {
    /// The repository.
    pub repository: RepositoryId,
    /// The writer domain of every block in it.
    pub domain: DomainId,
    /// The pack's number in its repository, from 1.
    pub number: u32,
    /// When it was opened, ns since 1970 by the server's clock.
    pub created_ns: i64,
}

impl PackHeaderV1 {
    /// The 96 bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(PACK_HEADER_BYTES);
        out.extend_from_slice(&PACK_MAGIC);
        out.put_u16(PACK_VERSION);
        out.extend_from_slice(&[0; 6]);
        out.extend_from_slice(self.repository.as_bytes());
        out.extend_from_slice(self.domain.as_bytes());
        out.put_u32(self.number);
        out.extend_from_slice(&[0; 4]);
        out.put_i64(self.created_ns);
        let digest = blake3::hash(&out);
        out.extend_from_slice(digest.as_bytes());
        out
    }

    /// Reads the 96 bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut decoder = Decoder::new(bytes, "pack header");
        decoder.magic(&PACK_MAGIC)?;
        decoder.version(PACK_VERSION)?;
        decoder.bytes(6)?;
        let repository = RepositoryId(decoder.array()?);
        let domain = DomainId(decoder.array()?);
        let number = decoder.u32()?;
        decoder.bytes(4)?;
        let created_ns = decoder.i64()?;
        let digest: [u8; 32] = decoder.array()?;
        decoder.finish()?;
        match bytes.get(..PACK_HEADER_BYTES - 32) {
            Some(covered) if blake3::hash(covered).as_bytes() == &digest => {
                Ok(Self { repository, domain, number, created_ns })
            }
            _ => Err(FormatError::Digest { what: "pack header" }),
        }
    }
}

/// One block of a sealed pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FooterEntry {
    /// Where the block begins in the pack.
    pub offset: u32,
    /// Its length, digest included.
    pub bytes: u32,
    /// Data or tree.
    pub kind: ChunkKind,
    /// How many chunks it holds.
    pub chunks: u16,
    /// Its digest.
    pub digest: BlockDigest,
}

/// The footer of a sealed pack.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PackFooterV1 {
    /// Its blocks by ascending offset, none within another.
    pub blocks: Vec<FooterEntry>,
}

impl PackFooterV1 {
    /// Footer and trailer: everything after the last block.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(12 + self.blocks.len() * FOOTER_ENTRY_BYTES + TRAILER_BYTES);
        out.extend_from_slice(&FOOTER_MAGIC);
        out.put_u32(u32::try_from(self.blocks.len()).unwrap_or(u32::MAX));
        for block in &self.blocks {
            out.put_u32(block.offset);
            out.put_u32(block.bytes);
            out.put_u8(block.kind as u8);
            out.put_u16(block.chunks);
            out.extend_from_slice(block.digest.as_bytes());
        }
        let digest = blake3::hash(&out);
        out.put_u32(u32::try_from(out.len()).unwrap_or(u32::MAX));
        out.extend_from_slice(digest.as_bytes());
        out.extend_from_slice(&END_MAGIC);
        out
    }

    /// Reads the footer (without trailer) and checks its digest against the trailer's.
    pub fn decode(footer: &[u8], digest: &[u8; 32]) -> Result<Self, FormatError> {
        if blake3::hash(footer).as_bytes() != digest {
            return Err(FormatError::Digest { what: "pack footer" });
        }
        let mut decoder = Decoder::new(footer, "pack footer");
        decoder.magic(&FOOTER_MAGIC)?;
        let count = check_limit("blocks of a pack", decoder.u32()?.into(), limits::PACK_BLOCKS_MAX)?;
        let mut blocks = Vec::with_capacity(count.min(decoder.remaining() / FOOTER_ENTRY_BYTES));
        let mut free_from = u32::try_from(PACK_HEADER_BYTES).unwrap_or(u32::MAX);
        for _ in 0..count {
            let entry = FooterEntry {
                offset: decoder.u32()?,
                bytes: decoder.u32()?,
                kind: ChunkKind::from_byte(decoder.u8()?).ok_or_else(|| decoder.invalid("unknown block kind"))?,
                chunks: decoder.u16()?,
                digest: BlockDigest(decoder.array()?),
            };
            let end = entry.offset.checked_add(entry.bytes).filter(|_| entry.offset >= free_from);
            free_from = end.ok_or_else(|| decoder.invalid("a block lies within another, or beyond 4 GiB"))?;
            blocks.push(entry);
        }
        decoder.finish()?;
        Ok(Self { blocks })
    }
}

/// Reads a trailer (the last 44 bytes of a sealed pack): the footer's length in bytes and its digest.
pub fn decode_trailer(bytes: &[u8]) -> Result<(u32, [u8; 32]), FormatError> {
    let mut decoder = Decoder::new(bytes, "pack trailer");
    let length = decoder.u32()?;
    let digest = decoder.array()?;
    decoder.magic(&END_MAGIC)?;
    decoder.finish()?;
    Ok((length, digest))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn header_footer_and_trailer_read_back() {
        let header =
            PackHeaderV1 { repository: RepositoryId([1; 16]), domain: DomainId([2; 16]), number: 3, created_ns: -4 };
        let bytes = header.encode();
        assert_eq!(bytes.len(), PACK_HEADER_BYTES);
        assert_eq!(PackHeaderV1::decode(&bytes).unwrap(), header);

        let block = |offset| FooterEntry {
            offset,
            bytes: 1000,
            kind: ChunkKind::Tree,
            chunks: 9,
            digest: BlockDigest([7; 32]),
        };
        let footer = PackFooterV1 { blocks: vec![block(96), block(1096)] };
        let bytes = footer.encode();
        let (body, trailer) = bytes.split_at(bytes.len() - TRAILER_BYTES);
        let (length, digest) = decode_trailer(trailer).unwrap();
        assert_eq!(length as usize, body.len());
        assert_eq!(PackFooterV1::decode(body, &digest).unwrap(), footer);

        for blocks in [[block(96), block(1095)], [block(95), block(1096)], [block(96), block(u32::MAX - 999)]] {
            let bytes = PackFooterV1 { blocks: blocks.to_vec() }.encode();
            let (body, trailer) = bytes.split_at(bytes.len() - TRAILER_BYTES);
            let refused = PackFooterV1::decode(body, &decode_trailer(trailer).unwrap().1);
            assert!(matches!(refused, Err(FormatError::Invalid { .. })), "{refused:?}");
        }
    }

    #[test]
    fn every_flipped_byte_of_a_header_is_found() {
        let good = PackHeaderV1 { repository: RepositoryId([1; 16]), domain: DomainId::FULL, number: 3, created_ns: 4 }
            .encode();
        for i in 0..good.len() {
            let mut bad = good.clone();
            bad[i] ^= 1;
            assert!(PackHeaderV1::decode(&bad).is_err(), "byte {i}");
        }
    }
}
