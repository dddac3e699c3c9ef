//! Rows of `repositories` and `block_states`.

use std::collections::HashMap;

use strandline_messages::format::repository::RepositoryV1;
use strandline_messages::{RepositoryId, TenantName};

use super::{Catalog, CatalogError, id, number, signed, sql, unsigned};
use crate::engine::known::BlockState;

/// A repository as the catalog knows it.
#[derive(Clone, Debug)]
pub struct RepositoryRow {
    /// Its number in the catalog.
    pub number: i64,
    /// Whose it is.
    pub tenant: TenantName,
    /// Its random id.
    pub id: RepositoryId,
}

/// Where a block begins: pack and offset.
pub type BlockPlace = (u32, u32);

impl Catalog {
    /// All repositories.
    pub(crate) async fn repositories(&self) -> Result<Vec<RepositoryRow>, CatalogError> {
        let rows: Vec<(i64, String, Vec<u8>)> =
            sqlx::query_as("SELECT number, tenant, id FROM repositories ORDER BY number")
                .fetch_all(self.pool())
                .await
                .map_err(sql("list the repositories"))?;
        let row = |(number, tenant, bytes): (i64, String, Vec<u8>)| {
            let tenant = tenant.parse().map_err(|_| CatalogError::Impossible { what: "tenant name" })?;
            Ok(RepositoryRow { number, tenant, id: id("repository id", &bytes, RepositoryId::from_slice)? })
        };
        rows.into_iter().map(row).collect()
    }

    /// Adds a repository; its number. `None` if the tenant has one of that name or id already.
    pub(crate) async fn add_repository(
        &self,
        tenant: &TenantName,
        file: &RepositoryV1,
    ) -> Result<Option<i64>, CatalogError> {
        let insert = "INSERT INTO repositories (tenant, id, name, file) VALUES (?, ?, ?, ?) \
                      ON CONFLICT DO NOTHING RETURNING number";
        sqlx::query_scalar(insert)
            .bind(tenant.as_str())
            .bind(file.id.as_bytes().as_slice())
            .bind(file.name.as_str())
            .bind(file.encode())
            .fetch_optional(self.pool())
            .await
            .map_err(sql("add a repository"))
    }

    /// The count of condemnations and withdrawals published so far.
    pub(crate) async fn published(&self, repository: i64) -> Result<u64, CatalogError> {
        let query = sqlx::query_scalar("SELECT published FROM repositories WHERE number = ?").bind(repository);
        query.fetch_one(self.pool()).await.map(unsigned).map_err(sql("read a repository"))
    }

    /// Makes every condemned block live again: for a start, before anything relies on states. A power cut may have taken back the
    /// transaction that revived a block for a commit, but not the snapshot's files. Reviving is always safe: what is still not
    /// needed is condemned again.
    pub(crate) async fn revive_all(&self, repository: i64) -> Result<(), CatalogError> {
        let doing = "revive blocks";
        let mut transaction = self.begin().await?;
        sqlx::query("DELETE FROM block_states WHERE repository = ? AND state = 'condemned'")
            .bind(repository)
            .execute(&mut **transaction)
            .await
            .map_err(sql(doing))?;
        transaction.commit().await.map_err(sql(doing))
    }

    /// The blocks that are condemned or being freed.
    pub(crate) async fn block_states(&self, repository: i64) -> Result<HashMap<BlockPlace, BlockState>, CatalogError> {
        let rows: Vec<(i64, i64, String, i64)> =
            sqlx::query_as("SELECT pack, block_offset, state, epoch FROM block_states WHERE repository = ?")
                .bind(repository)
                .fetch_all(self.pool())
                .await
                .map_err(sql("read the states of blocks"))?;
        let row = |(pack, offset, state, epoch): (i64, i64, String, i64)| {
            let state = match state.as_str() {
                "condemned" => BlockState::Condemned { epoch: unsigned(epoch) },
                "freeing" => BlockState::Freeing,
                _ => return Err(CatalogError::Impossible { what: "block state" }),
            };
            Ok(((number("pack number", pack)?, number("block offset", offset)?), state))
        };
        rows.into_iter().map(row).collect()
    }

    /// Publishes new states in one transaction. `Condemned` blocks get the current epoch, and the epoch then moves on, so that
    /// leases taken later do not cover them. Returns that epoch; `None`, and nothing is published, if the count of commits is
    /// another than `commits_seen`. What is freed or withdrawn stands in the state files of packs, not here.
    pub(crate) async fn publish_states(
        &self,
        repository: i64,
        changes: &[(BlockPlace, BlockState)],
        commits_seen: Option<u64>,
    ) -> Result<Option<u64>, CatalogError> {
        let doing = "publish the states of blocks";
        let mut transaction = self.begin().await?;
        if let Some(seen) = commits_seen {
            let commits: i64 = sqlx::query_scalar("SELECT commits FROM repositories WHERE number = ?")
                .bind(repository)
                .fetch_one(&mut **transaction)
                .await
                .map_err(sql(doing))?;
            if unsigned(commits) != seen {
                return Ok(None);
            }
        }
        let epoch: i64 = sqlx::query_scalar(
            "UPDATE repositories SET epoch = epoch + 1, published = published + 1 WHERE number = ? RETURNING epoch - 1",
        )
        .bind(repository)
        .fetch_one(&mut **transaction)
        .await
        .map_err(sql(doing))?;
        for ((pack, offset), state) in changes {
            let name = match state {
                BlockState::Live | BlockState::Freed | BlockState::Withdrawn => None,
                BlockState::Condemned { .. } => Some("condemned"),
                BlockState::Freeing => Some("freeing"),
            };
            let query = match name {
                None => sqlx::query("DELETE FROM block_states WHERE repository = ? AND pack = ? AND block_offset = ?"),
                Some(_) => sqlx::query(
                    "REPLACE INTO block_states (repository, pack, block_offset, state, epoch) VALUES (?, ?, ?, ?, ?)",
                ),
            };
            let query = query.bind(repository).bind(i64::from(*pack)).bind(i64::from(*offset));
            let query = match name {
                None => query,
                Some(name) => query.bind(name).bind(epoch),
            };
            query.execute(&mut **transaction).await.map_err(sql(doing))?;
        }
        transaction.commit().await.map_err(sql(doing))?;
        Ok(Some(unsigned(epoch)))
    }

    /// Marks blocks as being freed, if no open session holds a lease of `epoch` or earlier; `false` if one does.
    pub(crate) async fn begin_freeing(
        &self,
        repository: i64,
        epoch: u64,
        blocks: &[BlockPlace],
    ) -> Result<bool, CatalogError> {
        let doing = "begin to free blocks";
        let mut transaction = self.begin().await?;
        let held: Option<i64> = sqlx::query_scalar(
            "SELECT 1 FROM leases l JOIN sessions s ON s.id = l.session \
             WHERE l.repository = ? AND l.ended = 0 AND s.state = 'open' AND l.epoch <= ? LIMIT 1",
        )
        .bind(repository)
        .bind(signed(epoch))
        .fetch_optional(&mut **transaction)
        .await
        .map_err(sql(doing))?;
        if held.is_some() {
            return Ok(false);
        }
        for (pack, offset) in blocks {
            sqlx::query(
                "REPLACE INTO block_states (repository, pack, block_offset, state, epoch) VALUES (?, ?, ?, 'freeing', ?)",
            )
            .bind(repository)
            .bind(i64::from(*pack))
            .bind(i64::from(*offset))
            .bind(signed(epoch))
            .execute(&mut **transaction)
            .await
            .map_err(sql(doing))?;
        }
        transaction.commit().await.map_err(sql(doing))?;
        Ok(true)
    }

    /// Forgets the states of blocks that the state files of packs tell from now on.
    pub(crate) async fn forget_states(&self, repository: i64, blocks: &[BlockPlace]) -> Result<(), CatalogError> {
        let doing = "forget the states of blocks";
        let mut transaction = self.begin().await?;
        for (pack, offset) in blocks {
            sqlx::query("DELETE FROM block_states WHERE repository = ? AND pack = ? AND block_offset = ?")
                .bind(repository)
                .bind(i64::from(*pack))
                .bind(i64::from(*offset))
                .execute(&mut **transaction)
                .await
                .map_err(sql(doing))?;
        }
        transaction.commit().await.map_err(sql(doing))
    }

    /// The earliest epoch that an open session's lease holds; `None` if none holds any.
    pub(crate) async fn earliest_lease(&self, repository: i64) -> Result<Option<u64>, CatalogError> {
        let query = sqlx::query_scalar(
            "SELECT min(l.epoch) FROM leases l JOIN sessions s ON s.id = l.session \
             WHERE l.repository = ? AND l.ended = 0 AND s.state = 'open'",
        );
        let earliest: Option<i64> =
            query.bind(repository).fetch_one(self.pool()).await.map_err(sql("look at the leases"))?;
        Ok(earliest.map(unsigned))
    }

    /// Makes condemned blocks live again for the holder of `fence`; `false` if the fence is not current any more. Blocks that
    /// are not condemned are left as they are.
    pub(crate) async fn revive(
        &self,
        repository: i64,
        session: &[u8; 16],
        fence: u64,
        blocks: &[BlockPlace],
    ) -> Result<bool, CatalogError> {
        let doing = "revive blocks";
        let mut transaction = self.begin().await?;
        let held: Option<i64> =
            sqlx::query_scalar("SELECT 1 FROM leases WHERE session = ? AND fence = ? AND ended = 0")
                .bind(session.as_slice())
                .bind(signed(fence))
                .fetch_optional(&mut **transaction)
                .await
                .map_err(sql(doing))?;
        if held.is_none() {
            return Ok(false);
        }
        for (pack, offset) in blocks {
            sqlx::query("DELETE FROM block_states WHERE repository = ? AND pack = ? AND block_offset = ? AND state = 'condemned'")
                .bind(repository)
                .bind(i64::from(*pack))
                .bind(i64::from(*offset))
                .execute(&mut **transaction)
                .await
                .map_err(sql(doing))?;
        }
        transaction.commit().await.map_err(sql(doing))?;
        Ok(true)
    }
}
