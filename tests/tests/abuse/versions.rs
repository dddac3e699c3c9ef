//! Scenario 20 on the real server: peers of protocol 1 as it was recorded, and of versions that are not there yet.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use bytes::BytesMut;
use data_encoding::HEXLOWER;
use strandline_actors::runtime::transport::hello;
use strandline_messages::wire::{
    Frame, FrameDecoder, Hello, Message, Ping, Pong, Purpose, RefusalCode, SessionKind, Tag,
};
use strandline_tests::raw::{Heard, Raw, keys_of, papers_of, repository_on_disk};
use strandline_tests::rig::{Rig, TENANT};

use crate::victim::{block, open};

/// The frames that the agent says on one connection of the recorded session.
fn recorded(side: &str) -> Result<Vec<Frame>> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/protocol-v1/session.txt");
    let mut frames = Vec::new();
    for line in std::fs::read_to_string(path)?.lines().filter(|line| line.starts_with(side)) {
        let (_, hex) = line.split_once(": ").context("a malformed line")?;
        let mut bytes = BytesMut::from(&HEXLOWER.decode(hex.as_bytes())?[..]);
        frames.push(FrameDecoder::default().next(&mut bytes)?.context("half a frame")?);
    }
    Ok(frames)
}

#[test]
fn s20_an_agent_of_the_recorded_protocol_backs_up_to_todays_server() -> Result<()> {
    let rig = Rig::direct()?;
    let agent = rig.owner("agent")?;
    let (file, slots) = repository_on_disk(rig.data(), TENANT, "main")?;
    let keys = keys_of(&agent, &file, &slots)?;
    let papers = papers_of(&agent, rig.address())?;
    // What is recorded is said as it stands; only ids, proofs and contents are those of this server.
    let mut control = Raw::connect(rig.address(), &papers)?;
    let mut data = Raw::connect(rig.address(), &papers)?;
    let mut session = None;
    let (sealed, _) = block(&keys)?;
    for (raw, side) in [(&mut control, "agent control"), (&mut data, "agent data")] {
        for frame in recorded(side)? {
            if frame.kind == strandline_messages::wire::message::kinds::BLOCK {
                raw.send(&crate::victim::block_frame(0, &sealed))?;
                let heard = raw.hear()?;
                ensure!(matches!(&heard, Heard::Message(_, Message::Ack(ack)) if ack.watermark == 1), "{heard:?}");
                continue;
            }
            let (tag, message) = Message::decode(&frame)?;
            let (said, expected) = match message {
                Message::OpenSession(recorded) => {
                    let proof = keys.sign_session_proof(&raw.nonce)?.to_vec();
                    let writer = keys.encoded_certificate();
                    let ours = strandline_messages::wire::OpenSession {
                        writer: writer.into(),
                        proof: proof.into(),
                        ..recorded
                    };
                    (Message::OpenSession(ours), "SessionOpened")
                }
                Message::Join(recorded) => {
                    let opened: &strandline_messages::wire::SessionOpened = session.as_ref().context("no session")?;
                    let (session, token) = (opened.session, opened.token);
                    (Message::Join(strandline_messages::wire::Join { session, token, ..recorded }), "Joined")
                }
                // Its manifest is made up: the server says so, as it did then.
                Message::Commit(recorded) => {
                    (Message::Commit(strandline_messages::wire::Commit { blocks: 0, ..recorded }), "Refused")
                }
                Message::Drain => (Message::Drain, "Drained"),
                Message::Ping(ping) => (Message::Ping(ping), "Pong"),
                Message::Hello(_) => {
                    raw.send(&frame)?;
                    let Heard::Message(_, Message::Hello(hello)) = raw.hear()? else { anyhow::bail!("no greeting") };
                    ensure!(hello.version_min <= 1 && hello.version_max >= 1, "{hello:?}");
                    raw.note_nonce(&hello.nonce)?;
                    continue;
                }
                other => anyhow::bail!("{} is recorded", other.name()),
            };
            raw.say(tag, &said)?;
            let answer = loop {
                match raw.answer(tag)? {
                    Heard::Message(_, Message::Ack(_)) => {}
                    heard => break heard,
                }
            };
            let Heard::Message(_, answer) = answer else { anyhow::bail!("{expected} is not said: {answer:?}") };
            ensure!(answer.name() == expected, "{answer:?} instead of {expected}");
            if let Message::SessionOpened(opened) = answer {
                session = Some(opened);
            }
        }
    }
    rig.ensure_no_panic()
}

#[test]
fn s20_newer_agents_are_spoken_to_in_version_1_if_they_know_it_and_refused_if_not() -> Result<()> {
    let rig = Rig::direct()?;
    let agent = rig.owner("agent")?;
    let papers = papers_of(&agent, rig.address())?;
    let greet = |purpose, version_min, version_max, capabilities| -> Result<(Raw, Heard)> {
        let mut raw = Raw::connect(rig.address(), &papers)?;
        let ours = Hello { version_min, version_max, capabilities, ..hello(purpose, [0; 32]) };
        raw.say(Tag(0), &Message::Hello(ours))?;
        let heard = raw.hear()?;
        if let Heard::Message(_, Message::Hello(hello)) = &heard {
            raw.note_nonce(&hello.nonce)?;
        }
        Ok((raw, heard))
    };
    for purpose in [Purpose::Control, Purpose::Data] {
        for (least, most) in [(2, 9), (u16::MAX, u16::MAX), (0, 0), (9, 1)] {
            let (mut raw, heard) = greet(purpose, least, most, 0)?;
            let is_refused =
                matches!(&heard, Heard::Message(Tag(0), Message::Refused(why)) if why.code == RefusalCode::Version);
            ensure!(is_refused && matches!(raw.hear()?, Heard::End(_)), "{least} to {most}: {heard:?}");
        }
    }
    // Knows more, can do more, and says more: what is not critical is skipped.
    let (mut newer, heard) = greet(Purpose::Control, 1, 9, u64::MAX)?;
    ensure!(matches!(heard, Heard::Message(_, Message::Hello(_))), "{heard:?}");
    newer.send(&Frame { kind: 0x0077, flags: 0, body: b"of protocol 2".as_slice().into() })?;
    let pong = newer.ask(Tag(0), &Message::Ping(Ping { stamp: 5 }))?;
    ensure!(pong == Heard::Message(Tag(0), Message::Pong(Pong { stamp: 5 })), "{pong:?}");
    let (file, slots) = repository_on_disk(rig.data(), TENANT, "main")?;
    open(&mut newer, SessionKind::Backup, &file.name, &keys_of(&agent, &file, &slots)?)?;
    newer.send(&Frame { kind: 0x0077, flags: 1, body: b"of protocol 2".as_slice().into() })?;
    ensure!(matches!(newer.hear()?, Heard::End(_)));
    rig.ensure_no_panic()
}
