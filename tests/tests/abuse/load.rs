//! How many sessions one server holds at once.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use strandline_actors::runtime::clock;
use strandline_messages::StreamIndex;
use strandline_messages::wire::{AbortSession, Join, Message, Ping, Purpose, SessionKind, Tag};
use strandline_tests::process::{descriptors, resident_bytes};
use strandline_tests::raw::{Heard, Raw, keys_of, papers_of, repository_on_disk};
use strandline_tests::rig::{PATIENCE, Rig, TENANT, is_long};

use crate::victim::{block, block_frame, join_message, open};

const STREAMS: u16 = 4;
/// As often as agents do.
const PING_EVERY: Duration = Duration::from_secs(15);

/// How many sessions: few in an ordinary run, or what `STRAND_LOAD` says.
fn amount() -> Result<usize> {
    match std::env::var("STRAND_LOAD") {
        Ok(text) => text.parse().context("STRAND_LOAD is not a number"),
        Err(_) => Ok(if is_long() { 1_000 } else { 50 }),
    }
}

/// A connection that says nothing for a minute is taken for lost. The answers are read with whatever comes next.
fn ping(sessions: &mut [(Raw, Vec<Raw>)]) -> Result<()> {
    for (control, streams) in sessions {
        for raw in std::iter::once(control).chain(streams) {
            raw.say(Tag(0), &Message::Ping(Ping { stamp: 0 }))?;
        }
    }
    Ok(())
}

#[test]
fn s01_many_sessions_of_four_streams_are_open_at_once_and_each_stores_over_every_stream() -> Result<()> {
    // Both ends of every connection are in this and one other process.
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })?;
    let count = amount()?;
    let mut rig = Rig::with(&[
        ("STRAND_SERVER_LIMITS__CONNECTIONS", "1000000"),
        ("STRAND_SERVER_LIMITS__CONNECTIONS_PER_ADDRESS", "1000000"),
        ("STRAND_SERVER_LIMITS__CONNECTIONS_PER_AGENT", "1000000"),
        ("STRAND_SERVER_LIMITS__SESSIONS_PER_AGENT", "1000000"),
    ])?;
    let agent = rig.owner("agent")?;
    let (file, slots) = repository_on_disk(rig.data(), TENANT, "main")?;
    let (keys, papers) = (keys_of(&agent, &file, &slots)?, papers_of(&agent, rig.address())?);
    let (server, address) = (rig.server()?.id(), rig.address());
    let (idle, memory) = (descriptors(server)?, resident_bytes(server)?);
    let (sealed, _) = block(&keys)?;
    let (workers, began) = (8.min(count), clock::now());
    let session = || -> Result<(Raw, Vec<Raw>)> {
        let mut control = Raw::greeted(address, &papers, Purpose::Control)?;
        let opened = open(&mut control, SessionKind::Backup, &file.name, &keys)?;
        let mut streams = Vec::new();
        for index in 0..STREAMS {
            let mut stream = Raw::greeted(address, &papers, Purpose::Data)?;
            let Message::Join(join) = join_message(opened.session, opened.token) else { anyhow::bail!("no join") };
            let heard = stream.ask(Tag(0), &Message::Join(Join { index: StreamIndex(index), ..join }))?;
            ensure!(matches!(heard, Heard::Message(_, Message::Joined)), "{heard:?}");
            streams.push(stream);
        }
        for (sequence, stream) in streams.iter_mut().enumerate() {
            stream.send(&block_frame(sequence as u64, &sealed))?;
        }
        for stream in &mut streams {
            loop {
                match stream.hear()? {
                    Heard::Message(_, Message::Ack(ack)) if ack.watermark == u64::from(STREAMS) => break,
                    Heard::Message(_, Message::Ack(_)) => {}
                    other => anyhow::bail!("{other:?}"),
                }
            }
        }
        Ok((control, streams))
    };
    let work = |first: usize| -> Result<Vec<(Raw, Vec<Raw>)>> {
        let (mut sessions, mut pinged) = (Vec::new(), clock::now());
        for _ in (first..count).step_by(workers) {
            sessions.push(session()?);
            if pinged.elapsed() >= PING_EVERY {
                ping(&mut sessions)?;
                pinged = clock::now();
            }
        }
        ping(&mut sessions)?;
        Ok(sessions)
    };
    let sessions = thread::scope(|scope| -> Result<Vec<_>> {
        let work = &work;
        let working: Vec<_> = (0..workers).map(|first| scope.spawn(move || work(first))).collect();
        let mut sessions = Vec::new();
        for worker in working {
            sessions.extend(worker.join().ok().context("a worker panicked")??);
        }
        Ok(sessions)
    })?;
    let took = began.elapsed();
    ensure!(sessions.len() == count);
    // A long line comes in pieces.
    let status = rig.administer(&["status", "--json"])?.replace('\n', "");
    let status: serde_json::Value = serde_json::from_str(&status)?;
    let open_now = status.get("sessions").and_then(serde_json::Value::as_array).map_or(0, Vec::len);
    let more = resident_bytes(server)?.saturating_sub(memory);
    eprintln!(
        "{count} sessions × {STREAMS} streams in {:.1} s; the server lists {open_now}; {} KiB per session, {} descriptors",
        took.as_secs_f64(),
        (more / count as u64) >> 10,
        descriptors(server)?,
    );
    ensure!(open_now == count, "{status}");
    for (mut control, streams) in sessions {
        let abort = Message::AbortSession(AbortSession { reason: "enough".into() });
        ensure!(matches!(control.ask(Tag(2), &abort)?, Heard::Message(_, Message::SessionAborted)));
        streams.into_iter().for_each(Raw::close);
        control.close();
    }
    let end = clock::now() + PATIENCE;
    while descriptors(server)? > idle + 8 {
        ensure!(clock::now() < end, "{} descriptors instead of {idle}", descriptors(server)?);
        thread::sleep(Duration::from_millis(100));
    }
    let log = rig.log();
    ensure!(!log.contains("ERROR") && !log.contains("refused"), "{log}");
    rig.ensure_no_panic()
}
