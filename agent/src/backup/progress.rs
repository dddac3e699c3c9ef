//! What a running backup shows of itself. Counters only grow; any thread may read them at any time.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use parking_lot::Mutex;

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident),* $(,)?) => {
        /// The counters of one pass.
        #[derive(Debug, Default)]
        pub struct Progress {
            $($(#[$doc])* pub $name: Counter,)*
            /// Whether the estimate is complete.
            pub estimated: AtomicBool,
            current: Mutex<Vec<u8>>,
            issues: Mutex<Vec<Issue>>,
        }

        /// The counters at one moment.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
        pub struct ProgressNow {
            $($(#[$doc])* pub $name: u64,)*
            /// Whether the estimate is complete.
            pub estimated: bool,
        }

        impl Progress {
            /// All counters now.
            pub fn now(&self) -> ProgressNow {
                ProgressNow { $($name: self.$name.get(),)* estimated: self.estimated.load(Ordering::Relaxed) }
            }
        }
    };
}

counters! {
    /// Entries other than directories that a quick scan ahead has found.
    estimated_files,
    /// Their bytes.
    estimated_bytes,
    /// Regular files done.
    files,
    /// Directories done.
    directories,
    /// Links, devices, pipes and sockets done.
    others,
    /// Bytes of the regular files done.
    bytes,
    /// Regular files opened for reading.
    files_opened,
    /// Regular files whose content was read in this run.
    files_read,
    /// Regular files taken from the file cache.
    files_unchanged,
    /// Bytes read from files.
    bytes_read,
    /// Chunks that the server did not have.
    chunks_new,
    /// Their plaintext bytes, tree chunks included.
    bytes_new,
    /// Chunks of files read that the server had already.
    chunks_known,
    /// Blocks sealed.
    blocks,
    /// Bytes of the blocks sealed.
    bytes_stored,
    /// Things that could not be saved as they are.
    errors,
}

/// Something that could not be saved as it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issue {
    /// Its path, raw.
    pub path: Vec<u8>,
    /// What happened.
    pub message: String,
}

/// Issues that are kept to be shown; all of them are in the snapshot's error list.
const ISSUES_MAX: usize = 50;

/// A number that only grows.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Adds `n`.
    pub fn add(&self, n: u64) {
        self.0.fetch_add(n, Ordering::Relaxed);
    }

    /// The number now.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

impl Progress {
    /// The path being read, raw.
    pub fn current_path(&self) -> Vec<u8> {
        self.current.lock().clone()
    }

    /// The first issues, at most 50.
    pub fn issues(&self) -> Vec<Issue> {
        self.issues.lock().clone()
    }

    /// Counts an issue, and keeps it if it is among the first. A second pass over the same files tells of it again.
    pub fn tell_issue(&self, path: &[u8], message: &str) {
        self.errors.add(1);
        let mut issues = self.issues.lock();
        if issues.len() < ISSUES_MAX {
            let issue = Issue { path: path.to_owned(), message: message.to_owned() };
            if !issues.contains(&issue) {
                issues.push(issue);
            }
        }
    }

    /// Sets the path being read.
    pub fn set_current_path(&self, path: Vec<u8>) {
        *self.current.lock() = path;
    }
}
