//! When to try again after a connection failed, and when to give up.
//!
//! Exponential back-off with full jitter: each wait is uniform between nothing and a ceiling that doubles from
//! `base` up to `cap`, so that a fleet which lost its server at one moment does not come back at one moment
//! (M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015).
//!
//! Invariants:
//! - the budget belongs to an *incident*: from the first failure until a connection made progress or stayed healthy for
//!   `healthy_after`. Failures that such a connection separates are never added up (G8);
//! - a server that asks us to wait is not a failure: a deferral uses up neither attempts nor time of the budget;
//! - given the same seed and the same inputs, the outputs are the same.

use std::time::{Duration, Instant};

use crate::planted::{self, Bug};

/// The longest wait that a peer can ask for in one deferral; more is cut to this.
pub const DEFER_MAX: Duration = Duration::from_hours(1);

/// How patient to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Policy {
    /// Ceiling of the first wait of an incident.
    pub base: Duration,
    /// Ceiling of every wait.
    pub cap: Duration,
    /// Most failures of one incident; one more gives up.
    pub attempts_max: u32,
    /// Longest incident, deferrals not counted; a failure later than this gives up.
    pub incident_max: Duration,
    /// How long a connection must hold to end an incident without having made progress.
    pub healthy_after: Duration,
}

impl Default for Policy {
    /// 200 ms doubling to 30 s; gives up after 30 minutes without any progress, or 1,000 failures.
    fn default() -> Self {
        Self {
            base: Duration::from_millis(200),
            cap: Duration::from_secs(30),
            attempts_max: 1000,
            incident_max: Duration::from_mins(30),
            healthy_after: Duration::from_secs(30),
        }
    }
}

/// What to do after a failure or a deferral.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Next {
    /// Connect again at this moment, not before.
    RetryAt(Instant),
    /// The incident's budget is used up. Failing again after this gives up again until there is progress.
    GiveUp,
}

#[derive(Clone, Copy, Debug)]
struct Incident {
    began: Instant,
    failures: u32,
    /// When it is due to try again.
    due: Instant,
    /// Waits that the peer asked for, and times in which there was nothing to connect for; they do not count as time of the
    /// incident.
    deferred: Duration,
}

/// The state of one connection's attempts. See the module's text.
#[derive(Clone, Debug)]
pub struct Reconnect {
    policy: Policy,
    /// State of an xorshift64* generator; never zero.
    random: u64,
    incident: Option<Incident>,
    /// When the connection of the moment was made; `None` while there is none.
    connected: Option<Instant>,
}

impl Reconnect {
    /// No incident. `seed` is any number that differs between processes and connections; it decides the jitter.
    pub fn new(policy: Policy, seed: u64) -> Self {
        // Spreads neighbouring seeds (the finaliser of SplitMix64) and avoids zero, where xorshift would stay.
        let mut random = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        random = (random ^ (random >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        random = (random ^ (random >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        random ^= random >> 31;
        Self { policy, random: random.max(1), incident: None, connected: None }
    }

    /// An attempt failed, or the connection was lost.
    pub fn failed(&mut self, now: Instant) -> Next {
        if let Some(since) = self.connected.take()
            && now.saturating_duration_since(since) >= self.policy.healthy_after
        {
            self.progressed(now);
        }
        let incident =
            self.incident.get_or_insert(Incident { began: now, failures: 0, due: now, deferred: Duration::ZERO });
        let lasted = now.saturating_duration_since(incident.began).saturating_sub(incident.deferred);
        if incident.failures >= self.policy.attempts_max || lasted > self.policy.incident_max {
            return Next::GiveUp;
        }
        let doublings = incident.failures.min(31);
        incident.failures += 1;
        let ceiling = self.policy.base.saturating_mul(1 << doublings).min(self.policy.cap);
        self.retry_within(now, Duration::ZERO, ceiling)
    }

    /// An attempt begins now, although it may have been due long ago: so long nobody needed the connection (s12).
    pub fn attempts(&mut self, now: Instant) {
        if let Some(incident) = &mut self.incident {
            incident.deferred = incident.deferred.saturating_add(now.saturating_duration_since(incident.due));
        }
    }

    /// A connection is up. It ends the incident only once it makes progress or has held for `healthy_after`.
    pub fn connected(&mut self, now: Instant) {
        self.connected = Some(now);
    }

    /// The connection achieved something: bytes were acknowledged, or a request was answered. Ends the incident.
    pub fn progressed(&mut self, _now: Instant) {
        if !planted::here(Bug::NeverEndsAnIncident) {
            self.incident = None;
        }
    }

    /// The peer asked to come back after `wait` (at most [`DEFER_MAX`] of it is honoured). Costs nothing of the budget.
    ///
    /// Up to a quarter of the wait is added at random, at most `cap`, so that those who were sent away together do not
    /// return together. Waits that overlap count once.
    pub fn deferred(&mut self, now: Instant, wait: Duration) -> Next {
        let wait = wait.min(DEFER_MAX);
        let spread = (wait / 4).max(self.policy.base).min(self.policy.cap);
        let waits_until = self.incident.map_or(now, |incident| incident.due.max(now));
        let next = self.retry_within(now, wait, spread);
        if let (Some(incident), Next::RetryAt(at)) = (&mut self.incident, next) {
            incident.deferred = incident.deferred.saturating_add(at.saturating_duration_since(waits_until));
            incident.due = at.max(waits_until);
        }
        next
    }

    /// Failures of the incident of the moment; 0 when all is well.
    pub fn failures(&self) -> u32 {
        self.incident.map_or(0, |incident| incident.failures)
    }

    /// At `now` plus `least` plus a random part of `spread`.
    fn retry_within(&mut self, now: Instant, least: Duration, spread: Duration) -> Next {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        let uniform = self.random.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32;
        let spread_ns = u64::try_from(spread.as_nanos()).unwrap_or(u64::MAX);
        let part_ns = u64::try_from((u128::from(spread_ns) * u128::from(uniform)) >> 32).unwrap_or(spread_ns);
        let wait = least.saturating_add(Duration::from_nanos(part_ns));
        let due = now.checked_add(wait).unwrap_or(now);
        if let Some(incident) = &mut self.incident {
            incident.due = due;
        }
        Next::RetryAt(due)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::runtime::clock;

    fn five_attempts() -> Policy {
        Policy { attempts_max: 5, ..Policy::default() }
    }

    fn wait(next: Next, now: Instant) -> Duration {
        match next {
            Next::RetryAt(at) => at - now,
            Next::GiveUp => panic!("gave up"),
        }
    }

    #[test]
    fn s12_five_failures_spread_over_hours_do_not_kill_a_stream() {
        let mut now = clock::now();
        let mut reconnect = Reconnect::new(five_attempts(), 1);
        for _ in 0..500 {
            assert!(matches!(reconnect.failed(now), Next::RetryAt(_)));
            now += Duration::from_secs(1);
            reconnect.connected(now);
            now += Duration::from_hours(1);
        }
    }

    #[test]
    fn s12_hours_in_which_nobody_needed_a_connection_are_no_part_of_an_incident() {
        let mut now = clock::now();
        let mut reconnect = Reconnect::new(Policy::default(), 1);
        for _ in 0..20 {
            assert!(matches!(reconnect.failed(now), Next::RetryAt(_)));
            now += Duration::from_hours(1);
            reconnect.attempts(now);
            now += Duration::from_secs(1);
        }
        let began = now;
        while let Next::RetryAt(at) = reconnect.failed(now) {
            reconnect.attempts(at);
            now = at + Duration::from_secs(1);
        }
        assert!(now - began > Duration::from_mins(25), "{:?}", now - began);
    }

    #[test]
    fn s12_progress_ends_an_incident_at_once_and_an_idle_moment_does_not() {
        let mut now = clock::now();
        let mut reconnect = Reconnect::new(five_attempts(), 1);
        for _ in 0..500 {
            assert!(matches!(reconnect.failed(now), Next::RetryAt(_)));
            reconnect.connected(now);
            now += Duration::from_millis(10);
            reconnect.progressed(now);
        }
        for _ in 0..5 {
            assert!(matches!(reconnect.failed(now), Next::RetryAt(_)));
            reconnect.connected(now);
            now += Duration::from_secs(29);
        }
        assert_eq!(reconnect.failed(now), Next::GiveUp, "accepting and dropping connections for ever is not health");
    }

    #[test]
    fn s13_the_budget_is_time_without_progress_and_never_time_since_the_job_began() {
        let mut now = clock::now();
        let mut reconnect = Reconnect::new(Policy { attempts_max: u32::MAX, ..Policy::default() }, 1);
        // A connection lost every ten minutes for a week.
        for _ in 0..1008 {
            assert!(matches!(reconnect.failed(now), Next::RetryAt(_)));
            now += Duration::from_secs(20);
            reconnect.connected(now);
            reconnect.progressed(now);
            now += Duration::from_secs(580);
        }
        // Then nothing at all.
        let gone = now;
        while let Next::RetryAt(at) = reconnect.failed(now) {
            now = at + Duration::from_secs(3);
        }
        let lasted = now - gone;
        assert!((Duration::from_mins(30)..Duration::from_secs(1840)).contains(&lasted), "{lasted:?}");
        assert_eq!(reconnect.failed(now), Next::GiveUp, "and it stays so");
        reconnect.progressed(now);
        assert!(matches!(reconnect.failed(now), Next::RetryAt(_)));
    }

    #[test]
    fn s18_being_asked_to_wait_uses_up_neither_attempts_nor_time() {
        let mut now = clock::now();
        let mut reconnect = Reconnect::new(five_attempts(), 9);
        reconnect.failed(now);
        for _ in 0..200 {
            let asked = Duration::from_mins(10);
            let waited = wait(reconnect.deferred(now, asked), now);
            assert!(waited >= asked && waited <= asked + Duration::from_secs(30), "{waited:?}");
            now += waited;
        }
        assert_eq!(reconnect.failures(), 1);
        for _ in 0..4 {
            assert!(matches!(reconnect.failed(now), Next::RetryAt(_)));
        }
        assert_eq!(reconnect.failed(now), Next::GiveUp);
    }

    #[test]
    fn s18_waits_that_overlap_count_once() {
        let now = clock::now();
        let mut reconnect = Reconnect::new(five_attempts(), 9);
        reconnect.failed(now);
        for minutes in [40, 20, 50, 10, 50] {
            reconnect.deferred(now, Duration::from_mins(minutes));
        }
        let at = |minutes| now + Duration::from_mins(minutes);
        assert!(matches!(reconnect.failed(at(75)), Next::RetryAt(_)), "25 minutes and what was waited for");
        assert_eq!(reconnect.failed(at(85)), Next::GiveUp);
    }

    #[test]
    fn s18_an_absurd_deferral_is_cut_short() {
        let now = clock::now();
        let waited = wait(Reconnect::new(Policy::default(), 0).deferred(now, Duration::MAX), now);
        assert!(waited <= DEFER_MAX + Policy::default().cap);
    }

    #[test]
    fn a_fleet_that_lost_its_server_at_once_comes_back_spread_out() {
        let now = clock::now();
        let mut firsts: Vec<_> =
            (0..1000).map(|seed| wait(Reconnect::new(Policy::default(), seed).failed(now), now)).collect();
        firsts.sort();
        let (low, middle, high) = (firsts[100], firsts[500], firsts[900]);
        assert!(low < Duration::from_millis(35) && high > Duration::from_millis(165), "{low:?} {high:?}");
        assert!((Duration::from_millis(85)..Duration::from_millis(115)).contains(&middle), "{middle:?}");
    }

    proptest! {
        #[test]
        fn no_wait_exceeds_its_ceiling_and_the_same_seed_waits_the_same(seed: u64, failures in 1usize..60) {
            let now = clock::now();
            let (mut one, mut other) = (Reconnect::new(Policy::default(), seed), Reconnect::new(Policy::default(), seed));
            for failure in 0..failures {
                let ceiling = Duration::from_millis(200 << failure.min(20)).min(Duration::from_secs(30));
                let next = one.failed(now);
                prop_assert!(wait(next, now) <= ceiling);
                prop_assert_eq!(next, other.failed(now));
            }
        }

        #[test]
        fn no_order_of_events_panics(seed: u64, policy_ns: [u64; 4], events in prop::collection::vec((0u8..4, any::<u64>()), 0..50)) {
            let policy = Policy {
                base: Duration::from_nanos(policy_ns[0]),
                cap: Duration::from_nanos(policy_ns[1]),
                attempts_max: 10,
                incident_max: Duration::from_nanos(policy_ns[2]),
                healthy_after: Duration::from_nanos(policy_ns[3]),
            };
            let mut reconnect = Reconnect::new(policy, seed);
            let start = clock::now();
            for (event, ns) in events {
                let now = start + Duration::from_nanos(ns >> 2);
                match event {
                    0 => { reconnect.failed(now); }
                    1 => reconnect.connected(now),
                    2 => reconnect.progressed(now),
                    _ => { reconnect.deferred(now, Duration::from_secs(ns)); }
                }
            }
        }
    }
}
