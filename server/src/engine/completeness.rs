//! Whether everything that a snapshot refers to is known, and the complete flags that make the answer cheap.
//!
//! [`flag_trees`] passes once over the tree blocks that a session sent, in their order (children come before parents), and
//! flags every tree chunk all of whose references are known. [`Walk`] then goes down from the root through what is still not
//! flagged, and collects what is missing. Flags rest on live blocks only, and are written while the lock is held that a
//! condemnation takes, so none can rest on a block that was condemned before it.
//!
//! Bounds: one block's references (at most 1 MiB of table) at a time in the pass; in the walk [`PENDING_MAX`] and
//! [`SETTLED_MAX`] ids of 32 bytes, whatever a writer makes up.

use std::collections::{BTreeSet, HashMap, HashSet};

use strandline_messages::format::block::{BlockView, ChunkRow};
use strandline_messages::format::chunk::Reference;
use strandline_messages::{ChunkId, ChunkKind, DomainId, limits};

use super::EngineError;
use super::known::{BlockState, BlockStates, is_known, is_usable};
use super::state::{State, TreeBlock};
use crate::catalog::repositories::BlockPlace;
use crate::index::Copy;
use crate::storage::StorageError;

/// Most tree chunks that wait to be walked: siblings on the path from the root.
const PENDING_MAX: usize = 1 << 20;
/// Most tree chunks whose outcome is remembered in one walk.
const SETTLED_MAX: usize = 1 << 18;
/// Most blocks that are revived at a time.
const REVIVE_MAX: usize = 4096;

/// What a completeness check found.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Checked {
    /// Everything is known.
    Complete,
    /// These chunks are not; more may be.
    Missing { ids: Vec<ChunkId>, more: bool },
    /// Everything seen is known, but these condemned blocks must be made live before that can be relied on.
    Revive(Vec<BlockPlace>),
    /// The trees are not such as a backup makes.
    Refused(&'static str),
}

/// Flags the tree chunks of `blocks` (ascending by sequence) that are complete; returns the blocks that hold others.
pub(crate) fn flag_trees(
    state: &State,
    domain: DomainId,
    blocks: Vec<TreeBlock>,
) -> Result<Vec<TreeBlock>, EngineError> {
    let mut unfinished = Vec::new();
    for block in blocks {
        let Some(rows) = read_rows(state, block.pack, block.offset, block.bytes)? else { continue };
        let states = state.blocks.blocking_read();
        if states.of(block.pack, block.offset) == BlockState::Live && !flag_block(state, &states, domain, block, &rows)?
        {
            unfinished.push(block);
        }
    }
    Ok(unfinished)
}

/// Flags the trees of `blocks` whatever their order: passes until nothing changes.
pub(crate) fn flag_unordered_trees(
    state: &State,
    domain: DomainId,
    mut blocks: Vec<TreeBlock>,
) -> Result<(), EngineError> {
    loop {
        let before = blocks.len();
        blocks = flag_trees(state, domain, blocks)?;
        if blocks.is_empty() || blocks.len() == before {
            return Ok(());
        }
    }
}

/// Flags one block's trees; whether all of them are complete now.
fn flag_block(
    state: &State,
    states: &BlockStates,
    domain: DomainId,
    block: TreeBlock,
    rows: &[ChunkRow],
) -> Result<bool, EngineError> {
    let mut ids: Vec<ChunkId> =
        rows.iter().flat_map(|row| row.references.iter().map(|reference| reference.id)).collect();
    ids.sort_unstable();
    ids.dedup();
    let found = state.index.find(domain, &ids)?;
    // Per id: known as data, known as a tree.
    let mut known = vec![(false, false); ids.len()];
    for (at, copy) in found.rows() {
        if let Some(known) = known.get_mut(*at as usize)
            && is_known(states.copy(copy), None)
        {
            known.0 |= copy.kind == ChunkKind::Data;
            known.1 |= copy.kind == ChunkKind::Tree;
        }
    }
    let mut here: HashSet<ChunkId> = HashSet::new();
    let mut flags = Vec::new();
    for (position, row) in (0u16..).zip(rows) {
        let is_known = |reference: &Reference| {
            let place = ids.binary_search(&reference.id).ok();
            let (data, tree) = place.and_then(|place| known.get(place)).copied().unwrap_or_default();
            match reference.kind {
                ChunkKind::Data => data,
                ChunkKind::Tree => tree || here.contains(&reference.id),
            }
        };
        if row.references.iter().all(is_known) {
            here.insert(row.id);
            let (pack, offset, bytes, kind) = (block.pack, block.offset, block.bytes, ChunkKind::Tree);
            flags.push((row.id, Copy { pack, offset, bytes, position, kind, complete: true }));
        }
    }
    state.flag_complete(domain, &flags)?;
    Ok(flags.len() == rows.len())
}

/// The chunk table of a tree block; `None` if the block is damaged, which makes its chunks as good as missing, or if it was moved
/// to another pack in this moment.
fn read_rows(state: &State, pack: u32, offset: u32, bytes: u32) -> Result<Option<Vec<ChunkRow>>, EngineError> {
    let block = match state.reader.read_block(pack, offset, bytes) {
        Err(error @ StorageError::Damaged { .. }) => {
            // What was freed meanwhile reads as damaged, too.
            if state.blocks.blocking_read().of(pack, offset) == BlockState::Live {
                tracing::error!(%error, "a tree block is damaged");
            }
            return Ok(None);
        }
        Err(StorageError::Gone { .. }) => return Ok(None),
        other => other?,
    };
    // The block was parsed when its digest was compared; a failure here would be one there.
    let rows = BlockView::parse(&block).and_then(|view| view.rows().collect::<Result<Vec<_>, _>>());
    Ok(rows.ok())
}

/// Walks from the roots through all tree chunks that are not flagged complete.
pub(crate) struct Walk<'a> {
    state: &'a State,
    domain: DomainId,
    lease_epoch: Option<u64>,
    generation: u64,
    missing: Vec<ChunkId>,
    missing_set: HashSet<ChunkId>,
    more: bool,
    revive: BTreeSet<BlockPlace>,
    /// Trees that were walked: whether they turned out complete.
    settled: HashMap<ChunkId, bool>,
    path: HashSet<ChunkId>,
    stack: Vec<Node>,
    pending: usize,
}

struct Node {
    id: ChunkId,
    /// The copy that was read, `None` for the virtual node above the roots.
    copy: Option<Copy>,
    children: Vec<ChunkId>,
    complete: bool,
}

enum Standing {
    Known,
    /// Stored, not flagged.
    Incomplete,
    Unknown,
}

impl<'a> Walk<'a> {
    /// Checks that everything below `roots` is known in `domain` to the holder of a lease of `lease_epoch`.
    pub fn check(
        state: &'a State,
        domain: DomainId,
        lease_epoch: Option<u64>,
        roots: &[ChunkId],
    ) -> Result<Checked, EngineError> {
        let generation = state.blocks.blocking_read().generation;
        let (missing, missing_set, revive, settled, path, stack) = Default::default();
        let mut walk = Self {
            state,
            domain,
            lease_epoch,
            generation,
            missing,
            missing_set,
            more: false,
            revive,
            settled,
            path,
            stack,
            pending: 0,
        };
        let references: Vec<Reference> = roots.iter().map(|&root| Reference::tree(root)).collect();
        let top = walk.node(ChunkId([0; 32]), None, references)?;
        walk.pending = top.children.len();
        walk.stack.push(top);
        if let Some(reason) = walk.run()? {
            return Ok(Checked::Refused(reason));
        }
        Ok(if !walk.missing.is_empty() {
            Checked::Missing { ids: walk.missing, more: walk.more }
        } else if !walk.revive.is_empty() {
            Checked::Revive(walk.revive.into_iter().collect())
        } else {
            Checked::Complete
        })
    }

    fn run(&mut self) -> Result<Option<&'static str>, EngineError> {
        while let Some(top) = self.stack.last_mut() {
            if self.more || self.revive.len() >= REVIVE_MAX {
                return Ok(None);
            }
            let Some(child) = top.children.pop() else {
                self.leave()?;
                continue;
            };
            self.pending -= 1;
            match self.settled.get(&child) {
                Some(complete) => top.complete &= complete,
                None if self.path.contains(&child) => return Ok(Some("its trees refer to one another in a circle")),
                None => self.enter(child)?,
            }
            if self.pending > PENDING_MAX {
                return Ok(Some("its directories are too many and too deep to be checked"));
            }
        }
        Ok(None)
    }

    /// Reads tree `id` and puts it on the stack. A copy that was moved between finding and reading it is found again.
    fn enter(&mut self, id: ChunkId) -> Result<(), EngineError> {
        for _ in 0..2 {
            if self.enter_copy(id)? {
                return Ok(());
            }
        }
        self.miss(id);
        self.settle(id, false);
        if let Some(parent) = self.stack.last_mut() {
            parent.complete = false;
        }
        Ok(())
    }

    /// Whether a copy of the tree could be read.
    fn enter_copy(&mut self, id: ChunkId) -> Result<bool, EngineError> {
        let copies: Vec<Copy> = self.state.index.find(self.domain, &[id])?.copies(0).copied().collect();
        for copy in copies.into_iter().filter(|copy| copy.kind == ChunkKind::Tree) {
            let usable = is_usable(self.state.blocks.blocking_read().of(copy.pack, copy.offset), self.lease_epoch);
            if !usable {
                continue;
            }
            let Some(rows) = read_rows(self.state, copy.pack, copy.offset, copy.bytes)? else { continue };
            let mut rows = rows.into_iter().skip(copy.position.into());
            let Some(row) = rows.next().filter(|row| row.id == id) else { continue };
            let node = self.node(id, Some(copy), row.references)?;
            self.pending += node.children.len();
            self.path.insert(id);
            self.stack.push(node);
            return Ok(true);
        }
        Ok(false)
    }

    /// Leaves the tree on top of the stack: all below it has been seen.
    fn leave(&mut self) -> Result<(), EngineError> {
        let Some(node) = self.stack.pop() else { return Ok(()) };
        let Some(copy) = node.copy else { return Ok(()) };
        self.path.remove(&node.id);
        if node.complete && self.revive.is_empty() {
            let states = self.state.blocks.blocking_read();
            if states.generation == self.generation {
                self.state.flag_complete(self.domain, &[(node.id, copy)])?;
            }
        }
        self.settle(node.id, node.complete);
        if let Some(parent) = self.stack.last_mut() {
            parent.complete &= node.complete;
        }
        Ok(())
    }

    /// A node for tree `id`: finds out which references are known, and which trees below it must be walked.
    fn node(&mut self, id: ChunkId, copy: Option<Copy>, mut references: Vec<Reference>) -> Result<Node, EngineError> {
        if let Some(copy) = copy {
            self.rely_on(copy);
        }
        references.sort_unstable_by_key(|reference| (reference.id, reference.kind));
        references.dedup();
        let ids: Vec<ChunkId> = references.iter().map(|reference| reference.id).collect();
        let found = self.state.index.find(self.domain, &ids)?;
        let mut node = Node { id, copy, children: Vec::new(), complete: true };
        for (at, reference) in references.iter().enumerate() {
            let copies: Vec<Copy> = found.copies(at).filter(|copy| copy.kind == reference.kind).copied().collect();
            match self.standing(&copies) {
                Standing::Known => {}
                Standing::Incomplete => node.children.push(reference.id),
                Standing::Unknown => {
                    node.complete = false;
                    self.miss(reference.id);
                }
            }
        }
        Ok(node)
    }

    fn standing(&mut self, copies: &[Copy]) -> Standing {
        let (mut condemned, mut usable) = (None, false);
        {
            let states = self.state.blocks.blocking_read();
            for copy in copies {
                let seen = states.copy(copy);
                usable |= is_usable(seen.block, self.lease_epoch);
                if is_known(seen, None) {
                    return Standing::Known;
                }
                if is_known(seen, self.lease_epoch) {
                    condemned = Some((copy.pack, copy.offset));
                }
            }
        }
        match condemned {
            Some(place) => {
                self.revive.insert(place);
                Standing::Known
            }
            None if usable => Standing::Incomplete,
            None => Standing::Unknown,
        }
    }

    fn rely_on(&mut self, copy: Copy) {
        let condemned = self.state.blocks.blocking_read().of(copy.pack, copy.offset) != BlockState::Live;
        if condemned {
            self.revive.insert((copy.pack, copy.offset));
        }
    }

    fn miss(&mut self, id: ChunkId) {
        if self.missing_set.contains(&id) {
            return;
        }
        if self.missing.len() >= limits::MISSING_IDS_MAX {
            self.more = true;
            return;
        }
        self.missing_set.insert(id);
        self.missing.push(id);
    }

    fn settle(&mut self, id: ChunkId, complete: bool) {
        if self.settled.len() < SETTLED_MAX {
            self.settled.insert(id, complete);
        } else if !complete {
            // Something is missing below every such tree: what was found so far is worth an answer.
            self.more = true;
        }
    }
}
