//! `strand restore`.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use serde::Serialize;
use tokio::signal::unix::{SignalKind, signal};

use super::Fate;
use super::args::{self, Global, Restore};
use super::fate::Interrupted;
use super::output;
use super::progress::{self, shown};
use super::repository::Opened;
use super::selector::{self, Snapshot};
use super::session::{Reading, STREAMS};
use super::settings::Place;
use crate::restore::{Overwrite, Progress, RestoreOptions, RestoreReport, restore};

/// Problems that are shown one by one; the rest is counted.
const ISSUES_SHOWN: usize = 50;

/// Runs the command.
pub async fn run(global: &Global, place: &Place, wanted: Restore) -> anyhow::Result<Fate> {
    check_target(&wanted)?;
    let opened = Opened::existing(global, place).await?;
    let streams = wanted.streams.or(place.settings.streams).unwrap_or(STREAMS).max(1);
    let restored = restore_one(global, &opened, wanted, streams).await;
    let closed = opened.server.close().await;
    let report = restored?;
    closed?;
    summary(global, &report)?;
    if report.cancelled {
        bail!(Interrupted("what was restored is complete; run the command again with --overwrite if-changed"));
    }
    Ok(if report.issues_total == 0 { Fate::Done } else { Fate::Partial })
}

fn check_target(wanted: &Restore) -> anyhow::Result<()> {
    let target = &wanted.target;
    let used = match std::fs::read_dir(target) {
        Ok(mut entries) => entries.next().is_some(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => false,
        Err(error) => return Err(error).with_context(|| format!("cannot look into {}", target.display())),
    };
    if used && wanted.overwrite.is_none() {
        bail!(
            "{} is not empty; nothing was restored: choose another target, or say with --overwrite always, if-changed \
             or never what to do with files that exist",
            target.display()
        );
    }
    Ok(())
}

async fn restore_one(global: &Global, opened: &Opened, wanted: Restore, streams: u16) -> anyhow::Result<RestoreReport> {
    let (id, subpath) = selector::split(&wanted.snapshot);
    let snapshot = selector::one(opened, id).await?;
    let options = options(&wanted, subpath);
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

fn options(wanted: &Restore, subpath: Vec<u8>) -> RestoreOptions {
    let mut options = RestoreOptions::new(wanted.target.clone());
    options.subpath = subpath;
    options.include.clone_from(&wanted.include);
    options.exclude.clone_from(&wanted.exclude);
    options.verify = wanted.verify;
    options.writers = std::thread::available_parallelism().map_or(2, usize::from).clamp(2, 8);
    options.overwrite = match wanted.overwrite {
        None | Some(args::Overwrite::Always) => Overwrite::Always,
        Some(args::Overwrite::IfChanged) => Overwrite::IfChanged,
        Some(args::Overwrite::Never) => Overwrite::Never,
    };
    options
}

fn look(snapshot: &Snapshot, progress: &Progress, target: &Path) -> progress::Snapshot {
    let totals = &snapshot.manifest.totals;
    let done = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
    progress::Snapshot {
        files_done: done(&progress.files) + done(&progress.others) + done(&progress.hard_links) + done(&progress.left),
        files_total: totals.files + totals.others,
        bytes_done: done(&progress.bytes),
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
    files: u64,
    directories: u64,
    others: u64,
    hard_links: u64,
    bytes: u64,
    left: u64,
    owners_skipped: u64,
    attributes_skipped: u64,
    verified: u64,
    issues: u64,
}

#[derive(Serialize)]
struct Issue {
    message_type: &'static str,
    path: String,
    restored: bool,
    message: String,
}

fn summary(global: &Global, report: &RestoreReport) -> anyhow::Result<()> {
    if global.json {
        for issue in &report.issues {
            output::json_line(&Issue {
                message_type: "issue",
                path: output::path(&issue.path),
                restored: issue.restored,
                message: issue.reason.clone(),
            })?;
        }
        return output::json_line(&Summary {
            message_type: "summary",
            files: report.files,
            directories: report.directories,
            others: report.others,
            hard_links: report.hard_links,
            bytes: report.bytes,
            left: report.left,
            owners_skipped: report.owners_skipped,
            attributes_skipped: report.attributes_skipped,
            verified: report.verified,
            issues: report.issues_total,
        });
    }
    for issue in report.issues.iter().take(ISSUES_SHOWN) {
        let kind = if issue.restored { "restored, but" } else { "not restored" };
        output::error(
            false,
            Fate::Partial.code(),
            &format!("/{}: {kind}: {}", output::path(&issue.path), issue.reason),
        );
    }
    if global.quiet {
        return Ok(());
    }
    let mut text = format!(
        "{} files, {} directories, {} others, {} hard links, {} written\n",
        report.files,
        report.directories,
        report.others,
        report.hard_links,
        output::size(report.bytes)
    );
    let mut note = |count: u64, what: &str| {
        if count > 0 {
            text += &format!("{count} {what}\n");
        }
    };
    note(report.left, "left as they were");
    note(report.owners_skipped, "owners not set: only root may give files away");
    note(report.attributes_skipped, "extended attributes not set: not allowed or not supported here");
    note(report.verified, "files read again and found right");
    note(report.issues_total, "problems");
    output::print(text.as_bytes())
}
