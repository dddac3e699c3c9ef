//! Seeds of the simulated world. `STRAND_SEEDS=N` runs N of them, `STRAND_SEED=S` one, with its trace in words;
//! `STRAND_STRIDE=N` cuts a session at every N-th byte, 1: at each.

use std::env;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use strandline_actors::planted::{ALL, Bug, plant};
use strandline_tests::world::plan::{Ending, OneCut, Plan};
use strandline_tests::world::run::{Report, run, run_plan};

/// Seeds of an ordinary run.
const SEEDS: u64 = 6_000;
/// Seeds within which a planted bug must be found.
const SEEDS_FOR_A_BUG: u64 = 5_000;
/// In an ordinary run, a session is cut once in so many bytes.
const STRIDE: u64 = 127;
/// No connection of a session that is cut carries more.
const SESSION_BYTES: u64 = 80 << 10;

/// Runs something on a runtime whose time stands still while anybody works.
fn held<T>(future: impl Future<Output = T>) -> Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build()?;
    Ok(actix_rt::System::with_tokio_rt(|| runtime).block_on(future))
}

fn simulate(seed: u64, tells: bool) -> Result<Report> {
    held(run(seed, tells))
}

fn number(variable: &str) -> Result<Option<u64>> {
    env::var(variable).ok().map(|text| text.parse().with_context(|| format!("{variable} is not a number"))).transpose()
}

fn explain(report: &Report) -> String {
    format!(
        "seed {} breaks promises: {:#?}\n{:?}\nsee it again: STRAND_SEED={} cargo test -p strandline-tests --test simulation seeds -- --nocapture",
        report.seed, report.broken, report.plan, report.seed
    )
}

/// Does `work` for every number below `count`, on as many threads as there are processors, until one fails.
fn share_out(count: u64, work: impl Fn(u64) -> Result<()> + Sync) -> Result<()> {
    let next = AtomicU64::new(0);
    let threads = thread::available_parallelism().map_or(1, usize::from);
    thread::scope(|scope| {
        let worker = || -> Result<()> {
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return Ok(());
                }
                // The others stop, too.
                work(number).inspect_err(|_| next.store(count, Ordering::Relaxed))?;
            }
        };
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        for worker in workers {
            match worker.join() {
                Ok(result) => result?,
                Err(_) => bail!("a thread panicked"),
            }
        }
        Ok(())
    })
}

#[test]
fn the_same_seed_gives_the_same_trace() -> Result<()> {
    for seed in 0..60 {
        let (first, second) = (simulate(seed, true)?, simulate(seed, true)?);
        let differs = first.trace.2.iter().zip(&second.trace.2).find(|(one, other)| one != other);
        ensure!(differs.is_none(), "seed {seed}: {differs:?}");
        ensure!(first.trace.0 == second.trace.0, "seed {seed}: one trace goes on where the other ends");
    }
    Ok(())
}

/// Those that have found something once.
#[test]
fn seeds_that_broke_a_promise_before_its_fault_was_fixed_keep_it_now() -> Result<()> {
    let seeds = include_str!("../seeds.txt").lines().filter(|line| !line.starts_with('#'));
    for line in seeds {
        let seed = line.split_whitespace().next().context("an empty line")?;
        let report = simulate(seed.parse().context("not a seed")?, false)?;
        ensure!(report.broken.is_empty(), "{}", explain(&report));
    }
    Ok(())
}

#[test]
fn seeds_of_the_simulated_world_keep_every_promise() -> Result<()> {
    if let Some(seed) = number("STRAND_SEED")? {
        let report = simulate(seed, true)?;
        println!("{}", report.trace.2.join("\n"));
        ensure!(report.broken.is_empty(), "{}", explain(&report));
        return Ok(());
    }
    let (seeds, first) = (number("STRAND_SEEDS")?.unwrap_or(SEEDS), number("STRAND_FIRST_SEED")?.unwrap_or(0));
    let (snapshots, restores, connections) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicU64::new(0));
    share_out(seeds, |seed| {
        let report = simulate(first + seed, false)?;
        ensure!(report.broken.is_empty(), "{}", explain(&report));
        snapshots.fetch_add(report.snapshots, Ordering::Relaxed);
        restores.fetch_add(report.restores, Ordering::Relaxed);
        connections.fetch_add(report.connections, Ordering::Relaxed);
        Ok(())
    })?;
    println!("{seeds} seeds, {snapshots:?} snapshots, {restores:?} restores, {connections:?} connections");
    Ok(())
}

/// A backup over one stream of more than 64 KiB, and its restore: the connections of the backup are 0 (control) and 1 (data),
/// those of the restore 2 and 3.
#[test]
fn s21_a_session_that_is_cut_at_any_byte_in_any_way_ends_well() -> Result<()> {
    let stride = number("STRAND_STRIDE")?.unwrap_or(STRIDE).max(1);
    let cuts = AtomicU64::new(0);
    for (connection, way) in [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0), (3, 1)] {
        for ending in [Ending::Reset, Ending::Finish, Ending::Stall] {
            let before = cuts.load(Ordering::Relaxed);
            let offsets = SESSION_BYTES / stride;
            // Beyond the last byte nothing is cut, and the rest of the offsets need no run.
            let end = AtomicU64::new(u64::MAX);
            share_out(offsets, |number| {
                let after = number * stride;
                if after > end.load(Ordering::Relaxed) {
                    return Ok(());
                }
                let cut = OneCut { connection, way, after, ending };
                let report = held(run_plan(1, Plan::one_cut(cut), false))?;
                ensure!(report.broken.is_empty(), "{cut:?}: {:#?}", report.broken);
                ensure!((report.snapshots, report.restores) == (1, 1), "{cut:?}: {report:?}");
                cuts.fetch_add(report.cuts, Ordering::Relaxed);
                if report.cuts == 0 {
                    end.fetch_min(after, Ordering::Relaxed);
                }
                Ok(())
            })?;
            let here = cuts.load(Ordering::Relaxed) - before;
            ensure!(here > 0, "connection {connection}, way {way}: nothing was cut");
            println!("connection {connection}, way {way}, {ending:?}: {here} cuts");
        }
    }
    println!("{cuts:?} cuts, each at another byte or in another way");
    Ok(())
}

/// What finds a bug: its seed, and the promise that was broken.
fn hunt(bug: Bug) -> Result<Option<(u64, String)>> {
    plant(Some(bug));
    let mut found = None;
    for seed in 0..SEEDS_FOR_A_BUG {
        if let Some(broken) = simulate(seed, false)?.broken.first() {
            found = Some((seed, broken.clone()));
            break;
        }
    }
    plant(None);
    Ok(found)
}

#[test]
fn every_planted_bug_is_found() -> Result<()> {
    let escaped = parking_lot::Mutex::new(Vec::new());
    share_out(ALL.len() as u64, |number| {
        let bug = *ALL.get(usize::try_from(number)?).context("no such bug")?;
        match hunt(bug)? {
            Some((seed, broken)) => println!("{bug:?}: seed {seed}, {broken}"),
            None => escaped.lock().push(bug),
        }
        Ok(())
    })?;
    let escaped = escaped.into_inner();
    ensure!(escaped.is_empty(), "not found within {SEEDS_FOR_A_BUG} seeds: {escaped:?}");
    Ok(())
}
