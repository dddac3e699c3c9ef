//! The command line as people and scripts meet it: exit codes, messages, JSON, restore options.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use strandline_tests::compare::ensure_same;
use strandline_tests::process::{self, Process};
use strandline_tests::proxy::Direction;
use strandline_tests::rig::{Agent, PATIENCE, Rig, json_lines, random_files, settle};

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not text")
}

/// A home, a directory repository that does not exist yet, and a source of ten small files.
struct Local {
    scratch: tempfile::TempDir,
    agent: Agent,
}

impl Local {
    fn new() -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let agent = Agent::local(&scratch.path().join("home"), &scratch.path().join("repository"))?;
        random_files(&scratch.path().join("source"), 1, 10, 20_000)?;
        Ok(Self { scratch, agent })
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.scratch.path().join(name)
    }

    /// Where `target` holds what was saved from the source.
    fn restored(&self, target: &Path) -> Result<std::path::PathBuf> {
        Ok(target.join(self.path("source").strip_prefix("/")?))
    }
}

#[test]
fn the_first_backup_makes_the_repository_and_prints_a_recovery_key_that_opens_it_on_an_empty_machine() -> Result<()> {
    let local = Local::new()?;
    let source = local.path("source");
    let said = local.agent.run(&["backup", text(&source)?])?.expect_code(0)?.stdout;
    let key = said.lines().find_map(|line| line.strip_prefix("recovery key")).context(said.clone())?.trim();
    ensure!(key.len() == 65, "{key}");
    let again = local.agent.run(&["backup", text(&source)?])?.expect_code(0)?.stdout;
    ensure!(!again.contains("recovery"), "printed only once: {again}");
    ensure!(!again.contains(key));

    let file = local.path("recovery.txt");
    fs::write(&file, key.to_lowercase())?;
    let empty = Agent::local(&local.path("empty"), &local.path("repository"))?;
    empty.run(&["snapshots"])?.expect_code(12)?;
    let target = local.path("restored");
    let options = ["restore", "latest", "--target", text(&target)?, "--recovery-key-file", text(&file)?];
    empty.run(&options)?.expect_code(0)?;
    ensure_same(&source, &local.restored(&target)?)?;
    let mut wrong = key.to_owned();
    wrong.replace_range(0..1, if key.starts_with('0') { "1" } else { "0" });
    fs::write(&file, wrong)?;
    let refused = empty.run(&["snapshots", "--recovery-key-file", text(&file)?])?.expect_code(12)?;
    ensure!(refused.stderr.contains("checksum"), "{}", refused.stderr);
    Ok(())
}

#[test]
fn each_kind_of_failure_has_its_exit_code_and_says_what_to_do() -> Result<()> {
    let local = Local::new()?;
    let (source, target) = (local.path("source"), local.path("target"));
    let agent = &local.agent;
    let none = agent.run(&["snapshots"])?.expect_code(10)?;
    ensure!(none.stderr.contains("strand backup"), "{}", none.stderr);
    agent.backup(&source, &[])?;

    fs::create_dir(&target)?;
    fs::write(target.join("something"), "in the way")?;
    let used = agent.run(&["restore", "latest", "--target", text(&target)?])?.expect_code(1)?;
    ensure!(used.stderr.contains("not empty") && used.stderr.contains("--overwrite"), "{}", used.stderr);
    ensure!(fs::read_dir(&target)?.count() == 1);
    agent.run(&["restore", "latest", "--target", text(&source.join("file-0001"))?])?.expect_code(1)?;
    agent.run(&["restore", "ffffffff", "--target", text(&local.path("new"))?])?.expect_code(1)?;
    agent.run(&["restore", "latest~5", "--target", text(&local.path("new"))?])?.expect_code(1)?;
    agent.run(&["ls", "latest:/no/such/path"])?.expect_code(1)?;
    agent.run(&["no-such-command"])?.expect_code(1)?;
    agent.run(&["init"])?.expect_code(1)?;

    // A source that does not exist, alone and beside one that does.
    let missing = local.path("missing");
    let alone = agent.run(&["backup", text(&missing)?])?.expect_code(1)?;
    ensure!(alone.stderr.contains("nothing was saved"), "{}", alone.stderr);
    let beside = agent.run(&["backup", text(&missing)?, text(&source)?])?.expect_code(3)?;
    ensure!(beside.stderr.contains("missing"), "{}", beside.stderr);

    let keyless = Agent::local(&local.path("keyless"), &local.path("repository"))?;
    let refused = keyless.run(&["snapshots"])?.expect_code(12)?;
    ensure!(refused.stderr.contains("key"), "{}", refused.stderr);
    let wrong = local.path("wrong.key");
    fs::write(&wrong, "0123456789abcdef".repeat(4))?;
    keyless.run(&["snapshots", "--key-file", text(&wrong)?])?.expect_code(12)?;
    fs::write(&wrong, "nonsense")?;
    let malformed = keyless.run(&["snapshots", "--key-file", text(&wrong)?])?.expect_code(12)?;
    ensure!(malformed.stderr.contains("wrong.key"), "{}", malformed.stderr);

    let elsewhere = agent.at("strand://127.0.0.1:9/main").run(&["snapshots"])?.expect_code(1)?;
    ensure!(elsewhere.stderr.contains("enroll"), "{}", elsewhere.stderr);
    for bad in ["strand://", "s3://bucket", "strand://host/UPPER CASE"] {
        agent.at(bad).run(&["snapshots"])?.expect_code(1)?;
    }
    Ok(())
}

#[test]
fn a_directory_in_use_is_left_alone_and_waited_for_if_asked() -> Result<()> {
    let local = Local::new()?;
    let source = local.path("source");
    local.agent.backup(&source, &[])?;
    let big = local.path("big");
    random_files(&big, 2, 40, 256 << 10)?;
    let mut first = local.agent.start_backup(&big, &["--limit-upload", "4M"])?;
    first.wait_for_line("\"status\"", PATIENCE)?;
    let busy = local.agent.run(&["backup", text(&source)?])?.expect_code(11)?;
    ensure!(busy.stderr.contains(&format!("process {}", first.id())), "it names who: {}", busy.stderr);
    local.agent.backup(&source, &["--lock-wait", "60s"])?;
    ensure!(first.wait(PATIENCE)?.is_some_and(|status| status.success()), "{}", first.output());
    ensure!(local.agent.snapshots()?.len() == 3);
    Ok(())
}

/// Interrupts a backup in its middle; it must end with 130 within 10 s, and what was acknowledged is not sent again.
fn interrupted(signal: Signal) -> Result<()> {
    let rig = Rig::proxied()?;
    let writer = rig.owner("writer")?;
    let source = rig.scratch().join("source");
    random_files(&source, 3, 60, 512 << 10)?;
    let start = rig.proxy()?.carried_bytes(Direction::ToServer);
    let mut backup = writer.start_backup(&source, &["--limit-upload", "8M", "--window", "8M"])?;
    rig.proxy()?.wait_for_bytes(Direction::ToServer, start + (14 << 20), PATIENCE)?;
    backup.signal(signal)?;
    let status = backup.wait(Duration::from_secs(10))?.context("it does not end within 10 s")?;
    ensure!(status.code() == Some(130), "{status}: {}", backup.output());
    ensure!(backup.output().contains("interrupted"), "{}", backup.output());
    ensure!(writer.snapshots()?.is_empty());
    let rest = writer.backup(&source, &[])?;
    ensure!(rest.count("bytes_stored")? < (30 - 13) << 20, "{rest:?}");
    writer.restore_and_compare("latest", &source, &source, &rig.scratch().join("restored"))?;
    rig.ensure_no_panic()
}

#[test]
fn s16_an_interrupted_backup_ends_with_130_and_the_next_run_sends_only_the_rest() -> Result<()> {
    interrupted(Signal::INT)
}

#[test]
fn s16_a_terminated_backup_ends_with_130_and_the_next_run_sends_only_the_rest() -> Result<()> {
    interrupted(Signal::TERM)
}

#[test]
fn an_interrupted_restore_ends_with_130_leaves_whole_files_and_can_be_continued() -> Result<()> {
    let rig = Rig::proxied()?;
    let writer = rig.owner("writer")?;
    let source = rig.scratch().join("source");
    random_files(&source, 4, 60, 512 << 10)?;
    writer.backup(&source, &[])?;
    rig.plan(strandline_tests::proxy::Plan { bytes_per_second: Some(1 << 20), ..Default::default() })?;
    let target = rig.scratch().join("restored");
    let start = rig.proxy()?.carried_bytes(Direction::ToClient);
    let mut restore = Process::spawn(&mut writer.command(&["restore", "latest", "--target", text(&target)?])?)?;
    rig.proxy()?.wait_for_bytes(Direction::ToClient, start + (8 << 20), PATIENCE)?;
    restore.signal(Signal::INT)?;
    let status = restore.wait(Duration::from_secs(10))?.context("it does not end within 10 s")?;
    ensure!(status.code() == Some(130), "{status}: {}", restore.output());
    let restored = target.join(source.strip_prefix("/")?);
    for entry in fs::read_dir(&restored)? {
        let path = entry?.path();
        let name = path.file_name().context("no name")?;
        if source.join(name).exists() {
            ensure!(fs::read(&path)? == fs::read(source.join(name))?, "half a file: {path:?}");
        }
    }
    rig.plan(strandline_tests::proxy::Plan::default())?;
    writer.run(&["restore", "latest", "--target", text(&target)?, "--overwrite", "if-changed"])?.expect_code(0)?;
    ensure_same(&source, &restored)
}

#[test]
fn restore_modes_do_what_they_are_called() -> Result<()> {
    let local = Local::new()?;
    let source = local.path("source");
    fs::create_dir(source.join("sub"))?;
    fs::write(source.join("sub/inner"), "inner")?;
    local.agent.backup(&source, &[])?;
    let target = local.path("target");
    let restored = local.restored(&target)?;
    let run = |extra: &[&str]| -> Result<process::Finished> {
        let mut arguments = vec!["restore", "latest", "--target", text(&target)?, "--json"];
        arguments.extend_from_slice(extra);
        local.agent.run(&arguments)?.expect_code(0)
    };
    run(&[])?;
    ensure_same(&source, &restored)?;

    fs::write(restored.join("file-0003"), "changed, and of another size")?;
    fs::write(restored.join("mine"), "not in the snapshot")?;
    run(&["--overwrite", "never"])?;
    ensure!(fs::read_to_string(restored.join("file-0003"))?.starts_with("changed"));
    run(&["--overwrite", "if-changed", "--verify"])?;
    ensure!(fs::read(restored.join("file-0003"))? == fs::read(source.join("file-0003"))?);
    // The same size and time, other content: only `always` replaces it.
    let time = fs::metadata(source.join("file-0004"))?.modified()?;
    fs::write(restored.join("file-0004"), vec![b'x'; 20_000])?;
    fs::File::options().write(true).open(restored.join("file-0004"))?.set_modified(time)?;
    run(&["--overwrite", "if-changed"])?;
    ensure!(fs::read(restored.join("file-0004"))? == vec![b'x'; 20_000]);
    run(&["--overwrite", "always"])?;
    ensure!(fs::read(restored.join("file-0004"))? == fs::read(source.join("file-0004"))?);
    ensure!(restored.join("mine").exists(), "what is not in the snapshot is never touched");

    let part = local.path("part");
    let what = format!("latest:{}", source.join("sub").display());
    local.agent.restore(&what, &part)?;
    let inner: Vec<_> = walk(&part)?.into_iter().filter(|path| path.is_file()).collect();
    ensure!(inner.len() == 1 && inner.iter().all(|path| path.ends_with("inner")), "{inner:?}");
    let some = local.path("some");
    let options = ["restore", "latest", "--target", text(&some)?, "--include", "file-000*", "--exclude", "*5"];
    local.agent.run(&options)?.expect_code(0)?;
    let files: Vec<_> = walk(&some)?.into_iter().filter(|path| path.is_file()).collect();
    ensure!(files.len() == 9 && !files.iter().any(|path| path.ends_with("file-0005")), "{files:?}");
    Ok(())
}

fn walk(directory: &Path) -> Result<Vec<std::path::PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(walk(&path)?);
        }
        found.push(path);
    }
    Ok(found)
}

#[test]
fn every_command_speaks_json_and_errors_are_json_too() -> Result<()> {
    let local = Local::new()?;
    let source = local.path("source");
    fs::write(source.join("new\nline \u{1f980}"), "odd")?;
    settle();
    let target = local.path("target");
    for arguments in [
        vec!["backup", text(&source)?],
        vec!["backup", text(&source)?, "--dry-run"],
        vec!["backup", text(&source)?, "--force", "--tag", "a,b", "--host", "elsewhere"],
        vec!["snapshots"],
        vec!["snapshots", "--latest", "1", "--host", "elsewhere", "--tag", "a"],
        vec!["ls", "latest"],
        vec!["ls", "latest", "--long"],
        vec!["status"],
        vec!["restore", "latest", "--target", text(&target)?, "--verify"],
    ] {
        let finished = local.agent.run(&[&arguments[..], &["--json"]].concat())?.expect_code(0)?;
        let lines = json_lines(&finished.stdout).with_context(|| format!("{arguments:?}"))?;
        ensure!(!lines.is_empty(), "{arguments:?} says nothing");
        ensure!(lines.iter().all(serde_json::Value::is_object), "{arguments:?}: {lines:?}");
        ensure!(finished.stderr.is_empty(), "{arguments:?}: {}", finished.stderr);
    }
    let failed = local.agent.run(&["ls", "ffff", "--json"])?.expect_code(1)?;
    let error = json_lines(&failed.stderr)?;
    ensure!(failed.stdout.is_empty());
    ensure!(error.iter().any(|line| line.get("code").and_then(serde_json::Value::as_u64) == Some(1)), "{error:?}");

    let rig = Rig::direct()?;
    for arguments in [&["tenant", "list"][..], &["token", "create", "acme"], &["agent", "list"], &["status"]] {
        let said = rig.administer(&[arguments, &["--json"]].concat())?;
        serde_json::from_str::<serde_json::Value>(&said).with_context(|| format!("{arguments:?}: {said}"))?;
    }
    Ok(())
}

#[test]
fn excludes_tags_and_quiet_do_what_they_say() -> Result<()> {
    let local = Local::new()?;
    let source = local.path("source");
    fs::create_dir(source.join("node_modules"))?;
    fs::write(source.join("node_modules/x"), "x")?;
    let options = ["--exclude", "**/node_modules", "-e", "file-0001", "--tag", "first", "-q"];
    let silent = local.agent.run(&[&["backup", text(&source)?][..], &options].concat())?.expect_code(0)?;
    ensure!(silent.stderr.is_empty(), "{silent:?}");
    let listed = local.agent.run(&["ls", "latest"])?.expect_code(0)?.stdout;
    ensure!(
        listed.contains("file-0002") && !listed.contains("file-0001") && !listed.contains("node_modules"),
        "{listed}"
    );
    local.agent.backup(&source, &["--tag", "second"])?;
    let first = local.agent.run(&["snapshots", "--json", "--tag", "first"])?.expect_code(0)?.stdout;
    ensure!(json_lines(&first)?.len() == 1);
    Ok(())
}

#[test]
fn compression_is_as_hard_as_was_wished_for() -> Result<()> {
    let local = Local::new()?;
    let (source, settings) = (local.path("rows"), local.path("home").join(".config/strandline/strand.toml"));
    fs::create_dir(&source)?;
    let rows: Vec<String> = (0..60_000u64).map(|n| format!("{n};{};\n", n * n * 7919 % 10_007)).collect();
    fs::write(source.join("rows.csv"), rows.concat())?;
    let stored = |repository: &str, arguments: &[&str]| -> Result<u64> {
        let agent = Agent::local(&local.path("home"), &local.path(repository))?;
        agent.backup(&source, arguments)?.count("bytes_stored")
    };
    let fast = stored("fast", &["--compression", "1"])?;
    let small = stored("small", &["--compression", "19"])?;
    let automatic = stored("auto", &["--compression", "auto"])?;
    ensure!(small < fast * 9 / 10 && small < automatic * 9 / 10, "{small} {fast} {automatic}");
    fs::write(&settings, "compression = \"19\"\n")?;
    let set = stored("set", &[])?;
    ensure!(set < fast * 9 / 10 && set < automatic * 9 / 10, "by the settings {set}; {fast} {automatic}");

    for wrong in ["0", "20", "fast"] {
        let refused = local.agent.run(&["backup", text(&source)?, "--compression", wrong])?.expect_code(1)?;
        ensure!(refused.stderr.contains("from 1 (fast) to 19 (small)"), "{refused:?}");
    }
    fs::write(&settings, "compression = \"hard\"\n")?;
    for command in [&["backup", text(&source)?][..], &["prune", "--repack"]] {
        let refused = local.agent.run(command)?.expect_code(1)?;
        ensure!(refused.stderr.contains("the setting `compression`"), "{refused:?}");
    }
    Ok(())
}

#[test]
fn completions_exist_for_every_shell_and_a_closed_pipe_is_no_error() -> Result<()> {
    let home = tempfile::tempdir()?;
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        for program in ["strand", "strand-server"] {
            let mut command = process::command(program, home.path())?;
            let finished = process::run(command.args(["completions", shell]), PATIENCE)?.expect_code(0)?;
            ensure!(finished.stdout.contains(program) && finished.stdout.len() > 1000, "{program} {shell}");
        }
    }
    for program in ["strand", "strand-server"] {
        for (argument, words) in [("--help", "Usage"), ("--version", "0.")] {
            let finished =
                process::run(process::command(program, home.path())?.arg(argument), PATIENCE)?.expect_code(0)?;
            ensure!(finished.stdout.contains(words), "{program} {argument}: {finished:?}");
        }
    }
    let local = Local::new()?;
    local.agent.backup(&local.path("source"), &[])?;
    let strand = process::binary("strand")?;
    let script = "\"$1\" ls latest -r \"$2\" | head -n 1; echo \"${PIPESTATUS[0]}\"";
    let mut shell = Command::new("bash");
    shell.args(["-c", script, "bash"]).arg(strand).arg(local.path("repository")).env("HOME", local.agent.home());
    shell.env_remove("XDG_CONFIG_HOME").env_remove("XDG_CACHE_HOME");
    let piped = process::run(&mut shell, PATIENCE)?.expect_code(0)?;
    ensure!(piped.stdout.trim_end().ends_with('0') && piped.stderr.is_empty(), "{piped:?}");
    Ok(())
}

#[test]
fn a_passphrase_opens_a_repository_and_another_does_not() -> Result<()> {
    let local = Local::new()?;
    let (source, file) = (local.path("source"), local.path("password"));
    fs::write(&file, "correct horse battery staple\n")?;
    local.agent.run(&["backup", text(&source)?, "--password-file", text(&file)?])?.expect_code(0)?;
    let other = Agent::local(&local.path("other"), &local.path("repository"))?;
    other.run(&["snapshots", "--password-file", text(&file)?])?.expect_code(0)?;
    other.run(&["snapshots", "--password-command", "echo correct horse battery staple"])?.expect_code(0)?;
    fs::write(&file, "wrong\n")?;
    other.run(&["snapshots", "--password-file", text(&file)?])?.expect_code(12)?;
    other.run(&["snapshots", "--password-command", "exit 3"])?.expect_code(1)?;
    fs::write(&file, "")?;
    let empty = other.run(&["snapshots", "--password-file", text(&file)?])?;
    ensure!(matches!(empty.status.code(), Some(1 | 12)), "{empty:?}");
    Ok(())
}
