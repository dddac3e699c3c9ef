//! Limits that a server runs into: no space, no inodes, a medium that cannot be written, descriptors, memory. What hits them fails
//! with the reason; listing and restoring work, the server lives, and everything works again afterwards (scenarios 28 and 39).

use std::fs::{self, File};
use std::io::Read;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use strandline_actors::runtime::clock;
use strandline_tests::mounts::SmallDisk;
use strandline_tests::process;
use strandline_tests::rig::{Agent, PATIENCE, REPOSITORY, Rig, Summary, TENANT, not_run, random_files};

/// Fills a disk to its last byte; the file that does it.
fn fill(disk: &SmallDisk) -> Result<PathBuf> {
    let path = disk.path().join("taken");
    let mut zeros = std::io::repeat(0).take(1 << 40);
    // It ends with an error: that is what it is for.
    let _ = std::io::copy(&mut zeros, &mut File::create(&path)?);
    Ok(path)
}

/// A server on a disk of its own with one snapshot, and what was saved.
struct Small {
    rig: Rig,
    writer: Agent,
    source: PathBuf,
    snapshot: String,
    // Last: unmounted when nobody uses it any more.
    disk: SmallDisk,
    _mount: tempfile::TempDir,
}

impl Small {
    fn new() -> Result<Option<Self>> {
        let mount = tempfile::tempdir()?;
        let Some(disk) = SmallDisk::mount(&mount.path().join("disk"), 64)? else { return Ok(None) };
        let rig = Rig::in_directory(&disk.path().join("server"))?;
        let writer = rig.owner("writer")?;
        let source = rig.scratch().join("source");
        random_files(&source, 28, 8, 100 << 10)?;
        let snapshot = writer.backup(&source, &[])?.snapshot()?;
        Ok(Some(Self { rig, writer, source, snapshot, disk, _mount: mount }))
    }

    fn ensure_readable(&self) -> Result<()> {
        ensure!(self.writer.snapshots()? == std::slice::from_ref(&self.snapshot), "not the one snapshot");
        self.rig.ensure_restores(&self.writer, &self.snapshot, &self.source, &self.source)
    }

    /// A backup of something new fails with one of these texts.
    fn ensure_refused(&self, reasons: &[&str]) -> Result<()> {
        let more = self.rig.scratch().join("more");
        if !more.exists() {
            random_files(&more, 29, 10, 200 << 10)?;
        }
        let refused = process::run(&mut self.writer.backup_command(&more, &[])?, PATIENCE)?.expect_code(1)?;
        ensure!(reasons.iter().any(|reason| refused.stderr.contains(reason)), "{}", refused.stderr);
        Ok(())
    }

    /// As if nothing had been.
    fn ensure_whole(&mut self) -> Result<()> {
        self.ensure_readable()?;
        let more = self.rig.scratch().join("more");
        let saved = self.writer.backup(&more, &[])?.snapshot()?;
        self.rig.ensure_restores(&self.writer, &saved, &more, &more)?;
        self.writer.run(&["prune"])?.expect_code(0)?;
        self.writer.run(&["check", "--read-data"])?.expect_code(0)?;
        self.rig.ensure_no_panic()
    }
}

#[test]
fn s28_a_disk_that_others_filled_is_listed_and_restored_from_and_cleaned_up() -> Result<()> {
    let Some(mut small) = Small::new()? else { return Ok(()) };
    let taken = fill(&small.disk)?;
    small.ensure_readable()?;
    small.ensure_refused(&["full", "space"])?;
    // A server that starts there serves it, too.
    small.rig.kill_server();
    small.rig.start_server()?;
    small.ensure_readable()?;
    small.ensure_refused(&["full", "space"])?;
    small.writer.run(&["check", "--read-data"])?.expect_code(0)?;
    fs::remove_file(taken)?;
    small.rig.kill_server();
    small.rig.start_server()?;
    small.ensure_whole()
}

#[test]
fn s28_a_disk_without_inodes_is_listed_and_restored_from_and_refuses_with_the_reason() -> Result<()> {
    let Some(mut small) = Small::new()? else { return Ok(()) };
    let taken = small.disk.take_inodes(0)?;
    small.ensure_readable()?;
    small.rig.kill_server();
    small.rig.start_server()?;
    small.ensure_readable()?;
    small.ensure_refused(&["full", "space"])?;
    fs::remove_dir_all(taken)?;
    small.rig.kill_server();
    small.rig.start_server()?;
    small.ensure_whole()
}

#[test]
fn s28_a_medium_that_cannot_be_written_is_listed_and_restored_from() -> Result<()> {
    let Some(mut small) = Small::new()? else { return Ok(()) };
    small.rig.kill_server();
    small.disk.remount("ro")?;
    small.rig.start_server()?;
    small.ensure_readable()?;
    small.ensure_refused(&["ead-only"])?;
    small.rig.kill_server();
    small.disk.remount("rw")?;
    small.rig.start_server()?;
    small.ensure_whole()
}

#[test]
fn s28_a_directory_repository_on_a_full_disk_or_a_read_only_medium_is_listed_and_restored_from() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let Some(disk) = SmallDisk::mount(&scratch.path().join("disk"), 64)? else { return Ok(()) };
    let writer = Agent::local(&scratch.path().join("home"), &disk.path().join("repository"))?;
    let source = scratch.path().join("source");
    random_files(&source, 1, 8, 100 << 10)?;
    writer.run(&["init"])?.expect_code(0)?;
    let kept = writer.backup(&source, &[])?.snapshot()?;
    let ensure_readable = |name: &str| -> Result<()> {
        ensure!(writer.snapshots()? == std::slice::from_ref(&kept), "{name}");
        writer.restore_and_compare(&kept, &source, &source, &scratch.path().join(name)).context(name.to_owned())
    };
    let taken = fill(&disk)?;
    ensure_readable("full")?;
    fs::remove_file(taken)?;
    let taken = disk.take_inodes(0)?;
    ensure_readable("without-inodes")?;
    fs::remove_dir_all(taken)?;
    disk.remount("ro")?;
    ensure_readable("read-only")?;
    disk.remount("rw")?;
    writer.backup(&source, &["--force"])?;
    writer.run(&["check", "--read-data"])?.expect_code(0).map(drop)
}

/// Starts the server of `rig` by a shell that first does `before`.
fn start_after(rig: &mut Rig, before: &str) -> Result<()> {
    rig.kill_server();
    rig.start_server_as(|server| {
        let mut command = Command::new("sh");
        command
            .args(["-c", &format!("{before} && exec \"$@\""), "sh"])
            .arg(server.get_program())
            .args(server.get_args());
        for (name, value) in server.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        command
    })
}

#[test]
fn s39_a_server_without_descriptors_lives_and_serves_again_when_some_are_free() -> Result<()> {
    let mut rig = Rig::direct()?;
    let writer = rig.owner("writer")?;
    let (source, other) = (rig.scratch().join("source"), rig.scratch().join("other"));
    random_files(&source, 39, 8, 100 << 10)?;
    random_files(&other, 40, 60, 256 << 10)?;
    let kept = writer.backup(&source, &[])?.snapshot()?;
    start_after(&mut rig, "ulimit -n 96")?;
    let mut running = writer.start_backup(&other, &["--limit-upload", "4M", "--streams", "4"])?;
    let server = rig.server()?.id();
    let open = move || -> Result<usize> { Ok(fs::read_dir(format!("/proc/{server}/fd"))?.count()) };
    // More than there are descriptors for; the kernel keeps the others waiting.
    let mute: Vec<TcpStream> = (0..150).map(|_| TcpStream::connect(rig.address())).collect::<Result<_, _>>()?;
    let end = clock::now() + PATIENCE;
    while open()? < 94 {
        ensure!(clock::now() < end, "the limit is never reached: {} descriptors", open()?);
        thread::sleep(Duration::from_millis(10));
    }
    // For a while.
    thread::sleep(Duration::from_secs(1));
    ensure!(rig.server()?.is_running(), "{}", rig.log());
    drop(mute);
    // Whatever the running session met, it ends: well, or with a reason.
    let status = running.wait(PATIENCE)?.context("the running backup never ends")?;
    running.ensure_no_panic()?;
    ensure!(status.success() || !running.output().is_empty(), "{status} without a word");
    rig.ensure_restores(&writer, &kept, &source, &source)?;
    let saved = writer.backup(&other, &[])?.snapshot()?;
    rig.ensure_restores(&writer, &saved, &other, &other)?;
    writer.run(&["prune"])?.expect_code(0)?;
    writer.run(&["check", "--read-data"])?.expect_code(0)?;
    rig.ensure_no_panic()
}

/// A control group with a limit of memory; removed when dropped.
struct MemoryLimit(PathBuf);

impl MemoryLimit {
    /// `None`, with a line that says so, where none can be made.
    fn new(bytes: u64) -> Option<Self> {
        let name = format!("strandline-test-{}", std::process::id());
        // Version 2 wherever memory is one of its controllers, else version 1.
        for (root, limit) in [
            ("/sys/fs/cgroup", "memory.max"),
            ("/sys/fs/cgroup/unified", "memory.max"),
            ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
        ] {
            let group = Path::new(root).join(&name);
            if !Path::new(root).join("cgroup.procs").exists() || fs::create_dir(&group).is_err() {
                continue;
            }
            let group = Self(group);
            if fs::write(group.0.join(limit), bytes.to_string()).is_ok() {
                return Some(group);
            }
        }
        not_run("no control group with a limit of memory can be made here");
        None
    }

    fn processes(&self) -> PathBuf {
        self.0.join("cgroup.procs")
    }
}

impl Drop for MemoryLimit {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn s39_a_server_whose_memory_is_limited_serves_many_sessions_within_it() -> Result<()> {
    const SESSIONS: usize = 6;
    let mut rig = Rig::direct()?;
    let owner = rig.owner("owner")?;
    // 64 MiB, and 5 MiB for each stream that sends; what a debug build has more than the shipped one comes on top.
    let limit = (64 + 5 * 2 * SESSIONS as u64 + 64) << 20;
    let Some(group) = MemoryLimit::new(limit) else { return Ok(()) };
    start_after(&mut rig, &format!("echo $$ > '{}'", group.processes().display()))?;
    let mut backups = Vec::new();
    for n in 0..SESSIONS {
        let agent = rig.second(&format!("agent-{n}"), &owner)?;
        let source = rig.scratch().join(format!("source-{n}"));
        // All together more than the limit.
        random_files(&source, 100 + n as u64, 60, 512 << 10)?;
        backups.push((agent.start_backup(&source, &["--streams", "2"])?, source));
    }
    for (backup, source) in backups {
        let saved = Summary::at_end_of(backup).with_context(|| rig.log())?.snapshot()?;
        rig.ensure_restores(&owner, &saved, &source, &source)?;
    }
    ensure!(rig.server()?.is_running(), "{}", rig.log());
    rig.administer(&["gc", &format!("{TENANT}/{REPOSITORY}")])?;
    rig.kill_server();
    rig.ensure_no_panic()
}
