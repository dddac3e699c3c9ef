//! One regular file being restored: where its bytes go, when it is complete, what happens then.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use strandline_messages::format::tree::Hole;

use super::attributes::Meta;
use super::directories::Directory;
use super::links::LinkKey;
use super::report::count;
use super::{Overwrite, Restorer};

/// A regular file under way. Finished by whoever releases it last.
pub(super) struct FileJob {
    pub(super) directory: Arc<Directory>,
    pub(super) meta: Meta,
    pub(super) layout: Layout,
    /// Set if other entries may be links to it.
    link: Option<LinkKey>,
    temporary: Vec<u8>,
    /// The planner, and pieces not yet written.
    pending: AtomicUsize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    created: bool,
    failed: Option<String>,
}

/// Where the content stream (the bytes outside of holes, one after another) goes in the file.
#[derive(Debug, Default)]
pub(super) struct Layout {
    /// Length of the file, bytes.
    pub(super) size: u64,
    /// Bytes of the content stream.
    pub(super) content: u64,
    has_holes: bool,
    /// Start in the content stream, start in the file; ascending.
    regions: Vec<(u64, u64)>,
}

impl Layout {
    pub(super) fn new(size: u64, holes: &[Hole]) -> Self {
        let (mut stream, mut file) = (0u64, 0u64);
        let mut regions = Vec::new();
        for hole in holes {
            if hole.offset > file {
                regions.push((stream, file));
                stream += hole.offset - file;
            }
            file = hole.offset.saturating_add(hole.bytes);
        }
        regions.push((stream, file));
        Self { size, content: stream + size.saturating_sub(file), has_holes: !holes.is_empty(), regions }
    }

    /// The parts of the file that `bytes` bytes at `offset` of the content stream fill: offset in the file, length.
    pub(super) fn parts(&self, offset: u64, bytes: u64) -> impl Iterator<Item = (u64, u64)> {
        let first = self.regions.partition_point(|(stream, _)| *stream <= offset).saturating_sub(1);
        let regions = self.regions.get(first..).unwrap_or_default();
        let ends = regions.iter().skip(1).map(|(stream, _)| *stream).chain([u64::MAX]);
        let last = offset.saturating_add(bytes);
        regions.iter().zip(ends).map_while(move |((stream, file), end)| {
            let from = offset.max(*stream);
            let to = last.min(end);
            (from < to).then(|| (file.saturating_add(from - stream), to - from))
        })
    }
}

impl FileJob {
    pub(super) fn new(
        restorer: &Restorer,
        directory: &Arc<Directory>,
        meta: Meta,
        layout: Layout,
        link: Option<LinkKey>,
    ) -> Arc<Self> {
        directory.hold();
        Arc::new(Self {
            directory: Arc::clone(directory),
            meta,
            layout,
            link,
            temporary: restorer.temporary_name(),
            pending: AtomicUsize::new(1),
            state: Mutex::default(),
        })
    }

    /// One more piece is to be written.
    pub(super) fn hold(&self) {
        self.pending.fetch_add(1, Ordering::Relaxed);
    }

    /// The file will not be restored; the first reason counts.
    pub(super) fn fail(&self, reason: String) {
        self.state.lock().failed.get_or_insert(reason);
    }

    pub(super) fn has_failed(&self) -> bool {
        self.state.lock().failed.is_some()
    }

    /// Opens the temporary file for writing; the first to do so makes it.
    pub(super) fn open(&self, restorer: &Restorer) -> io::Result<OwnedFd> {
        let directory = restorer.handles.open(&self.directory)?;
        let mut state = self.state.lock();
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let make = if state.created { OFlags::empty() } else { OFlags::CREATE | OFlags::EXCL };
        let handle = rustix::fs::openat(&*directory, self.temporary.as_slice(), flags | make, Mode::RUSR | Mode::WUSR)?;
        state.created = true;
        Ok(handle)
    }

    /// Writes bytes of the content stream.
    pub(super) fn write(&self, restorer: &Restorer, handle: &OwnedFd, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let mut rest = bytes;
        for (place, length) in self.layout.parts(offset, bytes.len() as u64) {
            let length = usize::try_from(length).unwrap_or(usize::MAX).min(rest.len());
            let (part, after) = rest.split_at(length);
            write_at(handle, part, place)?;
            rest = after;
        }
        restorer.issues.progress.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// One piece is done, well or not. The last completes the file; `handle` is the open temporary file if there is one.
    pub(super) fn release(&self, restorer: &Restorer, handle: Option<&OwnedFd>) {
        if self.pending.fetch_sub(1, Ordering::AcqRel) != 1 {
            return;
        }
        let cancelled = restorer.stopped();
        let failed = self.state.lock().failed.take();
        let result = match failed {
            Some(reason) => Err(reason),
            None => self.complete(restorer, handle).map_err(|error| format!("it cannot be written: {error}")),
        };
        let restored = result.is_ok();
        match result {
            Ok(()) => count(&restorer.issues.progress.files),
            Err(reason) => {
                if self.state.lock().created
                    && let Ok(directory) = restorer.handles.open(&self.directory)
                {
                    // An error here leaves a temporary file behind; the reason recorded is the one that matters.
                    let _ = rustix::fs::unlinkat(&*directory, self.temporary.as_slice(), AtFlags::empty());
                }
                if !cancelled {
                    restorer.issues.add(&self.meta.path, reason);
                }
            }
        }
        if let Some(key) = self.link {
            restorer.links.first_is_done(restorer, key, &self.directory, &self.meta, restored);
        }
        self.directory.release(restorer);
    }

    fn complete(&self, restorer: &Restorer, handle: Option<&OwnedFd>) -> io::Result<()> {
        let opened;
        let handle = if let Some(handle) = handle {
            handle
        } else {
            opened = self.open(restorer)?;
            &opened
        };
        if self.layout.has_holes {
            rustix::fs::ftruncate(handle, self.layout.size)?;
        }
        restorer.attributes.apply_to_open(handle, &self.meta, &restorer.issues);
        put_in_place(restorer, &self.directory, &self.temporary, &self.meta.name)
    }
}

/// Renames a finished temporary name to its final one, replacing what is there unless that is to be left.
pub(super) fn put_in_place(
    restorer: &Restorer,
    directory: &Arc<Directory>,
    temporary: &[u8],
    name: &[u8],
) -> io::Result<()> {
    let handle = restorer.handles.open(directory)?;
    if restorer.options.overwrite == Overwrite::Never {
        match rustix::fs::renameat_with(&*handle, temporary, &*handle, name, RenameFlags::NOREPLACE) {
            // Not every file system can refuse to replace; that the name was free was looked up before.
            Err(Errno::INVAL | Errno::NOSYS) => {}
            other => return Ok(other?),
        }
    }
    Ok(rustix::fs::renameat(&*handle, temporary, &*handle, name)?)
}

fn write_at(handle: &OwnedFd, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::pwrite(handle, bytes, offset) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                bytes = bytes.get(written..).unwrap_or_default();
                offset += written as u64;
            }
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_goes_around_the_holes() {
        let hole = |offset, bytes| Hole { offset, bytes };
        let parts = |layout: &Layout, offset, bytes| layout.parts(offset, bytes).collect::<Vec<_>>();
        let plain = Layout::new(100, &[]);
        assert_eq!(plain.content, 100);
        assert_eq!(parts(&plain, 10, 20), [(10, 20)]);
        assert_eq!(parts(&plain, 10, 0), []);
        let sparse = Layout::new(100, &[hole(0, 10), hole(20, 5), hole(90, 10)]);
        assert_eq!(sparse.content, 75);
        assert_eq!(parts(&sparse, 0, 75), [(10, 10), (25, 65)]);
        assert_eq!(parts(&sparse, 5, 10), [(15, 5), (25, 5)]);
        assert_eq!(parts(&sparse, 10, 1), [(25, 1)]);
        let empty = Layout::new(100, &[hole(0, 100)]);
        assert_eq!(empty.content, 0);
        let absurd = Layout::new(u64::MAX, &[hole(0, u64::MAX)]);
        assert_eq!(parts(&absurd, 5, 10), [(u64::MAX, 10)], "which the system will refuse");
    }
}
