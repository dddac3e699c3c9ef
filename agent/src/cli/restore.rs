//! `strand restore`.

use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use super::Fate;
use super::args::Global;
use super::fate::Interrupted;
use super::output;
use super::progress::{self, shown};
use super::repository::Opened;
use super::selector::{self, Snapshot};
use super::session::{Reading, STREAMS};
use super::settings::Place;
use crate::restore::{Action, Deletion, Listener, Overwrite, Progress, RestoreOptions, RestoreReport, restore};
use crate::scan::roots::RootNode;
use crate::scan::walk::identity_of;
use crate::trees::Received;

/// Problems that are shown one by one; the rest is counted.
const ISSUES_SHOWN: usize = 50;

/// `strand restore`.
#[derive(Args, Debug)]
pub struct Restore {
    /// An id or its beginning, `latest` or `latest~N`; then optionally `:PATH`
    pub snapshot: String,
    /// Directory to restore into; made if it does not exist
    #[arg(short, long, value_name = "DIR")]
    pub target: PathBuf,
    /// Restore only what matches, and what lies below; may be repeated
    #[arg(short, long, value_name = "PATTERN")]
    pub include: Vec<String>,
    /// Leave out what matches; may be repeated
    #[arg(short, long, value_name = "PATTERN")]
    pub exclude: Vec<String>,
    /// What to do with files that exist; needed if the target is not empty
    #[arg(long, value_enum, value_name = "WHEN")]
    pub overwrite: Option<When>,
    /// Write only what differs into files that exist, instead of replacing them by complete new ones
    #[arg(long)]
    pub in_place: bool,
    /// Delete from restored directories what the snapshot does not have, except what --exclude matches
    #[arg(long)]
    pub delete: bool,
    /// Make holes of runs of zeros
    #[arg(long)]
    pub sparse: bool,
    /// Write and delete nothing; tell what would be (with -v: every path)
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    /// Read everything again afterwards and compare it with the snapshot
    #[arg(long)]
    pub verify: bool,
    /// Parallel data streams, 1 to 64; the server may allow fewer
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub streams: Option<u16>,
}

/// `--overwrite`.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Replace files
    Always,
    /// Replace files whose size or modification time differs
    IfChanged,
    /// Leave whatever exists
    Never,
}

/// Runs the command.
pub async fn run(global: &Global, place: &Place, wanted: Restore) -> anyhow::Result<Fate> {
    check_target(&wanted)?;
    let dry_run = wanted.dry_run;
    let opened = Opened::existing(global, place).await?;
    let restored = restore_one(global, place, &opened, wanted).await;
    let closed = opened.server.close().await;
    let report = restored?;
    closed?;
    summary(global, &report, dry_run)?;
    if report.cancelled {
        bail!(Interrupted("what was restored is complete; run the command again with --overwrite if-changed"));
    }
    let matched = report.files + report.directories + report.others + report.hard_links + report.left;
    if !report.unmatched.is_empty() && matched == 0 {
        bail!("nothing was restored: no --include pattern matches anything in the snapshot");
    }
    Ok(if report.issues_total == 0 && report.unmatched.is_empty() { Fate::Done } else { Fate::Partial })
}

fn check_target(wanted: &Restore) -> anyhow::Result<()> {
    let target = &wanted.target;
    let used = match std::fs::read_dir(target) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        Err(error) => return Err(error).with_context(|| format!("cannot look into {}", target.display())),
    };
    if used && wanted.overwrite.is_none() && !wanted.dry_run {
        bail!(
            "{} is not empty; nothing was restored: choose another target, or say with --overwrite always, if-changed \
             or never what to do with files that exist",
            target.display()
        );
    }
    Ok(())
}

async fn restore_one(
    global: &Global,
    place: &Place,
    opened: &Opened,
    wanted: Restore,
) -> anyhow::Result<RestoreReport> {
    let (id, subpath) = selector::split(&wanted.snapshot);
    let snapshot = selector::one(opened, id).await?;
    let mut options = options(global, &wanted, subpath);
    if wanted.delete {
        options.delete = Some(deletion(place, opened, &snapshot)?);
    }
    let streams = wanted.streams.or(place.settings.streams).unwrap_or(STREAMS).max(1);
    let reading = Reading::open(opened, streams).await?;
    let cancel = Arc::clone(&options.cancel);
    let look = {
        let (totals, progress, target) = (snapshot.clone(), Arc::clone(&options.progress), wanted.target.clone());
        Arc::new(move || look(&totals, &progress, &target))
    };
    let (source, keyset) = (reading.source(snapshot.id), Arc::clone(&opened.keyset));
    let working = tokio::task::spawn_blocking(move || restore(source, &keyset, snapshot.manifest.root, &options));
    let stopping = stop_on_signal(cancel)?;
    let restored = tokio::select! {
        restored = shown(global, look, working) => restored,
        () = stopping => bail!(Interrupted("files that were complete are in the target")),
    };
    let outcome = restored.context("the restore ended early")?;
    let reason = match &outcome {
        Ok(report) if !report.cancelled => "",
        _ => "the restore did not finish",
    };
    reading.close(opened, reason).await;
    Ok(outcome?)
}

/// The first signal asks to stop soon, the second one ends at once.
fn stop_on_signal(cancel: Arc<AtomicBool>) -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        cancel.store(true, Ordering::Relaxed);
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
    })
}

/// What of the target is the snapshot's to decide about.
fn deletion(place: &Place, opened: &Opened, snapshot: &Snapshot) -> anyhow::Result<Deletion> {
    super::backup::make_private(&place.state_dir)?;
    let paths: Vec<PathBuf> = snapshot.details.paths.iter().map(|path| OsStr::from_bytes(path).into()).collect();
    let saved = RootNode::merge(&paths, Path::new("/")).root_paths(Path::new("/"));
    let bytes = |path: PathBuf| path.as_os_str().as_bytes().strip_prefix(b"/").unwrap_or_default().to_vec();
    let ours = [Some(place.state_dir.as_path()), Some(place.config_dir.as_path()), opened.server.directory.as_deref()];
    Ok(Deletion {
        saved: saved.into_iter().map(bytes).collect(),
        errors: snapshot.manifest.errors,
        keep: ours.into_iter().flatten().filter_map(identity_of).collect(),
        scratch: place.state_dir.clone(),
    })
}

fn options(global: &Global, wanted: &Restore, subpath: Vec<u8>) -> RestoreOptions {
    let mut options = RestoreOptions::new(wanted.target.clone());
    options.subpath = subpath;
    options.include.clone_from(&wanted.include);
    options.exclude.clone_from(&wanted.exclude);
    options.verify = wanted.verify;
    options.in_place = wanted.in_place;
    options.sparse = wanted.sparse;
    options.dry_run = wanted.dry_run;
    if global.verbose > 0 && !global.quiet {
        let (json, dry_run) = (global.json, wanted.dry_run);
        options.listener = Listener::new(move |action, path| tell(json, dry_run, action, path));
    }
    options.writers = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8);
    options.overwrite = match wanted.overwrite {
        None | Some(When::Always) => Overwrite::Always,
        Some(When::IfChanged) => Overwrite::IfChanged,
        Some(When::Never) => Overwrite::Never,
    };
    options
}

fn look(snapshot: &Snapshot, progress: &Progress, target: &Path) -> progress::Snapshot {
    let totals = &snapshot.manifest.totals;
    let done = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    progress::Snapshot {
        files_done: done(&progress.files) + done(&progress.others) + done(&progress.hard_links) + done(&progress.left),
        files_total: totals.files + totals.others,
        bytes_done: done(&progress.bytes).max(done(&progress.bytes_reused)),
        bytes_total: totals.bytes.max(done(&progress.bytes)),
        totals_final: true,
        bytes_new: 0,
        streams: 0,
        errors: done(&progress.issues),
        current: target.display().to_string(),
    }
}

#[derive(Serialize)]
struct Summary {
    message_type: &'static str,
    dry_run: bool,
    files: u64,
    directories: u64,
    others: u64,
    hard_links: u64,
    bytes: u64,
    bytes_reused: u64,
    left: u64,
    deleted: u64,
    owners_skipped: u64,
    attributes_skipped: u64,
    verified: u64,
    issues: u64,
    blocks_fetched: u64,
    bytes_fetched: u64,
}

#[derive(Serialize)]
struct Issue {
    message_type: &'static str,
    path: String,
    restored: bool,
    message: String,
}

#[derive(Serialize)]
struct Told {
    message_type: &'static str,
    action: &'static str,
    path: String,
}

/// A path, with `-v`. A standard output that is gone does not end a restore.
fn tell(json: bool, dry_run: bool, action: Action, path: &[u8]) {
    let action = match action {
        Action::Restored => "restored",
        Action::Left => "left",
        Action::Deleted => "deleted",
    };
    let path = format!("/{}", output::path(path));
    let line = if json {
        serde_json::to_string(&Told { message_type: "path", action, path }).unwrap_or_default()
    } else {
        let would = if dry_run { "would be " } else { "" };
        format!("{would}{action} {path}")
    };
    let _ = std::io::stdout().write_all(format!("{line}\n").as_bytes());
}

fn issues(global: &Global, report: &RestoreReport) -> anyhow::Result<()> {
    if global.json {
        for issue in &report.issues {
            output::json_line(&Issue {
                message_type: "issue",
                path: output::path(&issue.path),
                restored: issue.restored,
                message: issue.reason.clone(),
            })?;
        }
    } else {
        for issue in report.issues.iter().take(ISSUES_SHOWN) {
            let kind = if issue.restored { "restored, but" } else { "not restored" };
            let text = format!("/{}: {kind}: {}", output::path(&issue.path), issue.reason);
            output::error(false, Fate::Partial.code(), &text);
        }
    }
    for pattern in &report.unmatched {
        let text = format!("--include `{pattern}` matches nothing in the snapshot; `strand ls` shows what it has");
        output::error(global.json, Fate::Partial.code(), &text);
    }
    Ok(())
}

fn summary(global: &Global, report: &RestoreReport, dry_run: bool) -> anyhow::Result<()> {
    issues(global, report)?;
    if global.json {
        return output::json_line(&Summary {
            message_type: "summary",
            dry_run,
            files: report.files,
            directories: report.directories,
            others: report.others,
            hard_links: report.hard_links,
            bytes: report.bytes,
            bytes_reused: report.bytes_reused,
            left: report.left,
            deleted: report.deleted,
            owners_skipped: report.owners_skipped,
            attributes_skipped: report.attributes_skipped,
            verified: report.verified,
            issues: report.issues_total,
            blocks_fetched: report.received.blocks,
            bytes_fetched: report.received.bytes,
        });
    }
    if global.quiet {
        return Ok(());
    }
    let mut text = format!(
        "{} files, {} directories, {} others, {} hard links, {} {}\n",
        report.files,
        report.directories,
        report.others,
        report.hard_links,
        output::size(report.bytes),
        if dry_run { "would be written at most" } else { "written" }
    );
    let mut note = |count: u64, what: &str| {
        if count > 0 {
            text += &format!("{count} {what}\n");
        }
    };
    note(report.left, "left as they were");
    note(report.deleted, if dry_run { "would be deleted" } else { "deleted: the snapshot does not have them" });
    note(report.owners_skipped, "owners not set: only root may give files away");
    note(report.attributes_skipped, "extended attributes not set: not allowed or not supported here");
    note(report.verified, "files read again and found right");
    note(report.issues_total, "problems");
    if report.bytes_reused > 0 {
        text += &format!("{} were in existing files already\n", output::size(report.bytes_reused));
    }
    if global.verbose > 0 {
        let Received { blocks, bytes } = report.received;
        text += &format!("{} fetched in {blocks} blocks, those of directories included\n", output::size(bytes));
    }
    if dry_run {
        text.push_str("dry run: nothing was written or deleted\n");
    }
    output::print(text.as_bytes())
}
