//! Whether a manifest may stand for a snapshot of this repository, as far as can be told without keys.

use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use strandline_messages::DomainId;
use strandline_messages::format::keys::{Capability, WriterCertificateV1};
use strandline_messages::format::manifest::{ManifestV1, SIGNATURE_BYTES};
use strandline_messages::format::repository::RepositoryV1;

/// Decodes a manifest and checks its repository, its writer's certificate, its signature and, where one is given, its domain.
/// The error is a reason for people.
pub(crate) fn verify_manifest(
    repository: &RepositoryV1,
    bytes: &[u8],
    domain: Option<DomainId>,
) -> Result<ManifestV1, String> {
    let manifest = ManifestV1::decode(bytes).map_err(|error| error.to_string())?;
    if manifest.repository != repository.id {
        return Err(format!("the snapshot is of repository {}, not of this one", manifest.repository));
    }
    let writer = &manifest.writer;
    if writer.capability == Capability::Read {
        return Err("the snapshot's writer holds a key that may only read".to_owned());
    }
    let certified = WriterCertificateV1::signed_part(&repository.id, writer.capability, &writer.public_key);
    if !signed_by(&repository.root_public, &certified, &writer.signature) {
        return Err("the snapshot's writer is not certified by this repository's root key".to_owned());
    }
    let signed = bytes.get(..bytes.len().saturating_sub(SIGNATURE_BYTES)).unwrap_or_default();
    if manifest.encode_signed_part() != signed {
        return Err("the snapshot manifest is not in its one canonical form".to_owned());
    }
    if !signed_by(&writer.public_key, signed, &manifest.signature) {
        return Err("the snapshot's signature is not its writer's".to_owned());
    }
    if domain.is_some_and(|domain| domain != manifest.domain()) {
        return Err("the snapshot's writer is not the one that this session was opened for".to_owned());
    }
    Ok(manifest)
}

fn signed_by(key: &[u8; 32], message: &[u8], signature: &[u8; 64]) -> bool {
    UnparsedPublicKey::new(&ED25519, key).verify(message, signature).is_ok()
}
