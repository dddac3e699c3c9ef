//! Rows of `verified` and `maintenance`.

use std::collections::HashMap;

use super::{Catalog, CatalogError, number, sql};

/// How far a pack was verified: blocks before `done_offset` at `this_ns`, the others at `last_ns` (0: never), ns since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct VerifiedRow {
    /// Bytes from the pack's start.
    pub done_offset: u32,
    /// When the pass was under way that came so far.
    pub this_ns: i64,
    /// When the pass before it was under way.
    pub last_ns: i64,
}

/// How a job of maintenance last came to its end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MaintenanceRow {
    /// Which job.
    pub job: String,
    /// When, ns since 1970.
    pub finished_ns: i64,
    /// Whether it failed.
    pub failed: bool,
    /// What it said: JSON if it came through, a text for people if it failed.
    pub report: String,
}

impl Catalog {
    /// How far each pack was verified.
    pub(crate) async fn verified(&self, repository: i64) -> Result<HashMap<u32, VerifiedRow>, CatalogError> {
        let rows: Vec<(i64, i64, i64, i64)> =
            sqlx::query_as("SELECT pack, done_offset, this_ns, last_ns FROM verified WHERE repository = ?")
                .bind(repository)
                .fetch_all(self.pool())
                .await
                .map_err(sql("read what was verified"))?;
        let row = |(pack, done_offset, this_ns, last_ns): (i64, i64, i64, i64)| {
            let done_offset = number("offset", done_offset)?;
            Ok((number("pack number", pack)?, VerifiedRow { done_offset, this_ns, last_ns }))
        };
        rows.into_iter().map(row).collect()
    }

    /// Notes how far a pack was verified.
    pub(crate) async fn note_verified(&self, repository: i64, pack: u32, row: VerifiedRow) -> Result<(), CatalogError> {
        let doing = "note what was verified";
        let mut transaction = self.begin().await?;
        sqlx::query("REPLACE INTO verified (repository, pack, done_offset, this_ns, last_ns) VALUES (?, ?, ?, ?, ?)")
            .bind(repository)
            .bind(i64::from(pack))
            .bind(i64::from(row.done_offset))
            .bind(row.this_ns)
            .bind(row.last_ns)
            .execute(&mut **transaction)
            .await
            .map_err(sql(doing))?;
        transaction.commit().await.map_err(sql(doing))
    }

    /// When each job of maintenance last came to its end.
    pub(crate) async fn maintenance(&self, repository: i64) -> Result<Vec<MaintenanceRow>, CatalogError> {
        let rows: Vec<(String, i64, i64, String)> = sqlx::query_as(
            "SELECT job, finished_ns, failed, report FROM maintenance WHERE repository = ? ORDER BY job",
        )
        .bind(repository)
        .fetch_all(self.pool())
        .await
        .map_err(sql("read the jobs of maintenance"))?;
        let row =
            |(job, finished_ns, failed, report)| MaintenanceRow { job, finished_ns, failed: failed != 0i64, report };
        Ok(rows.into_iter().map(row).collect())
    }

    /// Notes that a job of maintenance came to its end.
    pub(crate) async fn note_maintenance(&self, repository: i64, row: &MaintenanceRow) -> Result<(), CatalogError> {
        let doing = "note a job of maintenance";
        let mut transaction = self.begin().await?;
        sqlx::query("REPLACE INTO maintenance (repository, job, finished_ns, failed, report) VALUES (?, ?, ?, ?, ?)")
            .bind(repository)
            .bind(&row.job)
            .bind(row.finished_ns)
            .bind(row.failed)
            .bind(&row.report)
            .execute(&mut **transaction)
            .await
            .map_err(sql(doing))?;
        transaction.commit().await.map_err(sql(doing))
    }
}
