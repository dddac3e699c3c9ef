//! Processes that are killed at any moment, and processes that exist twice.

use std::fs;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use strandline_actors::runtime::clock;
use strandline_tests::process::Process;
use strandline_tests::proxy::Direction;
use strandline_tests::random::Random;
use strandline_tests::rig::{PATIENCE, Rig, Summary, is_long, number, random_files, settle};

const MIB: u64 = 1 << 20;

#[test]
fn s23_an_agent_killed_at_any_moment_sends_nothing_acknowledged_again_and_harms_no_earlier_snapshot() -> Result<()> {
    let rig = Rig::proxied()?;
    let writer = rig.owner("writer")?;
    let earlier = rig.scratch().join("earlier");
    random_files(&earlier, 22, 10, 50 << 10)?;
    let kept = writer.backup(&earlier, &[])?.snapshot()?;
    let mut random = Random::new(23);
    for round in 0..if is_long() { 40 } else { 4 } {
        let source = rig.scratch().join(format!("source-{round}"));
        random_files(&source, round, 56, 512 << 10)?;
        let total = 28 * MIB;
        let start = rig.proxy()?.carried_bytes(Direction::ToServer);
        let sent = 12 * MIB + random.below(12 * MIB);
        let mut backup = writer.start_backup(&source, &["--limit-upload", "24M", "--window", "6M"])?;
        rig.proxy()?.wait_for_bytes(Direction::ToServer, start + sent, PATIENCE)?;
        backup.kill();
        ensure!(writer.snapshots()?.len() as u64 == round + 1, "a killed run leaves no snapshot");
        let summary = writer.backup(&source, &[])?;
        // At most the window was not acknowledged; a mebibyte is allowed for what TLS and frames add.
        let again = summary.count("bytes_stored")?;
        ensure!(again <= total - sent + 6 * MIB + MIB, "{sent} of {total} were sent, then {again} again");
        rig.ensure_restores(&writer, &summary.snapshot()?, &source, &source)?;
        rig.ensure_restores(&writer, &kept, &earlier, &earlier)?;
    }
    rig.ensure_no_panic()
}

/// A server that is killed in the middle of a backup, and killed again and again while it recovers from that, at any moment.
struct Kills {
    random: Random,
    total: u64,
    /// Of those, how many hit a server that was starting.
    nested: u64,
    /// How long the last start took that nobody disturbed.
    start: Duration,
}

impl Kills {
    fn kill(&mut self, rig: &mut Rig) -> Result<()> {
        rig.kill_server();
        self.total += 1;
        for _ in 0..self.random.below(4) {
            let mut recovering = Process::spawn(&mut rig.server_command(&["serve"])?)?;
            let moment = self.random.below(u64::try_from(self.start.as_micros())?);
            thread::sleep(Duration::from_micros(moment));
            recovering.kill();
            recovering.ensure_no_panic()?;
            self.total += 1;
            self.nested += 1;
        }
        let began = clock::now();
        rig.start_server()?;
        self.start = began.elapsed();
        Ok(())
    }
}

#[test]
fn s24_s25_a_server_killed_at_any_moment_and_while_it_recovers_comes_back_and_the_backup_ends_well() -> Result<()> {
    let mut rig = Rig::proxied()?;
    let writer = rig.owner("writer")?;
    let reader = rig.second("reader", &writer)?;
    let seed = number("STRAND_SEED", 24);
    let mut kills = Kills { random: Random::new(seed), total: 0, nested: 0, start: Duration::from_millis(100) };
    let (wanted, mut kept) = (number("STRAND_KILLS", if is_long() { 2_000 } else { 30 }), Vec::new());
    for round in 0.. {
        let source = rig.scratch().join(format!("source-{round}"));
        random_files(&source, kills.random.number(), 64, 256 << 10)?;
        let mut backup =
            writer.start_backup(&source, &["--limit-upload", "32M", "--streams", "1", "--window", "6M"])?;
        while backup.is_running() && kills.total < wanted {
            // Mostly a block or two are acknowledged: an agent that gets nowhere waits longer and longer before it tries again.
            let bytes = MIB + kills.random.below(5 * MIB);
            rig.wait_until_sent(&mut backup, bytes)?;
            kills.kill(&mut rig)?;
        }
        let told = || format!("seed {seed}, round {round}, kill {}", kills.total);
        let summary = Summary::at_end_of(backup).with_context(told)?;
        kept.push((summary.snapshot()?, source));
        let found = reader.snapshots()?;
        ensure!(found.iter().eq(kept.iter().map(|(id, _)| id)), "{}: {found:?} instead of {kept:?}", told());
        // One of those that have been there for a while.
        if let Some((snapshot, source)) = kept.get(Random::new(kills.total).index(kept.len())) {
            rig.ensure_restores(&reader, snapshot, source, source).with_context(told)?;
        }
        if kept.len() > 6 {
            let (snapshot, source) = kept.remove(0);
            writer.run(&["forget", &snapshot])?.expect_code(0)?;
            fs::remove_dir_all(source)?;
        }
        if kills.total >= wanted {
            break;
        }
    }
    for (snapshot, source) in &kept {
        rig.ensure_restores(&reader, snapshot, source, source)?;
    }
    reader.run(&["check", "--read-data"])?.expect_code(0)?;
    println!(
        "seed {seed}: {} kills, {} of them of a server that was starting; nothing lost",
        kills.total, kills.nested
    );
    rig.ensure_no_panic()
}

#[test]
fn s06_a_server_killed_while_it_commits_makes_exactly_one_snapshot() -> Result<()> {
    let mut rig = Rig::proxied()?;
    let writer = rig.owner("writer")?;
    let source = rig.scratch().join("source");
    random_files(&source, 61, 40, 4 << 10)?;
    let mut random = Random::new(62);
    for round in 0..if is_long() { 100 } else { 5 } {
        fs::write(source.join("changing"), random.bytes(100_000))?;
        let start = rig.proxy()?.carried_bytes(Direction::ToServer);
        let backup = writer.start_backup(&source, &["--streams", "2"])?;
        rig.proxy()?.wait_for_bytes(Direction::ToServer, start + 100_000 + random.below(8_000), PATIENCE)?;
        rig.kill_server();
        rig.start_server()?;
        let summary =
            Summary::at_end_of(backup).with_context(|| format!("round {round}; the server:\n{}", rig.last_words()))?;
        let ids = writer.snapshots()?;
        ensure!(ids.len() as u64 == round + 1 && ids.last() == Some(&summary.snapshot()?), "round {round}: {ids:?}");
        rig.ensure_restores(&writer, &summary.snapshot()?, &source, &source)?;
    }
    rig.ensure_no_panic()
}

#[test]
fn s24_a_server_told_to_stop_does_so_within_ten_seconds_and_the_backup_ends_well_after_its_return() -> Result<()> {
    let mut rig = Rig::proxied()?;
    let writer = rig.owner("writer")?;
    let source = rig.scratch().join("source");
    random_files(&source, 26, 100, 256 << 10)?;
    let start = rig.proxy()?.carried_bytes(Direction::ToServer);
    let backup = writer.start_backup(&source, &["--limit-upload", "8M", "--streams", "4"])?;
    rig.proxy()?.wait_for_bytes(Direction::ToServer, start + 8 * MIB, PATIENCE)?;
    rig.stop_server(Duration::from_secs(10))?;
    rig.start_server()?;
    let summary = Summary::at_end_of(backup)?;
    ensure!(writer.snapshots()? == [summary.snapshot()?]);
    rig.ensure_restores(&writer, &summary.snapshot()?, &source, &source)?;
    let log = rig.log();
    ensure!(!log.contains("ERROR") && !log.contains("panicked"), "{log}");
    Ok(())
}

#[test]
fn s32_two_machines_with_one_identity_at_the_same_time_do_not_mix() -> Result<()> {
    let rig = Rig::direct()?;
    let original = rig.owner("original")?;
    let (ours, theirs) = (rig.scratch().join("ours"), rig.scratch().join("theirs"));
    random_files(&ours, 32, 40, 200 << 10)?;
    random_files(&theirs, 33, 40, 200 << 10)?;
    settle();
    let mut expected = vec![original.backup(&ours, &[])?.snapshot()?];
    let clone = original.clone_to(&rig.scratch().join("clone"))?;
    for round in 0..4 {
        fs::write(ours.join("changing"), format!("ours {round}"))?;
        fs::write(theirs.join("changing"), format!("theirs {round}"))?;
        let slowly = ["--limit-upload", "16M"];
        // The same paths of both in the second half: then their caches have one name, too.
        let second = if round < 2 { &theirs } else { &ours };
        let (one, two) = (original.start_backup(&ours, &slowly)?, clone.start_backup(second, &slowly)?);
        let (one, two) = (Summary::at_end_of(one)?.snapshot()?, Summary::at_end_of(two)?.snapshot()?);
        rig.ensure_restores(&clone, &one, &ours, &ours)?;
        rig.ensure_restores(&original, &two, second, second)?;
        expected.extend([one, two]);
    }
    let mut found = original.snapshots()?;
    found.sort();
    expected.sort();
    ensure!(found == expected, "{found:?} instead of {expected:?}");
    rig.ensure_no_panic()
}

#[test]
fn s37_a_lost_catalog_and_index_are_made_anew_with_the_same_snapshots() -> Result<()> {
    let mut rig = Rig::direct()?;
    let writer = rig.owner("writer")?;
    let reader = rig.second("reader", &writer)?;
    let source = rig.scratch().join("source");
    random_files(&source, 37, 40, 100 << 10)?;
    settle();
    writer.backup(&source, &[])?;
    fs::write(source.join("another"), "file")?;
    settle();
    writer.backup(&source, &[])?;
    let before = reader.snapshots()?;
    for is_killed in [false, true] {
        if is_killed {
            rig.kill_server();
        } else {
            rig.stop_server(Duration::from_secs(10))?;
        }
        for entry in fs::read_dir(rig.data())? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("catalog.sqlite")) {
                fs::remove_file(path)?;
            }
        }
        let mut indexes = 0;
        for repository in fs::read_dir(rig.data().join("storage/acme"))? {
            fs::remove_dir_all(repository?.path().join("index"))?;
            indexes += 1;
        }
        ensure!(indexes == 1);
        rig.start_server()?;
        ensure!(reader.snapshots()? == before);
        let target = rig.scratch().join(format!("restored-{is_killed}"));
        reader.restore_and_compare("latest", &source, &source, &target)?;
        let again = writer.backup(&source, &["--dry-run"])?;
        ensure!(again.count("files_read")? == 0, "{again:?}");
    }
    // Everything is known again: reading all files sends none of them.
    let forced = writer.backup(&source, &["--force"])?;
    ensure!(forced.count("files_read")? == 41 && forced.count("bytes_stored")? < 20_000, "{forced:?}");
    rig.enrolled("newcomer")?;
    rig.ensure_no_panic()
}
