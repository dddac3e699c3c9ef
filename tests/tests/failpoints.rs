//! The server dies at every place that its source names as a failpoint, and again while it recovers from that (scenarios 24 and
//! 25); and syncs fail there (29). It comes back unaided, the running backup ends well, and nothing acknowledged is lost.
//!
//! Which places a part of a server's life reaches, and how often, is found out first; then the part is lived again for each of
//! them, with a death there. With `STRAND_LONG=1` with a death at each of the first times, otherwise at one of them.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::thread;

use anyhow::{Context, Result, ensure};
use strandline_tests::mortal::{Counts, DEATH, Life, Part};
use strandline_tests::rig::{PATIENCE, Summary, is_long};

/// Deaths of one part at one place, with `STRAND_LONG=1`.
const TIMES_MAX: u64 = 12;

/// Places that no crash of a process leads to, and what shows them instead.
const OUT_OF_REACH: [(&str, &str); 3] = [
    (
        "journal/closed",
        "a kill does not tear a line that was written in one call; unit tests of the journal tear it at each byte",
    ),
    (
        "segment/removed",
        "segments are merged from hundreds of thousands of chunks on; one that is left is removed at `index/cleaned`",
    ),
    ("pack/given-up", "only after an error of the disk; the test of failing syncs gets there"),
];

/// Deaths that are needed for another one: what they leave is met by the next process.
const IN_TURN: [(Part, &[&str]); 3] = [
    (Part::Backup, &["file/written:1", "unfinished/removed:1"]),
    (Part::Backup, &["pack/created:1", "pack/set-aside:1"]),
    (Part::Stop, &["segment/renamed:1", "index/cleaned:1"]),
];

/// What was found out, and done.
#[derive(Default)]
struct Toll {
    reached: Counts,
    deaths: Counts,
}

impl Toll {
    /// Lives a part with such deaths; how many of them came.
    fn die(&mut self, life: &mut Life, part: Part, sequence: &[String]) -> Result<usize> {
        let came = life.die(part, sequence).with_context(|| format!("{part:?} with deaths at {sequence:?}"))?;
        for place in sequence.iter().take(came).filter_map(|death| death.split(':').next()) {
            *self.deaths.entry(place.to_owned()).or_default() += 1;
        }
        Ok(came)
    }

    fn note(&mut self, reached: Counts) {
        for (place, count) in reached {
            *self.reached.entry(place).or_default() += count;
        }
    }

    fn add(&mut self, other: Self) {
        self.note(other.reached);
        for (place, count) in other.deaths {
            *self.deaths.entry(place).or_default() += count;
        }
    }
}

/// Finds out what each of `parts` reaches, and dies there.
fn die_everywhere(seed: u64, parts: &[Part]) -> Result<Toll> {
    let mut life = Life::begin(seed)?;
    let mut toll = Toll::default();
    life.backup()?;
    life.live(Part::Recover)?;
    life.reached()?;
    life.start()?;
    let recovery: Vec<String> = life.reached()?.into_keys().collect();
    for &part in parts {
        life.live(part).with_context(|| format!("{part:?}"))?;
        life.verify(true).with_context(|| format!("after {part:?}"))?;
        let counts = life.reached()?;
        for (place, &count) in &counts {
            let times: Vec<u64> =
                if is_long() { (1..=count.min(TIMES_MAX)).collect() } else { vec![1 + life.random.below(count)] };
            for time in times {
                // Another death in the recovery from it, and another.
                let mut sequence = vec![format!("{place}:{time}")];
                for _ in 0..2 {
                    let place = recovery.get(life.random.index(recovery.len())).context("a start reaches nothing")?;
                    sequence.push(format!("{place}:1"));
                }
                // What several threads do is not counted the same each time.
                if toll.die(&mut life, part, &sequence)? == 0 && time > 1 {
                    toll.die(&mut life, part, &[format!("{place}:1")])?;
                }
            }
        }
        toll.note(counts);
        toll.note(life.reached()?);
    }
    for (part, places) in IN_TURN.iter().filter(|(part, _)| parts.contains(part)) {
        let sequence: Vec<String> = places.iter().map(|&place| place.to_owned()).collect();
        toll.die(&mut life, *part, &sequence)?;
    }
    life.verify(true)?;
    toll.note(life.reached()?);
    Ok(toll)
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
    let mut toll = Toll::default();
    for half in threads {
        toll.add(half.join().map_err(|_| anyhow::anyhow!("a half of the test panicked"))??);
    }
    let mut never = Vec::new();
    for place in places_in_source()? {
        let count = |counts: &Counts| counts.get(&place).copied().unwrap_or(0);
        println!("{place}: reached {} times, died there {} times", count(&toll.reached), count(&toll.deaths));
        if count(&toll.deaths) == 0 && !OUT_OF_REACH.iter().any(|(known, _)| *known == place) {
            never.push(place);
        }
    }
    ensure!(never.is_empty(), "nobody died at {never:?}: extend what the parts do, or say why nobody can get there");
    Ok(())
}

#[test]
fn s29_a_sync_that_fails_anywhere_ends_what_relied_on_it_with_the_reason_and_loses_nothing() -> Result<()> {
    let mut life = Life::begin(29)?;
    life.backup()?;
    life.start()?;
    life.reached()?;
    life.backup()?;
    let places = life.reached()?.into_iter().filter(|(place, _)| place.ends_with("/sync"));
    for (place, count) in places {
        // Once, late enough for the start to be over, or from then on.
        for failing in [format!("{place}:{}:eio", 1 + life.random.below(count)), format!("{place}:0:eio")] {
            let source = life.change()?;
            life.deaths.clear();
            life.start()?;
            // The start is done; the next server's is not disturbed.
            life.rig.kill_server();
            life.rig.set_variable(DEATH, Some(&failing));
            if life.rig.start_server().is_err() {
                // It cannot be started on such a disk, and says so.
                life.start()?;
                continue;
            }
            let mut backup = life.owner.start_backup(&source, &["--streams", "2"])?;
            let status = backup.wait(PATIENCE)?.with_context(|| format!("no end of:\n{}", backup.output()))?;
            backup.ensure_no_panic()?;
            ensure!(life.rig.server()?.is_running(), "{failing}: the server died of it:\n{}", life.rig.last_words());
            let said = backup.output();
            match status.code() {
                Some(0) => life.save(Summary::of(&backup.stdout_text(), said)?.snapshot()?, &source)?,
                Some(1) => ensure!(said.contains("no snapshot was made"), "{failing}: {said}"),
                _ => anyhow::bail!("{failing}: {status}: {said}"),
            }
            println!("{failing}: the backup ended with {status}");
            life.start()?;
            life.verify(false).with_context(|| failing.clone())?;
        }
    }
    life.verify(true)
}
