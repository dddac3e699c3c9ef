//! What the commands share that change snapshots: operations in batches, and a row for each snapshot.

use std::collections::HashMap;

use anyhow::Context;
use serde::Serialize;
use serde_bytes::ByteBuf;
use strandline_messages::wire::manage::{Operation, Outcome, join_snapshots};
use strandline_messages::{SnapshotId, limits};

use super::output;
use super::repository::Opened;
use super::selector::Snapshot;

/// Why the server left snapshots as they were.
pub type Kept = HashMap<SnapshotId, String>;

/// Has an operation carried out on `ids`, at most [`limits::MANAGED_SNAPSHOTS_MAX`] at a time.
pub async fn in_batches(
    opened: &Opened,
    ids: &[SnapshotId],
    operation: impl Fn(ByteBuf) -> Operation,
) -> anyhow::Result<Kept> {
    let mut kept = Kept::new();
    for (number, batch) in ids.chunks(limits::MANAGED_SNAPSHOTS_MAX).enumerate() {
        let server = &opened.server;
        let outcome = server.client.manage(&server.name, &opened.keyset, &operation(join_snapshots(batch))).await;
        let before = number * limits::MANAGED_SNAPSHOTS_MAX;
        let outcome = if before == 0 {
            outcome?
        } else {
            outcome.with_context(|| format!("the first {before} snapshots are done, the others are as they were"))?
        };
        kept.extend(reasons(outcome));
    }
    Ok(kept)
}

/// The snapshots that an operation left as they were.
pub fn reasons(outcome: Outcome) -> Kept {
    match outcome {
        Outcome::Kept { kept } => kept.into_iter().map(|kept| (kept.snapshot, kept.reason)).collect(),
        _ => Kept::new(),
    }
}

/// A row of JSON for one snapshot.
#[derive(Serialize)]
struct Row<'a> {
    id: String,
    short_id: String,
    time: String,
    host: &'a str,
    tags: &'a [String],
    action: &'static str,
    reason: Option<&'a str>,
}

/// Prints a row for each snapshot. `done`: what became of those that the server did not leave as they were.
pub fn print(json: bool, snapshots: &[&Snapshot], done: &'static str, kept: &Kept) -> anyhow::Result<()> {
    let mut rows = snapshots.iter().map(|&snapshot| {
        let reason = kept.get(&snapshot.id).map(String::as_str);
        (snapshot, if reason.is_some() { "unchanged" } else { done }, reason)
    });
    if json {
        return rows.try_for_each(|(snapshot, action, reason)| {
            output::json_line(&Row {
                id: snapshot.id.to_string(),
                short_id: snapshot.id.short(),
                time: output::rfc3339(snapshot.manifest.started_ns),
                host: &snapshot.manifest.host,
                tags: &snapshot.tags,
                action,
                reason,
            })
        });
    }
    let cells = |(snapshot, action, reason): (&Snapshot, &str, Option<&str>)| {
        let (id, time) = (snapshot.id.short(), output::moment(snapshot.manifest.started_ns));
        let (host, tags) = (snapshot.manifest.host.clone(), snapshot.tags.join(","));
        vec![id, time, host, tags, action.to_owned(), reason.unwrap_or_default().to_owned()]
    };
    let rows: Vec<_> = rows.map(cells).collect();
    output::print(output::table(&["ID", "TIME", "HOST", "TAGS", "NOW", "WHY"], &rows).as_bytes())
}
