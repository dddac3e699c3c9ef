//! What failpoints do in the build that has them.
//!
//! `STRAND_FAILPOINT` is a list, separated by commas, of `PLACE:N` (the process dies when it gets there for the Nth time),
//! `PLACE:N:eio` (that sync fails and does nothing; N = 0: each one) and `PLACE:N:skip` (that sync does nothing and succeeds;
//! N = 0: each one). `STRAND_FAILPOINT_LOG` names a file that gets one line for each place that is reached.

use std::collections::HashMap;
use std::env;
use std::fs::File;
use std::io::{self, Write};
use std::sync::LazyLock;

use parking_lot::Mutex;
use rustix::process::{Signal, getpid, kill_process};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Action {
    Die,
    Fail,
    Skip,
}

#[derive(Debug)]
struct Failpoint {
    place: String,
    at: u64,
    action: Action,
}

#[derive(Debug, Default)]
struct Armed {
    failpoints: Vec<Failpoint>,
    log: Option<File>,
    counts: Mutex<HashMap<&'static str, u64>>,
}

static ARMED: LazyLock<Armed> = LazyLock::new(|| {
    let failpoints = env::var("STRAND_FAILPOINT").unwrap_or_default();
    let failpoints = failpoints.split(',').filter_map(parse).collect();
    let log = env::var_os("STRAND_FAILPOINT_LOG");
    let log = log.and_then(|path| File::options().append(true).create(true).open(path).ok());
    Armed { failpoints, log, counts: Mutex::default() }
});

fn parse(text: &str) -> Option<Failpoint> {
    let mut parts = text.split(':');
    let (place, at) = (parts.next()?.to_owned(), parts.next()?.parse().ok()?);
    let action = match parts.next() {
        Some("eio") => Action::Fail,
        Some("skip") => Action::Skip,
        _ => Action::Die,
    };
    Some(Failpoint { place, at, action })
}

impl Armed {
    /// Counts and notes that the process got to `place`; what is to happen there.
    fn action(&self, place: &'static str) -> Option<Action> {
        let count = {
            let mut counts = self.counts.lock();
            let count = counts.entry(place).or_insert(0);
            *count += 1;
            *count
        };
        if let Some(mut log) = self.log.as_ref() {
            // In one write, so that lines of several threads and processes do not mix.
            let _ = log.write_all(format!("{place}\n").as_bytes());
        }
        let due = |failpoint: &&Failpoint| failpoint.place == place && [0, count].contains(&failpoint.at);
        self.failpoints.iter().find(due).map(|failpoint| failpoint.action)
    }
}

pub(super) fn reached(place: &'static str) {
    if ARMED.action(place) == Some(Action::Die) {
        die();
    }
}

pub(super) fn sync(place: &'static str, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
    match ARMED.action(place) {
        None => sync(),
        Some(Action::Skip) => Ok(()),
        Some(Action::Fail) => Err(rustix::io::Errno::IO.into()),
        Some(Action::Die) => {
            let _ = sync();
            die()
        }
    }
}

/// Nothing is unwound, flushed or released.
fn die() -> ! {
    loop {
        let _ = kill_process(getpid(), Signal::KILL);
        std::thread::park();
    }
}
