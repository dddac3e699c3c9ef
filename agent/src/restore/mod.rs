//! Restoring a snapshot, or a part of it, into a directory.
//!
//! One planner walks the tree in order, makes directories and collects wanted chunks into windows; each window is one
//! fetch; writer threads take its blocks as they come, verify each chunk's id and write by offset. The next window is
//! fetched while one is being written.
//!
//! Rules that hold everywhere below:
//! - Nothing is opened by path: every step goes from a directory's descriptor to one name, never through a symbolic link.
//!   A hostile tree cannot write outside of the target.
//! - A file is written under a temporary name and renamed when it is complete, so no half file bears its final name.
//! - A directory's attributes are set when the walk has left it and everything in it is finished.
//! - What cannot be restored is recorded with its reason, and the rest goes on. Wrong bytes are never written.
//!
//! Memory: the tree cache, at most three windows' plans (`TARGETS_MAX` places each), and the blocks under way.

mod attributes;
mod directories;
mod file_job;
mod filter;
mod links;
mod planner;
mod report;
mod verify;
mod window;

#[cfg(test)]
mod tests;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use strandline_messages::{ChunkId, limits};

use crate::keys::{KeyError, Keyset, random};
use crate::trees::{ChunkSource, Resolved, TreeError, TreeReader};

use attributes::Attributes;
use directories::{Directory, Handles};
use filter::Filter;
use links::Links;
use planner::Planner;
use report::Issues;

pub use report::{Progress, RestoreIssue, RestoreReport};

/// Opened tree blocks kept, bytes.
const TREE_CACHE_BYTES: usize = 32 << 20;
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
            verify: false,
            owners_by_name: false,
            writers: 2,
            window_bytes: 128 << 20,
            progress: Arc::default(),
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
    let failed = |source| RestoreError::Target { path: options.target.clone(), source };
    let handles = Handles::open_target(&options.target).map_err(failed)?;
    let token = u64::from_le_bytes(random()?);
    let restorer = Restorer {
        reader,
        keyset: keyset.clone(),
        filter,
        handles,
        attributes: Attributes::new(options.owners_by_name),
        links: Links::new(format!(".strand-links-{token:016x}")),
        issues: Issues::new(Arc::clone(&options.progress)),
        temporary: format!(".strand-{token:016x}"),
        temporaries: AtomicU64::new(0),
        options: options.clone(),
    };
    let top = Directory::target();
    Planner::run(&restorer, &top, &start);
    restorer.links.remove(&restorer);
    if options.verify && !restorer.stopped() {
        verify::run(&restorer, &top, &start);
    }
    let report = restorer.issues.report(options.cancel.load(Ordering::Relaxed));
    match restorer.issues.fatal() {
        Some(reason) => Err(RestoreError::Lost { reason, report: Box::new(report) }),
        None => Ok(report),
    }
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
