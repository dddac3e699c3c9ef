//! What a backup saves: lists of paths, pipes, and everything that leaves something out.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use strandline_tests::compare::ensure_same;
use strandline_tests::process::Process;
use strandline_tests::random::Random;
use strandline_tests::rig::{Agent, PATIENCE, json_lines, settle};

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not text")
}

struct Local {
    scratch: tempfile::TempDir,
    agent: Agent,
    source: PathBuf,
}

impl Local {
    /// A directory repository that does not exist yet, and a source of these files, each with its name as content.
    fn new(files: &[&str]) -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let agent = Agent::local(&scratch.path().join("home"), &scratch.path().join("repository"))?;
        let source = scratch.path().join("source");
        fs::create_dir(&source)?;
        let local = Self { scratch, agent, source };
        files.iter().try_for_each(|file| local.write(file, file))?;
        Ok(local)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn write(&self, file: &str, content: &str) -> Result<()> {
        let path = self.source.join(file);
        fs::create_dir_all(path.parent().context("no parent")?)?;
        Ok(fs::write(path, content)?)
    }

    /// The files of the latest snapshot, relative to the source.
    fn saved(&self) -> Result<BTreeSet<String>> {
        let said = self.agent.run(&["ls", "latest", "--json"])?.expect_code(0)?.stdout;
        let prefix = format!("{}/", text(&self.source)?);
        let path = |line: &Value| {
            let is_file = line.get("type").and_then(Value::as_str) == Some("file");
            let path = line.get("path").and_then(Value::as_str).filter(|_| is_file)?;
            let path = format!("/{}", path.trim_start_matches('/'));
            Some(path.strip_prefix(&prefix).unwrap_or(&path).to_owned())
        };
        Ok(json_lines(&said)?.iter().filter_map(path).collect())
    }

    /// The files that a backup of the source with these options saves.
    fn saves(&self, options: &[&str]) -> Result<Vec<String>> {
        self.agent.backup(&self.source, options)?;
        Ok(self.saved()?.into_iter().collect())
    }
}

#[test]
fn standard_input_becomes_a_file() -> Result<()> {
    let local = Local::new(&[])?;
    for (name, bytes) in [("small", 10), ("empty", 0), ("dumps/big.sql", 5 << 20), ("exactly", 256), ("more", 257)] {
        let input = local.path("input");
        let content = Random::new(4).bytes(bytes);
        fs::write(&input, &content)?;
        let mut command = local.agent.command(&["backup", "--json", "--stdin-filename", name])?;
        let output = command.stdin(fs::File::open(&input)?).output()?;
        ensure!(output.status.code() == Some(0), "{}", String::from_utf8_lossy(&output.stderr));
        let target = local.path(&format!("restored-{bytes}"));
        local.agent.restore("latest", &target)?;
        ensure!(fs::read(target.join(name))? == content, "{name}");
    }
    let mixed = local.agent.run(&["backup", "--stdin-filename", "x", text(&local.source)?])?.expect_code(1)?;
    ensure!(mixed.stderr.contains("alone"), "{}", mixed.stderr);
    for bad in ["", "..", "a/../b", "dir/"] {
        local.agent.run(&["backup", "--stdin-filename", bad])?.expect_code(1)?;
    }
    Ok(())
}

#[test]
fn what_a_command_prints_is_saved_only_if_the_command_succeeds() -> Result<()> {
    let local = Local::new(&[])?;
    let run = |script: &str, code: i32| {
        // What follows `--` belongs to the command, so the repository comes before it.
        let mut command = strandline_tests::process::strand(local.agent.home())?;
        command.arg("-r").arg(local.path("repository"));
        command.args(["backup", "--stdin-filename", "dump", "--stdin-from-command", "--", "sh", "-c", script]);
        strandline_tests::process::run(&mut command, PATIENCE)?.expect_code(code)
    };
    run("seq 1 200000", 0)?;
    ensure!(local.agent.snapshots()?.len() == 1);
    let target = local.path("restored");
    local.agent.restore("latest", &target)?;
    let dump = fs::read_to_string(target.join("dump"))?;
    ensure!(dump.starts_with("1\n2\n") && dump.ends_with("200000\n"));
    for script in ["seq 1 200000; exit 3", "exit 1", "seq 1 10; kill -9 $$"] {
        let failed = run(script, 1)?;
        ensure!(failed.stderr.contains("sh failed") && failed.stderr.contains("no snapshot"), "{}", failed.stderr);
    }
    ensure!(local.agent.snapshots()?.len() == 1, "a failed command never becomes a snapshot");
    Ok(())
}

#[test]
fn a_backup_from_a_silent_command_can_be_interrupted() -> Result<()> {
    let local = Local::new(&[])?;
    local.agent.run(&["init"])?.expect_code(0)?;
    let arguments = ["backup", "--json", "--stdin-from-command", "--", "sh", "-c", "echo begun; exec sleep 1000"];
    let mut command = strandline_tests::process::strand(local.agent.home())?;
    command.arg("-r").arg(local.path("repository")).args(arguments);
    let mut backup = Process::spawn(&mut command)?;
    backup.wait_for_line("\"status\"", PATIENCE)?;
    backup.terminate()?;
    let status = backup.wait(Duration::from_secs(15))?.context("it waits for the command")?;
    ensure!(status.code() == Some(130), "{status}: {}", backup.output());
    ensure!(local.agent.snapshots()?.is_empty());
    Ok(())
}

#[test]
fn lists_say_what_is_saved() -> Result<()> {
    let local = Local::new(&["a1/x", "a2/x", "b/x", "c*/x", "odd\nname"])?;
    let source = text(&local.source)?;
    let (list, verbatim, raw) = (local.path("list"), local.path("verbatim"), local.path("raw"));
    fs::write(&list, format!("# comment\n  {source}/a*  \n\n"))?;
    fs::write(&verbatim, format!("{source}/c*\n"))?;
    fs::write(&raw, format!("{source}/odd\nname\0"))?;
    let lists =
        ["--files-from", text(&list)?, "--files-from-verbatim", text(&verbatim)?, "--files-from-raw", text(&raw)?];
    local.agent.run(&[&["backup"][..], &lists].concat())?.expect_code(0)?;
    let saved: Vec<String> = local.saved()?.into_iter().collect();
    ensure!(saved == ["a1/x", "a2/x", "c*/x", "odd\\nname"], "{saved:?}");
    // The list says something else now; the file cache goes on all the same.
    settle();
    local.agent.run(&[&["backup"][..], &lists].concat())?.expect_code(0)?;
    fs::write(&list, format!("{source}/a*\n{source}/b\n"))?;
    let again = local.agent.run(&[&["backup", "--json"][..], &lists].concat())?.expect_code(0)?.stdout;
    let summary = json_lines(&again)?.pop().context("no summary")?;
    ensure!(summary.get("files_read") == Some(&Value::from(1)), "{summary}");

    let mut command = local.agent.command(&["backup", "--files-from", "-"])?;
    let output = command.stdin(fs::File::open(&list)?).output()?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(local.saved()?.len() == 3);
    let none = local.agent.run(&["backup"])?.expect_code(1)?;
    ensure!(none.stderr.contains("nothing to save"), "{}", none.stderr);
    fs::write(&list, "# nothing\n")?;
    local.agent.run(&["backup", "--files-from", text(&list)?])?.expect_code(1)?;
    local.agent.run(&["backup", "--files-from", text(&local.path("missing"))?])?.expect_code(1)?;
    Ok(())
}

#[test]
fn every_kind_of_exclusion_leaves_out_what_it_says() -> Result<()> {
    let local =
        Local::new(&["a.o", "a.c", "B.JPG", "cache/CACHEDIR.TAG", "cache/data", "no/.nobackup", "no/x", "fake/x"])?;
    local.write("cache/CACHEDIR.TAG", "Signature: 8a477f597d28d172789f06886806bc55\n# a comment")?;
    local.write("fake/CACHEDIR.TAG", "not the signature")?;
    local.write("large", &"x".repeat(5000))?;
    let all = ["B.JPG", "a.c", "a.o", "cache/CACHEDIR.TAG", "cache/data", "fake/CACHEDIR.TAG", "fake/x", "large"];
    let all = [&all[..], &["no/.nobackup", "no/x"]].concat();
    let patterns = local.path("patterns");
    fs::write(&patterns, "# objects\n  *.o\n\nno\n")?;
    let patterns = text(&patterns)?;
    for (options, missing) in [
        (&[][..], &[][..]),
        (&["--exclude", "*.o"], &["a.o"]),
        (&["--exclude", "a.*", "--exclude", "!a.c"], &["a.o"]),
        (&["--iexclude", "*.jpg"], &["B.JPG"]),
        (&["--exclude-file", patterns], &["a.o", "no/.nobackup", "no/x"]),
        (&["--exclude-file", patterns, "--exclude", "!*.o"], &["no/.nobackup", "no/x"]),
        (&["--iexclude-file", patterns], &["a.o", "no/.nobackup", "no/x"]),
        (&["--exclude-caches"], &["cache/data"]),
        (&["--exclude-if-present", ".nobackup"], &["no/x"]),
        (&["--exclude-if-present", "CACHEDIR.TAG:not the"], &["fake/x"]),
        (&["--exclude-larger-than", "4K"], &["large"]),
    ] {
        let expected: Vec<&str> = all.iter().filter(|file| !missing.contains(*file)).copied().collect();
        let saved = local.saves(options)?;
        ensure!(saved == expected, "{options:?}: {saved:?}");
    }
    // What is named itself is saved whatever the options say.
    let large = local.source.join("large");
    local.agent.backup(&large, &["--exclude-larger-than", "1K", "--exclude", "large"])?;
    ensure!(local.saved()?.contains("large"));
    for bad in [["--exclude", "["], ["--exclude-if-present", "a/b"], ["--exclude-larger-than", "much"]] {
        local.agent.run(&["backup", text(&local.source)?, bad[0], bad[1]])?.expect_code(1)?;
    }
    Ok(())
}

#[test]
fn files_in_the_source_say_what_is_left_out_around_them() -> Result<()> {
    let files =
        ["a.log", "keep.log", "build/x", "sub/build/x", "sub/a.log", "sub/b.tmp", "sub/deep/only", "sub/deep/b.tmp"];
    let local = Local::new(&files)?;
    local.write(".strandignore", "*.log\n!keep.log\n/build/\n")?;
    local.write("sub/.strandignore", "!a.log\n*.tmp\n")?;
    local.write("sub/deep/.strandignore", "*\n!only\n")?;
    let saved = local.saves(&["--exclude-per-directory", ".strandignore"])?;
    let expected = [".strandignore", "keep.log", "sub/.strandignore", "sub/a.log", "sub/build/x", "sub/deep/only"];
    ensure!(saved == expected, "{saved:?}");
    // Rules of directories above what was named are not read, and names that are given are saved.
    local.agent.backup(&local.source.join("sub"), &["--exclude-per-directory", ".strandignore"])?;
    ensure!(local.saved()?.contains("sub/build/x"));
    ensure!(local.saves(&[])?.len() == files.len() + 3, "only if asked for");
    Ok(())
}

#[test]
fn the_file_cache_stays_right_when_exclusions_change() -> Result<()> {
    let local = Local::new(&["a/1", "a/2", "b/1", "b/2", "c/1", "d"])?;
    settle();
    let read = |options: &[&str]| local.agent.backup(&local.source, options)?.count("files_read");
    ensure!(read(&[])? == 6);
    ensure!(read(&["--exclude", "b"])? == 0, "nothing has changed");
    ensure!(read(&[])? == 2, "what was left out last time is read, the rest is not");
    ensure!(read(&["--exclude", "a/1", "--exclude", "c"])? == 0);
    local.write("a/1", "changed meanwhile")?;
    settle();
    ensure!(read(&[])? == 2, "a/1 and c/1");
    ensure!(read(&["--exclude-larger-than", "3"])? == 0);
    ensure!(read(&["--exclude", "*"])? == 0);
    let target = local.path("restored");
    ensure!(read(&[])? == 6);
    local.agent.restore("latest", &target)?;
    ensure_same(&local.source, &target.join(local.source.strip_prefix("/")?))
}

#[test]
fn settings_leave_out_too_and_unknown_ones_are_errors() -> Result<()> {
    let local = Local::new(&["a.tmp", "b", "C.BAK", "no/.skip", "no/x", "e/.ignore-me", "e/y"])?;
    local.write("e/.ignore-me", "y\n")?;
    local.write("large", &"x".repeat(5000))?;
    fs::create_dir_all(local.agent.config())?;
    let settings = "exclude = [\"*.tmp\"]\niexclude = [\"*.bak\"]\nexclude_if_present = [\".skip\"]\n\
                    exclude_larger_than = \"4K\"\nexclude_per_directory = \".ignore-me\"\nexclude_caches = true\n";
    fs::write(local.agent.config().join("strand.toml"), settings)?;
    let saved = local.saves(&[])?;
    ensure!(saved == ["b", "e/.ignore-me", "no/.skip"], "{saved:?}");
    ensure!(local.saves(&["--exclude", "!*.tmp"])?.contains(&"a.tmp".to_owned()), "the command line comes later");
    fs::write(local.agent.config().join("strand.toml"), "exclude_cache = true\n")?;
    let refused = local.agent.run(&["backup", text(&local.source)?])?.expect_code(1)?;
    ensure!(refused.stderr.contains("exclude_cache"), "{}", refused.stderr);
    Ok(())
}

#[test]
fn inode_and_ctime_may_be_ignored_and_the_time_may_be_said() -> Result<()> {
    let local = Local::new(&["a", "b"])?;
    let old = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    for name in ["a", "b"] {
        fs::File::options().write(true).open(local.source.join(name))?.set_modified(old)?;
    }
    settle();
    local.agent.backup(&local.source, &[])?;
    // A new inode with the same content and times, as some network file systems show after every mount.
    for name in ["a", "b"] {
        let (path, copy) = (local.source.join(name), local.source.join("copy"));
        ensure!(Command::new("cp").arg("-a").arg(&path).arg(&copy).status()?.success());
        fs::rename(copy, path)?;
    }
    let dry =
        |options: &[&str]| local.agent.backup(&local.source, &[options, &["--dry-run"]].concat())?.count("files_read");
    ensure!(dry(&[])? == 2 && dry(&["--ignore-ctime"])? == 2 && dry(&["--ignore-inode"])? == 0);
    local.agent.backup(&local.source, &["--time", "2020-02-03T04:05:06Z"])?;
    let listed = local.agent.run(&["snapshots", "--json"])?.expect_code(0)?.stdout;
    let last = json_lines(&listed)?.pop().context("no snapshot")?;
    let time = last.get("time").and_then(Value::as_str).context("no time")?.to_owned();
    ensure!(time.starts_with("2020-02-03T04:05:06"), "{last}");
    local.agent.run(&["backup", text(&local.source)?, "--time", "yesterday"])?.expect_code(1)?;
    Ok(())
}
