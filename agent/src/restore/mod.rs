//! Restoring a snapshot, or a part of it, into a directory.
//!
//! One planner walks the tree in order, makes directories and collects wanted chunks into windows; each window is one
//! fetch; writer threads take its blocks as they come, verify each chunk's id and write by offset. The next window is
//! fetched while one is being written.
//!
//! Rules that hold everywhere below:
//! - Nothing is opened by path: every step goes from a directory's descriptor to one name, never through a symbolic link.
//!   A hostile tree cannot write outside of the target.
//! - A file gets its name when it is complete, so no half file bears it: until then it has none, or a temporary one. Only
//!   on request ([`RestoreOptions::in_place`]) is an existing file changed where it differs; until it is complete its time
//!   says that it is not.
//! - A directory's attributes are set when the walk has left it and everything in it is finished.
//! - What cannot be restored is recorded with its reason, and the rest goes on. Wrong bytes are never written.
//!
//! - One restore at a time works in a target: it holds a lock on it, and removes what a killed one has left behind.
//!
//! Memory: the tree cache, at most three windows' plans (`TARGETS_MAX` places each), and the blocks under way.

mod attributes;
mod delete;
mod directories;
mod file_job;
mod filter;
mod layout;
mod leftovers;
mod links;
mod planner;
mod report;
mod reuse;
mod unnamed;
mod verify;
mod window;

#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_owners;
#[cfg(test)]
mod tests_target;

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use strandline_messages::{ChunkId, limits};

use crate::keys::{KeyError, Keyset, random};
use crate::trees::{ChunkSource, Resolved, TreeError, TreeReader};

use attributes::Attributes;
use delete::Deleter;
use directories::{Directory, Handles};
use filter::Filter;
use links::Links;
use planner::Planner;
use report::Issues;

pub use report::{Action, Listener, Progress, RestoreIssue, RestoreReport};

/// Opened tree blocks kept, bytes.
const TREE_CACHE_BYTES: usize = 16 << 20;
/// Most places in files that one window plans to write: one chunk may belong in many.
const TARGETS_MAX: usize = 65_536;

/// What happens to names that exist in the target already. Directories are always entered, never replaced.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Overwrite {
    /// Files are replaced.
    #[default]
    Always,
    /// Regular files of the same size and modification time, and links to the same target, are left; others are replaced.
    IfChanged,
    /// Whatever exists is left.
    Never,
}

/// What `--delete` may delete. Names that an exclude pattern matches are never deleted, nor is anything outside of the
/// target or on another file system.
#[derive(Clone, Debug)]
pub struct Deletion {
    /// The paths that the snapshot was made of, raw, without leading `/`: only in them does it say what there was.
    pub saved: Vec<Vec<u8>>,
    /// The snapshot's error list: what could not be saved is not deleted.
    pub errors: Option<ChunkId>,
    /// (device, inode) of what is never deleted: the repository, this program's own directories.
    pub keep: Vec<(u64, u64)>,
    /// Directory for the names of huge directories; it must exist.
    pub scratch: PathBuf,
}

/// What to restore, where to, and how.
#[derive(Clone, Debug)]
pub struct RestoreOptions {
    /// Directory to restore into; made if it does not exist.
    pub target: PathBuf,
    /// Path in the snapshot: a directory's content goes into the target, a file goes into the target by its name. Empty for all.
    pub subpath: Vec<u8>,
    /// If not empty, only what matches (and what lies below) is restored.
    pub include: Vec<String>,
    /// What matches is left out, with what lies below.
    pub exclude: Vec<String>,
    /// What happens to existing names.
    pub overwrite: Overwrite,
    /// Change existing files where they differ instead of replacing them. Not those that have further hard links.
    pub in_place: bool,
    /// Make holes of runs of zeros in new files, even where the source had none.
    pub sparse: bool,
    /// Delete what the snapshot does not have.
    pub delete: Option<Deletion>,
    /// Change nothing; count and tell what would be done.
    pub dry_run: bool,
    /// Read everything again afterwards and compare it with the snapshot.
    pub verify: bool,
    /// Look up owners by name on this machine first, by number only if the name is unknown.
    pub owners_by_name: bool,
    /// Writer threads, at least 1.
    pub writers: usize,
    /// Content of one window, bytes.
    pub window_bytes: u64,
    /// Counters that others may read meanwhile.
    pub progress: Arc<Progress>,
    /// Is told what happens to each path.
    pub listener: Listener,
    /// Set to stop soon.
    pub cancel: Arc<AtomicBool>,
}

impl RestoreOptions {
    /// Everything, into `target`, replacing what exists.
    pub fn new(target: PathBuf) -> Self {
        Self {
            target,
            subpath: Vec::new(),
            include: Vec::new(),
            exclude: Vec::new(),
            overwrite: Overwrite::default(),
            in_place: false,
            sparse: false,
            delete: None,
            dry_run: false,
            verify: false,
            owners_by_name: false,
            writers: 2,
            window_bytes: 128 << 20,
            progress: Arc::default(),
            listener: Listener::default(),
            cancel: Arc::default(),
        }
    }
}

/// Why nothing, or not everything, was restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The target cannot be made or opened.
    #[error("the target {path} cannot be used: {source}; nothing was restored")]
    Target {
        /// The directory.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// Another restore works in the target.
    #[error("another restore is writing to {path}; nothing was restored: wait for it, or choose another target")]
    Busy {
        /// The directory.
        path: PathBuf,
    },
    /// The options contradict each other, or would do more than is meant.
    #[error("{reason}; nothing was restored or deleted")]
    Refused {
        /// Why.
        reason: String,
    },
    /// An include or exclude pattern is malformed.
    #[error("the pattern `{pattern}` is malformed: {why}; nothing was restored")]
    Pattern {
        /// As given.
        pattern: String,
        /// What is wrong.
        why: String,
    },
    /// The path to restore cannot be found or read.
    #[error("{0}; nothing was restored")]
    Path(TreeError),
    /// The repository went away.
    #[error("{reason}")]
    Lost {
        /// What happened, and what is left.
        reason: String,
        /// What was done until then.
        report: Box<RestoreReport>,
    },
    /// No random bytes for temporary names.
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// What all threads of one restore share.
struct Restorer {
    reader: TreeReader,
    keyset: Keyset,
    options: RestoreOptions,
    filter: Filter,
    handles: Handles,
    attributes: Attributes,
    links: Links,
    issues: Issues,
    deleter: Option<Deleter>,
    /// Random, so that temporary names meet nobody else's.
    temporary: String,
    temporaries: AtomicU64,
}

/// Restores the tree under `root`. Problems of single paths are in the report; an error means that the restore as a whole
/// could not start or lost its repository.
pub fn restore(
    source: Arc<dyn ChunkSource>,
    keyset: &Keyset,
    root: ChunkId,
    options: &RestoreOptions,
) -> Result<RestoreReport, RestoreError> {
    let filter = Filter::new(&options.include, &options.exclude)?;
    let reader = TreeReader::new(source, TREE_CACHE_BYTES);
    let start = reader.resolve(root, &options.subpath).map_err(RestoreError::Path)?;
    refuse_surprises(options, &start)?;
    let deleter = options.delete.as_ref().map(|deletion| Deleter::new(deletion, &reader)).transpose()?;
    let failed = |source| RestoreError::Target { path: options.target.clone(), source };
    let handles = Handles::open_target(&options.target, options.dry_run).map_err(failed)?;
    let _lock = take_target(&handles, options)?;
    let token = u64::from_le_bytes(random()?);
    let restorer = Restorer {
        reader,
        keyset: keyset.clone(),
        filter,
        attributes: Attributes::new(options.owners_by_name),
        links: Links::new(format!("{}{token:016x}", leftovers::LINKS_PREFIX)),
        issues: Issues::new(Arc::clone(&options.progress)),
        deleter,
        temporary: format!("{}{token:016x}", leftovers::PREFIX),
        temporaries: AtomicU64::new(0),
        options: options.clone(),
        handles,
    };
    let top = Directory::target(!restorer.handles.has_target());
    Planner::run(&restorer, &top, &start);
    restorer.links.remove(&restorer);
    if let Some(deleter) = restorer.deleter.as_ref().filter(|_| restorer.handles.has_target()) {
        deleter.run(&restorer, &top, &start);
    }
    if options.verify && !options.dry_run && !restorer.stopped() {
        verify::run(&restorer, &top, &start);
    }
    let mut report = restorer.issues.report(options.cancel.load(Ordering::Relaxed));
    report.received = restorer.reader.source().received();
    report.unmatched = restorer.filter.unmatched();
    match restorer.issues.fatal() {
        Some(reason) => Err(RestoreError::Lost { reason, report: Box::new(report) }),
        None => Ok(report),
    }
}

fn refuse_surprises(options: &RestoreOptions, start: &Resolved) -> Result<(), RestoreError> {
    let refused = |reason: &str| Err(RestoreError::Refused { reason: reason.into() });
    if options.in_place && options.sparse {
        return refused("holes cannot be made in files that are changed in place: leave out --sparse or --in-place");
    }
    if options.delete.is_none() {
        return Ok(());
    }
    if options.overwrite == Overwrite::Never {
        return refused("to delete what the snapshot lacks and to leave whatever exists contradict each other");
    }
    if walkable(start).is_ok_and(|top| top.is_none()) {
        return refused("a single file is restored: there is no directory in which to delete what the snapshot lacks");
    }
    let patterns = options.include.len() + options.exclude.len();
    if patterns == 0 && options.target.canonicalize().is_ok_and(|target| target.parent().is_none()) {
        return refused("deleting below `/` needs --include or --exclude to say what is meant");
    }
    Ok(())
}

/// Locks the target and removes what a killed restore has left in it.
fn take_target(handles: &Handles, options: &RestoreOptions) -> Result<Option<OwnedFd>, RestoreError> {
    if options.dry_run {
        return Ok(None);
    }
    // A directory that cannot be read can be written all the same.
    let Ok(target) = handles.open_readable(&Directory::target(false)) else { return Ok(None) };
    let failed = |source: std::io::Error| match source.kind() {
        std::io::ErrorKind::WouldBlock => RestoreError::Busy { path: options.target.clone() },
        _ => RestoreError::Target { path: options.target.clone(), source },
    };
    let lock = leftovers::lock(target).map_err(failed)?;
    lock.iter().for_each(leftovers::sweep);
    Ok(lock)
}

impl Restorer {
    /// Whether to stop: cancelled, or the repository is gone.
    fn stopped(&self) -> bool {
        self.options.cancel.load(Ordering::Relaxed) || self.issues.is_fatal()
    }

    fn temporary_name(&self) -> Vec<u8> {
        let number = self.temporaries.fetch_add(1, Ordering::Relaxed);
        format!("{}-{number}", self.temporary).into_bytes()
    }

    /// Records a problem of the tree; the loss of the source ends the restore.
    fn tree_problem(&self, path: &[u8], error: &TreeError) {
        if error.is_lost() {
            self.issues.end(error.to_string());
        } else {
            self.issues.add(path, error.to_string());
        }
    }
}

/// Splits a resolved start into the directory to walk, or the one entry to restore.
fn walkable(start: &Resolved) -> Result<Option<ChunkId>, TreeError> {
    match start {
        Resolved::Root(top) => Ok(Some(*top)),
        Resolved::Entry(entry) => entry.directory_top(),
    }
}

/// The path that stands before those of a walk, as patterns see it.
fn walk_prefix(subpath: &[u8]) -> Vec<u8> {
    let names: Vec<_> = subpath.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".").collect();
    names.join(&b'/')
}

const _: () = assert!(TARGETS_MAX >= limits::FETCH_IDS_MAX);
