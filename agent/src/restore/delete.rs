//! `--delete`: removes from the target what the snapshot does not have, after everything else has been restored.
//!
//! A second walk compares each directory's names with those of the snapshot. Only directories that were saved as a whole
//! count, so that a snapshot of `/home/me` deletes nothing beside `/home/me`. What is never deleted: what an exclude
//! pattern names, what no include pattern names (if there are any), what could not be read when the snapshot was made,
//! other file systems, and what the options say. Where the snapshot's own list of a directory cannot be read in full,
//! nothing in that directory is deleted. Everything goes from descriptor to name; no symbolic link is followed.
//!
//! Memory: the names of the directories on the way, which spill to disk as those of a backup do.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use rustix::io::Errno;
use strandline_messages::ChunkId;

use super::attributes::Meta;
use super::directories::Directory;
use super::report::count;
use super::{Action, Deletion, RestoreError, Restorer, walk_prefix, walkable};
use crate::scan::names::{Name, Names, SpillPolicy};
use crate::trees::{Resolved, Step, TreeReader};

/// Directories inside one another that are removed at most: each costs a descriptor.
const DEPTH_MAX: usize = 200;
/// Names of one directory that are sorted in memory; more spill to disk.
const NAMES_IN_MEMORY: usize = 65_536;
/// Paths that could not be read when the snapshot was made; with more than this nothing is deleted.
const UNREAD_MAX: usize = 10_000;
/// How often a directory is looked through that fills while it is emptied.
const PASSES_MAX: usize = 8;

/// Deletes, as [`Deletion`] says.
pub(super) struct Deleter {
    options: Deletion,
    unread: HashSet<Vec<u8>>,
    spill: SpillPolicy,
}

struct Frame {
    directory: Arc<Directory>,
    included: bool,
    device: Option<u64>,
    extra: Option<Extra>,
    deleted: bool,
}

/// Names of the target's directory that the walk has not come to yet.
struct Extra {
    names: Names,
    next: Option<Name>,
}

impl Deleter {
    /// Reads what the snapshot's makers could not read.
    pub(super) fn new(options: &Deletion, reader: &TreeReader) -> Result<Self, RestoreError> {
        let refused = |reason: String| RestoreError::Refused { reason };
        let mut unread = HashSet::new();
        for error in options.errors.into_iter().flat_map(|top: ChunkId| reader.source_errors(top)) {
            let error =
                error.map_err(|error| refused(format!("the list of what could not be saved is needed: {error}")))?;
            if unread.len() >= UNREAD_MAX {
                return Err(refused(format!("more than {UNREAD_MAX} paths could not be saved in this snapshot")));
            }
            unread.insert(error.path.strip_prefix(b"/").unwrap_or(&error.path).to_vec());
        }
        let spill = SpillPolicy::new(options.scratch.clone(), NAMES_IN_MEMORY);
        Ok(Self { options: options.clone(), unread, spill })
    }

    /// Walks the tree once more and deletes.
    pub(super) fn run(&self, restorer: &Restorer, top: &Arc<Directory>, start: &Resolved) {
        let prefix = walk_prefix(&restorer.options.subpath);
        let Ok(Some(directory)) = walkable(start) else { return };
        let included = restorer.filter.includes_from_above(&prefix);
        let target = self.frame(restorer, Arc::clone(top), &prefix, included, None);
        let device = target.device;
        let mut stack = vec![target];
        let mut walk = restorer.filter.walk(&restorer.reader, directory, &prefix);
        while let Some(item) = walk.next().filter(|_| !restorer.stopped()) {
            let Some(frame) = stack.last_mut() else { return };
            match item {
                Ok((path, Step::Enter(entry))) => {
                    self.pass(restorer, frame, &path, Some(&entry.entry.name));
                    let included = restorer.filter.includes(&path) || frame.included;
                    let wanted = included || restorer.filter.leads_to_something(&path);
                    if restorer.filter.excludes(&path) || !wanted || frame.device.is_none() {
                        walk.skip_directory();
                        continue;
                    }
                    let directory = Directory::below(&frame.directory, Meta::new(path.clone(), &entry));
                    stack.push(self.frame(restorer, directory, &path, included, device));
                }
                Ok((path, Step::Leave)) => {
                    self.pass(restorer, frame, &path, None);
                    stack.pop().iter().for_each(|frame| leave(restorer, frame));
                }
                Ok((path, Step::Entry(entry))) => self.pass(restorer, frame, &path, Some(&entry.entry.name)),
                // Which names the snapshot has here is not known.
                Err(_) => frame.extra = None,
            }
        }
        if let [target] = stack.as_mut_slice()
            && !restorer.stopped()
        {
            self.pass(restorer, target, &prefix, None);
        }
    }

    /// Begins a directory in a target on the device `target`. Without names if nothing in it is to be deleted, without
    /// device if it is not there.
    fn frame(
        &self,
        restorer: &Restorer,
        directory: Arc<Directory>,
        path: &[u8],
        included: bool,
        target: Option<u64>,
    ) -> Frame {
        let handle = restorer.handles.open_readable(&directory).ok();
        let device = handle.as_ref().and_then(|handle| rustix::fs::fstat(handle).ok()).map(|stat| stat.st_dev);
        let is_mounted = target.is_some() && target != device;
        let counts = self.is_saved(path) && !self.unread.contains(path) && !is_mounted;
        let extra = handle.filter(|_| counts).and_then(|handle| match Names::read(handle.as_fd(), &self.spill) {
            Ok(names) => Some(Extra { names, next: None }),
            Err(error) => {
                restorer.issues.add_flaw(path, format!("nothing in it was deleted, it cannot be listed: {error}"));
                None
            }
        });
        Frame { directory, included, device, extra, deleted: false }
    }

    /// Whether everything in the directory that was to be saved is in the snapshot.
    fn is_saved(&self, path: &[u8]) -> bool {
        self.options.saved.iter().any(|saved| {
            path.strip_prefix(saved.as_slice())
                .is_some_and(|rest| saved.is_empty() || rest.is_empty() || rest.starts_with(b"/"))
        })
    }

    /// The snapshot's next name in the frame's directory (`None`: its end): names before it are not in the snapshot.
    fn pass(&self, restorer: &Restorer, frame: &mut Frame, path: &[u8], name: Option<&[u8]>) {
        let Some(extra) = &mut frame.extra else { return };
        let above = name.map_or(path.len(), |name| path.len() - name.len().min(path.len()));
        let above =
            path.get(..above).unwrap_or_default().strip_suffix(b"/").unwrap_or(path.get(..above).unwrap_or_default());
        loop {
            let next = match extra.next.take() {
                Some(next) => next,
                None => match extra.names.next_batch(1).map(|mut batch| batch.pop()) {
                    Ok(Some(next)) => next,
                    Ok(None) => return,
                    Err(error) => {
                        restorer.issues.add_flaw(above, format!("not all of its names could be looked at: {error}"));
                        frame.extra = None;
                        return;
                    }
                },
            };
            if name.is_some_and(|name| *next >= *name) {
                extra.next = Some(next).filter(|next| name != Some(next));
                return;
            }
            let path = below(above, &next);
            if !frame.included && !restorer.filter.includes(&path) {
                continue;
            }
            let removed = match restorer.handles.open(&frame.directory) {
                Ok(handle) => self.remove(restorer, &handle, frame.device, &next, path, 0),
                Err(error) => Err((path, error)),
            };
            match removed {
                Ok(is_gone) => frame.deleted |= is_gone,
                Err((path, error)) => restorer.issues.add(&path, format!("it cannot be deleted: {error}")),
            }
        }
    }

    /// Removes `name` and everything in it; whether nothing is left of it. An error names the path concerned.
    pub(super) fn remove(
        &self,
        restorer: &Restorer,
        parent: &OwnedFd,
        device: Option<u64>,
        name: &[u8],
        path: Vec<u8>,
        depth: usize,
    ) -> Result<bool, (Vec<u8>, io::Error)> {
        if restorer.filter.excludes(&path) || self.unread.contains(&path) {
            return Ok(false);
        }
        let stat = match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(true),
            Err(error) => return Err((path, error.into())),
        };
        let is_directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        // Files of layered file systems may show another device than their directory.
        let is_mounted = is_directory && device.is_some_and(|device| device != stat.st_dev);
        if is_mounted || self.options.keep.contains(&(stat.st_dev, stat.st_ino)) {
            return Ok(false);
        }
        if is_directory && !self.empty(restorer, parent, stat.st_dev, name, &path, depth)? {
            return Ok(false);
        }
        if !restorer.options.dry_run {
            let flags = if is_directory { AtFlags::REMOVEDIR } else { AtFlags::empty() };
            match rustix::fs::unlinkat(parent, name, flags) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(error) => return Err((path, error.into())),
            }
        }
        count(&restorer.issues.progress.deleted);
        restorer.options.listener.tell(Action::Deleted, &path);
        Ok(true)
    }

    /// Removes what is in the directory; whether that was everything.
    fn empty(
        &self,
        restorer: &Restorer,
        parent: &OwnedFd,
        device: u64,
        name: &[u8],
        path: &[u8],
        depth: usize,
    ) -> Result<bool, (Vec<u8>, io::Error)> {
        let failed = |error: io::Error| (path.to_vec(), error);
        if depth >= DEPTH_MAX {
            return Err(failed(io::Error::other(format!("directories lie more than {DEPTH_MAX} deep in it"))));
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let handle = rustix::fs::openat(parent, name, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
        for _ in 0..PASSES_MAX {
            let (mut is_empty, mut kept) = (true, false);
            for entry in Dir::read_from(&handle).map_err(|error| failed(error.into()))? {
                let entry = entry.map_err(|error| failed(error.into()))?;
                let name = entry.file_name().to_bytes();
                if name == b"." || name == b".." {
                    continue;
                }
                if restorer.stopped() {
                    return Ok(false);
                }
                is_empty = false;
                kept |= !self.remove(restorer, &handle, Some(device), name, below(path, name), depth + 1)?;
            }
            if kept || is_empty || restorer.options.dry_run {
                return Ok(!kept);
            }
        }
        Ok(true)
    }
}

fn below(directory: &[u8], name: &[u8]) -> Vec<u8> {
    if directory.is_empty() { name.to_vec() } else { [directory, b"/", name].concat() }
}

/// Deleting in a directory has changed its time.
fn leave(restorer: &Restorer, frame: &Frame) {
    if frame.deleted {
        frame.directory.set_attributes(restorer);
    }
}
