//! Which snapshots a command that looks into several of them is about.

use anyhow::bail;

use super::filter::Filter;
use super::repository::Opened;
use super::selector::{self, Snapshot};

/// The snapshots that `filter` lets through, oldest first; of those the ones that `wanted` names, if it names any.
pub async fn chosen(opened: &Opened, filter: &Filter, wanted: &[String]) -> anyhow::Result<Vec<Snapshot>> {
    let mut snapshots = selector::all(opened).await?;
    snapshots.retain(|snapshot| filter.matches(snapshot));
    if snapshots.is_empty() {
        if filter.is_empty() {
            bail!("there are no snapshots");
        }
        bail!("no snapshot has this host, these tags and these paths; `strand snapshots` lists them all");
    }
    if wanted.is_empty() {
        return Ok(snapshots);
    }
    let mut named: Vec<_> = selector::several(&snapshots, wanted)?.into_iter().cloned().collect();
    named.sort_by_key(|snapshot| snapshot.order);
    Ok(named)
}
