//! Seeds of the simulated world. `STRAND_SEEDS=N` runs N of them, `STRAND_SEED=S` one, with its trace in words.

use std::env;

use anyhow::{Context, Result, ensure};
use strandline_tests::world::run::{Report, run};

/// Seeds of an ordinary run.
const SEEDS: u64 = 2000;

/// Runs a seed on a runtime whose time stands still while anybody works.
fn simulate(seed: u64, tells: bool) -> Result<Report> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build()?;
    Ok(actix_rt::System::with_tokio_rt(|| runtime).block_on(run(seed, tells)))
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

#[test]
fn seeds_of_the_simulated_world_keep_every_promise() -> Result<()> {
    if let Some(seed) = number("STRAND_SEED")? {
        let report = simulate(seed, true)?;
        println!("{}", report.trace.2.join("\n"));
        ensure!(report.broken.is_empty(), "{}", explain(&report));
        return Ok(());
    }
    let seeds = number("STRAND_SEEDS")?.unwrap_or(SEEDS);
    let (mut snapshots, mut connections) = (0, 0);
    let mut broken = Vec::new();
    for seed in 0..seeds {
        let report = simulate(seed, false)?;
        snapshots += report.snapshots;
        connections += report.connections;
        if !report.broken.is_empty() {
            broken.push(explain(&report));
        }
        ensure!(broken.len() < 5, "{}", broken.join("\n\n"));
    }
    ensure!(broken.is_empty(), "{}", broken.join("\n\n"));
    println!("{seeds} seeds, {snapshots} snapshots, {connections} connections");
    Ok(())
}
