//! Blocks, manifests, directories and failing disks for the engine's tests.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use bytes::Bytes;
use parking_lot::Mutex;
use strandline_messages::format::block::{BlockHeaderV1, Codec, encode_row};
use strandline_messages::format::chunk::Reference;
use strandline_messages::format::keys::{Capability, WriterCertificateV1};
use strandline_messages::format::manifest::{ManifestV1, Totals};
use strandline_messages::format::repository::{ChunkingV1, RepositoryV1};
use strandline_messages::{AgentId, ChunkId, ChunkKind, DomainId, RepositoryId, SessionId, TenantName};

use super::{Engine, EngineOptions, Lease, Opened, Repository, Sizes};
use crate::storage::files::{FileOps, SystemFiles};

pub(crate) const REPOSITORY: RepositoryId = RepositoryId([0x77; 16]);
pub(crate) const AGENT: AgentId = AgentId([0xa1; 16]);

pub(crate) fn id(i: u64) -> ChunkId {
    ChunkId(*blake3::hash(&i.to_le_bytes()).as_bytes())
}

/// A block with the given table; bodies differ from block to block.
fn block(repository: RepositoryId, kind: ChunkKind, rows: &[(ChunkId, Vec<Reference>)], body_bytes: usize) -> Vec<u8> {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let mut table = Vec::new();
    for (id, references) in rows {
        encode_row(kind, id, references, &mut table);
    }
    let header = BlockHeaderV1 {
        kind,
        codec: Codec::Zstd,
        wrap_algorithm: 1,
        wrapped_key_bytes: 5,
        chunks: u32::try_from(rows.len()).unwrap(),
        table_bytes: u32::try_from(table.len()).unwrap(),
        body_bytes: u32::try_from(body_bytes).unwrap(),
        repository,
        salt: *blake3::hash(&NEXT.fetch_add(1, Ordering::Relaxed).to_le_bytes()).as_bytes(),
        commitment: [5; 32],
    };
    let mut bytes = Vec::new();
    header.encode(&mut bytes);
    bytes.extend_from_slice(&[6; 5]);
    bytes.extend_from_slice(&table);
    bytes.resize(bytes.len() + body_bytes, 7);
    let digest = blake3::hash(&bytes);
    bytes.extend_from_slice(digest.as_bytes());
    bytes
}

pub(crate) fn data_block(repository: RepositoryId, ids: &[ChunkId]) -> Vec<u8> {
    let rows: Vec<_> = ids.iter().map(|&id| (id, Vec::new())).collect();
    block(repository, ChunkKind::Data, &rows, 64)
}

pub(crate) fn big_data_block(ids: &[ChunkId], body_bytes: usize) -> Vec<u8> {
    let rows: Vec<_> = ids.iter().map(|&id| (id, Vec::new())).collect();
    block(REPOSITORY, ChunkKind::Data, &rows, body_bytes)
}

/// A tree block: per tree its id, its data references, its tree references.
pub(crate) fn tree_block(trees: &[(ChunkId, &[ChunkId], &[ChunkId])]) -> Vec<u8> {
    let row = |(id, data, trees): &(ChunkId, &[ChunkId], &[ChunkId])| {
        let references = data.iter().copied().map(Reference::data).chain(trees.iter().copied().map(Reference::tree));
        (*id, references.collect())
    };
    block(REPOSITORY, ChunkKind::Tree, &trees.iter().map(row).collect::<Vec<_>>(), 64)
}

pub(crate) fn root_key() -> Ed25519KeyPair {
    Ed25519KeyPair::from_seed_unchecked(&[1; 32]).unwrap()
}

fn public(key: &Ed25519KeyPair) -> [u8; 32] {
    key.public_key().as_ref().try_into().unwrap()
}

pub(crate) fn repository_file(name: &str) -> RepositoryV1 {
    RepositoryV1 {
        id: REPOSITORY,
        name: name.parse().unwrap(),
        created_ns: 1,
        root_public: public(&root_key()),
        wrap_algorithm: 1,
        kem_public: [3; 32],
        chunking: ChunkingV1 { minimum: 16 << 10, average: 64 << 10, maximum: 256 << 10, block_plaintext: 1 << 20 },
    }
}

/// A writer whose key is made from `seed`.
pub(crate) struct Writer {
    key: Ed25519KeyPair,
    pub certificate: WriterCertificateV1,
}

impl Writer {
    pub fn new(seed: u8, capability: Capability) -> Self {
        let key = Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap();
        let part = WriterCertificateV1::signed_part(&REPOSITORY, capability, &public(&key));
        let signature = root_key().sign(&part).as_ref().try_into().unwrap();
        let certificate = WriterCertificateV1 { capability, public_key: public(&key), signature };
        Self { key, certificate }
    }

    pub fn full() -> Self {
        Self::new(2, Capability::Full)
    }

    pub fn domain(&self) -> DomainId {
        self.certificate.domain()
    }

    pub fn manifest(&self, root: ChunkId, job: &str) -> Bytes {
        self.sign(ManifestV1 {
            repository: REPOSITORY,
            root,
            errors: None,
            parent: None,
            started_ns: 1,
            finished_ns: 2,
            job: job.to_owned(),
            host: "host".to_owned(),
            tags: Vec::new(),
            totals: Totals::default(),
            writer: self.certificate.clone(),
            wrap_algorithm: 1,
            wrapped_key: vec![7; 80],
            salt: [8; 32],
            commitment: [9; 32],
            sealed_details: vec![10; 30],
            signature: [0; 64],
        })
    }

    pub fn sign(&self, mut manifest: ManifestV1) -> Bytes {
        manifest.signature = self.key.sign(&manifest.encode_signed_part()).as_ref().try_into().unwrap();
        manifest.encode().into()
    }
}

pub(crate) fn tenant() -> TenantName {
    "home".parse().unwrap()
}

pub(crate) async fn open(dir: &Path) -> Engine {
    Engine::open(dir, EngineOptions::default()).await.unwrap()
}

pub(crate) async fn open_small(dir: &Path, ops: Arc<dyn FileOps>) -> Engine {
    let sizes = Sizes { group_bytes_max: 1000, pack_bytes_max: 4096, index_flush_entries: 8 };
    Engine::open_with(dir, EngineOptions::default(), sizes, ops).await.unwrap()
}

/// The one repository of a directory, made if need be.
pub(crate) async fn repository(engine: &Engine) -> Arc<Repository> {
    let file = repository_file("main");
    match engine.repository(&tenant(), &file.name).await {
        Ok(repository) => repository,
        Err(_) => engine.create_repository(&tenant(), file, Vec::new()).await.unwrap(),
    }
}

pub(crate) async fn session(repository: &Repository, n: u8, domain: DomainId) -> Lease {
    match repository.open_session(SessionId([n; 16]), AGENT, domain, None).await.unwrap() {
        Opened::Fresh(lease) => lease,
        Opened::AlreadyCommitted { .. } => panic!("nothing to resume was named"),
    }
}

/// What a recording disk saw, in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Create,
    Write,
    Sync,
    SyncDirectory,
    Confirmed,
}

/// The system's files, recorded, and failing on demand.
#[derive(Debug, Default)]
pub(crate) struct TestDisk {
    pub events: Mutex<Vec<Event>>,
    /// Errors for the coming calls of `sync`, last first; `None` lets one succeed.
    pub sync_errors: Mutex<Vec<Option<io::ErrorKind>>>,
    pub write_errors: Mutex<Vec<Option<io::ErrorKind>>>,
    /// Which files were synced after a sync of them had failed.
    pub synced_after_failure: Mutex<Vec<std::path::PathBuf>>,
    pub failed: Mutex<Vec<std::path::PathBuf>>,
    /// No sync begins as long as this is set.
    pub holds_syncs: AtomicBool,
}

impl FileOps for TestDisk {
    fn create(&self, path: &Path) -> io::Result<File> {
        self.events.lock().push(Event::Create);
        SystemFiles.create(path)
    }

    fn write_at(&self, file: &File, path: &Path, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.events.lock().push(Event::Write);
        if let Some(Some(kind)) = self.write_errors.lock().pop() {
            return Err(kind.into());
        }
        SystemFiles.write_at(file, path, bytes, offset)
    }

    fn sync(&self, file: &File, path: &Path) -> io::Result<()> {
        while self.holds_syncs.load(Ordering::SeqCst) {
            std::thread::sleep(Duration::from_millis(1));
        }
        if self.failed.lock().iter().any(|failed| failed == path) {
            self.synced_after_failure.lock().push(path.to_path_buf());
        }
        if let Some(Some(kind)) = self.sync_errors.lock().pop() {
            self.failed.lock().push(path.to_path_buf());
            return Err(kind.into());
        }
        SystemFiles.sync(file, path)?;
        self.events.lock().push(Event::Sync);
        Ok(())
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        SystemFiles.sync_directory(path)?;
        self.events.lock().push(Event::SyncDirectory);
        Ok(())
    }
}
