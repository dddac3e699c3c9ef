//! `strand stats`.

use std::path::PathBuf;
use std::sync::Arc;

use clap::{Args, ValueEnum};
use serde::Serialize;
use strandline_messages::wire::RepositoryStatus;

use super::Fate;
use super::args::Global;
use super::choice;
use super::filter::Filter;
use super::output;
use super::repository::Opened;
use super::selector::Snapshot;
use super::session::{Reading, STREAMS};
use super::settings::Place;
use crate::survey::{ChunkTotals, FileTotals, RestoreSize, UniqueChunks, UniqueFiles};
use crate::trees::ChunkSource;

/// `strand stats`.
#[derive(Args, Debug)]
pub struct Stats {
    /// Count only these snapshots: ids or their beginnings, `latest`, `latest~N` [default: all]
    #[arg(value_name = "SNAPSHOT")]
    snapshots: Vec<String>,
    #[command(flatten)]
    filter: Filter,
    /// What to count
    #[arg(long, value_enum, value_name = "MODE", default_value = "restore-size")]
    mode: Mode,
}

/// `--mode`.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    /// What restoring each snapshot would write; bytes of hard links count once in each
    RestoreSize,
    /// Files with the same content once, in all snapshots together
    FilesByContents,
    /// Each chunk once, in all snapshots together, before compression
    RawData,
}

impl Mode {
    fn name(self) -> &'static str {
        match self {
            Self::RestoreSize => "restore-size",
            Self::FilesByContents => "files-by-contents",
            Self::RawData => "raw-data",
        }
    }
}

/// What was counted.
enum Counted {
    Restored(FileTotals),
    Contents(FileTotals),
    Raw(ChunkTotals),
}

/// Runs the command.
pub async fn run(global: &Global, place: &Place, stats: Stats) -> anyhow::Result<Fate> {
    let opened = Opened::existing(global, place).await?;
    let counted = count(global, place, &opened, &stats).await;
    let closed = opened.server.close().await;
    let problems = counted?;
    closed?;
    Ok(if problems == 0 { Fate::Done } else { Fate::Partial })
}

async fn count(global: &Global, place: &Place, opened: &Opened, stats: &Stats) -> anyhow::Result<u64> {
    let snapshots = choice::chosen(opened, &stats.filter, &stats.snapshots).await?;
    std::fs::create_dir_all(&place.state_dir)?;
    let reading = Reading::open(opened, STREAMS).await?;
    let sources: Vec<_> = snapshots.iter().map(|snapshot| (reading.source(snapshot.id), snapshot.clone())).collect();
    let (mode, json, directory) = (stats.mode, global.json, place.state_dir.clone());
    let counting = tokio::task::spawn_blocking(move || {
        let mut counting = Counting { json, problems: 0 };
        counting.all(mode, sources, directory).map(|counted| (counted, counting.problems))
    });
    let counted = counting.await;
    reading.close(opened, "").await;
    let (counted, problems) = counted??;
    let status = opened.server.client.status().await?;
    let repository = status.repositories.into_iter().find(|repository| repository.name == opened.server.name);
    if global.json {
        print_json(&snapshots, stats.mode, &counted, repository.as_ref(), problems)?;
    } else {
        output::print(text(&snapshots, stats.mode, &counted, repository.as_ref()).as_bytes())?;
    }
    Ok(problems)
}

struct Counting {
    json: bool,
    problems: u64,
}

impl Counting {
    fn all(
        &mut self,
        mode: Mode,
        snapshots: Vec<(Arc<dyn ChunkSource>, Snapshot)>,
        directory: PathBuf,
    ) -> anyhow::Result<Counted> {
        match mode {
            Mode::RestoreSize => {
                let (mut size, mut sum) = (RestoreSize::new(directory), FileTotals::default());
                for (source, snapshot) in snapshots {
                    sum += size.snapshot(source, snapshot.manifest.root, |error| self.problem(&snapshot, &error))?;
                }
                Ok(Counted::Restored(sum))
            }
            Mode::FilesByContents => {
                let mut files = UniqueFiles::new(directory);
                for (source, snapshot) in snapshots {
                    files.snapshot(source, snapshot.manifest.root, |error| self.problem(&snapshot, &error))?;
                }
                Ok(Counted::Contents(files.finish()?))
            }
            Mode::RawData => {
                let mut chunks = UniqueChunks::new(directory);
                for (source, snapshot) in snapshots {
                    let tops = [Some(snapshot.manifest.root), snapshot.manifest.errors];
                    for top in tops.into_iter().flatten() {
                        chunks.tree(Arc::clone(&source), top, |error| self.problem(&snapshot, &error))?;
                    }
                }
                Ok(Counted::Raw(chunks.finish()?))
            }
        }
    }

    fn problem(&mut self, snapshot: &Snapshot, error: &dyn std::fmt::Display) {
        self.problems += 1;
        let text = format!("snapshot {}, {error}; what it holds is not counted", snapshot.id.short());
        output::error(self.json, Fate::Partial.code(), &text);
    }
}

#[derive(Serialize)]
struct Row {
    message_type: &'static str,
    id: String,
    time: String,
    host: String,
    files: u64,
    directories: u64,
    others: u64,
    bytes: u64,
    bytes_new: u64,
    bytes_stored: u64,
}

#[derive(Serialize, Default)]
struct Summary {
    message_type: &'static str,
    mode: &'static str,
    snapshots_count: usize,
    total_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    total_file_count: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    total_directory_count: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    total_other_count: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_chunks: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_bytes: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tree_chunks: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    tree_bytes: Option<u64>,
    problems: u64,
}

#[derive(Serialize)]
struct RepositoryRow {
    message_type: &'static str,
    snapshots: u64,
    deleted: u64,
    stored_bytes: u64,
    condemned_blocks: u64,
    blocks: u64,
    chunks: u64,
    damaged_blocks: u64,
}

fn print_json(
    snapshots: &[Snapshot],
    mode: Mode,
    counted: &Counted,
    repository: Option<&RepositoryStatus>,
    problems: u64,
) -> anyhow::Result<()> {
    for snapshot in snapshots {
        let (manifest, totals) = (&snapshot.manifest, &snapshot.manifest.totals);
        output::json_line(&Row {
            message_type: "snapshot",
            id: snapshot.id.to_string(),
            time: output::rfc3339(manifest.started_ns),
            host: manifest.host.clone(),
            files: totals.files,
            directories: totals.directories,
            others: totals.others,
            bytes: totals.bytes,
            bytes_new: totals.bytes_new,
            bytes_stored: totals.bytes_stored,
        })?;
    }
    let mut summary = Summary {
        message_type: "summary",
        mode: mode.name(),
        snapshots_count: snapshots.len(),
        problems,
        ..Summary::default()
    };
    match counted {
        Counted::Restored(totals) => {
            summary.total_size = totals.bytes;
            summary.total_file_count = Some(totals.files);
            summary.total_directory_count = Some(totals.directories);
            summary.total_other_count = Some(totals.others);
        }
        Counted::Contents(totals) => {
            summary.total_size = totals.bytes;
            summary.total_file_count = Some(totals.files);
        }
        Counted::Raw(totals) => {
            summary.total_size = totals.data_bytes + totals.tree_bytes;
            summary.data_chunks = Some(totals.data_chunks);
            summary.data_bytes = Some(totals.data_bytes);
            summary.tree_chunks = Some(totals.tree_chunks);
            summary.tree_bytes = Some(totals.tree_bytes);
        }
    }
    output::json_line(&summary)?;
    let Some(repository) = repository else { return Ok(()) };
    output::json_line(&RepositoryRow {
        message_type: "repository",
        snapshots: repository.snapshots,
        deleted: repository.deleted,
        stored_bytes: repository.stored_bytes,
        condemned_blocks: repository.condemned_blocks,
        blocks: repository.blocks,
        chunks: repository.chunks,
        damaged_blocks: repository.damaged_blocks,
    })
}

fn text(snapshots: &[Snapshot], mode: Mode, counted: &Counted, repository: Option<&RepositoryStatus>) -> String {
    let row = |snapshot: &Snapshot| {
        let totals = &snapshot.manifest.totals;
        vec![
            snapshot.id.short(),
            output::moment(snapshot.manifest.started_ns),
            snapshot.manifest.host.clone(),
            totals.files.to_string(),
            output::size(totals.bytes),
            output::size(totals.bytes_new),
            output::size(totals.bytes_stored),
        ]
    };
    let rows: Vec<_> = snapshots.iter().map(row).collect();
    let mut text = output::table(&["ID", "TIME", "HOST", "FILES", "SIZE", "NEW", "ADDED"], &rows);
    let counted = match counted {
        Counted::Restored(totals) => format!(
            "{} in {} files, {} directories, {} others",
            output::size(totals.bytes),
            totals.files,
            totals.directories,
            totals.others
        ),
        Counted::Contents(totals) => {
            format!("{} in {} files with different content", output::size(totals.bytes), totals.files)
        }
        Counted::Raw(totals) => format!(
            "{} in {} chunks of files and {} of directories, before compression",
            output::size(totals.data_bytes + totals.tree_bytes),
            totals.data_chunks,
            totals.tree_chunks
        ),
    };
    text += &format!("\n{:<18}{counted}\n", mode.name());
    if let Some(repository) = repository {
        text += &format!(
            "{:<18}{} stored in {} blocks; {} snapshots",
            "repository",
            output::size(repository.stored_bytes),
            repository.blocks,
            repository.snapshots
        );
        let mut note = |count: u64, what: String| {
            if count > 0 {
                text += &format!("; {what}");
            }
        };
        note(repository.deleted, format!("{} deleted ones can be brought back", repository.deleted));
        note(repository.condemned_blocks, format!("{} blocks wait to be freed", repository.condemned_blocks));
        note(repository.damaged_blocks, format!("{} damaged blocks", repository.damaged_blocks));
        text.push('\n');
    }
    text
}
