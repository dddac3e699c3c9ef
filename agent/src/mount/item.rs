//! What the kernel may ask about one file, directory or other entry of a snapshot, without the tree node that it came from.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{FileAttr, FileType, INodeNo};
use strandline_messages::format::tree::{self, EntryNode, Timestamp, Xattr};
use strandline_messages::{ChunkId, ChunkKind};

use super::extents::Extents;
use crate::trees::{DirEntry, TreeError};

/// The largest file size that the kernel takes.
const SIZE_MAX: u64 = i64::MAX as u64;
/// What directories say of their size.
const DIRECTORY_BYTES: u64 = 4096;
/// Preferred length of a read.
const READ_BYTES: u32 = 128 << 10;

/// See the module.
#[derive(Debug)]
pub(super) struct Item {
    mode: u16,
    uid: u32,
    gid: u32,
    mtime: SystemTime,
    ctime: SystemTime,
    links: u32,
    /// Sorted by name.
    pub(super) xattrs: Box<[Xattr]>,
    pub(super) body: Body,
}

/// What an item is.
#[derive(Debug)]
pub(super) enum Body {
    File {
        extents: Extents,
        content: Content,
    },
    Directory {
        /// Top node of its list; the reason if its entry names none.
        top: Result<ChunkId, Box<str>>,
    },
    Symlink {
        target: Box<[u8]>,
    },
    Other {
        kind: FileType,
        rdev: u32,
    },
}

/// A chunk in a content stream.
#[derive(Debug, Clone, Copy)]
pub(super) struct Piece {
    pub(super) id: ChunkId,
    /// Where it begins in the stream.
    pub(super) start: u64,
    pub(super) bytes: u32,
}

/// Where a file's content stream is.
#[derive(Debug)]
pub(super) enum Content {
    Inline(Box<[u8]>),
    Pieces(Box<[Piece]>),
    List(ChunkId),
    /// The entry contradicts itself.
    Broken(Box<str>),
}

impl Item {
    pub(super) fn of(entry: &DirEntry) -> Self {
        let (e, owner) = (&entry.entry, entry.owner());
        let body = match &e.node {
            EntryNode::File { size, content, holes } => {
                Body::File { extents: Extents::new((*size).min(SIZE_MAX), holes), content: content_of(entry, content) }
            }
            EntryNode::Directory { position } => Body::Directory {
                top: entry.child(*position, ChunkKind::Tree).map_err(|error| error.to_string().into()),
            },
            EntryNode::Symlink { target } => Body::Symlink { target: target.as_slice().into() },
            EntryNode::Fifo => Body::Other { kind: FileType::NamedPipe, rdev: 0 },
            EntryNode::Socket => Body::Other { kind: FileType::Socket, rdev: 0 },
            EntryNode::CharDevice { major, minor } => {
                Body::Other { kind: FileType::CharDevice, rdev: device_number(*major, *minor) }
            }
            EntryNode::BlockDevice { major, minor } => {
                Body::Other { kind: FileType::BlockDevice, rdev: device_number(*major, *minor) }
            }
        };
        Self {
            mode: e.mode,
            uid: owner.uid,
            gid: owner.gid,
            mtime: time_of(e.mtime),
            ctime: time_of(e.ctime),
            links: e.links,
            xattrs: e.xattrs.as_slice().into(),
            body,
        }
    }

    /// The root directory of a snapshot.
    pub(super) fn root(top: ChunkId, started_ns: i64) -> Self {
        let nanos = u32::try_from(started_ns.rem_euclid(1_000_000_000)).unwrap_or(0);
        let time = time_of(Timestamp { seconds: started_ns.div_euclid(1_000_000_000), nanos });
        Self {
            mode: 0o555,
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            mtime: time,
            ctime: time,
            links: 2,
            xattrs: Box::default(),
            body: Body::Directory { top: Ok(top) },
        }
    }

    pub(super) fn kind(&self) -> FileType {
        match &self.body {
            Body::File { .. } => FileType::RegularFile,
            Body::Directory { .. } => FileType::Directory,
            Body::Symlink { .. } => FileType::Symlink,
            Body::Other { kind, .. } => *kind,
        }
    }

    pub(super) fn attributes(&self, number: u64) -> FileAttr {
        let (size, stored, rdev) = match &self.body {
            Body::File { extents, .. } => (extents.size(), extents.stream_bytes(), 0),
            Body::Directory { .. } => (DIRECTORY_BYTES, DIRECTORY_BYTES, 0),
            Body::Symlink { target } => (target.len() as u64, 0, 0),
            Body::Other { rdev, .. } => (0, 0, *rdev),
        };
        FileAttr {
            ino: INodeNo(number),
            size,
            blocks: stored.div_ceil(512),
            atime: self.mtime,
            mtime: self.mtime,
            ctime: self.ctime,
            crtime: self.ctime,
            kind: self.kind(),
            perm: self.mode,
            nlink: self.links.max(1),
            uid: self.uid,
            gid: self.gid,
            rdev,
            blksize: READ_BYTES,
            flags: 0,
        }
    }
}

fn content_of(entry: &DirEntry, content: &tree::Content) -> Content {
    let pieces = |list: &[tree::Piece]| {
        let mut start = 0u64;
        let placed = list.iter().map(|piece| {
            let id = entry.child(piece.position, ChunkKind::Data)?;
            let placed = Piece { id, start, bytes: piece.bytes };
            start = start.saturating_add(piece.bytes.into());
            Ok(placed)
        });
        placed.collect::<Result<Box<[_]>, TreeError>>().map(Content::Pieces)
    };
    let found = match content {
        tree::Content::Inline(bytes) => Ok(Content::Inline(bytes.as_slice().into())),
        tree::Content::Pieces(list) => pieces(list),
        tree::Content::List { position } => entry.child(*position, ChunkKind::Tree).map(Content::List),
    };
    found.unwrap_or_else(|error| Content::Broken(error.to_string().into()))
}

fn time_of(time: Timestamp) -> SystemTime {
    let seconds = Duration::from_secs(time.seconds.unsigned_abs());
    let whole = if time.seconds < 0 { UNIX_EPOCH.checked_sub(seconds) } else { UNIX_EPOCH.checked_add(seconds) };
    whole.and_then(|whole| whole.checked_add(Duration::from_nanos(time.nanos.into()))).unwrap_or(UNIX_EPOCH)
}

/// The kernel's 32-bit form: 12 bits of major, 20 bits of minor number.
fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_have_the_kernels_form() {
        assert_eq!(device_number(1, 3), 0x0103);
        assert_eq!(device_number(259, 70_000), 0x1111_0370);
    }

    #[test]
    fn times_before_1970_are_kept() {
        let time = time_of(Timestamp { seconds: -2, nanos: 500_000_000 });
        assert_eq!(UNIX_EPOCH.duration_since(time).unwrap(), Duration::from_millis(1500));
        // Beyond what the system can say.
        assert_eq!(time_of(Timestamp { seconds: i64::MIN, nanos: 0 }), UNIX_EPOCH);
    }
}
