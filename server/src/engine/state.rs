//! What one open repository knows, shared by its callers and its pack writer.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use parking_lot::{Mutex, RwLock};
use strandline_actors::runtime::clock;
use strandline_messages::format::pack_state::{RecordedState, StateRecordV1};
use strandline_messages::format::repository::RepositoryV1;
use strandline_messages::{ChunkId, ChunkKind, DomainId, Sequence, SessionId, TenantName};

use super::gc::PartlyDead;
use super::keeping::Keeping;
use super::known::{BlockState, BlockStates};
use super::{Common, EngineError, Lease, on_own_thread, packs};
use crate::catalog::repositories::{BlockPlace, RepositoryRow};
use crate::index::{ChunkIndex, Copy};
use crate::storage::layout::RepositoryPaths;
use crate::storage::pack_file::PackInfo;
use crate::storage::pack_reader::PackReader;
use crate::storage::pack_state;
use crate::storage::pack_writer::{PackSink, StoredBlock};

/// Where a tree block lies: 24 bytes of memory for each block of about 1 MiB of trees that an open session sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct TreeBlock {
    pub sequence: u64,
    pub pack: u32,
    pub offset: u32,
    pub bytes: u32,
}

/// Most complete flags that are noted while somebody watches: 32 bytes each. With more the publication is tried again later.
const FLAGS_WATCHED_MAX: usize = 1 << 20;
/// Most parts of packs that are remembered for one session; beyond, neighbours are joined.
const RANGES_MAX: usize = 1024;

/// What is published in one transaction.
#[derive(Debug, Default)]
pub(crate) struct Publication {
    pub changes: Vec<(BlockPlace, BlockState)>,
    /// Tree chunks whose complete flags fall first.
    pub unflag: Vec<ChunkId>,
    /// The count of commits that the caller has seen; `None` if it does not matter.
    pub commits_seen: Option<u64>,
}

#[derive(Debug, Default)]
struct FlagLog {
    ids: Vec<ChunkId>,
    overflowed: bool,
}

/// A part of a pack: from `start` to `end`, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct PackRange {
    pub pack: u32,
    pub start: u32,
    pub end: u32,
}

/// A session that may write.
#[derive(Debug)]
struct ActiveSession {
    fence: u64,
    /// Ascending by sequence.
    trees: Vec<TreeBlock>,
    /// Where its blocks lie; may span blocks of others.
    ranges: Vec<PackRange>,
}

impl ActiveSession {
    fn note(&mut self, pack: u32, start: u32, bytes: u32) {
        let end = start.saturating_add(bytes);
        let many = self.ranges.len() >= RANGES_MAX;
        match self.ranges.last_mut().filter(|last| last.pack == pack && (last.end == start || many)) {
            Some(last) => last.end = end,
            None => self.ranges.push(PackRange { pack, start, end }),
        }
    }
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
    pub keeping: Keeping,
    /// One job of maintenance at a time.
    pub maintaining: tokio::sync::Mutex<()>,
    /// Whether the file system can punch holes into packs, as far as is known.
    pub punching: AtomicBool,
    /// The repository is being closed: maintenance stops at the next block.
    pub stopping: AtomicBool,
    /// Blocks that the last collection found partly dead, those that waste most first.
    pub partly_dead: Mutex<Vec<PartlyDead>>,
    /// Blocks whose needed chunks were stored again: other copies are preferred to theirs.
    pub superseded: Mutex<HashSet<BlockPlace>>,
    flag_log: Mutex<Option<FlagLog>>,
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
        keeping: Keeping,
    ) -> Self {
        let RepositoryRow { number, tenant, .. } = row;
        let reader = PackReader::new(paths.clone());
        let blocks = tokio::sync::RwLock::new(blocks);
        Self {
            common,
            number,
            tenant,
            file,
            paths,
            index,
            reader,
            blocks,
            keeping,
            maintaining: tokio::sync::Mutex::default(),
            punching: AtomicBool::new(true),
            stopping: AtomicBool::new(false),
            partly_dead: Mutex::default(),
            superseded: Mutex::default(),
            flag_log: Mutex::default(),
            packs: RwLock::default(),
            changed: Mutex::default(),
            sessions: Mutex::default(),
        }
    }

    /// Packs, blocks that were not freed, and the bytes that packs take on disk. Looks at every file.
    pub fn pack_totals(&self) -> (u64, u64, u64) {
        let packs = self.pack_infos();
        let blocks: u64 = packs.iter().map(|pack| u64::from(pack.blocks)).sum();
        let freed = self.blocks.blocking_read().count(|state| state == BlockState::Freed);
        // A pack that was removed in this moment takes nothing.
        let on_disk = |pack: &PackInfo| {
            let blocks = std::fs::metadata(self.paths.pack(pack.number)).map_or(0, |metadata| metadata.blocks());
            (512 * blocks).min(pack.file_bytes)
        };
        (packs.len() as u64, blocks.saturating_sub(freed), packs.iter().map(on_disk).sum())
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

    /// Publishes what became of blocks: one catalog transaction, and no query or check in between sees half of it. Complete
    /// flags fall first: those of `unflag`, and every one that was set since [`State::watch_flags`]. `Condemned` gets the
    /// current epoch, which then passes and is returned; `None`: a commit was counted that the caller has not seen, and
    /// nothing was published.
    pub async fn publish(self: &Arc<Self>, publication: Publication) -> Result<Option<u64>, EngineError> {
        let Publication { changes, unflag, commits_seen } = publication;
        let mut states = self.blocks.write().await;
        let state = Arc::clone(self);
        let withdrawn: Vec<BlockPlace> =
            changes.iter().filter(|(_, change)| *change == BlockState::Withdrawn).map(|(place, _)| *place).collect();
        on_own_thread(move || {
            let mut unflag = unflag;
            unflag.extend(state.flags_watched()?);
            // Flags fall first: without them a walk goes deeper than it must, with them it could stop above a freed block.
            state.unflag(&unflag)?;
            state.record(&withdrawn, RecordedState::Withdrawn)
        })
        .await?;
        let Some(epoch) = self.common.catalog.publish_states(self.number, &changes, commits_seen).await? else {
            return Ok(None);
        };
        states.generation += 1;
        for (place, change) in changes {
            let change = match change {
                BlockState::Condemned { .. } => BlockState::Condemned { epoch },
                other => other,
            };
            states.set(place, change);
        }
        Ok(Some(epoch))
    }

    /// Writes into the packs' state files what became of blocks for good, and syncs them.
    pub fn record(&self, blocks: &[BlockPlace], recorded: RecordedState) -> Result<(), EngineError> {
        let at_ns = clock::wall_ns();
        let mut by_pack = BTreeMap::<u32, Vec<StateRecordV1>>::new();
        for &(pack, offset) in blocks {
            by_pack.entry(pack).or_default().push(StateRecordV1 { offset, state: recorded, at_ns });
        }
        for (pack, records) in by_pack {
            pack_state::append(&self.paths, self.file.id, pack, &records)?;
        }
        Ok(())
    }

    /// Sets complete flags. The caller holds `blocks` for reading.
    pub fn flag_complete(&self, domain: DomainId, flags: &[(ChunkId, Copy)]) -> Result<(), EngineError> {
        if let Some(log) = self.flag_log.lock().as_mut() {
            let room = FLAGS_WATCHED_MAX.saturating_sub(log.ids.len());
            log.ids.extend(flags.iter().map(|(id, _)| *id).take(room));
            log.overflowed |= flags.len() > room;
        }
        Ok(self.index.flag(domain, flags, true)?)
    }

    /// From now on every complete flag that is set is noted, until [`State::forget_flags`]: who enumerates trees to take their
    /// flags away publishes later, and flags set in between must fall, too.
    pub fn watch_flags(&self) {
        *self.flag_log.lock() = Some(FlagLog::default());
    }

    /// Ends [`State::watch_flags`].
    pub fn forget_flags(&self) {
        *self.flag_log.lock() = None;
    }

    fn flags_watched(&self) -> Result<Vec<ChunkId>, EngineError> {
        let mut log = self.flag_log.lock();
        let Some(log) = log.as_mut() else { return Ok(Vec::new()) };
        if log.overflowed {
            return Err(EngineError::Busy { attempts: 1 });
        }
        Ok(std::mem::take(&mut log.ids))
    }

    /// Takes the complete flags of these chunks away, durably.
    pub fn unflag(&self, ids: &[ChunkId]) -> Result<(), EngineError> {
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
        self.sessions
            .lock()
            .insert(lease.session, ActiveSession { fence: lease.fence, trees: Vec::new(), ranges: Vec::new() });
    }

    /// Ends a session's right to write; the tree blocks that it sent, and where all its blocks lie.
    pub fn dismiss(&self, session: &SessionId) -> (Vec<TreeBlock>, Vec<PackRange>) {
        self.keeping.unpin(session);
        self.sessions.lock().remove(session).map(|session| (session.trees, session.ranges)).unwrap_or_default()
    }

    /// Where the blocks of the sessions lie that are under way.
    pub fn ranges_under_way(&self) -> Vec<PackRange> {
        self.sessions.lock().values().flat_map(|session| session.ranges.iter().copied()).collect()
    }

    /// What is known of the packs, ascending by number.
    pub fn pack_infos(&self) -> Vec<PackInfo> {
        self.packs.read().values().copied().collect()
    }

    /// A pack whose blocks are all freed is removed, with everything that is known of it.
    pub async fn drop_pack(self: &Arc<Self>, number: u32, blocks: &[BlockPlace]) -> Result<(), EngineError> {
        let state = Arc::clone(self);
        on_own_thread(move || {
            state.index.drop_pack(number)?;
            state.reader.forget(number);
            Ok(packs::remove_pack(&state.paths, number)?)
        })
        .await?;
        self.packs.write().remove(&number);
        self.common.catalog.forget_pack(self.number, number).await?;
        let mut states = self.blocks.write().await;
        for &place in blocks {
            states.set(place, BlockState::Live);
        }
        Ok(())
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
        for block in blocks {
            let Some(session) = sessions.get_mut(&block.session) else { continue };
            session.note(info.number, block.offset, block.bytes);
            if block.kind == ChunkKind::Data {
                continue;
            }
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
}
