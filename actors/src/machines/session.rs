//! The life of one session on the server, as a pure machine.
//!
//! ```text
//! Opened → Receiving → Sealing (Commit arrived, waits for the watermark) → Committing (storage works) → Committed
//!             ↑                                                              │ Missing
//!             └──────────────────────────────────────────────────────────────┘
//! any state → Aborted | Failed | Expired
//! ```
//! Invariants: exactly one terminal state is recorded (G13); completion is "the watermark passed the declared last
//! sequence", never a count of streams (s09); an event of an old incarnation changes nothing (s08); the grace timer runs
//! only while there is no connection at all and is forgotten at every attachment (s07).

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use strandline_messages::Incarnation;

use crate::planted::{self, Bug};

/// Time limits of a session.
#[derive(Clone, Copy, Debug)]
pub struct SessionLimits {
    /// No connection of any kind for so long: expired.
    pub grace: Duration,
    /// No acknowledged progress for so long, however lively the connection: expired.
    pub progress: Duration,
}

impl Default for SessionLimits {
    fn default() -> Self {
        Self { grace: Duration::from_mins(10), progress: Duration::from_hours(24) }
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// A data stream joined.
    StreamJoined,
    /// A data stream ended.
    StreamLeft,
    /// The control connection of this incarnation was lost.
    ControlLost(Incarnation),
    /// Every sequence number below this is durable.
    Watermark(u64),
    /// A restore's block went out.
    BlockSent,
    /// The agent wants to commit once the watermark has reached `blocks`.
    Commit {
        /// Number of blocks of the session.
        blocks: u64,
    },
    /// Storage committed the snapshot.
    Committed,
    /// Storage misses chunks.
    Missing,
    /// Storage refused the manifest; the session goes on.
    Refused,
    /// The agent gives up.
    Abort(String),
    /// A block could not be stored.
    BlockLost(String),
    /// Something broke for good.
    Fault(String),
    /// The session has served its purpose (restore sessions end so).
    Finish,
    /// Time has passed.
    Tick,
}

/// How a session ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Terminal {
    /// Its snapshot is committed (or its restore is finished).
    Committed,
    /// Something broke.
    Failed,
    /// The agent gave up.
    Aborted,
    /// Nobody was there any more.
    Expired,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// The watermark has been reached: check completeness and commit.
    StartCommit,
    /// Tell the agent that the session ended already, and how.
    CommitTooLate(Terminal),
    /// Record the terminal state; streams are let drain, nothing is accepted any more.
    End(Terminal, String),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Opened,
    Receiving,
    Sealing { blocks: u64 },
    Committing,
    Ended(Terminal),
}

/// See the module.
#[derive(Debug)]
pub struct SessionMachine {
    limits: SessionLimits,
    state: State,
    incarnation: Incarnation,
    /// The last one that has asked for something: so its agent knows of it.
    heard_of: Incarnation,
    control: bool,
    streams: u32,
    watermark: u64,
    alone_since: Option<Instant>,
    progressed: Instant,
    outputs: VecDeque<Output>,
}

impl SessionMachine {
    /// A session that was just registered, its control connection attached with the first incarnation.
    pub fn new(limits: SessionLimits, now: Instant) -> Self {
        Self {
            limits,
            state: State::Opened,
            incarnation: Incarnation(1),
            heard_of: Incarnation(1),
            control: true,
            streams: 0,
            watermark: 0,
            alone_since: None,
            progressed: now,
            outputs: VecDeque::new(),
        }
    }

    /// The incarnation whose control connection speaks for the session.
    pub fn incarnation(&self) -> Incarnation {
        self.incarnation
    }

    /// Streams joined now.
    pub fn streams(&self) -> u32 {
        self.streams
    }

    /// Whether nobody is connected and nothing is at work: the session only waits for its agent to come back.
    pub fn is_abandoned(&self) -> bool {
        self.alone_since.is_some() && !matches!(self.state, State::Committing | State::Ended(_))
    }

    /// How the session ended, if it has.
    pub fn ended(&self) -> Option<Terminal> {
        match self.state {
            State::Ended(terminal) => Some(terminal),
            _ => None,
        }
    }

    /// Name of the state, for people.
    pub fn state_name(&self) -> &'static str {
        match self.state {
            State::Opened => "opened",
            State::Receiving => "receiving",
            State::Sealing { .. } => "sealing",
            State::Committing => "committing",
            State::Ended(Terminal::Committed) => "committed",
            State::Ended(Terminal::Failed) => "failed",
            State::Ended(Terminal::Aborted) => "aborted",
            State::Ended(Terminal::Expired) => "expired",
        }
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// A control connection wants to speak for the session; it last had incarnation `known`. Gives the new incarnation, or
    /// `None` if another connection has taken over since. One counts only once it has asked for something: until then its
    /// agent may never have heard of it.
    pub fn attach(&mut self, known: Incarnation) -> Option<Incarnation> {
        let oldest = if planted::here(Bug::CountsUnheardIncarnations) { self.incarnation } else { self.heard_of };
        if known < oldest || known > self.incarnation {
            return None;
        }
        self.incarnation = Incarnation(self.incarnation.0 + 1);
        self.control = true;
        self.note_company();
        Some(self.incarnation)
    }

    /// The connection of this incarnation asks for something; whether it still speaks for the session.
    pub fn asks(&mut self, incarnation: Incarnation) -> bool {
        let speaks = incarnation == self.incarnation;
        if speaks {
            self.heard_of = incarnation;
        }
        speaks
    }

    /// Feeds one input at time `now`.
    pub fn handle(&mut self, now: Instant, input: Input) {
        match input {
            Input::StreamJoined => {
                self.streams += 1;
                self.note_company();
                if self.state == State::Opened {
                    self.state = State::Receiving;
                }
            }
            Input::StreamLeft => {
                self.streams = self.streams.saturating_sub(1);
                self.note_solitude(now);
            }
            Input::ControlLost(incarnation) if incarnation == self.incarnation => {
                self.control = false;
                self.note_solitude(now);
            }
            Input::Watermark(watermark) if watermark > self.watermark => {
                self.watermark = watermark;
                self.progressed = now;
                self.maybe_commit();
            }
            Input::BlockSent => self.progressed = now,
            Input::Commit { blocks } => self.commit(now, blocks),
            Input::Committed if self.state == State::Committing => self.end(Terminal::Committed, "committed"),
            Input::Missing | Input::Refused if self.state == State::Committing => {
                self.state = State::Receiving;
                self.progressed = now;
            }
            Input::ControlLost(_) | Input::Watermark(_) | Input::Committed | Input::Missing | Input::Refused => {}
            // Every block of the session is durable: it was another copy of one of them.
            Input::BlockLost(_) if self.state == State::Committing && !planted::here(Bug::DiesOfALateCopy) => {}
            Input::Abort(reason) => self.end(Terminal::Aborted, &reason),
            Input::BlockLost(reason) | Input::Fault(reason) => self.end(Terminal::Failed, &reason),
            Input::Finish => self.end(Terminal::Committed, "finished"),
            Input::Tick => self.tick(now),
        }
    }

    fn note_company(&mut self) {
        if !planted::here(Bug::KeepsTheGraceTimer) {
            self.alone_since = None;
        }
    }

    fn note_solitude(&mut self, now: Instant) {
        if !self.control && self.streams == 0 && self.alone_since.is_none() {
            self.alone_since = Some(now);
        }
    }

    fn commit(&mut self, now: Instant, blocks: u64) {
        match self.state {
            State::Ended(terminal) => self.outputs.push_back(Output::CommitTooLate(terminal)),
            // The same request again after a reconnect: the running commit answers it.
            State::Committing => {}
            _ => {
                self.progressed = now;
                self.state = State::Sealing { blocks };
                self.maybe_commit();
            }
        }
    }

    fn maybe_commit(&mut self) {
        let early = planted::here(Bug::CommitsBeforeTheWatermark);
        if matches!(self.state, State::Sealing { blocks } if self.watermark >= blocks || early) {
            self.state = State::Committing;
            self.outputs.push_back(Output::StartCommit);
        }
    }

    fn end(&mut self, terminal: Terminal, reason: &str) {
        if self.ended().is_none() {
            self.state = State::Ended(terminal);
            self.outputs.push_back(Output::End(terminal, reason.to_owned()));
        }
    }

    fn tick(&mut self, now: Instant) {
        // Storage is at work on the commit: its outcome alone decides.
        if self.state == State::Committing || planted::here(Bug::NeverExpires) {
            return;
        }
        let since = |start: Instant| now.saturating_duration_since(start);
        if self.alone_since.is_some_and(|alone| since(alone) >= self.limits.grace) {
            let minutes = self.limits.grace.as_secs() / 60;
            self.end(Terminal::Expired, &format!("no connection for {minutes} minutes"));
        } else if since(self.progressed) >= self.limits.progress {
            let hours = self.limits.progress.as_secs() / 3600;
            self.end(Terminal::Expired, &format!("no acknowledged progress for {hours} hours"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::clock;

    fn outputs(machine: &mut SessionMachine) -> Vec<Output> {
        std::iter::from_fn(|| machine.poll_output()).collect()
    }

    fn receiving(now: Instant) -> SessionMachine {
        let mut session = SessionMachine::new(SessionLimits::default(), now);
        session.handle(now, Input::StreamJoined);
        session
    }

    const MINUTE: Duration = Duration::from_mins(1);

    #[test]
    fn s09_completion_is_the_watermark_and_nothing_else() {
        let now = clock::now();
        let mut session = SessionMachine::new(SessionLimits::default(), now);
        // No stream has joined yet: a count of streams would call this complete.
        session.handle(now, Input::Commit { blocks: 3 });
        assert_eq!(outputs(&mut session), []);
        session.handle(now, Input::StreamJoined);
        session.handle(now, Input::Watermark(2));
        session.handle(now, Input::StreamLeft);
        assert_eq!(outputs(&mut session), []);
        session.handle(now, Input::Watermark(3));
        assert_eq!(outputs(&mut session), [Output::StartCommit]);
    }

    #[test]
    fn s06_a_session_whose_connections_are_all_gone_commits_after_the_agent_is_back() {
        let now = clock::now();
        let mut session = receiving(now);
        session.handle(now, Input::Watermark(5));
        session.handle(now, Input::StreamLeft);
        session.handle(now, Input::ControlLost(Incarnation(1)));
        session.handle(now + 9 * MINUTE, Input::Tick);
        assert_eq!(outputs(&mut session), []);
        assert_eq!(session.attach(Incarnation(1)), Some(Incarnation(2)));
        session.handle(now + 20 * MINUTE, Input::Commit { blocks: 5 });
        assert_eq!(outputs(&mut session), [Output::StartCommit]);
        session.handle(now + 20 * MINUTE, Input::Committed);
        assert!(matches!(&outputs(&mut session)[..], [Output::End(Terminal::Committed, _)]));
        // The reply was lost: the agent asks again and is told how the session ended.
        session.handle(now + 21 * MINUTE, Input::Commit { blocks: 5 });
        assert_eq!(outputs(&mut session), [Output::CommitTooLate(Terminal::Committed)]);
    }

    #[test]
    fn s07_the_grace_timer_is_forgotten_at_re_attachment() {
        let now = clock::now();
        let mut session = SessionMachine::new(SessionLimits::default(), now);
        session.handle(now, Input::ControlLost(Incarnation(1)));
        session.attach(Incarnation(1)).unwrap();
        session.handle(now + 60 * MINUTE, Input::Tick);
        assert_eq!(outputs(&mut session), []);
        session.handle(now + 60 * MINUTE, Input::ControlLost(Incarnation(2)));
        session.handle(now + 69 * MINUTE, Input::Tick);
        assert_eq!(outputs(&mut session), []);
        session.handle(now + 70 * MINUTE, Input::Tick);
        assert!(matches!(&outputs(&mut session)[..], [Output::End(Terminal::Expired, _)]));
    }

    #[test]
    fn s08_a_late_disconnect_of_an_old_connection_changes_nothing() {
        let now = clock::now();
        let mut session = SessionMachine::new(SessionLimits::default(), now);
        session.attach(Incarnation(1)).unwrap();
        session.handle(now, Input::ControlLost(Incarnation(1)));
        session.handle(now + 60 * MINUTE, Input::Tick);
        assert_eq!(outputs(&mut session), []);
        assert!(session.asks(Incarnation(2)) && !session.asks(Incarnation(1)));
        assert_eq!(session.attach(Incarnation(1)), None, "a superseded incarnation may not come back");
    }

    #[test]
    fn s06_an_agent_that_never_heard_that_it_was_attached_may_attach_again() {
        let mut session = SessionMachine::new(SessionLimits::default(), clock::now());
        assert_eq!(session.attach(Incarnation(1)), Some(Incarnation(2)));
        assert_eq!(session.attach(Incarnation(1)), Some(Incarnation(3)), "the answer was lost");
        assert!(!session.asks(Incarnation(2)) && session.asks(Incarnation(3)));
        assert_eq!(session.attach(Incarnation(1)), None, "it has heard of the third");
        assert_eq!(session.attach(Incarnation(5)), None, "never given");
        assert_eq!(session.attach(Incarnation(3)), Some(Incarnation(4)));
    }

    #[test]
    fn s06_another_copy_of_a_block_may_fail_while_the_session_commits() {
        let now = clock::now();
        let mut session = receiving(now);
        session.handle(now, Input::BlockLost("the lease is gone".into()));
        assert!(session.ended().is_some());
        let mut session = receiving(now);
        session.handle(now, Input::Watermark(5));
        session.handle(now, Input::Commit { blocks: 5 });
        session.handle(now, Input::BlockLost("the lease is gone".into()));
        session.handle(now, Input::Committed);
        assert_eq!(session.ended(), Some(Terminal::Committed));
    }

    #[test]
    fn s13_slow_progress_never_expires_a_session() {
        let mut now = clock::now();
        let mut session = receiving(now);
        for watermark in 1..100 {
            now += Duration::from_hours(23);
            session.handle(now, Input::Watermark(watermark));
            session.handle(now, Input::Tick);
        }
        assert_eq!(outputs(&mut session), []);
    }

    #[test]
    fn s17_after_an_abort_no_block_is_accepted_and_nothing_commits() {
        let now = clock::now();
        let mut session = receiving(now);
        session.handle(now, Input::Abort("interrupted".into()));
        assert_eq!(session.ended(), Some(Terminal::Aborted));
        assert_eq!(outputs(&mut session), [Output::End(Terminal::Aborted, "interrupted".into())]);
        session.handle(now, Input::Watermark(9));
        session.handle(now, Input::Commit { blocks: 1 });
        session.handle(now, Input::Fault("late".into()));
        assert_eq!(outputs(&mut session), [Output::CommitTooLate(Terminal::Aborted)]);
    }

    #[test]
    fn a_commit_that_misses_chunks_leads_back_to_receiving() {
        let now = clock::now();
        let mut session = receiving(now);
        session.handle(now, Input::Commit { blocks: 0 });
        assert_eq!(outputs(&mut session), [Output::StartCommit]);
        session.handle(now, Input::Missing);
        assert_eq!(session.state_name(), "receiving");
        session.handle(now, Input::Commit { blocks: 2 });
        session.handle(now, Input::Watermark(2));
        assert_eq!(outputs(&mut session), [Output::StartCommit]);
    }
}
