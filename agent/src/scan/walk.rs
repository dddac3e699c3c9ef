//! The walk itself: a stack of directories, their names taken in order, subdirectories listed ahead by worker threads.

use std::collections::{BTreeSet, VecDeque};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use crossbeam_channel::Receiver;
use rustix::io::Errno;

use super::ScanEvent;
use super::dir::{Dir, DirPool, OPEN_DIRECTORIES_MAX};
use super::exclude::Excludes;
use super::ignore_file::Rules;
use super::list::{ListContext, ListError, Listing, Lookahead, STAT_BATCH, Scanned, stat_all};
use super::markers::Marker;
use super::meta::{Meta, stat_at};
use super::names::{Name, Names};
use super::roots::RootNode;

/// Directories that may be listed ahead in all, and per level of the stack. A listing holds one descriptor and at most
/// one batch of metadata; its names count towards the limit of names in memory.
const LISTINGS_AHEAD_MAX: usize = 64;
const LISTINGS_AHEAD_PER_LEVEL_MAX: usize = 8;
/// Batches of metadata asked for ahead within one directory.
const BATCHES_AHEAD_MAX: usize = 2;

/// What to walk.
#[derive(Clone, Debug)]
pub struct WalkPlan {
    /// The paths given, merged.
    pub roots: Arc<RootNode>,
    /// What to leave out.
    pub excludes: Excludes,
    /// Of a directory with one of these, only the marker is saved.
    pub markers: Vec<Marker>,
    /// Longer files are left out, bytes.
    pub larger_than: Option<u64>,
    /// Name of files in the source that say what to leave out around them.
    pub ignore_file: Option<Vec<u8>>,
    /// Save directories that are on another file system than their root as empty.
    pub one_file_system: bool,
    /// (device, inode) of directories and files that are never saved: the repository, the agent's own state.
    pub skip: Vec<(u64, u64)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Below {
    Everything,
    GivenPathsOnly,
    Nothing,
}

#[derive(Debug)]
struct Pending {
    name: Name,
    meta: Meta,
    below: Below,
    given: Option<Arc<RootNode>>,
    root_device: u64,
    listing: Option<Receiver<Result<Listing, ListError>>>,
}

#[derive(Debug)]
enum Ahead {
    Asked(Receiver<Vec<Scanned>>),
    Names(Vec<Name>),
}

#[derive(Debug)]
struct Frame {
    dir: Arc<Dir>,
    names: Option<Names>,
    ahead: VecDeque<Ahead>,
    ready: VecDeque<Pending>,
    listings_ahead: usize,
    given: Option<Arc<RootNode>>,
    below: Below,
    root_device: u64,
    path_bytes: usize,
    rules: Option<Rules>,
}

/// A walk in progress. `next()` gives one event after the other, `None` at the end.
#[derive(Debug)]
pub struct Walker {
    plan: WalkPlan,
    context: Arc<ListContext>,
    lookahead: Lookahead,
    frames: Vec<Frame>,
    path: Vec<u8>,
    listings_ahead: usize,
    events: VecDeque<ScanEvent>,
    roots_found: u64,
}

impl Walker {
    /// Begins at `/`. Fails only if `/` itself cannot be opened.
    pub fn new(plan: WalkPlan, context: Arc<ListContext>, lookahead: Lookahead) -> Result<Self, Errno> {
        let (dir, meta) = Dir::root(&DirPool::new(OPEN_DIRECTORIES_MAX))?;
        let given = Some(plan.roots.clone());
        let mut walker = Self {
            context,
            lookahead,
            frames: Vec::new(),
            path: Vec::new(),
            listings_ahead: 0,
            events: VecDeque::new(),
            roots_found: u64::from(plan.roots.root),
            plan,
        };
        if walker.plan.roots.root {
            match walker.context.list_open(dir, meta) {
                Ok(listing) => walker.push(listing, given, meta.device),
                Err(error) => walker.problem(b"", list_error_text(&error)),
            }
        } else {
            walker.push_given(dir, given);
        }
        Ok(walker)
    }

    /// How many of the paths given were there.
    pub fn roots_found(&self) -> u64 {
        self.roots_found
    }

    /// The path of the directory being walked, raw (empty: the root).
    pub fn path(&self) -> &[u8] {
        &self.path
    }

    fn push(&mut self, listing: Listing, given: Option<Arc<RootNode>>, root_device: u64) {
        let marked: Vec<_> = self.plan.markers.iter().filter(|marker| marker.is_in(&listing.dir)).collect();
        let (names, first) = if marked.is_empty() {
            (Some(listing.names), listing.first)
        } else {
            let given = given.iter().flat_map(|given| given.children.keys());
            let kept: BTreeSet<Name> = marked
                .iter()
                .map(|marker| marker.name.as_slice())
                .chain(given.map(Vec::as_slice))
                .map(Name::from)
                .collect();
            (None, stat_all(&listing.dir, kept.into_iter().collect()))
        };
        let rules = self.rules_of(&listing.dir);
        let mut frame = Frame {
            dir: listing.dir,
            names,
            ahead: VecDeque::new(),
            ready: VecDeque::new(),
            listings_ahead: 0,
            given,
            below: Below::Everything,
            root_device,
            path_bytes: self.path.len(),
            rules,
        };
        self.accept(&mut frame, first);
        self.frames.push(frame);
    }

    fn rules_of(&self, dir: &Arc<Dir>) -> Option<Rules> {
        let name = self.plan.ignore_file.as_ref()?;
        let above = self.frames.iter().filter_map(|frame| frame.rules.as_ref());
        let (rules, problems) = Rules::read(dir, name, above);
        for problem in problems {
            let path = String::from_utf8_lossy(&dir.path_of(name)).into_owned();
            tracing::warn!(path, "{problem}");
        }
        rules
    }

    /// Whether a file in the source says that `name` in the frame's directory is left out. The deepest one decides.
    fn ignored(&mut self, frame: &Frame, name: &[u8], is_dir: bool) -> bool {
        if self.plan.ignore_file.is_none() {
            return false;
        }
        if let Some(decision) = frame.rules.as_ref().and_then(|rules| rules.decide(name, is_dir)) {
            return decision;
        }
        self.path.truncate(frame.path_bytes);
        self.path.push(b'/');
        self.path.extend_from_slice(name);
        let decided = self.frames.iter().rev().find_map(|above| {
            let relative = self.path.get(above.path_bytes + 1..)?;
            above.rules.as_ref()?.decide(relative, is_dir)
        });
        self.path.truncate(frame.path_bytes);
        decided.unwrap_or(false)
    }

    fn push_given(&mut self, dir: Arc<Dir>, given: Option<Arc<RootNode>>) {
        let children: Vec<_> = given.iter().flat_map(|given| given.children.clone()).collect();
        let device = dir.device();
        let mut frame = Frame {
            dir,
            names: None,
            ahead: VecDeque::new(),
            ready: VecDeque::new(),
            listings_ahead: 0,
            given,
            below: Below::GivenPathsOnly,
            root_device: device,
            path_bytes: self.path.len(),
            rules: None,
        };
        let fd = frame.dir.fd();
        let mut scanned = Vec::new();
        for (name, child) in &children {
            let meta = match &fd {
                Ok(fd) => stat_at(fd.as_fd(), name, child.follow),
                Err(error) => Err(*error),
            };
            scanned.push(Scanned { name: name.clone().into(), meta });
        }
        self.accept(&mut frame, scanned);
        self.frames.push(frame);
    }

    // Decides about freshly listed names: left out, unreadable, or pending.
    fn accept(&mut self, frame: &mut Frame, scanned: Vec<Scanned>) {
        for Scanned { name, meta } in scanned {
            let given = frame.given.as_ref().and_then(|given| given.children.get(&*name)).cloned();
            if given.is_none() && self.excluded(frame.path_bytes, &name) {
                continue;
            }
            let meta = match meta {
                Ok(meta) => meta,
                Err(error) => {
                    self.problem(&name, errno_text(error, "its metadata could not be read"));
                    continue;
                }
            };
            if self.plan.skip.contains(&(meta.device, meta.inode)) {
                continue;
            }
            let is_too_large = meta.is_file() && self.plan.larger_than.is_some_and(|limit| meta.size > limit);
            if given.is_none() && (is_too_large || self.ignored(frame, &name, meta.is_dir())) {
                continue;
            }
            if let Some(given) = &given {
                self.roots_found += u64::from(given.root);
                if !meta.is_dir() && !given.children.is_empty() {
                    let text = "a path given lies below this, which is not a directory".into();
                    self.problem(&name, text);
                }
            }
            let is_root = given.as_ref().is_some_and(|given| given.root);
            let (below, root_device) = match frame.below {
                Below::Everything if !self.plan.one_file_system || meta.device == frame.root_device => {
                    (Below::Everything, frame.root_device)
                }
                _ if is_root => (Below::Everything, meta.device),
                _ if given.is_some() => (Below::GivenPathsOnly, meta.device),
                _ => (Below::Nothing, frame.root_device),
            };
            if !meta.is_dir() && below == Below::GivenPathsOnly {
                continue;
            }
            frame.ready.push_back(Pending { name, meta, below, given, root_device, listing: None });
        }
    }

    fn excluded(&mut self, path_bytes: usize, name: &[u8]) -> bool {
        self.path.truncate(path_bytes);
        self.path.push(b'/');
        self.path.extend_from_slice(name);
        let excluded = self.plan.excludes.matches(&self.path);
        self.path.truncate(path_bytes);
        excluded
    }

    fn problem(&mut self, name: &[u8], message: String) {
        let mut path = self.path.clone();
        if !name.is_empty() || path.is_empty() {
            path.push(b'/');
            path.extend_from_slice(name);
        }
        self.events.push_back(ScanEvent::Problem { path, message });
    }

    // Makes sure that the frame has pending entries, unless it is at its end.
    fn refill(&mut self, frame: &mut Frame) {
        while frame.ready.is_empty() {
            let scanned = match frame.ahead.pop_front() {
                Some(Ahead::Asked(reply)) => {
                    let Ok(scanned) = reply.recv() else {
                        self.problem(b"", "some of its entries are missing: the thread that listed them failed".into());
                        continue;
                    };
                    scanned
                }
                Some(Ahead::Names(names)) => stat_all(&frame.dir, names),
                None => match self.next_names(frame) {
                    Some(names) => stat_all(&frame.dir, names),
                    None => return,
                },
            };
            self.accept(frame, scanned);
        }
        while frame.ahead.len() < BATCHES_AHEAD_MAX {
            let Some(names) = self.next_names(frame) else { break };
            match self.lookahead.stat(&frame.dir, names) {
                Ok(reply) => frame.ahead.push_back(Ahead::Asked(reply)),
                Err(names) => {
                    frame.ahead.push_back(Ahead::Names(names));
                    break;
                }
            }
        }
    }

    fn next_names(&mut self, frame: &mut Frame) -> Option<Vec<Name>> {
        match frame.names.as_mut()?.next_batch(STAT_BATCH) {
            Ok(names) if names.is_empty() => {
                frame.names = None;
                None
            }
            Ok(names) => Some(names),
            Err(error) => {
                frame.names = None;
                let message = format!("the rest of the directory is missing: a temporary file failed: {error}");
                self.problem(b"", message);
                None
            }
        }
    }

    fn list_ahead(&mut self, frame: &mut Frame) {
        let mut free = LISTINGS_AHEAD_PER_LEVEL_MAX.saturating_sub(frame.listings_ahead);
        for pending in &mut frame.ready {
            if free == 0 || self.listings_ahead >= LISTINGS_AHEAD_MAX {
                return;
            }
            let follow = pending.given.as_ref().is_some_and(|given| given.follow);
            if pending.meta.is_dir() && pending.below == Below::Everything && pending.listing.is_none() && !follow {
                pending.listing = self.lookahead.list(&frame.dir, &pending.name);
                if pending.listing.is_none() {
                    return;
                }
                free -= 1;
                frame.listings_ahead += 1;
                self.listings_ahead += 1;
            }
        }
    }

    fn enter(&mut self, parent: &Arc<Dir>, pending: Pending) {
        let Pending { name, meta, below, given, root_device, listing } = pending;
        let follow = given.as_ref().is_some_and(|given| given.follow);
        let listed = match below {
            Below::Nothing => {
                self.events.push_back(ScanEvent::Enter { parent: parent.clone(), dir: None, name, meta });
                self.events.push_back(ScanEvent::Leave);
                return;
            }
            Below::GivenPathsOnly => match Dir::open(parent, &name, follow) {
                Ok((dir, meta)) => {
                    let event =
                        ScanEvent::Enter { parent: parent.clone(), dir: Some(dir.clone()), name: name.clone(), meta };
                    self.events.push_back(event);
                    self.descend(&name);
                    self.push_given(dir, given);
                    return;
                }
                Err(error) => Err(ListError::Open(error)),
            },
            Below::Everything => match listing {
                Some(reply) => reply.recv().unwrap_or(Err(ListError::Open(Errno::CANCELED))),
                None => self.context.list(parent, &name, follow),
            },
        };
        match listed {
            Ok(listing) => {
                let (dir, meta) = (Some(listing.dir.clone()), listing.meta);
                let event = ScanEvent::Enter { parent: parent.clone(), dir, name: name.clone(), meta };
                self.events.push_back(event);
                self.descend(&name);
                self.push(listing, given, root_device);
            }
            Err(error) => {
                self.problem(&name, list_error_text(&error));
                let gone = matches!(error, ListError::Open(Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::STALE));
                if !gone {
                    self.events.push_back(ScanEvent::Enter { parent: parent.clone(), dir: None, name, meta });
                    self.events.push_back(ScanEvent::Leave);
                }
            }
        }
    }

    fn descend(&mut self, name: &[u8]) {
        self.path.push(b'/');
        self.path.extend_from_slice(name);
    }
}

impl Iterator for Walker {
    type Item = ScanEvent;

    fn next(&mut self) -> Option<ScanEvent> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Some(event);
            }
            let mut frame = self.frames.pop()?;
            self.path.truncate(frame.path_bytes);
            self.refill(&mut frame);
            self.list_ahead(&mut frame);
            let Some(pending) = frame.ready.pop_front() else {
                if !self.frames.is_empty() {
                    self.events.push_back(ScanEvent::Leave);
                }
                continue;
            };
            if pending.listing.is_some() {
                frame.listings_ahead = frame.listings_ahead.saturating_sub(1);
                self.listings_ahead = self.listings_ahead.saturating_sub(1);
            }
            let parent = frame.dir.clone();
            self.frames.push(frame);
            if pending.meta.is_dir() {
                self.enter(&parent, pending);
            } else {
                return Some(ScanEvent::Node { parent, name: pending.name, meta: pending.meta });
            }
        }
    }
}

/// (device, inode) of `path`, for [`WalkPlan::skip`].
pub fn identity_of(path: &Path) -> Option<(u64, u64)> {
    use std::os::unix::ffi::OsStrExt;
    let meta = stat_at(rustix::fs::CWD, path.as_os_str().as_bytes(), true).ok()?;
    Some((meta.device, meta.inode))
}

fn list_error_text(error: &ListError) -> String {
    match error {
        ListError::Open(error) => errno_text(*error, "the directory could not be opened, what is in it is missing"),
        ListError::Read(error) => format!("the directory could not be listed, what is in it is missing: {error}"),
    }
}

/// What `error` means for the one path that it is about.
pub fn errno_text(error: Errno, what: &str) -> String {
    match error {
        Errno::NOENT => "vanished while it was being saved".into(),
        Errno::LOOP | Errno::NOTDIR | Errno::STALE => {
            format!("was replaced by something else while it was being saved: {what}")
        }
        error => format!("{what}: {error}"),
    }
}
