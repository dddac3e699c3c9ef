//! When each job of maintenance runs next: one at a time, each about once in its interval, whatever the clock does.
//!
//! The wall clock has a say only when a job becomes known: how long ago it ended before the process was started. From then on
//! the monotonic clock counts, so a wall clock that jumps makes nothing due and keeps nothing from becoming due. A job that is
//! overdue, or seems to be, does not start at once but within the first tenth of its interval (at most ten minutes), at a
//! moment of its own: many repositories do not start together. One that seems to have ended in the future is due after one
//! interval at the latest.
//!
//! A job that fails is tried again after five minutes, then ten, twenty, … up to its interval.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Longest time by which the starts of jobs are spread.
const SPREAD_MAX: Duration = Duration::from_mins(10);
/// After its first failure a job is tried again after this.
const BACKOFF_MIN: Duration = Duration::from_mins(5);
/// Doublings of that.
const DOUBLINGS_MAX: u32 = 16;
/// A full pass over a repository takes at least so many pieces, if a piece then lasts a minute.
const PIECES_MIN: u64 = 30;
/// And at most so many: a piece is at least a thousandth.
const PIECES_MAX: u64 = 1000;
/// A piece is due at most so often.
const PIECE_EVERY_MIN: Duration = Duration::from_mins(1);
/// A piece is due at least so often, if that makes no more than [`PIECES_MAX`].
const PIECE_EVERY_MAX: Duration = Duration::from_hours(24);

/// How a job last ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LastRun {
    /// When, ns since 1970 by the wall clock.
    pub finished_ns: i64,
    /// Whether it failed.
    pub failed: bool,
}

/// A job that is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// How often; zero: never.
    pub every: Duration,
    /// Where in the spread it stands: any number, the same for one job, another for others.
    pub place: u16,
    /// How it last ended, if it ever did.
    pub last: Option<LastRun>,
}

#[derive(Clone, Copy, Debug)]
struct Job {
    wanted: Wanted,
    due: Instant,
    failures: u32,
}

/// The decision; see the module. Memory: one entry for each job.
#[derive(Clone, Debug)]
pub struct MaintenanceMachine<K> {
    jobs: BTreeMap<K, Job>,
    running: Option<(K, Instant)>,
}

impl<K> Default for MaintenanceMachine<K> {
    fn default() -> Self {
        Self { jobs: BTreeMap::new(), running: None }
    }
}

impl<K: Ord + Clone> MaintenanceMachine<K> {
    /// These are the jobs that there are now. One whose interval and last end are as known stays due when it was.
    pub fn know(&mut self, now: Instant, wall_ns: i64, wanted: impl IntoIterator<Item = (K, Wanted)>) {
        let mut before = std::mem::take(&mut self.jobs);
        for (key, wanted) in wanted.into_iter().filter(|(_, wanted)| !wanted.every.is_zero()) {
            let job = match before.remove(&key) {
                Some(job) if job.wanted == wanted => job,
                old => {
                    let failures = old.map_or(0, |job| job.failures);
                    let failed = wanted.last.is_some_and(|last| last.failed);
                    let failures = if failed { failures.max(1) } else { 0 };
                    Job { wanted, due: first_due(now, wall_ns, wanted, failures), failures }
                }
            };
            self.jobs.insert(key, job);
        }
    }

    /// The job that starts now, if one is due and none runs: the one that has been due for longest.
    pub fn start(&mut self, now: Instant) -> Option<K> {
        if self.running.is_some() {
            return None;
        }
        let due = self.jobs.iter().filter(|(_, job)| job.due <= now);
        let (key, _) = due.min_by_key(|(_, job)| job.due)?;
        self.running = Some((key.clone(), now));
        Some(key.clone())
    }

    /// The job that was started has ended.
    pub fn ended(&mut self, now: Instant, failed: bool) {
        let Some((key, started)) = self.running.take() else { return };
        let Some(job) = self.jobs.get_mut(&key) else { return };
        if failed {
            job.failures = job.failures.saturating_add(1);
            job.due = now + retry_after(job.wanted.every, job.failures);
        } else {
            job.failures = 0;
            job.due = (started + job.wanted.every).max(now);
        }
    }

    /// What became of the last run was written down, so it is not news when [`Self::know`] is told.
    pub fn noted(&mut self, key: &K, last: LastRun) {
        if let Some(job) = self.jobs.get_mut(key) {
            job.wanted.last = Some(last);
        }
    }

    /// When [`Self::start`] is to be asked again, if no job runs.
    pub fn timeout(&self) -> Option<Instant> {
        if self.running.is_some() {
            return None;
        }
        self.jobs.values().map(|job| job.due).min()
    }

    /// The job that runs.
    pub fn running(&self) -> Option<&K> {
        self.running.as_ref().map(|(key, _)| key)
    }
}

fn first_due(now: Instant, wall_ns: i64, wanted: Wanted, failures: u32) -> Instant {
    let Wanted { every, place, last } = wanted;
    let interval = if failures > 0 { retry_after(every, failures) } else { every };
    let left = last.map_or(Duration::ZERO, |last| {
        let ago = Duration::from_nanos(u64::try_from(wall_ns.saturating_sub(last.finished_ns)).unwrap_or(0));
        interval.saturating_sub(ago)
    });
    let spread = (every / 10).min(SPREAD_MAX);
    now + left + spread * u32::from(place % 1000) / 1000
}

fn retry_after(every: Duration, failures: u32) -> Duration {
    let doublings = failures.saturating_sub(1).min(DOUBLINGS_MAX);
    BACKOFF_MIN.saturating_mul(1 << doublings).min(every)
}

/// How a pass over everything that is to take `every` is cut into pieces: how often one is due, and how many thousandths of
/// everything it is. All pieces of a pass together are at least everything.
pub fn pieces(every: Duration) -> (Duration, u32) {
    let whole = |part: Duration| u64::try_from(every.as_nanos() / part.as_nanos().max(1)).unwrap_or(u64::MAX);
    let wished = whole(PIECE_EVERY_MAX).clamp(PIECES_MIN, PIECES_MAX);
    let count = wished.min(whole(PIECE_EVERY_MIN)).max(1);
    let count = u32::try_from(count).unwrap_or(1);
    (every / count, 1000_u32.div_ceil(count))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::clock;

    const DAY: Duration = Duration::from_hours(24);
    const YEARS: i64 = 10 * 365 * 86_400 * 1_000_000_000;

    fn nanoseconds(duration: Duration) -> i64 {
        i64::try_from(duration.as_nanos()).unwrap()
    }

    fn wanted(place: u16, last: Option<i64>) -> Wanted {
        let last = last.map(|finished_ns| LastRun { finished_ns, failed: false });
        Wanted { every: DAY, place, last }
    }

    #[test]
    fn a_job_waits_for_the_rest_of_its_interval_after_a_restart() {
        let (now, wall) = (clock::now(), YEARS);
        let mut machine = MaintenanceMachine::default();
        machine.know(now, wall, [("gc", wanted(0, Some(wall - nanoseconds(DAY / 4))))]);
        assert_eq!(machine.timeout(), Some(now + DAY / 4 * 3));
        assert_eq!(machine.start(now + DAY / 2), None);
        assert_eq!(machine.start(now + DAY / 4 * 3), Some("gc"));
    }

    #[test]
    fn s31_a_clock_that_jumps_ahead_by_ten_years_makes_nothing_run_at_once() {
        let now = clock::now();
        let mut machine = MaintenanceMachine::default();
        let jobs = || (0..1000u16).map(|n| (n, wanted(n, Some(YEARS))));
        machine.know(now, YEARS, jobs());
        // While the process runs, the wall clock says nothing.
        machine.know(now, 2 * YEARS, jobs());
        assert_eq!(machine.start(now + Duration::from_mins(11)), None);
        assert!(machine.timeout().unwrap() >= now + DAY);
        // After a restart everything seems to be overdue: it starts one after another, spread over some time.
        let mut machine = MaintenanceMachine::default();
        machine.know(now, 2 * YEARS, jobs());
        assert_eq!(machine.start(now), Some(0));
        assert_eq!(machine.start(now + SPREAD_MAX), None, "one at a time");
        machine.ended(now + Duration::from_secs(1), false);
        assert_eq!(machine.start(now + Duration::from_secs(1)), Some(1));
        machine.ended(now + Duration::from_secs(1), false);
        assert_eq!(machine.start(now + Duration::from_secs(1)), None, "the third is not due yet");
    }

    #[test]
    fn s31_a_clock_that_jumps_back_by_ten_years_keeps_nothing_from_running() {
        let now = clock::now();
        let mut machine = MaintenanceMachine::default();
        machine.know(now, 2 * YEARS, [("gc", wanted(0, Some(2 * YEARS)))]);
        machine.know(now + DAY, YEARS, [("gc", wanted(0, Some(2 * YEARS)))]);
        assert_eq!(machine.start(now + DAY), Some("gc"));
        let mut machine = MaintenanceMachine::default();
        machine.know(now, YEARS, [("gc", wanted(999, Some(2 * YEARS)))]);
        assert_eq!(machine.start(now + Duration::from_secs(86_399)), None, "it ended, by its note, later than now");
        assert_eq!(machine.start(now + DAY + SPREAD_MAX), Some("gc"));
    }

    #[test]
    fn a_failed_job_is_tried_again_sooner_and_each_time_later_up_to_its_interval() {
        let mut now = clock::now();
        let mut machine = MaintenanceMachine::default();
        machine.know(now, 0, [("gc", wanted(0, None))]);
        for minutes in [5, 10, 20, 40, 80, 160, 320, 640, 1280, 1440, 1440] {
            assert_eq!(machine.start(now), Some("gc"));
            machine.ended(now, true);
            let due = machine.timeout().unwrap();
            assert_eq!(due, now + Duration::from_mins(minutes));
            now = due;
        }
        assert_eq!(machine.start(now), Some("gc"));
        machine.ended(now, false);
        assert_eq!(machine.timeout(), Some(now + DAY));
        // The failure that an earlier process noted counts as the first.
        let failed = Wanted { last: Some(LastRun { finished_ns: 0, failed: true }), ..wanted(0, None) };
        let mut machine = MaintenanceMachine::default();
        machine.know(now, 0, [("gc", failed)]);
        assert_eq!(machine.timeout(), Some(now + BACKOFF_MIN));
    }

    #[test]
    fn settings_that_change_take_effect_and_what_is_told_again_changes_nothing() {
        let now = clock::now();
        let mut machine = MaintenanceMachine::default();
        machine.know(now, 0, [("gc", wanted(0, Some(0)))]);
        let later = now + DAY / 2;
        machine.know(later, nanoseconds(DAY / 2), [("gc", wanted(0, Some(0)))]);
        assert_eq!(machine.timeout(), Some(now + DAY));
        let often = Wanted { every: DAY / 4, ..wanted(0, Some(0)) };
        machine.know(later, nanoseconds(DAY / 2), [("gc", often)]);
        assert_eq!(machine.timeout(), Some(later), "overdue now");
        machine.know(later, 0, [("gc", Wanted { every: Duration::ZERO, ..often })]);
        assert_eq!(machine.timeout(), None, "never");
    }

    #[test]
    fn the_note_of_a_run_is_no_news_and_another_run_is() {
        let now = clock::now();
        let mut machine = MaintenanceMachine::default();
        machine.know(now, 0, [("gc", wanted(0, None))]);
        assert_eq!(machine.start(now), Some("gc"));
        let mine = LastRun { finished_ns: 5, failed: false };
        machine.noted(&"gc", mine);
        machine.ended(now + DAY / 10, false);
        machine.know(now + DAY / 10, YEARS, [("gc", wanted(0, Some(5)))]);
        assert_eq!(machine.timeout(), Some(now + DAY), "counted from its start");
        machine.know(now + DAY / 2, 7, [("gc", wanted(0, Some(7)))]);
        assert_eq!(machine.timeout(), Some(now + DAY / 2 + DAY), "an administrator ran it");
    }

    #[test]
    fn the_pieces_of_a_pass_are_together_everything_within_its_time() {
        for seconds in [1u64, 59, 61, 3600, 86_400, 30 * 86_400, 365 * 86_400, 4000 * 86_400] {
            let every = Duration::from_secs(seconds);
            let (piece_every, permille) = pieces(every);
            let count = 1000_u32.div_ceil(permille);
            assert!(piece_every * count <= every + Duration::from_secs(1), "{seconds}");
            assert!((1..=1000).contains(&permille));
        }
        assert_eq!(pieces(30 * DAY), (DAY, 34));
        assert_eq!(pieces(Duration::from_secs(1)), (Duration::from_secs(1), 1000));
    }
}
