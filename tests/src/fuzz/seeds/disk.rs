//! Files and parts of files: those of the fixture, and small ones made by the encoders.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result};
use strandline_agent::cache::{CacheIdentity, CacheWriter, CachedContentRef, FilePiece, Identity as FileIdentity};
use strandline_agent::identity::EnrolmentKey;
use strandline_agent::scan::meta::Meta;
use strandline_messages::format::block::{BlockHeaderV1, Codec, encode_row};
use strandline_messages::format::chunk::Reference;
use strandline_messages::format::keys::KeySlotV1;
use strandline_messages::format::keys::{Capability, KeysetV1, SlotKind, WriterCertificateV1};
use strandline_messages::format::manifest::DetailsV1;
use strandline_messages::format::pack::{FooterEntry, PackFooterV1, PackHeaderV1};
use strandline_messages::format::pack_state::{RecordedState, StateHeaderV1, StateRecordV1};
use strandline_messages::format::tree::{Hole, Timestamp, Xattr};
use strandline_messages::identity::Role;
use strandline_messages::{AgentId, BlockDigest, ChunkId, ChunkKind, DomainId, Identity, RepositoryId};
use strandline_server::index::Copy;
use strandline_server::index::cache::PageCache;
use strandline_server::index::entry::Entry;
use strandline_server::index::manifest::IndexManifest;
use strandline_server::index::segment::{self, Segment};
use strandline_server::pki::{Authority, ProvenKey, SERVER_VALIDITY};
use strandline_server::storage::journal::Journal;
use strandline_server::tenancy::journal::{AgentIdText, Event};

use super::{Seed, named};

fn fixture() -> Result<PathBuf> {
    let storage = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/golden-v1/repository/storage/local");
    let repository = fs::read_dir(storage)?.next().context("an empty fixture")??;
    Ok(repository.path())
}

/// The files of a directory of the fixture whose names end like this, each as a seed.
fn files(directory: &str, ending: &str) -> Result<Vec<Seed>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(fixture()?.join(directory))? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.ends_with(ending) {
            found.push((format!("golden-{}", name.get(..8).unwrap_or(&name)), fs::read(entry.path())?));
        }
    }
    found.sort();
    Ok(found)
}

fn small_block(kind: ChunkKind) -> Result<Vec<u8>> {
    let mut table = Vec::new();
    for i in 0..3u8 {
        let references = vec![Reference::data(ChunkId([i; 32])); if kind == ChunkKind::Tree { i.into() } else { 0 }];
        encode_row(kind, &ChunkId([i + 100; 32]), &references, &mut table);
    }
    let header = BlockHeaderV1 {
        kind,
        codec: Codec::Zstd,
        wrap_algorithm: 1,
        wrapped_key_bytes: 4,
        chunks: 3,
        table_bytes: u32::try_from(table.len())?,
        body_bytes: 20,
        repository: RepositoryId([3; 16]),
        salt: [4; 32],
        commitment: [5; 32],
    };
    let mut block = Vec::new();
    header.encode(&mut block);
    block.extend_from_slice(&[6; 4]);
    block.extend_from_slice(&table);
    block.extend_from_slice(&[7; 20]);
    block.extend_from_slice(blake3::hash(&block).as_bytes());
    Ok(block)
}

pub(super) fn block() -> Result<Vec<Seed>> {
    Ok(named([("data", small_block(ChunkKind::Data)?), ("tree", small_block(ChunkKind::Tree)?)]))
}

pub(super) fn sealed() -> Result<Vec<Seed>> {
    let input = |lengths: &[u32], content: &[u8]| {
        [lengths.iter().flat_map(|length| length.to_le_bytes()).collect::<Vec<u8>>().as_slice(), content].concat()
    };
    let text = input(&[400], &b"compress".repeat(50));
    let zstd =
        |form: u8, bytes: &[u8]| -> Result<Vec<u8>> { Ok([&[form][..], &zstd::bulk::compress(bytes, 3)?].concat()) };
    let silent = zstd::stream::encode_all(&vec![0; 1 << 20][..], 1)?;
    let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1)?;
    Ok(named([
        ("stored", [&[0][..], &input(&[4], b"data")].concat()),
        ("empty", [&[4 * 2][..], &input(&[0, 0, 0], b"")].concat()),
        ("empty-tree", [&[2][..], &input(&[0], b"")].concat()),
        ("text", zstd(1, &text)?),
        ("two", zstd(5, &input(&[3, 5], b"onetwo..."))?),
        ("silent", [&[1][..], &silent].concat()),
        ("bomb", [&[1][..], bomb.get(..64).unwrap_or(&bomb)].concat()),
    ]))
}

pub(super) fn manifest() -> Result<Vec<Seed>> {
    files("snapshots", ".manifest")
}

pub(super) fn details() -> Vec<Seed> {
    let full = DetailsV1 {
        paths: vec![b"/home/\xff".to_vec(), b"/etc".to_vec()],
        excludes: vec!["*.o".into()],
        user: "root".into(),
        system: "Linux".into(),
        program: "strand".into(),
        command: "strand backup".into(),
    };
    named([("full", full.encode()), ("empty", DetailsV1::default().encode())])
}

pub(super) fn receipt() -> Result<Vec<Seed>> {
    files("snapshots", ".receipt")
}

pub(super) fn repository_file() -> Result<Vec<Seed>> {
    files("", "REPOSITORY")
}

pub(super) fn key_slot() -> Result<Vec<Seed>> {
    let small = KeySlotV1 {
        repository: RepositoryId([1; 16]),
        id: [2; 16],
        created_ns: 3,
        label: "laptop".into(),
        kind: SlotKind::Passphrase { memory_kib: 65_536, passes: 3, lanes: 1 },
        salt: [4; 32],
        sealed: vec![5; 30],
    };
    let key_file = KeySlotV1 { kind: SlotKind::KeyFile, label: String::new(), ..small.clone() };
    let mut seeds = files("keys", "")?;
    seeds.extend(named([("small", small.encode()), ("key-file", key_file.encode())]));
    Ok(seeds)
}

pub(super) fn keyset() -> Vec<Seed> {
    let full = KeysetV1 {
        repository: RepositoryId([1; 16]),
        id_key: [2; 32],
        chunker_secret: [3; 32],
        root_seed: Some([4; 32]),
        root_public: [5; 32],
        kem_private: Some([6; 32]),
        kem_public: [7; 32],
        writer_seed: [8; 32],
        writer: WriterCertificateV1 { capability: Capability::Full, public_key: [9; 32], signature: [10; 64] },
    };
    let bare = KeysetV1 { root_seed: None, kem_private: None, ..full.clone() };
    let mut certificate = Vec::new();
    full.writer.encode(&mut certificate);
    named([("full", full.encode()), ("bare", bare.encode()), ("certificate", certificate)])
}

pub(super) fn pack() -> Result<Vec<Seed>> {
    let repository = RepositoryId([3; 16]);
    let header = PackHeaderV1 { repository, domain: DomainId::FULL, number: 1, created_ns: 4 };
    let block = small_block(ChunkKind::Tree)?;
    let mut open = header.encode();
    let entry = FooterEntry {
        offset: u32::try_from(open.len())?,
        bytes: u32::try_from(block.len())?,
        kind: ChunkKind::Tree,
        chunks: 3,
        digest: BlockDigest::from_slice(block.get(block.len() - 32..).unwrap_or_default()).context("a short block")?,
    };
    open.extend_from_slice(&block);
    let footer = PackFooterV1 { blocks: vec![entry] }.encode();
    let whole = [open.as_slice(), &footer].concat();
    let state = StateHeaderV1 { number: 1, repository };
    let mut states = state.encode();
    for (offset, recorded) in [(96, RecordedState::Freed), (500, RecordedState::Withdrawn)] {
        states.extend(state.encode_record(&StateRecordV1 { offset, state: recorded, at_ns: 5 }));
    }
    let as_kind = |kind: u8, bytes: &[u8]| [&[kind][..], bytes].concat();
    let first = |seeds: Vec<Seed>| seeds.into_iter().next().map(|(_, bytes)| bytes).unwrap_or_default();
    let footer_alone = footer.get(..footer.len() - 44).unwrap_or_default();
    Ok(named([
        ("sealed", as_kind(0, &whole)),
        ("repaired", as_kind(0x80, &whole)),
        ("open", as_kind(0, &[open.as_slice(), b"garbage", &block].concat())),
        ("block", as_kind(1, &block)),
        ("tree", as_kind(2, &block)),
        ("manifest", as_kind(3, &first(manifest()?))),
        ("receipt", as_kind(4, &first(receipt()?))),
        ("slot", as_kind(5, &first(key_slot()?))),
        ("repository", as_kind(6, &first(repository_file()?))),
        ("state", as_kind(7, &states)),
        ("footer", as_kind(0, footer_alone)),
    ]))
}

pub(super) fn file_cache() -> Result<Vec<Seed>> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("file.cache");
    let mut writer = CacheWriter::create(&path, CacheIdentity([7; 32]), Timestamp { seconds: 1_700_000_000, nanos: 5 });
    let identity = FileIdentity::of(&Meta::default());
    let pieces = [FilePiece { id: ChunkId([1; 32]), bytes: 9 }];
    let xattrs = [Xattr { name: b"user.x".to_vec(), value: vec![1] }];
    let holes = [Hole { offset: 1, bytes: 2 }];
    writer.put(0, true, b"d", &identity, &xattrs, &[], CachedContentRef::None);
    writer.put(1, false, b"a", &identity, &[], &[], CachedContentRef::Inline(b"hi"));
    writer.put(1, false, b"b", &identity, &[], &holes, CachedContentRef::Pieces(&pieces));
    writer.put(0, false, b"e", &identity, &[], &[], CachedContentRef::List(ChunkId([2; 32])));
    writer.finish().context("no cache was written")?.publish()?;
    // Into `d`, to `a` and `b` in it, out of it, to `e`.
    let walk = [5, 1 << 2 | 2, b'd', 1 << 2, b'a', 1 << 2, b'b', 3, 1 << 2, b'e'];
    Ok(named([("walked", [&walk[..], &fs::read(path)?].concat())]))
}

pub(super) fn journal() -> Result<Vec<Seed>> {
    let directory = tempfile::tempdir()?;
    let mut journal = Journal::<Event>::open(&directory.path().join("journal"))?;
    let (tenant, agent) = ("acme".parse()?, AgentIdText(AgentId([9; 16])));
    let label = "line\nbreak".into();
    let enrolled = Event::AgentEnrolled { agent, tenant, label, key_hash: "00".repeat(32), at_ns: 2, expires_ns: 3 };
    journal.append_all(&[enrolled, Event::AgentRevoked { agent, at_ns: 6 }])?;
    let mut torn = fs::read(journal.path())?;
    let whole = torn.clone();
    torn.truncate(whole.len() - 9);
    let events = concat!(
        "#{\"event\":\"tenant_added\",\"tenant\":\"acme\",\"at_ns\":1}\n",
        "#{\"event\":\"agent_renewed\",\"agent\":\"09090909090909090909090909090909\",\"at_ns\":4,\"expires_ns\":5}\n"
    );
    Ok(named([("whole", whole), ("torn", torn), ("events", events.into())]))
}

pub(super) fn index() -> Result<Vec<Seed>> {
    let directory = tempfile::tempdir()?;
    let manifest = IndexManifest {
        next_segment: 3,
        domains: vec![DomainId::FULL, DomainId([1; 16])],
        covered: [(1, 500), (2, u32::MAX)].into(),
        segments: vec![2, 1],
    };
    manifest.store(directory.path())?;
    let list = fs::read(directory.path().join("MANIFEST"))?;
    let copy = Copy { pack: 1, offset: 96, bytes: 7, position: 3, kind: ChunkKind::Tree, complete: true };
    let entries = (0..3u8).map(|i| Ok(Entry { id: ChunkId([i * 80; 32]), domain: 1, copy }));
    segment::write(directory.path(), 1, 3, entries)?;
    Segment::open(directory.path(), 1, Arc::new(PageCache::new(1 << 16)))?;
    let segment = fs::read(segment::path(directory.path(), 1))?;
    Ok(named([("list", [&[0][..], &list].concat()), ("segment", [&[1][..], &segment].concat())]))
}

/// The only seeds that are others each time: keys are random.
pub(super) fn certificates() -> Result<Vec<Seed>> {
    let data = tempfile::tempdir()?;
    let authority = Authority::create(data.path())?;
    let request = EnrolmentKey::generate()?.request()?;
    let identity = Identity { tenant: "acme".parse()?, agent: AgentId([3; 16]), role: Role::Agent };
    let agent = authority.issue_agent(&ProvenKey::from_request(&request)?, &identity, SERVER_VALIDITY)?;
    let server = authority.server(&["localhost".to_owned()])?;
    let server = server.chain.first().context("no server certificate")?.to_vec();
    Ok(named([
        ("request", request),
        ("agent", agent.to_vec()),
        ("server", server),
        ("authority", authority.certificate().to_vec()),
    ]))
}
