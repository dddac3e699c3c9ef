//! What the holder of a key may ask beyond backing up and restoring: operations that change what a repository keeps.
//!
//! An operation travels encoded inside [`Manage`], with a proof of the writer key over exactly those bytes, so that a
//! server need not trust the connection alone. All but [`Operation::ReportDamage`] and the two that only look need the full
//! capability.

use serde::{Deserialize, Serialize};
use serde_bytes::ByteBuf;

use super::{WireError, codec};
use crate::ids::{AgentId, DomainId, RepositoryName, SnapshotId};
use crate::limits;

/// Asks for an operation on a repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manage {
    /// The repository.
    pub repository: RepositoryName,
    /// The writer certificate (97 bytes, `format::keys`).
    pub writer: ByteBuf,
    /// Ed25519 signature (64 bytes) of the writer key over `manage_proof(server nonce, repository id, operation)`.
    pub proof: ByteBuf,
    /// An encoded [`Operation`].
    pub operation: ByteBuf,
}

/// Answer to [`Manage`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Managed {
    /// What it came to.
    pub outcome: Outcome,
}

/// An operation on a repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Operation {
    /// Deletes snapshots; each can be brought back for the repository's undelete time.
    DeleteSnapshots {
        /// Their ids, 32 bytes each.
        snapshots: ByteBuf,
        /// Why, for people.
        reason: String,
    },
    /// Brings deleted snapshots back.
    UndeleteSnapshots {
        /// Their ids, 32 bytes each.
        snapshots: ByteBuf,
    },
    /// Keeps snapshots from being deleted by anybody, or no longer.
    ProtectSnapshots {
        /// Their ids, 32 bytes each.
        snapshots: ByteBuf,
        /// Whether they are protected from now on.
        protected: bool,
    },
    /// Replaces the tags of a snapshot.
    TagSnapshot(SnapshotTags),
    /// Adds a key slot.
    AddSlot {
        /// The slot, encoded (`format::keys`).
        slot: ByteBuf,
    },
    /// Removes a key slot; the last one stays.
    RemoveSlot {
        /// Its id.
        slot: [u8; 16],
    },
    /// Blocks came out wrong although their digests are right: they are withdrawn.
    ReportDamage {
        /// A snapshot that needs them: its writer domain is meant.
        snapshot: SnapshotId,
        /// Pairs of chunk id and digest of the block that held it, 64 bytes each.
        blocks: ByteBuf,
    },
    /// Looks for what nothing refers to any more and frees it.
    CollectGarbage {
        /// Only tell what would be freed.
        dry_run: bool,
        /// Purge what was deleted, without waiting for the undelete time. Only of a repository in a local directory.
        purge: bool,
    },
    /// Reads blocks again and compares their digests.
    Scrub {
        /// Which.
        subset: ScrubSubset,
    },
    /// The blocks that the last collection found partly dead, those that waste most first.
    ListPartlyDead {
        /// So many of them are known already.
        skip: u32,
        /// At most so many.
        limit: u32,
    },
    /// The chunks of these blocks that are needed have been stored again: the blocks need not be kept for them.
    Supersede {
        /// Pairs of pack `u32` and offset `u32`, little endian.
        blocks: ByteBuf,
    },
}

/// The tags of a snapshot, replaced and signed by a holder of the full capability.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotTags {
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// Its tags from now on, ascending.
    pub tags: Vec<String>,
    /// When, ns since 1970, by the agent's clock.
    pub at_ns: i64,
    /// The writer certificate of whoever signed (97 bytes).
    pub writer: ByteBuf,
    /// Ed25519 signature (64 bytes) over `snapshot_tags_signed_part` (`format::keys`).
    pub signature: ByteBuf,
}

/// Which blocks a scrub reads; always those first whose last verification is longest ago.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ScrubSubset {
    /// All.
    All,
    /// The `part`-th of `of` parts of equal size, counted from 1; all parts together are all blocks.
    Part {
        /// Which.
        part: u32,
        /// Of how many.
        of: u32,
    },
    /// So many thousandths of all stored bytes.
    Share {
        /// Thousandths, 1 to 1,000.
        permille: u32,
    },
    /// About so many bytes.
    Bytes {
        /// Bytes.
        bytes: u64,
    },
}

/// What an operation came to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// Done.
    Done,
    /// These snapshots were left as they were; all others are done.
    Kept {
        /// Which, and why.
        kept: Vec<KeptSnapshot>,
    },
    /// What the collection found and did.
    Collected(GcReport),
    /// What the scrub found.
    Scrubbed(ScrubReport),
    /// The blocks that are partly dead.
    PartlyDead {
        /// A page of them.
        blocks: Vec<PartlyDeadBlock>,
    },
}

/// A snapshot that an operation left as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeptSnapshot {
    /// Which.
    pub snapshot: SnapshotId,
    /// Why, for people.
    pub reason: String,
}

/// What a garbage collection found and did. Bytes are those of blocks on disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GcReport {
    /// Only looked.
    pub dry_run: bool,
    /// Snapshots whose trees were walked.
    pub snapshots: u64,
    /// Deleted snapshots whose time was over and that are gone now.
    pub purged: u64,
    /// Distinct chunks that are needed.
    pub chunks_needed: u64,
    /// Chunks in blocks, copies counted.
    pub chunks_stored: u64,
    /// Blocks that nothing needs, found now.
    pub blocks_condemned: u64,
    /// Their bytes.
    pub bytes_condemned: u64,
    /// Condemned blocks that are needed again.
    pub blocks_revived: u64,
    /// Blocks freed now.
    pub blocks_freed: u64,
    /// Their bytes.
    pub bytes_freed: u64,
    /// Condemned blocks that wait for sessions to end that may rely on them.
    pub blocks_waiting: u64,
    /// Their bytes.
    pub bytes_waiting: u64,
    /// Blocks moved out of packs that were nearly empty.
    pub blocks_moved: u64,
    /// Packs removed.
    pub packs_dropped: u64,
    /// Blocks that hold both needed and unneeded chunks.
    pub blocks_partly_dead: u64,
    /// Their bytes.
    pub bytes_partly_dead: u64,
    /// The unneeded chunks' share of those bytes, estimated by their number.
    pub bytes_pinned: u64,
    /// Bytes of blocks that are needed, whole or in part.
    pub bytes_live: u64,
    /// Uncommitted blocks that are kept because their sessions may still come back.
    pub blocks_young: u64,
}

/// What a scrub found.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubReport {
    /// Blocks read.
    pub blocks: u64,
    /// Bytes read.
    pub bytes: u64,
    /// Blocks withdrawn now, and headers and footers that are damaged, for people; at most `limits::DAMAGE_ROWS_MAX`.
    pub damaged: Vec<String>,
    /// How many were withdrawn now.
    pub damaged_blocks: u64,
    /// Packs whose header or footer is damaged; their blocks are found without.
    pub damaged_packs: u64,
    /// Blocks that had been withdrawn before.
    pub withdrawn_before: u64,
    /// Snapshots that cannot be restored completely, now or since earlier; at most `limits::DAMAGE_ROWS_MAX`.
    pub affected: Vec<SnapshotId>,
    /// When the least recently verified block was verified, ns since 1970; zero if one never was.
    pub oldest_ns: i64,
}

/// A block that holds both needed and unneeded chunks.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartlyDeadBlock {
    /// Its pack.
    pub pack: u32,
    /// Where it begins there.
    pub offset: u32,
    /// Its length, bytes.
    pub bytes: u32,
    /// All its chunks.
    pub chunks: u32,
    /// Whose it is.
    pub domain: DomainId,
    /// The needed chunks, 32 bytes each.
    pub needed: ByteBuf,
}

/// A deletion that can still be taken back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Deletion {
    /// When, ns since 1970, by the server's clock.
    pub deleted_ns: i64,
    /// From when on it is final, ns since 1970.
    pub final_ns: i64,
    /// The agent that asked; zero if the server's own policy or its administrator did.
    pub agent: AgentId,
    /// Why, for people.
    pub reason: String,
}

impl Operation {
    /// The bytes that are signed and sent.
    pub fn encode(&self) -> Result<Vec<u8>, WireError> {
        let mut out = Vec::new();
        codec::encode("operation", self, &mut out)?;
        Ok(out)
    }

    /// From those bytes; lists and texts are within their limits.
    pub fn decode(bytes: &[u8]) -> Result<Self, WireError> {
        let operation: Self = codec::decode("operation", bytes)?;
        let within = |part: &str, found: usize, max: usize| {
            if found <= max {
                Ok(())
            } else {
                Err(WireError::Malformed { what: "operation", why: format!("{part} exceeds its limit") })
            }
        };
        let rows = |part: &str, bytes: &[u8], row: usize, max: usize| {
            let odd = usize::from(!bytes.len().is_multiple_of(row));
            within(part, (bytes.len() / row).saturating_add(odd * max.saturating_add(1)), max)
        };
        match &operation {
            Self::DeleteSnapshots { snapshots, reason } => {
                within("the reason", reason.len(), limits::TEXT_BYTES_MAX)?;
                rows("the list of snapshots", snapshots, SnapshotId::LEN, limits::MANAGED_SNAPSHOTS_MAX)?;
            }
            Self::UndeleteSnapshots { snapshots } | Self::ProtectSnapshots { snapshots, .. } => {
                rows("the list of snapshots", snapshots, SnapshotId::LEN, limits::MANAGED_SNAPSHOTS_MAX)?;
            }
            Self::TagSnapshot(tags) => {
                within("the list of tags", tags.tags.len(), limits::TAGS_MAX)?;
                tags.tags.iter().try_for_each(|tag| within("a tag", tag.len(), limits::TAG_BYTES_MAX))?;
            }
            Self::AddSlot { slot } => within("the key slot", slot.len(), limits::KEY_SLOT_BYTES_MAX)?,
            Self::ReportDamage { blocks, .. } => rows("the list of blocks", blocks, 64, limits::MANAGED_BLOCKS_MAX)?,
            Self::Supersede { blocks } => rows("the list of blocks", blocks, 8, limits::MANAGED_BLOCKS_MAX)?,
            Self::RemoveSlot { .. }
            | Self::CollectGarbage { .. }
            | Self::Scrub { .. }
            | Self::ListPartlyDead { .. } => {}
        }
        Ok(operation)
    }
}

/// Splits a byte string of snapshot ids; what is left over at its end is ignored ([`Operation::decode`] allows none).
pub fn split_snapshots(bytes: &[u8]) -> Vec<SnapshotId> {
    let (ids, _) = bytes.as_chunks::<32>();
    ids.iter().copied().map(SnapshotId).collect()
}

/// Joins snapshot ids into one byte string.
pub fn join_snapshots<'a>(ids: impl IntoIterator<Item = &'a SnapshotId>) -> ByteBuf {
    ByteBuf::from(ids.into_iter().flat_map(|id| *id.as_bytes()).collect::<Vec<u8>>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_read_back() {
        let operations = [
            Operation::DeleteSnapshots { snapshots: join_snapshots(&[SnapshotId([7; 32])]), reason: "old".into() },
            Operation::RemoveSlot { slot: [3; 16] },
            Operation::Scrub { subset: ScrubSubset::Part { part: 1, of: 7 } },
        ];
        for operation in operations {
            assert_eq!(Operation::decode(&operation.encode().unwrap()).unwrap(), operation);
        }
    }

    #[test]
    fn s43_lists_beyond_their_limits_and_odd_lengths_are_refused() {
        let ids = |bytes: usize| Operation::UndeleteSnapshots { snapshots: ByteBuf::from(vec![0; bytes]) };
        let decoded = |operation: Operation| Operation::decode(&operation.encode().unwrap());
        assert!(decoded(ids(32 * limits::MANAGED_SNAPSHOTS_MAX)).is_ok());
        assert!(decoded(ids(32 * (limits::MANAGED_SNAPSHOTS_MAX + 1))).is_err());
        assert!(decoded(ids(33)).is_err());
        assert!(decoded(Operation::Supersede { blocks: ByteBuf::from(vec![0; 7]) }).is_err());
    }
}
