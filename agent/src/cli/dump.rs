//! `strand dump`.

use std::ffi::OsString;
use std::fs::File;
use std::io::{BufWriter, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use serde::Serialize;
use tempfile::NamedTempFile;
use tokio::signal::unix::{SignalKind, signal};

use super::Fate;
use super::args::Global;
use super::fate::Interrupted;
use super::listing;
use super::output;
use super::repository::Opened;
use super::selector;
use super::session::{Reading, STREAMS};
use super::settings::Place;
use crate::export::{Archive, Export, ExportError, ExportOptions, Exported};

/// Bytes that are written at a time.
const BUFFER_BYTES: usize = 256 << 10;

/// `strand dump`.
#[derive(Args, Debug)]
pub struct Dump {
    /// An id or its beginning, `latest` or `latest~N`; then optionally `:PATH`
    snapshot: String,
    /// File or directory in the snapshot, or below `:PATH`
    #[arg(value_name = "PATH")]
    path: Option<OsString>,
    /// Write an archive of this kind, of a single file, too [default for directories: tar]
    #[arg(short, long, value_enum, value_name = "KIND")]
    archive: Option<Kind>,
    /// Write into this file instead of standard output; it gets its name when it is complete
    #[arg(short, long, value_name = "FILE")]
    target: Option<PathBuf>,
    /// Parallel data streams, 1 to 64; the server may allow fewer
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    streams: Option<u16>,
}

/// `--archive`.
#[derive(ValueEnum, Clone, Copy, Debug)]
enum Kind {
    /// With everything that belongs to files
    Tar,
    /// Without hard links, devices, pipes, extended attributes
    Zip,
}

/// Runs the command.
pub async fn run(global: &Global, place: &Place, dump: Dump) -> anyhow::Result<Fate> {
    let opened = Opened::existing(global, place).await?;
    let streams = dump.streams.or(place.settings.streams).unwrap_or(STREAMS).max(1);
    let dumped = write(place, &opened, &dump, streams).await;
    let closed = opened.server.close().await;
    let exported = match dumped {
        // Whoever read the output wanted no more of it.
        Err(error) if error.downcast_ref().is_some_and(ExportError::is_closed_pipe) => return Ok(Fate::Done),
        dumped => dumped?,
    };
    closed?;
    tell(global, dump.target.as_deref(), &exported)?;
    Ok(if exported.flaws == 0 { Fate::Done } else { Fate::Partial })
}

async fn write(place: &Place, opened: &Opened, dump: &Dump, streams: u16) -> anyhow::Result<Exported> {
    let (wanted, mut path) = selector::split(&dump.snapshot);
    if let Some(below) = &dump.path {
        path.push(b'/');
        path.extend_from_slice(below.as_bytes());
    }
    let snapshot = selector::one(opened, wanted).await?;
    std::fs::create_dir_all(&place.state_dir)
        .with_context(|| format!("cannot make {} for temporary files", place.state_dir.display()))?;
    let options = ExportOptions::new(place.state_dir.clone());
    let archive = dump.archive.map(|kind| match kind {
        Kind::Tar => Archive::Tar,
        Kind::Zip => Archive::Zip,
    });
    let cancel = Arc::clone(&options.cancel);
    let target = dump.target.clone();
    let reading = Reading::open(opened, streams).await?;
    let source = reading.source(snapshot.id);
    let working = tokio::task::spawn_blocking(move || {
        let export = Export::find(source, snapshot.manifest.root, &path, archive)?;
        write_to(&export, target.as_deref(), &options)
    });
    let written = tokio::select! {
        written = working => written.context("the dump ended early")?,
        () = interrupted(cancel)? => bail!(Interrupted("what was written is not complete")),
    };
    let reason = if written.is_ok() { "" } else { "the dump did not finish" };
    reading.close(opened, reason).await;
    match written {
        Err(error) if matches!(error.downcast_ref(), Some(ExportError::Cancelled)) => {
            bail!(Interrupted("what was written is not complete"))
        }
        written => written,
    }
}

/// The first signal asks to stop soon, the second one ends at once.
fn interrupted(cancel: Arc<AtomicBool>) -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
        cancel.store(true, Ordering::Relaxed);
        tokio::select! { _ = terminate.recv() => {}, _ = interrupt.recv() => {} }
    })
}

fn write_to(export: &Export, target: Option<&Path>, options: &ExportOptions) -> anyhow::Result<Exported> {
    let Some(target) = target else {
        let stdout = std::io::stdout();
        if export.archive().is_some() && stdout.is_terminal() {
            bail!(
                "an archive is not written to a terminal: send it into a pipe or a file, or name one with --target; \
                 nothing was written"
            );
        }
        // Standard output as the standard library has it looks for ends of lines.
        return into(export, File::from(stdout.as_fd().try_clone_to_owned()?), options);
    };
    let unusable = || format!("{} cannot be written; nothing was written", target.display());
    // A pipe or a device is written as it is; a file appears when it is complete.
    if target.metadata().is_ok_and(|found| !found.is_file()) {
        return into(export, File::options().write(true).open(target).with_context(unusable)?, options);
    }
    let directory = match target.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let unfinished = NamedTempFile::with_prefix_in(".strand-dump-", directory).with_context(unusable)?;
    let exported = into(export, unfinished.as_file().try_clone()?, options)?;
    unfinished.as_file().sync_all().with_context(unusable)?;
    unfinished.persist(target).map_err(|error| error.error).with_context(unusable)?;
    Ok(exported)
}

fn into(export: &Export, file: File, options: &ExportOptions) -> anyhow::Result<Exported> {
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, file);
    let exported = export.write(&mut out, options)?;
    out.flush().map_err(ExportError::Output)?;
    Ok(exported)
}

#[derive(Serialize)]
struct Summary {
    message_type: &'static str,
    entries: u64,
    bytes: u64,
    left_out: u64,
    flaws: u64,
}

/// Remarks go to standard error; a summary to standard output, if that does not have the data.
fn tell(global: &Global, target: Option<&Path>, exported: &Exported) -> anyhow::Result<()> {
    let flawed = exported.flaws > 0;
    if !global.quiet || flawed {
        let code = if flawed { Fate::Partial.code() } else { Fate::Done.code() };
        for (path, remark) in &exported.remarks {
            output::error(global.json, code, &format!("{}: {remark}", listing::shown(path)));
        }
        let more = (exported.left_out + exported.flaws).saturating_sub(exported.remarks.len() as u64);
        if more > 0 {
            output::error(global.json, code, &format!("{more} more entries were left out, padded or cut"));
        }
    }
    let Some(target) = target else { return Ok(()) };
    if global.json {
        return output::json_line(&Summary {
            message_type: "summary",
            entries: exported.entries,
            bytes: exported.bytes,
            left_out: exported.left_out,
            flaws: exported.flaws,
        });
    }
    if global.quiet {
        return Ok(());
    }
    let size = output::size(exported.bytes);
    output::print(format!("{} entries, {size} written to {}\n", exported.entries, target.display()).as_bytes())
}
