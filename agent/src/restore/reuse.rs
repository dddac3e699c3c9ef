//! What an existing file holds already of the content that the snapshot wants in its place.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::fs::{Advice, FallocateFlags, FileType, Mode, OFlags, SeekFrom};
use rustix::io::Errno;
use strandline_messages::{ChunkId, ChunkKind};

use super::Restorer;
use super::file_job::FileJob;
use super::layout::Layout;
use crate::keys::Keyset;

/// Which file it is, whatever its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
}

impl Identity {
    /// An error if the open file is another one.
    pub(super) fn check(&self, file: &impl AsFd) -> io::Result<()> {
        let stat = rustix::fs::fstat(file)?;
        if (stat.st_dev, stat.st_ino) == (self.device, self.inode) {
            return Ok(());
        }
        Err(io::Error::other("somebody else put another file in its place"))
    }
}

/// An existing regular file, open for reading. Holds one buffer of a chunk's length.
pub(super) struct Old {
    file: File,
    pub(super) identity: Identity,
    pub(super) size: u64,
    /// It has no other name that would change along with it, and its attributes are this process's to set.
    pub(super) can_stay: bool,
    buffer: Vec<u8>,
}

impl Old {
    /// `None`: there is nothing that could be of use.
    pub(super) fn open(directory: &OwnedFd, name: &[u8]) -> Option<Self> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::openat(directory, name, flags, Mode::empty()).ok()?;
        let stat = rustix::fs::fstat(&file).ok()?;
        let size = u64::try_from(stat.st_size).ok().filter(|size| *size > 0)?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return None;
        }
        let user = rustix::process::geteuid();
        // Advice only.
        let _ = rustix::fs::fadvise(&file, 0, None, Advice::Sequential);
        Some(Self {
            file: File::from(file),
            identity: Identity { device: stat.st_dev, inode: stat.st_ino },
            size,
            can_stay: stat.st_nlink == 1 && (user.is_root() || user.as_raw() == stat.st_uid),
            buffer: Vec::new(),
        })
    }

    /// The bytes of the piece, if the file holds them where they belong.
    pub(super) fn piece(
        &mut self,
        keyset: &Keyset,
        layout: &Layout,
        offset: u64,
        (id, bytes): (ChunkId, u32),
    ) -> Option<&[u8]> {
        let length = u64::from(bytes);
        let last = layout.parts(offset, length).last()?;
        if last.0.saturating_add(last.1) > self.size {
            return None;
        }
        self.buffer.resize(bytes as usize, 0);
        layout.read(&self.file, offset, &mut self.buffer).ok()?;
        (keyset.chunk_id(ChunkKind::Data, &self.buffer, &[]) == id).then_some(self.buffer.as_slice())
    }

    /// Whether every hole of the layout is one here, too.
    pub(super) fn has_holes_of(&self, layout: &Layout) -> bool {
        layout.holes().iter().all(|hole| self.is_hole(hole.offset, hole.bytes))
    }

    fn is_hole(&self, offset: u64, bytes: u64) -> bool {
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) => data >= offset.saturating_add(bytes),
            // No more data.
            Err(Errno::NXIO) => true,
            Err(_) => false,
        }
    }

    /// Makes the length and the holes those of the layout in the file, which `handle` has open for writing.
    pub(super) fn shape(&self, handle: &OwnedFd, layout: &Layout) -> io::Result<()> {
        if self.size != layout.size {
            rustix::fs::ftruncate(handle, layout.size)?;
        }
        for hole in layout.holes().iter().filter(|hole| !self.is_hole(hole.offset, hole.bytes)) {
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(handle, flags, hole.offset, hole.bytes)?;
        }
        Ok(())
    }
}

/// What an existing file contributes to a file job. Belongs to the planner's thread.
pub(super) struct Reuse {
    old: Old,
    /// The new file, kept open from the first piece that is copied into it.
    handle: Option<Arc<OwnedFd>>,
}

impl Reuse {
    /// In a file that is changed in place, makes length and holes right first. The job fails if that cannot be done.
    pub(super) fn new(restorer: &Restorer, job: &FileJob, old: Old) -> Self {
        if job.is_in_place() && (old.size != job.layout.size || !old.has_holes_of(&job.layout)) {
            let shaped = job.open(restorer).and_then(|handle| old.shape(&handle, &job.layout));
            if let Err(error) = shaped {
                job.fail(format!("its length and holes cannot be set in place: {error}"));
            }
        }
        Self { old, handle: None }
    }

    /// Whether the piece was in the existing file, and is in the new one now.
    pub(super) fn piece(&mut self, restorer: &Restorer, job: &FileJob, offset: u64, piece: (ChunkId, u32)) -> bool {
        if job.has_failed() {
            return false;
        }
        let Some(bytes) = self.old.piece(&restorer.keyset, &job.layout, offset, piece) else { return false };
        if !job.is_in_place() {
            let opened = match self.handle.take() {
                Some(handle) => Ok(handle),
                None => job.open(restorer),
            };
            let written = opened.and_then(|handle| {
                job.write(restorer, &handle, offset, bytes)?;
                Ok(handle)
            });
            match written {
                Ok(handle) => self.handle = Some(handle),
                Err(error) => job.fail(format!("it cannot be written: {error}")),
            }
        }
        restorer.issues.progress.bytes_reused.fetch_add(piece.1.into(), Ordering::Relaxed);
        true
    }
}
