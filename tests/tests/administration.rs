//! `strand-server` as an administrator uses it: on a running server, on a stopped one, and on a repository in a directory.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use strandline_tests::process::{self, Finished};
use strandline_tests::rig::{Agent, PATIENCE, Rig, copy_tree, json_lines, random_files};

/// `strand-server --data DATA ARGUMENTS` without a server.
fn administer(home: &Path, data: &Path, arguments: &[&str]) -> Result<Finished> {
    process::run(process::strand_server(home)?.arg("--data").arg(data).args(arguments), PATIENCE)
}

/// Every file below `directory` that `wanted` is true of, by path.
fn files(directory: &Path, wanted: impl Fn(&Path) -> bool + Copy) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(files(&path, wanted)?);
        } else if wanted(&path) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

fn packs(data: &Path) -> Result<Vec<PathBuf>> {
    files(&data.join("storage"), |path| path.extension().is_some_and(|extension| extension == "pack"))
}

fn one(finished: &Finished) -> Result<Value> {
    json_lines(&finished.stdout)?.into_iter().next().context("nothing was printed")
}

#[test]
fn s37_s52_after_a_rebuild_by_command_snapshots_restores_and_revocations_are_as_before() -> Result<()> {
    let mut rig = Rig::direct()?;
    let writer = rig.owner("writer")?;
    let thief = rig.second("thief", &writer)?;
    let source = rig.scratch().join("source");
    random_files(&source, 1, 6, 300 << 10)?;
    let kept = writer.backup(&source, &[])?.snapshot()?;
    let expected = rig.scratch().join("expected");
    copy_tree(&source, &expected)?;
    fs::write(source.join("more"), "more")?;
    let deleted = writer.backup(&source, &[])?.snapshot()?;
    rig.administer(&["snapshot", "delete", &deleted[..12]])?;
    let agents = rig.administer(&["agent", "list", "--json"])?;
    let agents: Value = serde_json::from_str(&agents)?;
    let thief_id = agents.as_array().into_iter().flatten().find(|agent| agent["label"] == "thief");
    let thief_id = thief_id.and_then(|agent| agent["id"].as_str()).context("no thief")?.to_owned();
    rig.administer(&["agent", "revoke", &thief_id])?;
    let busy = process::run(&mut rig.server_command(&["catalog", "rebuild", "--lock-wait", "0s"])?, PATIENCE)?;
    busy.expect_code(11)?;
    rig.stop_server(Duration::from_secs(15))?;
    let rebuilt: Value = serde_json::from_str(rig.administer(&["catalog", "rebuild", "--json"])?.trim())?;
    ensure!(rebuilt["agents"] == 2 && rebuilt["repositories"][0]["snapshots"] == 1, "{rebuilt}");
    rig.start_server()?;
    ensure!(writer.snapshots()? == std::slice::from_ref(&kept));
    writer.restore_and_compare(&kept, &source, &expected, &rig.scratch().join("restored"))?;
    let refused = thief.run(&["snapshots"])?;
    ensure!(refused.status.code() != Some(0), "a revoked agent is let in again");
    rig.administer(&["snapshot", "undelete", &deleted])?;
    ensure!(writer.snapshots()?.len() == 2);
    rig.ensure_no_panic()
}

#[test]
fn garbage_is_collected_and_everything_read_again_while_the_server_runs_and_while_it_does_not() -> Result<()> {
    let mut rig = Rig::direct()?;
    let writer = rig.owner("writer")?;
    let (first, second) = (rig.scratch().join("first"), rig.scratch().join("second"));
    random_files(&first, 1, 6, 300 << 10)?;
    random_files(&second, 2, 6, 300 << 10)?;
    let gone = writer.backup(&first, &[])?.snapshot()?;
    let kept = writer.backup(&second, &[])?.snapshot()?;
    for round in 0..2 {
        let scrubbed: Value = serde_json::from_str(rig.administer(&["scrub", "--json", "--limit", "0"])?.trim())?;
        ensure!(scrubbed["damaged_blocks"] == 0, "{scrubbed}");
        if round == 0 {
            rig.administer(&["snapshot", "delete", "acme/main", &gone, "--reason", "tidy"])?;
            ensure!(rig.administer(&["snapshot", "list", "--deleted"])?.contains("tidy"));
            let looked: Value = serde_json::from_str(rig.administer(&["gc", "--dry-run", "--json"])?.trim())?;
            ensure!(looked["blocks_condemned"] == 0, "it can still be brought back: {looked}");
            let freed: Value = serde_json::from_str(rig.administer(&["gc", "--purge", "--json"])?.trim())?;
            ensure!(freed["purged"] == 1 && freed["bytes_freed"].as_u64() > Some(1 << 20), "{freed}");
            let shown = rig.administer(&["repository", "show", "acme/main"])?;
            ensure!(shown.contains("purged 1"), "{shown}");
            rig.stop_server(Duration::from_secs(15))?;
        }
    }
    let freed: Value = serde_json::from_str(rig.administer(&["gc", "acme/main", "--json"])?.trim())?;
    ensure!(freed["blocks_freed"] == 0, "nothing is left to be freed: {freed}");
    rig.start_server()?;
    writer.restore_and_compare(&kept, &second, &second, &rig.scratch().join("restored"))?;
    rig.ensure_no_panic()
}

#[test]
fn a_server_looks_after_its_repositories_by_itself_and_a_scrub_does_not_delay_its_end() -> Result<()> {
    let mut rig = Rig::with(&[("STRAND_SERVER_LOG__FILTER", "strandline_server=debug")])?;
    let writer = rig.owner("writer")?;
    let source = rig.scratch().join("source");
    random_files(&source, 1, 6, 300 << 10)?;
    let old = writer.backup(&source, &[])?.snapshot()?;
    let new = writer.backup(&source, &[])?.snapshot()?;
    rig.administer(&["repository", "set", "scrub_every=0s", "gc_every=1s"])?;
    rig.server()?.wait_for_line("garbage collected", Duration::from_secs(20))?;
    rig.administer(&["repository", "set", "gc_every=0s", "retention.keep_last=1", "retention_every=1s"])?;
    rig.server()?.wait_for_line("retention policy applied", Duration::from_secs(20))?;
    ensure!(writer.snapshots()? == [new], "the policy keeps the last");
    ensure!(
        rig.administer(&["snapshot", "list", "--deleted"])?.contains(&old[..16]),
        "and the other can be brought back"
    );
    // A kilobyte a second: reading everything would take half an hour.
    rig.administer(&["repository", "set", "retention=none", "scrub_every=1s", "scrub_bytes_per_second=1K"])?;
    rig.server()?.wait_for_line("job=\"scrub\"", Duration::from_secs(20))?;
    rig.stop_server(Duration::from_secs(15))?;
    let shown = rig.administer(&["repository", "show"])?;
    ensure!(shown.contains("gc ") && shown.contains("scrub_bytes_per_second"), "{shown}");
    rig.ensure_no_panic()
}

#[test]
fn s53_a_repository_in_a_directory_with_a_rotten_footer_is_repaired_and_a_cut_tail_heals() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let (home, repository) = (scratch.path().join("home"), scratch.path().join("repository"));
    let writer = Agent::local(&home, &repository)?;
    let source = scratch.path().join("source");
    random_files(&source, 1, 6, 300 << 10)?;
    let snapshot = writer.backup(&source, &[])?.snapshot()?;
    for pack in packs(&repository)? {
        let mut bytes = fs::read(&pack)?;
        let at = bytes.len().checked_sub(60).context("too short")?;
        bytes[at] ^= 1;
        fs::write(&pack, bytes)?;
    }
    let looked = administer(&home, &repository, &["repair", "-n"])?.expect_code(0)?;
    ensure!(looked.stdout.contains("no footer that can be trusted"), "{}", looked.stdout);
    let repaired = administer(&home, &repository, &["repair"])?.expect_code(0)?;
    ensure!(repaired.stdout.contains("a new one was appended"), "{}", repaired.stdout);
    writer.restore_and_compare(&snapshot, &source, &source, &scratch.path().join("restored"))?;
    // The end of the first pack is lost, and with it trees whose roots hold times of directories above: they need not come again as
    // they were, so only a new snapshot is sure to be whole.
    let pack = packs(&repository)?.into_iter().next().context("no pack")?;
    let bytes = fs::read(&pack)?;
    fs::write(&pack, &bytes[..bytes.len() * 2 / 3])?;
    let repaired = administer(&home, &repository, &["repair", "local/main", "--json"])?.expect_code(1)?;
    let report = one(&repaired)?;
    ensure!(report["affected"][0] == snapshot.as_str() && report["findings"][0]["kind"] == "footer", "{report}");
    let healed = writer.backup(&source, &["--force"])?.snapshot()?;
    writer.restore_and_compare(&healed, &source, &source, &scratch.path().join("healed"))?;
    administer(&home, &repository, &["snapshot", "delete", &snapshot])?.expect_code(0)?;
    administer(&home, &repository, &["gc", "--purge"])?.expect_code(0)?;
    let well = administer(&home, &repository, &["repair", "--json"])?.expect_code(0)?;
    ensure!(one(&well)?["affected"] == serde_json::json!([]), "{}", well.stdout);
    Ok(())
}

#[test]
fn every_file_of_the_golden_repository_is_shown_and_damage_is_told_with_its_place() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/golden-v1/repository");
    let golden = scratch.path().join("golden");
    copy_tree(&fixture, &golden)?;
    let inspect = |kind: &str, what: &str| administer(scratch.path(), &golden, &["inspect", kind, what, "--json"]);
    let (mut blocks, mut kinds) = (0, std::collections::BTreeSet::new());
    for path in files(&golden.join("storage"), |_| true)? {
        let name = path.to_str().context("a name that is no text")?;
        let kind = match path.extension().and_then(|extension| extension.to_str()) {
            Some("pack") => "pack",
            Some("manifest") => "manifest",
            Some("receipt") => "receipt",
            _ if name.contains("/keys/") => "slot",
            _ if name.ends_with("REPOSITORY") => "repository",
            _ => continue,
        };
        kinds.insert(kind);
        let whole = one(&inspect(kind, name)?.expect_code(0)?)?;
        ensure!(whole["problems"] == serde_json::json!([]), "{name}: {whole}");
        let fields = whole["fields"].as_array().context("no fields")?;
        for field in fields
            .iter()
            .filter(|field| field["name"].as_str().is_some_and(|name| kind == "pack" && name.starts_with("block ")))
        {
            let tree = field["value"].as_str().is_some_and(|value| value.starts_with("tree"));
            let place = format!("{name}@{}", field["offset"]);
            inspect(if tree { "tree" } else { "block" }, &place)?.expect_code(0)?;
            blocks += 1;
        }
        // One byte in the middle.
        let mut bytes = fs::read(&path)?;
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        let bad = scratch.path().join("bad");
        fs::write(&bad, bytes)?;
        let told = one(&inspect(kind, bad.to_str().context("name")?)?.expect_code(1)?)?;
        ensure!(
            told["problems"][0]["offset"].as_u64().is_some_and(|at| at <= fs::metadata(&bad).map_or(0, |m| m.len())),
            "{told}"
        );
    }
    ensure!(kinds.len() == 5 && blocks > 2, "{kinds:?}, {blocks} blocks");
    let wrong = administer(scratch.path(), &golden, &["inspect", "pack", "/nowhere"])?.expect_code(1)?;
    ensure!(wrong.stderr.contains("/nowhere"), "{}", wrong.stderr);
    Ok(())
}
