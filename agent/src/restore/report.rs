//! What happened: counters that others may read meanwhile, problems of single paths, and the final report.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use crate::trees::Received;

/// Most problems kept word by word; all are counted.
const ISSUES_MAX: usize = 10_000;

/// What happened to a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// It is as in the snapshot now.
    Restored,
    /// It was there and was left.
    Left,
    /// It is not in the snapshot and was deleted.
    Deleted,
}

type Tell = dyn Fn(Action, &[u8]) + Send + Sync;

/// Takes paths, raw and without leading `/`, as they are done; in a dry run, as they would be. Called from several threads.
#[derive(Clone, Default)]
pub struct Listener(Option<Arc<Tell>>);

impl Listener {
    /// Calls `tell`.
    pub fn new(tell: impl Fn(Action, &[u8]) + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(tell)))
    }

    pub(super) fn tell(&self, action: Action, path: &[u8]) {
        if let Some(tell) = &self.0 {
            tell(action, path);
        }
    }
}

impl std::fmt::Debug for Listener {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Listener(…)")
    }
}

/// Counters of a running restore.
#[derive(Debug, Default)]
pub struct Progress {
    /// Regular files finished.
    pub files: AtomicU64,
    /// Directories made or entered.
    pub directories: AtomicU64,
    /// Symbolic links, pipes, sockets and devices made.
    pub others: AtomicU64,
    /// Further hard links made.
    pub hard_links: AtomicU64,
    /// Content bytes written.
    pub bytes: AtomicU64,
    /// Content bytes that existing files held already, so that they were not fetched.
    pub bytes_reused: AtomicU64,
    /// Existing names left as they were.
    pub left: AtomicU64,
    /// Names deleted because the snapshot does not have them.
    pub deleted: AtomicU64,
    /// Owners not set for want of privilege.
    pub owners_skipped: AtomicU64,
    /// Extended attributes not set for want of privilege or support.
    pub attributes_skipped: AtomicU64,
    /// Files read again and found right.
    pub verified: AtomicU64,
    /// Problems.
    pub issues: AtomicU64,
}

/// Something that could not be restored as it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestoreIssue {
    /// Path in the snapshot, raw, without a leading `/`.
    pub path: Vec<u8>,
    /// What happened, for people.
    pub reason: String,
    /// Whether it is there nevertheless, except for what the reason says.
    pub restored: bool,
}

impl std::fmt::Display for RestoreIssue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", String::from_utf8_lossy(&self.path), self.reason)
    }
}

/// What a restore did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RestoreReport {
    /// Regular files finished.
    pub files: u64,
    /// Directories made or entered.
    pub directories: u64,
    /// Symbolic links, pipes, sockets and devices made.
    pub others: u64,
    /// Further hard links made.
    pub hard_links: u64,
    /// Content bytes written.
    pub bytes: u64,
    /// Content bytes that existing files held already, so that they were not fetched.
    pub bytes_reused: u64,
    /// Existing names left as they were.
    pub left: u64,
    /// Names deleted because the snapshot does not have them.
    pub deleted: u64,
    /// Owners not set for want of privilege.
    pub owners_skipped: u64,
    /// Extended attributes not set for want of privilege or support.
    pub attributes_skipped: u64,
    /// Files read again and found right.
    pub verified: u64,
    /// All problems.
    pub issues_total: u64,
    /// The first 10,000 problems.
    pub issues: Vec<RestoreIssue>,
    /// Stopped by the cancel flag.
    pub cancelled: bool,
    /// What was fetched for it, blocks of directories included. Blocks come whole, however little of one is wanted.
    pub received: Received,
    /// Include patterns that match nothing in the snapshot.
    pub unmatched: Vec<String>,
}

/// Collects problems.
pub(super) struct Issues {
    pub(super) progress: Arc<Progress>,
    kept: Mutex<Vec<RestoreIssue>>,
    fatal: Mutex<Option<String>>,
}

impl Issues {
    pub(super) fn new(progress: Arc<Progress>) -> Self {
        Self { progress, kept: Mutex::new(Vec::new()), fatal: Mutex::new(None) }
    }

    /// Something is not there.
    pub(super) fn add(&self, path: &[u8], reason: String) {
        self.push(path, reason, false);
    }

    /// Something is there, but not quite as it was.
    pub(super) fn add_flaw(&self, path: &[u8], reason: String) {
        self.push(path, reason, true);
    }

    fn push(&self, path: &[u8], reason: String, restored: bool) {
        self.progress.issues.fetch_add(1, Ordering::Relaxed);
        let mut kept = self.kept.lock();
        if kept.len() < ISSUES_MAX {
            kept.push(RestoreIssue { path: path.to_vec(), reason, restored });
        }
    }

    /// The paths, as far as kept, that are not there.
    pub(super) fn not_restored(&self) -> HashSet<Vec<u8>> {
        self.kept.lock().iter().filter(|issue| !issue.restored).map(|issue| issue.path.clone()).collect()
    }

    /// Ends the restore; the first reason counts.
    pub(super) fn end(&self, reason: String) {
        self.fatal.lock().get_or_insert(reason);
    }

    pub(super) fn is_fatal(&self) -> bool {
        self.fatal.lock().is_some()
    }

    pub(super) fn fatal(&self) -> Option<String> {
        self.fatal.lock().clone()
    }

    pub(super) fn report(&self, cancelled: bool) -> RestoreReport {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let progress = &self.progress;
        RestoreReport {
            files: read(&progress.files),
            directories: read(&progress.directories),
            others: read(&progress.others),
            hard_links: read(&progress.hard_links),
            bytes: read(&progress.bytes),
            bytes_reused: read(&progress.bytes_reused),
            left: read(&progress.left),
            deleted: read(&progress.deleted),
            owners_skipped: read(&progress.owners_skipped),
            attributes_skipped: read(&progress.attributes_skipped),
            verified: read(&progress.verified),
            issues_total: read(&progress.issues),
            issues: self.kept.lock().clone(),
            cancelled,
            received: Received::default(),
            unmatched: Vec::new(),
        }
    }
}

/// Adds one.
pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
