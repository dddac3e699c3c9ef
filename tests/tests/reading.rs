//! Looking into snapshots: dump, find, diff, stats and ls, checked with the system's own tools.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use strandline_tests::compare::{Options, compare, ensure_same};
use strandline_tests::corpus::Corpus;
use strandline_tests::process;
use strandline_tests::random::Random;
use strandline_tests::rig::{Agent, PATIENCE, Rig, json_lines, not_run, random_files};

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not text")
}

/// A machine with a repository in a directory, and a source that does not exist yet.
struct Local {
    scratch: tempfile::TempDir,
    agent: Agent,
    source: PathBuf,
}

impl Local {
    fn new() -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let agent = Agent::local(&scratch.path().join("home"), &scratch.path().join("repository"))?;
        let source = scratch.path().join("source");
        Ok(Self { scratch, agent, source })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// `latest:SOURCE`, and further down.
    fn latest(&self, below: &str) -> Result<String> {
        Ok(format!("latest:{}{below}", text(&self.source)?))
    }

    fn backup(&self) -> Result<()> {
        self.agent.backup(&self.source, &[]).map(|_| ())
    }
}

/// The command under `timeout`, so that its output may go anywhere without a test that waits for ever.
fn bounded(command: &Command) -> Command {
    let mut bounded = Command::new("timeout");
    bounded.arg("60").arg(command.get_program()).args(command.get_args()).stdin(Stdio::null());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => bounded.env(name, value),
            None => bounded.env_remove(name),
        };
    }
    bounded
}

/// `strand dump ARGUMENTS` with its standard output in `file`; returns the exit code and what was said.
fn dump(agent: &Agent, arguments: &[&str], file: &Path) -> Result<(Option<i32>, String)> {
    let mut command = bounded(&agent.command(&[&["dump"], arguments].concat())?);
    let output = command.stdout(File::create(file)?).stderr(Stdio::piped()).spawn()?.wait_with_output()?;
    Ok((output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned()))
}

fn exists(program: &str) -> bool {
    Command::new(program).arg("--version").output().is_ok() || Command::new(program).arg("-v").output().is_ok()
}

fn run(program: &str, arguments: &[&OsStr]) -> Result<String> {
    Ok(process::run(Command::new(program).args(arguments).env("LC_ALL", "C"), PATIENCE)?.expect_code(0)?.stdout)
}

fn untar(archive: &Path, target: &Path) -> Result<()> {
    fs::create_dir(target)?;
    let options = ["--xattrs", "--xattrs-include=*", "-xpf"].map(OsStr::new);
    run("tar", &[&options[..], &[archive.as_os_str(), OsStr::new("-C"), target.as_os_str()]].concat()).map(|_| ())
}

#[test]
fn a_dumped_directory_is_a_tar_archive_from_which_gnu_tar_makes_the_same_tree() -> Result<()> {
    let local = Local::new()?;
    Corpus { files: 120, big_bytes: 600_000, beyond_path_max: false, ..Corpus::default() }.create(&local.source)?;
    fs::remove_file(local.source.join("special/socket"))?;
    // Around the 100 bytes that a header has room for.
    for length in 97..=103 {
        fs::write(local.source.join("n".repeat(length)), "name")?;
        symlink("t".repeat(length), local.source.join(format!("target-{length}")))?;
        fs::create_dir(local.source.join("d".repeat(length)))?;
        fs::hard_link(local.source.join("n".repeat(length)), local.source.join(format!("o-link-{length}")))?;
    }
    xattr::set(local.source.join("n".repeat(97)), "user.a=b%25", b"a value\n")?;
    local.backup()?;
    let archive = local.path("archive.tar");
    let (code, said) = dump(&local.agent, &[&local.latest("")?], &archive)?;
    ensure!(code == Some(0) && said.is_empty(), "{code:?}: {said}");
    ensure!(fs::metadata(&archive)?.len() < 30 << 20, "holes take no room in the archive");
    let restored = local.path("restored");
    untar(&archive, &restored)?;
    ensure_same(&local.source, &restored)?;

    let listed = run("tar", &[OsStr::new("-tf"), archive.as_os_str()])?.lines().count();
    let names = local.agent.run(&["ls", &local.latest("")?])?.expect_code(0)?.stdout.lines().count();
    ensure!(listed == names, "tar lists {listed} names, the snapshot has {names}");

    // The whole snapshot, with the directories above the source; and one file as an archive.
    let (whole, one) = (local.path("whole.tar"), local.path("one.tar"));
    local.agent.run(&["dump", "latest", "--target", text(&whole)?])?.expect_code(0)?;
    let unpacked = local.path("whole");
    untar(&whole, &unpacked)?;
    ensure_same(&local.source, &unpacked.join(local.source.strip_prefix("/")?))?;
    let single = ["dump", "latest", &format!("{}/big/text", text(&local.source)?), "-a", "tar", "-t", text(&one)?];
    local.agent.run(&single)?.expect_code(0)?;
    untar(&one, &local.path("one"))?;
    ensure!(fs::read(local.path("one/text"))? == fs::read(local.source.join("big/text"))?);
    Ok(())
}

#[test]
fn what_an_archive_cannot_hold_is_said_and_does_not_fail_the_dump() -> Result<()> {
    let local = Local::new()?;
    fs::create_dir(&local.source)?;
    let _listener = std::os::unix::net::UnixListener::bind(local.source.join("socket"))?;
    fs::write(local.source.join("file"), "content")?;
    local.backup()?;
    let (archive, restored) = (local.path("archive.tar"), local.path("restored"));
    let (code, said) = dump(&local.agent, &[&local.latest("")?], &archive)?;
    ensure!(code == Some(0) && said.contains("/socket: left out") && said.lines().count() == 1, "{code:?}: {said}");
    untar(&archive, &restored)?;
    ensure!(fs::read(restored.join("file"))? == b"content" && !restored.join("socket").exists());
    let file = local.agent.run(&["dump", &local.latest("/file")?])?.expect_code(0)?;
    ensure!(file.stdout.trim_end() == "content", "{file:?}");
    let socket = local.agent.run(&["dump", &local.latest("/socket")?])?.expect_code(1)?;
    ensure!(socket.stderr.contains("no content") && socket.stdout.is_empty(), "{socket:?}");
    Ok(())
}

#[test]
fn a_file_comes_out_byte_for_byte_with_zeros_for_holes() -> Result<()> {
    let rig = Rig::direct()?;
    let agent = rig.owner("writer")?;
    let source = rig.scratch().join("source");
    fs::create_dir(&source)?;
    // Windows hold 32 MiB: this takes two.
    let big = Random::new(4).bytes(40 << 20);
    fs::write(source.join("big"), &big)?;
    let sparse = File::create_new(source.join("sparse"))?;
    sparse.write_all_at(&big[..100_000], 3 << 20)?;
    sparse.set_len(5 << 20)?;
    agent.backup(&source, &[])?;
    for name in ["big", "sparse"] {
        let (file, out) = (source.join(name), rig.scratch().join("out"));
        let (code, said) = dump(&agent, &[&format!("latest:{}", text(&file)?)], &out)?;
        ensure!(code == Some(0) && said.is_empty(), "{code:?}: {said}");
        ensure!(fs::read(&out)? == fs::read(&file)?, "{name}");
    }
    rig.ensure_no_panic()
}

/// Reads every file of the archive and compares it with the file of the same name.
const CHECK_ZIP: &str = r"
import os, stat, sys, zipfile
archive, source = zipfile.ZipFile(sys.argv[1]), os.fsencode(sys.argv[2])
assert archive.testzip() is None
for info in archive.infolist():
    name = info.filename.encode('utf-8' if info.flag_bits & 0x800 else 'cp437')
    path, mode = os.path.join(source, name), info.external_attr >> 16
    found = os.lstat(path)
    assert mode == found.st_mode, (path, oct(mode), oct(found.st_mode))
    content = archive.read(info)
    if stat.S_ISLNK(mode): assert os.readlink(path) == content, path
    elif stat.S_ISREG(mode): assert open(path, 'rb').read() == content, path
    else: assert info.is_dir(), path
print(len(archive.infolist()))
";

#[test]
fn a_zip_archive_holds_the_same_files_for_python_and_for_unzip() -> Result<()> {
    let local = Local::new()?;
    random_files(&local.source, 5, 3, 300_000)?;
    let below = local.source.join("größe");
    fs::create_dir(&below)?;
    fs::write(below.join("empty"), "")?;
    fs::write(below.join("text"), "repeated ".repeat(50_000))?;
    fs::set_permissions(below.join("text"), PermissionsExt::from_mode(0o750))?;
    symlink("text", below.join("link"))?;
    fs::hard_link(below.join("text"), below.join("other name"))?;
    let sparse = File::create_new(below.join("sparse"))?;
    sparse.write_all_at(b"in the middle", 1 << 20)?;
    sparse.set_len(3 << 20)?;
    let odd = below.join(OsStr::from_bytes(b"not-text-\xff"));
    fs::write(&odd, "odd")?;
    local.backup()?;
    let archive = local.path("archive.zip");
    let said = local.agent.run(&["dump", &local.latest("")?, "-a", "zip", "--target", text(&archive)?, "--json"])?;
    let summary = json_lines(&said.expect_code(0)?.stdout)?;
    ensure!(summary.len() == 1 && summary[0]["entries"] == 10 && summary[0]["left_out"] == 0, "{summary:?}");
    if exists("python3") {
        let arguments = [OsStr::new("-c"), OsStr::new(CHECK_ZIP), archive.as_os_str(), local.source.as_os_str()];
        let checked = run("python3", &arguments)?;
        ensure!(checked.trim() == "10", "{checked}");
    } else {
        not_run("there is no python3 to read a zip archive with");
    }
    if exists("unzip") {
        // What name it makes of bytes that are not text is unzip's affair.
        fs::remove_file(&odd)?;
        let restored = local.path("restored");
        let but = OsStr::new("*not-text*");
        let out = [archive.as_os_str(), OsStr::new("-x"), but, OsStr::new("-d"), restored.as_os_str()];
        process::run(Command::new("unzip").arg("-q").args(out).env("LC_ALL", "C.UTF-8"), PATIENCE)?.expect_code(0)?;
        let mut options = Options { times: false, xattrs: false, root: false, ..Options::default() };
        options.holes = strandline_tests::compare::Holes::Ignore;
        let found = compare(&local.source, &restored, options)?;
        // Two names of one inode became two files.
        ensure!(found.differences.iter().all(|difference| difference.what.contains("link")), "{found}");
        let time = |path: &Path| Ok::<_, anyhow::Error>(fs::metadata(path)?.mtime());
        ensure!(time(&below.join("text"))? == time(&restored.join("größe/text"))?);
    } else {
        not_run("there is no unzip");
    }
    Ok(())
}

#[test]
fn a_dump_that_meets_a_damaged_block_fails_names_the_file_and_leaves_nothing_that_looks_complete() -> Result<()> {
    let local = Local::new()?;
    random_files(&local.source, 6, 24, 400_000)?;
    local.backup()?;
    let packs = fs::read_dir(local.path("repository/storage/local"))?.next().context("no repository")??.path();
    let pack = fs::read_dir(packs.join("packs"))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>>>()?
        .into_iter()
        .max_by_key(|path| fs::metadata(path).map_or(0, |pack| pack.len()))
        .context("no pack")?;
    let file = File::options().read(true).write(true).open(&pack)?;
    let middle = file.metadata()?.len() / 2;
    let mut byte = [0];
    file.read_exact_at(&mut byte, middle)?;
    file.write_all_at(&[byte[0] ^ 1], middle)?;
    for kind in ["tar", "zip"] {
        let archive = local.path("archive");
        let (code, said) = dump(&local.agent, &[&local.latest("")?, "-a", kind], &archive)?;
        ensure!(code == Some(1), "{code:?}: {said}");
        ensure!(said.contains("/source/file-") && said.contains("not complete"), "{said}");
        ensure!(said.contains("block") && !said.contains("panicked"), "{said}");
        let written = fs::read(&archive)?;
        ensure!(!written.is_empty() && !written.ends_with(&[0; 1024]), "the archive seems to be complete");
        ensure!(!written.windows(4).any(|bytes| bytes == b"PK\x05\x06"));
        let target = local.path("target");
        local.agent.run(&["dump", &local.latest("")?, "-a", kind, "-t", text(&target)?])?.expect_code(1)?;
        ensure!(!target.exists());
        let left = fs::read_dir(local.scratch.path())?.filter_map(Result::ok).map(|entry| entry.file_name());
        let left: Vec<OsString> = left.filter(|name| name.as_bytes().starts_with(b".strand")).collect();
        ensure!(left.is_empty(), "{left:?}");
    }
    Ok(())
}

#[test]
fn a_reader_that_has_seen_enough_ends_a_dump_quietly_and_a_terminal_gets_no_archive() -> Result<()> {
    let local = Local::new()?;
    random_files(&local.source, 7, 10, 400_000)?;
    local.backup()?;
    let command = local.agent.command(&["dump", &local.latest("")?])?;
    let mut child = bounded(&command).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    let mut pipe = child.stdout.take().context("no pipe")?;
    pipe.read_exact(&mut [0; 1000])?;
    drop(pipe);
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.code() == Some(0) && said.is_empty(), "{}: {said}", output.status);
    if !exists("script") {
        not_run("there is no script(1), so no terminal");
        return Ok(());
    }
    let line =
        std::iter::once(command.get_program()).chain(command.get_args()).collect::<Vec<_>>().join(OsStr::new(" "));
    let mut scripted = Command::new("script");
    scripted.args(["-q", "-e", "-c"]).arg(line).arg("/dev/null");
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => scripted.env(name, value),
            None => scripted.env_remove(name),
        };
    }
    let refused = process::run(&mut scripted, PATIENCE)?.expect_code(1)?;
    ensure!(refused.stdout.contains("terminal") && refused.stdout.contains("--target"), "{refused:?}");
    Ok(())
}

/// The paths of `strand find ARGUMENTS --json` below the source, for each snapshot.
fn found(local: &Local, arguments: &[&str]) -> Result<BTreeMap<String, Vec<String>>> {
    let said = local.agent.run(&[&["find", "--json"], arguments].concat())?.expect_code(0)?;
    let mut found: BTreeMap<String, Vec<String>> = BTreeMap::new();
    let prefix = format!("{}/", text(&local.source)?);
    for row in json_lines(&said.stdout)? {
        let value = |name: &str| row.get(name).and_then(Value::as_str).with_context(|| format!("no {name} in {row}"));
        let path = value("path")?.strip_prefix(&prefix).context("elsewhere")?.to_owned();
        found.entry(value("snapshot")?.to_owned()).or_default().push(path);
    }
    Ok(found)
}

#[test]
fn files_are_found_by_name_path_type_size_time_and_chunk() -> Result<()> {
    let local = Local::new()?;
    random_files(&local.source, 8, 3, 70_000)?;
    let below = local.source.join("Photos/2024");
    fs::create_dir_all(&below)?;
    fs::write(below.join("beach.JPG"), Random::new(9).bytes(5000))?;
    symlink("beach.JPG", below.join("link.jpg"))?;
    let old = File::open(local.source.join("file-0001"))?;
    old.set_modified(std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000))?;
    let first = local.agent.backup(&local.source, &["--tag", "one", "--host", "alpha"])?.snapshot()?;
    fs::rename(local.source.join("file-0002"), local.source.join("renamed"))?;
    let second = local.agent.backup(&local.source, &["--host", "beta"])?.snapshot()?;

    let in_both = |paths: &[&str]| {
        let paths: Vec<_> = paths.iter().map(|path| (*path).to_owned()).collect();
        BTreeMap::from([(first.clone(), paths.clone()), (second.clone(), paths)])
    };
    let in_one = |snapshot: &String, paths: &[&str]| {
        BTreeMap::from([(snapshot.clone(), paths.iter().map(|path| (*path).to_owned()).collect::<Vec<_>>())])
    };
    ensure!(found(&local, &["*.JPG"])? == in_both(&["Photos/2024/beach.JPG"]));
    ensure!(found(&local, &["-i", "*.jpg"])? == in_both(&["Photos/2024/beach.JPG", "Photos/2024/link.jpg"]));
    ensure!(found(&local, &["-i", "*.jpg", "--type", "l"])? == in_both(&["Photos/2024/link.jpg"]));
    ensure!(found(&local, &["Photos/*"])? == in_both(&["Photos/2024"]));
    ensure!(found(&local, &["/Photos/*"])?.is_empty(), "anchored at the root");
    ensure!(found(&local, &["renamed", "nothing"])? == in_one(&second, &["renamed"]));
    ensure!(found(&local, &["--size", "+60K", "file-*"])?[&first] == ["file-0000", "file-0001", "file-0002"]);
    ensure!(found(&local, &["--size", "5000"])? == in_both(&["Photos/2024/beach.JPG"]));
    ensure!(found(&local, &["--size", "-1K"])?.is_empty());
    ensure!(found(&local, &["--older-than", "2002-01-01"])? == in_both(&["file-0001"]));
    ensure!(found(&local, &["--older-than", "7d", "--type", "f"])? == in_both(&["file-0001"]));
    ensure!(found(&local, &["--newer-than", "1h", "file-*", "-s", "latest"])? == in_one(&second, &["file-0000"]));
    ensure!(found(&local, &["*.JPG", "--host", "alpha"])? == in_one(&first, &["Photos/2024/beach.JPG"]));
    ensure!(found(&local, &["*.JPG", "--tag", "one"])? == in_one(&first, &["Photos/2024/beach.JPG"]));
    ensure!(found(&local, &["*.JPG", "--path", text(&local.source)?])?.len() == 2);

    // Whatever chunk some file has: the same content under two names is found by it.
    let rows = |arguments: &[&str]| json_lines(&local.agent.run(arguments)?.expect_code(0)?.stdout);
    let all: Vec<Value> = rows(&["find", "--json", "--chunk", "0", "--type", "f"])?;
    let every: usize = (1..16).try_fold(all.len(), |sum, digit| {
        Ok::<_, anyhow::Error>(sum + rows(&["find", "--json", "--chunk", &format!("{digit:x}"), "--type", "f"])?.len())
    })?;
    ensure!(every >= 6, "each file with chunks is found by some digit: {every}");
    let mut of_renamed = None;
    for digit in 0..16 {
        let rows = rows(&["find", "--json", "--chunk", &format!("{digit:x}"), "renamed"])?;
        of_renamed = of_renamed.or(rows.first().and_then(|row| row["chunk"].as_str().map(str::to_owned)));
    }
    let chunk = of_renamed.context("no chunk of the renamed file")?;
    let expected =
        BTreeMap::from([(first.clone(), vec!["file-0002".into()]), (second.clone(), vec!["renamed".into()])]);
    ensure!(found(&local, &["--chunk", &chunk[..20]])? == expected);

    let people = local.agent.run(&["find", "renamed", "-l"])?.expect_code(0)?.stdout;
    let lines: Vec<_> = people.lines().collect();
    ensure!(lines.len() == 2 && lines[0].starts_with(&format!("snapshot {} of beta, ", &second[..8])), "{people}");
    ensure!(lines[1].starts_with("-rw") && lines[1].ends_with("/source/renamed"), "{people}");
    for bad in [
        &["find"][..],
        &["find", "a["],
        &["find", "--size", "x"],
        &["find", "--chunk", "xyz"],
        &["find", "a", "--host", "gamma"],
    ] {
        local.agent.run(bad)?.expect_code(1)?;
    }
    Ok(())
}

#[test]
fn a_diff_tells_exactly_what_was_edited() -> Result<()> {
    let local = Local::new()?;
    let file = |name: &str| local.source.join(name);
    random_files(&local.source, 10, 6, 30_000)?;
    fs::create_dir(file("old-dir"))?;
    fs::write(file("old-dir/inside"), "12345")?;
    fs::create_dir(file("same-dir"))?;
    fs::write(file("same-dir/x"), "x")?;
    symlink("here", file("link"))?;
    fs::write(file("becomes-dir"), "abc")?;
    local.backup()?;
    fs::remove_dir_all(file("old-dir"))?;
    fs::create_dir(file("new-dir"))?;
    fs::write(file("new-dir/inside"), "1234567")?;
    fs::write(file("file-0001"), Random::new(11).bytes(30_100))?;
    fs::set_permissions(file("file-0002"), PermissionsExt::from_mode(0o600))?;
    fs::remove_file(file("file-0003"))?;
    fs::remove_file(file("link"))?;
    symlink("there", file("link"))?;
    fs::remove_file(file("becomes-dir"))?;
    fs::create_dir(file("becomes-dir"))?;
    let unchanged = local.agent.snapshots()?;
    local.backup()?;
    let ids = local.agent.snapshots()?;
    let source = text(&local.source)?;
    let short = |id: &str| id.chars().take(8).collect::<String>();
    let said = |arguments: &[&str]| Ok::<_, anyhow::Error>(local.agent.run(arguments)?.expect_code(0)?.stdout);

    let expected = format!(
        "{} → {}\n\
         T    {source}/becomes-dir/\n\
         M    {source}/file-0001\n\
         -    {source}/file-0003\n\
         M    {source}/link\n\
         +    {source}/new-dir/\n\
         +    {source}/new-dir/inside\n\
         -    {source}/old-dir/\n\
         -    {source}/old-dir/inside\n\
         \n\
         Files:    1 new, 3 removed, 1 changed\n\
         Dirs:     2 new, 1 removed, 0 changed\n\
         Others:   0 new, 0 removed, 1 changed\n\
         Metadata: 2 changed (shown with --metadata)\n\
         Added:    107 B\n\
         Removed:  29.3 KiB\n",
        short(&ids[0]),
        short(&ids[1])
    );
    // Directories above the source are saved, too, and others make files in them meanwhile.
    let found = said(&["diff", "latest~1", "latest", source])?;
    let metadata = said(&["diff", &ids[0], &ids[1], source, "--metadata"])?;
    ensure!(found == expected, "expected:\n{expected}\nfound:\n{metadata}");
    ensure!(metadata.contains(&format!("U    {source}/\n")), "the source lost and gained names: {metadata}");
    ensure!(metadata.contains(&format!("U    {source}/file-0002\n")), "{metadata}");
    ensure!(!metadata.contains("same-dir") && !metadata.contains("file-0000"), "{metadata}");

    let content = said(&["diff", "latest~1", "latest", &format!("{source}/file-0001"), "--content"])?;
    ensure!(content.contains(&format!("M    {source}/file-0001  (+29.4 KiB, -29.3 KiB)\n")), "{content}");
    let below = format!("{source}/new-dir");
    let rows = json_lines(&said(&["diff", "latest~1", "latest", &below, "--json"])?)?;
    ensure!(rows.len() == 3 && rows[0]["modifier"] == "+" && rows[0]["type"] == "dir", "{rows:?}");
    ensure!(rows[2]["message_type"] == "statistics" && rows[2]["added"]["bytes"] == 7, "{rows:?}");
    let none = said(&["diff", &unchanged[0], &ids[0], "--json"])?;
    ensure!(json_lines(&none)?.len() == 1, "a snapshot does not differ from itself: {none}");
    local.agent.run(&["diff", "latest~1", "latest", "/no/such/path"])?.expect_code(1)?;
    Ok(())
}

/// Names, bytes with hard links once, and distinct contents with their bytes, of the files below `directory`.
fn count(directory: &Path) -> Result<(u64, u64, BTreeSet<Vec<u8>>)> {
    let (mut files, mut bytes, mut contents, mut inodes) = (0, 0, BTreeSet::new(), BTreeSet::new());
    let mut left = vec![directory.to_owned()];
    while let Some(directory) = left.pop() {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            let found = fs::symlink_metadata(&path)?;
            if found.is_dir() {
                left.push(path);
            } else if found.is_file() {
                files += 1;
                bytes += if inodes.insert(found.ino()) { found.len() } else { 0 };
                contents.insert(fs::read(&path)?);
            }
        }
    }
    Ok((files, bytes, contents))
}

#[test]
fn statistics_agree_with_an_independent_count() -> Result<()> {
    let rig = Rig::direct()?;
    let agent = rig.owner("writer")?;
    let source = rig.scratch().join("source");
    random_files(&source, 12, 10, 200_000)?;
    fs::copy(source.join("file-0001"), source.join("copy"))?;
    fs::hard_link(source.join("file-0002"), source.join("link"))?;
    for n in 0..40 {
        fs::write(source.join(format!("small-{n}")), format!("small {}", n / 2))?;
    }
    let one = agent.backup(&source, &[])?;
    let (files, bytes, mut contents) = count(&source)?;
    fs::write(source.join("file-0003"), Random::new(13).bytes(150_000))?;
    fs::remove_file(source.join("file-0004"))?;
    let two = agent.backup(&source, &[])?;
    let (more_files, more_bytes, more_contents) = count(&source)?;
    contents.extend(more_contents);

    let stats = |arguments: &[&str]| {
        json_lines(&agent.run(&[&["stats", "--json"], arguments].concat())?.expect_code(0)?.stdout)
    };
    let of = |rows: &[Value], kind: &str, name: &str| {
        let row = rows.iter().rfind(|row| row["message_type"] == kind).context("no such row")?;
        row[name].as_u64().with_context(|| format!("no {name} in {row}"))
    };
    let rows = stats(&[])?;
    ensure!(of(&rows, "summary", "total_size")? == bytes + more_bytes, "{rows:?}");
    ensure!(of(&rows, "summary", "total_file_count")? == files + more_files, "{rows:?}");
    ensure!(rows.len() == 4 && of(&rows, "snapshot", "bytes_new")? == two.count("bytes_new")?, "{rows:?}");
    let stored = one.count("bytes_stored")? + two.count("bytes_stored")?;
    ensure!(of(&rows, "repository", "snapshots")? == 2, "{rows:?}");
    // Packs have heads and feet besides the blocks.
    let overhead = of(&rows, "repository", "stored_bytes")?.checked_sub(stored);
    ensure!(overhead.is_some_and(|bytes| bytes < 10_000), "{stored}: {rows:?}");

    let rows = stats(&["latest~1"])?;
    ensure!(of(&rows, "summary", "total_size")? == bytes && of(&rows, "summary", "snapshots_count")? == 1, "{rows:?}");
    let rows = stats(&["--mode", "files-by-contents"])?;
    ensure!(of(&rows, "summary", "total_file_count")? == contents.len() as u64, "{rows:?}");
    let distinct: usize = contents.iter().map(Vec::len).sum();
    ensure!(of(&rows, "summary", "total_size")? == distinct as u64, "{rows:?}");
    // Everything that the backups found new, and nothing else, is there once.
    let rows = stats(&["--mode", "raw-data"])?;
    let new = one.count("bytes_new")? + two.count("bytes_new")?;
    ensure!(of(&rows, "summary", "total_size")? == new, "{new}: {rows:?}");
    let rows = stats(&["--mode", "raw-data", "latest~1"])?;
    ensure!(of(&rows, "summary", "total_size")? == one.count("bytes_new")?, "{rows:?}");
    let people = agent.run(&["stats"])?.expect_code(0)?.stdout;
    ensure!(people.contains("restore-size") && people.contains("stored in"), "{people}");
    rig.ensure_no_panic()
}

#[test]
fn listings_take_paths_and_tell_what_could_not_be_saved() -> Result<()> {
    let local = Local::new()?;
    fs::create_dir_all(local.source.join("b/deep"))?;
    fs::write(local.source.join("b/deep/file"), "x")?;
    fs::write(local.source.join("a"), vec![0; 3000])?;
    let missing = local.path("missing");
    local.agent.backup_with_code(&missing, &[text(&local.source)?], 3)?;
    let source = text(&local.source)?;
    let listed = |arguments: &[&str]| -> Result<Vec<String>> {
        let said = local.agent.run(&[&["ls"], arguments].concat())?.expect_code(0)?.stdout;
        Ok(said.lines().map(|line| line.strip_prefix(source).unwrap_or(line).to_owned()).collect())
    };
    let (a, b) = (format!("{source}/a"), format!("{source}/b"));
    ensure!(listed(&["latest", &b, &a])? == ["/a", "/b", "/b/deep"]);
    ensure!(listed(&["latest", &b, &a, "--recursive"])? == ["/a", "/b", "/b/deep", "/b/deep/file"]);
    ensure!(listed(&[&format!("latest:{source}"), "b/deep"])? == ["/b/deep", "/b/deep/file"]);
    ensure!(listed(&[&format!("latest:{b}")])? == ["/b", "/b/deep", "/b/deep/file"]);
    let long = listed(&["latest", &a, "-l", "--human-readable"])?;
    ensure!(long.len() == 1 && long[0].starts_with("-rw") && long[0].contains(" 2.9 KiB "), "{long:?}");
    local.agent.run(&["ls", "latest", "/none"])?.expect_code(1)?;

    let errors = listed(&["latest", "--errors"])?;
    ensure!(errors.len() == 1 && errors[0].starts_with(text(&missing)?), "{errors:?}");
    let rows = json_lines(&local.agent.run(&["ls", "latest", "--errors", "--json"])?.expect_code(0)?.stdout)?;
    ensure!(rows.len() == 1 && rows[0]["path"] == text(&missing)? && rows[0]["message"].is_string(), "{rows:?}");
    local.backup()?;
    ensure!(listed(&["latest", "--errors"])? == ["everything was saved"]);
    Ok(())
}
