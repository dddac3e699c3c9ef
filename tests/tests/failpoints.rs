//! The server dies at every place that its source names as a failpoint, and again while it recovers from that (scenarios 24 and
//! 25); and syncs fail there (29). It comes back unaided, the running backup ends well, and nothing acknowledged is lost.
//!
//! Which places a part of a server's life reaches, and how often, is found out first; then the part is lived again for each of
//! them, with a death there. With `STRAND_LONG=1` with a death at each of the first times, otherwise at one of them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use strandline_actors::runtime::clock;
use strandline_tests::process::{self, Process};
use strandline_tests::proxy::Direction;
use strandline_tests::random::Random;
use strandline_tests::rig::{Agent, PATIENCE, REPOSITORY, Rig, Summary, TENANT, copy_tree, is_long, random_files};

const PROGRAM: &str = "strand-server-failpoints";
const DEATH: &str = "STRAND_FAILPOINT";
const LOG: &str = "STRAND_FAILPOINT_LOG";
/// Deaths of one part at one place, with `STRAND_LONG=1`.
const TIMES_MAX: u64 = 12;
/// More snapshots are not kept.
const SAVED_MAX: usize = 6;

/// Places that no crash of a process leads to, and what shows them instead.
const OUT_OF_REACH: [(&str, &str); 2] = [
    (
        "journal/closed",
        "a kill does not tear a line that was written in one call; unit tests of the journal tear it at each byte",
    ),
    ("pack/given-up", "only after an error of the disk; the test of failing syncs gets there"),
];

/// A part of a server's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
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
type Counts = BTreeMap<String, u64>;

struct Saved {
    id: String,
    source: PathBuf,
    copy: PathBuf,
}

struct Life {
    rig: Rig,
    owner: Agent,
    log: PathBuf,
    random: Random,
    /// What the next servers die at.
    deaths: VecDeque<String>,
    died: u64,
    lived: u64,
    saved: Vec<Saved>,
}

impl Life {
    fn begin(seed: u64) -> Result<Self> {
        let scratch = tempfile::tempdir()?.keep();
        let mut rig = Rig::proxied_in_directory(&scratch.join("server"), PROGRAM)?;
        let log = scratch.join("reached");
        rig.set_variable(LOG, log.to_str());
        rig.start_server()?;
        let owner = rig.owner("owner")?;
        let repository = format!("{TENANT}/{REPOSITORY}");
        rig.administer(&["repository", "set", &repository, "undelete=0s", "keep_uncommitted=0s"])?;
        let random = Random::new(seed);
        Ok(Self { rig, owner, log, random, deaths: VecDeque::new(), died: 0, lived: 0, saved: Vec::new() })
    }

    /// What was reached since this was last asked.
    fn reached(&self) -> Result<Counts> {
        let mut counts = Counts::new();
        if self.log.exists() {
            for line in fs::read_to_string(&self.log)?.lines() {
                *counts.entry(line.to_owned()).or_default() += 1;
            }
            fs::remove_file(&self.log)?;
        }
        Ok(counts)
    }

    /// Starts servers until one does not die at once. The first gets the next death, and so on.
    fn start(&mut self) -> Result<()> {
        self.rig.kill_server();
        loop {
            let death = self.deaths.pop_front();
            self.rig.set_variable(DEATH, death.as_deref());
            match self.rig.start_server() {
                Ok(()) => return Ok(()),
                Err(error) => {
                    ensure!(death.is_some() && !format!("{error:#}").contains("panicked at"), "{death:?}: {error:#}");
                    self.died += 1;
                }
            }
        }
    }

    /// Whether the server has died; then it was started again.
    fn revive(&mut self) -> Result<bool> {
        if self.rig.server()?.is_running() {
            return Ok(false);
        }
        self.died += 1;
        self.start()?;
        Ok(true)
    }

    /// Runs a command until it succeeds; it may fail only if the server dies meanwhile.
    fn insist(&mut self, command: impl Fn(&Self) -> Result<Command>) -> Result<()> {
        loop {
            let finished = process::run(&mut command(self)?, PATIENCE)?;
            if finished.status.success() {
                self.revive()?;
                return Ok(());
            }
            ensure!(self.revive()?, "the server lives, and: {finished:?}\n{}", self.rig.log());
        }
    }

    fn agent(&mut self, arguments: &[&str]) -> Result<()> {
        self.insist(|life| life.owner.command(arguments))
    }

    /// Runs an administration command that needs no server until it succeeds; each attempt gets the next death.
    fn administer(&mut self, arguments: &[&str]) -> Result<()> {
        loop {
            let death = self.deaths.pop_front();
            self.rig.set_variable(DEATH, death.as_deref());
            let finished = process::run(&mut self.rig.server_command(arguments)?, PATIENCE)?;
            self.rig.set_variable(DEATH, None);
            if finished.status.success() {
                return Ok(());
            }
            ensure!(death.is_some() && finished.status.code().is_none(), "{arguments:?}, {death:?}: {finished:?}");
            self.died += 1;
        }
    }

    fn source(&self) -> PathBuf {
        self.rig.scratch().join("source")
    }

    fn change(&mut self) -> Result<PathBuf> {
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
        let end = clock::now() + PATIENCE;
        while backup.is_running() && clock::now() < end {
            self.revive()?;
            thread::sleep(Duration::from_millis(5));
        }
        self.revive()?;
        let summary = Summary::at_end_of(backup).with_context(|| format!("the servers:\n{}", self.rig.log()))?;
        let copy = self.rig.scratch().join(format!("copy-{}", self.lived));
        copy_tree(source, &copy)?;
        self.saved.push(Saved { id: summary.snapshot()?, source: source.to_owned(), copy });
        Ok(())
    }

    /// A backup that begins with a server that is running.
    fn backup(&mut self) -> Result<()> {
        let source = self.change()?;
        let backup = self.owner.start_backup(&source, &["--streams", "2"])?;
        self.finish(backup, &source)
    }

    fn live(&mut self, part: Part) -> Result<()> {
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

    fn initialise(&mut self) -> Result<()> {
        let data = self.rig.scratch().join(format!("data-{}", self.lived));
        let data_text = data.to_str().context("not text")?;
        self.administer(&["--data", data_text, "init", "--name", "localhost"])?;
        self.administer(&["--data", data_text, "tenant", "list"])?;
        ensure_no_leftovers(&data)?;
        Ok(fs::remove_dir_all(data)?)
    }

    fn create(&mut self) -> Result<()> {
        self.start()?;
        let name = format!("machine-{}", self.lived);
        let machine = self.rig.machine(&name)?.at(&format!("strand://{}/{name}", self.rig.address()));
        // A token may be used up by an attempt whose answer was lost.
        self.insist(|life| {
            let token = life.rig.token()?;
            machine.command(&["enroll", &token, "--label", &name])
        })?;
        self.insist(|_| machine.command(&["init"]))?;
        self.insist(|life| {
            let mut command = machine.command(&["key", "add", "--new-password-file"])?;
            let password = life.rig.scratch().join("password");
            fs::write(&password, "a password that is long enough")?;
            command.arg(password);
            Ok(command)
        })
    }

    fn recover(&mut self) -> Result<()> {
        self.rig.set_variable(DEATH, None);
        self.rig.kill_server();
        self.rig.start_server()?;
        let source = self.change()?;
        let before = self.rig.proxy()?.carried_bytes(Direction::ToServer);
        let backup = self.owner.start_backup(&source, &["--streams", "2", "--limit-upload", "1M"])?;
        self.rig.proxy()?.wait_for_bytes(Direction::ToServer, before + 120_000, PATIENCE)?;
        self.start()?;
        self.finish(backup, &source)
    }

    fn collect(&mut self) -> Result<()> {
        // Whole packs die with the snapshots that are deleted, and parts of others.
        while self.saved.len() < 3 {
            self.backup()?;
        }
        let gone = self.saved.remove(self.random.index(self.saved.len() - 1));
        fs::remove_dir_all(&gone.copy)?;
        self.start()?;
        self.agent(&["forget", &gone.id])?;
        self.agent(&["prune", "--repack", "--max-unused", "0"])?;
        self.insist(|life| life.rig.server_command(&["scrub"]))
    }

    fn stop(&mut self) -> Result<()> {
        self.start()?;
        self.backup()?;
        let server = self.rig.server()?;
        server.terminate()?;
        let ended = server.wait(PATIENCE)?.context("the server does not stop")?;
        self.died += u64::from(ended.code().is_none());
        self.start()
    }

    fn rescue(&mut self) -> Result<()> {
        self.rig.kill_server();
        self.administer(&["repair"])?;
        self.administer(&["catalog", "rebuild"])?;
        for entry in fs::read_dir(self.rig.data())? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("catalog.sqlite.")) {
                fs::remove_file(path)?;
            }
        }
        let repository = format!("{TENANT}/{REPOSITORY}");
        self.start()?;
        self.rig.administer(&["repository", "show", &repository]).map(drop)
    }

    /// Every snapshot is there, the last one is what was saved, and nothing unfinished is left.
    fn verify(&mut self, all: bool) -> Result<()> {
        self.rig.set_variable(DEATH, None);
        self.deaths.clear();
        self.start()?;
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

    /// Lives a part with such deaths, one after another; whether the first of them came.
    fn die(&mut self, part: Part, deaths: &[String]) -> Result<bool> {
        let before = self.died;
        self.deaths = deaths.iter().cloned().collect();
        self.live(part)?;
        self.verify(false)?;
        Ok(self.died > before)
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
        if name.starts_with(".unfinished-") || name.starts_with(".new-") {
            found.push(path);
        } else if path.is_dir() {
            unfinished(&path, found)?;
        } else if name.ends_with(".state") && !path.with_extension("pack").exists() {
            found.push(path);
        }
    }
    Ok(())
}

/// Finds out what each of `parts` reaches and dies there; how often each place was reached and died at.
fn die_everywhere(seed: u64, parts: &[Part]) -> Result<(Counts, Counts)> {
    let mut life = Life::begin(seed)?;
    life.backup()?;
    life.live(Part::Recover)?;
    let at_start = start_counts(&mut life)?;
    let recovery: Vec<String> = at_start.keys().cloned().collect();
    let (mut reached, mut deaths) = (Counts::new(), Counts::new());
    for &part in parts {
        life.reached()?;
        life.live(part).with_context(|| format!("{part:?}"))?;
        life.verify(true).with_context(|| format!("after {part:?}"))?;
        let counts = life.reached()?;
        for (place, &count) in &counts {
            let times: Vec<u64> =
                if is_long() { (1..=count.min(TIMES_MAX)).collect() } else { vec![1 + life.random.below(count)] };
            for time in times {
                // Another death in the recovery from it, and another.
                let again = (0..2).map(|_| format!("{}:1", recovery[life.random.index(recovery.len())]));
                let sequence: Vec<String> = [format!("{place}:{time}")].into_iter().chain(again).collect();
                let context = || format!("{part:?} with deaths at {sequence:?}");
                // What several threads do is not counted the same each time.
                let mut died = life.die(part, &sequence).with_context(context)?;
                if !died && time > 1 {
                    died = life.die(part, &[format!("{place}:1")]).with_context(context)?;
                }
                *deaths.entry(place.clone()).or_default() += u64::from(died);
            }
            *reached.entry(place.clone()).or_default() += count;
        }
    }
    for (place, count) in life.reached()? {
        *reached.entry(place).or_default() += count;
    }
    life.verify(true)?;
    Ok((reached, deaths))
}

/// What a start after a kill in the middle of a backup reaches.
fn start_counts(life: &mut Life) -> Result<Counts> {
    life.reached()?;
    life.start()?;
    life.reached()
}

/// The places that the server's source names.
fn places_in_source() -> Result<BTreeSet<String>> {
    let mut places = BTreeSet::new();
    let mut pending = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("../server/src")];
    while let Some(path) = pending.pop() {
        if path.is_dir() {
            pending.extend(
                fs::read_dir(path)?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<Vec<_>, _>>()?,
            );
            continue;
        }
        let text = fs::read_to_string(path)?;
        for call in ["failpoint::reached(\"", "failpoint::sync(\""] {
            let named = text.split(call).skip(1).filter_map(|rest| rest.split('"').next());
            places.extend(named.map(ToOwned::to_owned));
        }
    }
    ensure!(places.len() > 30, "{places:?}");
    Ok(places)
}

#[test]
fn s24_s25_the_server_dies_at_every_failpoint_and_while_it_recovers_and_nothing_is_lost() -> Result<()> {
    let halves = [
        (2401, [Part::Backup, Part::Recover, Part::Stop].as_slice()),
        (2402, &[Part::Initialise, Part::Create, Part::Collect, Part::Rescue]),
    ];
    let threads = halves.map(|(seed, parts)| thread::spawn(move || die_everywhere(seed, parts)));
    let (mut reached, mut deaths) = (Counts::new(), Counts::new());
    for half in threads {
        let (half_reached, half_deaths) = half.join().map_err(|_| anyhow::anyhow!("a half of the test panicked"))??;
        half_reached.into_iter().for_each(|(place, count)| *reached.entry(place).or_default() += count);
        half_deaths.into_iter().for_each(|(place, count)| *deaths.entry(place).or_default() += count);
    }
    let mut never = Vec::new();
    for place in places_in_source()? {
        let count = |counts: &Counts| counts.get(&place).copied().unwrap_or(0);
        println!("{place}: reached {} times, died there {} times", count(&reached), count(&deaths));
        if count(&deaths) == 0 && !OUT_OF_REACH.iter().any(|(known, _)| *known == place) {
            never.push(place);
        }
    }
    ensure!(never.is_empty(), "nobody died at {never:?}: extend what the parts do, or say why nobody can get there");
    Ok(())
}
