//! Garbage collection as its callers see it.

use std::sync::Arc;

use bytes::Bytes;
use strandline_messages::format::keys::Capability;
use strandline_messages::{DomainId, Sequence, SessionId, SnapshotId};

use super::super::fixture::*;
use super::super::keeping::Deleter;
use super::super::settings::RepositorySettings;
use super::super::{CommitOutcome, Engine, EngineError, Lease, Opened, Repository, SessionEnd};
use super::*;
use crate::storage::files::SystemFiles;
use crate::storage::layout::DataPaths;

const NOW: GcOptions = GcOptions { dry_run: false, purge: true };

/// Numbers sessions, data and trees of one test.
struct Site {
    dir: tempfile::TempDir,
    engine: Engine,
    repository: Arc<Repository>,
    sessions: u8,
}

impl Site {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let engine = open(dir.path()).await;
        let repository = repository(&engine).await;
        let site = Self { dir, engine, repository, sessions: 0 };
        // What is not committed is of no interest to most tests.
        site.settings(|settings| settings.keep_uncommitted = std::time::Duration::ZERO).await;
        site
    }

    async fn settings(&self, change: impl FnOnce(&mut RepositorySettings)) {
        let mut settings = self.repository.settings().await.unwrap();
        change(&mut settings);
        self.repository.set_settings(settings).await.unwrap();
    }

    /// Closes the engine and opens it again.
    async fn reopened(self) -> Self {
        let Self { dir, engine, repository, sessions } = self;
        drop(repository);
        engine.close().await.unwrap();
        let engine = open(dir.path()).await;
        let repository = self::repository(&engine).await;
        Self { dir, engine, repository, sessions }
    }

    async fn session(&mut self) -> Lease {
        self.sessions += 1;
        session(&self.repository, self.sessions, DomainId::FULL).await
    }

    async fn store(&self, lease: &Lease, sequence: u64, block: Vec<u8>) {
        self.repository.store(lease, Sequence(sequence), block.into()).await.unwrap();
    }

    /// A snapshot of one root over `data`, one block of data for each list.
    async fn snapshot(&mut self, root: u64, data: &[&[u64]]) -> SnapshotId {
        let lease = self.session().await;
        self.snapshot_by(&lease, root, data).await
    }

    async fn snapshot_by(&self, lease: &Lease, root: u64, data: &[&[u64]]) -> SnapshotId {
        let ids = |list: &[u64]| list.iter().map(|&i| id(i)).collect::<Vec<_>>();
        for (sequence, list) in (0u64..).zip(data) {
            self.store(lease, sequence, data_block(REPOSITORY, &ids(list))).await;
        }
        let all = ids(&data.concat());
        self.store(lease, 90, tree_block(&[(id(root), &all, &[])])).await;
        committed(self.commit(lease, root).await)
    }

    async fn commit(&self, lease: &Lease, root: u64) -> CommitOutcome {
        let manifest: Bytes = Writer::full().manifest(id(root), &format!("job{root}-{}", lease.fence));
        self.repository.commit(lease, manifest).await.unwrap()
    }

    async fn delete(&self, snapshot: SnapshotId) {
        let left = self.repository.delete_snapshots(&[snapshot], Deleter::Server, "test").await.unwrap();
        assert_eq!(left, []);
    }

    async fn gc(&self) -> GcReport {
        self.repository.collect_garbage(NOW).await.unwrap()
    }

    /// Whether each chunk is known to a new session.
    async fn known(&mut self, ids: &[u64]) -> Vec<bool> {
        let lease = self.session().await;
        let known = self.repository.known(&lease, ids.iter().map(|&i| id(i)).collect()).await.unwrap();
        self.end(&lease).await;
        known
    }

    async fn end(&self, lease: &Lease) {
        self.repository.end_session(lease, SessionEnd::Aborted, "test").await.unwrap();
    }

    async fn readable(&self, ids: &[u64]) -> Vec<bool> {
        let ids: Vec<_> = ids.iter().map(|&i| id(i)).collect();
        let mut readable = Vec::new();
        for address in self.repository.locate(DomainId::FULL, &ids).await.unwrap() {
            readable.push(match address {
                Some(address) => self.repository.read_block(address).await.is_ok(),
                None => false,
            });
        }
        readable
    }

    fn packs(&self) -> usize {
        let paths = DataPaths::new(self.dir.path()).repository(&tenant(), &REPOSITORY);
        let files = std::fs::read_dir(paths.packs()).unwrap().map(|entry| entry.unwrap().path());
        files.filter(|path| path.extension().is_some_and(|extension| extension == "pack")).count()
    }
}

fn committed(outcome: CommitOutcome) -> SnapshotId {
    match outcome {
        CommitOutcome::Committed { snapshot, .. } => snapshot,
        other => panic!("{other:?}"),
    }
}

#[actix_rt::test]
async fn what_only_deleted_snapshots_need_is_freed_and_all_else_stays() {
    let mut site = Site::new().await;
    let old = site.snapshot(100, &[&[1, 2], &[3]]).await;
    site.snapshot(101, &[&[1, 2], &[4]]).await;
    site.delete(old).await;
    let report = site.gc().await;
    assert_eq!((report.purged, report.snapshots), (1, 1));
    assert_eq!(report.chunks_needed, 4, "root, 1, 2, 4");
    assert_eq!((report.blocks_condemned, report.blocks_freed, report.blocks_waiting), (2, 2, 0), "3 and root 100");
    assert_eq!(site.known(&[1, 2, 3, 4, 100, 101]).await, [true, true, false, true, false, true]);
    assert_eq!(site.readable(&[1, 2, 3, 4, 101]).await, [true, true, false, true, true]);
    let again = site.gc().await;
    assert_eq!((again.blocks_condemned, again.blocks_freed), (0, 0));
    // The same after a restart, and after one with nothing but the storage.
    let mut site = site.reopened().await;
    assert_eq!(site.known(&[1, 2, 3, 4, 100, 101]).await, [true, true, false, true, false, true]);
    site.snapshot(102, &[&[3, 5]]).await;
    assert_eq!(site.readable(&[3, 5]).await, [true, true], "what was freed is stored again");
}

#[actix_rt::test]
async fn s37_s52_a_rebuilt_catalog_knows_what_was_deleted_purged_freed_protected_and_set() {
    let mut site = Site::new().await;
    let purged = site.snapshot(100, &[&[1]]).await;
    let deleted = site.snapshot(101, &[&[2]]).await;
    let kept = site.snapshot(102, &[&[3]]).await;
    site.delete(purged).await;
    site.gc().await;
    site.delete(deleted).await;
    site.repository.protect_snapshots(&[kept], true).await.unwrap();
    site.settings(|settings| settings.min_retention = std::time::Duration::from_secs(9)).await;
    let Site { dir, engine, repository, sessions } = site;
    drop(repository);
    engine.close().await.unwrap();
    std::fs::remove_file(DataPaths::new(dir.path()).catalog()).unwrap();
    std::fs::remove_dir_all(DataPaths::new(dir.path()).repository(&tenant(), &REPOSITORY).index()).unwrap();
    let engine = open(dir.path()).await;
    let repository = self::repository(&engine).await;
    let mut site = Site { dir, engine, repository, sessions };
    assert_eq!(site.repository.snapshots(0, 10).await.unwrap().len(), 1);
    let gone = site.repository.deleted_snapshots(0, 10).await.unwrap();
    assert_eq!(gone.len(), 1);
    assert_eq!(gone[0].deletion.as_ref().unwrap().reason, "test");
    assert_eq!(site.repository.settings().await.unwrap().min_retention.as_secs(), 9);
    let left = site.repository.delete_snapshots(&[kept], Deleter::Server, "").await.unwrap();
    assert!(left[0].1.contains("protected"), "{left:?}");
    assert_eq!(site.known(&[1, 2, 3, 101]).await, [false, true, true, true]);
    assert_eq!(site.repository.undelete_snapshots(&[deleted, purged]).await.unwrap().len(), 1, "purged is purged");
    assert_eq!(site.repository.snapshots(0, 10).await.unwrap().len(), 2);
}

#[actix_rt::test]
async fn a_deleted_snapshot_can_be_brought_back_until_its_time_is_over() {
    let mut site = Site::new().await;
    let snapshot = site.snapshot(100, &[&[1]]).await;
    site.delete(snapshot).await;
    assert_eq!(site.repository.snapshots(0, 10).await.unwrap(), []);
    let options = GcOptions { purge: false, ..NOW };
    let report = site.repository.collect_garbage(options).await.unwrap();
    assert_eq!((report.purged, report.blocks_condemned), (0, 0), "seven days are not over");
    site.repository.undelete_snapshots(&[snapshot]).await.unwrap();
    assert_eq!(site.repository.snapshots(0, 10).await.unwrap().len(), 1);
    site.settings(|settings| settings.undelete = std::time::Duration::ZERO).await;
    site.delete(snapshot).await;
    assert_eq!(site.repository.collect_garbage(options).await.unwrap().purged, 1);
    let left = site.repository.undelete_snapshots(&[snapshot]).await.unwrap();
    assert!(left[0].1.contains("purged"), "{left:?}");
}

#[actix_rt::test]
async fn s33_a_session_that_was_told_known_before_the_collection_commits_over_it() {
    let mut site = Site::new().await;
    let old = site.snapshot(100, &[&[1, 2]]).await;
    let lease = site.session().await;
    assert_eq!(site.repository.known(&lease, vec![id(1), id(2), id(100)]).await.unwrap(), [true; 3]);
    site.delete(old).await;
    let report = site.gc().await;
    assert_eq!((report.blocks_condemned, report.blocks_freed, report.blocks_waiting), (2, 0, 2), "a lease is open");
    assert_eq!(site.known(&[1, 2, 100]).await, [false; 3], "later sessions do not rely on it");
    assert_eq!(site.repository.known(&lease, vec![id(1)]).await.unwrap(), [true], "this one does");
    site.store(&lease, 0, tree_block(&[(id(101), &[id(1), id(2)], &[id(100)])])).await;
    committed(site.commit(&lease, 101).await);
    let report = site.gc().await;
    assert_eq!(
        (report.blocks_freed, report.blocks_condemned, report.blocks_waiting),
        (0, 0, 0),
        "revived by the commit"
    );
    assert_eq!(site.readable(&[1, 2, 100, 101]).await, [true; 4]);
}

#[actix_rt::test]
async fn s33_a_resumed_session_keeps_its_epoch_over_a_collection_and_freeing_waits_for_it() {
    let mut site = Site::new().await;
    let old = site.snapshot(100, &[&[1]]).await;
    let first = site.session().await;
    assert_eq!(site.repository.known(&first, vec![id(1)]).await.unwrap(), [true]);
    site.delete(old).await;
    assert_eq!(site.gc().await.blocks_waiting, 2);
    let resumed = site.repository.open_session(SessionId([200; 16]), AGENT, DomainId::FULL, Some(first.session)).await;
    let Opened::Fresh(second) = resumed.unwrap() else { panic!() };
    assert_eq!(site.gc().await.blocks_freed, 0);
    site.store(&second, 0, tree_block(&[(id(101), &[id(1)], &[])])).await;
    committed(site.commit(&second, 101).await);
    let report = site.gc().await;
    assert_eq!(report.blocks_freed, 1, "root 100; 1 is needed again");
    assert_eq!(site.readable(&[1, 101]).await, [true; 2]);
}

#[actix_rt::test]
async fn s33_a_tree_that_nothing_needs_but_stays_in_a_needed_block_does_not_vouch_for_what_was_freed() {
    let mut site = Site::new().await;
    let lease = site.session().await;
    site.store(&lease, 0, data_block(REPOSITORY, &[id(1)])).await;
    site.store(&lease, 1, data_block(REPOSITORY, &[id(2)])).await;
    // Trees 10 and 11 share a block.
    site.store(&lease, 2, tree_block(&[(id(10), &[id(1)], &[]), (id(11), &[id(2)], &[])])).await;
    site.store(&lease, 3, tree_block(&[(id(100), &[], &[id(10), id(11)])])).await;
    let both = committed(site.commit(&lease, 100).await);
    let lease = site.session().await;
    site.store(&lease, 0, tree_block(&[(id(101), &[], &[id(11)])])).await;
    committed(site.commit(&lease, 101).await);
    site.delete(both).await;
    let report = site.gc().await;
    assert_eq!((report.blocks_freed, report.blocks_partly_dead), (2, 1), "root 100 and data 1; trees 10 and 11");
    assert_eq!(site.known(&[1, 2, 10, 11, 101]).await, [false, true, false, true, true]);
    let lease = site.session().await;
    site.store(&lease, 0, tree_block(&[(id(102), &[], &[id(10)])])).await;
    match site.commit(&lease, 102).await {
        CommitOutcome::Missing { ids, .. } => assert_eq!(ids, [id(1)]),
        other => panic!("{other:?}"),
    }
}

#[actix_rt::test]
async fn s33_a_commit_in_the_middle_of_a_collection_is_marked_before_anything_is_condemned() {
    let mut site = Site::new().await;
    let old = site.snapshot(100, &[&[1]]).await;
    site.delete(old).await;
    site.repository.purge(true).await.unwrap();
    let lease = site.session().await;
    site.store(&lease, 0, tree_block(&[(id(101), &[id(1)], &[])])).await;
    // The marks are taken, then the commit comes, then the marks are asked to condemn.
    let state = Arc::clone(&site.repository.state);
    site.repository.writer.seal_open().await;
    let (mut marks, mut seen) = (None, Seen { place: 0, commits: 0 });
    let (young, mut report) = (Arc::default(), GcReport::default());
    let marked = site.repository.mark(&mut marks, &mut seen, &young, &mut report).await.unwrap();
    assert_eq!(marked.condemn.len(), 3, "1, root 100 and root 101");
    committed(site.commit(&lease, 101).await);
    let changes = marked.condemn.iter().map(|&place| (place, BlockState::Condemned { epoch: 0 })).collect();
    let publication = Publication { changes, unflag: Vec::new(), commits_seen: Some(seen.commits) };
    assert_eq!(state.publish(publication).await.unwrap(), None, "a commit was counted that the marks have not seen");
    let marked = site.repository.mark(&mut marks, &mut seen, &young, &mut report).await.unwrap();
    assert_eq!(marked.condemn.len(), 1, "root 100");
    site.gc().await;
    assert_eq!(site.readable(&[1, 101]).await, [true; 2]);
}

#[actix_rt::test]
async fn a_dry_run_tells_and_changes_nothing() {
    let mut site = Site::new().await;
    let old = site.snapshot(100, &[&[1], &[2]]).await;
    site.settings(|settings| settings.undelete = std::time::Duration::ZERO).await;
    site.delete(old).await;
    let options = GcOptions { dry_run: true, purge: false };
    let report = site.repository.collect_garbage(options).await.unwrap();
    assert_eq!((report.dry_run, report.purged, report.blocks_condemned), (true, 0, 0), "it is not purged yet");
    site.repository.purge(true).await.unwrap();
    let report = site.repository.collect_garbage(options).await.unwrap();
    assert_eq!((report.blocks_condemned, report.blocks_freed), (3, 0));
    assert_eq!(site.known(&[1, 2, 100]).await, [true; 3]);
}

#[actix_rt::test]
async fn packs_that_are_dead_are_removed_and_those_that_are_nearly_dead_are_emptied() {
    let mut site = Site::new().await;
    let old = site.snapshot(100, &[&[1], &[2], &[3], &[4], &[5], &[6], &[7], &[8], &[9]]).await;
    site.gc().await;
    let lease = site.session().await;
    site.store(&lease, 0, tree_block(&[(id(101), &[id(5)], &[])])).await;
    committed(site.commit(&lease, 101).await);
    site.gc().await;
    assert_eq!(site.packs(), 2);
    site.delete(old).await;
    let report = site.gc().await;
    assert_eq!((report.blocks_freed, report.blocks_moved, report.packs_dropped), (10, 1, 1), "{report:?}");
    assert_eq!(site.readable(&[5, 101]).await, [true; 2]);
    let mut site = site.reopened().await;
    assert_eq!(site.readable(&[5, 101, 1]).await, [true, true, false]);
    assert_eq!(site.known(&[5, 101, 1]).await, [true, true, false]);
    let last = site.repository.snapshots(0, 10).await.unwrap();
    site.delete(strandline_messages::format::manifest::snapshot_id(&last[0].manifest)).await;
    let report = site.gc().await;
    assert_eq!(site.packs(), 0, "{report:?}");
}

#[actix_rt::test]
async fn s33_blocks_that_were_moved_since_they_were_listed_as_partly_dead_are_passed_over() {
    let mut site = Site::new().await;
    let old = site.snapshot(100, &[&[1], &[2], &[3], &[4], &[5, 50], &[6], &[7], &[8], &[9]]).await;
    site.gc().await;
    let lease = site.session().await;
    site.store(&lease, 0, tree_block(&[(id(101), &[id(5)], &[])])).await;
    committed(site.commit(&lease, 101).await);
    site.delete(old).await;
    let report = site.gc().await;
    assert_eq!((report.blocks_partly_dead, report.blocks_moved, report.packs_dropped), (1, 1, 1), "{report:?}");
    let listed = site.repository.partly_dead(0, 10).await.unwrap();
    assert_eq!(listed.iter().map(|(_, needed)| needed.len()).collect::<Vec<_>>(), [0], "its pack is gone");
    site.repository.supersede(listed.iter().map(|(block, _)| (block.pack, block.offset))).await.unwrap();
    let again = site.gc().await;
    assert_eq!((again.blocks_partly_dead, again.blocks_freed), (1, 0));
    let listed = site.repository.partly_dead(0, 10).await.unwrap();
    assert_eq!(listed[0].1, [id(5)], "where it is now");
    assert_eq!(site.readable(&[5, 101]).await, [true; 2]);
}

#[actix_rt::test]
async fn a_tree_that_was_moved_is_still_complete() {
    let mut site = Site::new().await;
    let old = site.snapshot(100, &[&[1], &[2], &[3], &[4], &[5], &[6], &[7], &[8], &[9]]).await;
    let lease = site.session().await;
    site.store(&lease, 0, tree_block(&[(id(101), &[id(5)], &[])])).await;
    committed(site.commit(&lease, 101).await);
    site.settings(|settings| settings.compact_below_percent = 50).await;
    site.delete(old).await;
    let report = site.gc().await;
    assert_eq!(report.blocks_moved, 2, "data 5 and root 101: {report:?}");
    assert_eq!(site.known(&[101, 5]).await, [true, true]);
}

#[actix_rt::test]
async fn what_a_session_left_without_a_snapshot_is_kept_for_its_next_attempt() {
    let mut site = Site::new().await;
    site.settings(|settings| settings.keep_uncommitted = std::time::Duration::from_hours(1)).await;
    let lease = site.session().await;
    site.store(&lease, 0, data_block(REPOSITORY, &[id(1)])).await;
    let report = site.gc().await;
    assert_eq!((report.blocks_young, report.blocks_condemned), (1, 0), "its session is under way");
    site.end(&lease).await;
    let report = site.gc().await;
    assert_eq!((report.blocks_young, report.blocks_condemned), (1, 0), "it may come back");
    let mut site = site.reopened().await;
    assert_eq!(site.gc().await.blocks_young, 1);
    assert_eq!(site.known(&[1]).await, [true]);
    let lease = site.session().await;
    site.store(&lease, 0, tree_block(&[(id(101), &[id(1)], &[])])).await;
    committed(site.commit(&lease, 101).await);
    let report = site.gc().await;
    assert_eq!((report.blocks_young, report.blocks_condemned), (0, 0), "needed now");
}

#[actix_rt::test]
async fn a_snapshot_that_is_being_read_is_not_purged() {
    let mut site = Site::new().await;
    let snapshot = site.snapshot(100, &[&[1]]).await;
    let reader = site.repository.open_reading_session(SessionId([150; 16]), AGENT, DomainId::FULL, None).await;
    let Opened::Fresh(reader) = reader.unwrap() else { panic!() };
    site.repository.pin(&reader, snapshot).await.unwrap();
    site.delete(snapshot).await;
    assert_eq!(site.gc().await.purged, 0);
    assert_eq!(site.readable(&[1, 100]).await, [true; 2]);
    site.end(&reader).await;
    assert_eq!(site.gc().await.purged, 1);
    assert!(matches!(site.repository.pin(&reader, snapshot).await, Err(EngineError::NoSuchSnapshot { .. })));
}

#[actix_rt::test]
async fn nobody_deletes_what_is_younger_than_the_minimum_retention_and_agents_only_where_they_may() {
    let mut site = Site::new().await;
    let snapshot = site.snapshot(100, &[&[1]]).await;
    site.settings(|settings| settings.min_retention = std::time::Duration::from_hours(1)).await;
    for by in [Deleter::Server, Deleter::Agent(AGENT)] {
        let left = site.repository.delete_snapshots(&[snapshot], by, "").await.unwrap();
        assert!(left[0].1.contains("1h"), "{left:?}");
    }
    site.settings(|settings| {
        settings.min_retention = std::time::Duration::ZERO;
        settings.agents_may_delete = false;
    })
    .await;
    let refused = site.repository.delete_snapshots(&[snapshot], Deleter::Agent(AGENT), "").await;
    assert!(matches!(refused, Err(EngineError::AgentsMayNotDelete)));
    site.delete(snapshot).await;
}

#[actix_rt::test]
async fn domains_are_collected_each_for_itself() {
    let mut site = Site::new().await;
    let narrow = Writer::new(7, Capability::Write);
    site.snapshot(100, &[&[1]]).await;
    site.sessions += 1;
    let lease = session(&site.repository, site.sessions, narrow.domain()).await;
    site.store(&lease, 0, data_block(REPOSITORY, &[id(1), id(2)])).await;
    site.store(&lease, 1, tree_block(&[(id(100), &[id(1)], &[])])).await;
    let outcome = site.repository.commit(&lease, narrow.manifest(id(100), "narrow")).await.unwrap();
    let snapshot = committed(outcome);
    let report = site.gc().await;
    assert_eq!((report.blocks_condemned, report.blocks_partly_dead), (0, 1), "each domain keeps its copy of 1");
    site.delete(snapshot).await;
    let report = site.gc().await;
    assert_eq!(report.blocks_freed, 2, "the narrow domain's only");
    assert_eq!(site.readable(&[1, 100]).await, [true; 2]);
}

#[actix_rt::test]
async fn a_tree_that_cannot_be_read_stops_the_collection_before_anything_is_freed() {
    let mut site = Site::new().await;
    let old = site.snapshot(100, &[&[1]]).await;
    site.snapshot(101, &[&[2]]).await;
    site.repository.writer.seal_open().await;
    let tree = site.repository.locate(DomainId::FULL, &[id(101)]).await.unwrap()[0].unwrap();
    let path = DataPaths::new(site.dir.path()).repository(&tenant(), &REPOSITORY).pack(tree.pack);
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[tree.offset as usize + 150] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    site.delete(old).await;
    let refused = site.repository.collect_garbage(NOW).await.unwrap_err();
    assert!(matches!(refused, EngineError::Unwalkable { .. }), "{refused}");
    assert_eq!(site.readable(&[1, 2]).await, [true; 2]);
}

#[actix_rt::test]
async fn many_small_packs_are_collected_over_restarts_and_everything_kept_stays_readable() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open_small(dir.path(), Arc::new(SystemFiles)).await;
    let repository = repository(&engine).await;
    let mut site = Site { dir, engine, repository, sessions: 0 };
    site.settings(|settings| settings.keep_uncommitted = std::time::Duration::ZERO).await;
    let mut kept = Vec::new();
    for round in 0..12u64 {
        let base = 1000 * (round + 1);
        let data: Vec<Vec<u64>> = (0..10).map(|i| vec![base + i, base + 100 + i, i]).collect();
        let data: Vec<&[u64]> = data.iter().map(Vec::as_slice).collect();
        let snapshot = site.snapshot(base + 900, &data).await;
        kept.push((snapshot, base));
        if round % 2 == 1 {
            let (gone, base) = kept.remove(0);
            site.delete(gone).await;
            site.gc().await;
            assert_eq!(site.readable(&[base + 900]).await, [false]);
        }
    }
    let Site { dir, engine, repository, sessions } = site;
    drop(repository);
    engine.close().await.unwrap();
    let engine = open_small(dir.path(), Arc::new(SystemFiles)).await;
    let repository = self::repository(&engine).await;
    let mut site = Site { dir, engine, repository, sessions };
    for (_, base) in &kept {
        let ids: Vec<u64> = (0..10).flat_map(|i| [base + i, base + 100 + i, i]).chain([base + 900]).collect();
        assert!(site.readable(&ids).await.iter().all(|readable| *readable), "{base}");
        assert!(site.known(&ids).await.iter().all(|known| *known), "{base}");
    }
}

#[actix_rt::test]
async fn the_number_of_a_removed_pack_is_not_used_again_by_a_later_start() {
    let mut site = Site::new().await;
    let only = site.snapshot(100, &[&[1]]).await;
    site.delete(only).await;
    assert_eq!(site.gc().await.packs_dropped, 1);
    assert_eq!(site.packs(), 0);
    let mut site = site.reopened().await;
    // What the index and the catalog remember of the old pack must not be taken for the new one's.
    site.snapshot(101, &[&[1]]).await;
    assert_eq!(site.known(&[1, 101]).await, [true, true]);
    assert_eq!(site.readable(&[1, 101]).await, [true, true]);
}

#[actix_rt::test]
async fn a_removal_of_a_pack_that_a_crash_cut_short_is_finished_by_the_next_start() {
    let mut site = Site::new().await;
    let only = site.snapshot(100, &[&[1]]).await;
    site.repository.writer.seal_open().await;
    let directory = DataPaths::new(site.dir.path()).repository(&tenant(), &REPOSITORY).packs();
    let infos = site.repository.state.pack_infos();
    let packs: Vec<_> = infos.iter().map(|info| (info.number, std::fs::read(pack(&directory, info.number)))).collect();
    site.delete(only).await;
    assert_eq!(site.gc().await.packs_dropped, 1);
    // The files are still there, and the catalog's last transaction is not.
    for (number, bytes) in packs {
        std::fs::write(pack(&directory, number), bytes.unwrap()).unwrap();
        std::fs::write(pack(&directory, number).with_extension("state"), b"freed").unwrap();
    }
    let (catalog, number) = (&site.repository.state.common.catalog, site.repository.state.number);
    catalog.record_packs(number, &infos).await.unwrap();
    let site = site.reopened().await;
    assert_eq!(site.packs(), 0);
    assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 0);
    let (catalog, number) = (&site.repository.state.common.catalog, site.repository.state.number);
    assert!(catalog.packs(number).await.unwrap().is_empty());
}

fn pack(directory: &std::path::Path, number: u32) -> std::path::PathBuf {
    directory.join(format!("{number:08x}.pack"))
}
