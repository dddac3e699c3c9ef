//! Emptying packs that are nearly dead: their live blocks are stored again as they are, which needs no key, and the old copies
//! are freed. Where the file system cannot punch holes this is the only way to give space back.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use futures_util::future::try_join_all;
use strandline_messages::format::block::BlockView;
use strandline_messages::wire::manage::GcReport;
use strandline_messages::{ChunkId, ChunkKind, DomainId, Sequence, SessionId};

use super::super::known::BlockState;
use super::super::state::State;
use super::super::{EngineError, blocking, on_own_thread};
use super::free::free;
use super::inventory::{Inventory, PackBlocks};
use crate::catalog::repositories::BlockPlace;
use crate::failpoint;
use crate::index::Copy;
use crate::storage::StorageError;
use crate::storage::pack_writer::{NewBlock, PackWriter};

/// Blocks that are read and stored at a time; at most 5 MiB each.
const MOVED_AT_ONCE: usize = 8;
/// Below which share of live bytes a pack is emptied where holes cannot be punched, percent.
const PERCENT_WITHOUT_HOLES: u64 = 50;
/// The session that moved blocks bear: none.
const NOBODY: SessionId = SessionId([0; 16]);

/// Empties the packs of `inventory` whose live bytes are less than `percent` of their blocks' bytes.
pub(super) async fn compact(
    state: &Arc<State>,
    writer: &Arc<PackWriter>,
    inventory: &Arc<Inventory>,
    percent: u64,
    report: &mut GcReport,
) -> Result<(), EngineError> {
    let percent = if state.punching.load(Ordering::Relaxed) { percent } else { percent.max(PERCENT_WITHOUT_HOLES) };
    for pack in &inventory.packs {
        let Some(live) = worth_moving(state, pack, percent).await else { continue };
        for group in live.chunks(MOVED_AT_ONCE) {
            if state.stopping.load(Ordering::Relaxed) {
                return Err(EngineError::Stopping);
            }
            try_join_all(group.iter().map(|&place| move_block(state, writer, pack, place))).await?;
            failpoint::reached("blocks/moved");
        }
        let moved = pack.blocks.iter().map(|block| ((pack.number, block.offset), block.bytes)).collect();
        carry_flags(state, pack.domain, moved).await?;
        report.blocks_moved += live.len() as u64;
        free(state, inventory, &live, report).await?;
    }
    Ok(())
}

/// The live blocks of a pack, if they are few and nothing else in it still waits.
async fn worth_moving(state: &Arc<State>, pack: &PackBlocks, percent: u64) -> Option<Vec<BlockPlace>> {
    let states = state.blocks.read().await;
    let (mut live, mut live_bytes, mut all_bytes) = (Vec::new(), 0u64, 0u64);
    for block in &pack.blocks {
        all_bytes += u64::from(block.bytes);
        match states.of(pack.number, block.offset) {
            BlockState::Live => {
                live_bytes += u64::from(block.bytes);
                live.push((pack.number, block.offset));
            }
            BlockState::Freed => {}
            BlockState::Condemned { .. } | BlockState::Freeing | BlockState::Withdrawn => return None,
        }
    }
    let worth = !live.is_empty() && live.len() < pack.blocks.len() && live_bytes * 100 < all_bytes * percent;
    worth.then_some(live)
}

async fn move_block(
    state: &Arc<State>,
    writer: &Arc<PackWriter>,
    pack: &PackBlocks,
    (number, offset): BlockPlace,
) -> Result<(), EngineError> {
    let Some(block) = pack.blocks.iter().find(|block| block.offset == offset).copied() else { return Ok(()) };
    let domain: DomainId = pack.domain;
    let new = {
        let state = Arc::clone(state);
        blocking(move || {
            let bytes = state.reader.read_block(number, offset, block.bytes)?;
            let damaged = |source| StorageError::Damaged { pack: number, offset, source };
            let view = BlockView::parse(&bytes).map_err(damaged)?;
            let ids: Result<Vec<ChunkId>, _> = view.rows().map(|row| row.map(|row| row.id)).collect();
            let (header, digest, ids) = (view.header, view.stored_digest(), ids.map_err(damaged)?);
            let sequence = Sequence(u64::from(number) << 32 | u64::from(offset));
            Ok(NewBlock { bytes: bytes.clone(), header, digest, domain, session: NOBODY, sequence, ids })
        })
        .await?
    };
    writer.store(new).await.map_err(|source| EngineError::Moving { reason: source.to_string() })?;
    Ok(())
}

/// Whether everything below a tree is known depends on the tree alone: other copies are as complete as those in the block at
/// `offset` of pack `number`. Of a block that is not live, or holds no trees, nothing is carried.
pub(super) async fn carry_flags(
    state: &Arc<State>,
    domain: DomainId,
    blocks: Vec<(BlockPlace, u32)>,
) -> Result<(), EngineError> {
    let state = Arc::clone(state);
    on_own_thread(move || {
        for ((number, offset), bytes) in blocks {
            let states = state.blocks.blocking_read();
            if states.of(number, offset) != BlockState::Live {
                continue;
            }
            let block = match state.reader.read_block(number, offset, bytes) {
                // Its pack was removed since.
                Err(StorageError::Gone { .. }) => continue,
                other => other?,
            };
            let Ok(view) = BlockView::parse(&block) else { continue };
            if view.header.kind != ChunkKind::Tree {
                continue;
            }
            let ids: Vec<ChunkId> = view.rows().filter_map(Result::ok).map(|row| row.id).collect();
            let found = state.index.find(domain, &ids)?;
            let mut flags: Vec<(ChunkId, Copy)> = Vec::new();
            for (at, id) in ids.iter().enumerate() {
                let here = |copy: &&Copy| (copy.pack, copy.offset) == (number, offset);
                let complete = found.copies(at).filter(here).any(|copy| copy.complete);
                let others = found.copies(at).filter(|copy| !here(copy) && copy.kind == ChunkKind::Tree);
                flags.extend(others.filter(|copy| complete && !copy.complete).map(|copy| (*id, *copy)));
            }
            state.flag_complete(domain, &flags)?;
        }
        Ok(())
    })
    .await
}
