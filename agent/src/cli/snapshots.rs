//! `strand snapshots`.

use std::collections::HashMap;

use serde::Serialize;

use super::Fate;
use super::args::{Global, Snapshots};
use super::output;
use super::repository::Opened;
use super::selector::{self, Snapshot};
use super::settings::Place;

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
}

/// Runs the command.
pub async fn run(global: &Global, place: &Place, wanted: &Snapshots) -> anyhow::Result<Fate> {
    let opened = Opened::existing(global, place).await?;
    let found = selector::all(&opened).await;
    opened.server.close().await?;
    let mut snapshots = found?;
    snapshots.retain(|snapshot| matches(snapshot, wanted));
    if let Some(newest) = wanted.latest {
        keep_newest(&mut snapshots, newest);
    }
    if global.json {
        snapshots.iter().try_for_each(|snapshot| output::json_line(&line(snapshot)))?;
    } else {
        output::print(text(&snapshots).as_bytes())?;
    }
    Ok(Fate::Done)
}

fn matches(snapshot: &Snapshot, wanted: &Snapshots) -> bool {
    wanted.host.as_ref().is_none_or(|host| *host == snapshot.manifest.host)
        && wanted.tag.iter().all(|tag| snapshot.tags.contains(tag))
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
    }
}

fn text(snapshots: &[Snapshot]) -> String {
    if snapshots.is_empty() {
        return "no snapshots\n".to_owned();
    }
    let row = |snapshot: &Snapshot| {
        vec![
            snapshot.id.short(),
            output::moment(snapshot.manifest.started_ns),
            snapshot.manifest.host.clone(),
            snapshot.tags.join(","),
            output::size(snapshot.manifest.totals.bytes),
            output::size(snapshot.manifest.totals.bytes_stored),
            paths(snapshot).map_or_else(|| "?".to_owned(), |paths| paths.join(" ")),
        ]
    };
    let rows: Vec<_> = snapshots.iter().map(row).collect();
    let count = match rows.len() {
        1 => "1 snapshot\n".to_owned(),
        n => format!("{n} snapshots\n"),
    };
    let all_shown = snapshots.iter().all(|snapshot| snapshot.details_opened);
    let hidden = if all_shown { "" } else { "paths are not shown, because this key may only write\n" };
    output::table(&["ID", "TIME", "HOST", "TAGS", "SIZE", "ADDED", "PATHS"], &rows) + &count + hidden
}
