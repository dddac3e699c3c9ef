//! Snapshot manifests: sealing their details, signing, and checking who wrote them.

use aws_lc_rs::aead::Aad;
use strandline_messages::format::FormatError;
use strandline_messages::format::cursor::check_limit;
use strandline_messages::format::keys::Capability;
use strandline_messages::format::manifest::{DetailsV1, ManifestV1, Totals};
use strandline_messages::{ChunkId, RepositoryId, SnapshotId, limits};
use zeroize::Zeroizing;

use super::data_key::{DETAILS, DataKey, zero_nonce};
use super::{OpenError, SealError};
use crate::keys::{Keyset, random, verify, verify_certificate};

/// Most bytes of encoded details, so that the manifest with the longest labels and tags stays within its limit.
const DETAILS_BYTES_MAX: usize = 40 << 10;

/// What a backup says of its snapshot, readable by the server. Times in ns since 1970 by the agent's clock.
#[derive(Clone, Debug)]
pub struct ManifestFields {
    /// Top node of the root directory.
    pub root: ChunkId,
    /// Top node of the error list, if anything could not be saved.
    pub errors: Option<ChunkId>,
    /// The snapshot that the file cache was made by.
    pub parent: Option<SnapshotId>,
    /// Start of the run.
    pub started_ns: i64,
    /// End of the scan.
    pub finished_ns: i64,
    /// Job label, may be empty; at most 64 bytes.
    pub job: String,
    /// Host label; at most 255 bytes.
    pub host: String,
    /// Tags, at most 64 of 256 bytes; sorted here.
    pub tags: Vec<String>,
    /// Counts.
    pub totals: Totals,
}

/// Seals the details under the session's data key and signs the manifest with the writer key.
///
/// Details too long for a manifest are shortened, with a note where: a long list of paths must not fail a backup.
pub fn sign_manifest(
    keyset: &Keyset,
    data_key: &DataKey,
    fields: ManifestFields,
    details: &DetailsV1,
) -> Result<Vec<u8>, SealError> {
    keyset.may_write("save snapshots")?;
    check_fields(&fields)?;
    let mut tags = fields.tags;
    tags.sort();
    tags.dedup();
    let mut manifest = ManifestV1 {
        repository: keyset.repository(),
        root: fields.root,
        errors: fields.errors,
        parent: fields.parent,
        started_ns: fields.started_ns,
        finished_ns: fields.finished_ns,
        job: fields.job,
        host: fields.host,
        tags,
        totals: fields.totals,
        writer: keyset.writer_certificate().clone(),
        wrap_algorithm: data_key.wrap_algorithm(),
        wrapped_key: data_key.wrapped().to_vec(),
        salt: [0; 32],
        commitment: [0; 32],
        sealed_details: Vec::new(),
        signature: [0; 64],
    };
    let mut sealed = shortened(details).encode();
    manifest.salt = data_key.salt(DETAILS, &random()?, &[&manifest.encode_visible(), &sealed]);
    let derived = data_key.derive(DETAILS, &manifest.salt);
    manifest.commitment = derived.commitment;
    let refused = SealError::Crypto { what: "the details of the snapshot cannot be encrypted" };
    let sealing = derived
        .cipher()
        .map(|cipher| cipher.seal_in_place_append_tag(zero_nonce(), Aad::from(manifest.encode_visible()), &mut sealed));
    match sealing {
        Some(Ok(())) => manifest.sealed_details = sealed,
        _ => return Err(refused),
    }
    manifest.signature = keyset.sign(&manifest.encode_signed_part())?;
    let bytes = manifest.encode();
    check_limit("snapshot manifest", bytes.len() as u64, limits::MANIFEST_BYTES_MAX)?;
    Ok(bytes)
}

/// Reads a manifest, checks certificate and signature against the keyset's root, and opens the details.
pub fn open_manifest(keyset: &Keyset, bytes: &[u8]) -> Result<(ManifestV1, DetailsV1), OpenError> {
    let what = "the snapshot's details";
    let manifest = verify_manifest(&keyset.repository(), keyset.root_public(), bytes)?;
    let data_key = DataKey::unwrap(keyset, manifest.wrap_algorithm, &manifest.wrapped_key, what)?;
    let derived = data_key.derive(DETAILS, &manifest.salt);
    if !derived.commits_to(&manifest.commitment) {
        return Err(OpenError::Commitment { what });
    }
    let cipher = derived.cipher().ok_or(OpenError::Unwrap { what })?;
    let mut buffer = Zeroizing::new(manifest.sealed_details.clone());
    let plain = cipher
        .open_in_place(zero_nonce(), Aad::from(manifest.encode_visible()), &mut buffer)
        .map_err(|_| OpenError::Tag { what })?;
    let details = DetailsV1::decode(plain)?;
    Ok((manifest, details))
}

/// Reads a manifest and checks, without any secret, that a certified writer of the repository signed it.
pub fn verify_manifest(
    repository: &RepositoryId,
    root_public: &[u8; 32],
    bytes: &[u8],
) -> Result<ManifestV1, OpenError> {
    let manifest = ManifestV1::decode(bytes)?;
    if manifest.repository != *repository {
        let found = manifest.repository;
        return Err(OpenError::ForeignRepository { what: "snapshot manifest", expected: *repository, found });
    }
    if !verify_certificate(&manifest.writer, repository, root_public) {
        return Err(OpenError::Signature { why: "its writer is not certified by the repository's root key" });
    }
    if manifest.writer.capability == Capability::Read {
        return Err(OpenError::Signature { why: "its writer is certified for reading only" });
    }
    if !verify(&manifest.writer.public_key, &manifest.encode_signed_part(), &manifest.signature) {
        return Err(OpenError::Signature { why: "its signature does not match its bytes" });
    }
    Ok(manifest)
}

fn check_fields(fields: &ManifestFields) -> Result<(), FormatError> {
    check_limit("job label", fields.job.len() as u64, limits::NAME_BYTES_MAX)?;
    check_limit("host label", fields.host.len() as u64, limits::FILE_NAME_BYTES_MAX)?;
    check_limit("tags", fields.tags.len() as u64, limits::TAGS_MAX)?;
    for tag in &fields.tags {
        check_limit("tag", tag.len() as u64, limits::TAG_BYTES_MAX)?;
    }
    Ok(())
}

fn shortened(details: &DetailsV1) -> DetailsV1 {
    let mut details = details.clone();
    if details.encode().len() <= DETAILS_BYTES_MAX {
        return details;
    }
    for text in [&mut details.user, &mut details.system, &mut details.program, &mut details.command] {
        if text.len() > 2048 {
            text.truncate(text.floor_char_boundary(2048));
            text.push('…');
        }
    }
    let more = |left: usize| format!("… and {left} more");
    let kept = fitting(details.excludes.iter().map(String::len), 8 << 10);
    if kept < details.excludes.len() {
        let left = details.excludes.len() - kept;
        details.excludes.truncate(kept);
        details.excludes.push(more(left));
    }
    let kept = fitting(details.paths.iter().map(Vec::len), 20 << 10);
    if kept < details.paths.len() {
        let left = details.paths.len() - kept;
        details.paths.truncate(kept);
        details.paths.push(more(left).into_bytes());
    }
    details
}

/// How many strings of these lengths fit into `bytes` with their length prefixes.
fn fitting(lengths: impl Iterator<Item = usize>, bytes: usize) -> usize {
    let mut left = bytes;
    lengths
        .take_while(|length| match left.checked_sub(length.saturating_add(3)) {
            Some(rest) => {
                left = rest;
                true
            }
            None => false,
        })
        .count()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::keys::KeyError;

    fn keyset() -> Keyset {
        Keyset::create(RepositoryId([1; 16])).unwrap()
    }

    fn fields() -> ManifestFields {
        ManifestFields {
            root: ChunkId([2; 32]),
            errors: Some(ChunkId([3; 32])),
            parent: None,
            started_ns: 5,
            finished_ns: 6,
            job: "nightly".into(),
            host: "höst".into(),
            tags: vec!["b".into(), "a".into()],
            totals: Totals { files: 3, ..Totals::default() },
        }
    }

    fn details() -> DetailsV1 {
        DetailsV1 { paths: vec![b"/home/\xff".to_vec()], command: "strand backup".into(), ..DetailsV1::default() }
    }

    fn signed(keyset: &Keyset) -> Vec<u8> {
        sign_manifest(keyset, &DataKey::generate(keyset).unwrap(), fields(), &details()).unwrap()
    }

    #[test]
    fn a_signed_manifest_opens_to_its_details() {
        let keyset = keyset();
        let (manifest, details) = open_manifest(&keyset, &signed(&keyset)).unwrap();
        assert_eq!(details, self::details());
        assert_eq!(manifest.tags, ["a", "b"]);
        assert_eq!(manifest.root, ChunkId([2; 32]));
    }

    #[test]
    fn names_and_paths_are_not_readable_in_a_manifest() {
        let bytes = signed(&keyset());
        assert!(!bytes.windows(6).any(|window| window == b"/home/"));
    }

    #[test]
    fn every_flipped_byte_of_a_manifest_is_found() {
        let keyset = keyset();
        let good = signed(&keyset);
        for place in 0..good.len() {
            let mut bad = good.clone();
            bad[place] ^= 1;
            assert!(open_manifest(&keyset, &bad).is_err(), "byte {place}");
        }
    }

    #[test]
    fn a_manifest_of_an_uncertified_or_reading_writer_is_refused() {
        let keyset = keyset();
        let stranger = self::keyset();
        let bytes = signed(&stranger);
        assert!(matches!(open_manifest(&keyset, &bytes), Err(OpenError::Signature { .. })));
        let reader = keyset.narrowed(Capability::Read).unwrap();
        let data_key = DataKey::generate(&reader).unwrap();
        assert!(matches!(
            sign_manifest(&reader, &data_key, fields(), &details()),
            Err(SealError::Key(KeyError::ReadOnly { .. }))
        ));
    }

    #[test]
    fn a_write_only_agents_snapshot_is_readable_by_the_full_key_alone() {
        let full = keyset();
        let writer = full.narrowed(Capability::Write).unwrap();
        let bytes = signed(&writer);
        open_manifest(&full, &bytes).unwrap();
        assert_eq!(open_manifest(&writer, &bytes).unwrap_err(), OpenError::NoReadCapability);
        let manifest = verify_manifest(&writer.repository(), writer.root_public(), &bytes).unwrap();
        assert_ne!(manifest.domain(), strandline_messages::DomainId::FULL);
    }

    #[test]
    fn details_too_long_for_a_manifest_are_shortened_with_a_note() {
        let keyset = keyset();
        let many = DetailsV1 {
            paths: (0..100_000).map(|i| format!("/some/path/{i}").into_bytes()).collect(),
            excludes: vec!["é".repeat(200); 3000],
            command: "é".repeat(100_000),
            ..DetailsV1::default()
        };
        let longest =
            ManifestFields { host: "h".repeat(255), tags: (0..64).map(|i| format!("{i:0256}")).collect(), ..fields() };
        let bytes = sign_manifest(&keyset, &DataKey::generate(&keyset).unwrap(), longest, &many).unwrap();
        assert!(bytes.len() <= limits::MANIFEST_BYTES_MAX);
        let (_, details) = open_manifest(&keyset, &bytes).unwrap();
        assert!(details.paths.last().unwrap().ends_with(b"more"));
        assert!(details.excludes.last().unwrap().ends_with("more"));
        assert!(details.command.ends_with('…'));
    }

    #[test]
    fn labels_beyond_their_limits_are_refused() {
        let keyset = keyset();
        let data_key = DataKey::generate(&keyset).unwrap();
        let long = ManifestFields { host: "h".repeat(256), ..fields() };
        assert!(matches!(sign_manifest(&keyset, &data_key, long, &details()), Err(SealError::Format(_))));
    }
}
