//! Restores into targets that are not empty, that are killed in their middle, that want one file of many.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use strandline_tests::compare::ensure_same;
use strandline_tests::process::{Finished, Process};
use strandline_tests::proxy::Plan;
use strandline_tests::random::Random;
use strandline_tests::rig::{Agent, PATIENCE, Rig, json_lines, random_files};

const MIB: u64 = 1 << 20;

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not text")
}

struct Local {
    scratch: tempfile::TempDir,
    agent: Agent,
    source: PathBuf,
    target: PathBuf,
}

impl Local {
    /// A directory repository that does not exist yet, and an empty source.
    fn new() -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let agent = Agent::local(&scratch.path().join("home"), &scratch.path().join("repository"))?;
        let (source, target) = (scratch.path().join("source"), scratch.path().join("target"));
        fs::create_dir(&source)?;
        Ok(Self { scratch, agent, source, target })
    }

    /// Where the target holds what was saved from the source.
    fn restored(&self) -> Result<PathBuf> {
        Ok(self.target.join(self.source.strip_prefix("/")?))
    }

    fn run(&self, what: &str, options: &[&str]) -> Result<Finished> {
        let arguments = ["restore", what, "--target", text(&self.target)?];
        self.agent.run(&[&arguments[..], options].concat())
    }

    /// The summary of a restore of the latest snapshot that must end with code 0.
    fn restore(&self, options: &[&str]) -> Result<Value> {
        let said = self.run("latest", &[options, &["--json"]].concat())?.expect_code(0)?.stdout;
        json_lines(&said)?.pop().context("no summary")
    }
}

fn count(summary: &Value, name: &str) -> Result<u64> {
    summary.get(name).and_then(Value::as_u64).with_context(|| format!("no `{name}` in {summary}"))
}

/// All paths below a directory, relative, links not followed.
fn paths(directory: &Path) -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    let mut open = vec![directory.to_owned()];
    while let Some(current) = open.pop() {
        for entry in fs::read_dir(current)? {
            let entry = entry?;
            found.insert(entry.path().strip_prefix(directory)?.to_owned());
            if entry.file_type()?.is_dir() {
                open.push(entry.path());
            }
        }
    }
    Ok(found)
}

/// The lengths of unfinished files, bytes.
fn temporaries(directory: &Path) -> Result<Vec<u64>> {
    let found = paths(directory)?.into_iter().filter(|path| path.to_string_lossy().contains(".strand-"));
    // One that is finished meanwhile has another name.
    Ok(found.filter_map(|path| fs::metadata(directory.join(path)).ok()).map(|file| file.len()).collect())
}

#[test]
fn a_restore_killed_in_its_middle_goes_on_where_it_was_and_leaves_nothing_behind() -> Result<()> {
    let rig = Rig::proxied()?;
    let writer = rig.owner("writer")?;
    let source = rig.scratch().join("source");
    random_files(&source, 1, 60, 256 << 10)?;
    // One that is complete when the second run is killed, and one of which much is there then, and much more is not.
    fs::write(source.join("a"), Random::new(2).bytes(6 << 20))?;
    fs::write(source.join("z"), Random::new(3).bytes(64 << 20))?;
    writer.backup(&source, &[])?;
    let target = rig.scratch().join("restored");
    let restored = target.join(source.strip_prefix("/")?);
    let arguments = ["restore", "latest", "--target", text(&target)?, "--overwrite", "if-changed"];
    rig.plan(Plan { bytes_per_second: Some(4 << 20), ..Plan::default() })?;
    for round in 1..=2 {
        let mut restore = Process::spawn(&mut writer.command(&arguments)?)?;
        restore.wait_until(PATIENCE, || {
            let least = if round == 1 { 0 } else { 32 * MIB };
            Ok(target.exists() && temporaries(&target)?.iter().any(|bytes| *bytes >= least))
        })?;
        if round == 1 {
            let busy = writer.run(&arguments)?.expect_code(11)?;
            ensure!(busy.stderr.contains("another restore"), "{}", busy.stderr);
        }
        restore.kill();
    }
    ensure!(!temporaries(&target)?.is_empty(), "nothing was under way when it was killed");
    ensure!(restored.join("a").exists());
    rig.plan(Plan::default())?;
    let last = writer.run(&[&arguments[..], &["--json"]].concat())?.expect_code(0)?;
    let summary = json_lines(&last.stdout)?.pop().context("no summary")?;
    ensure!(count(&summary, "left")? > 0, "what was complete is left: {summary}");
    ensure!(temporaries(&target)?.is_empty());
    ensure_same(&source, &restored)?;
    rig.ensure_no_panic()
}

#[test]
fn delete_makes_the_target_what_the_snapshot_is_and_touches_nothing_else() -> Result<()> {
    let local = Local::new()?;
    for file in ["a", "dir/b", "dir/sub/c", "kind"] {
        let path = local.source.join(file);
        fs::create_dir_all(path.parent().context("no parent")?)?;
        fs::write(path, file)?;
    }
    local.agent.backup(&local.source, &[])?;
    local.restore(&[])?;
    let restored = local.restored()?;
    let outside = local.scratch.path().join("outside");
    fs::create_dir(&outside)?;
    fs::write(outside.join("precious"), "x")?;
    for extra in ["new", "dir/sub/new", "whole/tree/of/new", "kept.log", "whole/kept.log"] {
        let path = restored.join(extra);
        fs::create_dir_all(path.parent().context("no parent")?)?;
        fs::write(path, "x")?;
    }
    symlink(&outside, restored.join("dir/link"))?;
    fs::remove_file(restored.join("kind"))?;
    fs::create_dir_all(restored.join("kind/of/directory"))?;
    let beside = restored.parent().context("no parent")?.join("beside");
    fs::write(&beside, "never saved, so never deleted")?;
    let before = paths(&local.target)?;

    let options = ["--delete", "--overwrite", "if-changed", "--exclude", "*.log"];
    let pretended = local.run("latest", &[&options[..], &["--dry-run", "-v"]].concat())?.expect_code(0)?.stdout;
    ensure!(pretended.contains("would be deleted") && pretended.contains("dir/sub/new"), "{pretended}");
    ensure!(!pretended.contains(".log"), "{pretended}");
    ensure!(paths(&local.target)? == before, "a dry run changes nothing");

    let summary = local.restore(&options)?;
    ensure!(count(&summary, "deleted")? == 9, "{summary}");
    ensure!(outside.join("precious").exists() && beside.exists());
    ensure!(restored.join("kept.log").exists() && restored.join("whole/kept.log").exists());
    fs::remove_file(restored.join("kept.log"))?;
    local.restore(&["--delete", "--overwrite", "if-changed"])?;
    ensure_same(&local.source, &restored)?;

    let file = format!("latest:{}", local.source.join("a").display());
    for (what, options) in [
        ("latest", &["--delete", "--overwrite", "never"][..]),
        (&file, &["--delete", "--overwrite", "always"]),
        ("latest", &["--in-place", "--sparse", "--overwrite", "always"]),
    ] {
        let refused = local.run(what, options)?.expect_code(1)?;
        ensure!(refused.stderr.contains("nothing was restored"), "{}", refused.stderr);
    }
    Ok(())
}

#[test]
fn deleting_never_removes_the_repository_or_the_keys() -> Result<()> {
    let local = Local::new()?;
    fs::write(local.source.join("file"), "x")?;
    local.agent.backup(&local.source, &[])?;
    // The home and the repository lie in the directory that is being restored.
    let what = format!("latest:{}", local.source.display());
    let here = local.scratch.path();
    let arguments = ["restore", &what, "--target", text(here)?, "--delete", "--overwrite", "always"];
    local.agent.run(&arguments)?.expect_code(0)?;
    ensure!(here.join("file").exists() && !local.source.exists());
    local.agent.restore("latest", &local.target)?;
    Ok(())
}

#[test]
fn an_almost_identical_image_costs_only_the_difference() -> Result<()> {
    let local = Local::new()?;
    let image = local.source.join("image");
    fs::write(&image, Random::new(3).bytes(64 << 20))?;
    local.agent.backup(&local.source, &[])?;
    local.restore(&[])?;
    let restored = local.restored()?.join("image");
    let damage = || -> Result<u64> {
        let file = fs::File::options().write(true).open(&restored)?;
        file.write_all_at(b"different", 20 << 20)?;
        Ok(file.metadata()?.ino())
    };
    let before = damage()?;
    let summary = local.restore(&["--overwrite", "always"])?;
    ensure!(count(&summary, "bytes_reused")? > 31 * MIB && count(&summary, "bytes_fetched")? < 4 * MIB, "{summary}");
    ensure!(fs::metadata(&restored)?.ino() != before, "the default replaces the file as a whole");
    ensure_same(&local.source, &local.restored()?)?;

    let before = damage()?;
    let summary = local.restore(&["--overwrite", "always", "--in-place", "--verify"])?;
    ensure!(count(&summary, "bytes")? < MIB && count(&summary, "bytes_fetched")? < 4 * MIB, "{summary}");
    ensure!(fs::metadata(&restored)?.ino() == before);
    ensure_same(&local.source, &local.restored()?)
}

#[test]
fn one_file_of_many_costs_the_blocks_on_its_way() -> Result<()> {
    let local = Local::new()?;
    for directory in 0..40 {
        random_files(&local.source.join(format!("d{directory:02}")), directory, 50, 20_000)?;
    }
    local.agent.backup(&local.source, &[])?;
    let one = local.source.join("d20/file-0025");
    let what = format!("latest:{}", one.display());
    let said = local.run(&what, &["--json"])?.expect_code(0)?.stdout;
    let by_path = json_lines(&said)?.pop().context("no summary")?;
    let pattern = text(&one)?;
    let by_pattern = local.restore(&["--include", pattern, "--overwrite", "always"])?;
    for summary in [by_path, by_pattern] {
        let (blocks, bytes) = (count(&summary, "blocks_fetched")?, count(&summary, "bytes_fetched")?);
        ensure!(count(&summary, "files")? == 1 && blocks <= 4 && bytes < 3 * MIB, "of 40 MB: {summary}");
    }
    ensure!(fs::read(local.restored()?.join("d20/file-0025"))? == fs::read(&one)?);
    let told = local.run(&what, &["-v", "--overwrite", "always"])?.expect_code(0)?.stdout;
    ensure!(told.contains("fetched in"), "{told}");
    Ok(())
}

#[test]
fn an_include_pattern_that_matches_nothing_says_so() -> Result<()> {
    let local = Local::new()?;
    fs::write(local.source.join("file"), "x")?;
    local.agent.backup(&local.source, &[])?;
    let none = local.run("latest", &["--include", "/no/such/file"])?.expect_code(1)?;
    ensure!(none.stderr.contains("/no/such/file"), "{}", none.stderr);
    let options = ["--include", "file", "--include", "other", "--overwrite", "always"];
    let some = local.run("latest", &options)?.expect_code(3)?;
    ensure!(some.stderr.contains("`other`") && !some.stderr.contains("`file`"), "{}", some.stderr);
    ensure!(local.restored()?.join("file").exists());
    Ok(())
}

#[test]
fn zeros_become_holes_on_request() -> Result<()> {
    let local = Local::new()?;
    let mut bytes = vec![0; 8 << 20];
    bytes.get_mut(3 << 20..).context("too short")?.iter_mut().take(1000).for_each(|byte| *byte = 7);
    fs::write(local.source.join("zeros"), &bytes)?;
    local.agent.backup(&local.source, &[])?;
    local.restore(&["--sparse", "--verify"])?;
    let restored = local.restored()?.join("zeros");
    ensure!(fs::read(&restored)? == bytes && fs::metadata(&restored)?.blocks() * 512 < MIB);
    Ok(())
}
