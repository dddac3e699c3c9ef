//! `strand snapshots`.

use std::collections::HashMap;

use clap::Args;
use serde::Serialize;
use strandline_messages::AgentId;

use super::Fate;
use super::args::Global;
use super::filter::Filter;
use super::output;
use super::repository::Opened;
use super::selector::{self, Snapshot};
use super::settings::Place;

/// `strand snapshots`.
#[derive(Args, Debug)]
pub struct Snapshots {
    #[command(flatten)]
    filter: Filter,
    /// Only the newest N of each host and set of paths
    #[arg(long, value_name = "N")]
    latest: Option<usize>,
    /// The deleted ones that `strand undelete` can still bring back, instead of those that are kept
    #[arg(long)]
    deleted: bool,
}

#[derive(Serialize)]
struct DeletionRow {
    deleted: String,
    /// From when on it cannot be brought back.
    r#final: String,
    /// The agent that asked; absent if the server did.
    agent: Option<String>,
    reason: String,
}

#[derive(Serialize)]
struct Line {
    id: String,
    short_id: String,
    order: u64,
    time: String,
    committed: String,
    host: String,
    tags: Vec<String>,
    /// Absent: the key may not know.
    paths: Option<Vec<String>>,
    files: u64,
    directories: u64,
    bytes: u64,
    bytes_new: u64,
    bytes_stored: u64,
    errors: u64,
    parent: Option<String>,
    root: String,
    protected: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    deletion: Option<DeletionRow>,
}

/// Who deleted what no agent did.
const SERVER: AgentId = AgentId([0; 16]);

/// Runs the command.
pub async fn run(global: &Global, place: &Place, wanted: &Snapshots) -> anyhow::Result<Fate> {
    let opened = Opened::existing(global, place).await?;
    let found = if wanted.deleted { selector::deleted(&opened).await } else { selector::all(&opened).await };
    opened.server.close().await?;
    let mut snapshots = found?;
    snapshots.retain(|snapshot| wanted.filter.matches(snapshot));
    if let Some(newest) = wanted.latest {
        keep_newest(&mut snapshots, newest);
    }
    if global.json {
        snapshots.iter().try_for_each(|snapshot| output::json_line(&line(snapshot)))?;
    } else {
        output::print(text(&snapshots, wanted.deleted).as_bytes())?;
    }
    Ok(Fate::Done)
}

fn keep_newest(snapshots: &mut Vec<Snapshot>, newest: usize) {
    let mut seen: HashMap<(String, Vec<Vec<u8>>), usize> = HashMap::new();
    snapshots.reverse();
    snapshots.retain(|snapshot| {
        let group = (snapshot.manifest.host.clone(), snapshot.details.paths.clone());
        let count = seen.entry(group).or_default();
        *count += 1;
        *count <= newest
    });
    snapshots.reverse();
}

fn paths(snapshot: &Snapshot) -> Option<Vec<String>> {
    let shown = || snapshot.details.paths.iter().map(|path| output::path(path)).collect();
    snapshot.details_opened.then(shown)
}

fn line(snapshot: &Snapshot) -> Line {
    let manifest = &snapshot.manifest;
    Line {
        id: snapshot.id.to_string(),
        short_id: snapshot.id.short(),
        order: snapshot.order,
        time: output::rfc3339(manifest.started_ns),
        committed: output::rfc3339(snapshot.committed_ns),
        host: manifest.host.clone(),
        tags: snapshot.tags.clone(),
        paths: paths(snapshot),
        files: manifest.totals.files,
        directories: manifest.totals.directories,
        bytes: manifest.totals.bytes,
        bytes_new: manifest.totals.bytes_new,
        bytes_stored: manifest.totals.bytes_stored,
        errors: manifest.totals.errors,
        parent: manifest.parent.map(|parent| parent.to_string()),
        root: manifest.root.to_string(),
        protected: snapshot.protected,
        deletion: snapshot.deletion.as_ref().map(|deletion| DeletionRow {
            deleted: output::rfc3339(deletion.deleted_ns),
            r#final: output::rfc3339(deletion.final_ns),
            agent: (deletion.agent != SERVER).then(|| deletion.agent.to_string()),
            reason: deletion.reason.clone(),
        }),
    }
}

fn text(snapshots: &[Snapshot], deleted: bool) -> String {
    if snapshots.is_empty() {
        return if deleted { "no deleted snapshots\n".to_owned() } else { "no snapshots\n".to_owned() };
    }
    let row = if deleted { deleted_cells } else { kept_cells };
    let mut head = vec!["ID", "TIME", "HOST", "TAGS"];
    head.extend_from_slice(if deleted { &["DELETED", "FINAL", "BY", "WHY"] } else { &["SIZE", "ADDED", "PATHS"] });
    let rows: Vec<_> = snapshots.iter().map(row).collect();
    let count = match rows.len() {
        1 => "1 snapshot\n".to_owned(),
        n => format!("{n} snapshots\n"),
    };
    let all_shown = snapshots.iter().all(|snapshot| snapshot.details_opened);
    let hidden = if all_shown { "" } else { "paths are not shown, because this key may only write\n" };
    output::table(&head, &rows) + &count + hidden
}

fn common_cells(snapshot: &Snapshot) -> Vec<String> {
    let manifest = &snapshot.manifest;
    vec![snapshot.id.short(), output::moment(manifest.started_ns), manifest.host.clone(), snapshot.tags.join(",")]
}

fn kept_cells(snapshot: &Snapshot) -> Vec<String> {
    let totals = &snapshot.manifest.totals;
    let paths = paths(snapshot).map_or_else(|| "?".to_owned(), |paths| paths.join(" "));
    let protected = if snapshot.protected { " (protected)" } else { "" };
    let sizes = [output::size(totals.bytes), output::size(totals.bytes_stored)];
    common_cells(snapshot).into_iter().chain(sizes).chain([paths + protected]).collect()
}

fn deleted_cells(snapshot: &Snapshot) -> Vec<String> {
    let Some(deletion) = &snapshot.deletion else { return common_cells(snapshot) };
    let by = if deletion.agent == SERVER { "server".to_owned() } else { deletion.agent.short() };
    let times = [output::moment(deletion.deleted_ns), output::moment(deletion.final_ns)];
    common_cells(snapshot).into_iter().chain(times).chain([by, deletion.reason.clone()]).collect()
}
