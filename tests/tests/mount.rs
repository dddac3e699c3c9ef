//! `strand mount`: snapshots looked at through the kernel.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::Signal;
use strandline_actors::runtime::clock;
use strandline_tests::compare::ensure_same;
use strandline_tests::corpus::Corpus;
use strandline_tests::process::{self, Process};
use strandline_tests::random::Random;
use strandline_tests::rig::{Agent, Rig, not_run, random_files, unprivileged};

/// How long a mount may take to be ready, and to end.
const PATIENCE: Duration = Duration::from_secs(30);
const EIO: i32 = 5;

/// A running `strand mount`; gone when dropped, whatever happened.
struct Mount {
    process: Process,
    point: PathBuf,
}

impl Mount {
    /// `None`, with a line that says so, where mounting is not possible.
    fn start(agent: &Agent, point: &Path, arguments: &[&str]) -> Result<Option<Self>> {
        if let Err(error) = File::options().read(true).write(true).open("/dev/fuse") {
            not_run(&format!("/dev/fuse cannot be used here: {error}"));
            return Ok(None);
        }
        fs::create_dir_all(point)?;
        let mut command = agent.command(&["mount", point.to_str().context("not text")?])?;
        command.args(arguments);
        Self::started(Process::spawn(&mut command)?, point)
    }

    /// Waits until it is ready.
    fn started(process: Process, point: &Path) -> Result<Option<Self>> {
        let ready = process.wait_for_line("mounted", PATIENCE);
        let mount = Self { process, point: point.to_owned() };
        match ready {
            Ok(_) => Ok(Some(mount)),
            Err(_) if mount.process.output().contains("Operation not permitted") => {
                not_run(&format!("mounting is not allowed here: {}", mount.process.output()));
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Where what was saved from `source` is, in the newest snapshot.
    fn latest(&self, source: &Path) -> Result<PathBuf> {
        Ok(self.point.join("snapshots/latest").join(source.strip_prefix("/")?))
    }

    fn umount(&self) -> Result<()> {
        let end = clock::now() + PATIENCE;
        loop {
            let root = rustix::process::geteuid().is_root();
            let (program, option) = if root { ("umount", "--") } else { ("fusermount3", "-u") };
            let output = Command::new(program).arg(option).arg(&self.point).output()?;
            if output.status.success() {
                return Ok(());
            }
            // The kernel may still be letting go of what was read ahead.
            ensure!(clock::now() < end, "umount: {}", String::from_utf8_lossy(&output.stderr));
            thread::yield_now();
        }
    }

    /// Waits for the end of the command, which must be code 0 without a panic; returns what it said.
    fn ended(mut self) -> Result<String> {
        let status = self.process.wait(PATIENCE)?.context("the command does not end")?;
        ensure!(status.code() == Some(0), "{status}: {}", self.process.output());
        self.process.ensure_no_panic()?;
        ensure!(!is_mounted(&self.point)?, "{} is still mounted", self.point.display());
        Ok(self.process.output())
    }

    fn end(self) -> Result<String> {
        self.umount()?;
        self.ended()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if self.process.is_running() {
            let _ = Command::new("umount").args(["-l", "-q"]).arg(&self.point).status();
            self.process.kill();
            let _ = Command::new("umount").args(["-l", "-q"]).arg(&self.point).status();
        }
    }
}

fn is_mounted(point: &Path) -> Result<bool> {
    let point = point.to_str().context("not text")?;
    Ok(fs::read_to_string("/proc/self/mounts")?.lines().any(|line| line.split(' ').nth(1) == Some(point)))
}

fn names(directory: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn wait_until(patience: Duration, mut condition: impl FnMut() -> Result<bool>) -> Result<()> {
    let end: Instant = clock::now() + patience;
    while !condition()? {
        ensure!(clock::now() < end, "not within {patience:?}");
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

#[test]
fn a_nasty_tree_in_a_directory_looks_like_its_source_and_umount_ends_the_command() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let scratch = scratch.path();
    let agent = Agent::local(&scratch.join("home"), &scratch.join("repository"))?;
    let source = scratch.join("source");
    Corpus { files: 300, big_bytes: 2 << 20, ..Corpus::default() }.create(&source)?;
    let saved = agent.backup(&source, &["--host", "web/1", "--tag", "daily,nasty"])?.snapshot()?;
    let Some(mount) = Mount::start(&agent, &scratch.join("mnt"), &["--json"])? else { return Ok(()) };
    ensure_same(&source, &mount.latest(&source)?)?;

    let short = saved.get(..8).context("a short id")?;
    ensure!(names(&mount.point)? == ["hosts", "ids", "snapshots", "tags"]);
    ensure!(names(&mount.point.join("ids"))? == [short]);
    ensure!(names(&mount.point.join("hosts"))? == ["web_1"]);
    ensure!(names(&mount.point.join("tags"))? == ["daily", "nasty"]);
    let times = names(&mount.point.join("snapshots"))?;
    let [time, latest] = times.as_slice() else { bail!("{times:?}") };
    ensure!(latest == "latest" && time.starts_with("20"), "{times:?}");
    ensure!(fs::read_link(mount.point.join("tags/daily/latest"))? == Path::new(time));
    for below in [format!("ids/{short}"), format!("hosts/web_1/{time}"), "tags/nasty/latest".to_owned()] {
        let big = mount.point.join(below).join(source.strip_prefix("/")?).join("big");
        ensure!(names(&big)? == names(&source.join("big"))?, "{}", big.display());
    }
    let there = mount.latest(&source)?;
    ensure!(fs::write(there.join("new"), "x").is_err() && fs::remove_dir_all(there.join("big")).is_err());
    ensure!(fs::metadata(there.join("no such name")).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound));
    mount.end().map(drop)
}

#[test]
fn a_directory_of_20000_names_is_listed_completely_and_each_name_once() -> Result<()> {
    const COUNT: usize = 20_000;
    let scratch = tempfile::tempdir()?;
    let scratch = scratch.path();
    let agent = Agent::local(&scratch.join("home"), &scratch.join("repository"))?;
    let source = scratch.join("source");
    fs::create_dir(&source)?;
    for n in 0..COUNT {
        File::create(source.join(format!("a rather long name of an empty file, number {n}")))?;
    }
    agent.backup(&source, &[])?;
    let Some(mount) = Mount::start(&agent, &scratch.join("mnt"), &[])? else { return Ok(()) };
    let there = mount.latest(&source)?;
    for _ in 0..2 {
        let mut found = BTreeSet::new();
        for entry in fs::read_dir(&there)? {
            let entry = entry?;
            ensure!(entry.metadata()?.len() == 0);
            ensure!(found.insert(entry.file_name()), "{:?} comes twice", entry.file_name());
        }
        ensure!(found.len() == COUNT, "{} names", found.len());
    }
    // A second reader in the same directory, from the middle on, while the first one is on its way.
    let first = fs::read_dir(&there)?;
    let second = fs::read_dir(&there)?;
    ensure!(second.skip(COUNT / 2).count() == COUNT / 2);
    ensure!(first.count() == COUNT);
    mount.end().map(drop)
}

#[test]
fn eight_readers_of_a_server_get_what_was_saved_and_random_reads_hit_the_right_place() -> Result<()> {
    let rig = Rig::direct()?;
    let writer = rig.owner("writer")?;
    let source = rig.scratch().join("source");
    random_files(&source, 8, 24, 700 << 10)?;
    let mut random = Random::new(88);
    fs::write(source.join("big"), random.bytes(24 << 20))?;
    writer.backup(&source, &[])?;
    let reader = rig.second("reader", &writer)?;
    // A cache much smaller than what is read: everything is evicted all the time.
    let Some(mount) = Mount::start(&reader, &rig.scratch().join("mnt"), &["--cache-size", "8M"])? else {
        return Ok(());
    };
    let there = mount.latest(&source)?;
    thread::scope(|scope| {
        let readers: Vec<_> = (0..8u64)
            .map(|number| {
                let (source, there) = (&source, &there);
                scope.spawn(move || read_as(number, source, there))
            })
            .collect();
        readers.into_iter().try_for_each(|reader| reader.join().map_err(|_| anyhow::anyhow!("a reader panicked"))?)
    })?;
    mount.end()?;
    rig.ensure_no_panic()
}

/// Readers 0 to 3 read every small file, each in another order; 4 and 5 the big file; 6 and 7 places in the big file.
fn read_as(number: u64, source: &Path, there: &Path) -> Result<()> {
    let same = |name: &str| -> Result<()> {
        ensure!(fs::read(source.join(name))? == fs::read(there.join(name))?, "{name} differs");
        Ok(())
    };
    match number {
        0..4 => (0..24).try_for_each(|n| same(&format!("file-{:04}", (n * 7 + number * 5) % 24))),
        4 | 5 => same("big"),
        _ => {
            let (here, there) = (File::open(source.join("big"))?, File::open(there.join("big"))?);
            let mut random = Random::new(number);
            for _ in 0..300 {
                let offset = random.below(24 << 20);
                let length = 1 + random.index(200 << 10);
                let (mut expected, mut found) = (vec![0; length], vec![0; length]);
                let (wanted, got) =
                    (read_fully(&here, &mut expected, offset)?, read_fully(&there, &mut found, offset)?);
                ensure!(wanted == got && expected == found, "{length} bytes at {offset} differ");
            }
            Ok(())
        }
    }
}

fn read_fully(file: &File, buffer: &mut [u8], offset: u64) -> Result<usize> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + done as u64)? {
            0 => break,
            read => done += read,
        }
    }
    Ok(done)
}

#[test]
fn a_snapshot_made_while_mounted_appears_and_a_signal_ends_the_command() -> Result<()> {
    let rig = Rig::direct()?;
    let writer = rig.owner("writer")?;
    let source = rig.scratch().join("source");
    random_files(&source, 9, 3, 1000)?;
    writer.backup(&source, &["--tag", "shown"])?;
    let reader = rig.second("reader", &writer)?;
    let mounted = Mount::start(&reader, &rig.scratch().join("mnt"), &["--tag", "shown"])?;
    let Some(mount) = mounted else { return Ok(()) };
    let snapshots = mount.point.join("snapshots");
    ensure!(names(&snapshots)?.len() == 2);
    fs::write(source.join("another"), "file")?;
    writer.backup(&source, &["--tag", "hidden"])?;
    writer.backup(&source, &["--tag", "shown"])?;
    wait_until(Duration::from_secs(15), || Ok(names(&snapshots)?.len() == 3))?;
    wait_until(Duration::from_secs(5), || Ok(mount.latest(&source)?.join("another").exists()))?;
    ensure_same(&source, &mount.latest(&source)?)?;
    ensure!(names(&mount.point.join("tags"))? == ["shown"], "other snapshots are not shown");
    mount.process.signal(Signal::INT)?;
    mount.ended()?;
    rig.ensure_no_panic()
}

#[test]
fn a_user_without_privileges_mounts_through_the_helper_and_sees_everything_saved() -> Result<()> {
    let device = fs::metadata("/dev/fuse").is_ok_and(|device| device.permissions().mode() & 0o006 == 0o006);
    if !device || Command::new("fusermount3").arg("--version").output().is_err() {
        not_run("users may not open /dev/fuse, or the program fusermount3 (Debian package fuse3) is missing");
        return Ok(());
    }
    let scratch = tempfile::tempdir()?;
    fs::set_permissions(scratch.path(), PermissionsExt::from_mode(0o777))?;
    let source = scratch.path().join("source");
    random_files(&source, 11, 2, 50_000)?;
    let agent = Agent::local(&scratch.path().join("home"), &scratch.path().join("repository"))?;
    fs::set_permissions(agent.home(), PermissionsExt::from_mode(0o777))?;
    let Some(mut backup) = unprivileged(agent.backup_command(&source, &[])?)? else { return Ok(()) };
    process::run(&mut backup, PATIENCE)?.expect_code(0)?;
    let point = scratch.path().join("mnt");
    let Some(mut make) = unprivileged(Command::new("mkdir"))? else { return Ok(()) };
    process::run(make.arg(&point), PATIENCE)?.expect_code(0)?;
    let Some(mut mount) = unprivileged(agent.command(&["mount"])?)? else { return Ok(()) };
    let Some(mount) = Mount::started(Process::spawn(mount.arg(&point))?, &point)? else { return Ok(()) };
    let there = mount.latest(&source)?.join("file-0001");
    let Some(mut cat) = unprivileged(Command::new("cmp"))? else { return Ok(()) };
    process::run(cat.arg(source.join("file-0001")).arg(&there), PATIENCE)?.expect_code(0)?;
    if rustix::process::geteuid().is_root() {
        ensure!(fs::read(&there).is_err(), "nobody else may look, not even root");
    }
    mount.process.signal(Signal::INT)?;
    mount.ended().map(drop)
}

#[test]
fn a_mount_in_use_outlives_the_first_signal_and_not_the_second() -> Result<()> {
    if !rustix::process::geteuid().is_root() {
        not_run("only root can take away a file system that is in use");
        return Ok(());
    }
    let scratch = tempfile::tempdir()?;
    let scratch = scratch.path();
    let agent = Agent::local(&scratch.join("home"), &scratch.join("repository"))?;
    let source = scratch.join("source");
    random_files(&source, 10, 1, 300 << 10)?;
    agent.backup(&source, &[])?;
    let Some(mount) = Mount::start(&agent, &scratch.join("mnt"), &[])? else { return Ok(()) };
    let mut open = File::open(mount.latest(&source)?.join("file-0000"))?;
    mount.process.terminate()?;
    mount.process.wait_for_line("in use", PATIENCE)?;
    let mut content = Vec::new();
    open.read_to_end(&mut content)?;
    ensure!(content == fs::read(source.join("file-0000"))?);
    mount.process.terminate()?;
    mount.ended()?;
    open.seek(SeekFrom::Start(0)).map(drop).context("the descriptor itself stays")
}

#[test]
fn s30_damage_is_an_error_for_the_file_that_has_it_and_everything_else_is_readable() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let scratch = scratch.path();
    let repository = scratch.join("repository");
    let agent = Agent::local(&scratch.join("home"), &repository)?;
    let source = scratch.join("source");
    random_files(&source, 30, 20, 900 << 10)?;
    agent.backup(&source, &[])?;
    let mut largest = (0, PathBuf::new());
    for pack in packs(&repository.join("storage"))? {
        largest = largest.max((fs::metadata(&pack)?.len(), pack));
    }
    let (length, pack) = largest;
    let file = File::options().read(true).write(true).open(&pack)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, length / 2)?;
    file.write_all_at(&byte.map(|right| !right), length / 2)?;

    let Some(mount) = Mount::start(&agent, &scratch.join("mnt"), &[])? else { return Ok(()) };
    let there = mount.latest(&source)?;
    let mut damaged = Vec::new();
    for name in names(&source)? {
        match fs::read(there.join(&name)) {
            Ok(found) => ensure!(found == fs::read(source.join(&name))?, "{name}: wrong bytes"),
            Err(error) if error.raw_os_error() == Some(EIO) => damaged.push(name),
            Err(error) => bail!("{name}: {error}"),
        }
    }
    // One block of about 1 MiB is damaged: it holds parts of two or three files.
    ensure!((1..=4).contains(&damaged.len()), "{damaged:?}");
    let (Some(first), false) = (damaged.first(), damaged.len() > 4) else { bail!("{damaged:?}") };
    // What lies outside of the damaged block is readable in a damaged file, too.
    ensure!(readable_parts(&source.join(first), &there.join(first))? > 0 || damaged.len() > 1);
    let said = mount.end()?;
    for name in &damaged {
        let lines: Vec<_> = said.lines().filter(|line| line.contains(name.as_str())).collect();
        ensure!(lines.len() == 1, "{name} is told of {} times:\n{said}", lines.len());
        ensure!(lines.iter().all(|line| line.contains("block")), "{lines:?}");
    }
    Ok(())
}

/// How many parts of 4 KiB are readable; each must be right.
fn readable_parts(source: &Path, there: &Path) -> Result<usize> {
    let expected = fs::read(source)?;
    let file = File::open(there)?;
    let mut readable = 0;
    for (part, offset) in expected.chunks(4096).zip((0..).step_by(4096)) {
        let mut found = vec![0; part.len()];
        if file.read_exact_at(&mut found, offset).is_ok() {
            ensure!(found == part, "wrong bytes at {offset}");
            readable += 1;
        }
    }
    Ok(readable)
}

fn packs(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(packs(&path)?);
        } else if path.extension().is_some_and(|extension| extension == "pack") {
            found.push(path);
        }
    }
    Ok(found)
}

/// Not from what the kernel has kept.
fn read_uncached(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut file = File::open(path)?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    let mut content = Vec::new();
    file.read_to_end(&mut content).map(|_| content)
}

#[test]
fn s24_a_server_killed_while_it_is_read_from_comes_back_and_no_reader_hangs() -> Result<()> {
    let mut rig = Rig::direct()?;
    let writer = rig.owner("writer")?;
    let source = rig.scratch().join("source");
    random_files(&source, 24, 40, 800 << 10)?;
    writer.backup(&source, &[])?;
    let reader = rig.second("reader", &writer)?;
    let mounted = Mount::start(&reader, &rig.scratch().join("mnt"), &["--cache-size", "8M"])?;
    let Some(mount) = mounted else { return Ok(()) };
    let there = mount.latest(&source)?;
    let (stop, files) = (AtomicBool::new(false), names(&source)?);
    let read_one = |name: &str| -> Result<bool> {
        match read_uncached(&there.join(name)) {
            Ok(found) => {
                ensure!(found == fs::read(source.join(name))?, "{name}: wrong bytes");
                Ok(true)
            }
            Err(error) if error.raw_os_error() == Some(EIO) => Ok(false),
            Err(error) => bail!("{name}: {error}"),
        }
    };
    thread::scope(|scope| {
        let readers: Vec<_> = (0..4)
            .map(|number| {
                let (stop, files, read_one) = (&stop, &files, &read_one);
                scope.spawn(move || -> Result<usize> {
                    let mut right = 0;
                    for name in files.iter().cycle().skip(number * 10) {
                        if stop.load(Ordering::Relaxed) {
                            break;
                        }
                        right += usize::from(read_one(name)?);
                    }
                    Ok(right)
                })
            })
            .collect();
        // The first read has come through when the server is killed.
        let begun = read_one(files.first().map_or("", String::as_str));
        rig.kill_server();
        let restarted = rig.start_server();
        // Everything is readable again, after errors at worst.
        let back = wait_until(PATIENCE, || files.iter().try_fold(true, |all, name| Ok(all & read_one(name)?)));
        stop.store(true, Ordering::Relaxed);
        for reader in readers {
            let right = reader.join().map_err(|_| anyhow::anyhow!("a reader panicked"))??;
            ensure!(right > 0, "a reader read nothing");
        }
        ensure!(begun?, "nothing was readable before the server was killed");
        restarted?;
        back.context("not everything is readable after the restart")
    })?;
    mount.end()?;
    rig.ensure_no_panic()
}
