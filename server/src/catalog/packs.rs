//! Rows of `packs`: hints that spare a start from opening every pack.

use std::collections::HashMap;

use strandline_messages::DomainId;

use super::{Catalog, CatalogError, id, number, signed, sql, unsigned};
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
