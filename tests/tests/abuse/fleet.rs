//! Many machines on one server for a long time, over a network that breaks, to a server that is killed again and again: in
//! the end it holds what it held at the start, and everything that it said was saved is there.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use strandline_actors::runtime::clock;
use strandline_tests::process::{Process, descriptors, resident_bytes};
use strandline_tests::proxy::{Cut, Direction, Fault, Plan};
use strandline_tests::random::Random;
use strandline_tests::raw::SILENCE;
use strandline_tests::rig::{Agent, Rig, Summary, is_long, random_files};
use strandline_tests::sockets;

/// Longest that one backup may take among all the others.
const BACKUP_MAX: Duration = Duration::from_mins(15);
/// What may differ between two quiet moments: files of packs, and of the catalog's log.
const DESCRIPTORS_MORE: usize = 12;
/// The allocator keeps what it had at the peak, and the index and the catalog's cache grow with what is stored.
const BYTES_MORE: u64 = 48 << 20;

/// How many machines, for how long, and how often the server is killed.
struct Size {
    agents: usize,
    span: Duration,
    kill_every: Duration,
}

/// Small in an ordinary run, or `AGENTS,SECONDS,SECONDS-BETWEEN-KILLS` of `STRAND_FLEET`.
fn size() -> Result<Size> {
    let text = match std::env::var("STRAND_FLEET") {
        Ok(text) => text,
        Err(_) => if is_long() { "100,1800,60" } else { "4,12,4" }.to_owned(),
    };
    let numbers = text.split(',').map(str::parse).collect::<Result<Vec<u64>, _>>().context("STRAND_FLEET")?;
    let [agents, span, kill_every] = numbers[..] else { anyhow::bail!("STRAND_FLEET needs three numbers") };
    let (span, kill_every) = (Duration::from_secs(span), Duration::from_secs(kill_every));
    Ok(Size { agents: usize::try_from(agents)?, span, kill_every })
}

/// One machine: backs up its own tree again and again, and remembers what it was told is saved.
struct Machine {
    agent: Agent,
    source: PathBuf,
    host: String,
    saved: Vec<String>,
    random: Random,
}

impl Machine {
    fn back_up(&mut self) -> Result<()> {
        let bytes = 20_000 + self.random.index(200_000);
        fs::write(self.source.join("changing"), self.random.bytes(bytes))?;
        let options = ["--streams", "4", "--host", &self.host];
        let mut backup = Process::spawn(&mut self.agent.backup_command(&self.source, &options)?)?;
        let status = backup.wait(BACKUP_MAX)?.with_context(|| format!("no end of:\n{}", backup.output()))?;
        backup.ensure_no_panic()?;
        // A command that cannot reach its server three times when it begins gives up, and has saved nothing.
        if status.success() {
            self.saved.push(Summary::of(&backup.stdout_text(), backup.output())?.snapshot()?);
        } else {
            let said = backup.output();
            ensure!(status.code() == Some(1) && !said.contains("snapshot_id\":\""), "{status}: {said}");
        }
        Ok(())
    }
}

/// Breaks some of the next connections somewhere.
fn breaking(random: &mut Random) -> Plan {
    let mut cuts = Vec::new();
    for connection in 0..60 {
        if random.percent(25) {
            cuts.push(Cut {
                connection: Some(connection),
                direction: if random.percent(50) { Direction::ToServer } else { Direction::ToClient },
                after_bytes: random.below(120_000),
                fault: match random.below(20) {
                    0 => Fault::Stall,
                    1..=10 => Fault::Reset,
                    _ => Fault::Finish,
                },
            });
        }
    }
    Plan { cuts, ..Plan::default() }
}

/// Descriptors and resident bytes of the server when nobody is connected and no session waits.
fn quiet(rig: &mut Rig) -> Result<(usize, u64)> {
    rig.proxy()?.cut_all(Fault::Reset);
    sockets::wait_until_none_open(rig.address().port(), SILENCE)?;
    let server = rig.server()?.id();
    // Packs of repositories that nobody writes to are closed after a while; sessions expire (10 s, see below).
    let end = clock::now() + Duration::from_secs(12);
    let mut least = usize::MAX;
    while clock::now() < end {
        least = least.min(descriptors(server)?);
        thread::sleep(Duration::from_millis(250));
    }
    Ok((least, resident_bytes(server)?))
}

#[test]
fn s22_s24_a_fleet_on_a_bad_network_and_a_dying_server_leaves_the_server_as_it_was_and_every_snapshot_whole()
-> Result<()> {
    let size = size()?;
    let mut rig = Rig::proxied_with(&[("STRAND_SERVER_SESSION_GRACE", "10s")])?;
    let owner = rig.owner("owner")?;
    let mut machines = Vec::new();
    for n in 0..size.agents {
        let (agent, source) = (rig.second(&format!("agent-{n}"), &owner)?, rig.scratch().join(format!("source-{n}")));
        random_files(&source, n as u64, 3, 40 << 10)?;
        let host = format!("agent-{n}");
        machines.push(Machine { agent, source, host, saved: Vec::new(), random: Random::new(n as u64) });
    }
    // What the first backups leave in memory is not a leak; a restart makes both moments alike.
    everybody(&mut machines, &mut rig)?;
    rig.stop_server(Duration::from_secs(10))?;
    rig.start_server()?;
    everybody(&mut machines, &mut rig)?;
    let before = quiet(&mut rig)?;

    let (done, backups, mut kills) = (AtomicBool::new(false), AtomicU64::new(0), 0);
    let began = clock::now();
    thread::scope(|scope| -> Result<()> {
        let running: Vec<_> = machines
            .iter_mut()
            .map(|machine| {
                scope.spawn(|| -> Result<()> {
                    while !done.load(Ordering::Relaxed) {
                        machine.back_up()?;
                        backups.fetch_add(1, Ordering::Relaxed);
                    }
                    Ok(())
                })
            })
            .collect();
        let mut random = Random::new(22);
        let storm = (|| -> Result<()> {
            let mut killed = clock::now();
            while began.elapsed() < size.span {
                rig.plan(breaking(&mut random))?;
                thread::sleep(Duration::from_millis(500));
                if killed.elapsed() >= size.kill_every {
                    rig.kill_server();
                    rig.start_server()?;
                    (kills, killed) = (kills + 1, clock::now());
                    let (cuts, backups) = (rig.proxy()?.planned_cuts(), backups.load(Ordering::Relaxed));
                    eprintln!("{:.0} s: {backups} backups, {cuts} cuts, {kills} kills", began.elapsed().as_secs_f64());
                }
            }
            Ok(())
        })();
        done.store(true, Ordering::Relaxed);
        rig.plan(Plan::default())?;
        storm?;
        for machine in running {
            machine.join().ok().context("a machine panicked")??;
        }
        Ok(())
    })?;
    let cuts = rig.proxy()?.planned_cuts();
    rig.stop_server(Duration::from_secs(10))?;
    rig.start_server()?;
    everybody(&mut machines, &mut rig)?;
    let after = quiet(&mut rig)?;
    eprintln!(
        "{} agents × 4 streams, {:.0} s: {} backups, {cuts} cuts, {kills} kills; descriptors {} → {}, resident {} → {} KiB",
        size.agents,
        size.span.as_secs_f64(),
        backups.load(Ordering::Relaxed),
        before.0,
        after.0,
        before.1 >> 10,
        after.1 >> 10,
    );
    ensure!(after.0 <= before.0 + DESCRIPTORS_MORE, "{} descriptors instead of {}", after.0, before.0);
    ensure!(after.1 <= before.1 + BYTES_MORE, "{} bytes resident instead of {}", after.1, before.1);
    ensure!(kills > 0 && cuts > 0);
    ensure_whole(&rig, &owner, &machines)?;
    rig.ensure_no_panic()
}

/// A backup of every machine, a few at a time, over a network that does not break.
fn everybody(machines: &mut [Machine], rig: &mut Rig) -> Result<()> {
    rig.plan(Plan::default())?;
    for some in machines.chunks_mut(8) {
        thread::scope(|scope| {
            let running: Vec<_> = some.iter_mut().map(|machine| scope.spawn(|| machine.back_up())).collect();
            running.into_iter().try_for_each(|machine| machine.join().ok().context("a machine panicked")?)
        })?;
    }
    Ok(())
}

/// Every snapshot that a machine was told of is there, none besides but those whose machine was cut off before it heard of
/// them; all their bytes are read; and the newest of each machine restores as its tree is.
fn ensure_whole(rig: &Rig, owner: &Agent, machines: &[Machine]) -> Result<()> {
    let found = owner.snapshots()?;
    let told: usize = machines.iter().map(|machine| machine.saved.len()).sum();
    for machine in machines {
        for snapshot in &machine.saved {
            ensure!(found.contains(snapshot), "{} was told of {snapshot}, and it is gone", machine.host);
        }
    }
    eprintln!("{told} snapshots were told of, {} are there", found.len());
    let mut check = Process::spawn(&mut owner.command(&["check", "--read-data"])?)?;
    let status = check.wait(Duration::from_hours(1))?.context("the check does not end")?;
    ensure!(status.success(), "{status}: {}", check.output());
    for machine in machines {
        let newest = machine.saved.last().with_context(|| format!("{} has saved nothing", machine.host))?;
        let target = rig.scratch().join(format!("restored-{}", machine.host));
        machine.agent.restore_and_compare(newest, &machine.source, &machine.source, &target)?;
        fs::remove_dir_all(target)?;
    }
    Ok(())
}
