//! Withdrawing what is damaged, so that it heals: its chunks are no longer known, the complete flags of all trees above them
//! fall, and the next backup that needs them sends them again.
//!
//! Finding what lies above passes over all tree blocks in the order of their storing, in which parents come after children,
//! until nothing new is found. Memory: the ids of the damaged chunks and of the trees above them.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use strandline_messages::format::block::{BlockView, ChunkRow};
use strandline_messages::format::manifest::ManifestV1;
use strandline_messages::{BlockDigest, ChunkId, ChunkKind, DomainId, SnapshotId};

use super::completeness::{Checked, Walk};
use super::gc::inventory::Inventory;
use super::known::BlockState;
use super::state::{Publication, State};
use super::{EngineError, Repository, blocking};
use crate::catalog::repositories::BlockPlace;
use crate::index::COPIES_MAX;
use crate::storage::StorageError;

/// Snapshots that are looked at together.
const ROOTS_AT_ONCE: usize = 64;

impl Repository {
    /// Withdraws the blocks that hold these chunks under these digests: a key holder found them wrong although their digests
    /// are right. How many blocks were withdrawn.
    pub async fn report_damage(
        &self,
        domain: DomainId,
        found_wrong: Vec<(ChunkId, BlockDigest)>,
    ) -> Result<u64, EngineError> {
        let _one_at_a_time = self.state.maintaining.lock().await;
        let state = Arc::clone(&self.state);
        let blocks = blocking(move || {
            let ids: Vec<ChunkId> = found_wrong.iter().map(|(id, _)| *id).collect();
            let found = state.index.find(domain, &ids)?;
            let mut blocks = HashSet::new();
            for (at, (_, digest)) in found_wrong.iter().enumerate() {
                for copy in found.copies(at).take(COPIES_MAX) {
                    let block = state.reader.read_block(copy.pack, copy.offset, copy.bytes);
                    let named = block
                        .is_ok_and(|block| BlockView::parse(&block).is_ok_and(|view| view.stored_digest() == *digest));
                    if named {
                        blocks.insert((copy.pack, copy.offset));
                    }
                }
            }
            Ok(blocks)
        })
        .await?;
        let blocks: Vec<BlockPlace> = blocks.into_iter().collect();
        self.withdraw(&blocks).await
    }

    /// Withdraws blocks that are live or condemned; how many. The caller holds the turn of maintenance.
    pub(super) async fn withdraw(&self, blocks: &[BlockPlace]) -> Result<u64, EngineError> {
        let state = &self.state;
        let blocks: Vec<BlockPlace> = {
            let states = state.blocks.read().await;
            let counts = |place: &&BlockPlace| {
                matches!(states.of(place.0, place.1), BlockState::Live | BlockState::Condemned { .. })
            };
            blocks.iter().filter(counts).copied().collect()
        };
        if blocks.is_empty() {
            return Ok(0);
        }
        self.writer.seal_open().await;
        state.watch_flags();
        let withdrawn = self.publish_withdrawal(&blocks).await;
        state.forget_flags();
        withdrawn?;
        for (pack, offset) in &blocks {
            tracing::error!(pack, offset, "a damaged block was withdrawn; the next backup of its data stores it again");
        }
        Ok(blocks.len() as u64)
    }

    async fn publish_withdrawal(&self, blocks: &[BlockPlace]) -> Result<(), EngineError> {
        let unflag = {
            let (state, blocks) = (Arc::clone(&self.state), blocks.to_vec());
            blocking(move || {
                let inventory = Inventory::take(&state)?;
                let damaged = chunks_of(&state, &inventory, &blocks)?;
                above(&state, &inventory, damaged)
            })
            .await?
        };
        let changes = blocks.iter().map(|&place| (place, BlockState::Withdrawn)).collect();
        self.state.publish(Publication { changes, unflag, commits_seen: None }).await?;
        Ok(())
    }

    /// The snapshots that cannot be restored completely, deleted ones among them, at most `limit`.
    pub async fn affected_snapshots(&self, limit: usize) -> Result<Vec<SnapshotId>, EngineError> {
        let state = &self.state;
        let (mut affected, mut after) = (Vec::new(), 0);
        loop {
            let (roots, _) = state.common.catalog.roots(state.number, after, ROOTS_AT_ONCE).await?;
            let Some((last, _)) = roots.last() else { return Ok(affected) };
            after = *last;
            let state = Arc::clone(state);
            let found = blocking(move || {
                let mut found = Vec::new();
                for (_, root) in roots {
                    let Ok(manifest) = ManifestV1::decode(&root.manifest) else {
                        found.push(root.id);
                        continue;
                    };
                    let tops: Vec<ChunkId> = [manifest.root].into_iter().chain(manifest.errors).collect();
                    // Condemned blocks are as good as live ones to whom nothing is promised: epoch zero relies on all.
                    if !matches!(
                        Walk::check(&state, root.domain, Some(0), &tops)?,
                        Checked::Complete | Checked::Revive(_)
                    ) {
                        found.push(root.id);
                    }
                }
                Ok(found)
            });
            affected.extend(found.await?);
            if affected.len() >= limit {
                affected.truncate(limit);
                return Ok(affected);
            }
        }
    }
}

/// The chunks of damaged blocks: by their tables, if what stands there is what the index knows; else by a search through the
/// whole index.
fn chunks_of(state: &State, inventory: &Inventory, blocks: &[BlockPlace]) -> Result<HashSet<ChunkId>, EngineError> {
    let mut chunks = HashSet::new();
    for &(pack, offset) in blocks {
        let block = inventory.find((pack, offset)).and_then(|at| {
            let pack = inventory.packs.get(at.pack)?;
            Some((pack.domain, *pack.blocks.get(at.block)?))
        });
        let Some((domain, block)) = block else { continue };
        let table = state.reader.read_table(pack, offset).unwrap_or_default();
        let found = state.index.find(domain, &table)?;
        let here = |at: usize| found.copies(at).any(|copy| (copy.pack, copy.offset) == (pack, offset));
        if table.len() == usize::from(block.chunks) && (0..table.len()).all(here) {
            chunks.extend(table);
        } else {
            chunks.extend(state.index.chunks_at(pack, offset)?);
        }
    }
    Ok(chunks)
}

/// `damaged` and every tree from which one of them is reachable.
fn above(state: &State, inventory: &Inventory, damaged: HashSet<ChunkId>) -> Result<Vec<ChunkId>, EngineError> {
    let mut found = damaged;
    loop {
        let before = found.len();
        for (_, pack, block) in inventory.blocks().filter(|(_, _, block)| block.kind == ChunkKind::Tree) {
            if state.stopping.load(Ordering::Relaxed) {
                return Err(EngineError::Stopping);
            }
            let usable = matches!(
                state.blocks.blocking_read().of(pack.number, block.offset),
                BlockState::Live | BlockState::Condemned { .. }
            );
            if !usable {
                continue;
            }
            let bytes = match state.reader.read_block(pack.number, block.offset, block.bytes) {
                // It is damaged itself; its turn comes when it is scrubbed.
                Err(StorageError::Damaged { .. } | StorageError::Gone { .. }) => continue,
                other => other?,
            };
            let Ok(view) = BlockView::parse(&bytes) else { continue };
            // Children come before their parents in a block.
            for row in view.rows().filter_map(Result::ok) {
                let ChunkRow { id, references, .. } = row;
                if references.iter().any(|reference| found.contains(&reference.id)) {
                    found.insert(id);
                }
            }
        }
        if found.len() == before {
            return Ok(found.into_iter().collect());
        }
    }
}
