//! A repository's snapshots as a read-only file system (FUSE).
//!
//! ```text
//! kernel ─► StrandFilesystem (16 threads) ─► Service ─► Snapshots          names above the snapshots
//!                                               ├────► Inodes             what the kernel holds
//!                                               ├────► Readers ─► trees   names and lists in snapshots
//!                                               └────► Contents ─► Chunks ─┬─► Patience ─► the session
//!                                          ReadAhead (2 threads) ──────────┘
//! ```
//!
//! Rules that hold everywhere below:
//! - No directory and no file is ever held as a whole: offsets are places in lists, found by the weights of index nodes.
//! - Every chunk is verified against its id before a byte of it is returned. What cannot be had is `EIO` for the range
//!   that needs it, with one line in the log; the rest stays readable.
//! - Nobody holds an opened data block while it waits for anything (see `chunks`), so the session never runs dry.
//! - Every wait ends: after `patience` without news the answer is `EIO`, while the session goes on trying.
//!
//! Memory: the chunk cache (`cache_bytes`), 8 tree caches of 16 MiB, 32 decoded leaves of each kind of list, one record for
//! each inode that the kernel holds, and one request's bytes for each thread.

mod attach;
mod chunks;
mod complaints;
mod content;
mod extents;
mod filesystem;
mod inodes;
mod item;
mod layout;
mod leaves;
mod node;
mod patience;
mod read_ahead;
mod readers;
mod service;
mod snapshots;

#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use fuser::{Config, Session, SessionACL};
use strandline_messages::SnapshotId;

use crate::trees::{ChunkSource, FetchError, TreeError};

use chunks::Chunks;
use content::Contents;
use filesystem::StrandFilesystem;
use patience::Patience;
use readers::Readers;
use service::Service;
use snapshots::Snapshots;

pub use layout::Shown;

/// Threads that answer the kernel: more than fetches may be under way, so that what is cached is answered meanwhile.
const WORKERS: usize = 16;
/// The least cache that reading ahead works with.
pub const CACHE_BYTES_MIN: u64 = 8 << 20;

/// What a mount needs of a repository. Called from plain threads.
pub trait Repository: Send + Sync + 'static {
    /// The snapshots to show, in any order, each once. May wait, but only a bounded time. The error is for people.
    fn snapshots(&self) -> Result<Vec<Shown>, String>;

    /// The chunks of a snapshot over the session of the moment. Does not wait.
    fn source(&self, snapshot: SnapshotId) -> Result<Arc<dyn ChunkSource>, FetchError>;

    /// The session did not answer, or says that it is gone: see to it. Does not wait.
    fn lost(&self);
}

/// Where and how to mount.
#[derive(Clone, Debug)]
pub struct MountSettings {
    /// A directory.
    pub mountpoint: PathBuf,
    /// Other users may look, too.
    pub allow_other: bool,
    /// The kernel checks permissions and access control lists as it does elsewhere.
    pub permissions: bool,
    /// Content kept in memory, bytes; at least [`CACHE_BYTES_MIN`].
    pub cache_bytes: u64,
}

/// Why there is no mount.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The mount point is no directory.
    #[error("{} cannot be mounted on: {source}; give an existing directory", path.display())]
    Mountpoint {
        /// The path.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
    /// The system refused.
    #[error(
        "mounting on {} failed: {source}; it needs /dev/fuse, and for users other than root the program fusermount3 \
         (Debian package fuse3)", path.display()
    )]
    Refused {
        /// The path.
        path: PathBuf,
        /// The system's answer.
        source: io::Error,
    },
}

/// A mounted file system that answers as soon as [`Mounted::serve`] runs.
pub struct Mounted {
    session: Session<StrandFilesystem>,
    patience: Arc<Patience>,
    mountpoint: PathBuf,
}

/// Ends a mount from another thread.
pub struct Unmounter {
    patience: Arc<Patience>,
    mountpoint: PathBuf,
}

impl Mounted {
    /// Mounts. `first` is the list of snapshots to begin with.
    pub fn start(
        repository: Arc<dyn Repository>,
        first: Vec<Shown>,
        settings: &MountSettings,
    ) -> Result<Self, MountError> {
        let mountpoint = usable(&settings.mountpoint)
            .map_err(|source| MountError::Mountpoint { path: settings.mountpoint.clone(), source })?;
        let cache_bytes = usize::try_from(settings.cache_bytes.max(CACHE_BYTES_MIN)).unwrap_or(usize::MAX);
        let patience = Arc::new(Patience::new(Arc::clone(&repository), patience::PATIENCE));
        let readers = Arc::new(Readers::new(Arc::clone(&patience)));
        let contents = Contents::new(Arc::clone(&readers), Chunks::new(Arc::clone(&patience), cache_bytes));
        let service = Service::new(Snapshots::new(repository, first), readers, contents, cache_bytes);
        let filesystem = StrandFilesystem::new(service, Arc::clone(&patience), settings.permissions);
        let refused = |source| MountError::Refused { path: mountpoint.clone(), source };
        let connection = attach::attach(&mountpoint, settings).map_err(refused)?;
        let acl = if settings.allow_other { SessionACL::All } else { SessionACL::Owner };
        let mut config = Config::default();
        config.n_threads = Some(WORKERS);
        let session = Session::from_fd(filesystem, connection, acl, config).map_err(|source| {
            // Nobody answers there; the first error is the one to report.
            let _ = attach::detach(&mountpoint, true);
            refused(source)
        })?;
        Ok(Self { session, patience, mountpoint })
    }

    /// The mount point, absolute.
    pub fn mountpoint(&self) -> &Path {
        &self.mountpoint
    }

    /// Ends it from elsewhere.
    pub fn unmounter(&self) -> Unmounter {
        Unmounter { patience: Arc::clone(&self.patience), mountpoint: self.mountpoint.clone() }
    }

    /// Answers the kernel until the file system is unmounted. Blocks.
    pub fn serve(self) -> io::Result<()> {
        let served = self.session.run();
        if served.is_err() {
            // Nobody answers there any more; the first error is the one to report.
            let _ = attach::detach(&self.mountpoint, true);
        }
        served
    }
}

impl Unmounter {
    /// Unmounts; an error if it is in use.
    pub fn unmount(&self) -> io::Result<()> {
        attach::detach(&self.mountpoint, false)
    }

    /// Unmounts although it is in use: whoever uses it gets errors.
    pub fn force(&self) {
        self.patience.close();
        // If this fails it is gone already.
        let _ = attach::detach(&self.mountpoint, true);
    }
}

fn usable(mountpoint: &Path) -> io::Result<PathBuf> {
    let path = mountpoint.canonicalize()?;
    if path.is_dir() { Ok(path) } else { Err(io::ErrorKind::NotADirectory.into()) }
}

/// Why chunks cannot be had, in words for whoever looks at files.
fn why_not_fetched(error: &FetchError) -> String {
    match error {
        FetchError::Lost { reason } => {
            format!("the repository does not answer: {reason}; it is asked again when it is needed")
        }
        other => other.to_string(),
    }
}

/// Why a part of a tree cannot be read, likewise.
fn why_not_read(error: &TreeError) -> String {
    match error {
        TreeError::Fetch(error) => why_not_fetched(error),
        other => other.to_string(),
    }
}
