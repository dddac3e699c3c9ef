//! Backups and restores over a long, slow link: 75 ms each way, and every connection limited to an eighth of the link.
//!
//! `cargo build --release --workspace && cargo bench -p strandline-tests --bench long_link`. Real processes, through the
//! proxy of the tests. What is told is what passed the proxy, handshakes and acknowledgements included.

use std::time::Duration;

use anyhow::{Context, Result};
use strandline_actors::runtime::clock;
use strandline_tests::process::Process;
use strandline_tests::proxy::{Direction, Plan, Proxy};
use strandline_tests::rig::{Agent, Rig, random_files};

/// Of the link, each way.
const DELAY: Duration = Duration::from_millis(75);
const CONNECTION_BYTES_PER_SECOND: u64 = 5_000_000;
const CONNECTIONS: u64 = 8;
/// What a restore opens.
const RESTORE_CONNECTIONS: u64 = 4;
/// Random bytes, so that as much is sent as is read.
const LARGE_FILES: usize = 5;
const LARGE_FILE_BYTES: usize = 160_000_000;
const SMALL_FILES: usize = 20_000;
const SMALL_FILE_BYTES: usize = 2_000;
/// The rate counts from here on.
const WARM: usize = 10;
const PATIENCE: Duration = Duration::from_mins(5);

fn main() -> Result<()> {
    let rig = Rig::proxied()?;
    let agent = rig.owner("far")?;
    let (large, small) = (rig.scratch().join("large"), rig.scratch().join("small"));
    random_files(&large, 1, LARGE_FILES, LARGE_FILE_BYTES)?;
    random_files(&small, 2, SMALL_FILES, SMALL_FILE_BYTES)?;
    rig.plan(Plan { delay: DELAY, bytes_per_second: Some(CONNECTION_BYTES_PER_SECOND), ..Plan::default() })?;
    println!(
        "{} ms there and back, {} MB/s for each connection\n",
        2 * DELAY.as_millis(),
        mb(CONNECTION_BYTES_PER_SECOND)
    );

    let proxy = rig.proxy()?;
    let streams = CONNECTIONS.to_string();
    let backup = agent.start_backup(&large, &["--streams", &streams])?;
    report("large files, backup", CONNECTIONS, &rates(proxy, Direction::ToServer, backup)?);
    let target = rig.scratch().join("restored");
    let restore = Process::spawn(&mut restoring(&agent, &target)?)?;
    report("large files, restore", RESTORE_CONNECTIONS, &rates(proxy, Direction::ToClient, restore)?);

    for what in ["first backup", "unchanged"] {
        let began = clock::now();
        agent.backup(&small, &["--streams", &streams])?;
        let seconds = clock::now().saturating_duration_since(began).as_secs_f64();
        println!("{SMALL_FILES} small files, {what}: {seconds:.1} s");
    }
    Ok(())
}

fn restoring(agent: &Agent, target: &std::path::Path) -> Result<std::process::Command> {
    let target = target.to_str().context("the target's name is not text")?;
    agent.command(&["restore", "latest", "--target", target])
}

/// Bytes that passed in each second until the process has ended.
fn rates(proxy: &Proxy, direction: Direction, mut process: Process) -> Result<Vec<u64>> {
    let mut passed = vec![proxy.carried_bytes(direction)];
    while process.is_running() {
        std::thread::sleep(Duration::from_secs(1));
        passed.push(proxy.carried_bytes(direction));
    }
    let status = process.wait(PATIENCE)?.context("it goes on for ever")?;
    anyhow::ensure!(status.success(), "it failed: {}", process.output());
    Ok(passed.iter().zip(passed.iter().skip(1)).map(|(before, after)| after - before).collect())
}

/// The first seconds are the way up, the last two the way down.
fn report(what: &str, connections: u64, rates: &[u64]) {
    let steady = rates.get(WARM..rates.len().saturating_sub(2)).unwrap_or_default();
    let mean = steady.iter().sum::<u64>() / (steady.len() as u64).max(1);
    let link = connections * CONNECTION_BYTES_PER_SECOND;
    println!("{what}, {connections} connections: MB in each second: {}", list(rates));
    println!("after {WARM} s: {} of {} MB/s, {} %\n", mb(mean), mb(link), mean * 100 / link);
}

fn list(rates: &[u64]) -> String {
    rates.iter().map(|rate| mb(*rate).to_string()).collect::<Vec<_>>().join(" ")
}

fn mb(bytes: u64) -> u64 {
    (bytes + 500_000) / 1_000_000
}
