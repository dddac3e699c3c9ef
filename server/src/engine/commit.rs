//! Committing: from a manifest's bytes to a snapshot that is promised to be restorable.
//!
//! The order of things: the manifest is verified; everything below its roots is checked; then, inside one catalog transaction
//! that holds the write lock, the lease's fence and the count of condemnations are asserted, the manifest file and the receipt
//! file are written, and the rows are inserted. A crash after the files leaves a manifest without a row, which the next start
//! checks like a commit and gives its row.

use std::collections::HashSet;
use std::fs;
use std::sync::Arc;

use bytes::Bytes;
use strandline_actors::runtime::clock;
use strandline_messages::format::manifest::{ManifestV1, snapshot_id};
use strandline_messages::format::receipt::ReceiptV1;
use strandline_messages::{AgentId, ChunkId, SnapshotId, limits};

use super::check::verify_manifest;
use super::completeness::{Checked, Walk, flag_trees};
use super::keeping::Decided;
use super::state::State;
use super::{EngineError, Lease, blocking, on_own_thread};
use crate::catalog::snapshots::{self, CommitState};
use crate::engine::repository::CommitOutcome;
use crate::failpoint;
use crate::storage::{StorageError, files};

/// How often a check is repeated because maintenance got in between.
const ATTEMPTS_MAX: usize = 32;
/// Longest receipt file, bytes.
const RECEIPT_BYTES_MAX: usize = 1024;

/// Commits a manifest for the holder of `lease`.
pub(crate) async fn commit(state: &Arc<State>, lease: &Lease, bytes: Bytes) -> Result<CommitOutcome, EngineError> {
    let verified = {
        let (state, bytes, domain) = (Arc::clone(state), bytes.clone(), lease.domain);
        blocking(move || Ok(verify_manifest(&state.file, &bytes, Some(domain)))).await?
    };
    let manifest = match verified {
        Ok(manifest) => manifest,
        Err(reason) => return Ok(CommitOutcome::Refused { reason }),
    };
    let snapshot = snapshot_id(&bytes);
    let committed = state.common.catalog.receipt(state.number, &snapshot).await?.is_some();
    if !committed {
        if state.common.catalog.is_purged(state.number, &snapshot).await? {
            let reason = "this very snapshot was deleted for good; back up again to make a new one".to_owned();
            return Ok(CommitOutcome::Refused { reason });
        }
        state.assert_current(lease)?;
    }
    for _ in 0..ATTEMPTS_MAX {
        let published = state.common.catalog.published(state.number).await?;
        let check = if committed {
            Checked::Complete
        } else {
            let (state, lease) = (Arc::clone(state), lease.clone());
            let roots = roots(&manifest);
            blocking(move || check(&state, &lease, &roots)).await?
        };
        match check {
            Checked::Complete => {}
            Checked::Missing { ids, more } => return Ok(CommitOutcome::Missing { ids, more }),
            Checked::Refused(reason) => return Ok(CommitOutcome::Refused { reason: reason.to_owned() }),
            Checked::Revive(blocks) => {
                state.revive(lease, &blocks).await?;
                continue;
            }
        }
        let by = Committer::Session { lease, published };
        match publish(state, &manifest, &bytes, snapshot, by).await? {
            Published::Done(receipt) => {
                state.dismiss(&lease.session);
                return Ok(CommitOutcome::Committed { snapshot, receipt });
            }
            Published::Fenced => return Err(EngineError::Fenced { session: lease.session }),
            Published::Moved => {}
        }
    }
    Err(EngineError::Busy { attempts: ATTEMPTS_MAX })
}

fn roots(manifest: &ManifestV1) -> Vec<ChunkId> {
    [manifest.root].into_iter().chain(manifest.errors).collect()
}

/// The pass over what this session sent, then the walk over what is not flagged after it.
fn check(state: &State, lease: &Lease, roots: &[ChunkId]) -> Result<Checked, EngineError> {
    let trees = state.take_trees(&lease.session);
    match flag_trees(state, lease.domain, trees.clone()) {
        Ok(unfinished) => state.put_trees(&lease.session, unfinished),
        Err(error) => {
            state.put_trees(&lease.session, trees);
            return Err(error);
        }
    }
    Walk::check(state, lease.domain, Some(lease.epoch), roots)
}

enum Committer<'a> {
    /// `published` as it was before the check.
    Session { lease: &'a Lease, published: u64 },
    /// The start of the engine found a manifest without a row.
    Start,
}

enum Published {
    Done(Vec<u8>),
    Fenced,
    Moved,
}

async fn publish(
    state: &Arc<State>,
    manifest: &ManifestV1,
    bytes: &Bytes,
    snapshot: SnapshotId,
    by: Committer<'_>,
) -> Result<Published, EngineError> {
    let number = state.number;
    let lease = match by {
        Committer::Session { lease, published } => Some((lease, published)),
        Committer::Start => None,
    };
    let mut transaction = state.common.catalog.begin().await?;
    let order = match snapshots::commit_state(&mut transaction, number, &snapshot, lease).await? {
        CommitState::Ready { order } => order,
        CommitState::Fenced => return Ok(Published::Fenced),
        CommitState::Moved => return Ok(Published::Moved),
        CommitState::Committed { receipt } => {
            if let Some((lease, _)) = lease {
                snapshots::mark_committed(&mut transaction, lease, &receipt, clock::wall_ns()).await?;
            }
            transaction.commit().await.map_err(crate::catalog::sql("commit a snapshot"))?;
            return Ok(Published::Done(receipt));
        }
    };
    let found = {
        let state = Arc::clone(state);
        on_own_thread(move || Ok(read_receipt(&state, &snapshot))).await?
    };
    let kept = match found {
        Some(receipt) if !snapshots::place_taken(&mut transaction, number, receipt.order).await? => Some(receipt),
        _ => None,
    };
    let (is_new, is_kept) = (lease.is_some(), kept.is_some());
    let agent = lease.map_or(AgentId([0; 16]), |(lease, _)| lease.agent);
    let receipt =
        kept.unwrap_or_else(|| state.common.key.receipt(state.file.id, snapshot, order, clock::wall_ns(), agent));
    let encoded = receipt.encode();
    {
        let (state, bytes, encoded) = (Arc::clone(state), bytes.clone(), encoded.clone());
        on_own_thread(move || {
            // What a start found need not be written again: where nothing can be written its row is made all the same.
            if is_new {
                files::write_atomically(&state.paths.manifest(&snapshot), &bytes)?;
                failpoint::reached("snapshot/manifest-written");
            }
            if is_kept {
                files::sync_directory(&state.paths.snapshots())?;
            } else {
                files::write_atomically(&state.paths.receipt(&snapshot), &encoded)?;
                failpoint::reached("snapshot/receipt-written");
            }
            Ok(())
        })
        .await?;
    }
    snapshots::insert(&mut transaction, number, (manifest, bytes), (&receipt, &encoded)).await?;
    if let Some((lease, _)) = lease {
        snapshots::mark_committed(&mut transaction, lease, &encoded, clock::wall_ns()).await?;
    }
    transaction.commit().await.map_err(crate::catalog::sql("commit a snapshot"))?;
    Ok(Published::Done(encoded))
}

/// The receipt file of a snapshot, if it is one.
fn read_receipt(state: &State, snapshot: &SnapshotId) -> Option<ReceiptV1> {
    let bytes = files::read_small(&state.paths.receipt(snapshot), RECEIPT_BYTES_MAX).ok()??;
    let receipt = ReceiptV1::decode(&bytes).ok()?;
    (receipt.snapshot == *snapshot && receipt.repository == state.file.id && receipt.order > 0).then_some(receipt)
}

/// Gives every manifest file without a row its row, in the order of their receipts. A receipt proves that the snapshot was
/// committed once: it gets its row whatever has become of its chunks, so that what is left of it is kept. Without one, all that
/// it refers to must be known.
/// What was purged stays so.
pub(crate) async fn restore_rows(state: &Arc<State>, decided: &Decided) -> Result<(), EngineError> {
    let mut rows: HashSet<SnapshotId> = state.common.catalog.snapshot_ids(state.number).await?.into_iter().collect();
    rows.extend(decided.purged.keys());
    let orphans = {
        let state = Arc::clone(state);
        blocking(move || list_orphans(&state, &rows)).await?
    };
    for snapshot in orphans {
        let checked = {
            let state = Arc::clone(state);
            blocking(move || check_orphan(&state, &snapshot)).await?
        };
        match checked {
            Ok((manifest, bytes)) => {
                match publish(state, &manifest, &bytes, snapshot, Committer::Start).await {
                    // Nobody was told that it was committed: that is what the receipt would say.
                    Err(EngineError::Storage(StorageError::Io { source, .. })) if files::is_no_room(&source) => {
                        tracing::warn!(%snapshot, error = %source, "a manifest without a receipt waits for room to write one");
                    }
                    other => {
                        other?;
                        tracing::info!(%snapshot, "a snapshot found in the storage was added to the catalog");
                    }
                }
            }
            Err(reason) => {
                tracing::warn!(%snapshot, reason, "a manifest without a row is not a complete snapshot; it was left as it is");
            }
        }
    }
    Ok(())
}

fn list_orphans(state: &State, rows: &HashSet<SnapshotId>) -> Result<Vec<SnapshotId>, EngineError> {
    let directory = state.paths.snapshots();
    let mut orphans = Vec::new();
    for entry in fs::read_dir(&directory).map_err(StorageError::io("list", &directory))? {
        let name = entry.map_err(StorageError::io("list", &directory))?.file_name();
        let id = name.to_str().and_then(|name| name.strip_suffix(".manifest")).and_then(|hex| hex.parse().ok());
        if let Some(snapshot) = id
            && !rows.contains(&snapshot)
        {
            let order = read_receipt(state, &snapshot).map_or(u64::MAX, |receipt| receipt.order);
            orphans.push((order, snapshot));
        }
    }
    orphans.sort_unstable();
    Ok(orphans.into_iter().map(|(_, snapshot)| snapshot).collect())
}

fn check_orphan(state: &State, snapshot: &SnapshotId) -> Result<Result<(ManifestV1, Bytes), String>, EngineError> {
    let read = files::read_small(&state.paths.manifest(snapshot), limits::MANIFEST_BYTES_MAX);
    let bytes = match read {
        Ok(bytes) => bytes.unwrap_or_default(),
        Err(StorageError::Format { source, .. }) => return Ok(Err(source.to_string())),
        Err(error) => return Err(error.into()),
    };
    if snapshot_id(&bytes) != *snapshot {
        return Ok(Err("its bytes are not those its name promises".to_owned()));
    }
    let manifest = match verify_manifest(&state.file, &bytes, None) {
        Ok(manifest) => manifest,
        Err(reason) => return Ok(Err(reason)),
    };
    if read_receipt(state, snapshot).is_some() {
        return Ok(Ok((manifest, bytes.into())));
    }
    Ok(match Walk::check(state, manifest.domain(), None, &roots(&manifest))? {
        Checked::Complete => Ok((manifest, bytes.into())),
        Checked::Missing { ids, .. } => Err(format!("{} chunks or more are missing", ids.len())),
        Checked::Revive(_) => Err("it relies on blocks that are being freed".to_owned()),
        Checked::Refused(reason) => Err(reason.to_owned()),
    })
}
