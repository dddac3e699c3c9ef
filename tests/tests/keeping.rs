//! What is kept and what is not: `forget`, `undelete`, `tag`, `protect`, from the command line to the repository and back.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use strandline_tests::rig::{Agent, json_lines};

/// A repository in a directory with some snapshots, oldest first.
struct Kept {
    scratch: tempfile::TempDir,
    agent: Agent,
    ids: Vec<String>,
}

impl Kept {
    /// `tags`: those of each snapshot, in the words of `--tag`; none if empty.
    fn new(tags: &[&str]) -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let agent = Agent::local(&scratch.path().join("home"), &scratch.path().join("repository"))?;
        let source = scratch.path().join("source");
        fs::create_dir(&source)?;
        let mut ids = Vec::new();
        for (number, tags) in tags.iter().enumerate() {
            fs::write(source.join("file"), format!("state {number}"))?;
            let options: &[&str] = if tags.is_empty() { &[] } else { &["--tag", tags] };
            ids.push(agent.backup(&source, options)?.snapshot()?);
        }
        Ok(Self { scratch, agent, ids })
    }

    fn source(&self) -> PathBuf {
        self.scratch.path().join("source")
    }

    fn id(&self, number: usize) -> Result<&str> {
        Ok(self.ids.get(number).context("no such snapshot")?)
    }

    /// The rows of a command that must end with `code`; lines that are no rows are left out.
    fn rows(&self, arguments: &[&str], code: i32) -> Result<Vec<Value>> {
        let arguments: Vec<&str> = arguments.iter().copied().chain(["--json"]).collect();
        let lines = json_lines(&self.agent.run(&arguments)?.expect_code(code)?.stdout)?;
        Ok(lines.into_iter().filter(|line| line.get("message_type").is_none()).collect())
    }

    fn deleted(&self) -> Result<Vec<Value>> {
        self.rows(&["snapshots", "--deleted"], 0)
    }
}

fn field<'a>(row: &'a Value, name: &str) -> Result<&'a str> {
    row.get(name).and_then(Value::as_str).with_context(|| format!("no `{name}` in {row}"))
}

/// A field that is a list, joined with `; `.
fn list(row: &Value, name: &str) -> Result<String> {
    let list = row.get(name).and_then(Value::as_array).with_context(|| format!("no list `{name}` in {row}"))?;
    Ok(list.iter().filter_map(Value::as_str).collect::<Vec<_>>().join("; "))
}

fn ids_of(rows: &[Value]) -> Result<Vec<&str>> {
    rows.iter().map(|row| field(row, "id")).collect()
}

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not text")
}

#[test]
fn a_policy_that_keeps_nothing_is_refused_and_says_what_to_give() -> Result<()> {
    let kept = Kept::new(&["", ""])?;
    for arguments in [&["forget"][..], &["forget", "--host", "x"], &["forget", "-g", "host"], &["forget", "-l", "0"]] {
        let refused = kept.agent.run(arguments)?.expect_code(1)?;
        ensure!(refused.stderr.contains("--keep-daily"), "{arguments:?}: {}", refused.stderr);
    }
    let both = kept.agent.run(&["forget", "latest", "--keep-last", "1"])?.expect_code(1)?;
    ensure!(both.stderr.contains("not both"), "{}", both.stderr);
    let set = kept.agent.run(&["forget", "--keep-tag", ","])?.expect_code(1)?;
    ensure!(set.stderr.contains("empty"), "{}", set.stderr);
    kept.agent.run(&["forget", "--keep-within", "7"])?.expect_code(1)?;
    ensure!(kept.agent.snapshots()? == kept.ids);
    Ok(())
}

#[test]
fn a_dry_run_of_forget_tells_the_reason_for_each_snapshot_and_changes_nothing() -> Result<()> {
    let kept = Kept::new(&["gold,old", "", ""])?;
    let rows = kept.rows(&["forget", "-l", "1", "--keep-tag", "gold", "-n"], 0)?;
    ensure!(ids_of(&rows)? == kept.ids, "oldest first: {rows:?}");
    let verdicts: Vec<(&str, String)> =
        rows.iter().map(|row| Ok((field(row, "action")?, list(row, "reasons")?))).collect::<Result<_>>()?;
    let expected = [("keep", "tagged gold"), ("remove", ""), ("keep", "one of the last")];
    ensure!(verdicts == expected.map(|(action, reasons)| (action, reasons.to_owned())), "{verdicts:?}");
    let said = kept.agent.run(&["forget", "-l", "1", "--keep-tag", "gold", "--dry-run"])?.expect_code(0)?.stdout;
    ensure!(said.contains("1 would be removed, 2 kept") && said.contains("paths "), "{said}");
    // By name nothing is asked but whether it may go.
    let rows = kept.rows(&["forget", "latest~1", kept.id(1)?, "-n"], 0)?;
    ensure!(ids_of(&rows)? == [kept.id(1)?], "named twice, told once: {rows:?}");
    ensure!(kept.agent.snapshots()? == kept.ids);
    // Filters narrow what the policy sees, grouping divides it.
    ensure!(kept.rows(&["forget", "-l", "1", "-n", "--host", "elsewhere"], 0)?.is_empty());
    ensure!(kept.rows(&["forget", "-l", "1", "-n", "--path", text(&kept.source())?], 0)?.len() == 3);
    ensure!(kept.rows(&["forget", "-l", "1", "-n", "--tag", "gold,nothing", "--tag", "old"], 0)?.len() == 1);
    let grouped = kept.rows(&["forget", "-l", "1", "-n", "-g", "tags"], 0)?;
    ensure!(grouped.iter().filter(|row| field(row, "action").ok() == Some("keep")).count() == 2, "{grouped:?}");
    Ok(())
}

#[test]
fn what_a_policy_does_not_keep_is_deleted_and_can_be_brought_back() -> Result<()> {
    let kept = Kept::new(&["", "", "", ""])?;
    let rows = kept.rows(&["forget", "--keep-last", "2", "--reason", "spring cleaning"], 0)?;
    ensure!(rows.len() == 4);
    ensure!(kept.agent.snapshots()? == kept.ids.get(2..).unwrap_or_default());
    let deleted = kept.deleted()?;
    ensure!(ids_of(&deleted)? == kept.ids.get(..2).unwrap_or_default(), "{deleted:?}");
    for row in &deleted {
        let deletion = row.get("deletion").context("no deletion")?;
        ensure!(field(deletion, "reason")? == "spring cleaning");
        ensure!(field(deletion, "deleted")? < field(deletion, "final")?, "{deletion}");
    }
    let shown = kept.agent.run(&["snapshots", "--deleted"])?.expect_code(0)?.stdout;
    ensure!(shown.contains("FINAL") && shown.contains("spring cleaning"), "{shown}");
    // A second time there is nothing to do.
    ensure!(kept.rows(&["forget", "--keep-last", "2"], 0)?.len() == 2);
    // A deleted snapshot is not among those that can be restored, and only a deleted one can be brought back.
    kept.agent.run(&["ls", kept.id(0)?])?.expect_code(1)?;
    kept.agent.run(&["undelete", kept.id(3)?])?.expect_code(1)?;
    let rows = kept.rows(&["undelete", kept.id(0)?, kept.id(1)?], 0)?;
    ensure!(rows.iter().all(|row| field(row, "action").ok() == Some("undeleted")), "{rows:?}");
    ensure!(kept.agent.snapshots()? == kept.ids && kept.deleted()?.is_empty());
    let target = kept.scratch.path().join("restored");
    kept.agent.restore(kept.id(0)?, &target)?;
    let restored = target.join(kept.source().strip_prefix("/")?).join("file");
    ensure!(fs::read_to_string(restored)? == "state 0");
    Ok(())
}

#[test]
fn a_protected_snapshot_survives_its_name_and_every_policy() -> Result<()> {
    let kept = Kept::new(&["", "", ""])?;
    let rows = kept.rows(&["protect", kept.id(0)?], 0)?;
    ensure!(rows.first().map(|row| field(row, "action")).transpose()? == Some("protected"), "{rows:?}");
    let rows = kept.rows(&["forget", kept.id(0)?, kept.id(1)?], 3)?;
    let actions: Vec<(&str, String)> =
        rows.iter().map(|row| Ok((field(row, "id")?, list(row, "reasons")?))).collect::<Result<_>>()?;
    let of = |id: &str| actions.iter().find(|(row, _)| *row == id).map(|(_, reasons)| reasons.clone());
    ensure!(of(kept.id(0)?).is_some_and(|reasons| reasons.contains("protected")), "{actions:?}");
    ensure!(of(kept.id(1)?).is_some_and(|reasons| reasons.is_empty()), "{actions:?}");
    kept.rows(&["forget", "-l", "1"], 0)?;
    ensure!(kept.agent.snapshots()? == [kept.id(0)?, kept.id(2)?]);
    let shown = kept.agent.run(&["snapshots"])?.expect_code(0)?.stdout;
    ensure!(shown.matches("(protected)").count() == 1, "{shown}");
    kept.rows(&["unprotect", kept.id(0)?], 0)?;
    kept.rows(&["forget", "-l", "1"], 0)?;
    ensure!(kept.agent.snapshots()? == [kept.id(2)?]);
    Ok(())
}

#[test]
fn tags_can_be_added_removed_and_replaced_and_policies_see_the_new_ones() -> Result<()> {
    let kept = Kept::new(&["a,b", "b", ""])?;
    let tags = |row: &Value| list(row, "tags");
    let rows = kept.rows(&["tag", "--add", "c,a", "--remove", "b", kept.id(0)?, kept.id(1)?], 0)?;
    ensure!(rows.iter().map(tags).collect::<Result<Vec<_>>>()? == ["a; c", "a; c"], "{rows:?}");
    let rows = kept.rows(&["tag", "--set", "z", "--tag", "a,c"], 0)?;
    ensure!(ids_of(&rows)? == kept.ids.get(..2).unwrap_or_default(), "by the tags of today: {rows:?}");
    ensure!(kept.rows(&["tag", "--set", "z", "--tag", "z"], 0)?.is_empty(), "nothing to change");
    let rows = kept.rows(&["tag", "--set", "", kept.id(1)?], 0)?;
    ensure!(rows.iter().map(tags).collect::<Result<Vec<_>>>()? == [""]);
    kept.rows(&["forget", "--keep-tag", "z", "--keep-last", "1"], 0)?;
    ensure!(kept.agent.snapshots()? == [kept.id(0)?, kept.id(2)?]);
    // What cannot be meant changes nothing.
    for bad in [&["tag", "latest"][..], &["tag", "--add", "x"], &["tag", "--set", "x", "--add", "y", "latest"]] {
        kept.agent.run(bad)?.expect_code(1)?;
    }
    let long = "x".repeat(300);
    kept.agent.run(&["tag", "--add", &long, "latest"])?.expect_code(1)?;
    Ok(())
}
