//! Sessions with many streams: how they begin, how they end, and what is left of them.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use strandline_tests::process::Process;
use strandline_tests::rig::{PATIENCE, Rig, Summary, is_long, random_files};
use strandline_tests::sockets;

/// What must not stand in any log after runs in which nothing went wrong.
const TROUBLE: [&str; 7] = ["refused", "not found", "unknown session", "timed out", "no progress", "WARN", "ERROR"];

fn ensure_no_trouble(what: &str, log: &str) -> Result<()> {
    let lines: Vec<_> = log.lines().filter(|line| TROUBLE.iter().any(|word| line.contains(word))).collect();
    ensure!(lines.is_empty(), "{what} tells of trouble where there was none:\n{}", lines.join("\n"));
    Ok(())
}

#[test]
fn s01_many_sessions_of_twelve_streams_open_at_once_and_no_join_is_refused() -> Result<()> {
    let rig = Rig::with(&[("STRAND_SERVER_MAX_STREAMS", "12")])?;
    let (agents, rounds) = if is_long() { (12, 20) } else { (8, 3) };
    let owner = rig.owner("agent-0")?;
    let mut machines = vec![owner.clone()];
    for n in 1..agents {
        machines.push(rig.second(&format!("agent-{n}"), &owner)?);
    }
    for round in 0..rounds {
        let mut running = Vec::new();
        for (n, machine) in machines.iter().enumerate() {
            let source = rig.scratch().join(format!("source-{round}-{n}"));
            random_files(&source, (round * 100 + n) as u64, 24, 256 << 10)?;
            let options = ["--streams", "12", "-v", "--host", &format!("agent-{n}")];
            running.push(Process::spawn(&mut machine.backup_command(&source, &options)?)?);
        }
        for mut backup in running {
            let status = backup.wait(PATIENCE)?.context("a backup does not end")?;
            ensure!(status.success(), "{status}: {}", backup.output());
            ensure_no_trouble("an agent", &backup.output())?;
            let summary = Summary::of(&backup.stdout_text(), String::new())?;
            ensure!(summary.count("reconnects")? == 0, "{summary:?}");
        }
    }
    ensure_no_trouble("the server", &rig.log())?;
    ensure!(owner.snapshots()?.len() == agents * rounds);
    Ok(())
}

#[test]
fn s02_after_each_of_many_backups_no_socket_is_left_open_and_no_stream_has_come_back() -> Result<()> {
    let rig = Rig::with(&[("STRAND_SERVER_MAX_STREAMS", "12")])?;
    let port = rig.address().port();
    let agent = rig.owner("agent")?;
    let runs: u64 = if is_long() { 100 } else { 20 };
    for run in 0..runs {
        let source = rig.scratch().join(format!("source-{run}"));
        random_files(&source, run, 40, 256 << 10)?;
        let summary = agent.backup(&source, &["--streams", "12", "-v"])?;
        sockets::wait_until_none_open(port, Duration::from_secs(5)).with_context(|| format!("after run {run}"))?;
        ensure!(summary.count("reconnects")? == 0, "run {run}: {summary:?}");
        ensure_no_trouble("the agent", &summary.stderr)?;
        std::fs::remove_dir_all(&source)?;
    }
    ensure_no_trouble("the server", &rig.log())?;
    ensure!(agent.snapshots()?.len() as u64 == runs);
    Ok(())
}

#[test]
fn s16_what_a_backup_says_is_done_survives_the_servers_death_at_that_moment() -> Result<()> {
    let mut rig = Rig::direct()?;
    let writer = rig.owner("writer")?;
    let reader = rig.second("reader", &writer)?;
    for round in 0..3 {
        let source = rig.scratch().join(format!("source-{round}"));
        random_files(&source, round, 30, 200 << 10)?;
        let mut backup = writer.start_backup(&source, &["--streams", "8"])?;
        let status = backup.wait(PATIENCE)?.context("the backup does not end")?;
        rig.kill_server();
        ensure!(status.success(), "{}", backup.output());
        rig.start_server()?;
        let target = rig.scratch().join(format!("restored-{round}"));
        reader.restore_and_compare("latest", &source, &source, &target)?;
    }
    ensure!(reader.snapshots()?.len() == 3);
    rig.ensure_no_panic()
}
