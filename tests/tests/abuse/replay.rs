//! Scenarios 46 and 47: what was heard or found is said again: by others, too late, or in older words.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use strandline_actors::runtime::transport::hello;
use strandline_messages::Incarnation;
use strandline_messages::identity::AuthorityHash;
use strandline_messages::wire::{AbortSession, Attach, Hello, Message, Purpose, RefusalCode, SessionKind, Tag};
use strandline_tests::raw::{Heard, Raw, no_papers, papers_of, speaking};
use strandline_tests::rig::{PATIENCE, Rig};

use crate::victim::{Victim, block, join, join_message, open, store};

/// Everything that a server sends back to these bytes, until it closes; an error if it does not.
fn answer_to(address: SocketAddr, bytes: &[u8]) -> Result<Vec<u8>> {
    let mut socket = TcpStream::connect(address)?;
    socket.set_read_timeout(Some(Duration::from_mins(1)))?;
    // The server may close before it has read everything.
    let _ = socket.write_all(bytes);
    let mut answer = Vec::new();
    match socket.read_to_end(&mut answer) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => Err(error).context("the server does not close"),
        _ => Ok(answer),
    }
}

#[test]
fn s46_a_recorded_session_that_is_played_again_opens_joins_and_stores_nothing() -> Result<()> {
    let mut rig = Rig::direct()?;
    let mut victim = Victim::settle(&rig)?;
    let (name, keys) = (victim.target.repository.clone(), victim.keys.clone());
    let papers = papers_of(&victim.agent, rig.address())?;
    let mut control = Raw::greeted(rig.address(), &papers, Purpose::Control)?;
    let request = control.open_request(SessionKind::Backup, &name, None, &keys)?;
    let Heard::Message(_, Message::SessionOpened(opened)) =
        control.ask(Tag(1), &Message::OpenSession(request.clone()))?
    else {
        anyhow::bail!("no session");
    };
    let mut stream = Raw::greeted(rig.address(), &papers, Purpose::Data)?;
    join(&mut stream, &opened)?;
    store(&mut stream, &block(&keys)?.0)?;
    let abort = Message::AbortSession(AbortSession { reason: "recorded".into() });
    ensure!(matches!(control.ask(Tag(2), &abort)?, Heard::Message(_, Message::SessionAborted)));
    let sessions = rig.log().matches("session opened").count();

    // What went over the wire, byte for byte: the other side of the key exchange is another one now.
    for recorded in [control.sent(), stream.sent()] {
        ensure!(recorded.len() > 1000, "{} bytes", recorded.len());
        answer_to(rig.address(), recorded)?;
    }
    // What was inside, from the same machine: the proof was for another connection, and the session is over.
    let mut again = Raw::greeted(rig.address(), &papers, Purpose::Control)?;
    let heard = again.ask(Tag(1), &Message::OpenSession(request))?;
    ensure!(
        matches!(&heard, Heard::Message(_, Message::Refused(refusal)) if refusal.code == RefusalCode::NotPermitted),
        "{heard:?}"
    );
    control.close();
    stream.close();
    let attach = Attach { session: opened.session, token: opened.token, incarnation: Incarnation(1) };
    let join = join_message(opened.session, opened.token);
    // Until the server has forgotten the session it may say that it has ended.
    for (purpose, tag, message) in [(Purpose::Control, Tag(2), Message::Attach(attach)), (Purpose::Data, Tag(0), join)]
    {
        let mut late = Raw::greeted(rig.address(), &papers, purpose)?;
        let heard = late.ask(tag, &message)?;
        let refused = matches!(&heard, Heard::Message(_, Message::Refused(refusal))
            if matches!(refusal.code, RefusalCode::NoSuchSession | RefusalCode::Ended));
        ensure!(refused, "{purpose:?}: {heard:?}");
    }
    ensure!(rig.log().matches("session opened").count() == sessions, "a session was opened by what was recorded");
    rig.server()?.wait_for_line("connection refused", PATIENCE)?;
    victim.ensure_unharmed(&rig)?;
    rig.ensure_no_panic()
}

#[test]
fn s46_a_proof_made_for_a_server_of_another_authority_opens_nothing() -> Result<()> {
    let rig = Rig::direct()?;
    let victim = Victim::settle(&rig)?;
    let (name, keys) = (&victim.target.repository, &victim.keys);
    let mut raw = Raw::connect(rig.address(), &papers_of(&victim.agent, rig.address())?)?;
    raw.say(Tag(0), &Message::Hello(hello(Purpose::Control, [0; 32])))?;
    let Heard::Message(_, Message::Hello(Hello { nonce, .. })) = raw.hear()? else { anyhow::bail!("no greeting") };
    for bound in [nonce, AuthorityHash([7; 32]).bind(&nonce)] {
        raw.nonce = bound;
        let answer = raw.open(SessionKind::Backup, name, keys)?;
        ensure!(matches!(&answer, Message::Refused(why) if why.code == RefusalCode::NotPermitted), "{answer:?}");
    }
    raw.note_nonce(&nonce)?;
    open(&mut raw, SessionKind::Backup, name, keys)?;
    rig.ensure_no_panic()
}

#[test]
fn s46_one_token_that_many_machines_spend_at_once_enrols_one_of_them_in_its_tenant() -> Result<()> {
    let rig = Rig::direct()?;
    rig.administer(&["tenant", "add", "theirs"])?;
    let token = rig.administer(&["token", "create", "theirs"])?;
    let machines = (0..6).map(|n| rig.machine(&format!("machine-{n}"))).collect::<Result<Vec<_>>>()?;
    let running: Vec<_> = machines
        .into_iter()
        .map(|machine| {
            let token = token.trim().to_owned();
            thread::spawn(move || machine.run(&["enroll", &token]))
        })
        .collect();
    let mut enrolled = 0;
    for running in running {
        let finished = running.join().ok().context("a thread panicked")??;
        enrolled += usize::from(finished.status.code() == Some(0));
        let is_refused = finished.status.code() == Some(1) && finished.stderr.contains("token");
        ensure!(finished.status.code() == Some(0) || is_refused, "{finished:?}");
    }
    ensure!(enrolled == 1, "{enrolled} machines");
    let agents: serde_json::Value = serde_json::from_str(&rig.administer(&["agent", "list", "--json"])?)?;
    let tenants: Vec<_> =
        agents.as_array().context("no list")?.iter().filter_map(|agent| agent.get("tenant")).collect();
    ensure!(tenants == ["theirs"], "{tenants:?}");
    rig.ensure_no_panic()
}

/// A `ClientHello` that offers TLS 1.2 and nothing newer, in its record.
fn client_hello_of_tls_1_2() -> Vec<u8> {
    let mut body = vec![3, 3];
    body.extend([0x5a; 32]);
    // No session; two suites of TLS 1.2 (ECDHE with AES-GCM); no compression.
    body.extend([0, 0, 4, 0xc0, 0x2b, 0xc0, 0x2f, 1, 0]);
    // Groups, point formats, signature algorithms; no supported_versions.
    let extensions = [&[0, 10, 0, 4, 0, 2, 0, 23][..], &[0, 11, 0, 2, 1, 0], &[0, 13, 0, 6, 0, 4, 4, 3, 8, 4]].concat();
    let length = |bytes: &[u8]| u8::try_from(bytes.len()).unwrap_or(u8::MAX);
    body.extend([0, length(&extensions)]);
    body.extend(extensions);
    let mut record = vec![22, 3, 1, 0, length(&body) + 4, 1, 0, 0, length(&body)];
    record.extend(body);
    record
}

#[test]
fn s47_tls_1_2_plain_text_and_other_protocols_get_an_alert_at_most() -> Result<()> {
    const PROTOCOL_VERSION: u8 = 70;
    let rig = Rig::direct()?;
    let agent = rig.owner("agent")?;
    let answer = answer_to(rig.address(), &client_hello_of_tls_1_2())?;
    ensure!(answer.first() == Some(&21) && answer.last() == Some(&PROTOCOL_VERSION), "no alert: {answer:?}");
    for said in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"SSH-2.0-x\r\n", &[0; 64], &[0xff; 9000]] {
        let answer = answer_to(rig.address(), said)?;
        ensure!(answer.len() < 16 && answer.first().is_none_or(|byte| *byte == 21), "{answer:?}");
    }
    rig.ensure_logged("connection refused", 5)?;
    // With and without a certificate, no protocol that the server does not speak is spoken.
    let papers = papers_of(&agent, rig.address())?;
    for papers in [&papers, &no_papers(&agent, rig.address())?] {
        for protocols in [&[][..], &[&b"h2"[..]], &[b"strandline/0"], &[b"strandline/2"]] {
            let mut raw = Raw::connect(rig.address(), &speaking(papers, protocols))?;
            let heard = raw.greet(Purpose::Control)?;
            ensure!(matches!(heard, Heard::End(_)), "{protocols:?}: {heard:?}");
        }
    }
    let newest_first = speaking(&papers, &[b"strandline/2", b"strandline/1"]);
    let name = "main".parse()?;
    let keys = {
        let (file, slots) = strandline_tests::raw::repository_on_disk(rig.data(), "acme", "main")?;
        strandline_tests::raw::keys_of(&agent, &file, &slots)?
    };
    let mut newer = Raw::greeted(rig.address(), &newest_first, Purpose::Control)?;
    open(&mut newer, SessionKind::Backup, &name, &keys)?;
    rig.ensure_no_panic()
}
