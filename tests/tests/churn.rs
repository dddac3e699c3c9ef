//! Everything at once, by a seed: machines that back up trees which change, restore and compare, forget, collect, scrub and
//! check, on one server; in one of the tests the server is killed again and again. In the end every snapshot that is not
//! deleted restores as it was (scenario 33).

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use strandline_actors::runtime::clock;
use strandline_tests::compare::ensure_same;
use strandline_tests::corpus::Corpus;
use strandline_tests::mutate::mutate;
use strandline_tests::process::{self, Finished};
use strandline_tests::random::Random;
use strandline_tests::rig::{Agent, PATIENCE, Rig, Summary, copy_tree};

/// With more snapshots than this each step deletes one: all that are left are compared in the end.
const SNAPSHOTS_MAX: usize = 120;

fn long() -> bool {
    std::env::var_os("STRAND_LONG").is_some()
}

/// How long the machines are at work.
fn span() -> Duration {
    Duration::from_secs(if long() { 600 } else { 12 })
}

/// What the machines share: snapshots with copies of what they saw.
struct World {
    directory: PathBuf,
    snapshots: Mutex<HashMap<String, (PathBuf, PathBuf)>>,
    states: AtomicU64,
    done: AtomicBool,
    backups: AtomicU64,
    restores: AtomicU64,
    collections: AtomicU64,
    forgotten: AtomicU64,
    refused: AtomicU64,
}

impl World {
    fn new(directory: &Path) -> Arc<Self> {
        Arc::new(Self {
            directory: directory.to_owned(),
            snapshots: Mutex::default(),
            states: AtomicU64::new(0),
            done: AtomicBool::new(false),
            backups: AtomicU64::new(0),
            restores: AtomicU64::new(0),
            collections: AtomicU64::new(0),
            forgotten: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        })
    }

    fn list(&self) -> Vec<(String, (PathBuf, PathBuf))> {
        let snapshots = self.snapshots.lock().unwrap_or_else(PoisonError::into_inner);
        let mut list: Vec<_> = snapshots.iter().map(|(id, paths)| (id.clone(), paths.clone())).collect();
        list.sort();
        list
    }

    fn any(&self, random: &mut Random) -> Option<(String, (PathBuf, PathBuf))> {
        let mut list = self.list();
        if list.is_empty() { None } else { Some(list.swap_remove(random.index(list.len()))) }
    }

    fn remove(&self, id: &str) -> Option<(PathBuf, PathBuf)> {
        self.snapshots.lock().unwrap_or_else(PoisonError::into_inner).remove(id)
    }

    fn put(&self, id: String, source: PathBuf, state: PathBuf) {
        self.snapshots.lock().unwrap_or_else(PoisonError::into_inner).insert(id, (source, state));
    }

    fn next_path(&self, name: &str) -> PathBuf {
        self.directory.join(format!("{name}-{}", self.states.fetch_add(1, Ordering::Relaxed)))
    }
}

/// One machine's day. `may_fail`: the server is being killed, so a command may end in an error, which must be a clean one.
fn work(world: &World, agent: &Agent, source: &Path, seed: u64, may_fail: bool) -> Result<()> {
    let mut random = Random::new(seed);
    Corpus { seed, files: 60, big_bytes: 300_000, beyond_path_max: false }.create(source)?;
    while !world.done.load(Ordering::Relaxed) {
        if world.list().len() > SNAPSHOTS_MAX {
            forget(world, agent, &mut random, may_fail)?;
        }
        match random.below(10) {
            0..=4 => backup(world, agent, source, &mut random, may_fail)?,
            5..=6 => restore(world, agent, &mut random, may_fail)?,
            7 => forget(world, agent, &mut random, may_fail)?,
            8 => {
                if clean(&agent.run(&["prune", "--json"])?, may_fail, world)? {
                    world.collections.fetch_add(1, Ordering::Relaxed);
                }
            }
            _ => {
                let arguments: &[&str] = match random.below(3) {
                    0 => &["check", "--read-data-subset", "50%"],
                    1 => &["check", "latest"],
                    _ => &["prune", "--repack", "--max-unused", "0"],
                };
                // Right after the start there is no snapshot to be the latest.
                if !world.list().is_empty() {
                    clean(&agent.run(arguments)?, may_fail, world)?;
                }
            }
        }
    }
    Ok(())
}

/// Whether the command did its work. If it may fail, its end must be an error with a text, never a signal or a panic.
fn clean(finished: &Finished, may_fail: bool, world: &World) -> Result<bool> {
    let said = format!("{}\n{}", finished.stdout, finished.stderr);
    ensure!(!said.contains("panicked"), "{said}");
    match finished.status.code() {
        Some(0) => Ok(true),
        Some(1 | 3) if may_fail => {
            world.refused.fetch_add(1, Ordering::Relaxed);
            Ok(false)
        }
        code => Err(anyhow!("ended with {code:?}: {said}")),
    }
}

fn backup(world: &World, agent: &Agent, source: &Path, random: &mut Random, may_fail: bool) -> Result<()> {
    mutate(source, random.number(), 3)?;
    let finished = process::run(&mut agent.backup_command(source, &[])?, PATIENCE)?;
    if clean(&finished, may_fail, world)? {
        let id = Summary::of(&finished.stdout, finished.stderr)?.snapshot()?;
        let state = world.next_path("state");
        copy_tree(source, &state)?;
        world.put(id, source.to_owned(), state);
        world.backups.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

fn restore(world: &World, agent: &Agent, random: &mut Random, may_fail: bool) -> Result<()> {
    // Taken out while it is being restored, so that nobody deletes it meanwhile and nobody takes that for a loss.
    let Some((id, _)) = world.any(random) else { return Ok(()) };
    let Some((source, state)) = world.remove(&id) else { return Ok(()) };
    let restored = restore_one(world, agent, &id, &source, &state, may_fail);
    world.put(id, source, state);
    restored
}

fn restore_one(world: &World, agent: &Agent, id: &str, source: &Path, state: &Path, may_fail: bool) -> Result<()> {
    let target = world.next_path("target");
    let to = target.to_str().context("a path that is not text")?;
    if clean(&agent.run(&["restore", id, "--target", to])?, may_fail, world)? {
        ensure_same(state, &target.join(source.strip_prefix("/")?)).with_context(|| format!("snapshot {id}"))?;
        world.restores.fetch_add(1, Ordering::Relaxed);
    }
    if target.exists() {
        fs::remove_dir_all(&target)?;
    }
    Ok(())
}

fn forget(world: &World, agent: &Agent, random: &mut Random, may_fail: bool) -> Result<()> {
    if world.list().len() < 4 {
        return Ok(());
    }
    let Some((id, _)) = world.any(random) else { return Ok(()) };
    let Some((source, state)) = world.remove(&id) else { return Ok(()) };
    let forgotten = clean(&agent.run(&["forget", &id])?, may_fail, world)?;
    let back = forgotten && random.percent(30) && clean(&agent.run(&["undelete", &id])?, may_fail, world)?;
    if back {
        world.put(id, source, state);
    } else {
        // If the server was killed it may be there still, or not: nothing is said about it any more.
        fs::remove_dir_all(&state)?;
        world.forgotten.fetch_add(1, Ordering::Relaxed);
    }
    Ok(())
}

fn churn(seed: u64, kill: bool) -> Result<()> {
    let mut rig = Rig::with(&[("STRAND_SERVER_SESSION_GRACE", "10s")])?;
    let owner = rig.owner("owner")?;
    let mut agents = vec![owner.clone()];
    for number in 1..3 {
        agents.push(rig.second(&format!("agent-{number}"), &owner)?);
    }
    // Deleted snapshots are gone with the next collection: that is what must not hurt the others.
    let repository = format!("{}/main", strandline_tests::rig::TENANT);
    rig.administer(&["repository", "set", &repository, "undelete=2s", "keep_uncommitted=0s"])?;
    let world = World::new(rig.scratch());
    let machines: Vec<_> = agents
        .iter()
        .enumerate()
        .map(|(number, agent)| {
            let (world, agent) = (Arc::clone(&world), agent.clone());
            let source = rig.scratch().join(format!("source-{number}"));
            let seed = seed + number as u64;
            thread::spawn(move || {
                let worked = work(&world, &agent, &source, seed, kill);
                // One failure ends the day of all.
                world.done.store(true, Ordering::Relaxed);
                worked
            })
        })
        .collect();
    let mut random = Random::new(seed);
    let end = clock::now() + span();
    let mut kills = 0;
    while clock::now() < end && !world.done.load(Ordering::Relaxed) {
        thread::sleep(Duration::from_millis(if kill { 1500 + random.below(3000) } else { 200 }));
        if kill && clock::now() < end {
            rig.kill_server();
            rig.start_server()?;
            kills += 1;
        }
    }
    world.done.store(true, Ordering::Relaxed);
    for machine in machines {
        machine.join().map_err(|_| anyhow!("a machine of the test panicked"))??;
    }
    let left = world.list();
    if long() {
        for (id, (source, state)) in &left {
            restore_one(&world, &owner, id, source, state, false)?;
        }
    }
    owner.run(&["prune", "--repack", "--max-unused", "0"])?.expect_code(0)?;
    owner.run(&["check", "--read-data"])?.expect_code(0)?;
    for (id, (source, state)) in &left {
        restore_one(&world, &owner, id, source, state, false)?;
    }
    rig.ensure_no_panic()?;
    let count = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
    println!(
        "seed {seed}: {} backups, {} restores compared, {} collections, {} forgotten, {kills} kills, {} commands refused cleanly, {} \
         snapshots left and compared",
        count(&world.backups),
        count(&world.restores),
        count(&world.collections),
        count(&world.forgotten),
        count(&world.refused),
        left.len(),
    );
    ensure!(count(&world.backups) > 3 && count(&world.collections) > 0, "the machines did next to nothing");
    Ok(())
}

#[test]
fn s33_backups_collections_scrubs_deletions_and_restores_at_once_lose_nothing() -> Result<()> {
    churn(3301, false)
}

#[test]
fn s33_the_same_with_a_server_that_is_killed_every_few_seconds() -> Result<()> {
    churn(3302, true)
}
