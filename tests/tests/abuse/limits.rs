//! Scenario 22: what one machine may take of a server, and what of its protocol it may stretch.

use anyhow::{Context, Result, bail, ensure};
use strandline_actors::runtime::clock;
use strandline_messages::Incarnation;
use strandline_messages::limits;
use strandline_messages::wire::frame::FrameHeader;
use strandline_messages::wire::message::kinds;
use strandline_messages::wire::{Attach, Message, Purpose, RefusalCode, SessionKind, Tag};
use strandline_tests::raw::{Heard, Raw, papers_of};
use strandline_tests::rig::{PATIENCE, Rig, random_files};

use crate::victim::{Victim, open};

fn code_of(heard: &Heard) -> Option<RefusalCode> {
    match heard {
        Heard::Message(_, Message::Refused(refusal)) => Some(refusal.code),
        _ => None,
    }
}

#[test]
fn s22_a_machine_has_only_so_many_connections_and_sessions_and_those_of_others_do_not_count() -> Result<()> {
    let rig = Rig::with(&[
        ("STRAND_SERVER_MAX_STREAMS", "2"),
        ("STRAND_SERVER_LIMITS__CONNECTIONS_PER_AGENT", "6"),
        ("STRAND_SERVER_LIMITS__SESSIONS_PER_AGENT", "3"),
    ])?;
    let victim = Victim::settle(&rig)?;
    let name = &victim.target.repository;
    // The victim itself has a session and a connection: it is another machine.
    let greedy = rig.second("greedy", &victim.agent)?;
    let papers = papers_of(&greedy, rig.address())?;
    let mut held = Vec::new();
    for _ in 0..6 {
        held.push(Raw::greeted(rig.address(), &papers, Purpose::Control)?);
    }
    let seventh = Raw::connect(rig.address(), &papers)?.greet(Purpose::Control)?;
    ensure!(code_of(&seventh) == Some(RefusalCode::Full), "{seventh:?}");
    victim.agent.snapshots()?;

    // A connection speaks for one session, however fast it asks for two.
    let mut first = held.pop().context("a connection")?;
    let request = Message::OpenSession(first.open_request(SessionKind::Backup, name, None, &victim.keys)?);
    first.say(Tag(1), &request)?;
    first.say(Tag(2), &request)?;
    let second = first.answer(Tag(2))?;
    ensure!(code_of(&second) == Some(RefusalCode::Invalid), "{second:?}");
    let mut ready = Raw::connect(rig.address(), &papers)?;
    let end = clock::now() + PATIENCE;
    // The place of a connection is free as soon as the server sees its end.
    held.pop().context("a connection")?.close();
    while code_of(&ready.greet(Purpose::Control)?) == Some(RefusalCode::Full) {
        ensure!(clock::now() < end, "a closed connection still counts");
        ready = Raw::connect(rig.address(), &papers)?;
    }

    // Three sessions: that of `first` and two more. All are connected, so a fourth is too much.
    let opened = open(&mut ready, SessionKind::Backup, name, &victim.keys)?;
    let mut third = held.pop().context("a connection")?;
    open(&mut third, SessionKind::Restore, name, &victim.keys)?;
    let mut fourth = held.pop().context("a connection")?;
    let refused = fourth.open(SessionKind::Backup, name, &victim.keys)?;
    ensure!(matches!(&refused, Message::Refused(refusal) if refusal.code == RefusalCode::Full), "{refused:?}");
    // The one that nobody is connected to any more makes room.
    ready.close();
    let end = clock::now() + PATIENCE;
    loop {
        match fourth.open(SessionKind::Backup, name, &victim.keys)? {
            Message::SessionOpened(_) => break,
            Message::Refused(refusal) if refusal.code == RefusalCode::Full => {
                ensure!(clock::now() < end, "an abandoned session never makes room");
            }
            other => bail!("{other:?}"),
        }
    }
    let mut late = held.pop().context("a connection")?;
    let attach = Attach { session: opened.session, token: opened.token, incarnation: Incarnation(1) };
    let heard = late.ask(Tag(3), &Message::Attach(attach))?;
    // It has ended; the next look finds it gone.
    ensure!(matches!(code_of(&heard), Some(RefusalCode::Ended | RefusalCode::NoSuchSession)), "{heard:?}");

    let source = rig.scratch().join("source");
    random_files(&source, 22, 3, 1000)?;
    victim.agent.backup(&source, &["--streams", "2"])?;
    rig.ensure_no_panic()
}

#[test]
fn s43_frames_that_claim_too_much_end_their_connection_before_they_come() -> Result<()> {
    let rig = Rig::direct()?;
    let agent = rig.owner("agent")?;
    let papers = papers_of(&agent, rig.address())?;
    let frames = [
        (kinds::QUERY_CHUNKS, limits::CONTROL_BYTES_MAX + 1),
        (kinds::BLOCK, limits::DATA_FRAME_BYTES_MAX + 1),
        (kinds::PING, u32::MAX as usize),
        // Unknown, and it must not be skipped.
        (0x7fff, 0),
    ];
    for (kind, len) in frames {
        let header = FrameHeader { len: u32::try_from(len)?, kind, flags: 1 }.encode();
        for purpose in [Purpose::Control, Purpose::Data] {
            let mut raw = Raw::greeted(rig.address(), &papers, purpose)?;
            raw.send_bytes(&header)?;
            let heard = raw.hear()?;
            ensure!(matches!(heard, Heard::End(_)), "{kind:#06x} of {len} bytes: {heard:?}");
        }
    }
    // Before the greeting less is taken from anybody.
    for (kind, len) in [(kinds::HELLO, limits::GREETING_BYTES_MAX + 1), (kinds::BLOCK, 1 << 20)] {
        let mut raw = Raw::connect(rig.address(), &papers)?;
        raw.send_bytes(&FrameHeader { len: u32::try_from(len)?, kind, flags: 1 }.encode())?;
        let heard = raw.hear()?;
        ensure!(matches!(heard, Heard::End(_)), "{kind:#06x} of {len} bytes: {heard:?}");
    }
    rig.ensure_logged("refused", 2 * frames.len() + 2)?;
    agent.snapshots()?;
    rig.ensure_no_panic()
}
