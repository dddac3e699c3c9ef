//! The snapshot manifest: what a snapshot is, partly readable by the server, signed by its writer.
//!
//! ```text
//! magic "STRSNAPS" · version u16 = 1 · repository 16
//! root reference 33 · flags u8 (bit 0: error list follows, bit 1: parent follows) · [error list reference 33] · [parent 32]
//! started i64 ns · finished i64 ns (agent's clock, UTC)
//! job text · host text · count + tags texts · 8 totals (LEB128)
//! writer certificate: capability u8 · public key 32 · signature of the repository's root key 64
//! wrap algorithm u8 · wrapped data key (length LEB128) · salt 32 · commitment 32 · sealed details (length LEB128)
//! signature 64 of the writer over everything before it
//! ```
//! Texts are UTF-8 with a LEB128 length. The details are AES-256-GCM with nonce zero; everything before their length is
//! the AAD. The snapshot id is BLAKE3-256 of all of it.

use crate::ids::{ChunkId, DomainId, RepositoryId, SnapshotId};
use crate::limits;

use super::FormatError;
use super::chunk::Reference;
use super::cursor::{Decoder, Encoder, check_limit};
use super::keys::WriterCertificateV1;

/// First bytes of a manifest.
pub const MANIFEST_MAGIC: [u8; 8] = *b"STRSNAPS";
/// Version that this module encodes.
pub const MANIFEST_VERSION: u16 = 1;
/// Bytes of an Ed25519 signature.
pub const SIGNATURE_BYTES: usize = 64;

/// Counts of one snapshot.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Totals {
    /// Regular files.
    pub files: u64,
    /// Directories.
    pub directories: u64,
    /// Everything else (links, devices, pipes, sockets).
    pub others: u64,
    /// Sum of the sizes of the regular files, bytes.
    pub bytes: u64,
    /// Files whose content was read in this run (not taken from the file cache).
    pub files_read: u64,
    /// Plaintext bytes that the repository did not have before.
    pub bytes_new: u64,
    /// Bytes of the blocks sent, as stored.
    pub bytes_stored: u64,
    /// Source errors (length of the error list).
    pub errors: u64,
}

/// A decoded manifest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ManifestV1 {
    /// The repository.
    pub repository: RepositoryId,
    /// Top node of the root directory.
    pub root: ChunkId,
    /// Top node of the error list, if anything could not be saved.
    pub errors: Option<ChunkId>,
    /// The snapshot that the file cache was made by.
    pub parent: Option<SnapshotId>,
    /// Start of the run, ns since 1970 by the agent's clock.
    pub started_ns: i64,
    /// End of the scan, ns since 1970 by the agent's clock.
    pub finished_ns: i64,
    /// Job label, may be empty.
    pub job: String,
    /// Host label.
    pub host: String,
    /// Tags, sorted.
    pub tags: Vec<String>,
    /// Counts.
    pub totals: Totals,
    /// Who may write.
    pub writer: WriterCertificateV1,
    /// How the data key is wrapped (1 = X25519 HPKE).
    pub wrap_algorithm: u8,
    /// The wrapped data key.
    pub wrapped_key: Vec<u8>,
    /// Input of the details key's derivation.
    pub salt: [u8; 32],
    /// Commits to the details key.
    pub commitment: [u8; 32],
    /// The encrypted [`DetailsV1`].
    pub sealed_details: Vec<u8>,
    /// The writer's signature.
    pub signature: [u8; SIGNATURE_BYTES],
}

/// What only key holders may read.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DetailsV1 {
    /// The paths given, raw.
    pub paths: Vec<Vec<u8>>,
    /// The excludes given.
    pub excludes: Vec<String>,
    /// User that ran the backup.
    pub user: String,
    /// Operating system and kernel.
    pub system: String,
    /// Program and version.
    pub program: String,
    /// The command line.
    pub command: String,
}

impl ManifestV1 {
    /// Everything before the length of the sealed details: their AAD.
    pub fn encode_visible(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(1024);
        out.extend_from_slice(&MANIFEST_MAGIC);
        out.put_u16(MANIFEST_VERSION);
        out.extend_from_slice(self.repository.as_bytes());
        Reference::tree(self.root).encode(&mut out);
        out.put_u8(u8::from(self.errors.is_some()) | u8::from(self.parent.is_some()) << 1);
        if let Some(errors) = self.errors {
            Reference::tree(errors).encode(&mut out);
        }
        if let Some(parent) = self.parent {
            out.extend_from_slice(parent.as_bytes());
        }
        out.put_i64(self.started_ns);
        out.put_i64(self.finished_ns);
        out.put_string(self.job.as_bytes());
        out.put_string(self.host.as_bytes());
        out.put_varint(self.tags.len() as u64);
        for tag in &self.tags {
            out.put_string(tag.as_bytes());
        }
        let t = &self.totals;
        for number in [t.files, t.directories, t.others, t.bytes, t.files_read, t.bytes_new, t.bytes_stored, t.errors] {
            out.put_varint(number);
        }
        self.writer.encode(&mut out);
        out.put_u8(self.wrap_algorithm);
        out.put_string(&self.wrapped_key);
        out.extend_from_slice(&self.salt);
        out.extend_from_slice(&self.commitment);
        out
    }

    /// Everything that the signature covers.
    pub fn encode_signed_part(&self) -> Vec<u8> {
        let mut out = self.encode_visible();
        out.put_string(&self.sealed_details);
        out
    }

    /// The manifest's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.encode_signed_part();
        out.extend_from_slice(&self.signature);
        out
    }

    /// Reads a manifest. Does not check its signature.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        check_limit("snapshot manifest", bytes.len() as u64, limits::MANIFEST_BYTES_MAX)?;
        let mut decoder = Decoder::new(bytes, "snapshot manifest");
        decoder.magic(&MANIFEST_MAGIC)?;
        decoder.version(MANIFEST_VERSION)?;
        let repository = RepositoryId(decoder.array()?);
        let root = tree_reference(&mut decoder)?;
        let flags = decoder.u8()?;
        if flags > 3 {
            return Err(decoder.invalid("unknown flags"));
        }
        let errors = if flags & 1 == 0 { None } else { Some(tree_reference(&mut decoder)?) };
        let parent = if flags & 2 == 0 { None } else { Some(SnapshotId(decoder.array()?)) };
        let started_ns = decoder.i64()?;
        let finished_ns = decoder.i64()?;
        let job = decoder.text("job label", limits::NAME_BYTES_MAX)?;
        let host = decoder.text("host label", limits::FILE_NAME_BYTES_MAX)?;
        let count = decoder.count("tags", limits::TAGS_MAX)?;
        let mut tags = Vec::with_capacity(count);
        for _ in 0..count {
            tags.push(decoder.text("tag", limits::TAG_BYTES_MAX)?);
        }
        let totals = Totals {
            files: decoder.varint()?,
            directories: decoder.varint()?,
            others: decoder.varint()?,
            bytes: decoder.varint()?,
            files_read: decoder.varint()?,
            bytes_new: decoder.varint()?,
            bytes_stored: decoder.varint()?,
            errors: decoder.varint()?,
        };
        let writer = WriterCertificateV1::decode(&mut decoder)?;
        let wrap_algorithm = decoder.u8()?;
        let wrapped_key = decoder.string("wrapped data key", limits::WRAPPED_KEY_BYTES_MAX)?.to_vec();
        let salt = decoder.array()?;
        let commitment = decoder.array()?;
        let sealed_details = decoder.string("sealed details", limits::MANIFEST_BYTES_MAX)?.to_vec();
        let signature = decoder.array()?;
        decoder.finish()?;
        Ok(Self {
            repository,
            root,
            errors,
            parent,
            started_ns,
            finished_ns,
            job,
            host,
            tags,
            totals,
            writer,
            wrap_algorithm,
            wrapped_key,
            salt,
            commitment,
            sealed_details,
            signature,
        })
    }

    /// The domain in which the snapshot's chunks are resolved.
    pub fn domain(&self) -> DomainId {
        self.writer.domain()
    }
}

/// The id of the manifest that `bytes` are.
pub fn snapshot_id(bytes: &[u8]) -> SnapshotId {
    SnapshotId(*blake3::hash(bytes).as_bytes())
}

fn tree_reference(decoder: &mut Decoder<'_>) -> Result<ChunkId, FormatError> {
    match Reference::decode(decoder)? {
        Reference { kind: crate::ids::ChunkKind::Tree, id } => Ok(id),
        _ => Err(decoder.invalid("a root is not a tree")),
    }
}

impl DetailsV1 {
    /// The plaintext to be sealed.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.put_u16(MANIFEST_VERSION);
        out.put_varint(self.paths.len() as u64);
        for path in &self.paths {
            out.put_string(path);
        }
        out.put_varint(self.excludes.len() as u64);
        for exclude in &self.excludes {
            out.put_string(exclude.as_bytes());
        }
        for text in [&self.user, &self.system, &self.program, &self.command] {
            out.put_string(text.as_bytes());
        }
        out
    }

    /// Reads the opened plaintext.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let max = limits::MANIFEST_BYTES_MAX;
        let mut decoder = Decoder::new(bytes, "snapshot details");
        decoder.version(MANIFEST_VERSION)?;
        let count = decoder.count("paths", max)?;
        let mut paths = Vec::new();
        for _ in 0..count {
            paths.push(decoder.string("path", max)?.to_vec());
        }
        let count = decoder.count("excludes", max)?;
        let mut excludes = Vec::new();
        for _ in 0..count {
            excludes.push(decoder.text("exclude", max)?);
        }
        let user = decoder.text("user", max)?;
        let system = decoder.text("system", max)?;
        let program = decoder.text("program", max)?;
        let command = decoder.text("command line", max)?;
        decoder.finish()?;
        Ok(Self { paths, excludes, user, system, program, command })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::format::keys::Capability;

    fn sample() -> ManifestV1 {
        ManifestV1 {
            repository: RepositoryId([1; 16]),
            root: ChunkId([2; 32]),
            errors: Some(ChunkId([3; 32])),
            parent: Some(SnapshotId([4; 32])),
            started_ns: -1,
            finished_ns: i64::MAX,
            job: String::new(),
            host: "höst".into(),
            tags: vec!["a".into(), "b".into()],
            totals: Totals { files: 1, bytes: u64::MAX, ..Totals::default() },
            writer: WriterCertificateV1 { capability: Capability::Full, public_key: [5; 32], signature: [6; 64] },
            wrap_algorithm: 1,
            wrapped_key: vec![7; 80],
            salt: [8; 32],
            commitment: [9; 32],
            sealed_details: vec![10; 99],
            signature: [11; 64],
        }
    }

    #[test]
    fn a_manifest_reads_back() {
        let manifest = sample();
        assert_eq!(ManifestV1::decode(&manifest.encode()).unwrap(), manifest);
    }

    #[test]
    fn details_read_back() {
        let details = DetailsV1 { paths: vec![b"/\xff".to_vec()], command: "strand".into(), ..DetailsV1::default() };
        assert_eq!(DetailsV1::decode(&details.encode()).unwrap(), details);
    }

    proptest! {
        #[test]
        fn s43_no_bytes_panic(tail: Vec<u8>, cut in 0usize..900, flip in 0usize..900) {
            let mut bytes = sample().encode();
            if let Some(byte) = bytes.get_mut(flip) { *byte ^= 0x81; }
            bytes.truncate(cut);
            bytes.extend(tail);
            let _ = ManifestV1::decode(&bytes);
        }
    }
}
