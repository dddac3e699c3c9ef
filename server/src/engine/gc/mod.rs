//! Collecting garbage: keyless, while backups run (DESIGN 7).
//!
//! 1. Deleted snapshots whose time is over are purged, and what earlier collections condemned is freed if its time has come.
//! 2. The open packs are sealed, so that the inventory holds every block that can be garbage.
//! 3. Everything that a snapshot needs is marked; deleted snapshots that can still be brought back are walked like others.
//! 4. The complete flags of trees that nothing needs fall, and blocks that nothing needs are condemned, in batches. A batch is
//!    published only if no commit was counted that the marks have not seen; else that commit is marked, and the batch is tried
//!    again. Flags that sessions set in the meantime fall with the batch.
//! 5. Condemned blocks on which no open session can rely are freed; packs that are dead are removed; packs that are nearly dead
//!    are emptied.
//!
//! A crash at any point leaves blocks live, condemned or freeing; the next collection starts over and finishes them. Memory:
//! see `inventory` and `mark`; never an id for each chunk.

mod compact;
mod free;
pub(crate) mod inventory;
mod mark;

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use strandline_actors::runtime::clock;
use strandline_messages::format::block::BlockView;
use strandline_messages::wire::manage::GcReport;
use strandline_messages::{ChunkId, ChunkKind, DomainId, limits};

use super::known::BlockState;
use super::state::{PackRange, Publication, State};
use super::{EngineError, Repository, blocking};
use crate::catalog::repositories::BlockPlace;
use crate::storage::StorageError;
use inventory::{Bitmap, Inventory};
use mark::Marks;

#[cfg(test)]
mod tests;

/// Most blocks that change their state in one transaction.
const BATCH_MAX: usize = 10_000;
/// Snapshots that are walked at a time; each comes with its manifest.
const ROOTS_AT_ONCE: usize = 64;
/// Trees whose flags are looked up at a time.
const FLAGS_AT_ONCE: usize = 8192;
/// How often a batch is tried again because snapshots were committed.
const ATTEMPTS_MAX: usize = 100;
/// Partly dead blocks that are remembered for resealing, about 200 bytes each.
const PARTLY_DEAD_KEPT: usize = 1 << 16;

/// What a collection does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GcOptions {
    /// Only tells what would be freed.
    pub dry_run: bool,
    /// Purges what was deleted without waiting for the undelete time.
    pub purge: bool,
}

/// A block that holds both needed and unneeded chunks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PartlyDead {
    /// Its pack.
    pub pack: u32,
    /// Where it begins there.
    pub offset: u32,
    /// Its length, bytes.
    pub bytes: u32,
    /// All its chunks.
    pub chunks: u16,
    /// Whose it is.
    pub domain: DomainId,
    /// The places of those that are needed.
    needed: Vec<u16>,
}

impl PartlyDead {
    /// Its unneeded chunks' share of its length, bytes, estimated by their number.
    fn wasted(&self) -> u64 {
        let dead = u64::from(self.chunks).saturating_sub(self.needed.len() as u64);
        u64::from(self.bytes) * dead / u64::from(self.chunks).max(1)
    }
}

/// What marking found, and up to where.
struct Marked {
    inventory: Arc<Inventory>,
    needed: Bitmap,
    condemn: Vec<BlockPlace>,
    revive: Vec<BlockPlace>,
    /// Withdrawn blocks that nothing needs any more.
    spent: Vec<BlockPlace>,
    partly_dead: Vec<PartlyDead>,
}

impl Repository {
    /// Collects garbage; see the module. One job of maintenance runs at a time: this one waits for its turn.
    pub async fn collect_garbage(&self, options: GcOptions) -> Result<GcReport, EngineError> {
        let state = &self.state;
        let _one_at_a_time = state.maintaining.lock().await;
        let mut report = GcReport { dry_run: options.dry_run, ..GcReport::default() };
        if !options.dry_run {
            report.purged = self.purge(options.purge).await?;
        }
        self.writer.seal_open().await;
        state.watch_flags();
        let collected = self.collect(options, &mut report).await;
        state.forget_flags();
        self.record_packs().await?;
        collected.map(|()| report)
    }

    async fn collect(&self, options: GcOptions, report: &mut GcReport) -> Result<(), EngineError> {
        let state = &self.state;
        let mut young = state.common.catalog.uncommitted(state.number, clock::wall_ns()).await?;
        young.extend(state.ranges_under_way());
        let young = Arc::new(by_pack(young));
        let mut seen = Seen { place: 0, commits: 0 };
        let mut marks = None;
        let marked = self.mark(&mut marks, &mut seen, &young, report).await?;
        if options.dry_run {
            return Ok(());
        }
        let mut marked = marked;
        let mut attempts = 0;
        self.unflag_unneeded(&marked).await?;
        loop {
            let batch: Vec<(BlockPlace, BlockState)> = {
                let revive = marked.revive.iter().map(|&place| (place, BlockState::Live));
                let condemn = marked.condemn.iter().map(|&place| (place, BlockState::Condemned { epoch: 0 }));
                revive.chain(condemn).take(BATCH_MAX).collect()
            };
            if batch.is_empty() {
                break;
            }
            let publication =
                Publication { changes: batch.clone(), unflag: Vec::new(), commits_seen: Some(seen.commits) };
            if state.publish(publication).await?.is_some() {
                let revived = batch.iter().filter(|(_, state)| *state == BlockState::Live).count();
                marked.revive.drain(..revived);
                marked.condemn.drain(..batch.len() - revived);
            } else {
                attempts += 1;
                if attempts > ATTEMPTS_MAX {
                    return Err(EngineError::Busy { attempts });
                }
                marked = self.mark(&mut marks, &mut seen, &young, report).await?;
            }
        }
        drop(marks);
        let inventory = Arc::clone(&marked.inventory);
        *state.partly_dead.lock() = std::mem::take(&mut marked.partly_dead);
        free::free(state, &inventory, &marked.spent, report).await?;
        free::drop_dead_packs(state, &inventory, report).await?;
        let percent = self.settings().await?.compact_below_percent.min(100);
        compact::compact(state, &self.writer, &inventory, percent.into(), report).await?;
        free::drop_dead_packs(state, &inventory, report).await?;
        self.count_waiting(&inventory, report).await;
        Ok(())
    }

    /// Marks the snapshots after those that were seen, and sorts the blocks by what the marks say.
    async fn mark(
        &self,
        kept: &mut Option<KeptMarks>,
        seen: &mut Seen,
        young: &Arc<HashMap<u32, Vec<PackRange>>>,
        report: &mut GcReport,
    ) -> Result<Marked, EngineError> {
        let state = &self.state;
        loop {
            let (roots, commits) = state.common.catalog.roots(state.number, seen.place, ROOTS_AT_ONCE).await?;
            let last = roots.last().map(|(place, _)| *place);
            let Some(last) = last else {
                // Nothing is after what was seen, and this is the count at that moment.
                seen.commits = commits;
                break;
            };
            let state = Arc::clone(state);
            let before = kept.take();
            let walked = blocking(move || {
                let mut marks = KeptMarks::resume(before, &state)?;
                let roots: Vec<_> = roots.into_iter().map(|(_, root)| root).collect();
                marks.walk(&state, &roots)?;
                Ok(marks)
            })
            .await?;
            *kept = Some(walked);
            seen.place = last;
        }
        let (state, young, before) = (Arc::clone(state), Arc::clone(young), kept.take());
        let (marks, marked, found) = blocking(move || {
            let marks = KeptMarks::resume(before, &state)?;
            let (marked, found) = marks.sort(&state, &young);
            Ok((marks, marked, found))
        })
        .await?;
        *kept = Some(marks);
        let GcReport { dry_run, purged, .. } = *report;
        *report = GcReport { dry_run, purged, ..found };
        Ok(marked)
    }

    /// Takes the complete flags of all trees that nothing needs: a tree that is kept only because others in its block are
    /// needed must not make anybody believe that what lies below it is there.
    async fn unflag_unneeded(&self, marked: &Marked) -> Result<(), EngineError> {
        if marked.condemn.is_empty() {
            return Ok(());
        }
        let (state, inventory, needed) =
            (Arc::clone(&self.state), Arc::clone(&marked.inventory), marked.needed.clone());
        blocking(move || {
            let mut ids: Vec<ChunkId> = Vec::new();
            for (at, pack, block) in inventory.blocks().filter(|(_, _, block)| block.kind == ChunkKind::Tree) {
                let chunks = inventory.chunks_of(at);
                let gone = matches!(
                    state.blocks.blocking_read().of(pack.number, block.offset),
                    BlockState::Freeing | BlockState::Freed | BlockState::Withdrawn
                );
                if gone || needed.count(chunks.clone()) == u64::from(block.chunks) {
                    continue;
                }
                let unneeded = |position: usize| !needed.get(chunks.start + position as u64);
                ids.extend(
                    table_ids(&state, pack.number, block.offset, block.bytes)?
                        .into_iter()
                        .enumerate()
                        .filter_map(|(position, id)| unneeded(position).then_some(id)),
                );
                if ids.len() >= FLAGS_AT_ONCE {
                    state.unflag(&std::mem::take(&mut ids))?;
                }
            }
            state.unflag(&ids)
        })
        .await
    }

    async fn count_waiting(&self, inventory: &Inventory, report: &mut GcReport) {
        let states = self.state.blocks.read().await;
        for (place, found) in states.exceptions() {
            if matches!(found, BlockState::Condemned { .. } | BlockState::Freeing) {
                report.blocks_waiting += 1;
                let block = inventory.find(place).and_then(|at| inventory.packs.get(at.pack)?.blocks.get(at.block));
                report.bytes_waiting += block.map_or(0, |block| u64::from(block.bytes));
            }
        }
    }

    /// The blocks that the last collection found partly dead and that are still there, those that waste most first, after the
    /// first `skip`, with the ids of their needed chunks; a block that is gone comes without any.
    pub async fn partly_dead(&self, skip: usize, limit: usize) -> Result<Vec<(PartlyDead, Vec<ChunkId>)>, EngineError> {
        let limit = limit.min(limits::PARTLY_DEAD_MAX);
        let superseded = self.state.superseded.lock().clone();
        let blocks: Vec<PartlyDead> = {
            let blocks = self.state.partly_dead.lock();
            let open = blocks.iter().filter(|block| !superseded.contains(&(block.pack, block.offset)));
            open.skip(skip).take(limit).cloned().collect()
        };
        let state = Arc::clone(&self.state);
        blocking(move || {
            let mut found = Vec::new();
            for block in blocks {
                let ids = table_ids(&state, block.pack, block.offset, block.bytes)?;
                let needed =
                    block.needed.iter().filter_map(|&position| ids.get(usize::from(position)).copied()).collect();
                found.push((block, needed));
            }
            Ok(found)
        })
        .await
    }

    /// The needed chunks of these blocks have been stored again: the next collection prefers the other copies. Only blocks that
    /// the last collection found partly dead are taken.
    pub async fn supersede(&self, blocks: impl IntoIterator<Item = BlockPlace>) -> Result<(), EngineError> {
        let wanted: HashSet<BlockPlace> = blocks.into_iter().collect();
        let known: Vec<(DomainId, BlockPlace, u32)> = {
            let partly_dead = self.state.partly_dead.lock();
            let place = |block: &PartlyDead| (block.domain, (block.pack, block.offset), block.bytes);
            partly_dead.iter().map(place).filter(|(_, place, _)| wanted.contains(place)).collect()
        };
        for (domain, place, bytes) in &known {
            compact::carry_flags(&self.state, *domain, vec![(*place, *bytes)]).await?;
        }
        // As many as are remembered as partly dead; the next process begins without.
        self.state.superseded.lock().extend(known.into_iter().map(|(_, place, _)| place));
        Ok(())
    }
}

/// Up to which commit the marks have seen everything.
struct Seen {
    place: u64,
    commits: u64,
}

/// Marks between two walks, without their borrow of the state.
struct KeptMarks {
    inventory: Arc<Inventory>,
    parts: mark::Parts,
}

impl KeptMarks {
    fn resume(before: Option<Self>, state: &State) -> Result<Self, EngineError> {
        if let Some(marks) = before {
            return Ok(marks);
        }
        let inventory = Arc::new(Inventory::take(state)?);
        let parts = mark::Parts::new(&inventory, state);
        Ok(Self { inventory, parts })
    }

    fn walk(&mut self, state: &State, roots: &[crate::catalog::snapshots::RootRow]) -> Result<(), EngineError> {
        Marks::new(state, &self.inventory, &mut self.parts).walk(roots)
    }

    /// What becomes of each block, and the numbers for people.
    fn sort(&self, state: &State, young: &HashMap<u32, Vec<PackRange>>) -> (Marked, GcReport) {
        let parts = &self.parts;
        let mut report = GcReport {
            snapshots: parts.snapshots,
            chunks_needed: parts.count(),
            chunks_stored: self.inventory.chunks,
            ..GcReport::default()
        };
        let (mut condemn, mut revive, mut spent, mut partly_dead) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let states = state.blocks.blocking_read();
        for (at, pack, block) in self.inventory.blocks() {
            let place = (pack.number, block.offset);
            let chunks = self.inventory.chunks_of(at);
            let needed = parts.needed.count(chunks.clone());
            let bytes = u64::from(block.bytes);
            match (states.of(place.0, place.1), needed) {
                (BlockState::Freeing | BlockState::Freed, _) | (BlockState::Condemned { .. }, 0) => continue,
                (BlockState::Withdrawn, _) => {
                    if !parts.wanted.contains(&place) {
                        spent.push(place);
                    }
                    continue;
                }
                (BlockState::Condemned { .. }, _) => {
                    report.blocks_revived += 1;
                    revive.push(place);
                }
                (BlockState::Live, 0) if is_young(young, place) => {
                    report.blocks_young += 1;
                    continue;
                }
                (BlockState::Live, 0) => {
                    report.blocks_condemned += 1;
                    report.bytes_condemned += bytes;
                    condemn.push(place);
                    continue;
                }
                (BlockState::Live, _) => {}
            }
            report.bytes_live += bytes;
            if needed < u64::from(block.chunks) && !is_young(young, place) {
                let positions =
                    (0..block.chunks).filter(|&position| parts.needed.get(chunks.start + u64::from(position)));
                let block = PartlyDead {
                    pack: pack.number,
                    offset: block.offset,
                    bytes: block.bytes,
                    chunks: block.chunks,
                    domain: pack.domain,
                    needed: positions.collect(),
                };
                report.blocks_partly_dead += 1;
                report.bytes_partly_dead += bytes;
                report.bytes_pinned += block.wasted();
                partly_dead.push(block);
                if partly_dead.len() >= 2 * PARTLY_DEAD_KEPT {
                    keep_worst(&mut partly_dead);
                }
            }
        }
        keep_worst(&mut partly_dead);
        let (inventory, needed) = (Arc::clone(&self.inventory), parts.needed.clone());
        (Marked { inventory, needed, condemn, revive, spent, partly_dead }, report)
    }
}

fn keep_worst(blocks: &mut Vec<PartlyDead>) {
    blocks.sort_by_key(|block| std::cmp::Reverse(block.wasted()));
    blocks.truncate(PARTLY_DEAD_KEPT);
}

fn by_pack(ranges: Vec<PackRange>) -> HashMap<u32, Vec<PackRange>> {
    let mut by_pack = HashMap::<u32, Vec<PackRange>>::new();
    for range in ranges {
        by_pack.entry(range.pack).or_default().push(range);
    }
    by_pack
}

fn is_young(young: &HashMap<u32, Vec<PackRange>>, (pack, offset): BlockPlace) -> bool {
    young.get(&pack).is_some_and(|ranges| ranges.iter().any(|range| (range.start..range.end).contains(&offset)))
}

/// The ids in a block's table, its digest compared; none if it is damaged (scrubbing finds it and withdraws it) or gone.
pub(super) fn table_ids(state: &State, pack: u32, offset: u32, bytes: u32) -> Result<Vec<ChunkId>, EngineError> {
    if state.stopping.load(Ordering::Relaxed) {
        return Err(EngineError::Stopping);
    }
    let block = match state.reader.read_block(pack, offset, bytes) {
        Err(StorageError::Damaged { .. } | StorageError::Gone { .. }) => return Ok(Vec::new()),
        other => other?,
    };
    let rows = BlockView::parse(&block).and_then(|view| view.rows().map(|row| row.map(|row| row.id)).collect());
    Ok(rows.unwrap_or_default())
}
