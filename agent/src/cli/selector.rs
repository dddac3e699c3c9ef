//! Which snapshot is meant: an id or its beginning, `latest`, `latest~N`, and optionally `:PATH`.

use anyhow::{anyhow, bail};
use strandline_messages::SnapshotId;
use strandline_messages::format::keys::Capability;
use strandline_messages::format::manifest::{DetailsV1, ManifestV1, snapshot_id};
use strandline_messages::wire::manage::Deletion;

use super::repository::Opened;
use crate::keys::Keyset;
use crate::net::SnapshotListing;
use crate::seal::{OpenError, open_manifest, verify_manifest};

/// A snapshot whose signature was verified and whose details were opened, if the key may read.
#[derive(Clone, Debug)]
pub struct Snapshot {
    /// Its id.
    pub id: SnapshotId,
    /// Its place in the order of commits.
    pub order: u64,
    /// When the server committed it, ns since 1970.
    pub committed_ns: i64,
    /// The manifest.
    pub manifest: ManifestV1,
    /// What only holders of a key that reads may know; empty for others.
    pub details: DetailsV1,
    /// Whether the details were opened: not if the key may only write.
    pub details_opened: bool,
    /// Its tags: the manifest's, or those that a holder of the full capability has put in their place.
    pub tags: Vec<String>,
    /// Nobody can delete it.
    pub protected: bool,
    /// That it was deleted.
    pub deletion: Option<Deletion>,
}

/// All snapshots, oldest first. One that cannot be verified is reported and left out.
pub async fn all(opened: &Opened) -> anyhow::Result<Vec<Snapshot>> {
    listed(opened, false).await
}

/// The deleted snapshots that can still be brought back, oldest first.
pub async fn deleted(opened: &Opened) -> anyhow::Result<Vec<Snapshot>> {
    listed(opened, true).await
}

async fn listed(opened: &Opened, deleted: bool) -> anyhow::Result<Vec<Snapshot>> {
    let listed = opened.server.client.snapshots(&opened.server.name, deleted).await?;
    Ok(listed.into_iter().filter_map(|listing| verified(&opened.keyset, listing)).collect())
}

fn verified(keyset: &Keyset, listing: SnapshotListing) -> Option<Snapshot> {
    let id = snapshot_id(&listing.manifest);
    match open(keyset, &listing.manifest) {
        Ok((manifest, details)) => {
            let replaced = listing.tags.filter(|tags| {
                let genuine = keyset.verify_snapshot_tags(tags) && tags.snapshot == id;
                if !genuine {
                    tracing::error!(snapshot = %id.short(), "changed tags are not signed by a full key and are ignored");
                }
                genuine
            });
            Some(Snapshot {
                id,
                order: listing.order,
                committed_ns: listing.receipt.committed_ns,
                tags: replaced.map_or_else(|| manifest.tags.clone(), |tags| tags.tags),
                manifest,
                details_opened: details.is_some(),
                details: details.unwrap_or_default(),
                protected: listing.protected,
                deletion: listing.deletion,
            })
        }
        Err(error) => {
            tracing::error!(snapshot = %id.short(), %error, "a snapshot cannot be trusted and is left out; others are intact");
            None
        }
    }
}

/// The verified manifest, and the details if the key may read them.
fn open(keyset: &Keyset, bytes: &[u8]) -> Result<(ManifestV1, Option<DetailsV1>), OpenError> {
    if keyset.capability() == Capability::Write {
        return Ok((verify_manifest(&keyset.repository(), keyset.root_public(), bytes)?, None));
    }
    open_manifest(keyset, bytes).map(|(manifest, details)| (manifest, Some(details)))
}

/// Splits `SNAPSHOT[:PATH]`; the path comes without leading `/`.
pub fn split(text: &str) -> (&str, Vec<u8>) {
    match text.split_once(':') {
        Some((snapshot, path)) => (snapshot, path.trim_matches('/').as_bytes().to_vec()),
        None => (text, Vec::new()),
    }
}

/// The one snapshot that is meant.
pub async fn one(opened: &Opened, wanted: &str) -> anyhow::Result<Snapshot> {
    choose(&all(opened).await?, wanted).cloned()
}

/// Those of `snapshots` (oldest first) that are meant, each once, in the order of `wanted`.
pub fn several<'a>(snapshots: &'a [Snapshot], wanted: &[String]) -> anyhow::Result<Vec<&'a Snapshot>> {
    let mut chosen: Vec<&Snapshot> = Vec::new();
    for wanted in wanted {
        let one = choose(snapshots, wanted)?;
        if chosen.iter().all(|other| other.id != one.id) {
            chosen.push(one);
        }
    }
    Ok(chosen)
}

fn choose<'a>(snapshots: &'a [Snapshot], wanted: &str) -> anyhow::Result<&'a Snapshot> {
    if let Some(rest) = wanted.strip_prefix("latest") {
        let back: usize = match rest.strip_prefix('~') {
            None if rest.is_empty() => 0,
            Some(number) => number.parse().map_err(|_| anyhow!("`{wanted}`: write latest or latest~N"))?,
            None => bail!("`{wanted}`: write latest or latest~N"),
        };
        let count = snapshots.len();
        return snapshots.iter().rev().nth(back).ok_or_else(|| {
            anyhow!("there are {count} snapshots, so there is no {wanted}; `strand snapshots` lists them")
        });
    }
    if wanted.len() < 4 || !wanted.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        bail!("`{wanted}` is no snapshot: give at least 4 hexadecimal digits of an id, or latest, or latest~N");
    }
    let wanted = wanted.to_ascii_lowercase();
    let mut found = snapshots.iter().filter(|snapshot| snapshot.id.to_string().starts_with(&wanted));
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one),
        (Some(_), Some(_)) => bail!("several snapshots begin with `{wanted}`: give more digits"),
        (None, _) => bail!("no snapshot begins with `{wanted}`; `strand snapshots` lists them"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_may_follow_the_snapshot() {
        assert_eq!(split("latest"), ("latest", vec![]));
        assert_eq!(split("ab12:/etc/passwd"), ("ab12", b"etc/passwd".to_vec()));
        assert_eq!(split("latest~2:/"), ("latest~2", vec![]));
    }

    #[test]
    fn what_cannot_be_meant_is_explained() {
        for bad in ["latest", "latest~x", "latestx", "ab", "zzzz", "abcd"] {
            assert!(choose(&[], bad).is_err(), "{bad}");
        }
    }
}
