//! Hard links: entries with the same device and inode become one inode again.
//!
//! The memory of inodes already restored is a hidden directory in the target, with one link per inode named after device
//! and inode, so that it does not grow in memory with the number of linked files. A link is removed when all links of its
//! inode are made, the directory at the end. Only links to files that are still being written wait in memory.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::{AtFlags, Dir, Mode, OFlags};
use rustix::io::Errno;

use super::attributes::Meta;
use super::directories::Directory;
use super::file_job::put_in_place;
use super::report::count;
use super::{Action, Restorer};

/// Device and inode at the source, and the number of links there.
#[derive(Clone, Copy, Debug)]
pub(super) struct LinkKey {
    pub(super) device: u64,
    pub(super) inode: u64,
    pub(super) links: u32,
}

/// What is to be done with an entry that has several links.
pub(super) enum Linking {
    /// It is the first: restore it, then call [`Links::first_is_done`].
    First,
    /// Nothing: it is linked, or will be.
    Done,
}

pub(super) struct Links {
    /// Name of the hidden directory.
    name: String,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    directory: Option<Arc<OwnedFd>>,
    /// By device and inode.
    waiting: HashMap<(u64, u64), Vec<Waiting>>,
}

/// An entry whose first link is still being written, and the directory that it belongs into.
type Waiting = (Arc<Directory>, Meta);

impl LinkKey {
    fn pair(&self) -> (u64, u64) {
        (self.device, self.inode)
    }

    fn file_name(&self) -> String {
        format!("{:x}-{:x}", self.device, self.inode)
    }
}

impl Links {
    pub(super) fn new(name: String) -> Self {
        Self { name, state: Mutex::default() }
    }

    /// Links the entry to its inode if that was restored, lets it wait if it is being restored.
    pub(super) fn begin(&self, restorer: &Restorer, key: LinkKey, directory: &Arc<Directory>, meta: &Meta) -> Linking {
        let mut state = self.state.lock();
        if let Some(waiting) = state.waiting.get_mut(&key.pair()) {
            directory.hold();
            waiting.push((Arc::clone(directory), meta.clone()));
            return Linking::Done;
        }
        let Some(known) = state.directory.clone() else {
            state.waiting.insert(key.pair(), Vec::new());
            return Linking::First;
        };
        // An error: not known, or the system cannot link there (another file system, too many links): a copy of its own.
        if link(restorer, &known, key.file_name().as_bytes(), directory, meta).is_err() {
            state.waiting.insert(key.pair(), Vec::new());
            return Linking::First;
        }
        linked(restorer, meta);
        forget_if_complete(&known, key);
        Linking::Done
    }

    /// For an entry that is left as it is: whether it is the first of its inode.
    pub(super) fn begin_left(&self, key: LinkKey) -> Linking {
        let mut state = self.state.lock();
        let remembered = state
            .directory
            .as_ref()
            .is_some_and(|known| rustix::fs::statat(known, key.file_name(), AtFlags::SYMLINK_NOFOLLOW).is_ok());
        if remembered || state.waiting.contains_key(&key.pair()) {
            return Linking::Done;
        }
        state.waiting.insert(key.pair(), Vec::new());
        Linking::First
    }

    /// The first entry of its inode is finished: those that wait are linked to it, and later ones will be.
    pub(super) fn first_is_done(
        &self,
        restorer: &Restorer,
        key: LinkKey,
        directory: &Arc<Directory>,
        first: &Meta,
        restored: bool,
    ) {
        let waiting = {
            let mut state = self.state.lock();
            if restored {
                self.remember(restorer, &mut state, key, directory, first);
            }
            state.waiting.remove(&key.pair()).unwrap_or_default()
        };
        let known = restorer.handles.open(directory);
        for (place, meta) in waiting {
            let result = match (&known, restored) {
                (_, false) => Err("the file that it is a link to could not be restored".to_owned()),
                (Err(error), _) => Err(format!("it cannot be linked: {error}")),
                (Ok(known), _) => link(restorer, known, &first.name, &place, &meta).map_err(|error| {
                    format!(
                        "it cannot be linked: {error}; run the command again with --overwrite if-changed for a copy"
                    )
                }),
            };
            match result {
                Ok(()) => linked(restorer, &meta),
                Err(_) if restorer.stopped() => {}
                Err(reason) => restorer.issues.add(&meta.path, reason),
            }
            place.release(restorer);
        }
        let known = self.state.lock().directory.clone();
        if let Some(known) = known {
            forget_if_complete(&known, key);
        }
    }

    // Errors are not lost: whoever finds no remembered link restores a copy of its own.
    fn remember(&self, restorer: &Restorer, state: &mut State, key: LinkKey, directory: &Arc<Directory>, first: &Meta) {
        if state.directory.is_none() {
            let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let made = restorer.handles.target().ok().and_then(|target| {
                rustix::fs::mkdirat(target, self.name.as_str(), Mode::RWXU).ok()?;
                rustix::fs::openat(target, self.name.as_str(), flags, Mode::empty()).ok()
            });
            state.directory = made.map(Arc::new);
        }
        if let (Some(known), Ok(from)) = (&state.directory, restorer.handles.open(directory)) {
            let name = key.file_name();
            // Replaces what an earlier copy of the inode left.
            let _ = rustix::fs::unlinkat(known, name.as_str(), AtFlags::empty());
            let _ = rustix::fs::linkat(&*from, first.name.as_slice(), known, name.as_str(), AtFlags::empty());
        }
    }

    /// Removes the hidden directory.
    pub(super) fn remove(&self, restorer: &Restorer) {
        let mut state = self.state.lock();
        state.waiting.clear();
        let Some(known) = state.directory.take() else { return };
        if let Ok(entries) = Dir::read_from(&*known) {
            for entry in entries.flatten() {
                let _ = rustix::fs::unlinkat(&*known, entry.file_name(), AtFlags::empty());
            }
        }
        let Ok(target) = restorer.handles.target() else { return };
        if let Err(error) = rustix::fs::unlinkat(target, self.name.as_str(), AtFlags::REMOVEDIR) {
            restorer.issues.add(self.name.as_bytes(), format!("the directory can be removed, but not by us: {error}"));
        }
    }
}

/// Links `name` of `known` to the entry's place, replacing what is there.
fn link(
    restorer: &Restorer,
    known: &OwnedFd,
    name: &[u8],
    directory: &Arc<Directory>,
    meta: &Meta,
) -> std::io::Result<()> {
    let handle = restorer.handles.open(directory)?;
    let temporary = restorer.temporary_name();
    rustix::fs::linkat(known, name, &*handle, temporary.as_slice(), AtFlags::empty())?;
    let placed = put_in_place(restorer, directory, &temporary, meta);
    // A rename between two links of one inode does nothing, so the temporary name may still be there.
    match rustix::fs::unlinkat(&*handle, temporary.as_slice(), AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => placed,
        Err(error) => placed.and(Err(error.into())),
    }
}

fn linked(restorer: &Restorer, meta: &Meta) {
    count(&restorer.issues.progress.hard_links);
    restorer.options.listener.tell(Action::Restored, &meta.path);
}

/// All links made, and one more in the hidden directory.
fn forget_if_complete(known: &OwnedFd, key: LinkKey) {
    let name = key.file_name();
    if let Ok(stat) = rustix::fs::statat(known, name.as_str(), AtFlags::SYMLINK_NOFOLLOW)
        && stat.st_nlink > key.links.into()
    {
        let _ = rustix::fs::unlinkat(known, name.as_str(), AtFlags::empty());
    }
}
