//! Rows of `packs`: hints that spare a start from opening every pack.

use std::collections::HashMap;

use strandline_messages::DomainId;

use super::{Catalog, CatalogError, id, number, signed, sql, unsigned};
use crate::engine::state::PackRange;
use crate::storage::pack_file::PackInfo;

impl Catalog {
    /// What is known of the packs of a repository.
    pub(crate) async fn packs(&self, repository: i64) -> Result<HashMap<u32, PackInfo>, CatalogError> {
        type Row = (i64, Vec<u8>, String, i64, i64, i64);
        let rows: Vec<Row> = sqlx::query_as(
            "SELECT number, domain, state, file_bytes, blocks_end, blocks FROM packs WHERE repository = ?",
        )
        .bind(repository)
        .fetch_all(self.pool())
        .await
        .map_err(sql("list the packs"))?;
        let row = |(pack, domain, state, file_bytes, blocks_end, blocks): Row| {
            let number_of = number("pack number", pack)?;
            let info = PackInfo {
                number: number_of,
                domain: id("writer domain", &domain, DomainId::from_slice)?,
                sealed: state == "sealed",
                file_bytes: unsigned(file_bytes),
                blocks_end: number("pack length", blocks_end)?,
                blocks: number("block count", blocks)?,
            };
            Ok((number_of, info))
        };
        rows.into_iter().map(row).collect()
    }

    /// Forgets a pack that is gone.
    pub(crate) async fn forget_pack(&self, repository: i64, pack: u32) -> Result<(), CatalogError> {
        let doing = "forget a pack";
        let mut transaction = self.begin().await?;
        for table in [
            "DELETE FROM packs WHERE repository = ? AND number = ?",
            "DELETE FROM block_states WHERE repository = ? AND pack = ?",
            "DELETE FROM uncommitted WHERE repository = ? AND pack = ?",
            "DELETE FROM verified WHERE repository = ? AND pack = ?",
        ] {
            let query = sqlx::query(table).bind(repository).bind(i64::from(pack));
            query.execute(&mut **transaction).await.map_err(sql(doing))?;
        }
        transaction.commit().await.map_err(sql(doing))
    }

    /// Remembers parts of packs as those of a session that ended without a snapshot.
    pub(crate) async fn keep_uncommitted(
        &self,
        repository: i64,
        ranges: &[PackRange],
        until_ns: i64,
    ) -> Result<(), CatalogError> {
        if ranges.is_empty() {
            return Ok(());
        }
        let doing = "remember uncommitted blocks";
        let mut transaction = self.begin().await?;
        for range in ranges {
            sqlx::query("REPLACE INTO uncommitted (repository, pack, start, finish, until_ns) VALUES (?, ?, ?, ?, ?)")
                .bind(repository)
                .bind(i64::from(range.pack))
                .bind(i64::from(range.start))
                .bind(i64::from(range.end))
                .bind(until_ns)
                .execute(&mut **transaction)
                .await
                .map_err(sql(doing))?;
        }
        transaction.commit().await.map_err(sql(doing))
    }

    /// The parts of packs that are kept for sessions that ended without a snapshot; those whose time is over are forgotten.
    pub(crate) async fn uncommitted(&self, repository: i64, now_ns: i64) -> Result<Vec<PackRange>, CatalogError> {
        let doing = "list the uncommitted blocks";
        let over = sqlx::query("DELETE FROM uncommitted WHERE repository = ? AND until_ns <= ?");
        over.bind(repository).bind(now_ns).execute(self.pool()).await.map_err(sql(doing))?;
        let rows: Vec<(i64, i64, i64)> =
            sqlx::query_as("SELECT pack, start, finish FROM uncommitted WHERE repository = ?")
                .bind(repository)
                .fetch_all(self.pool())
                .await
                .map_err(sql(doing))?;
        let row = |(pack, start, end): (i64, i64, i64)| {
            let (start, end) = (number("block offset", start)?, number("block offset", end)?);
            Ok(PackRange { pack: number("pack number", pack)?, start, end })
        };
        rows.into_iter().map(row).collect()
    }

    /// Records what is known of packs.
    pub(crate) async fn record_packs(&self, repository: i64, packs: &[PackInfo]) -> Result<(), CatalogError> {
        if packs.is_empty() {
            return Ok(());
        }
        let mut transaction = self.begin().await?;
        for pack in packs {
            sqlx::query(
                "REPLACE INTO packs (repository, number, domain, state, file_bytes, blocks_end, blocks) \
                 VALUES (?, ?, ?, ?, ?, ?, ?)",
            )
            .bind(repository)
            .bind(i64::from(pack.number))
            .bind(pack.domain.as_bytes().as_slice())
            .bind(if pack.sealed { "sealed" } else { "open" })
            .bind(signed(pack.file_bytes))
            .bind(i64::from(pack.blocks_end))
            .bind(i64::from(pack.blocks))
            .execute(&mut **transaction)
            .await
            .map_err(sql("record packs"))?;
        }
        transaction.commit().await.map_err(sql("record packs"))
    }
}
