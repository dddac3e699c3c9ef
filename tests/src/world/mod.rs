//! A simulated world for the real actors: one thread, held time, one seed, one trace.
//!
//! Everything between the pipeline's blocks and the storage's `fdatasync` is the shipped code: control channel, dispatcher,
//! streams, registry, sessions, gap trackers, their machines and the wire protocol. Imitated are the network ([`net`]), the
//! server's storage with its catalog ([`storage`]), and what starts and kills processes ([`run`]). Time moves when everybody
//! waits, so that an hour costs milliseconds. The oracle is in [`oracle`] and knows only what was promised to whom.
//!
//! The runtime must be one of a current thread whose time is paused (`start_paused`): the caller makes it, since only
//! test programs may hold time.

pub mod agent;
pub mod alarm;
pub mod net;
pub mod oracle;
pub mod plan;
pub mod restorer;
pub mod run;
pub mod server;
pub mod storage;

use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use strandline_actors::runtime::clock;

use crate::random::Random;

/// What everything in the world shares.
#[derive(Clone)]
pub struct World {
    inner: Arc<Inner>,
}

struct Inner {
    began: Instant,
    random: Mutex<Random>,
    trace: Mutex<Trace>,
}

/// What happened, folded into one number; in words where somebody wants to read it.
#[derive(Debug)]
struct Trace {
    hash: u64,
    events: u64,
    /// `None`: nobody reads.
    words: Option<Vec<String>>,
}

impl World {
    /// Nothing has happened yet. `tells`: keep the trace in words.
    pub fn new(seed: u64, tells: bool) -> Self {
        let trace = Trace { hash: 0xcbf2_9ce4_8422_2325, events: 0, words: tells.then(Vec::new) };
        let inner = Inner { began: clock::now(), random: Mutex::new(Random::new(seed)), trace: Mutex::new(trace) };
        Self { inner: Arc::new(inner) }
    }

    /// Time since the world began.
    pub fn age(&self) -> Duration {
        clock::now().saturating_duration_since(self.inner.began)
    }

    /// A generator of its own for one part of the world.
    pub fn fork(&self) -> Random {
        Random::new(self.inner.random.lock().number())
    }

    /// Any number below `bound`.
    pub fn below(&self, bound: u64) -> u64 {
        self.inner.random.lock().below(bound)
    }

    /// Takes an event down, at the present time.
    pub fn tell(&self, event: impl FnOnce() -> String) {
        let mut trace = self.inner.trace.lock();
        let words = format!("{:>12.6} {}", self.age().as_secs_f64(), event());
        for byte in words.bytes() {
            trace.hash = (trace.hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
        }
        trace.events += 1;
        if let Some(kept) = &mut trace.words {
            kept.push(words);
        }
    }

    /// The trace so far: a hash of all of it, the number of events, the words if they are kept.
    pub fn trace(&self) -> (u64, u64, Vec<String>) {
        let trace = self.inner.trace.lock();
        (trace.hash, trace.events, trace.words.clone().unwrap_or_default())
    }
}
