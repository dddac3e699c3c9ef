//! One regular file being restored: where its bytes go, when it is complete, what happens then.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use parking_lot::Mutex;
use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags, Timespec, Timestamps, UTIME_OMIT};
use rustix::io::{Errno, ReadWriteFlags};
use strandline_messages::format::tree::Content;

use super::attributes::{Attributes, Meta};
use super::directories::Directory;
use super::layout::Layout;
use super::links::LinkKey;
use super::report::count;
use super::reuse::Identity;
use super::{Action, Overwrite, Restorer, unnamed};

/// Unit in which runs of zeros are looked for, bytes: what most file systems allocate at least.
const ZERO_BLOCK: u64 = 4096;
/// Shorter writes go through the page cache: a disk takes few large writes better than many small ones, bytes.
const UNCACHED_FROM_BYTES: usize = 128 << 10;
/// The modification time, seconds since 1970, of a file that is about to be changed in place.
const UNFINISHED: i64 = 1;

/// What is said of an entry whose name was taken in a directory that this restore has made.
const TAKEN: &str = "something in a new directory had its name already and was replaced: another program's file, or an entry \
                     whose name is the same to this file system";

/// A regular file under way. Finished by whoever releases it last.
pub(super) struct FileJob {
    pub(super) directory: Arc<Directory>,
    pub(super) meta: Meta,
    pub(super) layout: Layout,
    /// Set if other entries may be links to it.
    link: Option<LinkKey>,
    place: Place,
    /// All its content is written at once.
    is_one_piece: bool,
    /// The planner, and pieces not yet written.
    pending: AtomicUsize,
    state: Mutex<State>,
    /// Held while bytes are written: the kernel lets only one writer into a file, and has the others spin.
    writing: Mutex<()>,
}

/// Where the bytes go.
pub(super) enum Place {
    /// Into a new file, which gets its own name when it is complete. Until then it has none, or this temporary one.
    New(Vec<u8>),
    /// Into the file that is there, and only where it differs. While it is neither what it was nor what it will be, its
    /// time is not the snapshot's: [`UNFINISHED`] on the disk before the first write, then that of the last write. No later
    /// restore takes it for complete.
    Existing(Identity),
}

#[derive(Default)]
struct State {
    begun: Begun,
    failed: Option<String>,
}

/// What has been done for the first byte.
#[derive(Default)]
enum Begun {
    #[default]
    Nothing,
    /// The file under the temporary name is there, or the existing one is marked as unfinished.
    Named,
    /// A file without a name is there as long as this is open.
    Unnamed(Arc<OwnedFd>),
}

impl FileJob {
    pub(super) fn new(
        restorer: &Restorer,
        directory: &Arc<Directory>,
        meta: Meta,
        layout: Layout,
        link: Option<LinkKey>,
        existing: Option<Identity>,
        content: &Content,
    ) -> Arc<Self> {
        directory.hold();
        Arc::new(Self {
            directory: Arc::clone(directory),
            meta,
            layout,
            link,
            place: existing.map_or_else(|| Place::New(restorer.temporary_name()), Place::Existing),
            is_one_piece: match content {
                Content::Inline(_) => true,
                Content::Pieces(pieces) => pieces.len() <= 1,
                Content::List { .. } => false,
            },
            pending: AtomicUsize::new(1),
            state: Mutex::default(),
            writing: Mutex::default(),
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

    /// Whether the bytes go into the file that is there already.
    pub(super) fn is_in_place(&self) -> bool {
        matches!(self.place, Place::Existing(_))
    }

    /// Opens the file for writing; the first to do so makes the new one, or marks the existing one as unfinished.
    pub(super) fn open(&self, restorer: &Restorer) -> io::Result<Arc<OwnedFd>> {
        let directory = restorer.handles.open(&self.directory)?;
        let mut state = self.state.lock();
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let handle = match (&self.place, &state.begun) {
            (_, Begun::Unnamed(handle)) => return Ok(Arc::clone(handle)),
            (Place::New(name), begun) => {
                let mode = restorer.attributes.mode_while_written(&self.meta, !self.directory.gives_nothing());
                let is_first = matches!(begun, Begun::Nothing);
                if is_first && self.is_one_piece && self.directory.takes_unnamed() {
                    let handle = Arc::new(unnamed::make(&directory, mode)?);
                    state.begun = Begun::Unnamed(Arc::clone(&handle));
                    return Ok(handle);
                }
                let make = if is_first { OFlags::CREATE | OFlags::EXCL } else { OFlags::empty() };
                rustix::fs::openat(&*directory, name.as_slice(), flags | make, mode)?
            }
            (Place::Existing(identity), begun) => {
                let handle = rustix::fs::openat(&*directory, self.meta.name.as_slice(), flags, Mode::empty())?;
                identity.check(&handle)?;
                if matches!(begun, Begun::Nothing) {
                    self.mark(&handle)?;
                }
                handle
            }
        };
        state.begun = Begun::Named;
        Ok(Arc::new(handle))
    }

    /// Makes sure, even if the machine stops, that the file does not look complete from here on.
    fn mark(&self, handle: &OwnedFd) -> io::Result<()> {
        let seconds = if self.meta.mtime.seconds == UNFINISHED { UNFINISHED + 1 } else { UNFINISHED };
        let times = Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: seconds, tv_nsec: 0 },
        };
        rustix::fs::futimens(handle, &times)?;
        Ok(rustix::fs::fsync(handle)?)
    }

    /// Writes bytes of the content stream.
    pub(super) fn write(&self, restorer: &Restorer, handle: &OwnedFd, offset: u64, bytes: &[u8]) -> io::Result<()> {
        let _alone = self.writing.lock();
        let mut rest = bytes;
        for (place, length) in self.layout.parts(offset, bytes.len() as u64) {
            let length = usize::try_from(length).unwrap_or(usize::MAX).min(rest.len());
            let (part, after) = rest.split_at(length);
            if restorer.options.sparse && !self.is_in_place() {
                write_without_zeros(handle, part, place)?;
            } else {
                write_all_at(handle, part, place)?;
            }
            rest = after;
        }
        restorer.issues.progress.bytes.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// One piece is done, well or not. The last completes the file; `handle` is the new file if it is open.
    pub(super) fn release(&self, restorer: &Restorer, handle: Option<&Arc<OwnedFd>>) {
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
            Ok(()) => {
                count(&restorer.issues.progress.files);
                restorer.options.listener.tell(Action::Restored, &self.meta.path);
            }
            Err(mut reason) => {
                self.abandon(restorer, &mut reason);
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

    /// Removes the new file. A file that was changed in place stays as it is, marked as unfinished.
    fn abandon(&self, restorer: &Restorer, reason: &mut String) {
        match (&self.place, &self.state.lock().begun) {
            (Place::New(name), Begun::Named) => {
                if let Ok(directory) = restorer.handles.open(&self.directory) {
                    // An error here leaves a temporary file behind; the reason recorded is the one that matters.
                    let _ = rustix::fs::unlinkat(&*directory, name.as_slice(), AtFlags::empty());
                }
            }
            (Place::Existing(_), Begun::Named) => {
                *reason += "; it was being changed in place and is partly old, partly new: run the command again";
            }
            (_, Begun::Nothing | Begun::Unnamed(_)) => {}
        }
    }

    fn complete(&self, restorer: &Restorer, handle: Option<&Arc<OwnedFd>>) -> io::Result<()> {
        let opened;
        let handle = match (handle, &self.place) {
            (Some(handle), _) => handle,
            (None, Place::Existing(identity)) if !self.is_begun() => {
                let directory = restorer.handles.open(&self.directory)?;
                let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
                let handle = rustix::fs::openat(&*directory, self.meta.name.as_slice(), flags, Mode::empty())?;
                identity.check(&handle)?;
                opened = Arc::new(handle);
                &opened
            }
            (None, _) => {
                opened = self.open(restorer)?;
                &opened
            }
        };
        match &self.place {
            Place::New(_) if restorer.options.sparse || !self.layout.holes().is_empty() => {
                rustix::fs::ftruncate(handle, self.layout.size)?;
            }
            // The time is what makes it look complete: it must not reach the disk before the content.
            Place::Existing(_) if self.is_begun() => rustix::fs::fsync(handle)?,
            _ => {}
        }
        if !self.directory.gives_nothing() {
            Attributes::remove_others(handle, &self.meta, &restorer.issues);
        }
        restorer.attributes.apply_to_open(handle, &self.meta, &restorer.issues);
        match &self.place {
            Place::New(temporary) if !self.gets_name(restorer, handle, temporary)? => {
                put_in_place(restorer, &self.directory, temporary, &self.meta)
            }
            _ => Ok(()),
        }
    }

    fn is_begun(&self) -> bool {
        !matches!(self.state.lock().begun, Begun::Nothing)
    }

    /// Gives a file without a name its own, which is true, or the temporary one if its own is taken and may be replaced.
    fn gets_name(&self, restorer: &Restorer, handle: &Arc<OwnedFd>, temporary: &[u8]) -> io::Result<bool> {
        let mut state = self.state.lock();
        if !matches!(state.begun, Begun::Unnamed(_)) {
            return Ok(false);
        }
        let directory = restorer.handles.open(&self.directory)?;
        match unnamed::give_name(handle, &directory, &self.meta.name) {
            Err(Errno::EXIST) if restorer.options.overwrite != Overwrite::Never => {
                unnamed::give_name(handle, &directory, temporary)?;
                state.begun = Begun::Named;
                Ok(false)
            }
            other => Ok(other.map(|()| true)?),
        }
    }
}

/// Renames a finished temporary name to its final one, replacing what is there unless that is to be left. In a new directory
/// nothing should be there: if something is, that is told.
pub(super) fn put_in_place(
    restorer: &Restorer,
    directory: &Arc<Directory>,
    temporary: &[u8],
    meta: &Meta,
) -> io::Result<()> {
    let handle = restorer.handles.open(directory)?;
    let may_replace = restorer.options.overwrite != Overwrite::Never;
    if !may_replace || directory.is_fresh() {
        match rustix::fs::renameat_with(&*handle, temporary, &*handle, meta.name.as_slice(), RenameFlags::NOREPLACE) {
            // Not every file system can refuse to replace; that the name was free was looked up before, or nobody could
            // have taken it.
            Err(Errno::INVAL | Errno::NOSYS) => {}
            Err(Errno::EXIST) if may_replace => restorer.issues.add_flaw(&meta.path, TAKEN.into()),
            other => return Ok(other?),
        }
    }
    Ok(rustix::fs::renameat(&*handle, temporary, &*handle, meta.name.as_slice())?)
}

/// Long writes go to the disk at once and leave nothing in the page cache, where kernel and file system can
/// (`RWF_DONTCACHE`, Linux 6.14): a restore that fills the memory of a machine would push out what its programs use.
fn write_all_at(handle: &OwnedFd, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    const DONTCACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);
    let mut flags = if bytes.len() >= UNCACHED_FROM_BYTES { DONTCACHE } else { ReadWriteFlags::empty() };
    while !bytes.is_empty() {
        match rustix::io::pwritev2(handle, &[IoSlice::new(bytes)], offset, flags) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(written) => {
                bytes = bytes.get(written..).unwrap_or_default();
                offset += written as u64;
            }
            Err(Errno::INTR) => {}
            // A kernel or file system that does not know the flag; any other error comes again.
            Err(_) if !flags.is_empty() => flags = ReadWriteFlags::empty(),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Writes into a file that is new, so that what is not written is zero: runs of zeros become holes.
fn write_without_zeros(handle: &OwnedFd, mut bytes: &[u8], mut offset: u64) -> io::Result<()> {
    let (mut pending, mut start) = (0usize, offset);
    let mut whole = bytes;
    while !bytes.is_empty() {
        let to_boundary = usize::try_from(ZERO_BLOCK - offset % ZERO_BLOCK).unwrap_or(usize::MAX);
        let (block, rest) = bytes.split_at(to_boundary.min(bytes.len()));
        (bytes, offset) = (rest, offset.saturating_add(block.len() as u64));
        if block.iter().any(|byte| *byte != 0) {
            pending += block.len();
            continue;
        }
        let (run, after) = whole.split_at(pending);
        write_all_at(handle, run, start)?;
        whole = after.get(block.len()..).unwrap_or_default();
        (pending, start) = (0, offset);
    }
    write_all_at(handle, whole.get(..pending).unwrap_or_default(), start)
}
