//! For tests: a repository in memory, made of really sealed blocks, and a maker of directories.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use crossbeam_channel::bounded;
use parking_lot::Mutex;
use strandline_messages::format::block::ChunkRow;
use strandline_messages::format::chunk::Reference;
use strandline_messages::format::tree::{
    Content, Entry, EntryNode, IndexChild, ListKind, NodeBody, Owner, Piece, Timestamp, TreeNodeV1,
};
use strandline_messages::{ChunkId, ChunkKind, RepositoryId};

use super::{ChunkSource, FetchError, Fetched, Received};
use crate::keys::Keyset;
use crate::seal::{Body, Opener, Sealer};

/// A writable repository.
pub(crate) struct MemoryRepository {
    pub(crate) keyset: Keyset,
    sealer: Sealer,
    chunks_per_block: usize,
    pending: HashMap<ChunkKind, Vec<(ChunkRow, Vec<u8>)>>,
    blocks: Vec<Vec<u8>>,
    places: HashMap<ChunkId, usize>,
}

/// A readable one.
pub(crate) struct MemorySource {
    opener: Opener,
    pub(crate) blocks: Mutex<Vec<Vec<u8>>>,
    places: Mutex<HashMap<ChunkId, usize>>,
    /// How many fetches there were.
    pub(crate) fetches: AtomicUsize,
    received: Mutex<Received>,
    /// After how many fetches the connection is lost.
    pub(crate) lost_after: AtomicUsize,
}

impl MemoryRepository {
    pub(crate) fn new() -> Self {
        let keyset = Keyset::create(RepositoryId([7; 16])).unwrap();
        Self {
            sealer: Sealer::new(&keyset, 1).unwrap(),
            keyset,
            chunks_per_block: 4,
            pending: HashMap::new(),
            blocks: Vec::new(),
            places: HashMap::new(),
        }
    }

    /// Every chunk in a block of its own, so that each can be had or missed alone.
    pub(crate) fn one_chunk_per_block() -> Self {
        Self { chunks_per_block: 1, ..Self::new() }
    }

    /// Stores a chunk under its own id.
    pub(crate) fn chunk(&mut self, kind: ChunkKind, bytes: &[u8], references: &[Reference]) -> ChunkId {
        let id = self.keyset.chunk_id(kind, bytes, references);
        self.chunk_as(id, kind, bytes, references);
        id
    }

    /// Stores a chunk under any id.
    pub(crate) fn chunk_as(&mut self, id: ChunkId, kind: ChunkKind, bytes: &[u8], references: &[Reference]) {
        if self.places.contains_key(&id) {
            return;
        }
        self.places.insert(id, usize::MAX);
        let row = ChunkRow { id, references: references.to_vec() };
        let pending = self.pending.entry(kind).or_default();
        pending.push((row, bytes.to_vec()));
        if pending.len() >= self.chunks_per_block {
            self.seal(kind);
        }
    }

    fn seal(&mut self, kind: ChunkKind) {
        let pending = self.pending.remove(&kind).unwrap_or_default();
        if pending.is_empty() {
            return;
        }
        let (rows, chunks): (Vec<_>, Vec<_>) = pending.into_iter().unzip();
        let mut body = Body::default();
        for chunk in &chunks {
            body.push(chunk);
        }
        let block = self.sealer.seal(kind, &rows, &mut body).unwrap().bytes.to_vec();
        for row in rows {
            self.places.insert(row.id, self.blocks.len());
        }
        self.blocks.push(block);
    }

    pub(crate) fn node(&mut self, kind: ListKind, body: NodeBody, references: &[Reference]) -> ChunkId {
        self.chunk(ChunkKind::Tree, &TreeNodeV1 { kind, body }.encode(), references)
    }

    /// An index node over lower nodes: id, weight, first name.
    pub(crate) fn index(&mut self, kind: ListKind, level: u8, lower: &[(ChunkId, u64, &[u8])]) -> ChunkId {
        let references: Vec<_> = lower.iter().map(|(id, ..)| Reference::tree(*id)).collect();
        let children = lower.iter().zip(0..).map(|((_, weight, name), position)| IndexChild {
            position,
            weight: *weight,
            first_name: name.to_vec(),
        });
        let body = NodeBody::Index { level, children: children.collect() };
        self.node(kind, body, &references)
    }

    pub(crate) fn finish(mut self) -> Arc<MemorySource> {
        self.seal(ChunkKind::Data);
        self.seal(ChunkKind::Tree);
        Arc::new(MemorySource {
            opener: Opener::new(&self.keyset),
            blocks: Mutex::new(self.blocks),
            places: Mutex::new(self.places),
            fetches: AtomicUsize::new(0),
            received: Mutex::default(),
            lost_after: AtomicUsize::new(usize::MAX),
        })
    }
}

impl ChunkSource for MemorySource {
    fn fetch(&self, wanted: Vec<ChunkId>) -> Result<Fetched, FetchError> {
        if self.fetches.fetch_add(1, Ordering::SeqCst) >= self.lost_after.load(Ordering::SeqCst) {
            return Err(FetchError::Lost { reason: "cable pulled".into() });
        }
        let places = self.places.lock();
        let missing: Vec<_> = wanted.iter().filter(|id| !places.contains_key(id)).copied().collect();
        let numbers: BTreeSet<usize> = wanted.iter().filter_map(|id| places.get(id).copied()).collect();
        let (sender, receiver) = bounded(2);
        let blocks = self.blocks.lock();
        let blocks: Vec<_> = numbers.iter().map(|number| (*number, blocks[*number].clone())).collect();
        {
            let mut received = self.received.lock();
            received.blocks += blocks.len() as u64;
            received.bytes += blocks.iter().map(|(_, block)| block.len() as u64).sum::<u64>();
        }
        let opener = self.opener.clone();
        std::thread::spawn(move || {
            if !missing.is_empty() {
                let _ = sender.send(Err(FetchError::Missing { chunks: missing }));
            }
            for (number, block) in blocks {
                let answer = opener.open(&block).map(Arc::new).map_err(|reason| FetchError::Damaged {
                    block: format!("number {number}"),
                    chunks: Vec::new(),
                    reason,
                });
                if sender.send(answer).is_err() {
                    return;
                }
            }
        });
        Ok(receiver)
    }

    fn received(&self) -> Received {
        *self.received.lock()
    }
}

/// Makes one directory node.
#[derive(Default)]
pub(crate) struct DirMaker {
    pub(crate) entries: Vec<Entry>,
    pub(crate) references: Vec<Reference>,
    owners: Vec<Owner>,
}

impl DirMaker {
    pub(crate) fn position(&mut self, reference: Reference) -> u32 {
        self.references.push(reference);
        u32::try_from(self.references.len() - 1).unwrap()
    }

    pub(crate) fn add(&mut self, name: &[u8], node: EntryNode) -> &mut Entry {
        let inode = self.entries.len() as u64 + 1000;
        self.entries.push(Entry {
            name: name.to_vec(),
            mode: if matches!(node, EntryNode::Directory { .. }) { 0o755 } else { 0o644 },
            owner: 0,
            mtime: Timestamp { seconds: 1_600_000_000, nanos: 123_456_789 },
            ctime: Timestamp::default(),
            inode,
            device: 1,
            links: 1,
            xattrs: Vec::new(),
            node,
        });
        self.entries.last_mut().unwrap()
    }

    /// Says who owns an entry.
    pub(crate) fn owner(&mut self, uid: u32, gid: u32, user: &str, group: &str) -> u32 {
        self.owner_default();
        let owner = Owner { uid, gid, user: user.into(), group: group.into() };
        self.owners.push(owner);
        u32::try_from(self.owners.len() - 1).unwrap()
    }

    fn owner_default(&mut self) {
        if self.owners.is_empty() {
            let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
            self.owners.push(Owner { uid, gid, ..Owner::default() });
        }
    }

    /// A file cut into pieces of `piece` bytes.
    pub(crate) fn file(&mut self, repo: &mut MemoryRepository, name: &[u8], bytes: &[u8], piece: usize) -> &mut Entry {
        let pieces: Vec<_> = bytes
            .chunks(piece)
            .map(|bytes| {
                let id = repo.chunk(ChunkKind::Data, bytes, &[]);
                Piece { position: self.position(Reference::data(id)), bytes: u32::try_from(bytes.len()).unwrap() }
            })
            .collect();
        let node = EntryNode::File { size: bytes.len() as u64, content: Content::Pieces(pieces), holes: Vec::new() };
        self.add(name, node)
    }

    pub(crate) fn inline(&mut self, name: &[u8], bytes: &[u8]) -> &mut Entry {
        let content = Content::Inline(bytes.to_vec());
        self.add(name, EntryNode::File { size: bytes.len() as u64, content, holes: Vec::new() })
    }

    pub(crate) fn directory(&mut self, name: &[u8], top: ChunkId) -> &mut Entry {
        let position = self.position(Reference::tree(top));
        self.add(name, EntryNode::Directory { position })
    }

    pub(crate) fn symlink(&mut self, name: &[u8], target: &[u8]) -> &mut Entry {
        self.add(name, EntryNode::Symlink { target: target.to_vec() })
    }

    pub(crate) fn finish(mut self, repo: &mut MemoryRepository) -> ChunkId {
        self.owner_default();
        self.entries.sort_by(|a, b| a.name.cmp(&b.name));
        let body = NodeBody::Directory { owners: self.owners, entries: self.entries };
        repo.node(ListKind::Directory, body, &self.references)
    }
}
