//! The planner: walks the tree in order, makes what has no content at once, and cuts the rest into windows.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use crossbeam_channel::{Sender, bounded};
use rustix::fs::{AtFlags, Dev, FileType, Mode, OFlags};
use rustix::io::Errno;
use strandline_messages::format::tree::{Content, EntryNode};

use super::attributes::Meta;
use super::directories::{Directory, Made};
use super::file_job::{FileJob, put_in_place};
use super::layout::Layout;
use super::links::{LinkKey, Linking};
use super::report::count;
use super::reuse::{Old, Reuse};
use super::window::{Draft, Target, Window};
use super::{Action, Overwrite, Restorer, walk_prefix, walkable};
use crate::trees::{DirEntry, Resolved, Step};

pub(super) struct Planner<'a> {
    restorer: &'a Restorer,
    draft: Draft,
    /// One queue of one window per writer: the window being written, the one waiting, and the one being planned are all
    /// that exist.
    writers: Vec<Sender<Arc<Window>>>,
    /// Directories that the walk is in, and whether an include pattern matched them or one above.
    stack: Vec<(Arc<Directory>, bool)>,
}

/// What is at an entry's place in the target.
#[derive(PartialEq, Eq)]
enum Existing {
    Nothing,
    Left,
    Replaced,
    /// A directory, where the snapshot has none.
    Directory,
}

impl<'a> Planner<'a> {
    /// Walks and writes everything; returns when all threads are done.
    pub(super) fn run(restorer: &'a Restorer, top: &Arc<Directory>, start: &Resolved) {
        std::thread::scope(|scope| {
            let mut writers = Vec::new();
            for _ in 0..restorer.options.writers.max(1) {
                let (sender, receiver) = bounded::<Arc<Window>>(1);
                writers.push(sender);
                scope.spawn(move || receiver.iter().for_each(|window| window.empty(restorer)));
            }
            let stack = vec![(Arc::clone(top), false)];
            let mut planner = Self { restorer, draft: Draft::default(), writers, stack };
            planner.plan(start);
            planner.flush();
            while let Some((directory, _)) = planner.stack.pop() {
                directory.release(restorer);
            }
        });
    }

    fn plan(&mut self, start: &Resolved) {
        let prefix = walk_prefix(&self.restorer.options.subpath);
        match (walkable(start), start) {
            (Err(error), _) => self.restorer.tree_problem(&prefix, &error),
            (Ok(Some(directory)), _) => {
                // A directory named by the subpath decides for what lies below it.
                let included = self.restorer.filter.includes_from_above(&prefix);
                if let Some((_, inherited)) = self.stack.last_mut() {
                    *inherited = included;
                }
                let mut walk = self.restorer.filter.walk(&self.restorer.reader, directory, &prefix);
                while let Some(item) = walk.next().filter(|_| !self.restorer.stopped()) {
                    match item {
                        Ok((path, Step::Enter(entry))) => {
                            if !self.enter(path, &entry) {
                                walk.skip_directory();
                            }
                        }
                        Ok((_, Step::Leave)) => {
                            if let Some((directory, _)) = self.stack.pop() {
                                directory.release(self.restorer);
                            }
                        }
                        Ok((path, Step::Entry(entry))) => self.entry(path, &entry),
                        Err(problem) => self.restorer.tree_problem(&problem.path, &problem.error),
                    }
                }
            }
            (Ok(None), Resolved::Entry(entry)) => self.entry(prefix, entry),
            (Ok(None), Resolved::Root(_)) => {}
        }
    }

    /// Whether to walk into the directory.
    fn enter(&mut self, path: Vec<u8>, entry: &DirEntry) -> bool {
        let filter = &self.restorer.filter;
        let Some((parent, inherited)) = self.stack.last() else { return false };
        if filter.excludes(&path) {
            return false;
        }
        let included = filter.includes(&path) || *inherited;
        if !included && !filter.leads_to_something(&path) {
            return false;
        }
        let directory = Directory::below(parent, Meta::new(path, entry));
        if included && directory.ensure(self.restorer) != Made::Yes {
            directory.release(self.restorer);
            return false;
        }
        self.stack.push((directory, included));
        true
    }

    fn entry(&mut self, path: Vec<u8>, entry: &DirEntry) {
        let filter = &self.restorer.filter;
        let Some((directory, inherited)) = self.stack.last() else { return };
        if filter.excludes(&path) || !(filter.includes(&path) || *inherited) {
            return;
        }
        let directory = Arc::clone(directory);
        if directory.ensure(self.restorer) != Made::Yes {
            return;
        }
        let meta = Meta::new(path, entry);
        if let Err(error) = self.place(&directory, meta.clone(), entry) {
            self.restorer.issues.add(&meta.path, format!("it cannot be made: {error}"));
        }
    }

    fn place(&mut self, directory: &Arc<Directory>, meta: Meta, entry: &DirEntry) -> std::io::Result<()> {
        let restorer = self.restorer;
        let key = (entry.entry.links > 1).then_some(LinkKey {
            device: entry.entry.device,
            inode: entry.entry.inode,
            links: entry.entry.links,
        });
        let existing = if directory.is_fresh() { Existing::Nothing } else { self.existing(directory, entry)? };
        if existing == Existing::Left {
            self.leave(directory, &meta, key);
            return Ok(());
        }
        if existing == Existing::Directory {
            self.clear(directory, &meta)?;
        }
        if restorer.options.dry_run {
            self.pretend(&meta, entry);
            return Ok(());
        }
        if let Some(key) = key
            && matches!(restorer.links.begin(restorer, key, directory, &meta), Linking::Done)
        {
            return Ok(());
        }
        if let EntryNode::File { size, content, holes } = &entry.entry.node {
            let layout = Layout::new(*size, holes);
            let mut old = self.old(directory, &existing, entry, content);
            let same = old.as_mut().is_some_and(|old| old.can_stay && self.is_same(old, &layout, entry));
            let in_place = |old: &&Old| restorer.options.in_place && old.can_stay && self.is_writable(directory, &meta);
            let identity = old.as_ref().filter(|old| same || in_place(old)).map(|old| old.identity);
            let job = FileJob::new(restorer, directory, meta, layout, key, identity, content);
            if same {
                restorer.issues.progress.bytes_reused.fetch_add(job.layout.content, Ordering::Relaxed);
                job.release(restorer, None);
            } else {
                self.file(&job, entry, content, old);
            }
            return Ok(());
        }
        let made = restorer.handles.open(directory).and_then(|handle| self.special(directory, &handle, &meta, entry));
        if let Some(key) = key {
            restorer.links.first_is_done(restorer, key, directory, &meta, made.is_ok());
        }
        made.map(|()| {
            count(&restorer.issues.progress.others);
            restorer.options.listener.tell(Action::Restored, &meta.path);
        })
    }

    /// What exists stays.
    fn leave(&self, directory: &Arc<Directory>, meta: &Meta, key: Option<LinkKey>) {
        let restorer = self.restorer;
        count(&restorer.issues.progress.left);
        restorer.options.listener.tell(Action::Left, &meta.path);
        let changes = restorer.options.overwrite == Overwrite::IfChanged && !restorer.options.dry_run;
        // An unchanged file is the snapshot's; one that is left whatever it is may be anything: nothing is linked to it.
        if let Some(key) = key.filter(|_| changes)
            && matches!(restorer.links.begin_left(key), Linking::First)
        {
            restorer.links.first_is_done(restorer, key, directory, meta, true);
        }
    }

    /// A directory is in the place of something else: it is not what the snapshot has.
    fn clear(&self, directory: &Arc<Directory>, meta: &Meta) -> std::io::Result<()> {
        let Some(deleter) = &self.restorer.deleter else { return Err(Errno::ISDIR.into()) };
        let handle = self.restorer.handles.open_readable(directory)?;
        let device = rustix::fs::fstat(&handle)?.st_dev;
        match deleter.remove(self.restorer, &handle, Some(device), &meta.name, meta.path.clone(), 0) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Errno::NOTEMPTY.into()),
            Err((path, error)) => {
                self.restorer.issues.add(&path, format!("it cannot be deleted: {error}"));
                Err(Errno::NOTEMPTY.into())
            }
        }
    }

    /// Counts what a dry run does not do. Further hard links count as files.
    fn pretend(&self, meta: &Meta, entry: &DirEntry) {
        let progress = &self.restorer.issues.progress;
        if let EntryNode::File { size, holes, .. } = &entry.entry.node {
            count(&progress.files);
            progress.bytes.fetch_add(Layout::new(*size, holes).content, Ordering::Relaxed);
        } else {
            count(&progress.others);
        }
        self.restorer.options.listener.tell(Action::Restored, &meta.path);
    }

    /// The existing file, if its content may be of use.
    fn old(&self, directory: &Arc<Directory>, existing: &Existing, entry: &DirEntry, content: &Content) -> Option<Old> {
        if *existing != Existing::Replaced || matches!(content, Content::Inline(_)) {
            return None;
        }
        let handle = self.restorer.handles.open(directory).ok()?;
        Old::open(&handle, &entry.entry.name)
    }

    /// Whether the existing file can be written to: not if it is a program that runs.
    fn is_writable(&self, directory: &Arc<Directory>, meta: &Meta) -> bool {
        let flags = OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let handle = self.restorer.handles.open(directory);
        handle.is_ok_and(|handle| rustix::fs::openat(&*handle, meta.name.as_slice(), flags, Mode::empty()).is_ok())
    }

    /// Whether the file has the snapshot's content. Reads up to the first difference.
    fn is_same(&self, old: &mut Old, layout: &Layout, entry: &DirEntry) -> bool {
        if old.size != layout.size || !old.has_holes_of(layout) {
            return false;
        }
        let mut offset = 0u64;
        for piece in self.restorer.reader.pieces(entry) {
            let Ok(piece) = piece else { return false };
            if self.restorer.stopped() || old.piece(&self.restorer.keyset, layout, offset, piece).is_none() {
                return false;
            }
            offset = offset.saturating_add(piece.1.into());
        }
        offset == layout.content
    }

    fn existing(&self, directory: &Arc<Directory>, entry: &DirEntry) -> std::io::Result<Existing> {
        let entry = &entry.entry;
        let handle = &*self.restorer.handles.open(directory)?;
        let stat = match rustix::fs::statat(handle, entry.name.as_slice(), AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(Existing::Nothing),
            Err(error) => return Err(error.into()),
        };
        let same = match (&entry.node, FileType::from_raw_mode(stat.st_mode)) {
            (EntryNode::File { size, .. }, FileType::RegularFile) => {
                u64::try_from(stat.st_size) == Ok(*size)
                    && stat.st_mtime == entry.mtime.seconds
                    && u64::from(entry.mtime.nanos) == stat.st_mtime_nsec
            }
            (EntryNode::Symlink { target }, FileType::Symlink) => {
                rustix::fs::readlinkat(handle, entry.name.as_slice(), Vec::new())?.as_bytes() == target.as_slice()
            }
            (_, FileType::Directory) if self.restorer.options.overwrite != Overwrite::Never => {
                return Ok(Existing::Directory);
            }
            _ => false,
        };
        Ok(match self.restorer.options.overwrite {
            Overwrite::Never => Existing::Left,
            Overwrite::IfChanged if same => Existing::Left,
            Overwrite::IfChanged | Overwrite::Always => Existing::Replaced,
        })
    }

    /// Links, pipes, sockets, devices: made under a temporary name, then put in place.
    fn special(
        &self,
        directory: &Arc<Directory>,
        handle: &OwnedFd,
        meta: &Meta,
        entry: &DirEntry,
    ) -> std::io::Result<()> {
        let restorer = self.restorer;
        let temporary = restorer.temporary_name();
        let name = temporary.as_slice();
        let node = |kind, device: Dev| rustix::fs::mknodat(handle, name, kind, Mode::RUSR | Mode::WUSR, device);
        match &entry.entry.node {
            EntryNode::Symlink { target } => rustix::fs::symlinkat(target.as_slice(), handle, name)?,
            EntryNode::Fifo => node(FileType::Fifo, 0)?,
            EntryNode::Socket => node(FileType::Socket, 0)?,
            EntryNode::CharDevice { major, minor } => {
                node(FileType::CharacterDevice, rustix::fs::makedev(*major, *minor))?;
            }
            EntryNode::BlockDevice { major, minor } => {
                node(FileType::BlockDevice, rustix::fs::makedev(*major, *minor))?;
            }
            EntryNode::File { .. } | EntryNode::Directory { .. } => return Ok(()),
        }
        restorer.attributes.apply_to_name(handle, name, meta, &restorer.issues);
        put_in_place(restorer, directory, name, meta).inspect_err(|_| {
            let _ = rustix::fs::unlinkat(handle, name, AtFlags::empty());
        })
    }

    fn file(&mut self, job: &Arc<FileJob>, entry: &DirEntry, content: &Content, old: Option<Old>) {
        let restorer = self.restorer;
        if let Content::Inline(bytes) = content {
            let written = job.open(restorer).and_then(|handle| {
                job.write(restorer, &handle, 0, bytes)?;
                Ok(handle)
            });
            self.check_length(job, bytes.len() as u64);
            match written {
                Ok(handle) => return job.release(restorer, Some(&handle)),
                Err(error) => job.fail(format!("it cannot be written: {error}")),
            }
            return job.release(restorer, None);
        }
        let mut reuse = old.map(|old| Reuse::new(restorer, job, old));
        let mut offset = 0u64;
        for piece in restorer.reader.pieces(entry) {
            match piece {
                Ok((id, bytes)) => {
                    let reused = reuse.as_mut().is_some_and(|reuse| reuse.piece(restorer, job, offset, (id, bytes)));
                    if !reused {
                        job.hold();
                        self.draft.add(id, Target { file: Arc::clone(job), offset, bytes });
                    }
                    offset = offset.saturating_add(bytes.into());
                }
                Err(error) => {
                    if error.is_lost() {
                        restorer.issues.end(error.to_string());
                    }
                    job.fail(error.to_string());
                }
            }
            if self.draft.is_full(restorer.options.window_bytes) {
                self.flush();
            }
            if restorer.stopped() {
                job.fail("stopped".into());
                break;
            }
        }
        if !job.has_failed() {
            self.check_length(job, offset);
        }
        job.release(restorer, None);
    }

    /// A file that holds less or more than its entry says is restored as it was saved, and reported.
    fn check_length(&self, job: &FileJob, found: u64) {
        let expected = job.layout.content;
        if found != expected {
            let reason = format!("the snapshot holds {found} bytes of it where {expected} were expected; restored so");
            self.restorer.issues.add_flaw(&job.meta.path, reason);
        }
    }

    /// Starts the fetch of the planned window and hands it to the writers.
    fn flush(&mut self) {
        let mut draft = std::mem::take(&mut self.draft);
        if draft.ids.is_empty() {
            return;
        }
        let ids = std::mem::take(&mut draft.ids);
        let answer = self.restorer.reader.source().fetch(ids);
        let window = Arc::new(draft.into_window(answer, self.writers.len()));
        for writer in &self.writers {
            // A writer ends only after its queue is closed.
            let _ = writer.send(Arc::clone(&window));
        }
    }
}
