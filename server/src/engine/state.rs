//! What one open repository knows, shared by its callers and its pack writer.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use strandline_messages::format::repository::RepositoryV1;
use strandline_messages::{ChunkId, ChunkKind, Sequence, SessionId, TenantName};

use super::known::{BlockState, BlockStates};
use super::{Common, EngineError, Lease, on_own_thread};
use crate::catalog::repositories::{BlockPlace, RepositoryRow};
use crate::index::{ChunkIndex, Copy};
use crate::storage::layout::RepositoryPaths;
use crate::storage::pack_file::PackInfo;
use crate::storage::pack_reader::PackReader;
use crate::storage::pack_writer::{PackSink, StoredBlock};

/// Where a tree block lies: 24 bytes of memory for each block of about 1 MiB of trees that an open session sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TreeBlock {
    pub sequence: u64,
    pub pack: u32,
    pub offset: u32,
    pub bytes: u32,
}

/// A session that may write.
#[derive(Debug)]
struct ActiveSession {
    fence: u64,
    /// Ascending by sequence.
    trees: Vec<TreeBlock>,
}

pub(crate) struct State {
    pub common: Arc<Common>,
    /// The repository's number in the catalog.
    pub number: i64,
    pub tenant: TenantName,
    pub file: RepositoryV1,
    pub paths: RepositoryPaths,
    pub index: Box<dyn ChunkIndex>,
    pub reader: PackReader,
    /// Held for writing from before the states' transaction begins until this copy agrees with it.
    pub blocks: tokio::sync::RwLock<BlockStates>,
    packs: RwLock<BTreeMap<u32, PackInfo>>,
    /// Packs whose row in the catalog is out of date.
    changed: Mutex<BTreeSet<u32>>,
    sessions: Mutex<HashMap<SessionId, ActiveSession>>,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("State").field("repository", &self.file.id).finish_non_exhaustive()
    }
}

impl State {
    pub fn new(
        common: Arc<Common>,
        row: RepositoryRow,
        file: RepositoryV1,
        paths: RepositoryPaths,
        index: Box<dyn ChunkIndex>,
        blocks: BlockStates,
    ) -> Self {
        let RepositoryRow { number, tenant, .. } = row;
        let reader = PackReader::new(paths.clone());
        let (packs, changed, sessions) = Default::default();
        let blocks = tokio::sync::RwLock::new(blocks);
        Self { common, number, tenant, file, paths, index, reader, blocks, packs, changed, sessions }
    }

    /// Packs, blocks and stored bytes.
    pub fn pack_totals(&self) -> (u64, u64, u64) {
        let packs = self.packs.read();
        let blocks = packs.values().map(|pack| u64::from(pack.blocks)).sum();
        (packs.len() as u64, blocks, packs.values().map(|pack| pack.file_bytes).sum())
    }

    /// The packs whose rows must be written; they count as written from here on.
    pub fn take_changed_packs(&self) -> Vec<PackInfo> {
        let changed = std::mem::take(&mut *self.changed.lock());
        let packs = self.packs.read();
        changed.iter().filter_map(|number| packs.get(number).copied()).collect()
    }

    /// Takes note of a pack whose row is right.
    pub fn pack_known(&self, info: PackInfo) {
        self.packs.write().insert(info.number, info);
    }

    /// Has a pack's row written again.
    pub fn pack_stale(&self, number: u32) {
        self.changed.lock().insert(number);
    }

    /// Makes condemned blocks live again for the holder of `lease`.
    pub async fn revive(&self, lease: &Lease, blocks: &[BlockPlace]) -> Result<(), EngineError> {
        let mut states = self.blocks.write().await;
        let held = self.common.catalog.revive(self.number, lease.session.as_bytes(), lease.fence, blocks).await?;
        if !held {
            return Err(EngineError::Fenced { session: lease.session });
        }
        for &(pack, offset) in blocks {
            if matches!(states.of(pack, offset), BlockState::Condemned { .. }) {
                states.set((pack, offset), BlockState::Live);
            }
        }
        Ok(())
    }

    /// See `Repository::publish_block_states`.
    pub async fn publish_block_states(
        self: &Arc<Self>,
        changes: Vec<(BlockPlace, BlockState)>,
        unflag: Vec<ChunkId>,
    ) -> Result<u64, EngineError> {
        let mut states = self.blocks.write().await;
        let state = Arc::clone(self);
        // Flags fall first: without them a walk goes deeper than it must, with them it could stop above a freed block.
        on_own_thread(move || state.unflag(&unflag)).await?;
        let epoch = self.common.catalog.publish_states(self.number, &changes).await?;
        states.generation += 1;
        for (place, change) in changes {
            let change = match change {
                BlockState::Condemned { .. } => BlockState::Condemned { epoch },
                other => other,
            };
            states.set(place, change);
        }
        Ok(epoch)
    }

    fn unflag(&self, ids: &[ChunkId]) -> Result<(), EngineError> {
        for domain in self.index.domains() {
            let found = self.index.find(domain, ids)?;
            let flagged = found.rows().iter().filter(|(_, copy)| copy.complete);
            let copies: Vec<(ChunkId, Copy)> =
                flagged.filter_map(|(at, copy)| Some((*ids.get(*at as usize)?, *copy))).collect();
            self.index.flag(domain, &copies, false)?;
        }
        // A flag that came back after a crash would stand above a freed block.
        if ids.is_empty() { Ok(()) } else { Ok(self.index.sync()?) }
    }

    /// Lets a session write.
    pub fn admit(&self, lease: &Lease) {
        self.sessions.lock().insert(lease.session, ActiveSession { fence: lease.fence, trees: Vec::new() });
    }

    /// Ends a session's right to write; the tree blocks that it sent.
    pub fn dismiss(&self, session: &SessionId) -> Vec<TreeBlock> {
        self.sessions.lock().remove(session).map(|session| session.trees).unwrap_or_default()
    }

    /// Refuses a lease that has ended or was superseded.
    pub fn assert_current(&self, lease: &Lease) -> Result<(), EngineError> {
        let current = self.sessions.lock().get(&lease.session).is_some_and(|session| session.fence == lease.fence);
        if current { Ok(()) } else { Err(EngineError::Fenced { session: lease.session }) }
    }

    /// Whether a tree block of that sequence number is durable already.
    pub fn has_tree_block(&self, session: &SessionId, sequence: Sequence) -> bool {
        let sessions = self.sessions.lock();
        let trees = sessions.get(session).map(|session| session.trees.as_slice()).unwrap_or_default();
        trees.binary_search_by_key(&sequence.0, |tree| tree.sequence).is_ok()
    }

    /// Takes the list of tree blocks for a pass over them; [`State::put_trees`] gives back what must be looked at again.
    pub fn take_trees(&self, session: &SessionId) -> Vec<TreeBlock> {
        self.sessions.lock().get_mut(session).map(|session| std::mem::take(&mut session.trees)).unwrap_or_default()
    }

    pub fn put_trees(&self, session: &SessionId, trees: Vec<TreeBlock>) {
        if let Some(session) = self.sessions.lock().get_mut(session) {
            session.trees.extend(trees);
            session.trees.sort_unstable();
        }
    }
}

impl PackSink for State {
    fn stored(&self, info: PackInfo, blocks: &[StoredBlock]) -> Result<(), String> {
        let mut copies: Vec<(ChunkId, Copy)> = Vec::new();
        for block in blocks {
            let copy = |position| Copy {
                pack: info.number,
                offset: block.offset,
                bytes: block.bytes,
                position,
                kind: block.kind,
                complete: false,
            };
            copies.extend((0u16..).zip(&block.ids).map(|(position, id)| (*id, copy(position))));
        }
        let inserted = self.index.insert(info.domain, info.number, info.blocks_end, &copies);
        inserted.map_err(|error| error.to_string())?;
        let mut sessions = self.sessions.lock();
        for block in blocks.iter().filter(|block| block.kind == ChunkKind::Tree) {
            let Some(session) = sessions.get_mut(&block.session) else { continue };
            let tree =
                TreeBlock { sequence: block.sequence.0, pack: info.number, offset: block.offset, bytes: block.bytes };
            let place = session.trees.partition_point(|other| other.sequence <= tree.sequence);
            session.trees.insert(place, tree);
        }
        drop(sessions);
        self.pack_changed(info);
        Ok(())
    }

    fn pack_changed(&self, info: PackInfo) {
        self.packs.write().insert(info.number, info);
        self.changed.lock().insert(info.number);
    }

    fn pack_gone(&self, number: u32) {
        self.packs.write().remove(&number);
    }
}
