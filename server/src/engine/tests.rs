//! The engine as its callers see it.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use strandline_messages::format::keys::Capability;
use strandline_messages::format::manifest::ManifestV1;
use strandline_messages::format::receipt::ReceiptV1;
use strandline_messages::{AgentId, ChunkId, DomainId, RepositoryId, Sequence, SessionId, limits};

use super::fixture::*;
use super::known::BlockState;
use super::*;

async fn store(repository: &Repository, lease: &Lease, sequence: u64, block: Vec<u8>) {
    let stored = repository.store(lease, Sequence(sequence), block.into()).await.unwrap();
    assert_eq!(stored.into_inner(), Sequence(sequence));
}

/// Stores a small snapshot: data 1..=3, tree 10 over 1 and 2, root 11 over 3 and tree 10.
async fn store_small(repository: &Repository, lease: &Lease) -> ChunkId {
    store(repository, lease, 0, data_block(REPOSITORY, &[id(1), id(2), id(3)])).await;
    store(repository, lease, 1, tree_block(&[(id(10), &[id(1), id(2)], &[])])).await;
    store(repository, lease, 2, tree_block(&[(id(11), &[id(3)], &[id(10)])])).await;
    id(11)
}

async fn commit_ok(repository: &Repository, lease: &Lease, manifest: Bytes) -> Vec<u8> {
    match repository.commit(lease, manifest).await.unwrap() {
        CommitOutcome::Committed { receipt, .. } => receipt,
        other => panic!("{other:?}"),
    }
}

fn packs(dir: &Path) -> Vec<PathBuf> {
    let paths = DataPaths::new(dir).repository(&tenant(), &REPOSITORY);
    let mut packs: Vec<PathBuf> = fs::read_dir(paths.packs()).unwrap().map(|entry| entry.unwrap().path()).collect();
    packs.sort();
    packs
}

fn index_directory(dir: &Path) -> PathBuf {
    DataPaths::new(dir).repository(&tenant(), &REPOSITORY).index()
}

/// Place, manifest, receipt of the kept snapshots.
async fn listed(repository: &Repository, after: u64, limit: usize) -> Vec<(u64, Vec<u8>, Vec<u8>)> {
    let rows = repository.snapshots(after, limit).await.unwrap();
    rows.into_iter().map(|row| (row.place, row.manifest, row.receipt)).collect()
}

async fn known(repository: &Repository, lease: &Lease, ids: &[u64]) -> Vec<bool> {
    repository.known(lease, ids.iter().map(|&i| id(i)).collect()).await.unwrap()
}

#[actix_rt::test]
async fn a_snapshot_is_stored_committed_listed_and_read_back() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).await;
    let repository = repository(&engine).await;
    let lease = session(&repository, 1, DomainId::FULL).await;
    assert_eq!(known(&repository, &lease, &[1, 10, 11]).await, [false; 3]);
    let root = store_small(&repository, &lease).await;
    assert_eq!(known(&repository, &lease, &[1, 2, 3, 4]).await, [true, true, true, false]);
    let manifest = Writer::full().manifest(root, "job");
    let receipt = commit_ok(&repository, &lease, manifest.clone()).await;
    let decoded = ReceiptV1::decode(&receipt).unwrap();
    assert_eq!((decoded.order, decoded.agent), (1, AGENT));
    let key = aws_lc_rs::signature::UnparsedPublicKey::new(&aws_lc_rs::signature::ED25519, engine.server_public_key());
    key.verify(&decoded.encode_signed_part(), &decoded.signature).unwrap();
    assert_eq!(listed(&repository, 0, 10).await, [(1, manifest.to_vec(), receipt)]);
    let next = session(&repository, 2, DomainId::FULL).await;
    assert_eq!(known(&repository, &next, &[10, 11]).await, [true, true], "committed trees are complete");
    let addresses = repository.locate(DomainId::FULL, &[id(2), id(99)]).await.unwrap();
    let block = repository.read_block(addresses[0].unwrap()).await.unwrap();
    assert_eq!((addresses[0].unwrap().position, addresses[1]), (1, None));
    assert!(block.len() > 100);
    let totals = repository.totals().await.unwrap();
    assert_eq!((totals.packs, totals.blocks, totals.snapshots), (1, 3, 1));
    assert!(engine.free_bytes().await > 0);
    engine.close().await.unwrap();
}

#[actix_rt::test]
async fn what_was_confirmed_survives_a_process_that_just_ends() {
    let dir = tempfile::tempdir().unwrap();
    let (manifest, receipt) = {
        let engine = open(dir.path()).await;
        let repository = repository(&engine).await;
        let lease = session(&repository, 1, DomainId::FULL).await;
        let root = store_small(&repository, &lease).await;
        let manifest = Writer::full().manifest(root, "job");
        (manifest.clone(), commit_ok(&repository, &lease, manifest).await)
    };
    for _ in 0..3 {
        let engine = open(dir.path()).await;
        let repository = repository(&engine).await;
        assert_eq!(listed(&repository, 0, 10).await, [(1, manifest.to_vec(), receipt.clone())]);
        let lease = session(&repository, rand_session(), DomainId::FULL).await;
        assert_eq!(known(&repository, &lease, &[1, 2, 3, 10, 11]).await, [true; 5]);
        assert_eq!(packs(dir.path()).len(), 1);
    }
}

fn rand_session() -> u8 {
    static NEXT: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(100);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

#[actix_rt::test]
async fn s05_a_block_is_confirmed_only_after_file_and_directory_are_synced() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(TestDisk::default());
    let engine = open_small(dir.path(), Arc::clone(&disk) as Arc<dyn FileOps>).await;
    let repository = repository(&engine).await;
    let lease = session(&repository, 1, DomainId::FULL).await;
    disk.events.lock().clear();
    for i in 0..2 {
        store(&repository, &lease, i, data_block(REPOSITORY, &[id(i)])).await;
        disk.events.lock().push(Event::Confirmed);
    }
    let events = disk.events.lock().clone();
    let expected = [
        Event::Create,
        Event::Write,
        Event::Write,
        Event::Sync,
        Event::SyncDirectory,
        Event::Confirmed,
        Event::Write,
        Event::Sync,
        Event::Confirmed,
    ];
    assert_eq!(events, expected);
}

#[actix_rt::test]
async fn s16_every_block_sent_is_confirmed_and_found_after_a_restart() {
    let dir = tempfile::tempdir().unwrap();
    {
        let engine = open_small(dir.path(), Arc::new(SystemFiles)).await;
        let repository = repository(&engine).await;
        let lease = session(&repository, 1, DomainId::FULL).await;
        let blocks =
            (0..200u64).map(|i| repository.store(&lease, Sequence(i), data_block(REPOSITORY, &[id(i)]).into()));
        for (i, stored) in (0u64..).zip(futures_util::future::join_all(blocks).await) {
            assert_eq!(stored.unwrap().into_inner(), Sequence(i));
        }
        engine.close().await.unwrap();
    }
    let engine = open_small(dir.path(), Arc::new(SystemFiles)).await;
    let repository = repository(&engine).await;
    let ids: Vec<ChunkId> = (0..200).map(id).collect();
    let found = repository.locate(DomainId::FULL, &ids).await.unwrap();
    for address in found {
        repository.read_block(address.unwrap()).await.unwrap();
    }
    assert!(packs(dir.path()).len() > 5, "small packs fill up and are sealed");
}

#[actix_rt::test]
async fn s29_after_a_failed_fsync_the_pack_is_closed_and_its_blocks_go_to_a_new_one() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(TestDisk::default());
    let engine = open_small(dir.path(), Arc::clone(&disk) as Arc<dyn FileOps>).await;
    let repository = repository(&engine).await;
    let lease = session(&repository, 1, DomainId::FULL).await;
    store(&repository, &lease, 0, data_block(REPOSITORY, &[id(0)])).await;
    disk.sync_errors.lock().push(Some(io::ErrorKind::Other));
    store(&repository, &lease, 1, data_block(REPOSITORY, &[id(1)])).await;
    let found = repository.locate(DomainId::FULL, &[id(0), id(1)]).await.unwrap();
    assert_eq!((found[0].unwrap().pack, found[1].unwrap().pack), (1, 2));
    store(&repository, &lease, 2, data_block(REPOSITORY, &[id(2)])).await;
    engine.close().await.unwrap();
    assert!(disk.synced_after_failure.lock().is_empty(), "a file was synced again after its sync had failed");
}

#[actix_rt::test]
async fn s29_what_was_written_while_a_sync_failed_goes_to_new_packs_too() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(TestDisk::default());
    let engine = open_small(dir.path(), Arc::clone(&disk) as Arc<dyn FileOps>).await;
    let repository = repository(&engine).await;
    let lease = session(&repository, 1, DomainId::FULL).await;
    disk.events.lock().clear();
    let block = |i| repository.store(&lease, Sequence(i), data_block(REPOSITORY, &[id(i)]).into());
    let writes = || disk.events.lock().iter().filter(|event| **event == Event::Write).count();
    let meanwhile = async {
        // The header and all four blocks are in the file before the first sync ends.
        while writes() < 5 {
            actix_rt::time::sleep(Duration::from_millis(1)).await;
        }
    };
    let blocks = futures_util::future::join_all((0..4).map(block));
    futures_util::pin_mut!(blocks);
    disk.holds_syncs.store(true, Ordering::SeqCst);
    let first = futures_util::future::select(&mut blocks, Box::pin(meanwhile)).await;
    assert!(matches!(first, futures_util::future::Either::Right(_)), "confirmed before any sync");
    disk.sync_errors.lock().push(Some(io::ErrorKind::Other));
    disk.holds_syncs.store(false, Ordering::SeqCst);
    for (i, stored) in (0u64..).zip(blocks.await) {
        assert_eq!(stored.unwrap().into_inner(), Sequence(i));
    }
    let ids: Vec<ChunkId> = (0..4).map(id).collect();
    for address in repository.locate(DomainId::FULL, &ids).await.unwrap() {
        repository.read_block(address.unwrap()).await.unwrap();
    }
    engine.close().await.unwrap();
    assert!(disk.synced_after_failure.lock().is_empty(), "a file was synced again after its sync had failed");
}

#[actix_rt::test]
async fn s29_a_disk_that_keeps_failing_confirms_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(TestDisk::default());
    let engine = open_small(dir.path(), Arc::clone(&disk) as Arc<dyn FileOps>).await;
    let repository = repository(&engine).await;
    let lease = session(&repository, 1, DomainId::FULL).await;
    *disk.sync_errors.lock() = vec![Some(io::ErrorKind::Other); 100];
    let refused = repository.store(&lease, Sequence(0), data_block(REPOSITORY, &[id(0)]).into()).await;
    assert!(matches!(refused, Err(StoreError::Io { .. })), "{refused:?}");
    assert_eq!(known(&repository, &lease, &[0]).await, [false]);
    disk.sync_errors.lock().clear();
    store(&repository, &lease, 0, data_block(REPOSITORY, &[id(0)])).await;
}

#[actix_rt::test]
async fn s28_a_full_disk_is_said_to_be_full_and_what_is_there_stays_readable() {
    let dir = tempfile::tempdir().unwrap();
    let disk = Arc::new(TestDisk::default());
    let engine = open_small(dir.path(), Arc::clone(&disk) as Arc<dyn FileOps>).await;
    let repository = repository(&engine).await;
    let lease = session(&repository, 1, DomainId::FULL).await;
    store(&repository, &lease, 0, data_block(REPOSITORY, &[id(0)])).await;
    disk.write_errors.lock().push(Some(io::ErrorKind::StorageFull));
    let refused = repository.store(&lease, Sequence(1), data_block(REPOSITORY, &[id(1)]).into()).await;
    assert!(matches!(refused, Err(StoreError::Full { .. })), "{refused:?}");
    let found = repository.locate(DomainId::FULL, &[id(0), id(1)]).await.unwrap();
    repository.read_block(found[0].unwrap()).await.unwrap();
    assert_eq!(found[1], None);
    for failing in 1..8 {
        // The header of a new pack can be written, then not; then its first block cannot.
        let error = Some(io::ErrorKind::StorageFull);
        *disk.write_errors.lock() = if failing % 2 == 0 { vec![error] } else { vec![error, None] };
        let refused = repository.store(&lease, Sequence(1), data_block(REPOSITORY, &[id(1)]).into()).await;
        assert!(matches!(refused, Err(StoreError::Full { .. })), "{refused:?}");
    }
    assert_eq!(packs(dir.path()).len(), 1, "vain attempts leave nothing behind");
    disk.write_errors.lock().clear();
    store(&repository, &lease, 1, data_block(REPOSITORY, &[id(1)])).await;
}

#[actix_rt::test]
async fn s27_a_torn_tail_costs_only_the_torn_block_and_later_blocks_go_to_a_new_pack() {
    let dir = tempfile::tempdir().unwrap();
    {
        let engine = open(dir.path()).await;
        let repository = repository(&engine).await;
        let lease = session(&repository, 1, DomainId::FULL).await;
        for i in 0..3 {
            store(&repository, &lease, i, data_block(REPOSITORY, &[id(i)])).await;
        }
    }
    let pack = packs(dir.path()).remove(0);
    let whole = fs::read(&pack).unwrap();
    fs::write(&pack, &whole[..whole.len() - 10]).unwrap();
    let engine = open(dir.path()).await;
    let repository = repository(&engine).await;
    let lease = session(&repository, 2, DomainId::FULL).await;
    // The index covered nothing of it on disk, so it was rebuilt from what the scan found.
    assert_eq!(known(&repository, &lease, &[0, 1, 2]).await, [true, true, false]);
    store(&repository, &lease, 0, data_block(REPOSITORY, &[id(2)])).await;
    assert_eq!(packs(dir.path()).len(), 2);
}

#[actix_rt::test]
async fn a_lost_or_damaged_index_is_built_again_equal() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open_small(dir.path(), Arc::new(SystemFiles)).await;
    let main = repository(&engine).await;
    let lease = session(&main, 1, DomainId::FULL).await;
    let root = store_small(&main, &lease).await;
    for i in 0..40 {
        store(&main, &lease, 10 + i, data_block(REPOSITORY, &[id(100 + i), id(200 + i)])).await;
    }
    // Incomplete, because nothing is known of 999.
    store(&main, &lease, 90, tree_block(&[(id(12), &[id(999)], &[root])])).await;
    commit_ok(&main, &lease, Writer::full().manifest(root, "job")).await;
    let ids: Vec<ChunkId> = (0..300).map(id).collect();
    let before = main.locate(DomainId::FULL, &ids).await.unwrap();
    engine.close().await.unwrap();
    drop((main, engine));
    for damage in 0..3 {
        let directory = index_directory(dir.path());
        match damage {
            0 => fs::remove_dir_all(&directory).unwrap(),
            1 => fs::write(directory.join("MANIFEST"), b"nonsense").unwrap(),
            _ => {
                for file in fs::read_dir(&directory).unwrap() {
                    let path = file.unwrap().path();
                    if path.extension().is_some() {
                        fs::write(path, b"short").unwrap();
                    }
                }
            }
        }
        let engine = open_small(dir.path(), Arc::new(SystemFiles)).await;
        let repository = repository(&engine).await;
        assert_eq!(repository.locate(DomainId::FULL, &ids).await.unwrap(), before, "damage {damage}");
        let lease = session(&repository, rand_session(), DomainId::FULL).await;
        assert_eq!(known(&repository, &lease, &[1, 10, 11, 12, 150]).await, [true, true, true, false, false]);
        engine.close().await.unwrap();
    }
}

#[actix_rt::test]
async fn s37_a_lost_catalog_is_made_anew_from_the_storage() {
    let dir = tempfile::tempdir().unwrap();
    let mut expected = Vec::new();
    {
        let engine = open(dir.path()).await;
        let repository = repository(&engine).await;
        for n in 1..4u8 {
            let lease = session(&repository, n, DomainId::FULL).await;
            let root = store_small(&repository, &lease).await;
            let manifest = Writer::full().manifest(root, &format!("job-{n}"));
            let receipt = commit_ok(&repository, &lease, manifest.clone()).await;
            expected.push((u64::from(n), manifest.to_vec(), receipt));
        }
        engine.close().await.unwrap();
    }
    for suffix in ["", "-wal", "-shm"] {
        let _ = fs::remove_file(dir.path().join(format!("catalog.sqlite{suffix}")));
    }
    let engine = open(dir.path()).await;
    let repository = repository(&engine).await;
    assert_eq!(listed(&repository, 0, 10).await, expected);
    assert_eq!(listed(&repository, 1, 1).await, expected[1..2]);
}

#[actix_rt::test]
async fn a_manifest_whose_row_was_lost_gets_it_back_and_an_incomplete_one_does_not() {
    let dir = tempfile::tempdir().unwrap();
    let writer = Writer::full();
    let (manifest, receipt) = {
        let engine = open(dir.path()).await;
        let repository = repository(&engine).await;
        let lease = session(&repository, 1, DomainId::FULL).await;
        let root = store_small(&repository, &lease).await;
        let manifest = writer.manifest(root, "job");
        let receipt = commit_ok(&repository, &lease, manifest.clone()).await;
        sqlx::query("DELETE FROM snapshots").execute(engine.pool()).await.unwrap();
        let dangling = writer.manifest(id(4711), "dangling");
        let paths = DataPaths::new(dir.path()).repository(&tenant(), &REPOSITORY);
        let snapshot = strandline_messages::format::manifest::snapshot_id(&dangling);
        fs::write(paths.manifest(&snapshot), &dangling).unwrap();
        (manifest, receipt)
    };
    let engine = open(dir.path()).await;
    let repository = repository(&engine).await;
    assert_eq!(listed(&repository, 0, 10).await, [(1, manifest.to_vec(), receipt)]);
}

#[actix_rt::test]
async fn the_same_manifest_again_has_the_same_receipt() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).await;
    let repository = repository(&engine).await;
    let lease = session(&repository, 1, DomainId::FULL).await;
    let manifest = Writer::full().manifest(store_small(&repository, &lease).await, "job");
    let receipt = commit_ok(&repository, &lease, manifest.clone()).await;
    assert_eq!(commit_ok(&repository, &lease, manifest.clone()).await, receipt);
    let other = session(&repository, 2, DomainId::FULL).await;
    assert_eq!(commit_ok(&repository, &other, manifest).await, receipt);
    assert_eq!(repository.snapshots(0, 10).await.unwrap().len(), 1);
    assert!(repository.open_leases().await.unwrap().is_empty());
    let states: Vec<String> = repository.sessions(10).await.unwrap().into_iter().map(|row| row.state).collect();
    assert_eq!(states, ["committed", "committed"]);
}

#[actix_rt::test]
async fn a_commit_names_exactly_the_chunks_that_are_missing() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).await;
    let repository = repository(&engine).await;
    let lease = session(&repository, 1, DomainId::FULL).await;
    store(&repository, &lease, 0, data_block(REPOSITORY, &[id(1)])).await;
    store(
        &repository,
        &lease,
        1,
        tree_block(&[(id(10), &[id(1), id(2)], &[]), (id(11), &[id(3), id(2)], &[id(10), id(12)])]),
    )
    .await;
    let manifest = Writer::full().manifest(id(11), "job");
    let CommitOutcome::Missing { mut ids, more } = repository.commit(&lease, manifest.clone()).await.unwrap() else {
        panic!("committed without its chunks")
    };
    ids.sort();
    let mut expected = vec![id(2), id(3), id(12)];
    expected.sort();
    assert_eq!((ids, more), (expected, false));
    store(&repository, &lease, 2, data_block(REPOSITORY, &[id(2), id(3)])).await;
    store(&repository, &lease, 3, tree_block(&[(id(12), &[], &[])])).await;
    commit_ok(&repository, &lease, manifest).await;
}

#[actix_rt::test]
async fn a_long_list_of_missing_chunks_comes_in_pages() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).await;
    let repository = repository(&engine).await;
    let lease = session(&repository, 1, DomainId::FULL).await;
    let all: Vec<ChunkId> = (0..6000).map(id).collect();
    store(&repository, &lease, 0, tree_block(&[(id(9000), &all[..3000], &[]), (id(9001), &all[3000..], &[id(9000)])]))
        .await;
    let manifest = Writer::full().manifest(id(9001), "job");
    let mut sequence = 1;
    let mut sent = 0;
    loop {
        match repository.commit(&lease, manifest.clone()).await.unwrap() {
            CommitOutcome::Committed { .. } => break,
            CommitOutcome::Missing { ids, more } => {
                assert!(ids.len() <= limits::MISSING_IDS_MAX && !ids.is_empty());
                assert_eq!(more, sent == 0);
                sent += ids.len();
                store(&repository, &lease, sequence, data_block(REPOSITORY, &ids)).await;
                sequence += 1;
            }
            other @ CommitOutcome::Refused { .. } => panic!("{other:?}"),
        }
    }
    assert_eq!(sent, 6000);
}

#[actix_rt::test]
async fn blocks_that_arrive_in_any_order_commit() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).await;
    let repository = repository(&engine).await;
    let lease = session(&repository, 1, DomainId::FULL).await;
    for i in (1..50u64).rev() {
        store(&repository, &lease, i, tree_block(&[(id(100 + i), &[id(i)], &[id(99 + i)])])).await;
    }
    store(&repository, &lease, 0, tree_block(&[(id(100), &[], &[])])).await;
    store(&repository, &lease, 50, data_block(REPOSITORY, &(1..50).map(id).collect::<Vec<_>>())).await;
    commit_ok(&repository, &lease, Writer::full().manifest(id(149), "job")).await;
}

#[actix_rt::test]
async fn s19_a_commit_reads_nothing_that_an_earlier_one_has_checked() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).await;
    let repository = repository(&engine).await;
    let lease = session(&repository, 1, DomainId::FULL).await;
    let root = store_small(&repository, &lease).await;
    commit_ok(&repository, &lease, Writer::full().manifest(root, "job")).await;
    // Every block so far is made unreadable: a commit that looks at one of them again calls it missing.
    let packs = packs(dir.path());
    let pack = fs::OpenOptions::new().write(true).open(&packs[0]).unwrap();
    let length = pack.metadata().unwrap().len();
    pack.write_all_at(&vec![0; usize::try_from(length - 64).unwrap()], 64).unwrap();
    let lease = session(&repository, 2, DomainId::FULL).await;
    store(&repository, &lease, 0, data_block(REPOSITORY, &[id(50)])).await;
    store(&repository, &lease, 1, tree_block(&[(id(60), &[id(50), id(1)], &[root])])).await;
    commit_ok(&repository, &lease, Writer::full().manifest(id(60), "job")).await;
    let missing = repository.read_block(repository.locate(DomainId::FULL, &[root]).await.unwrap()[0].unwrap()).await;
    assert!(missing.is_err(), "the old blocks can be read, so this test shows nothing");
}

#[actix_rt::test]
async fn s43_trees_that_refer_to_one_another_in_a_circle_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).await;
    let repository = repository(&engine).await;
    let lease = session(&repository, 1, DomainId::FULL).await;
    store(&repository, &lease, 0, tree_block(&[(id(1), &[], &[id(2)]), (id(2), &[], &[id(1)])])).await;
    let outcome = repository.commit(&lease, Writer::full().manifest(id(1), "job")).await.unwrap();
    assert!(matches!(outcome, CommitOutcome::Refused { .. }), "{outcome:?}");
}

#[actix_rt::test]
async fn s06_a_resumed_session_learns_that_it_had_committed() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).await;
    let repository = repository(&engine).await;
    let lease = session(&repository, 1, DomainId::FULL).await;
    let root = store_small(&repository, &lease).await;
    let receipt = commit_ok(&repository, &lease, Writer::full().manifest(root, "job")).await;
    let again = repository.open_session(SessionId([2; 16]), AGENT, DomainId::FULL, Some(lease.session)).await.unwrap();
    assert_eq!(again, Opened::AlreadyCommitted { receipt });
    // Another machine learns nothing.
    let stranger =
        repository.open_session(SessionId([3; 16]), AgentId([9; 16]), DomainId::FULL, Some(lease.session)).await;
    assert!(matches!(stranger.unwrap(), Opened::Fresh(_)));
}

#[actix_rt::test]
async fn a_resumed_session_takes_the_epoch_and_the_superseded_one_can_do_nothing_more() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).await;
    let repository = repository(&engine).await;
    let old = session(&repository, 1, DomainId::FULL).await;
    let root = store_small(&repository, &old).await;
    repository.publish_block_states(Vec::new(), Vec::new()).await.unwrap();
    let Opened::Fresh(new) =
        repository.open_session(SessionId([2; 16]), AGENT, DomainId::FULL, Some(old.session)).await.unwrap()
    else {
        panic!("nothing was committed")
    };
    assert_eq!(new.epoch, old.epoch);
    assert!(new.fence > old.fence);
    let manifest = Writer::full().manifest(root, "job");
    assert!(matches!(repository.commit(&old, manifest.clone()).await, Err(EngineError::Fenced { .. })));
    let refused = repository.store(&old, Sequence(9), data_block(REPOSITORY, &[id(50)]).into()).await;
    assert!(matches!(refused, Err(StoreError::Fenced { .. })));
    assert!(matches!(repository.known(&old, vec![id(1)]).await, Err(EngineError::Fenced { .. })));
    repository.end_session(&old, SessionEnd::Aborted, "too late").await.unwrap();
    // The first attempt's reply was lost: the agent names the old session once more.
    let Opened::Fresh(newest) =
        repository.open_session(SessionId([3; 16]), AGENT, DomainId::FULL, Some(old.session)).await.unwrap()
    else {
        panic!("nothing was committed")
    };
    assert_eq!(newest.epoch, old.epoch);
    assert_eq!(
        known(&repository, &newest, &[10, 11]).await,
        [true, true],
        "its trees were flagged when it was superseded"
    );
    commit_ok(&repository, &newest, manifest).await;
    let rows = repository.sessions(10).await.unwrap();
    let state = |n: u8| {
        rows.iter()
            .find(|row| row.id == SessionId([n; 16]))
            .map(|row| (row.state.as_str(), row.reason.contains("superseded")))
            .unwrap()
    };
    assert_eq!((state(1), state(2), state(3)), (("failed", true), ("failed", true), ("committed", false)));
}

#[actix_rt::test]
async fn a_session_ends_once_and_its_complete_trees_are_kept_for_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).await;
    let repository = repository(&engine).await;
    let lease = session(&repository, 1, DomainId::FULL).await;
    store_small(&repository, &lease).await;
    assert_eq!(known(&repository, &lease, &[10, 11]).await, [false, false]);
    repository.end_session(&lease, SessionEnd::Expired, "nobody came back").await.unwrap();
    repository.end_session(&lease, SessionEnd::Aborted, "again").await.unwrap();
    let rows = repository.sessions(10).await.unwrap();
    assert_eq!((rows[0].state.as_str(), rows[0].reason.as_str()), ("expired", "nobody came back"));
    assert!(repository.open_leases().await.unwrap().is_empty());
    let next = session(&repository, 2, DomainId::FULL).await;
    assert_eq!(known(&repository, &next, &[10, 11]).await, [true, true]);
    assert!(matches!(
        repository.open_session(SessionId([1; 16]), AGENT, DomainId::FULL, None).await,
        Err(EngineError::SessionExists { .. })
    ));
}

#[actix_rt::test]
async fn a_condemned_block_is_known_to_older_leases_only_and_revived_by_a_commit() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).await;
    let main = repository(&engine).await;
    let first = session(&main, 1, DomainId::FULL).await;
    let root = store_small(&main, &first).await;
    main.end_session(&first, SessionEnd::Aborted, "test").await.unwrap();
    let older = session(&main, 2, DomainId::FULL).await;
    let ids = [id(1), id(10), id(11)];
    let places: BTreeSet<_> =
        main.locate(DomainId::FULL, &ids).await.unwrap().into_iter().flatten().map(|a| (a.pack, a.offset)).collect();
    let condemn = |state| places.iter().map(|&place| (place, state)).collect::<Vec<_>>();
    let unflag = vec![id(10), id(11)];
    main.publish_block_states(condemn(BlockState::Condemned { epoch: 0 }), unflag.clone()).await.unwrap();
    let newer = session(&main, 3, DomainId::FULL).await;
    assert_eq!(known(&main, &older, &[1, 2, 3, 10]).await, [true, true, true, false]);
    assert_eq!(known(&main, &newer, &[1, 2, 3, 10]).await, [false; 4]);
    let manifest = Writer::full().manifest(root, "job");
    let outcome = main.commit(&newer, manifest.clone()).await.unwrap();
    assert_eq!(outcome, CommitOutcome::Missing { ids: vec![root], more: false });
    commit_ok(&main, &older, manifest).await;
    assert_eq!(known(&main, &newer, &[1, 2, 3, 10, 11]).await, [true; 5], "the commit revived what it needs");
    // Withdrawn is for ever, and for everybody.
    main.publish_block_states(condemn(BlockState::Withdrawn), unflag).await.unwrap();
    assert_eq!(known(&main, &newer, &[1, 10]).await, [false, false]);
    engine.close().await.unwrap();
    drop((main, engine));
    let engine = open(dir.path()).await;
    let repository = repository(&engine).await;
    let later = session(&repository, 4, DomainId::FULL).await;
    assert_eq!(known(&repository, &later, &[1, 10, 11]).await, [false; 3], "states are read back at a start");
}

#[actix_rt::test]
async fn s50_copies_count_only_in_the_domain_of_their_writer() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).await;
    let repository = repository(&engine).await;
    let stranger = Writer::new(9, Capability::Write);
    let planted = session(&repository, 1, stranger.domain()).await;
    let root = store_small(&repository, &planted).await;
    commit_ok(&repository, &planted, stranger.manifest(root, "planted")).await;
    let full = session(&repository, 2, DomainId::FULL).await;
    assert_eq!(known(&repository, &full, &[1, 2, 3, 10, 11]).await, [false; 5]);
    let outcome = repository.commit(&full, Writer::full().manifest(root, "job")).await.unwrap();
    assert_eq!(outcome, CommitOutcome::Missing { ids: vec![root], more: false });
    assert_eq!(repository.locate(DomainId::FULL, &[id(1)]).await.unwrap(), [None]);
}

#[actix_rt::test]
async fn s48_foreign_and_forged_blocks_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).await;
    let repository = repository(&engine).await;
    let lease = session(&repository, 1, DomainId::FULL).await;
    let foreign = data_block(RepositoryId([1; 16]), &[id(1)]);
    let refused = repository.store(&lease, Sequence(0), foreign.into()).await;
    assert!(matches!(refused, Err(StoreError::Foreign { .. })), "{refused:?}");
    let good = tree_block(&[(id(10), &[id(1)], &[])]);
    for at in 0..good.len() {
        let mut bad = good.clone();
        bad[at] ^= 0x21;
        let refused = repository.store(&lease, Sequence(0), bad.into()).await;
        assert!(matches!(refused, Err(StoreError::Refused(_) | StoreError::Foreign { .. })), "byte {at}: {refused:?}");
    }
    // A table that claims more rows than it has, under a digest that is right.
    let mut forged = good[..good.len() - 32].to_vec();
    forged[16] = 2;
    let digest = blake3::hash(&forged);
    forged.extend_from_slice(digest.as_bytes());
    let refused = repository.store(&lease, Sequence(0), forged.into()).await;
    assert!(matches!(refused, Err(StoreError::Refused(_))), "{refused:?}");
    assert!(packs(dir.path()).is_empty(), "nothing of them was stored");
}

#[actix_rt::test]
async fn a_manifest_that_its_writer_did_not_sign_or_may_not_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).await;
    let repository = repository(&engine).await;
    let lease = session(&repository, 1, DomainId::FULL).await;
    let root = store_small(&repository, &lease).await;
    let good = Writer::full().manifest(root, "job");
    let mut candidates: Vec<(Bytes, &str)> = vec![
        (Writer::new(9, Capability::Write).manifest(root, "job"), "opened for"),
        (Writer::new(9, Capability::Read).manifest(root, "job"), "only read"),
        (Bytes::from_static(b"nonsense"), "not a snapshot manifest"),
    ];
    let mut foreign = ManifestV1::decode(&good).unwrap();
    foreign.repository = RepositoryId([1; 16]);
    candidates.push((Writer::full().sign(foreign), "not of this one"));
    let mut uncertified = ManifestV1::decode(&good).unwrap();
    uncertified.writer.signature[3] ^= 1;
    candidates.push((Writer::full().sign(uncertified), "not certified"));
    let mut unsigned = good.to_vec();
    *unsigned.last_mut().unwrap() ^= 1;
    candidates.push((unsigned.into(), "signature"));
    for (manifest, expected) in candidates {
        match repository.commit(&lease, manifest).await.unwrap() {
            CommitOutcome::Refused { reason } => assert!(reason.contains(expected), "{reason}"),
            other => panic!("{expected}: {other:?}"),
        }
    }
    commit_ok(&repository, &lease, good).await;
}

#[actix_rt::test]
async fn a_known_block_is_confirmed_without_being_stored_and_a_doubled_one_is_stored_once() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).await;
    let repository = repository(&engine).await;
    let lease = session(&repository, 1, DomainId::FULL).await;
    store(&repository, &lease, 0, data_block(REPOSITORY, &[id(1), id(2)])).await;
    store(&repository, &lease, 1, data_block(REPOSITORY, &[id(2)])).await;
    assert_eq!(repository.totals().await.unwrap().blocks, 1);
    let tree = tree_block(&[(id(10), &[id(7)], &[])]);
    let both = [(), ()].map(|()| repository.store(&lease, Sequence(2), tree.clone().into()));
    for stored in futures_util::future::join_all(both).await {
        stored.unwrap();
    }
    store(&repository, &lease, 2, tree).await;
    assert_eq!(repository.totals().await.unwrap().blocks, 2);
}

#[actix_rt::test]
async fn two_engines_cannot_open_one_directory() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).await;
    let second = Engine::open(dir.path(), EngineOptions { lock_wait: Duration::from_millis(50) }).await;
    assert!(matches!(second, Err(EngineError::Locked { .. })));
    engine.close().await.unwrap();
    open(dir.path()).await;
}

#[actix_rt::test]
async fn a_repository_is_created_once_and_named_in_errors() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).await;
    let name = "main".parse().unwrap();
    assert!(matches!(engine.repository(&tenant(), &name).await, Err(EngineError::NoSuchRepository { .. })));
    let made = repository(&engine).await;
    let again = engine.create_repository(&tenant(), repository_file("main"), Vec::new()).await.unwrap();
    assert!(Arc::ptr_eq(&made, &again), "a request whose answer was lost comes again");
    let another = RepositoryV1 { id: RepositoryId([7; 16]), ..repository_file("main") };
    let refused = engine.create_repository(&tenant(), another, Vec::new()).await;
    assert!(refused.unwrap_err().to_string().contains("main"));
    let bad_slot = engine
        .create_repository(
            &tenant(),
            RepositoryV1 { id: RepositoryId([1; 16]), ..repository_file("other") },
            vec![vec![1]],
        )
        .await;
    assert!(matches!(bad_slot, Err(EngineError::BadSlot { .. })));
    assert_eq!(engine.repositories(&tenant()).await.unwrap(), [repository_file("main")]);
    assert!(engine.repositories(&"other".parse().unwrap()).await.unwrap().is_empty());
}

#[actix_rt::test]
async fn a_damaged_repository_does_not_keep_the_others_from_being_served() {
    let dir = tempfile::tempdir().unwrap();
    {
        let engine = open(dir.path()).await;
        repository(&engine).await;
        let other = RepositoryV1 { id: RepositoryId([1; 16]), ..repository_file("other") };
        engine.create_repository(&tenant(), other, Vec::new()).await.unwrap();
    }
    let paths = DataPaths::new(dir.path()).repository(&tenant(), &RepositoryId([1; 16]));
    fs::remove_dir_all(paths.packs()).unwrap();
    fs::write(paths.packs(), b"not a directory").unwrap();
    let engine = open(dir.path()).await;
    repository(&engine).await;
    let unusable = engine.repository(&tenant(), &"other".parse().unwrap()).await;
    assert!(matches!(unusable, Err(EngineError::Unusable { .. })));
}

#[actix_rt::test]
async fn a_repository_of_a_later_version_is_left_alone_and_its_name_is_taken() {
    let dir = tempfile::tempdir().unwrap();
    {
        let engine = open(dir.path()).await;
        repository(&engine).await;
        engine.close().await.unwrap();
    }
    let path = DataPaths::new(dir.path()).repository(&tenant(), &REPOSITORY).file();
    let mut later = fs::read(&path).unwrap();
    later[8] = 2;
    later.truncate(60);
    fs::write(&path, &later).unwrap();
    let engine = open(dir.path()).await;
    let refused = engine.repository(&tenant(), &"main".parse().unwrap()).await.unwrap_err().to_string();
    assert!(refused.contains("use a newer Strandline"), "{refused}");
    let another = RepositoryV1 { id: RepositoryId([7; 16]), ..repository_file("main") };
    let refused = engine.create_repository(&tenant(), another, Vec::new()).await;
    assert!(matches!(refused, Err(EngineError::AlreadyExists { .. })), "{refused:?}");
    assert_eq!(fs::read(&path).unwrap(), later);
}

#[actix_rt::test]
async fn s30_a_flipped_byte_on_disk_is_an_error_that_names_pack_and_offset() {
    let dir = tempfile::tempdir().unwrap();
    let engine = open(dir.path()).await;
    let repository = repository(&engine).await;
    let lease = session(&repository, 1, DomainId::FULL).await;
    store(&repository, &lease, 0, big_data_block(&[id(1)], 1000)).await;
    let address = repository.locate(DomainId::FULL, &[id(1)]).await.unwrap()[0].unwrap();
    let pack = packs(dir.path()).remove(0);
    let mut bytes = fs::read(&pack).unwrap();
    bytes[address.offset as usize + 500] ^= 1;
    fs::write(&pack, bytes).unwrap();
    let error = repository.read_block(address).await.unwrap_err().to_string();
    assert!(error.contains("offset 96") && error.contains("pack 00000001"), "{error}");
}
