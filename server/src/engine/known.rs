//! When a chunk counts as known (DESIGN 7). Queries, the completeness check and acknowledging without storing all ask here.

use std::collections::HashMap;

use strandline_messages::ChunkKind;
use strandline_messages::format::pack_state::{RecordedState, StateRecordV1};

use crate::catalog::repositories::BlockPlace;
use crate::index::Copy;

/// What has become of a block. Every block is live unless the catalog says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BlockState {
    /// Nothing is planned.
    #[default]
    Live,
    /// Nothing retained refers to it; it may be revived.
    Condemned {
        /// The repository's epoch when it was condemned.
        epoch: u64,
    },
    /// About to be freed; never revived.
    Freeing,
    /// Its body is gone.
    Freed,
    /// It is damaged.
    Withdrawn,
}

/// A durable copy of a chunk as the predicate sees it. It lies in the session's writer domain: nothing else is looked up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyState {
    /// Data or tree.
    pub kind: ChunkKind,
    /// Tree: flagged complete.
    pub complete: bool,
    /// Its block.
    pub block: BlockState,
}

/// Whether a block can be relied on by the holder of a lease taken at `lease_epoch`; without a lease, only if it is live.
pub fn is_usable(block: BlockState, lease_epoch: Option<u64>) -> bool {
    match block {
        BlockState::Live => true,
        BlockState::Condemned { epoch } => lease_epoch.is_some_and(|lease| lease <= epoch),
        BlockState::Freeing | BlockState::Freed | BlockState::Withdrawn => false,
    }
}

/// Whether one copy makes its chunk known.
pub fn is_known(copy: CopyState, lease_epoch: Option<u64>) -> bool {
    is_usable(copy.block, lease_epoch) && (copy.kind == ChunkKind::Data || copy.complete)
}

/// The blocks of a repository that are not live: about 32 bytes of memory each, for the exceptions only.
#[derive(Debug, Default)]
pub(crate) struct BlockStates {
    exceptions: HashMap<BlockPlace, BlockState>,
    /// Counts publications, so that a walk notices one that happened in its middle.
    pub generation: u64,
}

impl BlockStates {
    /// From the catalog's rows and what the state files of packs say, which is final.
    pub fn new(mut exceptions: HashMap<BlockPlace, BlockState>, recorded: &HashMap<u32, Vec<StateRecordV1>>) -> Self {
        for (pack, records) in recorded {
            for record in records {
                let state = match record.state {
                    RecordedState::Freed => BlockState::Freed,
                    RecordedState::Withdrawn => BlockState::Withdrawn,
                };
                exceptions.insert((*pack, record.offset), state);
            }
        }
        Self { exceptions, generation: 0 }
    }

    pub fn of(&self, pack: u32, offset: u32) -> BlockState {
        if self.exceptions.is_empty() {
            BlockState::Live
        } else {
            self.exceptions.get(&(pack, offset)).copied().unwrap_or_default()
        }
    }

    pub fn set(&mut self, place: BlockPlace, state: BlockState) {
        if state == BlockState::Live {
            self.exceptions.remove(&place);
        } else {
            self.exceptions.insert(place, state);
        }
    }

    /// How many blocks are in such a state, among those that are not live.
    pub fn count(&self, which: impl Fn(BlockState) -> bool) -> u64 {
        self.exceptions.values().filter(|state| which(**state)).count() as u64
    }

    /// The blocks that are not live, in no order.
    pub fn exceptions(&self) -> impl Iterator<Item = (BlockPlace, BlockState)> {
        self.exceptions.iter().map(|(place, state)| (*place, *state))
    }

    pub fn copy(&self, copy: &Copy) -> CopyState {
        CopyState { kind: copy.kind, complete: copy.complete, block: self.of(copy.pack, copy.offset) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_predicate_is_exactly_this_table() {
        let condemned = |epoch| BlockState::Condemned { epoch };
        // Block, lease epoch, usable.
        let table = [
            (BlockState::Live, None, true),
            (BlockState::Live, Some(9), true),
            (condemned(5), None, false),
            (condemned(5), Some(4), true),
            (condemned(5), Some(5), true),
            (condemned(5), Some(6), false),
            (BlockState::Freeing, Some(0), false),
            (BlockState::Freed, Some(0), false),
            (BlockState::Withdrawn, Some(0), false),
            (BlockState::Freeing, None, false),
            (BlockState::Freed, None, false),
            (BlockState::Withdrawn, None, false),
        ];
        for (block, lease, usable) in table {
            let copy = |kind, complete| CopyState { kind, complete, block };
            assert_eq!(is_usable(block, lease), usable, "{block:?} {lease:?}");
            assert_eq!(is_known(copy(ChunkKind::Data, false), lease), usable, "data, {block:?} {lease:?}");
            assert_eq!(is_known(copy(ChunkKind::Tree, true), lease), usable, "complete tree, {block:?} {lease:?}");
            assert!(!is_known(copy(ChunkKind::Tree, false), lease), "incomplete tree, {block:?} {lease:?}");
        }
    }
}
