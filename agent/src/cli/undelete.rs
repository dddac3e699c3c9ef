//! `strand undelete`.

use clap::Args;
use strandline_messages::SnapshotId;
use strandline_messages::wire::manage::Operation;

use super::Fate;
use super::args::Global;
use super::changes;
use super::repository::Opened;
use super::selector;
use super::settings::Place;

/// `strand undelete`.
#[derive(Args, Debug)]
pub struct Undelete {
    /// Ids or their beginnings; `strand snapshots --deleted` lists them
    #[arg(required = true, value_name = "ID")]
    ids: Vec<String>,
}

/// Runs the command.
pub async fn run(global: &Global, place: &Place, undelete: &Undelete) -> anyhow::Result<Fate> {
    let opened = Opened::existing(global, place).await?;
    let done = bring_back(global, &opened, undelete).await;
    let closed = opened.server.close().await;
    let fate = done?;
    closed?;
    Ok(fate)
}

async fn bring_back(global: &Global, opened: &Opened, undelete: &Undelete) -> anyhow::Result<Fate> {
    let deleted = selector::deleted(opened).await?;
    let chosen = selector::several(&deleted, &undelete.ids)
        .map_err(|error| error.context("among the snapshots that can still be brought back; nothing was changed"))?;
    let ids: Vec<SnapshotId> = chosen.iter().map(|snapshot| snapshot.id).collect();
    let kept = changes::in_batches(opened, &ids, |snapshots| Operation::UndeleteSnapshots { snapshots }).await?;
    changes::print(global.json, &chosen, "undeleted", &kept)?;
    Ok(if kept.is_empty() { Fate::Done } else { Fate::Partial })
}
