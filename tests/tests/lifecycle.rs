//! Sixty days of one repository: a tree that changes, backups, retention and collection in between. Every snapshot that was
//! kept restores as it was, and the repository is as large as if only those had ever been made.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use strandline_tests::clock;
use strandline_tests::compare::ensure_same;
use strandline_tests::corpus::Corpus;
use strandline_tests::mutate::mutate;
use strandline_tests::process;
use strandline_tests::rig::{Agent, PATIENCE, Summary, copy_tree, json_lines};

const DAYS: u64 = 60;
/// How much of the tree changes from one snapshot to the next, percent of its files.
const CHANGED_PERCENT: u64 = 2;
/// What may be stored more than in a repository that never held anything else, percent.
const EXCESS_PERCENT: u64 = 5;

fn long() -> bool {
    std::env::var_os("STRAND_LONG").is_some()
}

struct History {
    scratch: tempfile::TempDir,
    library: PathBuf,
    agent: Agent,
    /// Copies of the source as each snapshot saw it.
    states: BTreeMap<String, PathBuf>,
    /// Number and id of the snapshots that are kept.
    order: Vec<(u64, String)>,
    hours: u64,
}

impl History {
    fn new(library: PathBuf) -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let agent = Agent::local(&scratch.path().join("home"), &scratch.path().join("repository"))?;
        Ok(Self { scratch, library, agent, states: BTreeMap::new(), order: Vec::new(), hours: 0 })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn run(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.agent.command(arguments)?;
        Ok(process::run(clock::later(&mut command, &self.library, self.hours), PATIENCE)?.expect_code(0)?.stdout)
    }

    fn backup(&mut self, number: u64) -> Result<()> {
        let source = self.path("source");
        let mut command = self.agent.backup_command(&source, &[])?;
        let finished = process::run(clock::later(&mut command, &self.library, self.hours), PATIENCE)?.expect_code(0)?;
        let id = Summary::of(&finished.stdout, finished.stderr)?.snapshot()?;
        let state = self.path(&format!("state-{number}"));
        copy_tree(&source, &state)?;
        self.states.insert(id.clone(), state);
        self.order.push((number, id));
        Ok(())
    }

    /// Applies the policy and forgets the copies of what is gone.
    fn forget(&mut self) -> Result<()> {
        self.run(&[
            "forget",
            "--keep-last=2",
            "--keep-daily=7",
            "--keep-weekly=4",
            "--keep-monthly=3",
            "--group-by=host",
        ])?;
        let kept = self.kept()?;
        for (id, state) in std::mem::take(&mut self.states) {
            if kept.contains(&id) {
                self.states.insert(id, state);
            } else {
                fs::remove_dir_all(&state)?;
            }
        }
        self.order.retain(|(_, id)| kept.contains(id));
        Ok(())
    }

    fn kept(&self) -> Result<Vec<String>> {
        let id = |row: &Value| row.get("id").and_then(Value::as_str).map(str::to_owned);
        Ok(json_lines(&self.run(&["snapshots", "--json"])?)?.iter().filter_map(id).collect())
    }

    fn restore_all(&self, agent: &Agent) -> Result<()> {
        let source = self.path("source");
        for (id, state) in &self.states {
            let target = self.path("restored");
            let to = target.to_str().context("a path that is not text")?;
            let mut command = agent.command(&["restore", id, "--target", to])?;
            process::run(clock::later(&mut command, &self.library, self.hours), PATIENCE)?.expect_code(0)?;
            ensure_same(state, &target.join(source.strip_prefix("/")?)).with_context(|| format!("snapshot {id}"))?;
            fs::remove_dir_all(&target)?;
        }
        Ok(())
    }
}

/// Bytes on disk of everything in the packs' directories below `directory`.
fn stored(directory: &Path) -> Result<u64> {
    use std::os::unix::fs::MetadataExt;
    let mut total = 0;
    let mut pending = vec![directory.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                pending.push(entry.path());
            } else if entry.path().extension().is_some_and(|extension| extension == "pack") {
                total += entry.metadata()?.blocks() * 512;
            }
        }
    }
    Ok(total)
}

fn report(text: &str, kind: &str) -> Result<Value> {
    let lines = json_lines(text)?;
    let found = lines.into_iter().rfind(|line| line.get("message_type").and_then(Value::as_str) == Some(kind));
    found.with_context(|| format!("no line `{kind}` in {text}"))
}

fn number(report: &Value, name: &str) -> Result<u64> {
    report.get(name).and_then(Value::as_u64).with_context(|| format!("no `{name}` in {report}"))
}

#[test]
fn sixty_days_of_backups_retention_and_collection_leave_every_kept_snapshot_as_it_was() -> Result<()> {
    let Some(library) = clock::library() else {
        println!("NOT RUN: libfaketime is not installed (Debian package faketime), so no program can live sixty days");
        return Ok(());
    };
    let snapshots: u64 = if long() { 200 } else { 30 };
    let mut history = History::new(library)?;
    // A repository of its own for the comparison, with the same keys: with others, chunks would begin elsewhere.
    history.run(&["init"])?;
    copy_tree(history.agent.home(), &history.path("fresh-home"))?;
    copy_tree(&history.path("repository"), &history.path("fresh"))?;
    let source = history.path("source");
    let files = if long() { 2000 } else { 600 };
    let corpus = Corpus { files, seed: 33, beyond_path_max: false, ..Corpus::default() };
    corpus.create(&source)?;
    let mut collections = 0;
    for number in 0..snapshots {
        history.hours = number * DAYS * 24 / snapshots;
        if number > 0 {
            mutate(&source, 1000 + number, CHANGED_PERCENT)?;
        }
        history.backup(number)?;
        if number % 3 == 2 {
            history.forget()?;
        }
        if number % 5 == 4 {
            history.run(&["prune"])?;
            collections += 1;
        }
    }
    history.forget()?;
    history.restore_all(&history.agent)?;

    let repository = history.path("repository");
    let collected = history.run(&["prune", "--purge-deleted", "--json"])?;
    let pinned = number(&report(&collected, "collected")?, "bytes_pinned")?;
    let without = stored(&repository)?;
    history.run(&["prune", "--repack", "--max-unused", "0"])?;
    history.restore_all(&history.agent)?;
    history.run(&["check", "--read-data"])?;
    let with = stored(&repository)?;

    // The same tree through the same changes, and the same snapshots alone, in a repository of their own.
    let fresh = Agent::local(&history.path("fresh-home"), &history.path("fresh"))?;
    let again = history.path("again");
    corpus.create(&again)?;
    for number in 0..snapshots {
        if number > 0 {
            mutate(&again, 1000 + number, CHANGED_PERCENT)?;
        }
        if history.order.iter().any(|(kept, _)| *kept == number) {
            fresh.backup(&again, &[])?;
        }
    }
    let ideal = stored(&history.path("fresh"))?;
    println!(
        "{snapshots} snapshots in {DAYS} days, {collections} collections, {} kept and compared; stored {ideal} fresh, {with} after \
         prune --repack ({:.1} % more), {without} without repack ({:.1} % more; {pinned} pinned in blocks that are partly needed)",
        history.states.len(),
        percent_more(with, ideal),
        percent_more(without, ideal),
    );
    ensure!(with * 100 <= ideal * (100 + EXCESS_PERCENT), "{with} bytes stored, {ideal} in a fresh repository");
    Ok(())
}

#[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
fn percent_more(found: u64, ideal: u64) -> f64 {
    (found as f64 / ideal as f64 - 1.0) * 100.0
}
