//! Chunk ids and the references between chunks.

use crate::ids::{ChunkId, ChunkKind};

use super::FormatError;
use super::cursor::Decoder;

/// Bytes of one encoded [`Reference`].
pub const REFERENCE_BYTES: usize = 1 + ChunkId::LEN;

/// A tree chunk's visible pointer to another chunk: `kind u8 ‖ id 32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reference {
    /// What the child holds.
    pub kind: ChunkKind,
    /// The child.
    pub id: ChunkId,
}

impl Reference {
    /// A reference to a piece of file content.
    pub fn data(id: ChunkId) -> Self {
        Self { kind: ChunkKind::Data, id }
    }

    /// A reference to a tree node.
    pub fn tree(id: ChunkId) -> Self {
        Self { kind: ChunkKind::Tree, id }
    }

    /// Appends the 33 encoded bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.push(self.kind as u8);
        out.extend_from_slice(self.id.as_bytes());
    }

    /// Reads the 33 encoded bytes.
    pub fn decode(decoder: &mut Decoder<'_>) -> Result<Self, FormatError> {
        let kind = ChunkKind::from_byte(decoder.u8()?).ok_or_else(|| decoder.invalid("unknown chunk kind"))?;
        Ok(Self { kind, id: ChunkId(decoder.array()?) })
    }
}

/// The id of a chunk: keyed BLAKE3-256, of data chunks over the plaintext under `key`, of tree chunks over
/// `plaintext ‖ references ‖ count u32` under a key of their own.
///
/// `key` is the repository's id key (32 bytes), so that ids say nothing to who does not hold it and nothing across
/// repositories. Data chunks have no references. Nothing stands before the content: the hash function works on many
/// pieces of it at once only if it gets them all in one call, and ids are what every byte of a backup goes through.
pub fn chunk_id(key: &[u8; 32], kind: ChunkKind, plaintext: &[u8], references: &[Reference]) -> ChunkId {
    let hash = match kind {
        ChunkKind::Data => blake3::keyed_hash(key, plaintext),
        ChunkKind::Tree => {
            let mut whole = Vec::with_capacity(plaintext.len() + references.len() * REFERENCE_BYTES + 4);
            whole.extend_from_slice(plaintext);
            for reference in references {
                reference.encode(&mut whole);
            }
            whole.extend_from_slice(&u32::try_from(references.len()).unwrap_or(u32::MAX).to_le_bytes());
            blake3::keyed_hash(&blake3::derive_key("strandline 1 ids of tree chunks", key), &whole)
        }
    };
    ChunkId(*hash.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    // The example of docs/FORMAT.md.
    #[test]
    fn the_documented_example() {
        let id = chunk_id(&[0x11; 32], ChunkKind::Data, b"hello", &[]);
        assert_eq!(id.to_string(), "1250c6a1515017346f87e90124582e7b890e8a5c3b03cfad26ffb0b6c5c68b55");
    }

    #[test]
    fn kind_key_content_and_references_all_change_the_id() {
        let key = [1; 32];
        let child = Reference::data(ChunkId([9; 32]));
        let ids = [
            chunk_id(&key, ChunkKind::Data, b"a", &[]),
            chunk_id(&key, ChunkKind::Tree, b"a", &[]),
            chunk_id(&key, ChunkKind::Tree, b"a", &[child]),
            chunk_id(&key, ChunkKind::Tree, b"a", &[Reference::tree(child.id)]),
            chunk_id(&[2; 32], ChunkKind::Data, b"a", &[]),
            chunk_id(&key, ChunkKind::Data, b"b", &[]),
        ];
        for (i, a) in ids.iter().enumerate() {
            assert!(ids.iter().skip(i + 1).all(|b| a != b));
        }
    }
}
