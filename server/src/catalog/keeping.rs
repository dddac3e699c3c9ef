//! What becomes of snapshots after their commit: columns of `snapshots` and `repositories`, and the table `purged`.

use sqlx::SqliteConnection;
use strandline_messages::{AgentId, SnapshotId};

use super::{Catalog, CatalogError, Write, id, signed, sql, unsigned};
use crate::engine::settings::RepositorySettings;

/// A deletion that can still be taken back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeletionRow {
    /// When, ns since 1970.
    pub deleted_ns: i64,
    /// From when on it is final, ns since 1970.
    pub final_ns: i64,
    /// Who asked; zero: the server.
    pub agent: AgentId,
    /// Why, for people.
    pub reason: String,
}

/// What stands in the way of a deletion, and what purging needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct KeptRow {
    pub place: u64,
    pub committed_ns: i64,
    pub protected: bool,
    pub deletion: Option<DeletionRow>,
}

type DeletionColumns = (Option<i64>, Option<i64>, Option<Vec<u8>>, Option<String>);

/// A deletion from its columns; `None` if the snapshot is kept.
pub(super) fn deletion(columns: DeletionColumns) -> Result<Option<DeletionRow>, CatalogError> {
    let (Some(deleted_ns), final_ns, agent, reason) = columns else { return Ok(None) };
    Ok(Some(DeletionRow {
        deleted_ns,
        final_ns: final_ns.unwrap_or(i64::MAX),
        agent: id("agent id", &agent.unwrap_or_default(), AgentId::from_slice)?,
        reason: reason.unwrap_or_default(),
    }))
}

impl Catalog {
    /// The settings of a repository.
    pub(crate) async fn settings(&self, repository: i64) -> Result<RepositorySettings, CatalogError> {
        let query = sqlx::query_scalar("SELECT settings FROM repositories WHERE number = ?").bind(repository);
        let text: String = query.fetch_one(self.pool()).await.map_err(sql("read the settings"))?;
        serde_json::from_str(&text).map_err(|_| CatalogError::Impossible { what: "settings of a repository" })
    }

    /// Snapshots whose deletion has become final by `now_ns`, or all deleted ones.
    pub(crate) async fn purgeable(
        &self,
        repository: i64,
        now_ns: i64,
        all: bool,
    ) -> Result<Vec<SnapshotId>, CatalogError> {
        let query = "SELECT id FROM snapshots WHERE repository = ? AND deleted_ns IS NOT NULL AND (? OR final_ns <= ?) \
                     ORDER BY place";
        let rows: Vec<Vec<u8>> = sqlx::query_scalar(query)
            .bind(repository)
            .bind(all)
            .bind(now_ns)
            .fetch_all(self.pool())
            .await
            .map_err(sql("list the deleted snapshots"))?;
        rows.iter().map(|bytes| id("snapshot id", bytes, SnapshotId::from_slice)).collect()
    }

    /// Whether a snapshot that can still be brought back was deleted; `None` if there is none.
    pub(crate) async fn is_deleted(
        &self,
        repository: i64,
        snapshot: &SnapshotId,
    ) -> Result<Option<bool>, CatalogError> {
        let query = sqlx::query_scalar("SELECT deleted_ns IS NOT NULL FROM snapshots WHERE repository = ? AND id = ?");
        let query = query.bind(repository).bind(snapshot.as_bytes().as_slice());
        query.fetch_optional(self.pool()).await.map_err(sql("look up a snapshot"))
    }

    /// Whether a snapshot was purged.
    pub(crate) async fn is_purged(&self, repository: i64, snapshot: &SnapshotId) -> Result<bool, CatalogError> {
        let query = sqlx::query_scalar("SELECT 1 FROM purged WHERE repository = ? AND id = ?");
        let query = query.bind(repository).bind(snapshot.as_bytes().as_slice());
        let row: Option<i64> = query.fetch_optional(self.pool()).await.map_err(sql("look up a snapshot"))?;
        Ok(row.is_some())
    }
}

/// What is known of a snapshot; `None` if there is none.
pub(crate) async fn kept(
    transaction: &mut Write,
    repository: i64,
    snapshot: &SnapshotId,
) -> Result<Option<KeptRow>, CatalogError> {
    type Row = (i64, i64, i64, Option<i64>, Option<i64>, Option<Vec<u8>>, Option<String>);
    let row: Option<Row> = sqlx::query_as(
        "SELECT place, committed_ns, protected, deleted_ns, final_ns, deleted_by, deleted_why FROM snapshots \
         WHERE repository = ? AND id = ?",
    )
    .bind(repository)
    .bind(snapshot.as_bytes().as_slice())
    .fetch_optional(&mut ***transaction)
    .await
    .map_err(sql("look up a snapshot"))?;
    row.map(|(place, committed_ns, protected, deleted_ns, final_ns, agent, reason)| {
        let deletion = deletion((deleted_ns, final_ns, agent, reason))?;
        Ok(KeptRow { place: unsigned(place), committed_ns, protected: protected != 0, deletion })
    })
    .transpose()
}

/// Marks a snapshot as deleted, or takes that back (`None`), which counts as a commit.
pub(crate) async fn set_deletion(
    connection: &mut SqliteConnection,
    repository: i64,
    snapshot: &SnapshotId,
    deletion: Option<&DeletionRow>,
) -> Result<(), CatalogError> {
    let doing = "delete a snapshot or bring it back";
    sqlx::query(
        "UPDATE snapshots SET deleted_ns = ?, final_ns = ?, deleted_by = ?, deleted_why = ? WHERE repository = ? AND id = ?",
    )
    .bind(deletion.map(|deletion| deletion.deleted_ns))
    .bind(deletion.map(|deletion| deletion.final_ns))
    .bind(deletion.map(|deletion| deletion.agent.as_bytes().as_slice()))
    .bind(deletion.map(|deletion| deletion.reason.as_str()))
    .bind(repository)
    .bind(snapshot.as_bytes().as_slice())
    .execute(&mut *connection)
    .await
    .map_err(sql(doing))?;
    if deletion.is_none() { count_commit(connection, repository).await } else { Ok(()) }
}

/// Something came to be referred to: a condemnation whose mark has not seen it will fail.
pub(super) async fn count_commit(connection: &mut SqliteConnection, repository: i64) -> Result<(), CatalogError> {
    let query = sqlx::query("UPDATE repositories SET commits = commits + 1 WHERE number = ?").bind(repository);
    query.execute(connection).await.map(|_| ()).map_err(sql("count a commit"))
}

/// Protects a snapshot from deletion, or no longer.
pub(crate) async fn set_protected(
    connection: &mut SqliteConnection,
    repository: i64,
    snapshot: &SnapshotId,
    protected: bool,
) -> Result<(), CatalogError> {
    let query = sqlx::query("UPDATE snapshots SET protected = ? WHERE repository = ? AND id = ?");
    let query = query.bind(protected).bind(repository).bind(snapshot.as_bytes().as_slice());
    query.execute(connection).await.map(|_| ()).map_err(sql("protect a snapshot"))
}

/// Replaces the tags of a snapshot; `tags` is what is listed, encoded.
pub(crate) async fn set_tags(
    connection: &mut SqliteConnection,
    repository: i64,
    snapshot: &SnapshotId,
    tags: &[u8],
) -> Result<(), CatalogError> {
    let query = sqlx::query("UPDATE snapshots SET tags = ? WHERE repository = ? AND id = ?");
    let query = query.bind(tags).bind(repository).bind(snapshot.as_bytes().as_slice());
    query.execute(connection).await.map(|_| ()).map_err(sql("change tags"))
}

/// Replaces a repository's settings.
pub(crate) async fn set_settings(
    connection: &mut SqliteConnection,
    repository: i64,
    settings: &RepositorySettings,
) -> Result<(), CatalogError> {
    let text = serde_json::to_string(settings).map_err(|_| CatalogError::Impossible { what: "settings" })?;
    let query = sqlx::query("UPDATE repositories SET settings = ? WHERE number = ?").bind(text).bind(repository);
    query.execute(connection).await.map(|_| ()).map_err(sql("change the settings"))
}

/// Forgets a snapshot for good and remembers that.
pub(crate) async fn purge(
    connection: &mut SqliteConnection,
    repository: i64,
    snapshot: &SnapshotId,
    place: u64,
    now_ns: i64,
) -> Result<(), CatalogError> {
    let doing = "purge a snapshot";
    let bytes = snapshot.as_bytes().as_slice();
    let row = sqlx::query("DELETE FROM snapshots WHERE repository = ? AND id = ?").bind(repository).bind(bytes);
    row.execute(&mut *connection).await.map_err(sql(doing))?;
    let gone = sqlx::query("INSERT INTO purged (repository, id, purged_ns) VALUES (?, ?, ?) ON CONFLICT DO NOTHING");
    gone.bind(repository).bind(bytes).bind(now_ns).execute(&mut *connection).await.map_err(sql(doing))?;
    let place_kept = sqlx::query("UPDATE repositories SET last_place = max(last_place, ?) WHERE number = ?");
    place_kept.bind(signed(place)).bind(repository).execute(connection).await.map(|_| ()).map_err(sql(doing))
}
