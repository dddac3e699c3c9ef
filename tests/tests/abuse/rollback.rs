//! Scenario 49: somebody puts an older copy of the server's data in its place.

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use strandline_tests::rig::{Agent, Rig, copy_tree, json_lines, random_files, settle};

/// A backup that must end well: the snapshot, and the snapshot that the event says is missing.
fn backup(agent: &Agent, source: &std::path::Path) -> Result<(String, Option<String>)> {
    let path = source.to_str().context("not text")?;
    let said = agent.run(&["backup", "--json", path])?.expect_code(0)?.stdout;
    let (mut snapshot, mut missing) = (None, None);
    for line in json_lines(&said)? {
        let text = |name: &str| line.get(name).and_then(Value::as_str).map(str::to_owned);
        match text("message_type").as_deref() {
            Some("summary") => snapshot = text("snapshot_id"),
            Some("event") => {
                ensure!(text("event").as_deref() == Some("server_rolled_back"), "{line}");
                missing = text("snapshot_id");
            }
            _ => {}
        }
    }
    Ok((snapshot.context("no snapshot")?, missing))
}

#[test]
fn s49_a_server_that_went_back_is_noticed_and_backed_up_to_again() -> Result<()> {
    let mut rig = Rig::direct()?;
    let agent = rig.owner("agent")?;
    let source = rig.scratch().join("source");
    random_files(&source, 49, 10, 30 << 10)?;
    let (first, missing) = backup(&agent, &source)?;
    ensure!(missing.is_none());
    rig.stop_server(Duration::from_secs(10))?;
    let copy = rig.scratch().join("copy");
    copy_tree(rig.data(), &copy)?;
    rig.start_server()?;
    fs::write(source.join("new"), vec![49; 100_000])?;
    // So that the file cache would be believed.
    settle();
    let (second, missing) = backup(&agent, &source)?;
    ensure!(missing.is_none() && agent.snapshots()? == [first.clone(), second.clone()]);

    rig.stop_server(Duration::from_secs(10))?;
    fs::remove_dir_all(rig.data())?;
    copy_tree(&copy, rig.data())?;
    rig.start_server()?;
    ensure!(agent.snapshots()? == std::slice::from_ref(&first));
    let (third, missing) = backup(&agent, &source)?;
    ensure!(missing.as_ref() == Some(&second), "{missing:?} instead of {second}");
    ensure!(agent.snapshots()? == [first.clone(), third.clone()]);
    agent.restore_and_compare(&third, &source, &source, &rig.scratch().join("restored"))?;
    rig.ensure_logged("an older state", 1)?;
    // It is told once: the next one goes on from here.
    let (_, missing) = backup(&agent, &source)?;
    ensure!(missing.is_none());
    rig.ensure_no_panic()
}

#[test]
fn s49_a_snapshot_that_was_deleted_or_purged_is_no_sign_of_a_server_that_went_back() -> Result<()> {
    let rig = Rig::direct()?;
    let agent = rig.owner("agent")?;
    let source = rig.scratch().join("source");
    random_files(&source, 50, 3, 1000)?;
    let (mut last, _) = backup(&agent, &source)?;
    for purge in [false, true] {
        rig.administer(&["snapshot", "delete", &last])?;
        if purge {
            rig.administer(&["gc", "--purge"])?;
        }
        let (next, missing) = backup(&agent, &source)?;
        ensure!(missing.is_none(), "{missing:?}, purged: {purge}");
        last = next;
    }
    rig.ensure_no_panic()
}
