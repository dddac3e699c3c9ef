//! The file that says which segments the index consists of, replaced as a whole whenever that changes.
//!
//! `magic "STRINDXM" · version u16 = 1 · next segment u64 · count u32 + domains 16 each · count u32 + (pack u32 · covered u32)
//! · count u32 + segment numbers u64, newest first · BLAKE3-256 of everything before it`

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use strandline_messages::DomainId;
use strandline_messages::format::FormatError;
use strandline_messages::format::cursor::{Decoder, Encoder, check_limit};

use super::IndexError;
use crate::storage::StorageError;
use crate::storage::files;

const MAGIC: [u8; 8] = *b"STRINDXM";
const VERSION: u16 = 1;
/// Longest manifest that is read, bytes: room for 8 million packs.
const MANIFEST_BYTES_MAX: usize = 64 << 20;

/// What stands for a pack that is gone instead of how far it is indexed.
pub const DROPPED: u32 = u32::MAX;

/// What survives a crash.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct IndexManifest {
    /// The number that the next segment gets.
    pub next_segment: u64,
    /// The domains; an entry names one by its place here.
    pub domains: Vec<DomainId>,
    /// How far each pack is indexed, bytes from its start; [`DROPPED`] for those that are gone.
    pub covered: BTreeMap<u32, u32>,
    /// The segments, newest first.
    pub segments: Vec<u64>,
}

/// The manifest's path in the index directory.
pub fn path(directory: &Path) -> PathBuf {
    directory.join("MANIFEST")
}

impl IndexManifest {
    /// The packs that are gone.
    pub fn dropped(&self) -> impl Iterator<Item = u32> {
        self.covered.iter().filter(|(_, covered)| **covered == DROPPED).map(|(pack, _)| *pack)
    }

    /// Reads the manifest of `directory`; `None` if there is none.
    pub fn load(directory: &Path) -> Result<Option<Self>, IndexError> {
        let path = path(directory);
        match files::read_small(&path, MANIFEST_BYTES_MAX) {
            Ok(None) => Ok(None),
            Ok(Some(bytes)) => {
                Self::decode(&bytes).map(Some).map_err(|_| IndexError::damaged(&path, "the list of segments"))
            }
            Err(StorageError::Io { source, .. }) => Err(IndexError::io("read", &path)(source)),
            Err(_) => Err(IndexError::damaged(&path, "the list of segments is too long")),
        }
    }

    /// Replaces the manifest of `directory`, durably; segments written there before become durable names with it.
    pub fn store(&self, directory: &Path) -> Result<(), IndexError> {
        let path = path(directory);
        files::sync_directory(directory).and_then(|()| files::write_atomically(&path, &self.encode())).map_err(
            |error| match error {
                StorageError::Io { source, .. } => IndexError::io("write", &path)(source),
                _ => IndexError::damaged(&path, "the list of segments"),
            },
        )
    }

    fn encode(&self) -> Vec<u8> {
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let mut out = MAGIC.to_vec();
        out.put_u16(VERSION);
        out.put_u64(self.next_segment);
        out.put_u32(count(self.domains.len()));
        self.domains.iter().for_each(|domain| out.extend_from_slice(domain.as_bytes()));
        out.put_u32(count(self.covered.len()));
        for (&pack, &covered) in &self.covered {
            out.put_u32(pack);
            out.put_u32(covered);
        }
        out.put_u32(count(self.segments.len()));
        self.segments.iter().for_each(|&segment| out.put_u64(segment));
        let digest = blake3::hash(&out);
        out.extend_from_slice(digest.as_bytes());
        out
    }

    fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let what = "index manifest";
        let (body, digest) = bytes.split_at_checked(bytes.len().saturating_sub(32)).unwrap_or_default();
        if blake3::hash(body).as_bytes() != digest {
            return Err(FormatError::Digest { what });
        }
        let mut decoder = Decoder::new(body, what);
        decoder.magic(&MAGIC)?;
        decoder.version(VERSION)?;
        let mut manifest = Self { next_segment: decoder.u64()?, ..Self::default() };
        for _ in 0..check_limit("domains", decoder.u32()?.into(), u16::MAX.into())? {
            manifest.domains.push(DomainId(decoder.array()?));
        }
        for _ in 0..decoder.u32()? {
            manifest.covered.insert(decoder.u32()?, decoder.u32()?);
        }
        for _ in 0..decoder.u32()? {
            manifest.segments.push(decoder.u64()?);
        }
        decoder.finish()?;
        Ok(manifest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_reads_back_and_shows_damage() {
        let manifest = IndexManifest {
            next_segment: 9,
            domains: vec![DomainId::FULL, DomainId([3; 16])],
            covered: [(1, 100), (7, 96)].into(),
            segments: vec![8, 2],
        };
        let good = manifest.encode();
        assert_eq!(IndexManifest::decode(&good).unwrap(), manifest);
        for i in 0..good.len() {
            let mut bad = good.clone();
            bad[i] ^= 1;
            assert!(IndexManifest::decode(&bad).is_err(), "byte {i}");
            assert!(IndexManifest::decode(&good[..i]).is_err(), "cut at {i}");
        }
    }
}
