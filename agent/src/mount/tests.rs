//! The mount without a kernel: lists, content, damage and silence, over really sealed blocks in memory.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Sender, bounded};
use parking_lot::Mutex;
use strandline_messages::ChunkId;
use strandline_messages::ChunkKind;
use strandline_messages::format::chunk::Reference;
use strandline_messages::format::tree::{Content as TreeContent, EntryNode, Hole, ListKind, NodeBody, Piece};

use super::inodes::ROOT;
use super::item::Body;
use super::node::Node;
use super::*;
use crate::seal::OpenedBlock;
use crate::trees::Fetched;
use crate::trees::memory::{DirMaker, MemoryRepository, MemorySource};

const SNAPSHOT: SnapshotId = SnapshotId([1; 32]);

struct Memory {
    source: Arc<dyn ChunkSource>,
    root: ChunkId,
    lost: AtomicUsize,
}

impl Repository for Memory {
    fn snapshots(&self) -> Result<Vec<Shown>, String> {
        let (host, tags) = ("host".to_owned(), Vec::new());
        Ok(vec![Shown { id: SNAPSHOT, order: 1, root: self.root, started_ns: 0, host, tags }])
    }

    fn source(&self, _: SnapshotId) -> Result<Arc<dyn ChunkSource>, FetchError> {
        Ok(Arc::clone(&self.source))
    }

    fn lost(&self) {
        self.lost.fetch_add(1, Ordering::SeqCst);
    }
}

/// A service over `source`, and the inode of the snapshot's root.
fn service(source: Arc<dyn ChunkSource>, root: ChunkId, cache_bytes: usize) -> (Service, u64) {
    let repository = Arc::new(Memory { source, root, lost: AtomicUsize::new(0) });
    let patience = Arc::new(Patience::new(Arc::<Memory>::clone(&repository), Duration::from_secs(20)));
    let readers = Arc::new(Readers::new(Arc::clone(&patience)));
    let contents = Contents::new(Arc::clone(&readers), Chunks::new(patience, cache_bytes));
    let first = repository.snapshots().unwrap();
    let service = Service::new(Snapshots::new(repository, first), readers, contents, cache_bytes);
    let (ids, _) = service.lookup(ROOT, b"ids").unwrap();
    let (root, _) = service.lookup(ids, b"01010101").unwrap();
    (service, root)
}

/// Names from `offset` on, at most `room`; and where the next one stands.
fn listed(service: &Service, number: u64, offset: u64, room: usize) -> Result<(Vec<String>, u64), fuser::Errno> {
    let open = service.open_directory(number)?;
    list_open(service, number, &open, offset, room)
}

fn list_open(
    service: &Service,
    number: u64,
    open: &service::OpenDirectory,
    offset: u64,
    room: usize,
) -> Result<(Vec<String>, u64), fuser::Errno> {
    let (mut names, mut next) = (Vec::new(), offset);
    service.list(number, open, offset, &mut |listed| {
        if names.len() == room {
            return false;
        }
        names.push(String::from_utf8_lossy(listed.name).into_owned());
        next = listed.next;
        true
    })?;
    Ok((names, next))
}

/// 12 names in 4 leaves under 2 levels of index nodes; each leaf's block can be damaged alone.
fn huge(repo: &mut MemoryRepository) -> (ChunkId, Vec<String>, Vec<ChunkId>) {
    let names: Vec<String> = (0..12).map(|n| format!("n{n:02}")).collect();
    let mut leaves = Vec::new();
    for part in names.chunks(3) {
        let mut leaf = DirMaker::default();
        for name in part {
            leaf.inline(name.as_bytes(), name.as_bytes());
        }
        leaves.push((leaf.finish(repo), 3, part[0].as_bytes()));
    }
    let low = repo.index(ListKind::Directory, 1, &leaves[..2]);
    let high = repo.index(ListKind::Directory, 1, &leaves[2..]);
    let top = repo.index(ListKind::Directory, 2, &[(low, 6, b"n00"), (high, 6, b"n06")]);
    let ids = leaves.iter().map(|(id, ..)| *id).collect();
    (top, names, ids)
}

#[test]
fn a_listing_can_be_resumed_at_every_place() {
    let mut repo = MemoryRepository::new();
    let (top, names, _) = huge(&mut repo);
    let (service, root) = service(repo.finish(), top, 1 << 20);
    let all: Vec<String> = [".".to_owned(), "..".to_owned()].into_iter().chain(names).collect();
    for offset in 0..=all.len() {
        for room in [1, 4, 100] {
            let (found, next) = listed(&service, root, offset as u64, room).unwrap();
            let end = all.len().min(offset + room);
            assert_eq!(found, all[offset..end], "{offset} {room}");
            assert_eq!(next, end as u64);
        }
    }
    assert!(listed(&service, root, 1000, 5).unwrap().0.is_empty());
}

/// Answers like another source, but fetches of some chunks come to nothing.
struct Damaged {
    inner: Arc<MemorySource>,
    chunks: Vec<ChunkId>,
}

impl ChunkSource for Damaged {
    fn fetch(&self, wanted: Vec<ChunkId>) -> Result<Fetched, FetchError> {
        let (bad, good): (Vec<_>, Vec<_>) = wanted.into_iter().partition(|id| self.chunks.contains(id));
        let (sender, receiver) = bounded(good.len() + 1);
        for answer in self.inner.fetch(good)? {
            sender.send(answer).unwrap();
        }
        if !bad.is_empty() {
            let reason = "block 77 is damaged".to_owned();
            sender.send(Err(FetchError::Unreadable { reason, chunks: bad })).unwrap();
        }
        Ok(receiver)
    }
}

#[test]
fn a_directory_with_a_damaged_part_tells_everything_else_and_then_the_error() {
    let mut repo = MemoryRepository::one_chunk_per_block();
    let (top, names, leaves) = huge(&mut repo);
    let (service, root) = service(Arc::new(Damaged { inner: repo.finish(), chunks: vec![leaves[1]] }), top, 1 << 20);
    let open = service.open_directory(root).unwrap();
    let (found, next) = list_open(&service, root, &open, 0, 100).unwrap();
    assert_eq!(found[2..], [&names[..3], &names[6..]].concat());
    assert!(list_open(&service, root, &open, next, 100).is_err());
    // A new reader begins anew, and names outside of the damage are found.
    assert_eq!(listed(&service, root, 0, 100).unwrap().0.len(), 11);
    assert!(service.lookup(root, b"n00").is_ok() && service.lookup(root, b"n11").is_ok());
    assert!(service.lookup(root, b"n04").is_err());
}

/// A file of 40 pieces in a content list of two levels, with holes before, between and behind.
fn listed_file(repo: &mut MemoryRepository, dir: &mut DirMaker, lie: u64) -> (Vec<u8>, Vec<ChunkId>) {
    let pieces: Vec<Vec<u8>> = (0..40u8).map(|n| vec![n + 1; 50 + usize::from(n)]).collect();
    let mut ids = Vec::new();
    let mut leaves = Vec::new();
    for part in pieces.chunks(10) {
        let references: Vec<_> =
            part.iter().map(|bytes| Reference::data(repo.chunk(ChunkKind::Data, bytes, &[]))).collect();
        ids.extend(references.iter().map(|reference| reference.id));
        let listed = part
            .iter()
            .zip(0..)
            .map(|(bytes, position)| Piece { position, bytes: u32::try_from(bytes.len()).unwrap() });
        let node = repo.node(ListKind::Content, NodeBody::Content(listed.collect()), &references);
        let weight: usize = part.iter().map(Vec::len).sum();
        leaves.push((node, weight as u64, &b""[..]));
    }
    leaves[2].1 += lie;
    let weight = |part: &[(ChunkId, u64, &[u8])]| part.iter().map(|leaf| leaf.1).sum::<u64>();
    let low = repo.index(ListKind::Content, 1, &leaves[..2]);
    let high = repo.index(ListKind::Content, 1, &leaves[2..]);
    let both = [(low, weight(&leaves[..2]), &b""[..]), (high, weight(&leaves[2..]), b"")];
    let top = repo.index(ListKind::Content, 2, &both);
    let stream = pieces.concat();
    let holes =
        vec![Hole { offset: 0, bytes: 100 }, Hole { offset: 500, bytes: 1000 }, Hole { offset: 3000, bytes: 1 }];
    let mut content = vec![0; 100];
    content.extend(&stream[..400]);
    content.extend([0; 1000]);
    content.extend(&stream[400..1900]);
    content.push(0);
    content.extend(&stream[1900..]);
    content.extend([0; 77]);
    let last = Hole { offset: content.len() as u64 - 77, bytes: 77 };
    let holes = holes.into_iter().chain([last]).collect();
    let position = dir.position(Reference::tree(top));
    let size = content.len() as u64;
    dir.add(b"file", EntryNode::File { size, content: TreeContent::List { position }, holes });
    (content, ids)
}

#[test]
fn every_range_of_a_file_with_holes_and_a_content_list_is_right() {
    let mut repo = MemoryRepository::new();
    let mut dir = DirMaker::default();
    let (content, _) = listed_file(&mut repo, &mut dir, 0);
    let root = dir.finish(&mut repo);
    let source = repo.finish();
    let (service, root) = service(Arc::<MemorySource>::clone(&source), root, 1 << 20);
    let (number, node) = service.lookup(root, b"file").unwrap();
    let Node::Item { item, .. } = &node else { panic!("no item") };
    let attributes = item.attributes(number);
    let stored = content.iter().filter(|byte| **byte != 0).count() as u64;
    assert_eq!((attributes.size, attributes.blocks), (content.len() as u64, stored.div_ceil(512)));
    let file = Arc::new(service.open_file(number).unwrap());
    for length in [1, 49, 333, 2000, 100_000] {
        for offset in (0..content.len() + 10).step_by(if length < 50 { 1 } else { 37 }) {
            let found = service.read(number, &file, offset as u64, length as u64).unwrap();
            let end = content.len().min(offset + length);
            assert_eq!(found, content.get(offset..end).unwrap_or_default(), "{length} at {offset}");
        }
    }
    // Everything came once: each block holds 4 chunks, and the cache holds all of them.
    assert!(source.fetches.load(Ordering::SeqCst) < 60, "{:?}", source.fetches);
}

#[test]
fn a_wrong_weight_in_a_content_list_is_an_error_and_never_another_places_bytes() {
    let mut repo = MemoryRepository::new();
    let mut dir = DirMaker::default();
    let (content, _) = listed_file(&mut repo, &mut dir, 5);
    let root = dir.finish(&mut repo);
    let (service, root) = service(repo.finish(), root, 1 << 20);
    let (number, _) = service.lookup(root, b"file").unwrap();
    let file = Arc::new(service.open_file(number).unwrap());
    assert_eq!(service.read(number, &file, 0, 400).unwrap(), content[..400]);
    // In the part whose weight is wrong.
    assert!(service.read(number, &file, 2900, 10).is_err());
}

#[test]
fn a_damaged_chunk_fails_only_reads_that_need_it() {
    let mut repo = MemoryRepository::one_chunk_per_block();
    let mut dir = DirMaker::default();
    let (content, ids) = listed_file(&mut repo, &mut dir, 0);
    let root = dir.finish(&mut repo);
    let (service, root) = service(Arc::new(Damaged { inner: repo.finish(), chunks: vec![ids[0]] }), root, 1 << 20);
    let (number, _) = service.lookup(root, b"file").unwrap();
    let file = Arc::new(service.open_file(number).unwrap());
    // The first piece has 50 bytes and begins behind a hole of 100.
    for (offset, length, good) in [(0, 100, true), (0, 101, false), (149, 1, false), (150, 4000, true)] {
        let found = service.read(number, &file, offset, length);
        assert_eq!(found.is_ok(), good, "{length} at {offset}");
        if let Ok(found) = found {
            let start = usize::try_from(offset).unwrap();
            assert_eq!(found, content[start..start + found.len()]);
        }
    }
}

#[test]
fn readers_of_one_chunk_share_one_fetch_and_a_small_cache_still_serves_everybody() {
    let mut repo = MemoryRepository::new();
    let mut dir = DirMaker::default();
    let bytes: Vec<u8> = (0..200_000u32).map(|n| u8::try_from(n / 1000).unwrap()).collect();
    dir.file(&mut repo, b"file", &bytes, 1000);
    let root = dir.finish(&mut repo);
    let source = repo.finish();
    // Room for 20 chunks of 200.
    let (service, root) = service(Arc::<MemorySource>::clone(&source), root, 23_000);
    let (number, _) = service.lookup(root, b"file").unwrap();
    let file = Arc::new(service.open_file(number).unwrap());
    thread::scope(|scope| {
        for reader in 0..8u64 {
            let (service, file, bytes) = (&service, &file, &bytes);
            scope.spawn(move || {
                for step in 0..100u64 {
                    let offset = (reader * 31 + step * 977) * 131 % 190_000;
                    let found = service.read(number, file, offset, 3000).unwrap();
                    let start = usize::try_from(offset).unwrap();
                    assert!(found == bytes[start..start + 3000], "{offset}");
                }
            });
        }
    });
}

#[test]
fn hard_links_share_an_inode_and_names_of_other_views_do_not() {
    let mut repo = MemoryRepository::new();
    let mut dir = DirMaker::default();
    for name in [&b"one"[..], b"two"] {
        let entry = dir.inline(name, b"same");
        (entry.inode, entry.links) = (5, 2);
    }
    dir.inline(b"three", b"other").inode = 5;
    let root = dir.finish(&mut repo);
    let (service, root) = service(repo.finish(), root, 1 << 20);
    let number = |root: u64, name: &[u8]| service.lookup(root, name).unwrap().0;
    assert_eq!(number(root, b"one"), number(root, b"two"));
    assert_ne!(number(root, b"one"), number(root, b"three"));
    let snapshots = number(ROOT, b"snapshots");
    let (_, latest) = service.lookup(snapshots, b"latest").unwrap();
    let Node::Latest { target, .. } = latest else { panic!("no link") };
    let other = number(snapshots, &target);
    assert_ne!(number(other, b"one"), number(root, b"one"));
    let held = service.inodes.len();
    service.inodes.forget(number(root, b"three"), 2);
    assert_eq!(service.inodes.len(), held - 1);
}

type Answers = Sender<Result<Arc<OpenedBlock>, FetchError>>;

/// Never answers until it is told to.
struct Silent {
    inner: Arc<MemorySource>,
    is_mute: AtomicBool,
    waiting: Mutex<Vec<Answers>>,
    fetches: AtomicUsize,
}

impl ChunkSource for Silent {
    fn fetch(&self, wanted: Vec<ChunkId>) -> Result<Fetched, FetchError> {
        self.fetches.fetch_add(1, Ordering::SeqCst);
        if !self.is_mute.load(Ordering::SeqCst) {
            return self.inner.fetch(wanted);
        }
        let (sender, receiver) = bounded(wanted.len() + 1);
        self.waiting.lock().push(sender);
        Ok(receiver)
    }
}

#[test]
fn a_silent_server_makes_errors_not_waiting_and_is_used_again_when_it_speaks() {
    let mut repo = MemoryRepository::new();
    let id = repo.chunk(ChunkKind::Data, b"content", &[]);
    let source = Arc::new(Silent {
        inner: repo.finish(),
        is_mute: AtomicBool::new(true),
        waiting: Mutex::default(),
        fetches: AtomicUsize::new(0),
    });
    let repository = Arc::new(Memory { source: Arc::<Silent>::clone(&source), root: id, lost: AtomicUsize::new(0) });
    let patience = Arc::new(Patience::new(Arc::<Memory>::clone(&repository), Duration::from_millis(100)));
    let chunks = Arc::new(Chunks::new(patience, 1 << 20));
    let failures = thread::scope(|scope| {
        let readers: Vec<_> = (0..20)
            .map(|n| {
                let chunks = Arc::clone(&chunks);
                // Different chunks, so that they do not wait for one another.
                let wanted = if n == 0 { id } else { ChunkId([n; 32]) };
                scope.spawn(move || chunks.get(SNAPSHOT, &[wanted])[0].is_err())
            })
            .collect();
        readers.into_iter().filter_map(|reader| reader.join().ok()).filter(|failed| *failed).count()
    });
    assert_eq!(failures, 20);
    assert!(source.fetches.load(Ordering::SeqCst) <= 6, "no more are under way than the server takes");
    assert!(repository.lost.load(Ordering::SeqCst) > 0);
    source.is_mute.store(false, Ordering::SeqCst);
    // What was given up is settled at last.
    source.waiting.lock().clear();
    assert_eq!(chunks.get(SNAPSHOT, &[id])[0].as_deref(), Ok(&b"content"[..]));
}

#[test]
fn content_of_every_kind_has_its_attributes() {
    let mut repo = MemoryRepository::new();
    let mut dir = DirMaker::default();
    dir.inline(b"a", b"hi\n").mode = 0o4711;
    dir.symlink(b"b", b"../target");
    dir.add(b"c", EntryNode::CharDevice { major: 1, minor: 3 });
    let root = dir.finish(&mut repo);
    let (service, root) = service(repo.finish(), root, 1 << 20);
    let attributes = |name: &[u8]| {
        let (number, node) = service.lookup(root, name).unwrap();
        node.attributes(number, service.mounted)
    };
    let a = attributes(b"a");
    assert_eq!((a.size, a.blocks, a.perm, a.nlink, a.kind), (3, 1, 0o4711, 1, fuser::FileType::RegularFile));
    assert_eq!((attributes(b"b").size, attributes(b"b").kind), (9, fuser::FileType::Symlink));
    assert_eq!((attributes(b"c").rdev, attributes(b"c").kind), (0x103, fuser::FileType::CharDevice));
    let (_, node) = service.lookup(root, b"a").unwrap();
    let Node::Item { item, .. } = node else { panic!("no item") };
    assert!(matches!(item.body, Body::File { .. }));
    assert!(service.lookup(root, b"none").is_err());
}
