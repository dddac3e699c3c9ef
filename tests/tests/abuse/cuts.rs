//! Scenario 21 on the real programs: TLS connections of backups, cut after exactly so many bytes, anywhere.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use strandline_actors::runtime::clock;
use strandline_tests::process::descriptors;
use strandline_tests::proxy::{Cut, Direction, Fault, Plan};
use strandline_tests::random::Random;
use strandline_tests::raw::SILENCE;
use strandline_tests::rig::{PATIENCE, Rig, Summary, is_long, random_files};
use strandline_tests::sockets;

/// What a control connection of such a backup carries each way, about: TLS handshake, greeting, session, commit.
const CONTROL_BYTES: u64 = 5_000;
/// What a stream carries, about: its handshake and one block.
const STREAM_BYTES: u64 = 40_000;
/// Descriptors that a server may have open for its own files at one moment and not at another.
const FILES_MAX: usize = 8;

/// What a lane of runs came to.
#[derive(Debug, Default)]
struct Lane {
    runs: u64,
    cuts: u64,
}

/// How many cuts in how many lanes: few in an ordinary run, or what `STRAND_CUTS` says.
fn amount() -> Result<(u64, u64)> {
    match std::env::var("STRAND_CUTS") {
        Ok(text) => Ok((text.parse().context("STRAND_CUTS is not a number")?, 8)),
        Err(_) => Ok(if is_long() { (2_000, 8) } else { (60, 2) }),
    }
}

/// Cuts for the first connections of one run. A command that cannot reach its server three times at its start gives up, so
/// the third connection is spared where the first two may break early.
fn plan(random: &mut Random, with_stalls: bool) -> Plan {
    let mut cut = |connection| {
        let most = if connection == 0 { CONTROL_BYTES } else { STREAM_BYTES };
        // Half of them in the handshake, the greeting and the first messages.
        let most = if random.percent(50) { CONTROL_BYTES } else { most };
        Cut {
            connection: Some(connection),
            direction: if random.percent(50) { Direction::ToServer } else { Direction::ToClient },
            after_bytes: random.below(most),
            fault: match random.below(if with_stalls { 5 } else { 4 }) {
                0 | 1 => Fault::Reset,
                2 | 3 => Fault::Finish,
                _ => Fault::Stall,
            },
        }
    };
    Plan { cuts: [0, 1, 3, 4, 5].into_iter().map(&mut cut).collect(), ..Plan::default() }
}

/// Backs up again and again through a network that breaks by plan until `wanted` connections have been cut. Each run ends
/// well by itself and makes exactly one snapshot that restores.
fn lane(seed: u64, wanted: u64, with_stalls: bool) -> Result<Lane> {
    let mut rig = Rig::proxied()?;
    let writer = rig.owner("writer")?;
    let reader = rig.second("reader", &writer)?;
    let source = rig.scratch().join("source");
    random_files(&source, seed, 4, 20 << 10)?;
    let mut expected = vec![writer.backup(&source, &[])?.snapshot()?];
    let server = rig.server()?.id();
    let idle = descriptors(server)?;
    let mut random = Random::new(seed);
    while rig.proxy()?.planned_cuts() < wanted {
        let round = expected.len();
        fs::write(source.join("changing"), random.bytes(30_000))?;
        let plan = plan(&mut random, with_stalls);
        rig.plan(plan.clone())?;
        let what = || format!("seed {seed}, round {round}, {plan:?}");
        let mut backup = writer.start_backup(&source, &["--streams", "2"])?;
        // Each stall costs the minute after which a connection without progress is given up.
        let status =
            backup.wait(PATIENCE + 6 * SILENCE)?.with_context(|| format!("{}: {}", what(), backup.output()))?;
        rig.plan(Plan::default())?;
        ensure!(status.success(), "{}: {status}: {}\nserver:\n{}", what(), backup.output(), rig.log());
        backup.ensure_no_panic()?;
        expected.push(Summary::of(&backup.stdout_text(), backup.output())?.snapshot()?);
        let found = reader.snapshots()?;
        ensure!(found == expected, "{}: {found:?} instead of {expected:?}", what());
        let target = rig.scratch().join(format!("restored-{round}"));
        reader.restore_and_compare("latest", &source, &source, &target).with_context(what)?;
        fs::remove_dir_all(target)?;
        if round.is_multiple_of(25) {
            // A long campaign that is cut short has shown something, too.
            eprintln!("seed {seed}: {} cuts in {round} runs so far", rig.proxy()?.planned_cuts());
        }
    }
    let cuts = rig.proxy()?.planned_cuts();
    // The network forgets what it holds; then nobody has a socket any more.
    rig.proxy()?.cut_all(Fault::Reset);
    sockets::wait_until_none_open(rig.address().port(), SILENCE)?;
    let end = clock::now() + SILENCE;
    while descriptors(server)? > idle + FILES_MAX {
        ensure!(clock::now() < end, "{} descriptors instead of {idle}", descriptors(server)?);
        thread::sleep(Duration::from_millis(100));
    }
    rig.ensure_no_panic()?;
    Ok(Lane { runs: expected.len() as u64 - 1, cuts })
}

#[test]
fn s21_tls_connections_cut_after_any_number_of_bytes_leave_one_good_snapshot_per_run_and_no_socket() -> Result<()> {
    let (wanted, lanes) = amount()?;
    let began = clock::now();
    let with_stalls = wanted > 100;
    let running: Vec<_> =
        (0..lanes).map(|n| thread::spawn(move || lane(2_100 + n, wanted.div_ceil(lanes), with_stalls))).collect();
    let mut total = Lane::default();
    for lane in running {
        let lane = lane.join().ok().context("a lane panicked")??;
        total = Lane { runs: total.runs + lane.runs, cuts: total.cuts + lane.cuts };
    }
    eprintln!("{} cuts in {} runs in {:.0} s", total.cuts, total.runs, began.elapsed().as_secs_f64());
    ensure!(total.cuts >= wanted);
    Ok(())
}
