//! Rows of `snapshots`.

use sqlx::sqlite::SqliteRow;
use sqlx::{Row, Sqlite, Transaction};
use strandline_messages::format::manifest::ManifestV1;
use strandline_messages::format::receipt::ReceiptV1;
use strandline_messages::{DomainId, SnapshotId};

use super::keeping::{self, DeletionRow};
use super::sessions::{Lease, end_lease};
use super::{Catalog, CatalogError, id, signed, sql, unsigned};

/// A snapshot in a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotRow {
    /// Its place in the repository's order of commits.
    pub place: u64,
    /// Its signed manifest.
    pub manifest: Vec<u8>,
    /// The receipt.
    pub receipt: Vec<u8>,
    /// Encoded tags that replace the manifest's.
    pub tags: Option<Vec<u8>>,
    /// Whether nobody can delete it.
    pub protected: bool,
    /// That it was deleted.
    pub deletion: Option<DeletionRow>,
}

/// A snapshot as garbage collection sees it: a root to walk from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct RootRow {
    pub id: SnapshotId,
    pub domain: DomainId,
    pub manifest: Vec<u8>,
}

/// What a commit finds when its transaction has begun.
#[derive(Debug)]
pub(crate) enum CommitState {
    /// Go on; the snapshot gets this place.
    Ready {
        /// From 1.
        order: u64,
    },
    /// The snapshot is there.
    Committed {
        /// Its receipt.
        receipt: Vec<u8>,
    },
    /// The lease has ended or was superseded.
    Fenced,
    /// Blocks were condemned or withdrawn since the check.
    Moved,
}

impl Catalog {
    /// The receipt of a snapshot, if it is committed.
    pub(crate) async fn receipt(
        &self,
        repository: i64,
        snapshot: &SnapshotId,
    ) -> Result<Option<Vec<u8>>, CatalogError> {
        let query = sqlx::query_scalar("SELECT receipt FROM snapshots WHERE repository = ? AND id = ?");
        let query = query.bind(repository).bind(snapshot.as_bytes().as_slice());
        query.fetch_optional(self.pool()).await.map_err(sql("look up a snapshot"))
    }

    /// Up to `limit` snapshots after place `after`, in order: the kept ones, or the deleted ones.
    pub(crate) async fn snapshots(
        &self,
        repository: i64,
        deleted: bool,
        after: u64,
        limit: usize,
    ) -> Result<Vec<SnapshotRow>, CatalogError> {
        let rows: Vec<SqliteRow> = sqlx::query(
            "SELECT place, manifest, receipt, tags, protected, deleted_ns, final_ns, deleted_by, deleted_why \
             FROM snapshots WHERE repository = ? AND (deleted_ns IS NOT NULL) = ? AND place > ? ORDER BY place LIMIT ?",
        )
        .bind(repository)
        .bind(deleted)
        .bind(i64::try_from(after).unwrap_or(i64::MAX))
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(self.pool())
        .await
        .map_err(sql("list the snapshots"))?;
        let row = |row: SqliteRow| {
            let ((place, manifest, receipt, tags, protected), deletion) =
                snapshot_columns(&row).map_err(sql("list the snapshots"))?;
            let (place, protected) = (unsigned(place), protected != 0);
            Ok(SnapshotRow { place, manifest, receipt, tags, protected, deletion: keeping::deletion(deletion)? })
        };
        rows.into_iter().map(row).collect()
    }

    /// The ids of all snapshots of a repository.
    pub(crate) async fn snapshot_ids(&self, repository: i64) -> Result<Vec<SnapshotId>, CatalogError> {
        let rows: Vec<Vec<u8>> = sqlx::query_scalar("SELECT id FROM snapshots WHERE repository = ?")
            .bind(repository)
            .fetch_all(self.pool())
            .await
            .map_err(sql("list the snapshots"))?;
        rows.iter().map(|bytes| id("snapshot id", bytes, SnapshotId::from_slice)).collect()
    }

    /// The writer domain of a snapshot; `None` if there is no such snapshot.
    pub(crate) async fn snapshot_domain(
        &self,
        repository: i64,
        snapshot: &SnapshotId,
    ) -> Result<Option<DomainId>, CatalogError> {
        let query = sqlx::query_scalar("SELECT domain FROM snapshots WHERE repository = ? AND id = ?");
        let query = query.bind(repository).bind(snapshot.as_bytes().as_slice());
        let row: Option<Vec<u8>> = query.fetch_optional(self.pool()).await.map_err(sql("look up a snapshot"))?;
        row.map(|bytes| id("writer domain", &bytes, DomainId::from_slice)).transpose()
    }

    /// How many snapshots a repository keeps, and how many are deleted and not purged.
    pub(crate) async fn snapshot_count(&self, repository: i64) -> Result<(u64, u64), CatalogError> {
        let query =
            "SELECT count(*) FILTER (WHERE deleted_ns IS NULL), count(deleted_ns) FROM snapshots WHERE repository = ?";
        let query = sqlx::query_as(query).bind(repository);
        let (kept, deleted): (i64, i64) = query.fetch_one(self.pool()).await.map_err(sql("count the snapshots"))?;
        Ok((unsigned(kept), unsigned(deleted)))
    }

    /// Every snapshot that is not purged, deleted ones among them, after place `after`, and the count of commits at the same
    /// moment; up to `limit`. The last place is returned, too.
    pub(crate) async fn roots(
        &self,
        repository: i64,
        after: u64,
        limit: usize,
    ) -> Result<(Vec<(u64, RootRow)>, u64), CatalogError> {
        type Row = (i64, Vec<u8>, Vec<u8>, Vec<u8>);
        let doing = "list the snapshots";
        let mut reading = self.pool().begin().await.map_err(sql(doing))?;
        // The first read fixes the moment that both see.
        let commits: i64 = sqlx::query_scalar("SELECT commits FROM repositories WHERE number = ?")
            .bind(repository)
            .fetch_one(&mut *reading)
            .await
            .map_err(sql(doing))?;
        let rows: Vec<Row> = sqlx::query_as(
            "SELECT place, id, domain, manifest FROM snapshots WHERE repository = ? AND place > ? ORDER BY place LIMIT ?",
        )
        .bind(repository)
        .bind(i64::try_from(after).unwrap_or(i64::MAX))
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(&mut *reading)
        .await
        .map_err(sql(doing))?;
        let row = |(place, snapshot, domain, manifest): Row| {
            let id_of = id("snapshot id", &snapshot, SnapshotId::from_slice)?;
            let domain = id("writer domain", &domain, DomainId::from_slice)?;
            Ok((unsigned(place), RootRow { id: id_of, domain, manifest }))
        };
        Ok((rows.into_iter().map(row).collect::<Result<_, CatalogError>>()?, unsigned(commits)))
    }
}

/// Asserts, inside the commit's transaction, that the lease is current and that nothing moved since the check (`published`
/// as it was then; `None` where there is no session, at a start).
pub(crate) async fn commit_state(
    transaction: &mut Transaction<'static, Sqlite>,
    repository: i64,
    snapshot: &SnapshotId,
    lease: Option<(&Lease, u64)>,
) -> Result<CommitState, CatalogError> {
    let doing = "commit a snapshot";
    let receipt: Option<Vec<u8>> = sqlx::query_scalar("SELECT receipt FROM snapshots WHERE repository = ? AND id = ?")
        .bind(repository)
        .bind(snapshot.as_bytes().as_slice())
        .fetch_optional(&mut **transaction)
        .await
        .map_err(sql(doing))?;
    if let Some(receipt) = receipt {
        return Ok(CommitState::Committed { receipt });
    }
    if let Some((lease, published)) = lease {
        let held: Option<i64> = sqlx::query_scalar(
            "SELECT 1 FROM leases l JOIN sessions s ON s.id = l.session \
             WHERE l.session = ? AND l.repository = ? AND l.fence = ? AND l.ended = 0 AND s.state = 'open'",
        )
        .bind(lease.session.as_bytes().as_slice())
        .bind(repository)
        .bind(signed(lease.fence))
        .fetch_optional(&mut **transaction)
        .await
        .map_err(sql(doing))?;
        if held.is_none() {
            return Ok(CommitState::Fenced);
        }
        let now: i64 = sqlx::query_scalar("SELECT published FROM repositories WHERE number = ?")
            .bind(repository)
            .fetch_one(&mut **transaction)
            .await
            .map_err(sql(doing))?;
        if unsigned(now) != published {
            return Ok(CommitState::Moved);
        }
    }
    let last: i64 = sqlx::query_scalar("SELECT last_place FROM repositories WHERE number = ?")
        .bind(repository)
        .fetch_one(&mut **transaction)
        .await
        .map_err(sql(doing))?;
    Ok(CommitState::Ready { order: unsigned(last) + 1 })
}

/// Whether a place in the order of commits is taken.
pub(crate) async fn place_taken(
    transaction: &mut Transaction<'static, Sqlite>,
    repository: i64,
    place: u64,
) -> Result<bool, CatalogError> {
    let query = sqlx::query_scalar("SELECT 1 FROM snapshots WHERE repository = ? AND place = ?");
    let row: Option<i64> = query
        .bind(repository)
        .bind(i64::try_from(place).unwrap_or(i64::MAX))
        .fetch_optional(&mut **transaction)
        .await
        .map_err(sql("commit a snapshot"))?;
    Ok(row.is_some())
}

/// Inserts a snapshot's row.
pub(crate) async fn insert(
    transaction: &mut Transaction<'static, Sqlite>,
    repository: i64,
    manifest: (&ManifestV1, &[u8]),
    receipt: (&ReceiptV1, &[u8]),
) -> Result<(), CatalogError> {
    let (manifest, manifest_bytes) = manifest;
    let (receipt, receipt_bytes) = receipt;
    sqlx::query(
        "INSERT INTO snapshots (repository, id, place, committed_ns, agent, domain, job, host, manifest, receipt) \
         VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
    )
    .bind(repository)
    .bind(receipt.snapshot.as_bytes().as_slice())
    .bind(signed(receipt.order))
    .bind(receipt.committed_ns)
    .bind(receipt.agent.as_bytes().as_slice())
    .bind(manifest.domain().as_bytes().as_slice())
    .bind(manifest.job.as_str())
    .bind(manifest.host.as_str())
    .bind(manifest_bytes)
    .bind(receipt_bytes)
    .execute(&mut **transaction)
    .await
    .map_err(sql("commit a snapshot"))?;
    sqlx::query("UPDATE repositories SET last_place = max(last_place, ?) WHERE number = ?")
        .bind(signed(receipt.order))
        .bind(repository)
        .execute(&mut **transaction)
        .await
        .map_err(sql("commit a snapshot"))?;
    keeping::count_commit(transaction, repository).await
}

type SnapshotColumns = (i64, Vec<u8>, Vec<u8>, Option<Vec<u8>>, i64);
type DeletionColumns = (Option<i64>, Option<i64>, Option<Vec<u8>>, Option<String>);

fn snapshot_columns(row: &SqliteRow) -> Result<(SnapshotColumns, DeletionColumns), sqlx::Error> {
    let kept = (row.try_get(0)?, row.try_get(1)?, row.try_get(2)?, row.try_get(3)?, row.try_get(4)?);
    Ok((kept, (row.try_get(5)?, row.try_get(6)?, row.try_get(7)?, row.try_get(8)?)))
}

/// Records the lease's session as committed, if it is open under this fence, and ends the lease.
pub(crate) async fn mark_committed(
    transaction: &mut Transaction<'static, Sqlite>,
    lease: &Lease,
    receipt: &[u8],
    now_ns: i64,
) -> Result<(), CatalogError> {
    let query = "UPDATE sessions SET state = 'committed', receipt = ?, ended_ns = ? WHERE id = ? AND state = 'open' \
                 AND EXISTS (SELECT 1 FROM leases WHERE session = sessions.id AND fence = ? AND ended = 0)";
    let query = sqlx::query(query).bind(receipt).bind(now_ns);
    let query = query.bind(lease.session.as_bytes().as_slice()).bind(signed(lease.fence));
    let done = query.execute(&mut **transaction).await.map_err(sql("commit a snapshot"))?;
    if done.rows_affected() == 1 { end_lease(transaction, &lease.session).await } else { Ok(()) }
}
