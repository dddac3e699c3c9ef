//! One entry of the index: one copy of one chunk, 48 bytes.
//!
//! `id 32 · pack u32 · offset u32 · (block length u24 | flags u8) u32 · position u16 · domain u16`, little endian.

use bytes::BufMut;
use strandline_messages::{ChunkId, ChunkKind};

/// Bytes of one encoded entry.
pub const ENTRY_BYTES: usize = 48;
const TREE: u32 = 1;
const COMPLETE: u32 = 2;

/// A copy of a chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Copy {
    /// The pack.
    pub pack: u32,
    /// Where the block begins in it.
    pub offset: u32,
    /// The block's length (at most 16 MiB).
    pub bytes: u32,
    /// The chunk's place in the block.
    pub position: u16,
    /// Data or tree.
    pub kind: ChunkKind,
    /// Tree: everything that it refers to was known when this was set. Never set on data.
    pub complete: bool,
}

/// A copy with its chunk and domain number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The chunk.
    pub id: ChunkId,
    /// The domain, by its number in the index's manifest.
    pub domain: u16,
    /// The copy.
    pub copy: Copy,
}

impl Entry {
    /// What tells two copies apart, and the order of entries in a segment.
    pub fn key(&self) -> (ChunkId, u16, u32, u32) {
        (self.id, self.domain, self.copy.pack, self.copy.offset)
    }

    /// The 48 bytes.
    pub fn encode(&self) -> [u8; ENTRY_BYTES] {
        let copy = &self.copy;
        let flags = u32::from(copy.kind == ChunkKind::Tree) * TREE + u32::from(copy.complete) * COMPLETE;
        let mut out = [0; ENTRY_BYTES];
        let mut rest = out.as_mut_slice();
        let fields: [&[u8]; 6] = [
            self.id.as_bytes(),
            &copy.pack.to_le_bytes(),
            &copy.offset.to_le_bytes(),
            &((copy.bytes << 8) | flags).to_le_bytes(),
            &copy.position.to_le_bytes(),
            &self.domain.to_le_bytes(),
        ];
        for field in fields {
            // Together they are exactly as long as an entry.
            rest.put_slice(field);
        }
        out
    }

    /// From its 48 bytes; every pattern is an entry.
    pub fn decode(bytes: &[u8; ENTRY_BYTES]) -> Self {
        let (id, rest) = split::<32>(bytes);
        let (pack, rest) = split::<4>(rest);
        let (offset, rest) = split::<4>(rest);
        let (packed, rest) = split::<4>(rest);
        let (position, rest) = split::<2>(rest);
        let (domain, _) = split::<2>(rest);
        let packed = u32::from_le_bytes(packed);
        let kind = if packed & TREE == 0 { ChunkKind::Data } else { ChunkKind::Tree };
        let copy = Copy {
            pack: u32::from_le_bytes(pack),
            offset: u32::from_le_bytes(offset),
            bytes: packed >> 8,
            position: u16::from_le_bytes(position),
            kind,
            complete: packed & COMPLETE != 0,
        };
        Self { id: ChunkId(id), domain: u16::from_le_bytes(domain), copy }
    }
}

fn split<const N: usize>(bytes: &[u8]) -> ([u8; N], &[u8]) {
    match bytes.split_first_chunk() {
        Some((head, tail)) => (*head, tail),
        None => ([0; N], &[]),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_entry_reads_back(id: [u8; 32], domain: u16, pack: u32, offset: u32, bytes in 0u32..1 << 24, position: u16, tree: bool, complete: bool) {
            let kind = if tree { ChunkKind::Tree } else { ChunkKind::Data };
            let entry = Entry { id: ChunkId(id), domain, copy: Copy { pack, offset, bytes, position, kind, complete } };
            prop_assert_eq!(Entry::decode(&entry.encode()), entry);
        }
    }
}
