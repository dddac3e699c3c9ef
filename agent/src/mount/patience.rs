//! Fetching with bounds on number and on waiting: no reader of a mount waits for ever.
//!
//! Invariants:
//! - at most [`FETCHES_MAX`] fetches are under way, those that were given up included: the server refuses more than
//!   `limits::FETCHES_OUTSTANDING_MAX`;
//! - a fetch is given up when nothing has come for a minute. The session goes on trying to reach the server; what still
//!   comes for a fetch that was given up is dropped at once by whoever waits next, so that it gives its credit back;
//! - while one that was given up is not settled the server is known to be silent, and others wait `IMPATIENCE` only.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use crossbeam_channel::{RecvTimeoutError, TryRecvError};
use parking_lot::{Condvar, Mutex};
use strandline_actors::runtime::clock;
use strandline_messages::{ChunkId, SnapshotId, limits};

use super::Repository;
use crate::seal::OpenedBlock;
use crate::trees::{ChunkSource, FetchError, Fetched};

/// Fetches of one mount under way at once. A fetch may count twice at the server while it is asked for again after a lost
/// connection; two places are left for that.
const FETCHES_MAX: usize = limits::FETCHES_OUTSTANDING_MAX - 2;
/// How long nothing may come.
pub(super) const PATIENCE: Duration = Duration::from_mins(1);
/// How long nothing may come while the server is known to be silent.
const IMPATIENCE: Duration = Duration::from_secs(5);
/// How often a waiting thread looks after fetches that were given up.
const LOOK_UP: Duration = Duration::from_millis(250);

/// See the module. One for a whole mount.
pub(super) struct Patience {
    repository: Arc<dyn Repository>,
    /// How long nothing may come.
    bound: Duration,
    state: Mutex<State>,
    changed: Condvar,
    closed: AtomicBool,
}

#[derive(Default)]
struct State {
    /// Fetches under way, without those given up.
    running: usize,
    given_up: Vec<Fetched>,
}

impl State {
    /// Takes what has come for fetches that were given up.
    fn sweep(&mut self) {
        self.given_up.retain(|fetched| {
            loop {
                match fetched.try_recv() {
                    Ok(_) => {}
                    Err(TryRecvError::Empty) => return true,
                    Err(TryRecvError::Disconnected) => return false,
                }
            }
        });
    }
}

impl Patience {
    pub(super) fn new(repository: Arc<dyn Repository>, bound: Duration) -> Self {
        Self { repository, bound, state: Mutex::default(), changed: Condvar::new(), closed: AtomicBool::new(false) }
    }

    /// Nobody waits any more, from now on.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Relaxed);
        self.changed.notify_all();
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Relaxed)
    }

    /// Fetches and hands over each answer as it comes; blocks that `take` does not keep give their credit back at once.
    /// Returns after the last answer, or after one that says why there will be no more. `take` must not wait.
    pub(super) fn fetch(
        &self,
        snapshot: SnapshotId,
        wanted: Vec<ChunkId>,
        mut take: impl FnMut(Result<Arc<OpenedBlock>, FetchError>),
    ) {
        if !self.enter() {
            return take(Err(silent(self.bound())));
        }
        let started = self.repository.source(snapshot).and_then(|source| source.fetch(wanted));
        let given_up = match started {
            Ok(fetched) => self.receive(fetched, &mut take),
            Err(error) => {
                self.tell_if_lost(&error);
                take(Err(error));
                None
            }
        };
        let mut state = self.state.lock();
        state.running -= 1;
        state.given_up.extend(given_up);
        drop(state);
        self.changed.notify_one();
    }

    /// The channel itself if nothing has come for too long.
    fn receive(
        &self,
        fetched: Fetched,
        take: &mut impl FnMut(Result<Arc<OpenedBlock>, FetchError>),
    ) -> Option<Fetched> {
        let mut heard = clock::now();
        loop {
            match fetched.recv_timeout(LOOK_UP) {
                Ok(answer) => {
                    heard = clock::now();
                    if let Err(error) = &answer {
                        self.tell_if_lost(error);
                    }
                    take(answer);
                }
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) => {
                    self.state.lock().sweep();
                    let bound = self.bound();
                    if self.is_closed() {
                        take(Err(FetchError::Lost { reason: "the mount has ended".to_owned() }));
                        return Some(fetched);
                    }
                    if since(heard) >= bound {
                        self.repository.lost();
                        take(Err(silent(bound)));
                        return Some(fetched);
                    }
                }
            }
        }
    }

    /// Waits for a place; `false` if none became free in time.
    fn enter(&self) -> bool {
        let began = clock::now();
        let mut state = self.state.lock();
        loop {
            state.sweep();
            if state.running + state.given_up.len() < FETCHES_MAX {
                state.running += 1;
                return true;
            }
            let bound = if state.given_up.is_empty() { self.bound } else { IMPATIENCE.min(self.bound) };
            if since(began) >= bound || self.is_closed() {
                return false;
            }
            self.changed.wait_for(&mut state, LOOK_UP);
        }
    }

    fn bound(&self) -> Duration {
        if self.state.lock().given_up.is_empty() { self.bound } else { IMPATIENCE.min(self.bound) }
    }

    fn tell_if_lost(&self, error: &FetchError) {
        if matches!(error, FetchError::Lost { .. }) {
            self.repository.lost();
        }
    }
}

fn since(moment: Instant) -> Duration {
    clock::now().saturating_duration_since(moment)
}

fn silent(bound: Duration) -> FetchError {
    FetchError::Lost { reason: format!("nothing came for {} s", bound.as_secs()) }
}

/// The chunks of one snapshot for a tree reader, fetched with [`Patience`].
pub(super) struct PatientSource {
    pub(super) patience: Arc<Patience>,
    pub(super) snapshot: SnapshotId,
}

impl ChunkSource for PatientSource {
    /// Waits until everything has come. Only for the few tree blocks of one step of a reader, which hold no credit.
    fn fetch(&self, wanted: Vec<ChunkId>) -> Result<Fetched, FetchError> {
        let mut answers = Vec::new();
        self.patience.fetch(self.snapshot, wanted, |answer| answers.push(answer));
        let (sender, receiver) = crossbeam_channel::bounded(answers.len());
        for answer in answers {
            // There is room for all of them.
            let _ = sender.try_send(answer);
        }
        Ok(receiver)
    }
}
