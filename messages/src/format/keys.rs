//! Keysets, the slots that wrap them, and writer certificates: their bytes. The cryptography lives in the agent.

use crate::ids::{DomainId, RepositoryId, SnapshotId};
use crate::limits;

use super::FormatError;
use super::cursor::{Decoder, Encoder, check_limit};

/// First bytes of a key slot.
pub const SLOT_MAGIC: [u8; 8] = *b"STRSLOT\0";
/// Version that this module encodes, of slots and keysets.
pub const KEYS_VERSION: u16 = 1;

/// What the holder of a keyset may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Capability {
    /// Write, read, certify other writers.
    Full = 1,
    /// Write only.
    Write = 2,
    /// Read only.
    Read = 3,
}

impl Capability {
    /// From its byte on disk.
    pub fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Full),
            2 => Some(Self::Write),
            3 => Some(Self::Read),
            _ => None,
        }
    }
}

/// The repository's root key certifies a writer's public key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WriterCertificateV1 {
    /// What the writer may do.
    pub capability: Capability,
    /// Ed25519 public key of the writer.
    pub public_key: [u8; 32],
    /// Ed25519 signature of the repository's root key over [`WriterCertificateV1::signed_part`].
    pub signature: [u8; 64],
}

impl WriterCertificateV1 {
    /// Encoded length, bytes.
    pub const BYTES: usize = 1 + 32 + 64;

    /// What the root key signs: a fixed context, the repository, the capability, the writer's public key.
    pub fn signed_part(repository: &RepositoryId, capability: Capability, public_key: &[u8; 32]) -> Vec<u8> {
        let mut out = b"strandline writer certificate v1".to_vec();
        out.extend_from_slice(repository.as_bytes());
        out.put_u8(capability as u8);
        out.extend_from_slice(public_key);
        out
    }

    /// Appends the 97 bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        out.put_u8(self.capability as u8);
        out.extend_from_slice(&self.public_key);
        out.extend_from_slice(&self.signature);
    }

    /// Reads the 97 bytes.
    pub fn decode(decoder: &mut Decoder<'_>) -> Result<Self, FormatError> {
        let capability = Capability::from_byte(decoder.u8()?).ok_or_else(|| decoder.invalid("unknown capability"))?;
        Ok(Self { capability, public_key: decoder.array()?, signature: decoder.array()? })
    }

    /// The writer domain: one for all full-capability writers, one per write-only key.
    pub fn domain(&self) -> DomainId {
        match self.capability {
            Capability::Full => DomainId::FULL,
            Capability::Write | Capability::Read => {
                let hash = blake3::derive_key("strandline 2026 writer domain v1", &self.public_key);
                DomainId(*hash.first_chunk().unwrap_or(&[0xff; 16]))
            }
        }
    }
}

/// What a client signs to prove that it holds its writer key: the server's nonce and the repository.
pub fn open_session_proof(nonce: &[u8; 32], repository: &RepositoryId) -> Vec<u8> {
    let mut out = b"strandline open session v1".to_vec();
    out.extend_from_slice(nonce);
    out.extend_from_slice(repository.as_bytes());
    out
}

/// What a writer signs to have an operation (`wire::manage`, encoded) carried out.
pub fn manage_proof(nonce: &[u8; 32], repository: &RepositoryId, operation: &[u8]) -> Vec<u8> {
    let mut out = b"strandline manage repository v1".to_vec();
    out.extend_from_slice(nonce);
    out.extend_from_slice(repository.as_bytes());
    out.extend_from_slice(blake3::hash(operation).as_bytes());
    out
}

/// What a writer signs to replace the tags of a snapshot. `at_ns`: when, ns since 1970.
pub fn snapshot_tags_signed_part(
    repository: &RepositoryId,
    snapshot: &SnapshotId,
    at_ns: i64,
    tags: &[String],
) -> Vec<u8> {
    let mut out = b"strandline snapshot tags v1".to_vec();
    out.extend_from_slice(repository.as_bytes());
    out.extend_from_slice(snapshot.as_bytes());
    out.put_i64(at_ns);
    for tag in tags {
        out.put_string(tag.as_bytes());
    }
    out
}

/// A repository's secrets in plaintext. Encoded only to be sealed into a slot.
///
/// `version u16`, then the fields in the order below. A secret that only some holders have is one zero byte if it is absent,
/// else a 1 and 32 bytes; the writer seed has that 1, too, and is never absent: every holder proves itself with it.
#[derive(Clone, PartialEq, Eq)]
pub struct KeysetV1 {
    /// The repository.
    pub repository: RepositoryId,
    /// Key of the chunk ids.
    pub id_key: [u8; 32],
    /// Seed of the chunker's secret parameters.
    pub chunker_secret: [u8; 32],
    /// Ed25519 seed of the root signing key (full only).
    pub root_seed: Option<[u8; 32]>,
    /// Ed25519 public key of the root.
    pub root_public: [u8; 32],
    /// X25519 private key that unwraps data keys (full and read).
    pub kem_private: Option<[u8; 32]>,
    /// X25519 public key to which data keys are wrapped.
    pub kem_public: [u8; 32],
    /// Ed25519 seed of this holder's writer key.
    pub writer_seed: [u8; 32],
    /// Certificate of that key: what its holder may do.
    pub writer: WriterCertificateV1,
}

impl KeysetV1 {
    /// The plaintext to be sealed into a slot.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(512);
        out.put_u16(KEYS_VERSION);
        out.extend_from_slice(self.repository.as_bytes());
        out.extend_from_slice(&self.id_key);
        out.extend_from_slice(&self.chunker_secret);
        put_optional(self.root_seed.as_ref(), &mut out);
        out.extend_from_slice(&self.root_public);
        put_optional(self.kem_private.as_ref(), &mut out);
        out.extend_from_slice(&self.kem_public);
        put_optional(Some(&self.writer_seed), &mut out);
        self.writer.encode(&mut out);
        out
    }

    /// Reads the plaintext of an opened slot.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut decoder = Decoder::new(bytes, "keyset");
        decoder.version(KEYS_VERSION)?;
        let keyset = Self {
            repository: RepositoryId(decoder.array()?),
            id_key: decoder.array()?,
            chunker_secret: decoder.array()?,
            root_seed: optional(&mut decoder)?,
            root_public: decoder.array()?,
            kem_private: optional(&mut decoder)?,
            kem_public: decoder.array()?,
            writer_seed: optional(&mut decoder)?.ok_or_else(|| decoder.invalid("it has no writer key"))?,
            writer: WriterCertificateV1::decode(&mut decoder)?,
        };
        decoder.finish()?;
        Ok(keyset)
    }
}

fn put_optional(secret: Option<&[u8; 32]>, out: &mut Vec<u8>) {
    out.put_u8(u8::from(secret.is_some()));
    if let Some(secret) = secret {
        out.extend_from_slice(secret);
    }
}

fn optional(decoder: &mut Decoder<'_>) -> Result<Option<[u8; 32]>, FormatError> {
    match decoder.u8()? {
        0 => Ok(None),
        1 => Ok(Some(decoder.array()?)),
        _ => Err(decoder.invalid("an optional field is neither absent nor present")),
    }
}

/// How a slot's key is made from what its holder knows.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SlotKind {
    /// From 32 random bytes in a key file (64 hexadecimal digits).
    KeyFile,
    /// From a passphrase by Argon2id v1.3.
    Passphrase {
        /// Memory, KiB.
        memory_kib: u32,
        /// Passes.
        passes: u32,
        /// Lanes.
        lanes: u32,
    },
    /// From 32 random bytes printed once for people.
    Recovery,
}

/// A keyset sealed for one holder.
///
/// ```text
/// magic "STRSLOT\0" · version u16 = 1 · repository 16 · slot id 16 · created i64 ns · label text
/// kind u8 (1 key file, 2 passphrase, 3 recovery) · memory KiB u32 · passes u32 · lanes u32 (zero unless 2)
/// salt 32 · sealed keyset (length LEB128; AES-256-GCM, nonce zero, everything before the length is the AAD)
/// digest BLAKE3-256 of everything before it
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KeySlotV1 {
    /// The repository.
    pub repository: RepositoryId,
    /// Random name of the slot.
    pub id: [u8; 16],
    /// When it was made, ns since 1970.
    pub created_ns: i64,
    /// For people.
    pub label: String,
    /// How its key is made.
    pub kind: SlotKind,
    /// Salt of that derivation.
    pub salt: [u8; 32],
    /// The encrypted keyset.
    pub sealed: Vec<u8>,
}

impl KeySlotV1 {
    /// Everything before the length of the sealed keyset: its AAD.
    pub fn encode_visible(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(1024);
        out.extend_from_slice(&SLOT_MAGIC);
        out.put_u16(KEYS_VERSION);
        out.extend_from_slice(self.repository.as_bytes());
        out.extend_from_slice(&self.id);
        out.put_i64(self.created_ns);
        out.put_string(self.label.as_bytes());
        let (kind, memory_kib, passes, lanes) = match self.kind {
            SlotKind::KeyFile => (1, 0, 0, 0),
            SlotKind::Passphrase { memory_kib, passes, lanes } => (2, memory_kib, passes, lanes),
            SlotKind::Recovery => (3, 0, 0, 0),
        };
        out.put_u8(kind);
        out.put_u32(memory_kib);
        out.put_u32(passes);
        out.put_u32(lanes);
        out.extend_from_slice(&self.salt);
        out
    }

    /// The slot's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = self.encode_visible();
        out.put_string(&self.sealed);
        let digest = blake3::hash(&out);
        out.extend_from_slice(digest.as_bytes());
        out
    }

    /// Reads a slot, checks its digest and that its parameters are within the limits.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        check_limit("key slot", bytes.len() as u64, limits::KEY_SLOT_BYTES_MAX)?;
        let mut decoder = Decoder::new(bytes, "key slot");
        decoder.magic(&SLOT_MAGIC)?;
        decoder.version(KEYS_VERSION)?;
        let covered = bytes.len().saturating_sub(32);
        let (body, digest) = bytes.split_at_checked(covered).unwrap_or_default();
        if blake3::hash(body).as_bytes() != digest {
            return Err(FormatError::Digest { what: "key slot" });
        }
        let repository = RepositoryId(decoder.array()?);
        let id = decoder.array()?;
        let created_ns = decoder.i64()?;
        let label = decoder.text("label", limits::TAG_BYTES_MAX)?;
        let kind = decoder.u8()?;
        let (memory_kib, passes, lanes) = (decoder.u32()?, decoder.u32()?, decoder.u32()?);
        let kind = match kind {
            1 => SlotKind::KeyFile,
            2 => {
                check_limit("Argon2 memory in KiB", memory_kib.into(), limits::ARGON2_MEMORY_KIB_MAX as usize)?;
                check_limit("Argon2 passes", passes.into(), limits::ARGON2_PASSES_MAX as usize)?;
                check_limit("Argon2 lanes", lanes.into(), limits::ARGON2_LANES_MAX as usize)?;
                SlotKind::Passphrase { memory_kib, passes, lanes }
            }
            3 => SlotKind::Recovery,
            _ => return Err(decoder.invalid("unknown kind")),
        };
        let salt = decoder.array()?;
        let sealed = decoder.string("sealed keyset", limits::KEY_SLOT_BYTES_MAX)?.to_vec();
        decoder.bytes(32)?;
        decoder.finish()?;
        Ok(Self { repository, id, created_ns, label, kind, salt, sealed })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn slot() -> KeySlotV1 {
        KeySlotV1 {
            repository: RepositoryId([1; 16]),
            id: [2; 16],
            created_ns: 3,
            label: "laptop".into(),
            kind: SlotKind::Passphrase { memory_kib: 65_536, passes: 3, lanes: 1 },
            salt: [4; 32],
            sealed: vec![5; 300],
        }
    }

    #[test]
    fn a_slot_reads_back() {
        assert_eq!(KeySlotV1::decode(&slot().encode()).unwrap(), slot());
    }

    #[test]
    fn s43_a_slot_that_asks_for_too_much_memory_is_refused() {
        let greedy = KeySlotV1 {
            kind: SlotKind::Passphrase { memory_kib: limits::ARGON2_MEMORY_KIB_MAX + 1, passes: 3, lanes: 1 },
            ..slot()
        };
        assert!(matches!(KeySlotV1::decode(&greedy.encode()), Err(FormatError::Limit { .. })));
    }

    #[test]
    fn a_keyset_reads_back_with_and_without_its_secrets() {
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
        assert!(KeysetV1::decode(&full.encode()).unwrap() == full);
        assert!(KeysetV1::decode(&bare.encode()).unwrap() == bare);
        assert_eq!((full.encode().len(), bare.encode().len()), (342, 278));
        let mut keyless = bare.encode();
        let seed = keyless.len() - WriterCertificateV1::BYTES - 33;
        keyless[seed] = 0;
        keyless.drain(seed + 1..seed + 33);
        assert!(matches!(KeysetV1::decode(&keyless), Err(FormatError::Invalid { .. })));
    }

    #[test]
    fn write_only_writers_have_domains_of_their_own() {
        let certificate =
            |capability, key| WriterCertificateV1 { capability, public_key: [key; 32], signature: [0; 64] };
        assert_eq!(certificate(Capability::Full, 1).domain(), certificate(Capability::Full, 2).domain());
        assert_ne!(certificate(Capability::Write, 1).domain(), certificate(Capability::Write, 2).domain());
        assert_ne!(certificate(Capability::Write, 1).domain(), DomainId::FULL);
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>, cut in 0usize..500) {
            let mut mixed = slot().encode();
            mixed.truncate(cut);
            mixed.extend(bytes);
            let _ = KeySlotV1::decode(&mixed);
            let _ = KeysetV1::decode(&mixed);
        }
    }
}
