//! Scenario 41, generated: every kind of message × everybody who may not × every connection that it can come over.
//!
//! Each probe is sent twice: aimed at what the victim has, and at what nobody has. Neither may be answered with more than
//! a refusal, and nobody may tell the two apart.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use strandline_actors::runtime::clock;
use strandline_messages::wire::message::kinds;
use strandline_messages::wire::{Message, Ping, Purpose, RefusalCode, SessionKind, Tag};
use strandline_tests::raw::{Heard, Raw, speaking};
use strandline_tests::rig::{PATIENCE, Rig, random_files};

use crate::attackers::{self, Attacker, Fault, fresh_request};
use crate::probes::{Means, TAG, probe};
use crate::victim::{Target, Victim, join, open};

/// Over which connection a probe comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Door {
    /// A control connection that speaks for no session.
    Control,
    /// A control connection that speaks for a session of the attacker's own.
    Session,
    /// A data connection that has not joined.
    Data,
    /// A data connection that has joined a session of the attacker's own.
    Stream,
    /// A connection that was made for enrolment.
    Enrolment,
}

/// What came of a probe, with everything taken out that differs between targets.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Outcome {
    /// The connection was closed without a word.
    Closed,
    /// A refusal.
    Refused(RefusalCode, String),
    /// Nothing came; the connection goes on.
    Nothing,
    /// An answer.
    Answered(String),
}

/// What may come of a probe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Verdict {
    /// Closed or refused, for both targets alike.
    Refused,
    /// Closed or refused; what is there may be refused otherwise than what is not: it is known to the attacker's tenant.
    RefusedByName,
    /// Any answer, for both targets alike: it tells only of what is the attacker's own.
    Alike,
    /// Any answer: the attacker may.
    May,
}

#[test]
fn s41_no_message_of_any_kind_gets_anybody_what_is_not_theirs() -> Result<()> {
    let (rig, other) = (Rig::direct()?, Rig::direct()?);
    let mut victim = Victim::settle(&rig)?;
    let made_up = Target::made_up()?;
    let attackers = attackers::all(&rig, &other, &victim)?;
    // What makes a repository comes last: one of that name in the attacker's own tenant would answer everything after it.
    let (last, first): (Vec<_>, Vec<_>) = kinds::ALL.iter().partition(|(kind, _)| *kind == kinds::CREATE_REPOSITORY);
    let mut probes = 0;
    for kinds in [first, last] {
        for attacker in &attackers {
            probes += assault(&rig, attacker, &kinds, [&victim.target, &made_up])?;
            victim.ensure_unharmed(&rig).with_context(|| format!("after {:?}", attacker.fault))?;
        }
    }
    ensure!(probes >= kinds::ALL.len() * 2 * 20, "only {probes} probes");
    let after = rig.scratch().join("after");
    random_files(&after, 42, 3, 1000)?;
    let snapshot = victim.agent.backup(&after, &[])?.snapshot()?;
    victim.agent.restore_and_compare(&snapshot, &after, &after, &rig.scratch().join("restored"))?;
    rig.ensure_no_panic()
}

/// Every kind over every connection, at both targets; waits until the log tells of every refusal. Gives how many probes
/// that were.
fn assault(rig: &Rig, attacker: &Attacker, kinds: &[(u16, &str)], targets: [&Target; 2]) -> Result<usize> {
    let before = refusals_logged(rig, attacker);
    // Several at once: most of the time both sides wait for one another.
    let refused = thread::scope(|scope| -> Result<usize> {
        let some = kinds.chunks(kinds.len().div_ceil(4));
        let running: Vec<_> =
            some.map(|kinds| scope.spawn(|| assault_by_some(rig, attacker, kinds, targets))).collect();
        running.into_iter().map(|running| running.join().ok().context("a thread panicked")?).sum()
    })?;
    wait_for_refusals(rig, attacker, before + refused)?;
    Ok(kinds.len() * doors(attacker).len() * targets.len())
}

/// Gives how many must have been refused.
fn assault_by_some(rig: &Rig, attacker: &Attacker, kinds: &[(u16, &str)], targets: [&Target; 2]) -> Result<usize> {
    let mut refused = 0;
    for door in doors(attacker) {
        for (kind, name) in kinds {
            let what = || format!("{:?} ({:?}), {door:?}, {name}", attacker.fault, attacker.asks_for);
            let attempt = |target| -> Result<Outcome> {
                let outcome = attempt(rig, attacker, door, *kind, target).with_context(what)?;
                outcome.with_context(|| format!("there is no probe for {name} yet: write one"))
            };
            let [real, fake] = [attempt(targets[0])?, attempt(targets[1])?];
            let verdict = verdict(attacker, door, *kind);
            if matches!(verdict, Verdict::Refused | Verdict::RefusedByName) {
                let is_refusal = matches!(real, Outcome::Closed | Outcome::Refused(..));
                ensure!(is_refusal, "{}: {real:?}", what());
                refused += targets.len();
            }
            let must_be_alike = matches!(verdict, Verdict::Refused | Verdict::Alike);
            ensure!(!must_be_alike || real == fake, "{}: {real:?}, but {fake:?}", what());
        }
    }
    Ok(refused)
}

fn doors(attacker: &Attacker) -> Vec<Door> {
    let mut doors = vec![Door::Control, Door::Data];
    if attacker.own.is_some() {
        doors.extend([Door::Session, Door::Stream]);
    }
    if attacker.fault == Fault::NoCertificate {
        doors.push(Door::Enrolment);
    }
    doors
}

/// The rules, one place for all: who may what.
fn verdict(attacker: &Attacker, door: Door, kind: u16) -> Verdict {
    use Verdict::{Alike, May, Refused, RefusedByName};
    if !attacker.is_greeted() {
        return Refused;
    }
    let is_control = matches!(door, Door::Control | Door::Session);
    let has_session_of = |kind| door == Door::Session && attacker.own.as_ref().is_some_and(|(.., own)| *own == kind);
    match kind {
        kinds::PING | kinds::PONG => Alike,
        // What is told of a status is of the tenant that asks.
        kinds::CREDIT | kinds::GET_STATUS if is_control => Alike,
        // In the tenant that asks: it may be there already, from an earlier attempt.
        kinds::CREATE_REPOSITORY if is_control => May,
        kinds::DESCRIBE_REPOSITORY | kinds::LIST_SNAPSHOTS | kinds::FIND_SNAPSHOT
            if is_control && attacker.is_of_the_tenant() =>
        {
            May
        }
        kinds::OPEN_SESSION if door == Door::Control && attacker.fault == Fault::Colleague => May,
        kinds::MANAGE if is_control && attacker.fault == Fault::Colleague => May,
        // Names of repositories are known within a tenant.
        kinds::OPEN_SESSION | kinds::MANAGE if is_control && attacker.is_of_the_tenant() => RefusedByName,
        // Into its own domain, which nobody else's snapshots rely on.
        kinds::BLOCK if door == Door::Stream && attacker.fault == Fault::WriteOnly => May,
        // In a session of the repository it may be told of which repository a manifest is.
        kinds::COMMIT if door == Door::Session && attacker.fault == Fault::WriteOnly => RefusedByName,
        // Answered, but nothing is known; own sessions may be ended.
        kinds::QUERY_CHUNKS if has_session_of(SessionKind::Backup) => Alike,
        kinds::ABORT_SESSION if door == Door::Session => Alike,
        kinds::FETCH_CHUNKS if has_session_of(SessionKind::Restore) => {
            if attacker.fault == Fault::ReadOnly {
                May
            } else {
                Alike
            }
        }
        kinds::DRAIN if door == Door::Stream => Alike,
        _ => Refused,
    }
}

/// Sends one probe over a connection of its own. `None` if there is none for that kind.
fn attempt(rig: &Rig, attacker: &Attacker, door: Door, kind: u16, target: &Target) -> Result<Option<Outcome>> {
    let papers = if door == Door::Enrolment {
        speaking(&attacker.papers, &[strandline_messages::identity::ALPN_ENROLMENT])
    } else {
        std::sync::Arc::clone(&attacker.papers)
    };
    let mut raw = Raw::connect(rig.address(), &papers)?;
    let purpose = if matches!(door, Door::Data | Door::Stream) { Purpose::Data } else { Purpose::Control };
    if door != Door::Enrolment {
        match raw.greet(purpose)? {
            Heard::Message(_, Message::Hello(_)) => {}
            // Nothing but the greeting was said yet; the probe follows it, into the closed door.
            heard => {
                if let Some(frame) = probe(kind, target, &means(attacker, &raw)?)? {
                    raw.send(&frame)?;
                    return Ok(Some(outcome_of(heard, target)));
                }
                return Ok(None);
            }
        }
    }
    // Kept open until the probe is over.
    let mut session = None;
    match (door, &attacker.own) {
        (Door::Session, Some((name, keys, kind))) => drop(open(&mut raw, *kind, name, keys)?),
        (Door::Stream, Some((name, keys, kind))) => {
            let mut control = Raw::greeted(rig.address(), &attacker.papers, Purpose::Control)?;
            let opened = open(&mut control, *kind, name, keys)?;
            join(&mut raw, &opened)?;
            session = Some(control);
        }
        _ => {}
    }
    let Some(frame) = probe(kind, target, &means(attacker, &raw)?)? else { return Ok(None) };
    raw.send(&frame)?;
    let outcome = listen(&mut raw, door, kind, target)?;
    raw.close();
    if let Some(control) = session {
        control.close();
    }
    Ok(Some(outcome))
}

fn means(attacker: &Attacker, raw: &Raw) -> Result<Means> {
    Ok(Means {
        keys: std::sync::Arc::clone(&attacker.keys),
        nonce: raw.nonce,
        request: fresh_request()?,
        session: attacker.asks_for,
    })
}

/// What is said to the probe. Where nothing has to be, a ping after it shows that nothing was.
fn listen(raw: &mut Raw, door: Door, kind: u16, target: &Target) -> Result<Outcome> {
    const FENCE: u64 = 4711;
    let is_silent = matches!(kind, kinds::PONG) || kind == kinds::CREDIT && door != Door::Data && door != Door::Stream;
    if is_silent {
        raw.say(Tag(0), &Message::Ping(Ping { stamp: FENCE }))?;
    }
    loop {
        match raw.hear()? {
            Heard::Message(_, Message::Pong(pong)) if is_silent && pong.stamp == FENCE => return Ok(Outcome::Nothing),
            // A stream's watermark may be announced at any time.
            Heard::Message(Tag(0), Message::Ack(ack)) if ack.watermark == 0 && ack.ranges.is_empty() => {}
            Heard::Message(tag, message) if tag != TAG && tag != Tag(0) => bail!("an answer to nothing: {message:?}"),
            heard => return Ok(outcome_of(heard, target)),
        }
    }
}

fn outcome_of(heard: Heard, target: &Target) -> Outcome {
    match heard {
        Heard::End(_) => Outcome::Closed,
        Heard::Message(_, Message::Refused(refusal)) => {
            Outcome::Refused(refusal.code, target.anonymous(&refusal.message))
        }
        // What differs from one moment to the next is not what is asked here.
        Heard::Message(_, Message::StatusReported(status)) => {
            let names: Vec<_> = status.repositories.iter().map(|found| found.name.to_string()).collect();
            Outcome::Answered(format!("status of {}: {names:?}", status.tenant))
        }
        // Which of the chunks asked for is not there.
        Heard::Message(_, Message::FetchDone(done)) => {
            Outcome::Answered(format!("{} blocks, {} unknown, {:?}", done.blocks, done.unknown.len() / 32, done.damage))
        }
        Heard::Message(_, message) => Outcome::Answered(target.anonymous(&format!("{message:?}"))),
        Heard::Block(_) => Outcome::Answered("a block".into()),
    }
}

/// How many lines of the server's log tell of a refusal to this attacker.
fn refusals_logged(rig: &Rig, attacker: &Attacker) -> usize {
    let log = rig.log();
    let refusals = log.lines().filter(|line| line.contains("refus"));
    match attacker.id {
        // Who was never known has an address at most.
        None => refusals.filter(|line| line.contains("connection refused")).count(),
        Some(id) => refusals.filter(|line| line.contains(&id.short())).count(),
    }
}

fn wait_for_refusals(rig: &Rig, attacker: &Attacker, wanted: usize) -> Result<()> {
    let end = clock::now() + PATIENCE;
    loop {
        let found = refusals_logged(rig, attacker);
        if found >= wanted {
            return Ok(());
        }
        let fault = attacker.fault;
        ensure!(clock::now() < end, "{fault:?}: {found} of {wanted} refusals are logged:\n{}", rig.log());
        thread::sleep(Duration::from_millis(50));
    }
}
