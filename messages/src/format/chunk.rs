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

/// The id of a chunk: keyed BLAKE3-256 over `kind u8 ‖ length u64 ‖ plaintext ‖ count u32 ‖ references`.
///
/// `key` is the repository's id key (32 bytes), so that ids say nothing to who does not hold it and nothing across
/// repositories. Data chunks have no references.
pub fn chunk_id(key: &[u8; 32], kind: ChunkKind, plaintext: &[u8], references: &[Reference]) -> ChunkId {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(&[kind as u8]);
    hasher.update(&(plaintext.len() as u64).to_le_bytes());
    hasher.update(plaintext);
    hasher.update(&u32::try_from(references.len()).unwrap_or(u32::MAX).to_le_bytes());
    if !references.is_empty() {
        let mut encoded = Vec::with_capacity(references.len() * REFERENCE_BYTES);
        for reference in references {
            reference.encode(&mut encoded);
        }
        hasher.update(&encoded);
    }
    ChunkId(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

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
