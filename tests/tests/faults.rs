//! A network that breaks, while backups and restores run.

use std::fs;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use strandline_actors::runtime::clock;
use strandline_tests::compare::ensure_same;
use strandline_tests::process::Process;
use strandline_tests::proxy::{Cut, Direction, Fault, Plan};
use strandline_tests::random::Random;
use strandline_tests::rig::{Agent, PATIENCE, Rig, Summary, is_long, random_files};

const MIB: u64 = 1 << 20;

/// Waits for a backup that must end well.
fn finish(mut backup: Process) -> Result<Summary> {
    let status = backup.wait(PATIENCE)?.with_context(|| format!("no end of:\n{}", backup.output()))?;
    ensure!(status.success(), "{status}:\n{}", backup.output());
    backup.ensure_no_panic()?;
    Summary::of(&backup.stdout_text(), backup.output())
}

fn ensure_restores(rig: &Rig, reader: &Agent, snapshot: &str, source: &Path) -> Result<()> {
    let target = rig.scratch().join(format!("restored-{}", snapshot.get(..12).unwrap_or(snapshot)));
    reader.restore_and_compare(snapshot, source, source, &target)?;
    Ok(fs::remove_dir_all(target)?)
}

#[test]
fn s04_all_connections_die_again_and_again_and_the_same_run_ends_well() -> Result<()> {
    let rig = Rig::proxied()?;
    let writer = rig.owner("writer")?;
    let source = rig.scratch().join("source");
    random_files(&source, 4, 100, 256 << 10)?;
    let start = rig.proxy()?.carried_bytes(Direction::ToServer);
    let backup = writer.start_backup(&source, &["--streams", "6", "--limit-upload", "6M", "--window", "8M"])?;
    for (n, fault) in [Fault::Reset, Fault::Finish, Fault::Reset].into_iter().enumerate() {
        let carried = start + (n as u64 + 1) * 5 * MIB;
        rig.proxy()?.wait_for_bytes(Direction::ToServer, carried, PATIENCE)?;
        ensure!(rig.proxy()?.cut_all(fault) > 1);
    }
    let summary = finish(backup)?;
    ensure!(summary.count("reconnects")? > 0, "{summary:?}");
    ensure!(writer.snapshots()? == [summary.snapshot()?]);
    ensure_restores(&rig, &writer, &summary.snapshot()?, &source)?;
    rig.ensure_no_panic()
}

#[test]
fn s04_s21_connections_cut_at_any_byte_in_any_direction_cost_nothing_but_time() -> Result<()> {
    let rig = Rig::proxied()?;
    let writer = rig.owner("writer")?;
    let reader = rig.second("reader", &writer)?;
    let (mut cuts, rounds) = (0, if is_long() { 300 } else { 14 });
    let mut random = Random::new(21);
    for round in 0..rounds {
        let source = rig.scratch().join(format!("source-{round}"));
        random_files(&source, round, 20, 400 << 10)?;
        // The first connection is the control connection, then come data and whatever replaces them. The offsets lie in
        // the handshake, in the greeting, or anywhere in the data.
        let most = [2_500, 5_000, 1_500_000][random.index(3)];
        let mut plan = Plan::seeded(random.number(), 5 + random.below(4), most);
        for cut in &mut plan.cuts {
            if cut.fault == Fault::Stall {
                cut.fault = Fault::Reset;
            }
        }
        // A command that cannot reach its server three times at its very start gives up; that is not what is tested.
        plan.cuts.retain(|cut| cut.after_bytes > 4_000 || cut.connection.is_none_or(|number| number > 0));
        // A run must not end before it misses what it lost.
        plan.bytes_per_second = Some(3 * MIB);
        rig.plan(plan.clone())?;
        let before = rig.proxy()?.connections();
        let outcome = finish(writer.start_backup(&source, &["--streams", "4"])?);
        rig.plan(Plan::default())?;
        let summary = outcome.with_context(|| format!("round {round}, {plan:?}"))?;
        // The control connection and four streams; whatever comes more replaces a lost one.
        cuts += u64::from(rig.proxy()?.connections() > before + 5);
        ensure_restores(&rig, &reader, &summary.snapshot()?, &source)?;
    }
    ensure!(cuts >= rounds / 3, "only {cuts} of {rounds} runs lost a connection that they needed");
    ensure!(reader.snapshots()?.len() as u64 == rounds, "each run makes exactly one snapshot");
    rig.ensure_no_panic()
}

/// A backup during which connection `stalled` (0 is the control connection) says nothing more after so many bytes.
fn stalled(connection: u64, after_bytes: u64) -> Result<()> {
    let rig = Rig::proxied()?;
    let writer = rig.owner("writer")?;
    let source = rig.scratch().join("source");
    random_files(&source, 5, 60, 256 << 10)?;
    let cut = Cut { connection: Some(connection), direction: Direction::ToServer, after_bytes, fault: Fault::Stall };
    rig.plan(Plan { cuts: vec![cut], ..Plan::default() })?;
    let began = clock::now();
    let backup = writer.start_backup(&source, &["--streams", "4", "--limit-upload", "6M"])?;
    if is_long() {
        // And then all of them at once.
        let now = rig.proxy()?.carried_bytes(Direction::ToServer);
        rig.proxy()?.wait_for_bytes(Direction::ToServer, now + 5 * MIB, PATIENCE)?;
        ensure!(rig.proxy()?.cut_all(Fault::Stall) > 1);
    }
    let summary = finish(backup)?;
    ensure!(began.elapsed() > Duration::from_secs(55), "nothing has stalled: {summary:?}");
    ensure!(writer.snapshots()? == [summary.snapshot()?]);
    ensure_restores(&rig, &writer, &summary.snapshot()?, &source)?;
    rig.ensure_no_panic()
}

#[test]
fn s21_a_stream_that_stalls_without_a_word_is_given_up_and_the_run_ends_well() -> Result<()> {
    stalled(2, MIB)
}

#[test]
fn s21_a_control_connection_that_stalls_without_a_word_is_given_up_and_the_run_ends_well() -> Result<()> {
    stalled(0, 3_000)
}

#[test]
fn s06_acknowledgements_that_are_lost_with_every_stream_do_not_keep_a_committed_run_waiting() -> Result<()> {
    let rig = Rig::proxied()?;
    let writer = rig.owner("writer")?;
    let cut =
        |connection, direction, after_bytes, fault| Cut { connection: Some(connection), direction, after_bytes, fault };
    // The data gets through and the answers do not: the server commits what no stream could acknowledge.
    let cuts = vec![
        cut(1, Direction::ToServer, 2_916, Fault::Reset),
        cut(2, Direction::ToClient, 2_688, Fault::Finish),
        cut(3, Direction::ToServer, 4_401, Fault::Finish),
        cut(4, Direction::ToClient, 1_788, Fault::Finish),
        cut(5, Direction::ToServer, 4_885, Fault::Reset),
    ];
    for round in 0..if is_long() { 200 } else { 12 } {
        let source = rig.scratch().join(format!("source-{round}"));
        random_files(&source, 90_000 + round, 20, 400 << 10)?;
        rig.plan(Plan { cuts: cuts.clone(), ..Plan::default() })?;
        let mut backup = writer.start_backup(&source, &["--streams", "4", "-v"])?;
        let status = backup.wait(Duration::from_secs(30))?;
        ensure!(status.is_some_and(|status| status.success()), "round {round}: {status:?}:\n{}", backup.output());
        fs::remove_dir_all(&source)?;
    }
    rig.ensure_no_panic()
}

#[test]
fn s06_the_control_connection_dies_around_the_commit_and_there_is_exactly_one_snapshot() -> Result<()> {
    let rig = Rig::proxied()?;
    let writer = rig.owner("writer")?;
    let reader = rig.second("reader", &writer)?;
    let source = rig.scratch().join("source");
    random_files(&source, 6, 3, 100 << 10)?;
    writer.backup(&source, &[])?;
    let (mut expected, mut cuts, rounds) = (1, 0, if is_long() { 200 } else { 16 });
    let mut random = Random::new(6);
    for round in 0..rounds {
        fs::write(source.join("changing"), format!("round {round}"))?;
        let proxy = rig.proxy()?;
        let before = proxy.connections();
        // Such a control connection carries about 4 KB each way: from the end of its handshake to the commit's answer.
        let direction = if random.percent(50) { Direction::ToServer } else { Direction::ToClient };
        let cut = Cut {
            connection: Some(0),
            direction,
            after_bytes: 1_500 + random.below(3_000),
            fault: if random.percent(50) { Fault::Reset } else { Fault::Finish },
        };
        rig.plan(Plan { cuts: vec![cut], ..Plan::default() })?;
        let outcome = finish(writer.start_backup(&source, &["--streams", "1"])?);
        rig.plan(Plan::default())?;
        let summary = outcome.with_context(|| format!("round {round}, {cut:?}"))?;
        // Control connection and one stream; whatever comes more replaces a lost one.
        cuts += u64::from(rig.proxy()?.connections() > before + 2);
        expected += 1;
        let ids = reader.snapshots()?;
        ensure!(ids.len() == expected && ids.last() == Some(&summary.snapshot()?), "round {round}: {ids:?}");
        ensure_restores(&rig, &reader, &summary.snapshot()?, &source)?;
    }
    ensure!(cuts > rounds / 4, "only {cuts} of {rounds} cuts hit a connection that was still needed");
    rig.ensure_no_panic()
}

#[test]
fn s21_a_restore_whose_connections_are_cut_brings_everything_back() -> Result<()> {
    let rig = Rig::proxied()?;
    let writer = rig.owner("writer")?;
    let source = rig.scratch().join("source");
    random_files(&source, 7, 60, 256 << 10)?;
    writer.backup(&source, &[])?;
    let mut random = Random::new(8);
    for round in 0..if is_long() { 100 } else { 5 } {
        let mut plan = Plan::seeded(random.number(), 6, 4 * MIB);
        plan.cuts.retain(|cut| cut.fault != Fault::Stall && cut.after_bytes > 6_000);
        rig.plan(plan.clone())?;
        let target = rig.scratch().join(format!("restored-{round}"));
        let outcome = writer.restore("latest", &target);
        rig.plan(Plan::default())?;
        outcome.with_context(|| format!("round {round}, {plan:?}"))?;
        ensure_same(&source, &target.join(source.strip_prefix("/")?))?;
        fs::remove_dir_all(target)?;
    }
    rig.ensure_no_panic()
}

#[test]
fn s47_peers_that_do_not_speak_the_protocol_are_turned_away_and_others_are_served() -> Result<()> {
    use std::io::{Read, Write};
    use std::net::TcpStream;

    let mut rig = Rig::direct()?;
    let agent = rig.owner("agent")?;
    for said in [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".as_slice(), b"\0\0\0\0\0\0\0\0", b"SSH-2.0-x\r\n", &[0xff; 9000]]
    {
        let mut connection = TcpStream::connect(rig.address())?;
        connection.set_read_timeout(Some(Duration::from_secs(20)))?;
        // The server may close before it has read everything.
        let _ = connection.write_all(said);
        let mut answer = Vec::new();
        match connection.read_to_end(&mut answer) {
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => anyhow::bail!("{said:?} is never answered"),
            _ => ensure!(answer.len() < 100, "an alert at most, no data: {answer:?}"),
        }
    }
    rig.server()?.wait_for_line("connection refused", PATIENCE)?;
    let source = rig.scratch().join("source");
    random_files(&source, 9, 3, 1000)?;
    agent.backup(&source, &[])?;
    rig.ensure_no_panic()
}
