//! Flushing the source's dirty pages before the content of any file is read: where nothing has changed, nothing is flushed.
//!
//! A store into a mapped page moves the file's mtime only when the page was clean. A page that is dirty when the backup
//! reads it can be stored into again afterwards, and no timestamp ever tells. Once the page has been written back it is
//! write-protected, and the next store moves mtime and ctime.
//!
//! One `syncfs` per file system is used rather than `fdatasync` per recently modified file: a backup right after ten
//! thousand small files were written would otherwise force ten thousand journal commits, and how long a page may stay
//! dirty is a matter of system settings, so no age of mtime is safely old. Pages dirtied after the `syncfs` carry a ctime
//! after the start of the run, and the file cache does not count such files (`cache` module). `tmpfs` never writes pages
//! back: there a repeated store into a mapped page is not seen.

use std::collections::HashSet;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;

/// Most file systems remembered; beyond, a file system may be flushed more than once.
const DEVICES_MAX: usize = 65_536;

/// Flushes each file system once.
#[derive(Debug)]
pub struct Flusher {
    enabled: bool,
    done: Mutex<HashSet<u64>>,
    failed: AtomicBool,
}

impl Flusher {
    /// Does nothing unless `enabled`.
    pub fn new(enabled: bool) -> Self {
        Self { enabled, done: Mutex::default(), failed: AtomicBool::new(false) }
    }

    /// Flushes the file system that `fd` is on, if that has not happened yet. Others that need the same one wait.
    pub fn flush(&self, device: u64, fd: impl AsFd) {
        if !self.enabled {
            return;
        }
        let mut done = self.done.lock();
        if done.contains(&device) {
            return;
        }
        if let Err(error) = rustix::fs::syncfs(fd) {
            tracing::warn!(%error, "a file system could not be flushed; the file cache of this run will not be kept");
            self.failed.store(true, Ordering::Relaxed);
        }
        if done.len() >= DEVICES_MAX {
            done.clear();
        }
        done.insert(device);
    }

    /// Whether a flush failed, so that unseen later changes are possible.
    pub fn failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }
}
