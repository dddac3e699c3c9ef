//! `strand backup`.

use std::fs::DirBuilder;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, anyhow, bail};
use clap::Args;
use serde::Serialize;
use strandline_actors::runtime::clock;
use strandline_messages::format::manifest::DetailsV1;
use strandline_messages::format::tree::Timestamp;
use strandline_messages::limits;
use tokio::signal::unix::{SignalKind, signal};

use super::Fate;
use super::args::{self, Global};
use super::lists::PathLists;
use super::output;
use super::pipe;
use super::progress::{Snapshot, is_watched, shown};
use super::repository::{Opened, host_name};
use super::secrets;
use super::selection::Selection;
use super::settings::{Place, Settings};
use crate::backup::{BackupPlan, StreamSource};
use crate::cache::Ignoring;
use crate::job::{BackupReport, BackupRequest, JobView, run_backup};
use crate::net::SessionSettings;
use crate::scan::walk::identity_of;
use crate::seal::Compression;

const STREAMS: u16 = 4;
pub(super) const WINDOW_BYTES: u64 = 32 << 20;

/// `strand backup`.
#[derive(Args, Debug)]
pub struct Backup {
    /// Files and directories to save; with --stdin-from-command: the command, after `--`
    #[arg(value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Lists of paths.
    #[command(flatten)]
    pub lists: PathLists,
    /// Save standard input as a file of this name
    #[arg(long, value_name = "NAME")]
    pub stdin_filename: Option<PathBuf>,
    /// Save what the command after `--` prints, if it succeeds, as the file of --stdin-filename [default: stdin]
    #[arg(long, conflicts_with_all = ["files_from", "files_from_verbatim", "files_from_raw"])]
    pub stdin_from_command: bool,
    /// What to leave out.
    #[command(flatten)]
    pub selection: Selection,
    /// Tag of the snapshot; may be repeated or separated by commas
    #[arg(long, value_name = "TAG", value_delimiter = ',')]
    pub tag: Vec<String>,
    /// Host label [default: this machine's host name]
    #[arg(long)]
    pub host: Option<String>,
    /// Time of the snapshot instead of now (`2026-01-31 12:00:00` here, or RFC 3339)
    #[arg(long, value_parser = args::moment, value_name = "TIME")]
    pub time: Option<i64>,
    /// Parallel data streams, 1 to 64; the server may allow fewer
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub streams: Option<u16>,
    /// Send at most so much per second, over all streams (`500K`, `10M`; bytes without a unit)
    #[arg(long, value_name = "RATE", value_parser = args::bytes)]
    pub limit_upload: Option<u64>,
    /// Unacknowledged data that may be under way (`32M` if not given)
    #[arg(long, value_name = "SIZE", value_parser = args::bytes)]
    pub window: Option<u64>,
    /// Level of zstd, 1 (fast) to 19 (small), or `auto`: 3, and up to 6 while there is time for it
    /// [default: auto]
    #[arg(long, value_name = "LEVEL")]
    pub compression: Option<Compression>,
    /// Read every file, whatever the file cache says
    #[arg(long)]
    pub force: bool,
    /// Take a file for unchanged whatever its inode number and ctime say
    #[arg(long)]
    pub ignore_inode: bool,
    /// Take a file for unchanged whatever its ctime says
    #[arg(long)]
    pub ignore_ctime: bool,
    /// Send and store nothing; tell what would be
    #[arg(short = 'n', long)]
    pub dry_run: bool,
}

/// Runs the command.
pub async fn run(global: &Global, place: &Place, backup: Backup) -> anyhow::Result<Fate> {
    make_private(&place.state_dir)?;
    let request = request(place, backup)?;
    make_private(&request.cache_directory)?;
    let opened = Opened::writable(global, place).await?;
    let outcome = with_signals(global, &opened, request).await;
    let closed = opened.server.close().await;
    let (report, dry_run) = outcome?;
    closed?;
    summary(global, &report, dry_run)?;
    Ok(if report.totals.errors > 0 { Fate::Partial } else { Fate::Done })
}

/// File caches hold names and small contents: they are nobody else's business.
pub fn make_private(directory: &Path) -> anyhow::Result<()> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .with_context(|| format!("cannot make the state directory {}", directory.display()))
}

fn request(place: &Place, backup: Backup) -> anyhow::Result<BackupRequest> {
    let settings = &place.settings;
    let size = |given: Option<u64>, set: &Option<String>| -> anyhow::Result<Option<u64>> {
        match (given, set) {
            (Some(bytes), _) => Ok(Some(bytes)),
            (None, Some(text)) => Ok(Some(args::bytes(text).map_err(anyhow::Error::msg)?)),
            (None, None) => Ok(None),
        }
    };
    let limit_upload = size(backup.limit_upload, &settings.limit_upload)?;
    let window = size(backup.window, &settings.window)?.unwrap_or(WINDOW_BYTES);
    if window < limits::BLOCK_BYTES_MAX as u64 {
        bail!(
            "a window of {} is less than one block: use at least {}",
            output::size(window),
            output::size(limits::BLOCK_BYTES_MAX as u64)
        );
    }
    let mut plan = plan(place, &backup)?;
    backup.selection.apply(settings, &mut plan)?;
    plan.compression = compression(backup.compression, settings)?;
    let details = DetailsV1 {
        paths: plan.paths.iter().map(|path| absolute(path).as_os_str().as_bytes().to_vec()).collect(),
        excludes: plan.excludes.iter().chain(&plan.iexcludes).cloned().collect(),
        user: std::env::var("USER").unwrap_or_default(),
        system: system(),
        program: concat!("strandline ", env!("CARGO_PKG_VERSION")).to_owned(),
        command: secrets::without_commands(std::env::args_os().map(|word| word.to_string_lossy().into_owned())),
    };
    Ok(BackupRequest {
        cache_directory: place.state_dir.join("caches"),
        session: SessionSettings {
            streams: backup.streams.or(settings.streams).unwrap_or(STREAMS).clamp(1, limits::STREAMS_MAX),
            window_bytes: usize::try_from(window)?,
            limit_upload: limit_upload.map(|rate| u32::try_from(rate).unwrap_or(u32::MAX)),
        },
        force: backup.force,
        ignoring: Ignoring {
            inode: backup.ignore_inode || settings.ignore_inode,
            ctime: backup.ignore_ctime || settings.ignore_ctime,
        },
        time_ns: backup.time,
        dry_run: backup.dry_run,
        host: backup.host.or_else(|| settings.host.clone()).unwrap_or_else(host_name),
        tags: backup.tag,
        details,
        plan,
    })
}

/// As wished for on the command line, or else in the settings.
pub fn compression(given: Option<Compression>, settings: &Settings) -> anyhow::Result<Compression> {
    match (given, &settings.compression) {
        (Some(given), _) => Ok(given),
        (None, Some(text)) => text.parse().map_err(|error| anyhow!("the setting `compression`: {error}")),
        (None, None) => Ok(Compression::default()),
    }
}

/// What to save.
fn plan(place: &Place, backup: &Backup) -> anyhow::Result<BackupPlan> {
    let default = backup.stdin_from_command.then(|| PathBuf::from("stdin"));
    let Some(name) = backup.stdin_filename.clone().or(default) else {
        let mut paths = backup.paths.clone();
        // A list may say something else each time and still go on from the same file cache.
        let lists = backup.lists.names().map(|list| absolute(list));
        let cached_as = paths.iter().cloned().chain(lists).collect();
        paths.extend(backup.lists.paths()?);
        if paths.is_empty() {
            bail!("there is nothing to save: name paths, or lists of them with --files-from, or use --stdin-filename");
        }
        let mut plan = BackupPlan::new(paths, place.state_dir.clone());
        plan.cached_as = cached_as;
        return Ok(plan);
    };
    let pipe = if backup.stdin_from_command {
        let words: Vec<_> = backup.paths.iter().map(|word| word.as_os_str().to_owned()).collect();
        pipe::of_command(&words)?
    } else if backup.paths.is_empty() && backup.lists.is_empty() {
        pipe::standard_input()
    } else {
        bail!("--stdin-filename saves standard input alone: leave out the other paths");
    };
    let now = clock::wall_ns();
    let mtime =
        Timestamp { seconds: now.div_euclid(1_000_000_000), nanos: u32::try_from(now.rem_euclid(1_000_000_000))? };
    let stream = StreamSource::new(name.as_os_str().as_bytes(), mtime, pipe)
        .with_context(|| format!("{} cannot be the name of a file", name.display()))?;
    let mut plan = BackupPlan::new(vec![Path::new("/").join(name)], place.state_dir.clone());
    plan.stream = Some(stream);
    Ok(plan)
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn system() -> String {
    let name = rustix::system::uname();
    format!("{} {}", name.sysname().to_string_lossy(), name.release().to_string_lossy())
}

async fn with_signals(
    global: &Global,
    opened: &Opened,
    mut request: BackupRequest,
) -> anyhow::Result<(BackupReport, bool)> {
    // A repository inside the source must not save itself.
    request.plan.skip.extend(opened.server.directory.as_deref().and_then(identity_of));
    request.plan.estimate = is_watched(global);
    let dry_run = request.dry_run;
    let view = Arc::new(JobView::default());
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let stopper = request.plan.stream.as_ref().map(StreamSource::stopper);
    let stopping = {
        let view = Arc::clone(&view);
        async move {
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
            tracing::info!("stopping: what is sealed is still delivered");
            view.interrupt();
            // Whoever writes into the pipe may be silent for long.
            if let Some(stop) = &stopper {
                stop.store(true, Ordering::Relaxed);
            }
            tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        }
    };
    let look = {
        let view = Arc::clone(&view);
        Arc::new(move || look(&view))
    };
    let backup = run_backup(&opened.server.client, &opened.info.file, &opened.keyset, request, &view);
    tokio::select! {
        report = shown(global, look, backup) => Ok((report?, dry_run)),
        // Asked twice: at once.
        () = stopping => Err(super::fate::Interrupted("no snapshot was made, earlier ones are intact").into()),
    }
}

fn look(view: &JobView) -> Snapshot {
    let now = view.progress.now();
    Snapshot {
        files_done: now.files + now.others,
        files_total: now.estimated_files.max(now.files + now.others),
        bytes_done: now.bytes,
        bytes_total: now.estimated_bytes.max(now.bytes),
        totals_final: now.estimated,
        bytes_new: now.bytes_new,
        streams: view.dispatch.streams.load(Ordering::Relaxed),
        errors: now.errors,
        current: output::path(&view.progress.current_path()),
    }
}

#[derive(Serialize)]
struct Summary {
    message_type: &'static str,
    dry_run: bool,
    snapshot_id: Option<String>,
    parent: Option<String>,
    files: u64,
    directories: u64,
    others: u64,
    files_read: u64,
    bytes: u64,
    bytes_new: u64,
    bytes_stored: u64,
    errors: u64,
    seconds: f64,
    reconnects: u64,
}

/// Something that whoever watches over a fleet wants to know.
#[derive(Serialize)]
struct Notice {
    message_type: &'static str,
    event: &'static str,
    snapshot_id: String,
    message: String,
}

#[derive(Serialize)]
struct Issue {
    message_type: &'static str,
    path: String,
    message: String,
}

/// That the server does not remember the last snapshot. The backup is good nevertheless.
fn events(global: &Global, report: &BackupReport) -> anyhow::Result<()> {
    let Some(lost) = report.lost_parent else { return Ok(()) };
    let message = format!(
        "the server went back to an older state: snapshot {}, the last one of these paths, is not there and was never \
         deleted. Everything was read again, and what was missing was sent again; older snapshots may be gone",
        lost.short()
    );
    if global.json {
        let (message_type, event) = ("event", "server_rolled_back");
        return output::json_line(&Notice { message_type, event, snapshot_id: lost.to_string(), message });
    }
    output::error(false, Fate::Done.code(), &message);
    Ok(())
}

/// What could not be saved as it is, the first of it by name.
fn issues(global: &Global, report: &BackupReport) -> anyhow::Result<()> {
    for issue in &report.issues {
        let path = output::path(&issue.path);
        if global.json {
            output::json_line(&Issue { message_type: "issue", path, message: issue.message.clone() })?;
        } else {
            output::error(false, Fate::Partial.code(), &format!("{path}: {}", issue.message));
        }
    }
    let shown = report.issues.len() as u64;
    if report.totals.errors > shown && !global.json {
        let rest = report.totals.errors - shown;
        output::error(false, Fate::Partial.code(), &format!("{rest} more are in the snapshot's list of errors"));
    }
    Ok(())
}

fn summary(global: &Global, report: &BackupReport, dry_run: bool) -> anyhow::Result<()> {
    let totals = &report.totals;
    events(global, report)?;
    issues(global, report)?;
    if global.json {
        return output::json_line(&Summary {
            message_type: "summary",
            dry_run,
            snapshot_id: report.snapshot.map(|id| id.to_string()),
            parent: report.parent.map(|id| id.to_string()),
            files: totals.files,
            directories: totals.directories,
            others: totals.others,
            files_read: totals.files_read,
            bytes: totals.bytes,
            bytes_new: totals.bytes_new,
            bytes_stored: totals.bytes_stored,
            errors: totals.errors,
            seconds: report.elapsed.as_secs_f64(),
            reconnects: report.reconnects,
        });
    }
    if global.quiet {
        return Ok(());
    }
    let stored = if dry_run { String::new() } else { format!(", {} stored", output::size(totals.bytes_stored)) };
    let mut text = format!(
        "{} files, {} directories, {} others, {} in {}\n{} files read, {} new{stored}\n",
        totals.files,
        totals.directories,
        totals.others,
        output::size(totals.bytes),
        output::span(report.elapsed),
        totals.files_read,
        output::size(totals.bytes_new),
    );
    if totals.errors > 0 {
        text += &format!("{} things could not be saved as they are; everything else was\n", totals.errors);
    }
    match report.snapshot {
        Some(id) => text += &format!("snapshot {} saved\n", id.short()),
        None => text.push_str("dry run: nothing was sent or stored\n"),
    }
    output::print(text.as_bytes())
}
