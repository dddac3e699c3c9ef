//! Scenario 22: peers that say nothing, or one byte at a time.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use strandline_actors::runtime::clock;
use strandline_actors::runtime::transport::hello;
use strandline_messages::limits;
use strandline_messages::wire::frame::FrameHeader;
use strandline_messages::wire::message::kinds;
use strandline_messages::wire::{Message, Purpose, Tag};
use strandline_tests::process::resident_bytes;
use strandline_tests::raw::{Heard, Raw, SILENCE, papers_of};
use strandline_tests::rig::{Agent, PATIENCE, Rig, is_long, random_files};
use strandline_tests::sockets;

/// Between two bytes of a slow peer.
const PAUSE: Duration = Duration::from_millis(500);

/// Sends `bytes` one by one until the server closes; an error if it takes them all.
fn drip(mut socket: &TcpStream, bytes: &[u8]) -> Result<()> {
    socket.set_read_timeout(Some(PAUSE))?;
    for byte in bytes {
        if socket.write_all(&[*byte]).is_err() {
            return Ok(());
        }
        match socket.read(&mut [0; 64]) {
            Ok(0) => return Ok(()),
            Ok(_) => bail!("the server answers half a message"),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(_) => return Ok(()),
        }
    }
    bail!("the server takes {} bytes one at a time", bytes.len())
}

#[test]
fn s22_slow_and_mute_peers_are_let_go_at_every_stage_and_others_notice_nothing() -> Result<()> {
    let rig = Rig::with(&[("STRAND_SERVER_LIMITS__HANDSHAKE_TIMEOUT", "3s")])?;
    let (agent, source) = (rig.owner("agent")?, rig.scratch().join("source"));
    random_files(&source, 22, 20, 100 << 10)?;
    let (address, papers) = (rig.address(), papers_of(&agent, rig.address())?);
    // The first bytes of a TLS record that would be long.
    let begun = [&[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3][..], &[0; 500]].concat();
    let slow_handshake = thread::spawn(move || drip(&TcpStream::connect(address)?, &begun));
    let slow_greeting = thread::spawn({
        let papers = papers.clone();
        move || -> Result<()> {
            let mut raw = Raw::connect(address, &papers)?;
            let text = Message::Hello(hello(Purpose::Control, [0; 32])).to_frame(Tag(0))?.encode();
            let began = clock::now();
            // Each in a TLS record of its own.
            for byte in text.iter().take(text.len() - 1) {
                raw.send_bytes(&[*byte])?;
                if began.elapsed() > Duration::from_secs(25) {
                    break;
                }
                thread::sleep(PAUSE);
            }
            let heard = raw.hear()?;
            ensure!(matches!(heard, Heard::End(_)), "{heard:?}");
            Ok(())
        }
    });
    let silent: Vec<_> = [Purpose::Control, Purpose::Data]
        .into_iter()
        .map(|purpose| {
            let papers = papers.clone();
            thread::spawn(move || -> Result<()> {
                let mut raw = Raw::greeted(address, &papers, purpose)?;
                // A frame as long as one may be, of which hardly anything comes.
                let len = u32::try_from(limits::CONTROL_BYTES_MAX)?;
                raw.send_bytes(&FrameHeader { len, kind: kinds::QUERY_CHUNKS, flags: 1 }.encode())?;
                for _ in 0..8 {
                    raw.send_bytes(&[1])?;
                    thread::sleep(PAUSE);
                }
                // Within the 60 s after which a connection without progress ends.
                match raw.hear().context("a mute peer is not let go")? {
                    Heard::End(_) => Ok(()),
                    other => bail!("{other:?}"),
                }
            })
        })
        .collect();
    for round in 0..3 {
        std::fs::write(source.join("changing"), format!("{round}"))?;
        agent.backup(&source, &[])?;
    }
    let joined = |thread: thread::JoinHandle<Result<()>>| thread.join().ok().context("a thread panicked")?;
    joined(slow_handshake).context("handshake")?;
    joined(slow_greeting).context("greeting")?;
    for thread in silent {
        joined(thread).context("frame")?;
    }
    ensure!(agent.snapshots()?.len() == 3);
    sockets::wait_until_none_open(address.port(), PATIENCE)?;
    rig.ensure_no_panic()
}

/// How many mute connections: a few in an ordinary run, or what `STRAND_MUTE` says.
fn mute_count() -> Result<usize> {
    match std::env::var("STRAND_MUTE") {
        Ok(text) => text.parse().context("STRAND_MUTE is not a number"),
        Err(_) => Ok(if is_long() { 5_000 } else { 500 }),
    }
}

/// Seconds that a first backup of a new tree takes.
fn backup_seconds(rig: &Rig, agent: &Agent, round: u64) -> Result<f64> {
    let source = rig.scratch().join(format!("source-{round}"));
    random_files(&source, round, 100, 512 << 10)?;
    let began = clock::now();
    agent.backup(&source, &[])?;
    Ok(began.elapsed().as_secs_f64())
}

#[test]
fn s22_mute_connections_displace_one_another_and_not_an_honest_backup() -> Result<()> {
    let count = mute_count()?;
    let mut rig = if is_long() || std::env::var_os("STRAND_MUTE").is_some() {
        Rig::direct()?
    } else {
        Rig::with(&[("STRAND_SERVER_LIMITS__HANDSHAKES", "64")])?
    };
    let most = if count > 500 { 1024 } else { 64 };
    let agent = rig.owner("agent")?;
    let (address, server) = (rig.address(), rig.server()?.id());
    let mut quiet = Vec::new();
    for round in 0..5 {
        quiet.push(backup_seconds(&rig, &agent, round)?);
    }
    let memory_before = resident_bytes(server)?;
    // As soon as one is closed, the same peer comes again: the server never sees fewer.
    let stop = std::sync::atomic::AtomicBool::new(false);
    let stopped = || stop.load(std::sync::atomic::Ordering::Relaxed);
    let (besieged, mut memory) = thread::scope(|scope| -> Result<_> {
        let besieging = scope.spawn(|| -> Result<()> {
            let mut mute = Vec::with_capacity(count);
            for _ in 0..count {
                mute.push(TcpStream::connect(address)?);
            }
            while !stopped() {
                for socket in &mut mute {
                    socket.set_nonblocking(true)?;
                    let is_open =
                        socket.read(&mut [0; 1]).is_err_and(|error| error.kind() == std::io::ErrorKind::WouldBlock);
                    if !is_open {
                        *socket = TcpStream::connect(address)?;
                    }
                    if stopped() {
                        break;
                    }
                }
                thread::sleep(Duration::from_millis(100));
            }
            Ok(())
        });
        let end = clock::now() + PATIENCE;
        while sockets::open_connections(address.port())?.len() < count.min(most) {
            ensure!(clock::now() < end && !besieging.is_finished(), "the mute connections never come");
            thread::sleep(Duration::from_millis(20));
        }
        let mut besieged = Vec::new();
        let mut memory = 0;
        let backups = (|| -> Result<()> {
            for round in 0..5 {
                besieged.push(backup_seconds(&rig, &agent, 10 + round)?);
                memory = memory.max(resident_bytes(server)?);
            }
            Ok(())
        })();
        stop.store(true, std::sync::atomic::Ordering::Relaxed);
        besieging.join().ok().context("a thread panicked")??;
        backups?;
        Ok((besieged, memory))
    })?;
    memory = memory.saturating_sub(memory_before);
    let seconds = |times: &[f64]| {
        let mut times = times.to_vec();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    };
    let (quiet, besieged) = (seconds(&quiet), seconds(&besieged));
    eprintln!(
        "{count} mute connections: median backup {quiet:.2} s without, {besieged:.2} s with; {} KiB more",
        memory >> 10
    );
    ensure!(agent.snapshots()?.len() == 10);
    ensure!(memory < (most as u64) * (64 << 10) + (64 << 20), "{memory} bytes more");
    rig.ensure_logged("give way", 1)?;
    // Those that are held to the end are let go, too.
    sockets::wait_until_none_open(address.port(), SILENCE)?;
    rig.ensure_no_panic()
}
