//! Listing a directory and asking for the metadata of its entries, done by worker threads ahead of the walk.

use std::os::fd::AsFd;
use std::sync::Arc;

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use rustix::io::Errno;

use super::dir::Dir;
use super::meta::{Meta, stat_at};
use super::names::{Name, Names, SpillPolicy};

/// Names whose metadata is asked for in one go.
pub const STAT_BATCH: usize = 256;

/// One name with its metadata.
#[derive(Debug)]
pub struct Scanned {
    /// The name.
    pub name: Name,
    /// Its metadata, or why there is none.
    pub meta: Result<Meta, Errno>,
}

/// An open directory with its names.
#[derive(Debug)]
pub struct Listing {
    /// The directory.
    pub dir: Arc<Dir>,
    /// Its metadata once open.
    pub meta: Meta,
    /// The names after `first`.
    pub names: Names,
    /// The first names with their metadata.
    pub first: Vec<Scanned>,
}

/// Why a directory has no listing.
#[derive(Debug)]
pub enum ListError {
    /// It could not be opened.
    Open(Errno),
    /// It was opened, but its names could not be read.
    Read(std::io::Error),
}

/// What a worker needs to know.
#[derive(Debug)]
pub struct ListContext {
    /// Where long lists of names go.
    pub spill: SpillPolicy,
}

impl ListContext {
    /// Opens and lists `name` in `parent`.
    pub fn list(&self, parent: &Arc<Dir>, name: &[u8], follow: bool) -> Result<Listing, ListError> {
        let (dir, meta) = Dir::open(parent, name, follow).map_err(ListError::Open)?;
        self.list_open(dir, meta)
    }

    /// Lists a directory that is open.
    pub fn list_open(&self, dir: Arc<Dir>, meta: Meta) -> Result<Listing, ListError> {
        let fd = dir.fd().map_err(ListError::Open)?;
        let mut names = Names::read(fd.as_fd(), &self.spill).map_err(ListError::Read)?;
        let batch = names.next_batch(STAT_BATCH).map_err(ListError::Read)?;
        let first = stat_all(&dir, batch);
        Ok(Listing { dir, meta, names, first })
    }
}

/// The metadata of `names` in `dir`, links not followed.
pub fn stat_all(dir: &Arc<Dir>, names: Vec<Name>) -> Vec<Scanned> {
    let fd = dir.fd();
    let stat = |name: Name| {
        let meta = match &fd {
            Ok(fd) => stat_at(fd.as_fd(), &name, false),
            Err(error) => Err(*error),
        };
        Scanned { name, meta }
    };
    names.into_iter().map(stat).collect()
}

/// Work for the threads ahead of the walk.
#[derive(Debug)]
pub enum Job {
    /// List a directory.
    List(Arc<Dir>, Name, Sender<Result<Listing, ListError>>),
    /// Ask for metadata.
    Stat(Arc<Dir>, Vec<Name>, Sender<Vec<Scanned>>),
}

/// Hands jobs to the worker threads. The queue is as long as the look-ahead ever is.
#[derive(Clone, Debug)]
pub struct Lookahead {
    jobs: Option<Sender<Job>>,
}

impl Lookahead {
    /// A queue of at most `jobs` jobs, and the end that [`work`] takes.
    pub fn new(jobs: usize) -> (Self, Receiver<Job>) {
        let (sender, receiver) = bounded(jobs);
        (Self { jobs: Some(sender) }, receiver)
    }

    /// No threads: everything is done when it is needed.
    pub fn none() -> Self {
        Self { jobs: None }
    }

    /// Begins listing a directory; `None` if all threads have enough to do.
    pub fn list(&self, parent: &Arc<Dir>, name: &Name) -> Option<Receiver<Result<Listing, ListError>>> {
        let jobs = self.jobs.as_ref().filter(|jobs| !jobs.is_full())?;
        let (sender, receiver) = bounded(1);
        jobs.try_send(Job::List(parent.clone(), name.clone(), sender)).ok()?;
        Some(receiver)
    }

    /// Begins asking for metadata; gives the names back if all threads have enough to do.
    pub fn stat(&self, dir: &Arc<Dir>, names: Vec<Name>) -> Result<Receiver<Vec<Scanned>>, Vec<Name>> {
        let Some(jobs) = &self.jobs else { return Err(names) };
        let (sender, receiver) = bounded(1);
        match jobs.try_send(Job::Stat(dir.clone(), names, sender)) {
            Ok(()) => Ok(receiver),
            Err(TrySendError::Full(Job::Stat(_, names, _)) | TrySendError::Disconnected(Job::Stat(_, names, _))) => {
                Err(names)
            }
            Err(_) => Err(Vec::new()),
        }
    }
}

/// A worker thread's life: until the walk is over.
pub fn work(context: &ListContext, jobs: &Receiver<Job>) {
    for job in jobs {
        // A walk that was cancelled no longer waits for the answer.
        match job {
            Job::List(parent, name, reply) => drop(reply.try_send(context.list(&parent, &name, false))),
            Job::Stat(dir, names, reply) => drop(reply.try_send(stat_all(&dir, names))),
        }
    }
}
