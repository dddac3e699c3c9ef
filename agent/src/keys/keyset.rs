//! The opened keyset: what this holder may do with a repository.
//!
//! Invariants, checked whenever a keyset is made from bytes: every public half belongs to its private half, the writer's
//! certificate is signed by the root key, and the certificate's key is the writer's. Secrets are wiped when the last clone
//! is dropped and never appear in `Debug`.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::signature::{ED25519, Ed25519KeyPair, KeyPair, UnparsedPublicKey};
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable, Kem, Serializable};
use strandline_messages::format::chunk::{Reference, chunk_id};
use strandline_messages::format::cursor::Decoder;
use strandline_messages::format::keys::{
    Capability, KeysetV1, WriterCertificateV1, manage_proof, open_session_proof, snapshot_tags_signed_part,
};
use strandline_messages::format::repository::{ChunkingV1, RepositoryV1};
use strandline_messages::wire::manage::SnapshotTags;
use strandline_messages::{ChunkId, ChunkKind, RepositoryId, RepositoryName, SnapshotId};
use zeroize::{Zeroize, Zeroizing};

use super::{KeyError, random};

/// Id of the wrapping algorithm X25519 HPKE in blocks, manifests and the repository file.
pub(crate) const WRAP_X25519_HPKE: u8 = 1;

/// A repository's opened keys. Cheap to clone; the secrets exist once.
#[derive(Clone)]
pub struct Keyset {
    secrets: Arc<Secrets>,
}

struct Secrets(KeysetV1);

impl Drop for Secrets {
    fn drop(&mut self) {
        wipe(&mut self.0);
    }
}

fn wipe(keys: &mut KeysetV1) {
    keys.id_key.zeroize();
    keys.chunker_secret.zeroize();
    keys.root_seed.zeroize();
    keys.kem_private.zeroize();
    keys.writer_seed.zeroize();
}

impl fmt::Debug for Keyset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Keyset")
            .field("repository", &self.repository())
            .field("capability", &self.capability())
            .finish_non_exhaustive()
    }
}

impl Keyset {
    /// Makes the keys of a new repository, with the full capability. Fails only if the system gives no random bytes.
    pub fn create(id: RepositoryId) -> Result<Self, KeyError> {
        let (root_seed, writer_seed) = (Zeroizing::new(random()?), Zeroizing::new(random()?));
        let kem_seed = Zeroizing::new(random::<32>()?);
        let (kem_private, kem_public) = X25519HkdfSha256::derive_keypair(kem_seed.as_slice());
        let root = key_pair(&root_seed)?;
        let writer = certify(&root, &id, Capability::Full, &writer_seed)?;
        Self::from_plain(KeysetV1 {
            repository: id,
            id_key: random()?,
            chunker_secret: random()?,
            root_public: public_half(&root),
            root_seed: Some(*root_seed),
            kem_private: Some(kem_private.to_bytes().into()),
            kem_public: kem_public.to_bytes().into(),
            writer_seed: *writer_seed,
            writer,
        })
    }

    /// Takes over decoded secrets after checking that they belong together.
    pub fn from_plain(keys: KeysetV1) -> Result<Self, KeyError> {
        let keyset = Self { secrets: Arc::new(Secrets(keys)) };
        keyset.check()?;
        Ok(keyset)
    }

    fn check(&self) -> Result<(), KeyError> {
        let keys = &self.secrets.0;
        let inconsistent = |why| KeyError::Inconsistent { why };
        if let Some(seed) = &keys.root_seed
            && public_half(&key_pair(seed)?) != keys.root_public
        {
            return Err(inconsistent("the root key's halves do not match"));
        }
        if public_half(&key_pair(&keys.writer_seed)?) != keys.writer.public_key {
            return Err(inconsistent("the writer key does not match its certificate"));
        }
        if let Some(private) = &keys.kem_private {
            let private = <X25519HkdfSha256 as Kem>::PrivateKey::from_bytes(private)
                .map_err(|_| inconsistent("the private key of the data keys is malformed"))?;
            if X25519HkdfSha256::sk_to_pk(&private).to_bytes().as_slice() != keys.kem_public {
                return Err(inconsistent("the halves of the data keys' key do not match"));
            }
        }
        if !verify_certificate(&keys.writer, &keys.repository, &keys.root_public) {
            return Err(inconsistent("the writer's certificate is not signed by the root key"));
        }
        let full = keys.writer.capability == Capability::Full;
        if keys.root_seed.is_some() != full
            || keys.kem_private.is_some() != (keys.writer.capability != Capability::Write)
        {
            return Err(inconsistent("its secrets are not those of its capability"));
        }
        Ok(())
    }

    /// A keyset for another holder: `Write` cannot read, `Read` cannot write, neither can certify others.
    ///
    /// Needs the full capability. The new holder gets a writer key of its own, with which it proves itself; the certificate of
    /// that key says what it may do.
    pub fn narrowed(&self, capability: Capability) -> Result<Self, KeyError> {
        let keys = &self.secrets.0;
        let root_seed = keys.root_seed.as_ref().ok_or(KeyError::Capability { what: "make keys for others" })?;
        let writer_seed = Zeroizing::new(random()?);
        let writer = certify(&key_pair(root_seed)?, &keys.repository, capability, &writer_seed)?;
        let full = capability == Capability::Full;
        Self::from_plain(KeysetV1 {
            root_seed: keys.root_seed.filter(|_| full),
            kem_private: keys.kem_private.filter(|_| full || capability == Capability::Read),
            writer_seed: *writer_seed,
            writer,
            ..keys.clone()
        })
    }

    /// The repository file that goes with these keys. `created_ns` is ns since 1970.
    pub fn public_file(&self, name: RepositoryName, chunking: ChunkingV1, created_ns: i64) -> RepositoryV1 {
        let keys = &self.secrets.0;
        RepositoryV1 {
            id: keys.repository,
            name,
            created_ns,
            root_public: keys.root_public,
            wrap_algorithm: WRAP_X25519_HPKE,
            kem_public: keys.kem_public,
            chunking,
        }
    }

    /// Refuses a repository file that these keys were not made with.
    pub fn check_repository(&self, file: &RepositoryV1) -> Result<(), KeyError> {
        let keys = &self.secrets.0;
        let ours = file.id == keys.repository
            && file.root_public == keys.root_public
            && file.kem_public == keys.kem_public
            && file.wrap_algorithm == WRAP_X25519_HPKE;
        if ours { Ok(()) } else { Err(KeyError::ForeignRepository { expected: file.id, found: keys.repository }) }
    }

    /// The repository.
    pub fn repository(&self) -> RepositoryId {
        self.secrets.0.repository
    }

    /// What the holder may do.
    pub fn capability(&self) -> Capability {
        self.secrets.0.writer.capability
    }

    /// Refuses a holder that may only write. `what`: what was wanted, after "it cannot".
    pub fn may_read(&self, what: &'static str) -> Result<(), KeyError> {
        if self.capability() == Capability::Write { Err(KeyError::WriteOnly { what }) } else { Ok(()) }
    }

    /// Refuses a holder that may only read. `what`: what was wanted, after "it cannot".
    pub fn may_write(&self, what: &'static str) -> Result<(), KeyError> {
        if self.capability() == Capability::Read { Err(KeyError::ReadOnly { what }) } else { Ok(()) }
    }

    /// Refuses a holder without the full capability. `what`: what was wanted, after "this key may not".
    pub fn may_manage(&self, what: &'static str) -> Result<(), KeyError> {
        if self.capability() == Capability::Full { Ok(()) } else { Err(KeyError::Capability { what }) }
    }

    /// Key of the chunk ids, 32 bytes.
    pub fn id_key(&self) -> &[u8; 32] {
        &self.secrets.0.id_key
    }

    /// Ed25519 public key of the repository's root.
    pub fn root_public(&self) -> &[u8; 32] {
        &self.secrets.0.root_public
    }

    /// X25519 public key to which data keys are wrapped.
    pub fn kem_public(&self) -> &[u8; 32] {
        &self.secrets.0.kem_public
    }

    pub(crate) fn kem_private(&self) -> Option<&[u8; 32]> {
        self.secrets.0.kem_private.as_ref()
    }

    /// Secret of the content-defined chunker.
    pub fn chunker_secret(&self) -> &[u8; 32] {
        &self.secrets.0.chunker_secret
    }

    /// The id of a chunk of this repository.
    pub fn chunk_id(&self, kind: ChunkKind, bytes: &[u8], references: &[Reference]) -> ChunkId {
        chunk_id(self.id_key(), kind, bytes, references)
    }

    /// The certificate of this holder's writer key.
    pub fn writer_certificate(&self) -> &WriterCertificateV1 {
        &self.secrets.0.writer
    }

    /// Proves to a server that this holder has its writer key: a signature over the server's nonce and the repository.
    pub fn sign_session_proof(&self, nonce: &[u8; 32]) -> Result<[u8; 64], KeyError> {
        self.sign(&open_session_proof(nonce, &self.repository()))
    }

    /// Proves to a server that this holder wants an encoded operation: a signature over the server's nonce, the repository and
    /// the operation.
    pub fn sign_manage_proof(&self, nonce: &[u8; 32], operation: &[u8]) -> Result<[u8; 64], KeyError> {
        self.sign(&manage_proof(nonce, &self.repository(), operation))
    }

    /// Tags to replace a snapshot's with, signed. `at_ns`: now, ns since 1970. Needs the full capability.
    pub fn sign_snapshot_tags(
        &self,
        snapshot: SnapshotId,
        tags: Vec<String>,
        at_ns: i64,
    ) -> Result<SnapshotTags, KeyError> {
        self.may_manage("change tags")?;
        let signature = self.sign(&snapshot_tags_signed_part(&self.repository(), &snapshot, at_ns, &tags))?;
        let (writer, signature) = (self.encoded_certificate().into(), signature.to_vec().into());
        Ok(SnapshotTags { snapshot, tags, at_ns, writer, signature })
    }

    /// Whether a holder of the full capability signed these tags.
    pub fn verify_snapshot_tags(&self, tags: &SnapshotTags) -> bool {
        let mut decoder = Decoder::new(&tags.writer, "writer certificate");
        let Ok(writer) = WriterCertificateV1::decode(&mut decoder) else { return false };
        let Ok(signature) = tags.signature.as_slice().try_into() else { return false };
        let signed = snapshot_tags_signed_part(&self.repository(), &tags.snapshot, tags.at_ns, &tags.tags);
        writer.capability == Capability::Full
            && verify_certificate(&writer, &self.repository(), self.root_public())
            && verify(&writer.public_key, &signed, signature)
    }

    /// The certificate of this holder's writer key, 97 bytes.
    pub fn encoded_certificate(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        self.writer_certificate().encode(&mut bytes);
        bytes
    }

    /// Signs with the writer key, whatever its capability: callers ask `may_…` first. Ed25519, 64 bytes.
    pub(crate) fn sign(&self, message: &[u8]) -> Result<[u8; 64], KeyError> {
        signature(&key_pair(&self.secrets.0.writer_seed)?, message)
    }

    /// The plaintext that is sealed into a slot; wiped on drop.
    pub(crate) fn encode(&self) -> Zeroizing<Vec<u8>> {
        Zeroizing::new(self.secrets.0.encode())
    }

    /// From the plaintext of an opened slot.
    pub(crate) fn decode(bytes: &[u8]) -> Result<Self, KeyError> {
        Self::from_plain(KeysetV1::decode(bytes)?)
    }
}

/// Whether the repository's root key signed this certificate.
pub(crate) fn verify_certificate(
    certificate: &WriterCertificateV1,
    repository: &RepositoryId,
    root_public: &[u8; 32],
) -> bool {
    let signed = WriterCertificateV1::signed_part(repository, certificate.capability, &certificate.public_key);
    verify(root_public, &signed, &certificate.signature)
}

/// Whether `signature` over `message` is of `public_key`. Ed25519.
pub(crate) fn verify(public_key: &[u8; 32], message: &[u8], signature: &[u8; 64]) -> bool {
    UnparsedPublicKey::new(&ED25519, public_key).verify(message, signature).is_ok()
}

fn key_pair(seed: &[u8; 32]) -> Result<Ed25519KeyPair, KeyError> {
    Ed25519KeyPair::from_seed_unchecked(seed).map_err(|_| KeyError::Inconsistent { why: "a signing key is malformed" })
}

fn public_half(pair: &Ed25519KeyPair) -> [u8; 32] {
    pair.public_key().as_ref().try_into().unwrap_or([0; 32])
}

fn signature(pair: &Ed25519KeyPair, message: &[u8]) -> Result<[u8; 64], KeyError> {
    pair.sign(message).as_ref().try_into().map_err(|_| KeyError::Inconsistent { why: "a signature has a wrong length" })
}

fn certify(
    root: &Ed25519KeyPair,
    repository: &RepositoryId,
    capability: Capability,
    writer_seed: &[u8; 32],
) -> Result<WriterCertificateV1, KeyError> {
    let public_key = public_half(&key_pair(writer_seed)?);
    let signed = WriterCertificateV1::signed_part(repository, capability, &public_key);
    Ok(WriterCertificateV1 { capability, public_key, signature: signature(root, &signed)? })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keyset() -> Keyset {
        Keyset::create(RepositoryId([1; 16])).unwrap()
    }

    #[test]
    fn a_keyset_reads_back_and_its_parts_belong_together() {
        let keyset = keyset();
        let again = Keyset::decode(&keyset.encode()).unwrap();
        assert_eq!(keyset.chunker_secret(), again.chunker_secret());
        assert_eq!(keyset.id_key(), again.id_key());
        assert_ne!(keyset.chunker_secret(), self::keyset().chunker_secret());
    }

    #[test]
    fn a_keyset_with_an_exchanged_part_is_refused() {
        let plain = || keyset().secrets.0.clone();
        for spoil in [
            |keys: &mut KeysetV1| keys.root_public[0] ^= 1,
            |keys: &mut KeysetV1| keys.kem_public[0] ^= 1,
            |keys: &mut KeysetV1| keys.writer.signature[0] ^= 1,
            |keys: &mut KeysetV1| keys.writer.capability = Capability::Write,
            |keys: &mut KeysetV1| keys.writer_seed = [9; 32],
            |keys: &mut KeysetV1| keys.root_seed = None,
            |keys: &mut KeysetV1| keys.kem_private = None,
            |keys: &mut KeysetV1| keys.repository = RepositoryId([2; 16]),
        ] {
            let mut keys = plain();
            spoil(&mut keys);
            assert!(matches!(Keyset::from_plain(keys), Err(KeyError::Inconsistent { .. })));
        }
    }

    #[test]
    fn s45_a_write_only_key_can_neither_read_nor_certify() {
        let writer = keyset().narrowed(Capability::Write).unwrap();
        assert!(writer.kem_private().is_none());
        assert!(matches!(writer.narrowed(Capability::Full), Err(KeyError::Capability { .. })));
        assert_eq!(writer.capability(), Capability::Write);
        let proof = writer.sign_session_proof(&[7; 32]).unwrap();
        let message = open_session_proof(&[7; 32], &writer.repository());
        assert!(verify(&writer.writer_certificate().public_key, &message, &proof));
    }

    #[test]
    fn s45_a_read_only_key_proves_itself_but_can_neither_write_nor_certify() {
        let full = keyset();
        let reader = full.narrowed(Capability::Read).unwrap();
        assert!(reader.kem_private().is_some());
        let proof = reader.sign_session_proof(&[7; 32]).unwrap();
        let message = open_session_proof(&[7; 32], &reader.repository());
        assert!(verify(&reader.writer_certificate().public_key, &message, &proof));
        assert_ne!(reader.writer_certificate().public_key, full.writer_certificate().public_key);
        assert!(matches!(reader.narrowed(Capability::Read), Err(KeyError::Capability { .. })));
        assert!(reader.sign_snapshot_tags(SnapshotId([1; 32]), Vec::new(), 0).is_err());
    }

    #[test]
    fn each_capability_allows_what_its_name_says() {
        let full = keyset();
        for (capability, reads, writes) in
            [(Capability::Full, true, true), (Capability::Write, false, true), (Capability::Read, true, false)]
        {
            let keyset = full.narrowed(capability).unwrap();
            let again = Keyset::decode(&keyset.encode()).unwrap();
            assert_eq!(again.capability(), capability);
            assert_eq!((again.may_read("x").is_ok(), again.may_write("x").is_ok()), (reads, writes));
            assert_eq!(again.may_manage("x").is_ok(), capability == Capability::Full);
        }
    }

    #[test]
    fn a_repository_file_of_another_root_is_refused() {
        let keyset = keyset();
        let chunking = ChunkingV1 { minimum: 64, average: 64, maximum: 64, block_plaintext: 64 };
        let file = keyset.public_file("main".parse().unwrap(), chunking, 1);
        keyset.check_repository(&file).unwrap();
        let forged = RepositoryV1 { root_public: [0; 32], ..file };
        assert!(matches!(keyset.check_repository(&forged), Err(KeyError::ForeignRepository { .. })));
    }

    #[test]
    fn secrets_do_not_appear_in_debug_output() {
        let keyset = keyset();
        let text = format!("{keyset:?}");
        assert!(!text.contains(&format!("{:?}", keyset.id_key())), "{text}");
        assert!(text.len() < 200);
    }
}
