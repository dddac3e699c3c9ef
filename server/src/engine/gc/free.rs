//! Freeing: from condemned to gone. A block is freed only when no lease is left that may rely on it; the transaction that says
//! so comes first, then the pack's state file, synced, and only then its body's space is given back.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use strandline_messages::BlockDigest;
use strandline_messages::format::block::{BlockHeaderV1, FIXED_HEADER_BYTES};
use strandline_messages::format::pack_state::RecordedState;
use strandline_messages::wire::manage::GcReport;

use super::super::known::BlockState;
use super::super::state::State;
use super::super::{EngineError, on_own_thread};
use super::BATCH_MAX;
use super::inventory::Inventory;
use crate::catalog::repositories::BlockPlace;
use crate::failpoint;
use crate::storage::StorageError;

/// Frees every condemned block on which no open lease can rely, and finishes what an earlier run began. Only blocks of
/// `inventory`, which are in sealed packs; `replaced` are blocks of it whose chunks are all stored elsewhere, too.
pub(super) async fn free(
    state: &Arc<State>,
    inventory: &Arc<Inventory>,
    replaced: &[BlockPlace],
    report: &mut GcReport,
) -> Result<(), EngineError> {
    loop {
        if state.stopping.load(Ordering::Relaxed) {
            return Err(EngineError::Stopping);
        }
        let earliest = state.common.catalog.earliest_lease(state.number).await?;
        let due: Vec<(BlockPlace, u64)> = {
            let states = state.blocks.read().await;
            let due = states.exceptions().filter_map(|(place, found)| match found {
                BlockState::Condemned { epoch } if earliest.is_none_or(|earliest| epoch < earliest) => {
                    Some((place, epoch))
                }
                _ => None,
            });
            due.filter(|(place, _)| inventory.find(*place).is_some()).take(BATCH_MAX).collect()
        };
        let Some(epoch) = due.iter().map(|(_, epoch)| *epoch).max() else { break };
        let blocks: Vec<BlockPlace> = due.into_iter().map(|(place, _)| place).collect();
        if !begin(state, epoch, &blocks).await? {
            // A lease came in between that resumes an old one.
            break;
        }
    }
    if !replaced.is_empty() {
        begin(state, 0, replaced).await?;
    }
    let freeing: Vec<BlockPlace> = {
        let states = state.blocks.read().await;
        let freeing = states.exceptions().filter(|(_, found)| *found == BlockState::Freeing).map(|(place, _)| place);
        freeing.filter(|place| inventory.find(*place).is_some()).collect()
    };
    for batch in freeing.chunks(BATCH_MAX) {
        finish(state, inventory, batch, report).await?;
    }
    Ok(())
}

async fn begin(state: &Arc<State>, epoch: u64, blocks: &[BlockPlace]) -> Result<bool, EngineError> {
    let mut states = state.blocks.write().await;
    // What was revived while the lock was waited for is needed.
    let still = |place: &&BlockPlace| !matches!(states.of(place.0, place.1), BlockState::Live) || epoch == 0;
    let blocks: Vec<BlockPlace> = blocks.iter().filter(still).copied().collect();
    if !state.common.catalog.begin_freeing(state.number, epoch, &blocks).await? {
        return Ok(false);
    }
    states.generation += 1;
    for place in blocks {
        states.set(place, BlockState::Freeing);
    }
    Ok(true)
}

async fn finish(
    state: &Arc<State>,
    inventory: &Arc<Inventory>,
    blocks: &[BlockPlace],
    report: &mut GcReport,
) -> Result<(), EngineError> {
    let (bytes, blocks) = {
        let (state, inventory, blocks) = (Arc::clone(state), Arc::clone(inventory), blocks.to_vec());
        on_own_thread(move || {
            state.record(&blocks, RecordedState::Freed)?;
            let bytes = give_back(&state, &inventory, &blocks)?;
            Ok((bytes, blocks))
        })
        .await?
    };
    let mut states = state.blocks.write().await;
    state.common.catalog.forget_states(state.number, &blocks).await?;
    report.blocks_freed += blocks.len() as u64;
    report.bytes_freed += bytes;
    for place in blocks {
        states.set(place, BlockState::Freed);
    }
    Ok(())
}

/// Punches the bodies of `blocks` out of their packs; their length, bytes. Headers, tables and digests stay.
fn give_back(state: &State, inventory: &Inventory, blocks: &[BlockPlace]) -> Result<u64, EngineError> {
    let mut by_pack = BTreeMap::<u32, Vec<u32>>::new();
    for &(pack, offset) in blocks {
        by_pack.entry(pack).or_default().push(offset);
    }
    let mut total = 0;
    for (pack, offsets) in by_pack {
        let path = state.paths.pack(pack);
        let file = File::options().read(true).write(true).open(&path).map_err(StorageError::io("open", &path))?;
        for offset in offsets {
            let found = inventory.find((pack, offset));
            let pack_blocks = found.and_then(|at| inventory.packs.get(at.pack)?.blocks.get(at.block));
            let Some(block) = pack_blocks else { continue };
            total += u64::from(block.bytes);
            match punch(&file, offset, block.bytes) {
                Ok(()) => failpoint::reached("pack/punched"),
                Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                    state.punching.store(false, Ordering::Relaxed);
                }
                Err(error) => return Err(StorageError::io("free space in", &path)(error.into()).into()),
            }
        }
    }
    Ok(total)
}

fn punch(file: &File, offset: u32, bytes: u32) -> Result<(), Errno> {
    let mut fixed = [0; FIXED_HEADER_BYTES];
    let header = file.read_exact_at(&mut fixed, offset.into()).ok().and_then(|()| BlockHeaderV1::decode(&fixed).ok());
    // A header that rotted says nothing about where the body begins; then the space stays taken until the pack goes.
    let Some(header) = header.filter(|header| header.block_bytes() == bytes as usize) else { return Ok(()) };
    let start = u64::from(offset)
        + FIXED_HEADER_BYTES as u64
        + u64::from(header.wrapped_key_bytes)
        + u64::from(header.table_bytes);
    let end = u64::from(offset) + u64::from(bytes) - BlockDigest::LEN as u64;
    match end.checked_sub(start) {
        Some(length) if length > 0 => {
            fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, start, length)
        }
        _ => Ok(()),
    }
}

/// Removes packs of which every block is freed.
pub(super) async fn drop_dead_packs(
    state: &Arc<State>,
    inventory: &Inventory,
    report: &mut GcReport,
) -> Result<(), EngineError> {
    for pack in &inventory.packs {
        let places: Vec<BlockPlace> = pack.blocks.iter().map(|block| (pack.number, block.offset)).collect();
        let dead = {
            let states = state.blocks.read().await;
            places.iter().all(|&(number, offset)| states.of(number, offset) == BlockState::Freed)
        };
        if dead && state.pack_infos().iter().any(|info| info.number == pack.number) {
            state.drop_pack(pack.number, &places).await?;
            report.packs_dropped += 1;
        }
    }
    Ok(())
}
