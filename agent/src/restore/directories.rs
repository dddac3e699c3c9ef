//! Directories of the target: who is in which, when one is finished, and their descriptors.
//!
//! Descriptors are opened from the parent's, one name at a time, never through a symbolic link, and kept in a small cache:
//! a tree may have more directories under way than a process may have descriptors.

use std::collections::HashMap;
use std::fs::DirBuilder;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use parking_lot::Mutex;
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::Errno;

use super::attributes::Meta;
use super::report::count;
use super::{Action, Overwrite, Restorer, leftovers, unnamed};

/// Descriptors of directories kept open.
const OPEN_MAX: usize = 128;

static NUMBERS: AtomicU64 = AtomicU64::new(0);

/// One directory of the target.
pub(super) struct Directory {
    number: u64,
    parent: Option<Arc<Directory>>,
    /// Path in the snapshot, for messages.
    pub(super) path: Vec<u8>,
    /// What it will look like; the target itself keeps its attributes.
    meta: Option<Meta>,
    made: AtomicBool,
    /// Made by this restore: nothing can be in it that the restore did not put there.
    fresh: AtomicBool,
    /// What is made in it gets nothing from it: no group, no ACL.
    gives_nothing: AtomicBool,
    /// Files in it can be made without a name.
    unnamed: AtomicBool,
    failed: AtomicBool,
    /// The walk, unfinished files and unfinished directories in it.
    pending: AtomicUsize,
}

/// What became of a directory that was to be made.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Made {
    /// It is there.
    Yes,
    /// Something else bears its name and is to be left.
    Left,
    /// It cannot be made; recorded.
    Failed,
}

impl Directory {
    /// The target itself; `is_fresh`: a dry run would make it.
    pub(super) fn target(is_fresh: bool) -> Arc<Self> {
        Arc::new(Self {
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            parent: None,
            path: Vec::new(),
            meta: None,
            made: AtomicBool::new(true),
            fresh: AtomicBool::new(is_fresh),
            gives_nothing: AtomicBool::new(false),
            unnamed: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            pending: AtomicUsize::new(1),
        })
    }

    /// A directory below `parent`, which waits for it.
    pub(super) fn below(parent: &Arc<Self>, meta: Meta) -> Arc<Self> {
        parent.hold();
        Arc::new(Self {
            number: NUMBERS.fetch_add(1, Ordering::Relaxed),
            parent: Some(Arc::clone(parent)),
            path: meta.path.clone(),
            meta: Some(meta),
            made: AtomicBool::new(false),
            fresh: AtomicBool::new(false),
            gives_nothing: AtomicBool::new(false),
            unnamed: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            pending: AtomicUsize::new(1),
        })
    }

    fn name(&self) -> &[u8] {
        self.meta.as_ref().map(|meta| meta.name.as_slice()).unwrap_or_default()
    }

    /// One more thing in it is unfinished.
    pub(super) fn hold(&self) {
        self.pending.fetch_add(1, Ordering::Relaxed);
    }

    /// One thing in it is finished. The last sets its attributes, and so on upwards.
    pub(super) fn release(self: &Arc<Self>, restorer: &Restorer) {
        let mut directory = Some(self);
        while let Some(current) = directory {
            if current.pending.fetch_sub(1, Ordering::AcqRel) != 1 {
                return;
            }
            current.finish(restorer);
            directory = current.parent.as_ref();
        }
    }

    /// Whether nothing was in it before this restore.
    pub(super) fn is_fresh(&self) -> bool {
        self.fresh.load(Ordering::Acquire)
    }

    /// Whether what is made in it gets nothing from it: it is new, and on a file system that lets itself be told so.
    pub(super) fn gives_nothing(&self) -> bool {
        self.gives_nothing.load(Ordering::Acquire)
    }

    /// Whether files in it can be made without a name: it is new, and on a file system that is good for them.
    pub(super) fn takes_unnamed(&self) -> bool {
        self.unnamed.load(Ordering::Acquire)
    }

    fn finish(self: &Arc<Self>, restorer: &Restorer) {
        let ours = self.is_fresh() || restorer.options.overwrite != Overwrite::Never;
        if ours && self.made.load(Ordering::Acquire) {
            self.set_attributes(restorer);
        }
        restorer.handles.forget(self.number);
    }

    /// Makes it look as in the snapshot.
    pub(super) fn set_attributes(self: &Arc<Self>, restorer: &Restorer) {
        let Some(meta) = self.meta.as_ref().filter(|_| !restorer.options.dry_run) else { return };
        match restorer.handles.open_readable(self) {
            Ok(handle) => restorer.attributes.apply_to_open(&handle, meta, &restorer.issues),
            Err(error) => restorer.issues.add_flaw(&self.path, format!("its attributes cannot be set: {error}")),
        }
    }

    /// Makes the directory and those above it that do not exist yet. Called by the planner only.
    pub(super) fn ensure(self: &Arc<Self>, restorer: &Restorer) -> Made {
        let mut missing = Vec::new();
        let mut current = self;
        while !current.made.load(Ordering::Acquire) {
            if current.failed.load(Ordering::Acquire) {
                return Made::Failed;
            }
            missing.push(current);
            match &current.parent {
                Some(parent) => current = parent,
                None => break,
            }
        }
        for directory in missing.into_iter().rev() {
            match directory.make(restorer) {
                Ok(Made::Yes) => {
                    directory.made.store(true, Ordering::Release);
                    count(&restorer.issues.progress.directories);
                }
                Ok(other) => {
                    directory.failed.store(true, Ordering::Release);
                    count(&restorer.issues.progress.left);
                    return other;
                }
                Err(error) => {
                    directory.failed.store(true, Ordering::Release);
                    let reason = format!("the directory cannot be made: {error}; nothing below it was restored");
                    restorer.issues.add(&directory.path, reason);
                    return Made::Failed;
                }
            }
        }
        Made::Yes
    }

    fn make(self: &Arc<Self>, restorer: &Restorer) -> io::Result<Made> {
        let Some(parent) = &self.parent else { return Ok(Made::Yes) };
        if restorer.options.dry_run && parent.is_fresh() {
            return Ok(self.begin(restorer));
        }
        let above = restorer.handles.open(parent)?;
        let stat = match rustix::fs::statat(&*above, self.name(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Some(stat),
            Err(Errno::NOENT) => None,
            Err(error) => return Err(error.into()),
        };
        match stat.map(|stat| FileType::from_raw_mode(stat.st_mode)) {
            Some(FileType::Directory) => {
                // Not where another restore has its target.
                if !restorer.options.dry_run
                    && let Ok(readable) = restorer.handles.open_readable(self)
                    && let Ok(Some(lock)) = leftovers::lock(readable)
                {
                    leftovers::sweep(&lock);
                }
                return Ok(Made::Yes);
            }
            Some(_) if restorer.options.overwrite == Overwrite::Never => return Ok(Made::Left),
            Some(_) if !restorer.options.dry_run => {
                rustix::fs::unlinkat(&*above, self.name(), AtFlags::empty())?;
            }
            _ => {}
        }
        if !restorer.options.dry_run {
            rustix::fs::mkdirat(&*above, self.name(), Mode::RWXU)?;
            self.prepare(parent, restorer)?;
        }
        Ok(self.begin(restorer))
    }

    /// Just made: what will be in it should inherit nothing, and may have no name at first. Both go on to directories below.
    fn prepare(self: &Arc<Self>, parent: &Self, restorer: &Restorer) -> io::Result<()> {
        let (gives_nothing, unnamed) = if parent.is_fresh() {
            (parent.gives_nothing(), parent.takes_unnamed())
        } else {
            let handle = restorer.handles.open_readable(self)?;
            let gives_nothing = restorer.attributes.give_nothing_on(&handle);
            (gives_nothing, gives_nothing && unnamed::are_possible(&handle, &restorer.temporary_name()))
        };
        self.gives_nothing.store(gives_nothing, Ordering::Release);
        self.unnamed.store(unnamed, Ordering::Release);
        Ok(())
    }

    /// It is new and empty.
    fn begin(&self, restorer: &Restorer) -> Made {
        self.fresh.store(true, Ordering::Release);
        restorer.options.listener.tell(Action::Restored, &self.path);
        Made::Yes
    }
}

/// Open descriptors of directories.
pub(super) struct Handles {
    /// `None`: a dry run into a directory that does not exist.
    target: Option<Arc<OwnedFd>>,
    open: Mutex<Open>,
}

#[derive(Default)]
struct Open {
    clock: u64,
    handles: HashMap<u64, (Arc<OwnedFd>, u64)>,
}

impl Handles {
    /// Makes the target if need be (not in a dry run) and opens it.
    pub(super) fn open_target(path: &Path, dry_run: bool) -> io::Result<Self> {
        if !dry_run {
            DirBuilder::new().recursive(true).mode(0o777).create(path)?;
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let target = match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(target) => Some(Arc::new(target)),
            Err(Errno::NOENT) if dry_run => None,
            Err(error) => return Err(error.into()),
        };
        Ok(Self { target, open: Mutex::new(Open::default()) })
    }

    /// Whether the target is there.
    pub(super) fn has_target(&self) -> bool {
        self.target.is_some()
    }

    /// The target's own descriptor.
    pub(super) fn target(&self) -> io::Result<&Arc<OwnedFd>> {
        self.target.as_ref().ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// A descriptor of the directory, good for `…at` calls.
    pub(super) fn open(&self, directory: &Arc<Directory>) -> io::Result<Arc<OwnedFd>> {
        let mut below = Vec::new();
        let mut current = directory;
        let mut handle = loop {
            if let Some(handle) = self.kept(current.number) {
                break handle;
            }
            match &current.parent {
                None => break Arc::clone(self.target()?),
                Some(parent) => {
                    below.push(current);
                    current = parent;
                }
            }
        };
        for directory in below.into_iter().rev() {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            handle = Arc::new(rustix::fs::openat(&*handle, directory.name(), flags, Mode::empty())?);
            self.keep(directory.number, &handle);
        }
        Ok(handle)
    }

    /// A real descriptor of the directory: attributes cannot be set through the others.
    pub(super) fn open_readable(&self, directory: &Arc<Directory>) -> io::Result<OwnedFd> {
        let handle = self.open(directory)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&*handle, c".", flags, Mode::empty())?)
    }

    fn kept(&self, number: u64) -> Option<Arc<OwnedFd>> {
        let mut open = self.open.lock();
        open.clock += 1;
        let now = open.clock;
        let (handle, used) = open.handles.get_mut(&number)?;
        *used = now;
        Some(Arc::clone(handle))
    }

    fn keep(&self, number: u64, handle: &Arc<OwnedFd>) {
        let mut open = self.open.lock();
        open.clock += 1;
        let now = open.clock;
        if open.handles.len() >= OPEN_MAX {
            let oldest = open.handles.iter().min_by_key(|(_, (_, used))| *used).map(|(number, _)| *number);
            oldest.and_then(|oldest| open.handles.remove(&oldest));
        }
        open.handles.insert(number, (Arc::clone(handle), now));
    }

    fn forget(&self, number: u64) {
        self.open.lock().handles.remove(&number);
    }
}
