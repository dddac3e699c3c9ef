//! One open repository: sessions, queries, blocks in, snapshots, blocks out.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use parking_lot::Mutex;
use strandline_actors::runtime::clock;
use strandline_messages::format::block::BlockView;
use strandline_messages::format::repository::RepositoryV1;
use strandline_messages::{AgentId, ChunkId, ChunkKind, DomainId, Durable, Sequence, SessionId, SnapshotId, limits};

use super::completeness::{flag_trees, flag_unordered_trees};
use super::keeping::{self, Keeping};
use super::known::{BlockState, BlockStates, is_known};
use super::settings::nanoseconds;
#[cfg(test)]
use super::state::Publication;
use super::state::{PackRange, State};
use super::{Common, EngineError, Lease, Opened, SessionEnd, SessionRow, StoreError, blocking, commit, packs};
#[cfg(test)]
use crate::catalog::repositories::BlockPlace;
use crate::catalog::repositories::RepositoryRow;
use crate::catalog::sessions::NewSession;
use crate::catalog::snapshots::SnapshotRow;
use crate::storage::pack_writer::{NewBlock, PackSink, PackWriter};

/// Where a chunk lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlockAddress {
    /// The pack's number.
    pub pack: u32,
    /// Where the block begins in it, bytes.
    pub offset: u32,
    /// The block's length, bytes.
    pub bytes: u32,
    /// The chunk's place in the block's table.
    pub position: u16,
}

/// What is done with a block all of whose chunks are known.
#[derive(Clone, Copy, PartialEq, Eq)]
enum IfKnown {
    Confirm,
    Store,
}

/// What became of a commit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum CommitOutcome {
    /// The snapshot is there.
    Committed {
        /// Its id.
        snapshot: SnapshotId,
        /// The encoded, signed receipt.
        receipt: Vec<u8>,
    },
    /// Chunks are not known.
    Missing {
        /// Which, at most `limits::MISSING_IDS_MAX`.
        ids: Vec<ChunkId>,
        /// Whether there may be others.
        more: bool,
    },
    /// The manifest is not acceptable, now or later.
    Refused {
        /// Why, for people.
        reason: String,
    },
}

/// Sizes of a repository, for `status`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Packs.
    pub packs: u64,
    /// Blocks in them.
    pub blocks: u64,
    /// What they take on disk, bytes.
    pub stored_bytes: u64,
    /// Copies of chunks in the index; those whose flag changed may count twice for a while.
    pub chunks: u64,
    /// Snapshots that are kept.
    pub snapshots: u64,
    /// Deleted ones that can be brought back.
    pub deleted: u64,
    /// Blocks that wait to be freed.
    pub condemned: u64,
    /// Blocks that were found damaged.
    pub damaged: u64,
}

/// An open repository. Lives until the engine is closed; afterwards its methods answer with errors.
#[derive(Debug)]
pub struct Repository {
    // The writer's thread holds the state too; it is joined when the writer is dropped.
    pub(super) writer: Arc<PackWriter>,
    pub(super) state: Arc<State>,
    /// Key slots are added and removed one at a time.
    pub(super) slot_changes: Arc<Mutex<()>>,
}

impl Repository {
    pub(super) async fn open(common: Arc<Common>, row: RepositoryRow, file: RepositoryV1) -> Result<Self, EngineError> {
        let paths = common.paths.repository(&row.tenant, &file.id);
        let rows = common.catalog.packs(row.number).await?;
        common.catalog.revive_all(row.number).await?;
        let mut states = common.catalog.block_states(row.number).await?;
        let used = rows.keys().copied().chain(states.keys().map(|&(pack, _)| pack)).max().unwrap_or(0);
        let (recovered, keeping, decided) = {
            let (common, paths, id) = (Arc::clone(&common), paths.clone(), file.id);
            let rows = rows.clone();
            blocking(move || {
                let recovered = packs::recover(&common, &paths, id, &rows, used)?;
                let (keeping, decided) = Keeping::open(&paths.keeping_journal())?;
                Ok((recovered, keeping, decided))
            })
            .await?
        };
        for &pack in &recovered.dropped {
            common.catalog.forget_pack(row.number, pack).await?;
        }
        states.retain(|(pack, _), _| !recovered.dropped.contains(pack));
        let states = BlockStates::new(states, &recovered.recorded);
        let (ops, options) = (Arc::clone(&common.ops), common.writer);
        let id = file.id;
        let state = State::new(common, row, file, paths.clone(), Box::new(recovered.index), states, keeping);
        let state = Arc::new(state);
        for pack in recovered.packs {
            if rows.get(&pack.number) == Some(&pack) { state.pack_known(pack) } else { state.pack_changed(pack) }
        }
        {
            let state = Arc::clone(&state);
            blocking(move || flag_recovered(&state, recovered.trees)).await?;
        }
        let sink: Arc<dyn PackSink> = Arc::clone(&state) as Arc<dyn PackSink>;
        let writer = Arc::new(PackWriter::new(ops, paths, id, recovered.next_pack, options, sink));
        let repository = Self { writer, state, slot_changes: Arc::default() };
        repository.record_packs().await?;
        commit::restore_rows(&repository.state, &decided).await?;
        keeping::apply(&repository.state, decided).await?;
        repository.keep_what_was_left_open(recovered.unsealed).await?;
        Ok(repository)
    }

    /// The repository file.
    pub fn file(&self) -> &RepositoryV1 {
        &self.state.file
    }

    /// Sessions that a crash left open may be resumed: what they stored, as far as it can be told, is kept for a while.
    async fn keep_what_was_left_open(&self, unsealed: Vec<PackRange>) -> Result<(), EngineError> {
        let left_open = self.state.common.catalog.earliest_lease(self.state.number).await?.is_some();
        if left_open { self.keep_uncommitted(&unsealed).await } else { Ok(()) }
    }

    async fn keep_uncommitted(&self, ranges: &[PackRange]) -> Result<(), EngineError> {
        let until_ns = clock::wall_ns().saturating_add(nanoseconds(self.settings().await?.keep_uncommitted));
        Ok(self.state.common.catalog.keep_uncommitted(self.state.number, ranges, until_ns).await?)
    }

    /// Opens a session of `agent` that only reads: nothing is held back for it but the snapshots that it pins.
    pub async fn open_reading_session(
        &self,
        session: SessionId,
        agent: AgentId,
        domain: DomainId,
        resume_of: Option<SessionId>,
    ) -> Result<Opened, EngineError> {
        self.begin_session(session, agent, domain, resume_of, false).await
    }

    /// Opens a session of `agent` that writes in `domain`. One transaction: if the session that it resumes has committed, its
    /// receipt is the answer; if that session is open, it ends as failed and its epoch moves to the new session's lease.
    /// A session to resume that is not one of this agent, domain and repository is ignored.
    pub async fn open_session(
        &self,
        session: SessionId,
        agent: AgentId,
        domain: DomainId,
        resume_of: Option<SessionId>,
    ) -> Result<Opened, EngineError> {
        self.begin_session(session, agent, domain, resume_of, true).await
    }

    async fn begin_session(
        &self,
        session: SessionId,
        agent: AgentId,
        domain: DomainId,
        resume_of: Option<SessionId>,
        writes: bool,
    ) -> Result<Opened, EngineError> {
        let catalog = &self.state.common.catalog;
        let tenant = self.state.tenant.as_str();
        let (repository, now_ns) = (self.state.number, clock::wall_ns());
        let new = NewSession { repository, tenant, session, agent, domain, resume_of, writes, now_ns };
        if catalog.session_exists(&session).await? {
            return Err(EngineError::SessionExists { session });
        }
        let (opened, superseded) = catalog.open_session(new).await?;
        if let Opened::Fresh(lease) = &opened {
            self.state.admit(lease);
        }
        if let Some(old) = superseded {
            let ranges = self.flag_and_dismiss(old, domain).await?;
            self.keep_uncommitted(&ranges).await?;
        }
        Ok(opened)
    }

    /// Which of `ids` are known to the session, in their order.
    pub async fn known(&self, lease: &Lease, ids: Vec<ChunkId>) -> Result<Vec<bool>, EngineError> {
        self.state.assert_current(lease)?;
        let (state, lease) = (Arc::clone(&self.state), lease.clone());
        blocking(move || known(&state, &lease, &ids, None)).await
    }

    /// Stores a block of the session: verifies format, repository and digest, and resolves when the block is durable and
    /// indexed. A block all of whose chunks are known is confirmed without being stored. Waits while the queue is full.
    pub async fn store(
        &self,
        lease: &Lease,
        sequence: Sequence,
        block: Bytes,
    ) -> Result<Durable<Sequence>, StoreError> {
        self.store_block(lease, sequence, block, IfKnown::Confirm).await
    }

    /// As [`Repository::store`], but stores the block whatever is known: its chunks move out of blocks that are mostly dead.
    pub async fn store_again(
        &self,
        lease: &Lease,
        sequence: Sequence,
        block: Bytes,
    ) -> Result<Durable<Sequence>, StoreError> {
        self.store_block(lease, sequence, block, IfKnown::Store).await
    }

    async fn store_block(
        &self,
        lease: &Lease,
        sequence: Sequence,
        block: Bytes,
        if_known: IfKnown,
    ) -> Result<Durable<Sequence>, StoreError> {
        let fenced = |_| StoreError::Fenced { session: lease.session };
        self.state.assert_current(lease).map_err(fenced)?;
        let verified = {
            let (state, lease) = (Arc::clone(&self.state), lease.clone());
            let verify = move || verify(&state, &lease, sequence, block, if_known);
            tokio::task::spawn_blocking(verify).await.map_err(|_| StoreError::Closed)??
        };
        match verified {
            None => Ok(self.writer.confirm_known(sequence)),
            Some(block) => self.writer.store(block).await,
        }
    }

    /// Commits a snapshot. The session's blocks must have been confirmed. The same manifest again has the same receipt.
    pub async fn commit(&self, lease: &Lease, manifest: Bytes) -> Result<CommitOutcome, EngineError> {
        let outcome = commit::commit(&self.state, lease, manifest).await?;
        if matches!(outcome, CommitOutcome::Committed { .. }) {
            self.record_packs().await?;
        }
        Ok(outcome)
    }

    /// Ends a session that did not commit, and its lease. Of a session that has ended nothing changes. What it stored stays,
    /// and its trees that are complete are flagged, so that the next session need not send them.
    pub async fn end_session(&self, lease: &Lease, end: SessionEnd, reason: &str) -> Result<(), EngineError> {
        if self.state.assert_current(lease).is_ok() {
            let ranges = self.flag_and_dismiss(lease.session, lease.domain).await?;
            // What was finished will not be tried again.
            if end != SessionEnd::Finished {
                self.keep_uncommitted(&ranges).await?;
            }
        }
        let reason = reason.get(..reason.floor_char_boundary(limits::TEXT_BYTES_MAX)).unwrap_or_default();
        self.state.common.catalog.end_session(&lease.session, lease.fence, end, reason, clock::wall_ns()).await?;
        self.record_packs().await
    }

    /// The leases of sessions that are open in the catalog, those of before a restart among them. Such a session can be
    /// resumed by its agent or ended by [`Repository::end_session`].
    pub async fn open_leases(&self) -> Result<Vec<Lease>, EngineError> {
        Ok(self.state.common.catalog.open_leases(self.state.number).await?)
    }

    /// The newest `limit` sessions, newest first.
    pub async fn sessions(&self, limit: usize) -> Result<Vec<SessionRow>, EngineError> {
        Ok(self.state.common.catalog.sessions(self.state.number, limit).await?)
    }

    /// Up to `limit` kept snapshots after place `after_order` in the order of commits.
    pub async fn snapshots(&self, after_order: u64, limit: usize) -> Result<Vec<SnapshotRow>, EngineError> {
        Ok(self.state.common.catalog.snapshots(self.state.number, false, after_order, limit).await?)
    }

    /// The same of the deleted snapshots that can still be brought back.
    pub async fn deleted_snapshots(&self, after_order: u64, limit: usize) -> Result<Vec<SnapshotRow>, EngineError> {
        Ok(self.state.common.catalog.snapshots(self.state.number, true, after_order, limit).await?)
    }

    /// Where the chunks of a domain lie; a live copy before a condemned one. `None`: there is no copy that can be read.
    pub async fn locate(&self, domain: DomainId, ids: &[ChunkId]) -> Result<Vec<Option<BlockAddress>>, EngineError> {
        let (state, ids) = (Arc::clone(&self.state), ids.to_vec());
        blocking(move || {
            let found = state.index.find(domain, &ids)?;
            let states = state.blocks.blocking_read();
            let rank = |block| match block {
                BlockState::Live => Some(0),
                BlockState::Condemned { .. } => Some(1),
                BlockState::Freeing | BlockState::Freed | BlockState::Withdrawn => None,
            };
            let best = |at| {
                let copies = found.copies(at).filter_map(|copy| Some((rank(states.of(copy.pack, copy.offset))?, copy)));
                let (_, copy) = copies.min_by_key(|(rank, _)| *rank)?;
                Some(BlockAddress { pack: copy.pack, offset: copy.offset, bytes: copy.bytes, position: copy.position })
            };
            Ok((0..ids.len()).map(best).collect())
        })
        .await
    }

    /// The block at `address`, its digest verified.
    pub async fn read_block(&self, address: BlockAddress) -> Result<Bytes, EngineError> {
        let state = Arc::clone(&self.state);
        blocking(move || Ok(state.reader.read_block(address.pack, address.offset, address.bytes)?)).await
    }

    /// Sizes, for `status`.
    pub async fn totals(&self) -> Result<Totals, EngineError> {
        let (packs, blocks, stored_bytes) = {
            let state = Arc::clone(&self.state);
            blocking(move || Ok(state.pack_totals())).await?
        };
        let chunks = self.state.index.entries();
        let (snapshots, deleted) = self.state.common.catalog.snapshot_count(self.state.number).await?;
        let states = self.state.blocks.read().await;
        let condemned = states.count(|state| matches!(state, BlockState::Condemned { .. } | BlockState::Freeing));
        let damaged = states.count(|state| state == BlockState::Withdrawn);
        Ok(Totals { packs, blocks, stored_bytes, chunks, snapshots, deleted, condemned, damaged })
    }

    /// Publishes states of blocks as maintenance does, and takes the complete flag off the tree chunks `unflag`.
    #[cfg(test)]
    pub(crate) async fn publish_block_states(
        &self,
        changes: Vec<(BlockPlace, BlockState)>,
        unflag: Vec<ChunkId>,
    ) -> Result<u64, EngineError> {
        let published = self.state.publish(Publication { changes, unflag, commits_seen: None }).await?;
        Ok(published.unwrap_or_default())
    }

    pub(super) async fn close(&self) -> Result<(), EngineError> {
        let (writer, state) = (Arc::clone(&self.writer), Arc::clone(&self.state));
        state.stopping.store(true, Ordering::Relaxed);
        let _no_maintenance = self.state.maintaining.lock().await;
        blocking(move || {
            writer.close();
            Ok(state.index.close()?)
        })
        .await?;
        self.record_packs().await
    }

    pub(super) async fn record_packs(&self) -> Result<(), EngineError> {
        let packs = self.state.take_changed_packs();
        let recorded = self.state.common.catalog.record_packs(self.state.number, &packs).await;
        if recorded.is_err() {
            for pack in packs {
                self.state.pack_stale(pack.number);
            }
        }
        if let Err(error) = self.state.index.relieve() {
            // The index says so again to whoever writes next; the packs have it all.
            tracing::warn!(%error, "the chunk index cannot be written");
        }
        Ok(recorded?)
    }

    /// Ends a session's right to write and flags those of its trees that are complete; where its blocks lie.
    async fn flag_and_dismiss(&self, session: SessionId, domain: DomainId) -> Result<Vec<PackRange>, EngineError> {
        let state = Arc::clone(&self.state);
        blocking(move || {
            let (trees, ranges) = state.dismiss(&session);
            flag_trees(&state, domain, trees)?;
            Ok(ranges)
        })
        .await
    }
}

fn flag_recovered(state: &State, trees: Vec<(DomainId, super::state::TreeBlock)>) -> Result<(), EngineError> {
    let mut by_domain = std::collections::BTreeMap::<DomainId, Vec<_>>::new();
    for (domain, tree) in trees {
        by_domain.entry(domain).or_default().push(tree);
    }
    by_domain.into_iter().try_for_each(|(domain, trees)| flag_unordered_trees(state, domain, trees))
}

/// Which of `ids` are known, as chunks of `kind` if one is given.
fn known(state: &State, lease: &Lease, ids: &[ChunkId], kind: Option<ChunkKind>) -> Result<Vec<bool>, EngineError> {
    let found = state.index.find(lease.domain, ids)?;
    let states = state.blocks.blocking_read();
    let mut known = vec![false; ids.len()];
    for (at, copy) in found.rows() {
        if let Some(known) = known.get_mut(*at as usize) {
            let right_kind = kind.is_none_or(|kind| kind == copy.kind);
            *known |= right_kind && is_known(states.copy(copy), Some(lease.epoch));
        }
    }
    Ok(known)
}

/// Checks a block; `None` if it need not be stored.
fn verify(
    state: &State,
    lease: &Lease,
    sequence: Sequence,
    bytes: Bytes,
    if_known: IfKnown,
) -> Result<Option<NewBlock>, StoreError> {
    let (header, digest, ids) = {
        let view = BlockView::parse(&bytes)?;
        let (found, expected) = (view.header.repository, state.file.id);
        if found != expected {
            return Err(StoreError::Foreign { found, expected });
        }
        let digest = view.verify_digest()?;
        let ids = view.rows().map(|row| row.map(|row| row.id)).collect::<Result<Vec<_>, _>>()?;
        (view.header, digest, ids)
    };
    if header.kind == ChunkKind::Tree && state.has_tree_block(&lease.session, sequence) {
        return Ok(None);
    }
    if if_known == IfKnown::Confirm {
        let known = known(state, lease, &ids, Some(header.kind))
            .map_err(|error| StoreError::Index { reason: error.to_string().into() })?;
        if known.iter().all(|&known| known) {
            return Ok(None);
        }
    }
    Ok(Some(NewBlock { bytes, header, digest, domain: lease.domain, session: lease.session, sequence, ids }))
}
