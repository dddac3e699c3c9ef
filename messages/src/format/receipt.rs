//! The receipt: the server's signed statement of when, and in which order, it committed a snapshot.
//!
//! `magic "STRRCPT\0" · version u16 = 1 · repository 16 · snapshot 32 · order u64 · committed i64 ns · agent 16 ·
//! server public key 32 (Ed25519) · signature 64 over everything before it`

use crate::ids::{AgentId, RepositoryId, SnapshotId};

use super::FormatError;
use super::cursor::{Decoder, Encoder};

/// First bytes of a receipt.
pub const RECEIPT_MAGIC: [u8; 8] = *b"STRRCPT\0";
/// Version that this module encodes.
pub const RECEIPT_VERSION: u16 = 1;

/// A decoded receipt.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReceiptV1 {
    /// The repository.
    pub repository: RepositoryId,
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// Its place in the repository's order of commits, from 1.
    pub order: u64,
    /// When, ns since 1970 by the server's clock.
    pub committed_ns: i64,
    /// The machine whose certificate committed it.
    pub agent: AgentId,
    /// The server's Ed25519 public key.
    pub server_key: [u8; 32],
    /// The server's signature.
    pub signature: [u8; 64],
}

impl ReceiptV1 {
    /// Everything that the signature covers.
    pub fn encode_signed_part(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(192);
        out.extend_from_slice(&RECEIPT_MAGIC);
        out.put_u16(RECEIPT_VERSION);
        out.extend_from_slice(self.repository.as_bytes());
        out.extend_from_slice(self.snapshot.as_bytes());
        out.put_u64(self.order);
        out.put_i64(self.committed_ns);
        out.extend_from_slice(self.agent.as_bytes());
        out.extend_from_slice(&self.server_key);
        out
    }

    /// The receipt's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.encode_signed_part();
        out.extend_from_slice(&self.signature);
        out
    }

    /// Reads a receipt. Does not check its signature.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut decoder = Decoder::new(bytes, "receipt");
        decoder.magic(&RECEIPT_MAGIC)?;
        decoder.version(RECEIPT_VERSION)?;
        let receipt = Self {
            repository: RepositoryId(decoder.array()?),
            snapshot: SnapshotId(decoder.array()?),
            order: decoder.u64()?,
            committed_ns: decoder.i64()?,
            agent: AgentId(decoder.array()?),
            server_key: decoder.array()?,
            signature: decoder.array()?,
        };
        decoder.finish()?;
        Ok(receipt)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_receipt_reads_back() {
        let receipt = ReceiptV1 {
            repository: RepositoryId([1; 16]),
            snapshot: SnapshotId([2; 32]),
            order: 3,
            committed_ns: 4,
            agent: AgentId([5; 16]),
            server_key: [6; 32],
            signature: [7; 64],
        };
        assert_eq!(ReceiptV1::decode(&receipt.encode()).unwrap(), receipt);
    }
}
