//! A server with failpoints, and a machine that backs up to it: the parts of a server's life, lived again and again while it dies
//! at places that are told beforehand. Whatever happens, the parts come to their end, and what was acknowledged is kept.

mod parts;

use std::collections::{BTreeMap, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use strandline_actors::runtime::clock;

use crate::process::{self, Process};
use crate::random::Random;
use crate::rig::{Agent, PATIENCE, REPOSITORY, Rig, Summary, TENANT, copy_tree, random_files};

const PROGRAM: &str = "strand-server-failpoints";
/// The variable that says where a process dies, or its syncs fail.
pub const DEATH: &str = "STRAND_FAILPOINT";
const LOG: &str = "STRAND_FAILPOINT_LOG";
/// More snapshots are not kept.
const SAVED_MAX: usize = 6;

/// A part of a server's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Part {
    /// A data directory is made.
    Initialise,
    /// A machine is enrolled, a repository made, its keys changed.
    Create,
    /// A backup of a changed tree.
    Backup,
    /// The start after a kill in the middle of a backup, which goes on.
    Recover,
    /// Snapshots are deleted, garbage is collected, everything is read.
    Collect,
    /// It is told to stop.
    Stop,
    /// Repair, and the catalog made anew.
    Rescue,
}

/// How often each place was reached, or died at.
pub type Counts = BTreeMap<String, u64>;

/// A snapshot that an agent was told of.
#[derive(Debug)]
pub struct Saved {
    /// Its id.
    pub id: String,
    /// What was saved.
    pub source: PathBuf,
    /// What that was at the time.
    pub copy: PathBuf,
}

/// See the module.
#[derive(Debug)]
pub struct Life {
    /// The server.
    pub rig: Rig,
    /// The machine that backs up to it.
    pub owner: Agent,
    log: PathBuf,
    /// What chance decides.
    pub random: Random,
    /// What the next processes die at, one after another.
    pub deaths: VecDeque<String>,
    /// Whether the server that runs is to die.
    armed: bool,
    lived: u64,
    /// What must be there.
    pub saved: Vec<Saved>,
}

impl Life {
    /// A new server with a repository, running.
    pub fn begin(seed: u64) -> Result<Self> {
        let mut rig = Rig::initialised(None, PROGRAM)?;
        let log = rig.scratch().join("reached");
        rig.set_variable(LOG, log.to_str());
        rig.start_server()?;
        let owner = rig.owner("owner")?;
        let repository = format!("{TENANT}/{REPOSITORY}");
        rig.administer(&[
            "repository",
            "set",
            &repository,
            "undelete=0s",
            "keep_uncommitted=0s",
            "compact_below_percent=100",
        ])?;
        let random = Random::new(seed);
        Ok(Self { rig, owner, log, random, deaths: VecDeque::new(), armed: false, lived: 0, saved: Vec::new() })
    }

    /// What was reached since this was last asked.
    pub fn reached(&self) -> Result<Counts> {
        let mut counts = Counts::new();
        if self.log.exists() {
            for line in fs::read_to_string(&self.log)?.lines() {
                *counts.entry(line.to_owned()).or_default() += 1;
            }
            fs::remove_file(&self.log)?;
        }
        Ok(counts)
    }

    /// Starts servers until one does not die at once. Each is to die at the first of the places that are left.
    pub fn start(&mut self) -> Result<()> {
        self.rig.kill_server();
        loop {
            let death = self.deaths.front().cloned();
            self.rig.set_variable(DEATH, death.as_deref());
            self.armed = death.is_some();
            match self.rig.start_server() {
                Ok(()) => return Ok(()),
                Err(error) => {
                    ensure!(self.armed && !format!("{error:#}").contains("panicked at"), "{death:?}: {error:#}");
                    self.deaths.pop_front();
                }
            }
        }
    }

    /// Whether the server has died; then it was started again.
    fn revive(&mut self) -> Result<bool> {
        if self.rig.server()?.is_running() {
            return Ok(false);
        }
        self.deaths.pop_front();
        self.start()?;
        Ok(true)
    }

    /// Runs a command until it succeeds, or says `done`, because the server died when everything was. It may fail only if the
    /// server dies meanwhile.
    fn insist(&mut self, done: Option<&str>, command: impl Fn(&Self) -> Result<Command>) -> Result<()> {
        loop {
            let mut process = Process::spawn(&mut command(self)?)?;
            let died = self.keep_alive(&mut process)?;
            let status = process.wait(PATIENCE)?.with_context(|| format!("no end of:\n{}", process.output()))?;
            let said = process.output();
            if status.success() || done.is_some_and(|done| said.contains(done)) {
                return Ok(());
            }
            ensure!(died, "the server lives, and {status}: {said}\n{}", self.rig.last_words());
        }
    }

    /// Starts servers again that die while `process` runs; whether any did.
    fn keep_alive(&mut self, process: &mut Process) -> Result<bool> {
        let mut died = false;
        let end = clock::now() + PATIENCE;
        while process.is_running() && clock::now() < end {
            died |= self.revive()?;
            thread::sleep(Duration::from_millis(5));
        }
        // A process that dies closes its sockets before it is gone.
        let end = clock::now() + Duration::from_secs(2);
        while self.armed && !died && clock::now() < end && !process.is_success()? {
            died |= self.revive()?;
            thread::sleep(Duration::from_millis(5));
        }
        Ok(self.revive()? || died)
    }

    fn agent(&mut self, arguments: &[&str]) -> Result<()> {
        self.insist(None, |life| life.owner.command(arguments))
    }

    /// Runs an administration command that needs no server until it succeeds.
    fn administer(&mut self, data: &Path, arguments: &[&str]) -> Result<()> {
        loop {
            let death = self.deaths.front().cloned();
            let mut command = process::command(PROGRAM, self.rig.scratch())?;
            command.arg("--data").arg(data).args(arguments).env(LOG, &self.log);
            command.envs(death.as_ref().map(|death| (DEATH, death)));
            let finished = process::run(&mut command, PATIENCE)?;
            // The attempt before may have died when everything was done.
            if finished.status.success() || finished.stderr.contains("there is a server in") {
                return Ok(());
            }
            ensure!(death.is_some() && finished.status.code().is_none(), "{arguments:?}, {death:?}: {finished:?}");
            self.deaths.pop_front();
        }
    }

    fn source(&self) -> PathBuf {
        self.rig.scratch().join("source")
    }

    /// Changes what is backed up.
    pub fn change(&mut self) -> Result<PathBuf> {
        let source = self.source();
        if !source.exists() {
            random_files(&source, self.random.number(), 12, 60 << 10)?;
        }
        for _ in 0..3 {
            let name = format!("file-{:04}", self.random.below(12));
            fs::write(source.join(name), self.random.bytes(60 << 10))?;
        }
        Ok(source)
    }

    /// Waits for the end of a backup, with servers that may die.
    fn finish(&mut self, mut backup: Process, source: &Path) -> Result<()> {
        self.keep_alive(&mut backup)?;
        let summary = Summary::at_end_of(backup).with_context(|| format!("the servers:\n{}", self.rig.last_words()))?;
        self.save(summary.snapshot()?, source)
    }

    /// Takes note of a snapshot that an agent was told of.
    pub fn save(&mut self, id: String, source: &Path) -> Result<()> {
        let copy = self.rig.scratch().join(format!("copy-{id}"));
        copy_tree(source, &copy)?;
        self.saved.push(Saved { id, source: source.to_owned(), copy });
        Ok(())
    }

    /// A backup that begins with a server that is running.
    pub fn backup(&mut self) -> Result<()> {
        let source = self.change()?;
        let backup = self.owner.start_backup(&source, &["--streams", "2"])?;
        self.finish(backup, &source)
    }

    /// Lives a part.
    pub fn live(&mut self, part: Part) -> Result<()> {
        self.lived += 1;
        match part {
            Part::Initialise => self.initialise(),
            Part::Create => self.create(),
            Part::Backup => {
                self.start()?;
                self.backup()
            }
            Part::Recover => self.recover(),
            Part::Collect => self.collect(),
            Part::Stop => self.stop(),
            Part::Rescue => self.rescue(),
        }
    }

    /// Every snapshot is there, the last one is what was saved, and nothing unfinished is left.
    pub fn verify(&mut self, all: bool) -> Result<()> {
        self.deaths.clear();
        if self.armed {
            self.start()?;
        }
        let mut expected: Vec<&String> = self.saved.iter().map(|saved| &saved.id).collect();
        let mut found = self.owner.snapshots()?;
        expected.sort();
        found.sort();
        ensure!(found.iter().collect::<Vec<_>>() == expected, "{found:?} instead of {expected:?}");
        let chosen = if all { self.saved.len() } else { 1 };
        for saved in self.saved.iter().rev().take(chosen) {
            self.rig.ensure_restores(&self.owner, &saved.id, &saved.source, &saved.copy)?;
        }
        if all {
            self.owner.run(&["check", "--read-data"])?.expect_code(0)?;
        }
        ensure_no_leftovers(self.rig.data())?;
        while self.saved.len() > SAVED_MAX {
            let gone = self.saved.remove(0);
            fs::remove_dir_all(gone.copy)?;
            self.owner.run(&["forget", &gone.id])?.expect_code(0)?;
        }
        self.rig.ensure_no_panic()
    }

    /// Lives a part with such deaths, one after another; how many of them came.
    pub fn die(&mut self, part: Part, deaths: &[String]) -> Result<usize> {
        self.deaths = deaths.iter().cloned().collect();
        self.live(part)?;
        let came = deaths.len() - self.deaths.len();
        if part != Part::Initialise {
            self.verify(false)?;
        }
        Ok(came)
    }
}

/// No file is there that only a running writer may have.
fn ensure_no_leftovers(directory: &Path) -> Result<()> {
    let mut left = Vec::new();
    let end = clock::now() + PATIENCE;
    loop {
        left.clear();
        unfinished(directory, &mut left)?;
        // The index is written in the background.
        if left.is_empty() || clock::now() > end {
            break;
        }
        thread::sleep(Duration::from_millis(50));
    }
    ensure!(left.is_empty(), "left by those who died: {left:?}");
    Ok(())
}

fn unfinished(directory: &Path, found: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if name.starts_with(".unfinished-") {
            found.push(path);
        } else if path.is_dir() {
            unfinished(&path, found)?;
        } else if path.extension().is_some_and(|kind| kind == "state") && !path.with_extension("pack").exists() {
            found.push(path);
        }
    }
    Ok(())
}
