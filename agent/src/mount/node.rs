//! What an inode stands for.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use fuser::{FileAttr, FileType, INodeNo};
use strandline_messages::SnapshotId;

use super::item::Item;
use super::layout::{Place, Shown};

/// A snapshot as it is seen under one of its names. Each name has inodes of its own: the kernel wants directories to have
/// one parent.
#[derive(Debug)]
pub(super) struct View {
    pub(super) shown: Arc<Shown>,
    /// Inode number of its root: hard links are known by it.
    pub(super) root: u64,
}

impl View {
    pub(super) fn snapshot(&self) -> SnapshotId {
        self.shown.id
    }
}

/// See the module. Cheap to clone.
#[derive(Debug, Clone)]
pub(super) enum Node {
    /// A directory that the mount itself makes.
    Place(Place),
    /// The link to the newest snapshot of a place.
    Latest { target: Arc<[u8]>, modified: SystemTime },
    /// Something in a snapshot.
    Item { view: Arc<View>, item: Arc<Item> },
}

impl Node {
    pub(super) fn kind(&self) -> FileType {
        match self {
            Self::Place(_) => FileType::Directory,
            Self::Latest { .. } => FileType::Symlink,
            Self::Item { item, .. } => item.kind(),
        }
    }

    /// How long the kernel may use the attributes without asking: what is in a snapshot never changes.
    pub(super) fn valid_for(&self) -> Duration {
        match self {
            Self::Item { .. } => Duration::from_hours(24),
            Self::Place(_) | Self::Latest { .. } => Duration::from_secs(1),
        }
    }

    pub(super) fn attributes(&self, number: u64, mounted: SystemTime) -> FileAttr {
        let (size, time, perm, nlink) = match self {
            Self::Item { item, .. } => return item.attributes(number),
            Self::Place(_) => (0, mounted, 0o555, 2),
            Self::Latest { target, modified } => (target.len() as u64, *modified, 0o777, 1),
        };
        FileAttr {
            ino: INodeNo(number),
            size,
            blocks: 0,
            atime: time,
            mtime: time,
            ctime: time,
            crtime: time,
            kind: self.kind(),
            perm,
            nlink,
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}
