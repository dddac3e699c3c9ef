//! The repository file: what everybody needs to know of a repository, keyless.
//!
//! `magic "STRREPO\0" · version u16 = 1 · repository 16 · name text · created i64 ns · root public key 32 · wrap algorithm
//! u8 · KEM public key 32 · chunker u8 (1 = FastCDC v2020) · minimum u32 · average u32 · maximum u32 · block plaintext u32 ·
//! digest BLAKE3-256 of everything before it`
//!
//! Magic, version, repository and name stand where they do in every version. Whoever puts something into a repository that
//! readers of this version would misread raises the version first: they leave such a repository alone.

use crate::ids::{RepositoryId, RepositoryName};
use crate::limits;

use super::FormatError;
use super::cursor::{Decoder, Encoder};

/// First bytes of a repository file.
pub const REPOSITORY_MAGIC: [u8; 8] = *b"STRREPO\0";
/// Version that this module encodes.
pub const REPOSITORY_VERSION: u16 = 1;

/// How a repository cuts files into chunks and chunks into blocks. Sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct ChunkingV1 {
    /// Smallest chunk; shorter files are one chunk.
    pub minimum: u32,
    /// Average chunk.
    pub average: u32,
    /// Largest chunk.
    pub maximum: u32,
    /// Plaintext at which a block is sealed.
    pub block_plaintext: u32,
}

/// A decoded repository file.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct RepositoryV1 {
    /// The repository.
    pub id: RepositoryId,
    /// Its name within its tenant.
    pub name: RepositoryName,
    /// When it was made, ns since 1970.
    pub created_ns: i64,
    /// Ed25519 public key that certifies writers.
    pub root_public: [u8; 32],
    /// How data keys are wrapped (1 = X25519 HPKE).
    pub wrap_algorithm: u8,
    /// Public key to which data keys are wrapped.
    pub kem_public: [u8; 32],
    /// How files are cut.
    pub chunking: ChunkingV1,
}

impl RepositoryV1 {
    /// The file's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(256);
        out.extend_from_slice(&REPOSITORY_MAGIC);
        out.put_u16(REPOSITORY_VERSION);
        out.extend_from_slice(self.id.as_bytes());
        out.put_string(self.name.as_str().as_bytes());
        out.put_i64(self.created_ns);
        out.extend_from_slice(&self.root_public);
        out.put_u8(self.wrap_algorithm);
        out.extend_from_slice(&self.kem_public);
        out.put_u8(1);
        out.put_u32(self.chunking.minimum);
        out.put_u32(self.chunking.average);
        out.put_u32(self.chunking.maximum);
        out.put_u32(self.chunking.block_plaintext);
        let digest = blake3::hash(&out);
        out.extend_from_slice(digest.as_bytes());
        out
    }

    /// Which repository a file is of, whatever its version; not checked against its digest.
    pub fn identify(bytes: &[u8]) -> Result<(RepositoryId, RepositoryName), FormatError> {
        let mut decoder = Decoder::new(bytes, "repository file");
        decoder.magic(&REPOSITORY_MAGIC)?;
        decoder.u16()?;
        Self::identity(&mut decoder)
    }

    fn identity(decoder: &mut Decoder<'_>) -> Result<(RepositoryId, RepositoryName), FormatError> {
        let id = RepositoryId(decoder.array()?);
        let name = decoder.text("repository name", limits::NAME_BYTES_MAX)?;
        Ok((id, name.parse().map_err(|_| decoder.invalid("illegal repository name"))?))
    }

    /// Reads a repository file.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut decoder = Decoder::new(bytes, "repository file");
        decoder.magic(&REPOSITORY_MAGIC)?;
        decoder.version(REPOSITORY_VERSION)?;
        let (body, digest) = bytes.split_at_checked(bytes.len().saturating_sub(32)).unwrap_or_default();
        if blake3::hash(body).as_bytes() != digest {
            return Err(FormatError::Digest { what: "repository file" });
        }
        let (id, name) = Self::identity(&mut decoder)?;
        let created_ns = decoder.i64()?;
        let root_public = decoder.array()?;
        let wrap_algorithm = decoder.u8()?;
        let kem_public = decoder.array()?;
        if decoder.u8()? != 1 {
            return Err(decoder.invalid("unknown chunker"));
        }
        let chunking = ChunkingV1 {
            minimum: decoder.u32()?,
            average: decoder.u32()?,
            maximum: decoder.u32()?,
            block_plaintext: decoder.u32()?,
        };
        decoder.bytes(32)?;
        decoder.finish()?;
        chunking.check()?;
        Ok(Self { id, name, created_ns, root_public, wrap_algorithm, kem_public, chunking })
    }
}

impl ChunkingV1 {
    /// Refuses sizes that contradict one another or exceed the limits.
    pub fn check(&self) -> Result<(), FormatError> {
        let ordered = 64 <= self.minimum && self.minimum <= self.average && self.average <= self.maximum;
        let even = [self.minimum, self.average, self.maximum].iter().all(|size| size % 2 == 0);
        if !ordered || !even {
            return Err(FormatError::Invalid { what: "chunking", why: "sizes are not even and ascending from 64" });
        }
        super::cursor::check_limit("largest chunk", self.maximum.into(), limits::CHUNK_BYTES_MAX)?;
        super::cursor::check_limit("block plaintext", self.block_plaintext.into(), limits::CHUNK_BYTES_MAX)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_repository_file_reads_back_and_shows_damage() {
        let file = RepositoryV1 {
            id: RepositoryId([1; 16]),
            name: "main".parse().unwrap(),
            created_ns: 5,
            root_public: [2; 32],
            wrap_algorithm: 1,
            kem_public: [3; 32],
            chunking: ChunkingV1 { minimum: 16 << 10, average: 64 << 10, maximum: 256 << 10, block_plaintext: 1 << 20 },
        };
        let good = file.encode();
        assert_eq!(RepositoryV1::decode(&good).unwrap(), file);
        for i in 0..good.len() {
            let mut bad = good.clone();
            bad[i] ^= 1;
            assert!(RepositoryV1::decode(&bad).is_err(), "byte {i}");
        }
        let mut later = good[..8].to_vec();
        later.extend_from_slice(&[2, 0]);
        later.extend_from_slice(&good[10..10 + 16 + 1 + 4]);
        later.extend_from_slice(b"whatever version 2 says");
        assert!(matches!(RepositoryV1::decode(&later), Err(FormatError::Version { found: 2, .. })));
        assert_eq!(RepositoryV1::identify(&later).unwrap(), (file.id, file.name));
    }
}
