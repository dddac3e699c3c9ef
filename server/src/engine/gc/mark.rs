//! Marking: from the roots of all snapshots that are not purged through every tree chunk to every chunk that is needed.
//!
//! One copy of each needed chunk is marked: one that is marked already, else the oldest in a block that was not superseded, a
//! live one before a condemned one. Trees are expanded block by block from the newest to the oldest, because parents are
//! stored after their children: nearly all of them in one pass. Marks only grow, so snapshots that are committed meanwhile are
//! marked in addition.
//!
//! A tree that cannot be read ends the collection: what lies below it is not known, so nothing may be freed.

use std::collections::{BTreeMap, HashSet};

use bytes::Bytes;
use strandline_messages::format::block::{BlockView, ChunkRow};
use strandline_messages::format::chunk::Reference;
use strandline_messages::format::manifest::ManifestV1;
use strandline_messages::{ChunkId, ChunkKind, DomainId};

use super::super::EngineError;
use super::super::known::BlockState;
use super::super::state::State;
use super::inventory::{Bitmap, BlockIndex, Inventory};
use crate::catalog::repositories::BlockPlace;
use crate::catalog::snapshots::RootRow;
use crate::index::Copy;
use crate::storage::StorageError;

/// Most chunks in packs that were opened after the inventory was taken: what was committed in the meantime.
const NEWER_MAX: usize = 1 << 21;
/// References that are looked up at a time.
const BATCH: usize = 8192;

/// What has been marked so far.
pub(super) struct Parts {
    pub needed: Bitmap,
    /// Trees that were expanded, among those that are needed.
    expanded: Bitmap,
    pending: u64,
    /// Needed chunks in packs that are not in the inventory.
    newer: HashSet<(u32, u32, u16)>,
    /// Trees among them that wait to be expanded, with the length of their blocks.
    newer_trees: BTreeMap<(u32, u32, u16), (DomainId, u32)>,
    superseded: HashSet<BlockPlace>,
    pub snapshots: u64,
    /// Withdrawn blocks that hold the only copies of needed chunks.
    pub wanted: HashSet<BlockPlace>,
}

impl Parts {
    /// Nothing is marked.
    pub fn new(inventory: &Inventory, state: &State) -> Self {
        let (needed, expanded) = (Bitmap::new(inventory.chunks), Bitmap::new(inventory.chunks));
        let superseded = state.superseded.lock().clone();
        let (newer, newer_trees, wanted) = Default::default();
        Self { needed, expanded, pending: 0, newer, newer_trees, superseded, snapshots: 0, wanted }
    }

    /// How many distinct chunks are needed.
    pub fn count(&self) -> u64 {
        self.needed.total() + self.newer.len() as u64
    }
}

/// See the module.
pub(super) struct Marks<'a> {
    state: &'a State,
    inventory: &'a Inventory,
    parts: &'a mut Parts,
}

enum Choice {
    Marked,
    Mark(Copy),
    /// Only withdrawn copies.
    Wanted(BlockPlace),
    Missing,
}

impl<'a> Marks<'a> {
    /// Goes on marking.
    pub fn new(state: &'a State, inventory: &'a Inventory, parts: &'a mut Parts) -> Self {
        Self { state, inventory, parts }
    }

    /// Marks everything that these snapshots need.
    pub fn walk(&mut self, roots: &[RootRow]) -> Result<(), EngineError> {
        for root in roots {
            // What stands in the catalog was decoded when it was committed.
            let Ok(manifest) = ManifestV1::decode(&root.manifest) else {
                return Err(EngineError::Unwalkable {
                    reason: format!("the manifest of snapshot {} cannot be read", root.id),
                });
            };
            let references = [manifest.root].into_iter().chain(manifest.errors).map(Reference::tree).collect();
            self.mark(root.domain, references)?;
            self.parts.snapshots += 1;
        }
        self.expand()
    }

    fn mark(&mut self, domain: DomainId, mut references: Vec<Reference>) -> Result<(), EngineError> {
        references.sort_unstable_by_key(|reference| (reference.id, reference.kind));
        references.dedup();
        for batch in references.chunks(BATCH) {
            let ids: Vec<ChunkId> = batch.iter().map(|reference| reference.id).collect();
            let found = self.state.index.find(domain, &ids)?;
            for (at, reference) in batch.iter().enumerate() {
                let copies: Vec<Copy> = found.copies(at).filter(|copy| copy.kind == reference.kind).copied().collect();
                match self.choose(&copies) {
                    Choice::Marked => {}
                    Choice::Mark(copy) => self.set(domain, copy)?,
                    Choice::Wanted(place) if reference.kind == ChunkKind::Data => {
                        self.parts.wanted.insert(place);
                    }
                    // Nothing is left of it that could be freed.
                    Choice::Missing if reference.kind == ChunkKind::Data => {}
                    Choice::Wanted(_) | Choice::Missing => {
                        return Err(EngineError::Unwalkable {
                            reason: format!("directory chunk {} is damaged or missing", reference.id),
                        });
                    }
                }
            }
        }
        Ok(())
    }

    fn choose(&self, copies: &[Copy]) -> Choice {
        let states = self.state.blocks.blocking_read();
        let mut best: Option<((bool, bool, u32, u32), Copy)> = None;
        let mut wanted = None;
        for copy in copies {
            let place = (copy.pack, copy.offset);
            let condemned = match states.of(copy.pack, copy.offset) {
                BlockState::Live => false,
                BlockState::Condemned { .. } => true,
                BlockState::Withdrawn => {
                    wanted = Some(place);
                    continue;
                }
                BlockState::Freeing | BlockState::Freed => continue,
            };
            if self.is_marked(copy) {
                return Choice::Marked;
            }
            let rank = (self.parts.superseded.contains(&place), condemned, copy.pack, copy.offset);
            if best.is_none_or(|(other, _)| rank < other) {
                best = Some((rank, *copy));
            }
        }
        match (best, wanted) {
            (Some((_, copy)), _) => Choice::Mark(copy),
            (None, Some(place)) => Choice::Wanted(place),
            (None, None) => Choice::Missing,
        }
    }

    fn is_marked(&self, copy: &Copy) -> bool {
        match self.inventory.find((copy.pack, copy.offset)) {
            Some(at) => self.inventory.chunk(at, copy.position).is_some_and(|chunk| self.parts.needed.get(chunk)),
            None => self.parts.newer.contains(&(copy.pack, copy.offset, copy.position)),
        }
    }

    fn set(&mut self, domain: DomainId, copy: Copy) -> Result<(), EngineError> {
        let found = self.inventory.find((copy.pack, copy.offset));
        if let Some(chunk) = found.and_then(|at| self.inventory.chunk(at, copy.position)) {
            if self.parts.needed.set(chunk) && copy.kind == ChunkKind::Tree {
                self.parts.pending += 1;
            }
            return Ok(());
        }
        if self.parts.newer.len() >= NEWER_MAX {
            return Err(EngineError::Busy { attempts: 1 });
        }
        let place = (copy.pack, copy.offset, copy.position);
        if self.parts.newer.insert(place) && copy.kind == ChunkKind::Tree {
            self.parts.newer_trees.insert(place, (domain, copy.bytes));
        }
        Ok(())
    }

    /// Expands needed trees until none is left.
    fn expand(&mut self) -> Result<(), EngineError> {
        while self.parts.pending > 0 || !self.parts.newer_trees.is_empty() {
            while let Some(((pack, offset, position), (domain, bytes))) = self.parts.newer_trees.pop_last() {
                let rows = self.rows(pack, offset, bytes)?;
                let references = rows.into_iter().nth(position.into()).map(|row| row.references).unwrap_or_default();
                self.mark(domain, references)?;
            }
            for pack in (0..self.inventory.packs.len()).rev() {
                if self.parts.pending == 0 {
                    break;
                }
                let blocks = self.inventory.packs.get(pack).map_or(0, |pack| pack.blocks.len());
                for block in (0..blocks).rev() {
                    self.expand_block(BlockIndex { pack, block })?;
                }
            }
        }
        Ok(())
    }

    fn expand_block(&mut self, at: BlockIndex) -> Result<(), EngineError> {
        let Some(pack) = self.inventory.packs.get(at.pack) else { return Ok(()) };
        let Some(block) = pack.blocks.get(at.block).filter(|block| block.kind == ChunkKind::Tree) else {
            return Ok(());
        };
        let (number, domain, offset, bytes) = (pack.number, pack.domain, block.offset, block.bytes);
        let chunks = self.inventory.chunks_of(at);
        let waiting = |marks: &Self| -> Vec<u64> {
            chunks.clone().filter(|&chunk| marks.parts.needed.get(chunk) && !marks.parts.expanded.get(chunk)).collect()
        };
        let mut rows: Option<Vec<ChunkRow>> = None;
        loop {
            let due = waiting(self);
            if due.is_empty() {
                return Ok(());
            }
            if self.state.stopping.load(std::sync::atomic::Ordering::Relaxed) {
                return Err(EngineError::Stopping);
            }
            if rows.is_none() {
                rows = Some(self.rows(number, offset, bytes)?);
            }
            let mut references = Vec::new();
            for chunk in due {
                self.parts.expanded.set(chunk);
                self.parts.pending = self.parts.pending.saturating_sub(1);
                let position = usize::try_from(chunk - chunks.start).unwrap_or(usize::MAX);
                let row = rows.as_ref().and_then(|rows| rows.get(position));
                references.extend(row.into_iter().flat_map(|row| row.references.iter().copied()));
            }
            // Some of them may lie in this very block.
            self.mark(domain, references)?;
        }
    }

    /// The chunk table of a tree block, its digest compared.
    fn rows(&self, pack: u32, offset: u32, bytes: u32) -> Result<Vec<ChunkRow>, EngineError> {
        let unwalkable = |error: &dyn std::fmt::Display| EngineError::Unwalkable { reason: error.to_string() };
        let block: Bytes = match self.state.reader.read_block(pack, offset, bytes) {
            Err(error @ StorageError::Damaged { .. }) => return Err(unwalkable(&error)),
            other => other?,
        };
        let rows = BlockView::parse(&block).and_then(|view| view.rows().collect::<Result<Vec<_>, _>>());
        rows.map_err(|error| unwalkable(&error))
    }
}
