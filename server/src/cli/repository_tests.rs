//! Commands about repositories, on a data directory that no server uses: one with an authority, and a local one without.

use std::path::{Path, PathBuf};

use serde_json::Value;
use strandline_messages::{Sequence, SnapshotId};

use super::tests::{Output, made, strand_server};
use super::*;
use crate::engine::fixture::{self, REPOSITORY, Writer, data_block, id, tree_block};
use crate::engine::{CommitOutcome, Engine};
use crate::storage::layout::{DataPaths, RepositoryPaths};

/// Commits a snapshot of one root over two blocks of data; everything is closed again.
fn snapshot(data: &Path, root: u64) -> SnapshotId {
    actix_rt::System::new().block_on(async {
        let engine: Engine = fixture::open(data).await;
        let repository = fixture::repository(&engine).await;
        let n = u8::try_from(repository.sessions(200).await.unwrap().len() + 1).unwrap();
        let lease = fixture::session(&repository, n, strandline_messages::DomainId::FULL).await;
        for (sequence, i) in [(0, root + 1), (1, root + 2)] {
            let block = data_block(REPOSITORY, &[id(i)]);
            repository.store(&lease, Sequence(sequence), block.into()).await.unwrap();
        }
        let tree = tree_block(&[(id(root), &[id(root + 1), id(root + 2)], &[])]);
        repository.store(&lease, Sequence(2), tree.into()).await.unwrap();
        let manifest = Writer::full().manifest(id(root), &format!("job{root}"));
        let outcome = repository.commit(&lease, manifest).await.unwrap();
        let CommitOutcome::Committed { snapshot, .. } = outcome else { panic!("{outcome:?}") };
        engine.close().await.unwrap();
        snapshot
    })
}

fn home(data: &Path) -> RepositoryPaths {
    DataPaths::new(data).repository(&fixture::tenant(), &REPOSITORY)
}

fn json(output: &Output) -> Vec<Value> {
    assert!(output.err.is_empty(), "{}", output.err);
    output.out.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn listed(data: &Path, more: &[&str]) -> Vec<String> {
    let output = strand_server(data, &[&["snapshot", "list", "--json"], more].concat());
    json(&output).iter().map(|row| row["id"].as_str().unwrap().to_owned()).collect()
}

fn packs(data: &Path) -> Vec<PathBuf> {
    let mut packs: Vec<PathBuf> = std::fs::read_dir(home(data).packs())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "pack"))
        .collect();
    packs.sort();
    packs
}

#[test]
fn repositories_are_shown_and_set_in_a_server_and_in_a_local_directory() {
    for root in [made(), tempfile::tempdir().unwrap()] {
        let data = root.path();
        snapshot(data, 100);
        let list = strand_server(data, &["repository", "list"]);
        assert!(list.code == EXIT_DONE && list.out.contains("home/main"), "{} {}", list.out, list.err);
        let shown = json(&strand_server(data, &["repository", "set", "undelete=3days", "gc_every=0s", "--json"]));
        assert_eq!((&shown[0]["settings"]["undelete"], &shown[0]["totals"]["snapshots"]), (&"3days".into(), &1.into()));
        let shown = strand_server(data, &["repository", "show", "home/main"]);
        for part in ["3days", "1 snapshots", "nothing was done yet"] {
            assert!(shown.out.contains(part), "{}", shown.out);
        }
        for (wrong, part) in [("colour=red", "min_retention"), ("undelete=soon", "undelete"), ("undelete", "KEY=VALUE")]
        {
            let refused = strand_server(data, &["repository", "set", "home/main", wrong]);
            assert!(refused.code == EXIT_FAILED && refused.err.contains(part), "{}", refused.err);
        }
        let nowhere = strand_server(data, &["repository", "show", "home/other"]);
        assert!(nowhere.code == EXIT_NO_REPOSITORY && nowhere.err.contains("home/other"), "{}", nowhere.err);
    }
    let empty = tempfile::tempdir().unwrap();
    let refused = strand_server(empty.path(), &["gc"]);
    assert_eq!(refused.code, EXIT_NO_REPOSITORY, "{}", refused.err);
    assert_eq!(std::fs::read_dir(empty.path()).unwrap().count(), 0);
}

#[test]
fn snapshots_are_deleted_brought_back_protected_and_freed() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path();
    let (kept, gone) = (snapshot(data, 100).to_string(), snapshot(data, 200).to_string());
    assert_eq!(listed(data, &[]), [kept.clone(), gone.clone()]);
    let bad = strand_server(data, &["snapshot", "delete", &kept[..4], "ffff0000ffff"]);
    assert!(bad.code == EXIT_FAILED && bad.err.contains("nothing was changed"), "{}", bad.err);
    assert_eq!(strand_server(data, &["snapshot", "delete", &kept[..3]]).code, EXIT_FAILED);
    assert_eq!(strand_server(data, &["snapshot", "protect", "home/main", &kept[..8]]).code, EXIT_DONE);
    let decided = strand_server(data, &["snapshot", "delete", &kept, &gone[..12], "--reason", "too old"]);
    assert_eq!(decided.code, EXIT_FAILED);
    assert!(decided.out.contains(&gone) && decided.err.contains("protected"), "{} {}", decided.out, decided.err);
    assert_eq!(listed(data, &[]), std::slice::from_ref(&kept));
    let deleted = strand_server(data, &["snapshot", "list", "home/main", "--deleted"]);
    assert!(deleted.out.contains("too old"), "{}", deleted.out);
    assert_eq!(strand_server(data, &["snapshot", "undelete", &gone]).code, EXIT_DONE);
    assert_eq!(listed(data, &["--deleted"]), [] as [String; 0]);
    assert_eq!(strand_server(data, &["snapshot", "delete", &gone]).code, EXIT_DONE);
    let looked = json(&strand_server(data, &["gc", "--dry-run", "--json"]));
    assert_eq!((&looked[0]["dry_run"], &looked[0]["blocks_condemned"]), (&true.into(), &0.into()));
    let freed = json(&strand_server(data, &["gc", "home/main", "--purge", "--json"]));
    assert_eq!((&freed[0]["purged"], &freed[0]["message_type"]), (&1.into(), &"gc".into()));
    let shown = strand_server(data, &["repository", "show"]);
    assert!(shown.out.contains("purged 1"), "{}", shown.out);
    assert_eq!(strand_server(data, &["snapshot", "undelete", &gone]).code, EXIT_FAILED);
    assert!(strand_server(data, &["gc"]).out.contains("needed"));
}

#[test]
fn scrub_reads_everything_and_exits_1_when_something_is_damaged() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path();
    let hurt = snapshot(data, 100).to_string();
    let well = strand_server(data, &["scrub", "--limit", "0"]);
    assert!(well.code == EXIT_DONE && well.out.contains("3 blocks"), "{} {}", well.out, well.err);
    let part = json(&strand_server(data, &["scrub", "--read-data-subset", "1B", "--json"]));
    assert_eq!(part[0]["blocks"], 1);
    let pack = packs(data).remove(0);
    let mut bytes = std::fs::read(&pack).unwrap();
    bytes[96 + 150] ^= 1;
    std::fs::write(&pack, bytes).unwrap();
    let found = strand_server(data, &["scrub"]);
    assert_eq!(found.code, EXIT_FAILED);
    assert!(found.out.contains("offset 96") && found.out.contains(&hurt), "{}", found.out);
    let again = json(&strand_server(data, &["scrub", "--json"]));
    assert_eq!((&again[0]["damaged_blocks"], &again[0]["withdrawn_before"]), (&0.into(), &1.into()));
    assert!(strand_server(data, &["repository", "list"]).out.contains("1 damaged blocks"));
}

#[test]
fn s52_s37_a_catalog_that_is_rebuilt_by_command_takes_nothing_back() {
    let root = made();
    let data = root.path();
    for name in ["home", "other"] {
        assert_eq!(strand_server(data, &["tenant", "add", name]).code, EXIT_DONE);
    }
    let [kept, deleted, purged, hurt] = [100, 200, 300, 400].map(|root| snapshot(data, root).to_string());
    assert_eq!(strand_server(data, &["repository", "set", "min_retention=0s", "gc_every=5days"]).code, EXIT_DONE);
    assert_eq!(strand_server(data, &["snapshot", "delete", &purged]).code, EXIT_DONE);
    assert_eq!(strand_server(data, &["gc", "--purge"]).code, EXIT_DONE);
    assert_eq!(strand_server(data, &["snapshot", "delete", &deleted]).code, EXIT_DONE);
    assert_eq!(strand_server(data, &["snapshot", "protect", &kept]).code, EXIT_DONE);
    let last = packs(data).pop().unwrap();
    let mut bytes = std::fs::read(&last).unwrap();
    bytes[96 + 150] ^= 1;
    std::fs::write(&last, bytes).unwrap();
    assert_eq!(strand_server(data, &["scrub"]).code, EXIT_FAILED);
    let before = (listed(data, &[]), listed(data, &["--deleted"]));
    let rebuilt = strand_server(data, &["catalog", "rebuild", "--json"]);
    assert_eq!(rebuilt.code, EXIT_DONE, "{}", rebuilt.err);
    let report = &json(&rebuilt)[0];
    assert_eq!(report["tenants"], 2);
    assert_eq!(report["repositories"][0]["damaged_blocks"], 1, "withdrawn stays withdrawn");
    let old = report["kept"][0].as_str().unwrap();
    assert!(Path::new(old).exists() && old.contains("catalog.sqlite."), "{old}");
    assert_eq!((listed(data, &[]), listed(data, &["--deleted"])), before);
    assert_eq!(before, (vec![kept.clone(), hurt.clone()], vec![deleted]));
    let scrubbed = json(&strand_server(data, &["scrub", "--json"]));
    assert_eq!(scrubbed[0]["damaged_blocks"], 0, "freed is not damage");
    assert_eq!(scrubbed[0]["affected"], serde_json::json!([hurt]));
    assert_eq!(strand_server(data, &["snapshot", "undelete", &purged]).code, EXIT_FAILED, "purged stays purged");
    assert_eq!(strand_server(data, &["snapshot", "delete", &kept]).code, EXIT_FAILED, "protected stays protected");
    assert!(strand_server(data, &["repository", "show"]).out.contains("5days"), "settings stay");
    let again = strand_server(data, &["catalog", "rebuild"]);
    assert!(again.code == EXIT_DONE && again.err.contains("the old catalog was kept"), "{}", again.err);
    assert!(again.out.contains("2 tenants"), "{}", again.out);
}

#[test]
fn s53_repair_gives_packs_their_footers_back_and_changes_nothing_when_it_only_looks() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path();
    let [first, second] = [100, 200].map(|root| snapshot(data, root).to_string());
    let all = packs(data);
    assert_eq!(all.len(), 2);
    let whole = std::fs::read(&all[0]).unwrap();
    // The footer of one rots; the tail of the other is cut off in the middle of its last block.
    let mut flipped = whole.clone();
    let at = flipped.len() - 60;
    flipped[at] ^= 1;
    std::fs::write(&all[0], &flipped).unwrap();
    let other = std::fs::read(&all[1]).unwrap();
    let footer_bytes = 12 + 3 * 43 + 44;
    let torn = &other[..other.len() - footer_bytes - 20];
    std::fs::write(&all[1], torn).unwrap();
    let looked = strand_server(data, &["repair", "--dry-run"]);
    assert!(looked.out.contains("nothing was changed") && looked.out.contains("3 blocks are intact"), "{}", looked.out);
    assert!(looked.out.contains("1 fewer than the catalog knows"), "{}", looked.out);
    assert_eq!((std::fs::read(&all[0]).unwrap(), std::fs::read(&all[1]).unwrap()), (flipped.clone(), torn.to_vec()));
    let repaired = strand_server(data, &["repair", "home/main", "--json"]);
    assert_eq!(repaired.code, EXIT_FAILED, "{}", repaired.err);
    let report = &json(&repaired)[0];
    assert_eq!(report["findings"].as_array().unwrap().len(), 2, "{report}");
    assert_eq!(report["affected"], serde_json::json!([second]), "its root was in the torn block");
    let after = std::fs::read(&all[0]).unwrap();
    assert!(after.starts_with(&flipped) && after.len() > flipped.len(), "appended, nothing else");
    assert_eq!(strand_server(data, &["snapshot", "delete", &second]).code, EXIT_DONE);
    assert_eq!(strand_server(data, &["gc", "--purge"]).code, EXIT_DONE);
    let again = strand_server(data, &["repair"]);
    assert!(again.code == EXIT_DONE && again.out.contains("every snapshot can be restored"), "{}", again.out);
    assert_eq!(listed(data, &[]), [first]);
}

#[test]
fn repair_tells_of_packs_that_are_missing_and_of_those_that_nobody_can_attribute() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path();
    let [first, second] = [100, 200].map(|root| snapshot(data, root).to_string());
    let all = packs(data);
    std::fs::remove_file(&all[0]).unwrap();
    let foreign = home(data).pack(77);
    std::fs::write(&foreign, vec![7; 5000]).unwrap();
    std::fs::write(home(data).pack(78), b"").unwrap();
    let report = strand_server(data, &["repair", "--json"]);
    assert_eq!(report.code, EXIT_FAILED);
    let report = &json(&report)[0];
    let kinds: Vec<&str> =
        report["findings"].as_array().unwrap().iter().map(|finding| finding["kind"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["unattributable", "empty", "missing"]);
    assert_eq!(report["affected"], serde_json::json!([first]));
    assert!(!foreign.exists() && home(data).damaged_pack(77).exists());
    assert_eq!(listed(data, &[]), [first, second]);
    let nowhere = strand_server(data, &["repair", "home/other"]);
    assert_eq!(nowhere.code, EXIT_NO_REPOSITORY);
}
