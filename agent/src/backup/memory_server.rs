//! For tests: a server that keeps chunks in memory, and a rig that backs up a temporary directory and reads it back.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use bytes::Bytes;
use parking_lot::Mutex;
use strandline_messages::format::block::{ChunkRow, Codec, TableRows, encode_row};
use strandline_messages::format::chunk::{Reference, chunk_id};
use strandline_messages::format::cursor::{Decoder, Encoder};
use strandline_messages::format::repository::ChunkingV1;
use strandline_messages::format::tree::{Content, Entry, EntryNode, NodeBody, Owner, Piece, SourceError, TreeNodeV1};
use strandline_messages::ids::{ChunkId, ChunkKind, DomainId, RepositoryId};

use super::ports::{BlockSealer, BlockSink, ChunkOracle, Permit, Ports, QueryTicket};
use super::progress::{Progress, ProgressNow};
use super::{BackupError, BackupPlan, CacheTrust, ChunkKeys, PassOutcome, run_pass};
use crate::cache::{CacheIdentity, CacheReader, file_system_clock};
use crate::seal::{Body, SealedBlock};

pub const KEY: [u8; 32] = [9; 32];

type Hook = Box<dyn FnOnce() + Send>;

pub struct Chunk {
    pub kind: ChunkKind,
    pub plaintext: Vec<u8>,
    pub references: Vec<Reference>,
}

#[derive(Default)]
pub struct Store {
    pub chunks: HashMap<ChunkId, Chunk>,
    /// What the server told to be known in this session: only what it had when the session began.
    known: HashSet<ChunkId>,
    sent: HashSet<ChunkId>,
    pub queried: u64,
    pub bytes_reserved: usize,
    pub fail_after_blocks: Option<usize>,
    pub on_first_query: Option<Hook>,
}

#[derive(Clone, Default)]
pub struct MemoryServer(pub Arc<Mutex<Store>>);

impl MemoryServer {
    fn begin(&self) {
        let mut store = self.0.lock();
        store.known = store.chunks.keys().copied().collect();
        store.sent.clear();
    }
}

struct Ticket(Vec<bool>);

impl QueryTicket for Ticket {
    fn ready(&self) -> bool {
        false
    }
    fn wait(self: Box<Self>) -> Result<Vec<bool>, BackupError> {
        Ok(self.0)
    }
}

impl ChunkOracle for MemoryServer {
    fn query(&mut self, ids: Vec<ChunkId>) -> Result<Box<dyn QueryTicket>, BackupError> {
        let hook = self.0.lock().on_first_query.take();
        if let Some(hook) = hook {
            hook();
        }
        let mut store = self.0.lock();
        store.queried += ids.len() as u64;
        assert!(!ids.is_empty() && ids.len() <= strandline_messages::limits::QUERY_IDS_MAX);
        Ok(Box::new(Ticket(ids.iter().map(|id| store.known.contains(id)).collect())))
    }
}

struct PlainSealer;

impl BlockSealer for PlainSealer {
    fn seal(&mut self, kind: ChunkKind, rows: &[ChunkRow], body: &mut Body) -> Result<SealedBlock, BackupError> {
        let mut out = Vec::new();
        let mut table = Vec::new();
        for row in rows {
            encode_row(kind, &row.id, &row.references, &mut table);
        }
        assert!(table.len() <= strandline_messages::limits::BLOCK_TABLE_BYTES_MAX);
        assert_eq!(rows.len(), body.lengths().len());
        out.put_u8(kind as u8);
        out.put_u32(u32::try_from(rows.len()).unwrap());
        out.put_string(&table);
        out.extend_from_slice(body.input());
        Ok(SealedBlock { bytes: out.into(), codec: Codec::Stored })
    }
}

impl BlockSink for MemoryServer {
    fn reserve(&self, bytes: usize) -> Result<Permit, BackupError> {
        self.0.lock().bytes_reserved += bytes;
        Ok(Permit(Box::new(bytes)))
    }

    fn send(&self, permit: Permit, block: Bytes) -> Result<(), BackupError> {
        let mut store = self.0.lock();
        let reserved = *permit.0.downcast::<usize>().unwrap();
        assert!(block.len() <= reserved, "{} of {reserved}", block.len());
        store.bytes_reserved -= reserved;
        match &mut store.fail_after_blocks {
            Some(0) => return Err(BackupError::Port("the disk is full".into())),
            Some(left) => *left -= 1,
            None => {}
        }
        let mut decoder = Decoder::new(&block, "plain block");
        let kind = ChunkKind::from_byte(decoder.u8().unwrap()).unwrap();
        let count = decoder.u32().unwrap();
        let table = decoder.string("table", 1 << 20).unwrap();
        let lengths: Vec<u32> = (0..count).map(|_| decoder.u32().unwrap()).collect();
        for (row, length) in TableRows::new(kind, count, table).zip(lengths) {
            let ChunkRow { id, references } = row.unwrap();
            let plaintext = decoder.bytes(length as usize).unwrap().to_vec();
            assert_eq!(chunk_id(&KEY, kind, &plaintext, &references), id);
            assert!(!store.known.contains(&id), "a known chunk was sent");
            assert!(store.sent.insert(id), "a chunk was sent twice");
            for child in references.iter().filter(|child| child.kind == ChunkKind::Tree) {
                assert!(store.chunks.contains_key(&child.id), "a parent was sent before its child");
            }
            store.chunks.insert(id, Chunk { kind, plaintext, references });
        }
        decoder.finish().unwrap();
        Ok(())
    }
}

/// One entry read back.
#[derive(Debug, PartialEq)]
pub struct Seen {
    pub entry: Entry,
    pub owner: Owner,
    pub bytes: Option<Vec<u8>>,
}

impl Store {
    fn node(&self, id: ChunkId) -> (TreeNodeV1, &[Reference]) {
        let chunk = &self.chunks[&id];
        assert_eq!(chunk.kind, ChunkKind::Tree);
        (TreeNodeV1::decode(&chunk.plaintext, chunk.references.len()).unwrap(), &chunk.references)
    }

    fn leaves(&self, id: ChunkId, found: &mut Vec<(TreeNodeV1, Vec<Reference>)>) {
        let (node, references) = self.node(id);
        if let NodeBody::Index { children, .. } = &node.body {
            for child in children {
                self.leaves(references[child.position as usize].id, found);
            }
        } else {
            found.push((node, references.to_vec()));
        }
    }

    fn pieces(&self, pieces: &[Piece], references: &[Reference], out: &mut Vec<u8>) {
        for piece in pieces {
            let chunk = &self.chunks[&references[piece.position as usize].id];
            assert_eq!((chunk.kind, chunk.plaintext.len()), (ChunkKind::Data, piece.bytes as usize));
            out.extend_from_slice(&chunk.plaintext);
        }
    }

    fn file(&self, entry: &Entry, references: &[Reference]) -> Option<Vec<u8>> {
        let EntryNode::File { size, content, holes } = &entry.node else { return None };
        let mut dense = Vec::new();
        match content {
            Content::Inline(bytes) => dense.extend_from_slice(bytes),
            Content::Pieces(pieces) => self.pieces(pieces, references, &mut dense),
            Content::List { position } => {
                let mut leaves = Vec::new();
                self.leaves(references[*position as usize].id, &mut leaves);
                for (node, references) in leaves {
                    let NodeBody::Content(pieces) = node.body else { panic!("no content list") };
                    self.pieces(&pieces, &references, &mut dense);
                }
            }
        }
        let mut bytes = Vec::new();
        let mut rest = dense.as_slice();
        for hole in holes {
            let (data, tail) = rest.split_at(usize::try_from(hole.offset).unwrap() - bytes.len());
            bytes.extend_from_slice(data);
            bytes.resize(bytes.len() + usize::try_from(hole.bytes).unwrap(), 0);
            rest = tail;
        }
        bytes.extend_from_slice(rest);
        assert_eq!(bytes.len() as u64, *size);
        Some(bytes)
    }

    /// Every entry below `root` by its full path.
    pub fn read_back(&self, root: ChunkId) -> BTreeMap<Vec<u8>, Seen> {
        let mut seen = BTreeMap::new();
        let mut todo = vec![(Vec::new(), root)];
        while let Some((path, id)) = todo.pop() {
            let mut leaves = Vec::new();
            self.leaves(id, &mut leaves);
            for (node, references) in leaves {
                let NodeBody::Directory { owners, entries } = node.body else { panic!("no directory") };
                for entry in entries {
                    let mut path: Vec<u8> = path.clone();
                    path.push(b'/');
                    path.extend_from_slice(&entry.name);
                    if let EntryNode::Directory { position } = entry.node {
                        todo.push((path.clone(), references[position as usize].id));
                    }
                    let bytes = self.file(&entry, &references);
                    let owner = owners[entry.owner as usize].clone();
                    assert!(seen.insert(path, Seen { entry, owner, bytes }).is_none());
                }
            }
        }
        seen
    }

    pub fn errors(&self, root: Option<ChunkId>) -> Vec<SourceError> {
        let mut leaves = Vec::new();
        if let Some(root) = root {
            self.leaves(root, &mut leaves);
        }
        let errors = |(node, _): (TreeNodeV1, _)| match node.body {
            NodeBody::Errors(errors) => errors,
            _ => panic!("no error list"),
        };
        leaves.into_iter().flat_map(errors).collect()
    }
}

pub struct Rig {
    pub source: tempfile::TempDir,
    pub state: tempfile::TempDir,
    pub server: MemoryServer,
    pub plan: BackupPlan,
    pub chunking: ChunkingV1,
    /// How far ahead of the file systems' clock a run believes to start: 10 s make everything written before settled.
    pub clock_ahead_seconds: Option<i64>,
    pub cancel: Arc<AtomicBool>,
}

pub struct Run {
    pub outcome: PassOutcome,
    pub now: ProgressNow,
    pub seen: BTreeMap<Vec<u8>, Seen>,
    pub errors: Vec<SourceError>,
}

impl Rig {
    pub fn new() -> Self {
        let (source, state) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let mut plan = BackupPlan::new(vec![source.path().to_owned()], state.path().to_owned());
        plan.flush_sources = false;
        Self {
            source,
            state,
            server: MemoryServer::default(),
            plan,
            chunking: crate::chunk::default_chunking(),
            clock_ahead_seconds: Some(10),
            cancel: Arc::default(),
        }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.source.path().join(name)
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, bytes).unwrap();
    }

    pub fn cache_path(&self) -> PathBuf {
        self.state.path().join("files.cache")
    }

    pub fn run(&self, trust: CacheTrust) -> Run {
        self.try_run(trust).unwrap()
    }

    pub fn try_run(&self, trust: CacheTrust) -> Result<Run, BackupError> {
        let keys = ChunkKeys { id_key: KEY, chunker_secret: [5; 32] };
        let mut plan = self.plan.clone();
        let paths = vec![self.source.path().as_os_str().as_encoded_bytes().to_vec()];
        let identity = CacheIdentity::new(
            &RepositoryId([1; 16]),
            DomainId::FULL,
            &KEY,
            &keys.chunker_secret,
            "host",
            &paths,
            &self.chunking,
        );
        plan.cache = Some((self.cache_path(), identity));
        plan.started = self.clock_ahead_seconds.map(|ahead| {
            let mut clock = file_system_clock(self.state.path()).unwrap();
            clock.seconds += ahead;
            clock
        });
        let old = CacheReader::open(&self.cache_path(), identity);
        self.server.begin();
        let progress = Progress::default();
        let sealers = || Ok(Box::new(PlainSealer) as Box<dyn BlockSealer>);
        let ports = Ports { oracle: Box::new(self.server.clone()), sink: &self.server, sealers: &sealers };
        let mut outcome = run_pass(&plan, &keys, &self.chunking, old, trust, ports, &progress, &self.cancel)?;
        let store = self.server.0.lock();
        assert_eq!(store.bytes_reserved, 0);
        let seen = store.read_back(outcome.root);
        let errors = store.errors(outcome.errors_root);
        assert_eq!(errors.len() as u64, outcome.totals.errors);
        outcome.new_cache.take().unwrap().publish().unwrap();
        Ok(Run { outcome, now: progress.now(), seen, errors })
    }
}

impl Run {
    /// The entry of a file in the source.
    pub fn at(&self, path: &Path) -> &Seen {
        self.seen.get(path.as_os_str().as_encoded_bytes()).unwrap_or_else(|| panic!("{} is missing", path.display()))
    }

    pub fn has(&self, path: &Path) -> bool {
        self.seen.contains_key(path.as_os_str().as_encoded_bytes())
    }

    /// Compares every entry with the source, and that there are no others.
    pub fn assert_equals(&self, source: &Path) {
        let mut count = 1;
        let mut todo = vec![source.to_owned()];
        while let Some(path) = todo.pop() {
            assert_same(self.at(&path), &path);
            if path.symlink_metadata().unwrap().is_dir() {
                for entry in path.read_dir().unwrap() {
                    count += 1;
                    todo.push(entry.unwrap().path());
                }
            }
        }
        let prefix = source.as_os_str().as_encoded_bytes();
        assert_eq!(self.seen.keys().filter(|path| path.starts_with(prefix)).count(), count);
    }
}

fn assert_same(seen: &Seen, path: &Path) {
    use std::os::unix::fs::{FileTypeExt, MetadataExt};
    let meta = path.symlink_metadata().unwrap();
    let entry = &seen.entry;
    let what = path.display();
    assert_eq!(u32::from(entry.mode), meta.mode() & 0o7777, "{what}");
    assert_eq!((seen.owner.uid, seen.owner.gid), (meta.uid(), meta.gid()), "{what}");
    assert_eq!((entry.mtime.seconds, i64::from(entry.mtime.nanos)), (meta.mtime(), meta.mtime_nsec()), "{what}");
    assert_eq!((entry.ctime.seconds, i64::from(entry.ctime.nanos)), (meta.ctime(), meta.ctime_nsec()), "{what}");
    assert_eq!((entry.inode, entry.device, u64::from(entry.links)), (meta.ino(), meta.dev(), meta.nlink()), "{what}");
    let mut xattrs: Vec<(Vec<u8>, Vec<u8>)> = xattr::list(path)
        .unwrap()
        .map(|name| (name.as_encoded_bytes().to_vec(), xattr::get(path, &name).unwrap().unwrap()))
        .collect();
    xattrs.sort();
    let got: Vec<_> = entry.xattrs.iter().map(|xattr| (xattr.name.clone(), xattr.value.clone())).collect();
    assert_eq!(got, xattrs, "{what}");
    let kind = meta.file_type();
    match &entry.node {
        EntryNode::File { .. } => {
            assert!(kind.is_file());
            assert!(seen.bytes.as_deref() == Some(std::fs::read(path).unwrap().as_slice()), "{what}");
        }
        EntryNode::Directory { .. } => assert!(kind.is_dir()),
        EntryNode::Symlink { target } => {
            assert_eq!(std::fs::read_link(path).unwrap().as_os_str().as_encoded_bytes(), target);
        }
        EntryNode::Fifo => assert!(kind.is_fifo()),
        EntryNode::Socket => assert!(kind.is_socket()),
        EntryNode::CharDevice { major, minor } => {
            assert!(kind.is_char_device());
            assert_eq!(rustix::fs::makedev(*major, *minor), meta.rdev());
        }
        EntryNode::BlockDevice { major, minor } => {
            assert!(kind.is_block_device());
            assert_eq!(rustix::fs::makedev(*major, *minor), meta.rdev());
        }
    }
}

/// Bytes that do not compress and do not repeat.
pub fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    blake3::Hasher::new().update(&seed.to_le_bytes()).finalize_xof().fill(&mut out);
    out
}
