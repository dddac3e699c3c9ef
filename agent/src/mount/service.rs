//! What the mount answers, without the kernel's words: names to inodes, directories in parts, bytes of files.
//!
//! Shared by all workers; nothing here holds a lock while it waits for the network.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use fuser::{Errno, FileType};
use parking_lot::Mutex;
use strandline_messages::ChunkId;
use strandline_messages::format::tree::ListKind;

use super::complaints::Complaints;
use super::content::Contents;
use super::inodes::{Identity, Inodes};
use super::item::{Body, Item};
use super::layout::{Child, Layout, Place};
use super::leaves::{Leaves, Part};
use super::node::{Node, View};
use super::read_ahead::{OpenFile, ReadAhead};
use super::readers::Readers;
use super::snapshots::Snapshots;
use super::why_not_read;
use crate::trees::{DirEntry, UnreadablePart};

/// See the module.
pub(super) struct Service {
    pub(super) inodes: Inodes,
    pub(super) mounted: SystemTime,
    snapshots: Snapshots,
    readers: Arc<Readers>,
    contents: Arc<Contents>,
    ahead: ReadAhead,
    directories: Leaves<DirEntry>,
    complaints: Complaints,
}

/// An open directory. Holds no entries: offsets are places in its list.
pub(super) struct OpenDirectory {
    node: Node,
    /// The names of a place as they were when it was opened or rewound.
    layout: Mutex<Arc<Layout>>,
    /// A part of it could not be read: its end is an error, after everything that can be read.
    damaged: AtomicBool,
}

/// One name of a directory.
pub(super) struct Listed<'a> {
    pub(super) name: &'a [u8],
    pub(super) kind: FileType,
    /// Where the next name stands.
    pub(super) next: u64,
    child: Found<'a>,
}

enum Found<'a> {
    /// The directory itself or the one above: by number.
    Dots(u64),
    Child(&'a Child),
    Entry(&'a Arc<View>, &'a DirEntry),
}

/// A directory of a snapshot whose names are told.
#[derive(Clone, Copy)]
struct Listing<'a> {
    number: u64,
    open: &'a OpenDirectory,
    view: &'a Arc<View>,
    top: ChunkId,
}

/// What is told of a directory's names, one after another; says whether there is room for more.
pub(super) type Sink<'a> = dyn FnMut(Listed<'_>) -> bool + 'a;

impl Service {
    pub(super) fn new(snapshots: Snapshots, readers: Arc<Readers>, contents: Contents, cache_bytes: usize) -> Self {
        let contents = Arc::new(contents);
        let now = strandline_actors::runtime::clock::wall();
        Self {
            inodes: Inodes::new(Node::Place(Place::Top)),
            mounted: SystemTime::UNIX_EPOCH + now,
            snapshots,
            readers,
            ahead: ReadAhead::new(&contents, cache_bytes),
            contents,
            directories: Leaves::default(),
            complaints: Complaints::default(),
        }
    }

    /// What the kernel calls by this number.
    pub(super) fn node(&self, number: u64) -> Result<Node, Errno> {
        self.inodes.get(number).ok_or(Errno::ESTALE)
    }

    fn failed(&self, number: u64, reason: &str) -> Errno {
        self.complaints.tell(number, reason, || self.inodes.path(number));
        Errno::EIO
    }

    /// The top node of the directory's list.
    fn top(&self, number: u64, item: &Item) -> Result<ChunkId, Errno> {
        match &item.body {
            Body::Directory { top: Ok(top) } => Ok(*top),
            Body::Directory { top: Err(reason) } => Err(self.failed(number, reason)),
            _ => Err(Errno::ENOTDIR),
        }
    }

    /// The inode of a name; the kernel holds it from now on.
    pub(super) fn lookup(&self, parent: u64, name: &[u8]) -> Result<(u64, Node), Errno> {
        match self.node(parent)? {
            Node::Place(place) => {
                let last = self.snapshots.last();
                if let Some(child @ (Child::Place(_) | Child::Snapshot(_))) = last.names(&place).get(name) {
                    return Ok(self.remember_child(parent, name, child));
                }
                // What is new, or changes its meaning.
                let current = self.snapshots.current();
                let child = current.names(&place).get(name).ok_or(Errno::ENOENT)?;
                Ok(self.remember_child(parent, name, child))
            }
            Node::Item { view, item } => {
                let top = self.top(parent, &item)?;
                self.snapshots.enter(&view.shown);
                match self.readers.of(view.snapshot()).find(top, name) {
                    Ok(Some(entry)) => Ok(self.remember_entry(parent, &view, &entry)),
                    Ok(None) => Err(Errno::ENOENT),
                    Err(error) => Err(self.failed(parent, &why_not_read(&error))),
                }
            }
            Node::Latest { .. } => Err(Errno::ENOTDIR),
        }
    }

    fn identity_of_child(parent: u64, name: &[u8], child: &Child) -> Identity {
        match child {
            Child::Place(_) => Identity::Name { parent, name: name.into() },
            Child::Snapshot(shown) => Identity::Snapshot { parent, snapshot: shown.id },
            // Another target is another inode, so that nobody keeps the old one. No name holds a NUL.
            Child::Latest(_, target) => Identity::Name { parent, name: [name, b"\0", target].concat().into() },
        }
    }

    fn remember_child(&self, parent: u64, name: &[u8], child: &Child) -> (u64, Node) {
        let identity = Self::identity_of_child(parent, name, child);
        let node = match child {
            Child::Place(place) => Node::Place(place.clone()),
            Child::Snapshot(shown) => {
                let view = View { shown: Arc::clone(shown), root: self.inodes.number(&identity) };
                Node::Item { view: Arc::new(view), item: Arc::new(Item::root(shown.root, shown.started_ns)) }
            }
            Child::Latest(shown, target) => {
                let begun = std::time::Duration::from_nanos(u64::try_from(shown.started_ns).unwrap_or(0));
                Node::Latest { target: Arc::clone(target), modified: SystemTime::UNIX_EPOCH + begun }
            }
        };
        self.inodes.remember(identity, parent, name, node)
    }

    fn remember_entry(&self, parent: u64, view: &Arc<View>, entry: &DirEntry) -> (u64, Node) {
        let node = Node::Item { view: Arc::clone(view), item: Arc::new(Item::of(entry)) };
        self.inodes.remember(identity_of_entry(parent, view, entry), parent, &entry.entry.name, node)
    }

    /// The inode of a listed name; the kernel holds it from now on, unless it is one of the dots.
    pub(super) fn remember(&self, parent: u64, listed: &Listed<'_>) -> Result<(u64, Node), Errno> {
        match listed.child {
            Found::Dots(number) => self.node(number).map(|node| (number, node)),
            Found::Child(child) => Ok(self.remember_child(parent, listed.name, child)),
            Found::Entry(view, entry) => Ok(self.remember_entry(parent, view, entry)),
        }
    }

    /// Takes back what [`Self::remember`] did, if the kernel is not told after all.
    pub(super) fn take_back(&self, listed: &Listed<'_>, number: u64) {
        if !matches!(listed.child, Found::Dots(_)) {
            self.inodes.forget(number, 1);
        }
    }

    /// The inode number of a listed name.
    pub(super) fn number(&self, parent: u64, listed: &Listed<'_>) -> u64 {
        match listed.child {
            Found::Dots(number) => number,
            Found::Child(child) => self.inodes.number(&Self::identity_of_child(parent, listed.name, child)),
            Found::Entry(view, entry) => self.inodes.number(&identity_of_entry(parent, view, entry)),
        }
    }

    pub(super) fn open_directory(&self, number: u64) -> Result<OpenDirectory, Errno> {
        let node = self.node(number)?;
        let layout = match &node {
            Node::Place(_) => self.snapshots.current(),
            Node::Item { view, item } => {
                self.top(number, item)?;
                self.snapshots.enter(&view.shown);
                Arc::default()
            }
            Node::Latest { .. } => return Err(Errno::ENOTDIR),
        };
        Ok(OpenDirectory { node, layout: Mutex::new(layout), damaged: AtomicBool::new(false) })
    }

    /// Tells the names of a directory from place `offset` on until the sink is full. Place 0 is the directory itself, 1
    /// the one above, the others are the entries in the order of their names.
    pub(super) fn list(
        &self,
        number: u64,
        open: &OpenDirectory,
        offset: u64,
        sink: &mut Sink<'_>,
    ) -> Result<(), Errno> {
        let above = self.inodes.parent(number);
        for (place, name, dots) in [(0, &b"."[..], number), (1, b"..", above)] {
            let listed = Listed { name, kind: FileType::Directory, next: place + 1, child: Found::Dots(dots) };
            if offset <= place && !sink(listed) {
                return Ok(());
            }
        }
        let entry = offset.saturating_sub(2);
        match &open.node {
            Node::Place(place) => {
                self.list_place(open, place, offset, entry, sink);
                Ok(())
            }
            Node::Item { view, item } => {
                if offset == 0 {
                    open.damaged.store(false, Ordering::Relaxed);
                }
                let top = self.top(number, item)?;
                self.list_entries(&Listing { number, open, view, top }, entry, offset < 2, sink)
            }
            Node::Latest { .. } => Err(Errno::ENOTDIR),
        }
    }

    fn list_place(&self, open: &OpenDirectory, place: &Place, offset: u64, entry: u64, sink: &mut Sink<'_>) {
        if offset == 0 {
            *open.layout.lock() = self.snapshots.current();
        }
        let layout = Arc::clone(&open.layout.lock());
        let skipped = usize::try_from(entry).unwrap_or(usize::MAX);
        for ((name, child), next) in layout.names(place).iter().skip(skipped).zip(entry + 3..) {
            let kind = if matches!(child, Child::Latest(..)) { FileType::Symlink } else { FileType::Directory };
            if !sink(Listed { name, kind, next, child: Found::Child(child) }) {
                return;
            }
        }
    }

    /// `told`: the sink has been told of something. An error is the answer only to a request that is told nothing else,
    /// so it comes when everything that can be told has been told.
    fn list_entries(
        &self,
        listing: &Listing<'_>,
        mut at: u64,
        mut told: bool,
        sink: &mut Sink<'_>,
    ) -> Result<(), Errno> {
        let Listing { number, open, view, top } = *listing;
        loop {
            match self.part(view, top, at) {
                Ok(Some(part)) => {
                    let skipped = usize::try_from(at.saturating_sub(part.start)).unwrap_or(usize::MAX);
                    for (entry, next) in part.items.iter().skip(skipped).zip(at + 3..) {
                        let (name, kind) = (entry.entry.name.as_slice(), kind_of(entry));
                        if !sink(Listed { name, kind, next, child: Found::Entry(view, entry) }) {
                            return Ok(());
                        }
                        told = true;
                    }
                    at = part.end;
                }
                Ok(None) if told || !open.damaged.load(Ordering::Relaxed) => return Ok(()),
                Ok(None) => return Err(Errno::EIO),
                Err(part) => {
                    let error = self.failed(number, &why_not_read(&part.error));
                    match part.end {
                        Some(end) if !part.error.is_lost() => {
                            open.damaged.store(true, Ordering::Relaxed);
                            at = end;
                        }
                        _ if told => return Ok(()),
                        _ => return Err(error),
                    }
                }
            }
        }
    }

    fn part(&self, view: &View, top: ChunkId, at: u64) -> Result<Option<Arc<Part<DirEntry>>>, Box<UnreadablePart>> {
        if let Some(part) = self.directories.get(top, at) {
            return Ok(Some(part));
        }
        let Some(leaf) = self.readers.of(view.snapshot()).leaf_at(top, ListKind::Directory, at)? else {
            return Ok(None);
        };
        let part = Part { start: leaf.start, end: leaf.end, items: leaf.entries() };
        Ok(Some(self.directories.insert(top, part)))
    }

    pub(super) fn open_file(&self, number: u64) -> Result<OpenFile, Errno> {
        match self.node(number)? {
            Node::Item { view, item } if matches!(item.body, Body::File { .. }) => {
                Ok(OpenFile { view, item, sequence: Mutex::default() })
            }
            _ => Err(Errno::EINVAL),
        }
    }

    /// Bytes of an open file, as many as asked for or up to its end.
    pub(super) fn read(&self, number: u64, file: &Arc<OpenFile>, offset: u64, bytes: u64) -> Result<Vec<u8>, Errno> {
        let Body::File { extents, content } = &file.item.body else { return Err(Errno::EINVAL) };
        self.ahead.note(file, offset, bytes);
        let read = self.contents.read(file.view.snapshot(), extents, content, offset, bytes);
        read.map_err(|reason| self.failed(number, &reason))
    }
}

fn identity_of_entry(parent: u64, view: &View, entry: &DirEntry) -> Identity {
    let e = &entry.entry;
    if e.links > 1 && kind_of(entry) != FileType::Directory {
        return Identity::Link { root: view.root, device: e.device, inode: e.inode };
    }
    Identity::Name { parent, name: e.name.as_slice().into() }
}

fn kind_of(entry: &DirEntry) -> FileType {
    use strandline_messages::format::tree::EntryNode;
    match entry.entry.node {
        EntryNode::File { .. } => FileType::RegularFile,
        EntryNode::Directory { .. } => FileType::Directory,
        EntryNode::Symlink { .. } => FileType::Symlink,
        EntryNode::Fifo => FileType::NamedPipe,
        EntryNode::Socket => FileType::Socket,
        EntryNode::CharDevice { .. } => FileType::CharDevice,
        EntryNode::BlockDevice { .. } => FileType::BlockDevice,
    }
}
