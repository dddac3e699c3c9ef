//! `strand protect` and `strand unprotect`.

use clap::Args;
use strandline_messages::SnapshotId;
use strandline_messages::wire::manage::Operation;

use super::Fate;
use super::args::Global;
use super::changes;
use super::repository::Opened;
use super::selector;
use super::settings::Place;

/// `strand protect` and `strand unprotect`.
#[derive(Args, Debug)]
pub struct Protect {
    /// Ids or their beginnings, `latest` or `latest~N`
    #[arg(required = true, value_name = "ID")]
    ids: Vec<String>,
}

/// Runs one of the two.
pub async fn run(global: &Global, place: &Place, wanted: &Protect, protected: bool) -> anyhow::Result<Fate> {
    let opened = Opened::existing(global, place).await?;
    let done = change(global, &opened, wanted, protected).await;
    let closed = opened.server.close().await;
    let fate = done?;
    closed?;
    Ok(fate)
}

async fn change(global: &Global, opened: &Opened, wanted: &Protect, protected: bool) -> anyhow::Result<Fate> {
    let all = selector::all(opened).await?;
    let chosen = selector::several(&all, &wanted.ids)?;
    let ids: Vec<SnapshotId> = chosen.iter().map(|snapshot| snapshot.id).collect();
    let operation = |snapshots| Operation::ProtectSnapshots { snapshots, protected };
    let kept = changes::in_batches(opened, &ids, operation).await?;
    changes::print(global.json, &chosen, if protected { "protected" } else { "unprotected" }, &kept)?;
    Ok(if kept.is_empty() { Fate::Done } else { Fate::Partial })
}
