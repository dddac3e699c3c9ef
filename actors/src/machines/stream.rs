//! The life of one data stream, as a pure machine (guarantee G4: one owner per socket, always closed, in this order).
//!
//! ```text
//! initiator: Joining → Active → Draining (Drain sent) → Closing (close_notify + FIN sent) → Closed
//! acceptor:  Joining → Active → Draining (Drain seen, acknowledging) → Finishing (Drained sent) → Closing → Closed
//! any state: fault → Failing (socket is being closed) → Closed
//! ```
//! A server that stops asks its active streams to drain by sending `Drain` itself; the initiator then does so.
//! Invariants: `Output::Close` is given exactly once, and always before `Output::Stop`; after `Stop` nothing is given;
//! a stream that fails says so once (`Lost`), at once, so that its blocks can be sent by others; only the absence of
//! progress times out, never a total duration.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::planted::{self, Bug};

/// Which end of the connection this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The agent: connects, joins, decides when to drain.
    Initiator,
    /// The server: is joined, acknowledges, answers the drain.
    Acceptor,
}

/// Time limits of a stream. All of them measure the absence of progress.
#[derive(Clone, Copy, Debug)]
pub struct StreamLimits {
    /// No byte in either direction for so long: the stream is lost.
    pub progress: Duration,
    /// Quiet for so long: the initiator pings.
    pub ping: Duration,
    /// How long a failed stream may take to close its socket in good order.
    pub close: Duration,
}

impl Default for StreamLimits {
    fn default() -> Self {
        Self { progress: Duration::from_mins(1), ping: Duration::from_secs(15), close: Duration::from_secs(2) }
    }
}

/// What happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Input {
    /// The connection is made and greeted.
    Connected,
    /// Initiator: the server said `Joined`. Acceptor: the session took the stream.
    Joined,
    /// The owner wants no more of this stream.
    DrainAsked,
    /// The peer said `Drain`.
    PeerDrain,
    /// Everything received has been acknowledged and written out (acceptor).
    Settled,
    /// The peer said `Drained` (initiator).
    PeerDrained,
    /// The peer's half is closed: close_notify and FIN were read.
    PeerClosed,
    /// Our half is closed: close_notify and FIN are written.
    Closed,
    /// Bytes came in, or bytes other than pings went out.
    Progress,
    /// Something broke.
    Fault(String),
    /// Time has passed.
    Tick,
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Output {
    /// Send `Join` (initiator).
    SendJoin,
    /// Send `Joined` (acceptor).
    SendJoined,
    /// Send `Drain`: the initiator's begins the end, the acceptor's asks for it.
    SendDrain,
    /// Send `Drained` (acceptor).
    SendDrained,
    /// Send `Ping` (initiator).
    SendPing,
    /// Tell the owner that the stream is lost: its unacknowledged blocks are free for others.
    Lost(String),
    /// Write what is queued, then close_notify and FIN.
    Close,
    /// The socket may be dropped; the actor stops. Clean means drained.
    Stop {
        /// Whether the stream ended by draining.
        clean: bool,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Connecting,
    Joining,
    Active,
    Draining,
    Finishing,
    Closing { peer_closed: bool, closed: bool },
    Failing,
    Stopped,
}

/// See the module.
#[derive(Debug)]
pub struct StreamMachine {
    role: Role,
    limits: StreamLimits,
    state: State,
    drain_asked: bool,
    entered: Instant,
    progressed: Instant,
    pinged: Option<Instant>,
    outputs: VecDeque<Output>,
}

impl StreamMachine {
    /// A stream whose connection is being made (initiator) or has just been accepted.
    pub fn new(role: Role, limits: StreamLimits, now: Instant) -> Self {
        Self {
            role,
            limits,
            state: State::Connecting,
            drain_asked: false,
            entered: now,
            progressed: now,
            pinged: None,
            outputs: VecDeque::new(),
        }
    }

    /// Whether blocks may be sent or received.
    pub fn is_active(&self) -> bool {
        self.state == State::Active
    }

    /// Whether the machine has given `Stop`.
    pub fn is_stopped(&self) -> bool {
        self.state == State::Stopped
    }

    /// Name of the state, for the observable state.
    pub fn state_name(&self) -> &'static str {
        match self.state {
            State::Connecting => "connecting",
            State::Joining => "joining",
            State::Active => "active",
            State::Draining => "draining",
            State::Finishing => "finishing",
            State::Closing { .. } => "closing",
            State::Failing => "failing",
            State::Stopped => "stopped",
        }
    }

    /// The next thing to do.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// Feeds one input at time `now`.
    pub fn handle(&mut self, now: Instant, input: Input) {
        if self.state == State::Stopped || (self.state == State::Failing && planted::here(Bug::LeavesSocketsBehind)) {
            return;
        }
        match input {
            Input::Progress => self.progressed(now),
            Input::Fault(reason) => self.fail(now, reason),
            Input::Tick => self.tick(now),
            Input::Connected => self.connected(now),
            Input::Joined => self.joined(now),
            Input::DrainAsked => self.drain_asked(now),
            Input::PeerDrain => self.peer_drain(now),
            Input::Settled => self.settled(now),
            Input::PeerDrained => self.peer_drained(now),
            Input::PeerClosed => self.peer_closed(now),
            Input::Closed => self.closed(now),
        }
    }

    fn enter(&mut self, now: Instant, state: State) {
        self.state = state;
        self.entered = now;
        self.progressed(now);
    }

    fn progressed(&mut self, now: Instant) {
        self.progressed = now;
        self.pinged = None;
    }

    fn connected(&mut self, now: Instant) {
        if self.state != State::Connecting {
            return;
        }
        self.enter(now, State::Joining);
        if self.role == Role::Initiator {
            self.outputs.push_back(Output::SendJoin);
        }
    }

    fn joined(&mut self, now: Instant) {
        if self.state != State::Joining {
            return self.fail(now, "the peer joined a stream twice".into());
        }
        self.enter(now, State::Active);
        if self.role == Role::Acceptor {
            self.outputs.push_back(Output::SendJoined);
        }
        if self.drain_asked {
            self.drain_asked(now);
        }
    }

    fn drain_asked(&mut self, now: Instant) {
        self.drain_asked = true;
        match self.state {
            State::Active if planted::here(Bug::ClosesBeforeItIsDrained) => self.close(now, false),
            State::Active => {
                if self.role == Role::Initiator {
                    self.enter(now, State::Draining);
                }
                self.outputs.push_back(Output::SendDrain);
            }
            // Nothing was ever sent on it: there is nothing to wait for.
            State::Connecting => self.close(now, false),
            _ => {}
        }
    }

    fn peer_drain(&mut self, now: Instant) {
        match (self.role, self.state) {
            (Role::Acceptor, State::Active) => self.enter(now, State::Draining),
            (Role::Initiator, State::Active) => self.drain_asked(now),
            (Role::Initiator, State::Draining | State::Closing { .. } | State::Failing) => {}
            _ => self.fail(now, "the peer drains a stream that is not active".into()),
        }
    }

    fn settled(&mut self, now: Instant) {
        if (self.role, self.state) == (Role::Acceptor, State::Draining) {
            self.enter(now, State::Finishing);
            self.outputs.push_back(Output::SendDrained);
        }
    }

    fn peer_drained(&mut self, now: Instant) {
        match (self.role, self.state) {
            (Role::Initiator, State::Draining) => self.close(now, false),
            _ => self.fail(now, "the peer answers a drain that nobody asked for".into()),
        }
    }

    fn peer_closed(&mut self, now: Instant) {
        match self.state {
            State::Finishing => self.close(now, true),
            State::Closing { closed: false, .. } => self.state = State::Closing { peer_closed: true, closed: false },
            State::Closing { closed: true, .. } => self.stop(true),
            State::Failing => {}
            _ => self.fail(now, "the peer closed the connection".into()),
        }
    }

    fn closed(&mut self, now: Instant) {
        match self.state {
            State::Closing { peer_closed: true, .. } => self.stop(true),
            State::Closing { peer_closed: false, .. } => {
                self.state = State::Closing { peer_closed: false, closed: true };
                self.entered = now;
            }
            State::Failing => self.stop(false),
            _ => self.fail(now, "the socket was closed by somebody else".into()),
        }
    }

    fn close(&mut self, now: Instant, peer_closed: bool) {
        self.enter(now, State::Closing { peer_closed, closed: false });
        self.outputs.push_back(Output::Close);
    }

    fn fail(&mut self, now: Instant, reason: String) {
        match self.state {
            State::Failing | State::Stopped => {}
            State::Closing { closed, .. } => {
                // Everything was acknowledged before: the end is clean, only its form was not.
                if closed {
                    self.stop(true);
                } else {
                    self.enter(now, State::Failing);
                }
            }
            _ => {
                self.enter(now, State::Failing);
                self.outputs.push_back(Output::Lost(reason));
                self.outputs.push_back(Output::Close);
            }
        }
    }

    fn stop(&mut self, clean: bool) {
        self.state = State::Stopped;
        self.outputs.push_back(Output::Stop { clean });
    }

    fn tick(&mut self, now: Instant) {
        let quiet = now.saturating_duration_since(self.progressed);
        match self.state {
            State::Failing if now.saturating_duration_since(self.entered) >= self.limits.close => self.stop(false),
            State::Closing { closed: true, .. } if now.saturating_duration_since(self.entered) >= self.limits.close => {
                self.stop(true);
            }
            State::Failing | State::Stopped => {}
            _ if quiet >= self.limits.progress && !planted::here(Bug::WaitsForStalledStreams) => {
                self.fail(now, format!("no progress for {} s", self.limits.progress.as_secs()));
            }
            State::Active if self.role == Role::Initiator => {
                let since = self.pinged.unwrap_or(self.progressed);
                if now.saturating_duration_since(since) >= self.limits.ping && !planted::here(Bug::NeverPings) {
                    self.pinged = Some(now);
                    self.outputs.push_back(Output::SendPing);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::runtime::clock;

    fn outputs(machine: &mut StreamMachine) -> Vec<Output> {
        std::iter::from_fn(|| machine.poll_output()).collect()
    }

    fn active(role: Role, now: Instant) -> StreamMachine {
        let mut machine = StreamMachine::new(role, StreamLimits::default(), now);
        machine.handle(now, Input::Connected);
        machine.handle(now, Input::Joined);
        outputs(&mut machine);
        machine
    }

    #[test]
    fn s02_an_initiator_closes_in_this_exact_order() {
        let now = clock::now();
        let mut stream = active(Role::Initiator, now);
        stream.handle(now, Input::DrainAsked);
        assert_eq!(outputs(&mut stream), [Output::SendDrain]);
        stream.handle(now, Input::PeerDrained);
        assert_eq!(outputs(&mut stream), [Output::Close]);
        stream.handle(now, Input::Closed);
        assert_eq!(outputs(&mut stream), []);
        stream.handle(now, Input::PeerClosed);
        assert_eq!(outputs(&mut stream), [Output::Stop { clean: true }]);
    }

    #[test]
    fn s02_an_acceptor_closes_in_this_exact_order() {
        let now = clock::now();
        let mut stream = active(Role::Acceptor, now);
        stream.handle(now, Input::PeerDrain);
        assert_eq!(outputs(&mut stream), []);
        stream.handle(now, Input::Settled);
        assert_eq!(outputs(&mut stream), [Output::SendDrained]);
        stream.handle(now, Input::PeerClosed);
        assert_eq!(outputs(&mut stream), [Output::Close]);
        stream.handle(now, Input::Closed);
        assert_eq!(outputs(&mut stream), [Output::Stop { clean: true }]);
    }

    #[test]
    fn a_server_that_stops_asks_and_the_agent_drains() {
        let now = clock::now();
        let (mut server, mut agent) = (active(Role::Acceptor, now), active(Role::Initiator, now));
        server.handle(now, Input::DrainAsked);
        assert_eq!(outputs(&mut server), [Output::SendDrain]);
        assert!(server.is_active(), "blocks under way are still taken");
        agent.handle(now, Input::PeerDrain);
        assert_eq!(outputs(&mut agent), [Output::SendDrain]);
    }

    #[test]
    fn s02_a_peer_that_closes_without_draining_is_a_loss_and_its_socket_is_still_closed() {
        for role in [Role::Initiator, Role::Acceptor] {
            let now = clock::now();
            let mut stream = active(role, now);
            stream.handle(now, Input::PeerClosed);
            assert!(matches!(&outputs(&mut stream)[..], [Output::Lost(_), Output::Close]));
            stream.handle(now, Input::Closed);
            assert_eq!(outputs(&mut stream), [Output::Stop { clean: false }]);
        }
    }

    #[test]
    fn s13_progress_postpones_the_time_out_for_ever() {
        let mut now = clock::now();
        let mut stream = active(Role::Acceptor, now);
        for _ in 0..10_000 {
            now += Duration::from_secs(59);
            stream.handle(now, Input::Progress);
            stream.handle(now, Input::Tick);
            assert_eq!(outputs(&mut stream), []);
        }
        now += Duration::from_mins(1);
        stream.handle(now, Input::Tick);
        assert!(matches!(&outputs(&mut stream)[..], [Output::Lost(_), Output::Close]));
    }

    #[test]
    fn s14_a_quiet_stream_is_pinged_and_not_lost_while_it_answers() {
        let mut now = clock::now();
        let mut stream = active(Role::Initiator, now);
        let mut pings = 0;
        for second in 0..3600u32 {
            now += Duration::from_secs(1);
            stream.handle(now, Input::Tick);
            for output in outputs(&mut stream) {
                assert_eq!(output, Output::SendPing, "second {second}");
                pings += 1;
                stream.handle(now + Duration::from_millis(200), Input::Progress);
            }
        }
        assert!((200..=240).contains(&pings), "{pings} pings in an hour");
    }

    #[test]
    fn s22_a_half_open_peer_is_found_within_the_progress_limit_plus_a_tick() {
        let start = clock::now();
        let mut stream = active(Role::Initiator, start);
        let mut lost = None;
        for second in 1..=70 {
            stream.handle(start + Duration::from_secs(second), Input::Tick);
            if outputs(&mut stream).iter().any(|output| matches!(output, Output::Lost(_))) {
                lost = Some(second);
                break;
            }
        }
        assert_eq!(lost, Some(60));
    }

    fn any_input() -> impl Strategy<Value = Input> {
        prop_oneof![
            Just(Input::Connected),
            Just(Input::Joined),
            Just(Input::DrainAsked),
            Just(Input::PeerDrain),
            Just(Input::Settled),
            Just(Input::PeerDrained),
            Just(Input::PeerClosed),
            Just(Input::Closed),
            Just(Input::Progress),
            Just(Input::Fault("cut".into())),
            Just(Input::Tick),
        ]
    }

    proptest! {
        #[test]
        fn s02_every_history_closes_the_socket_once_and_then_stops_once(
            initiator: bool,
            history in proptest::collection::vec((any_input(), 0u64..40), 0..40),
        ) {
            let role = if initiator { Role::Initiator } else { Role::Acceptor };
            let mut now = clock::now();
            let mut stream = StreamMachine::new(role, StreamLimits::default(), now);
            let mut all = Vec::new();
            for (input, seconds) in history {
                now += Duration::from_secs(seconds);
                stream.handle(now, input);
                all.extend(outputs(&mut stream));
            }
            // Then the peer is silent for ever.
            for _ in 0..200 {
                now += Duration::from_secs(1);
                if all.contains(&Output::Close) { stream.handle(now, Input::Closed); }
                stream.handle(now, Input::Tick);
                all.extend(outputs(&mut stream));
            }
            let count = |wanted: fn(&Output) -> bool| all.iter().filter(|output| wanted(output)).count();
            prop_assert_eq!(count(|output| *output == Output::Close), 1);
            prop_assert_eq!(count(|output| matches!(output, Output::Stop { .. })), 1);
            prop_assert!(count(|output| matches!(output, Output::Lost(_))) <= 1);
            let stopped_last = matches!(all.last(), Some(Output::Stop { .. }));
            prop_assert!(stopped_last);
            prop_assert!(stream.is_stopped());
        }
    }
}
