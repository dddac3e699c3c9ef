//! `strand prune`: frees what no snapshot needs any more; with `--repack` reseals blocks that are partly dead.

use anyhow::bail;
use clap::Args;
use serde::Serialize;
use strandline_messages::wire::manage::{GcReport, Operation, Outcome};

use super::Fate;
use super::args::Global;
use super::backup::{WINDOW_BYTES, compression};
use super::output;
use super::repository::Opened;
use super::session::{Reading, STREAMS};
use super::settings::Place;
use crate::net::SessionSettings;
use crate::repack::{Repack, RepackReport};
use crate::seal::Compression;

/// `strand prune`.
#[derive(Args, Debug, Clone)]
pub struct Prune {
    /// Only tell what would be freed
    #[arg(short = 'n', long)]
    pub dry_run: bool,
    /// Reseal blocks that hold both needed and unneeded chunks, so that they can be freed; needs the full key
    #[arg(long)]
    pub repack: bool,
    /// With --repack: leave about so much unneeded data in partly needed blocks (`5%` of what is needed, `1G`, `0`)
    #[arg(long, value_name = "SHARE", default_value = "5%", value_parser = unused)]
    pub max_unused: Unused,
    /// With --repack: level of zstd, 1 (fast) to 19 (small), or `auto`: 6 [default: auto]
    #[arg(long, value_name = "LEVEL")]
    pub compression: Option<Compression>,
    /// Purge deleted snapshots now instead of after the undelete time; only of a repository in a local directory
    #[arg(long)]
    pub purge_deleted: bool,
}

impl Prune {
    /// Collects, and nothing else.
    pub fn after_forget(dry_run: bool) -> Self {
        Self { dry_run, repack: false, max_unused: Unused::Percent(100), compression: None, purge_deleted: false }
    }
}

/// `--max-unused`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unused {
    /// Percent of the needed bytes.
    Percent(u64),
    /// Bytes.
    Bytes(u64),
}

impl Unused {
    fn bytes(self, live: u64) -> u64 {
        match self {
            Self::Percent(percent) => live / 100 * percent,
            Self::Bytes(bytes) => bytes,
        }
    }
}

fn unused(text: &str) -> Result<Unused, String> {
    match text.strip_suffix('%') {
        Some(number) => match number.trim().parse() {
            Ok(percent @ 0..=100) => Ok(Unused::Percent(percent)),
            _ => Err(format!("`{text}` is not a share from 0% to 100%")),
        },
        None if text == "0" => Ok(Unused::Bytes(0)),
        None => super::args::bytes(text).map(Unused::Bytes),
    }
}

/// Runs the command.
pub async fn run(global: &Global, place: &Place, prune: &Prune) -> anyhow::Result<Fate> {
    let prune = Prune { compression: Some(compression(prune.compression, &place.settings)?), ..prune.clone() };
    let opened = Opened::existing(global, place).await?;
    let pruned = pruned(global, &opened, &prune).await;
    let closed = opened.server.close().await;
    pruned?;
    closed?;
    Ok(Fate::Done)
}

/// Does the work on an open repository and tells what it came to.
pub async fn pruned(global: &Global, opened: &Opened, prune: &Prune) -> anyhow::Result<()> {
    let first = collect(opened, prune.dry_run, prune.purge_deleted).await?;
    tell(global, &first)?;
    if !prune.repack {
        return Ok(());
    }
    let allowed = prune.max_unused.bytes(first.bytes_live);
    let excess = first.bytes_pinned.saturating_sub(allowed);
    if excess == 0 || prune.dry_run {
        return tell_excess(global, excess, allowed);
    }
    let resealed = repack(opened, excess, prune.compression.unwrap_or_default()).await?;
    tell_resealed(global, &resealed)?;
    tell(global, &collect(opened, false, false).await?)
}

async fn collect(opened: &Opened, dry_run: bool, purge: bool) -> anyhow::Result<GcReport> {
    let operation = Operation::CollectGarbage { dry_run, purge: purge && !dry_run };
    match opened.server.client.manage(&opened.server.name, &opened.keyset, &operation).await? {
        Outcome::Collected(report) => Ok(report),
        _ => bail!("the server answered with something else than a report: its version may not fit this program"),
    }
}

async fn repack(opened: &Opened, bytes_wasted: u64, compression: Compression) -> anyhow::Result<RepackReport> {
    let reading = Reading::open(opened, STREAMS).await?;
    let repack = Repack {
        client: &opened.server.client,
        repository: &opened.info.file,
        keyset: &opened.keyset,
        source: reading.own_source(),
        session: SessionSettings { streams: STREAMS, window_bytes: usize::try_from(WINDOW_BYTES)?, limit_upload: None },
        level: compression.thorough(),
    };
    let resealed = repack.run(bytes_wasted).await;
    let reason = if resealed.is_ok() { "" } else { "resealing did not finish" };
    reading.close(opened, reason).await;
    Ok(resealed?)
}

#[derive(Serialize)]
struct Collected {
    message_type: &'static str,
    #[serde(flatten)]
    report: GcReport,
}

fn tell(global: &Global, report: &GcReport) -> anyhow::Result<()> {
    if global.json {
        return output::json_line(&Collected { message_type: "collected", report: *report });
    }
    if global.quiet {
        return Ok(());
    }
    output::print(text(report).as_bytes())
}

fn text(report: &GcReport) -> String {
    let size = output::size;
    let mut text = format!(
        "{} snapshots need {} of {} chunks, {} of blocks\n",
        report.snapshots,
        report.chunks_needed,
        report.chunks_stored,
        size(report.bytes_live)
    );
    let mut note = |count: u64, line: String| {
        if count > 0 {
            text += &line;
            text.push('\n');
        }
    };
    note(report.purged, format!("{} deleted snapshots purged", report.purged));
    if report.dry_run {
        note(
            report.blocks_condemned,
            format!("would free {} blocks, {}", report.blocks_condemned, size(report.bytes_condemned)),
        );
    } else {
        note(report.blocks_freed, format!("freed {} blocks, {}", report.blocks_freed, size(report.bytes_freed)));
    }
    note(report.packs_dropped, format!("{} packs removed", report.packs_dropped));
    note(report.blocks_moved, format!("{} blocks moved out of packs that were nearly empty", report.blocks_moved));
    note(
        report.blocks_waiting,
        format!(
            "{} blocks, {}, wait until the sessions have ended that may rely on them",
            report.blocks_waiting,
            size(report.bytes_waiting)
        ),
    );
    note(report.blocks_young, format!("{} blocks kept for backups that were interrupted", report.blocks_young));
    note(
        report.blocks_partly_dead,
        format!(
            "{} blocks hold about {} that nothing needs; `strand prune --repack` reseals them",
            report.blocks_partly_dead,
            size(report.bytes_pinned)
        ),
    );
    text
}

fn tell_excess(global: &Global, excess: u64, allowed: u64) -> anyhow::Result<()> {
    if global.json || global.quiet {
        return Ok(());
    }
    let line = if excess == 0 {
        format!("nothing to reseal: up to {} may be unneeded (--max-unused)\n", output::size(allowed))
    } else {
        format!("would reseal blocks that hold about {} too much\n", output::size(excess))
    };
    output::print(line.as_bytes())
}

#[derive(Serialize)]
struct Resealed {
    message_type: &'static str,
    blocks: u64,
    bytes: u64,
    chunks: u64,
    bytes_stored: u64,
    blocks_of_others: u64,
}

fn tell_resealed(global: &Global, report: &RepackReport) -> anyhow::Result<()> {
    let RepackReport { blocks, bytes, chunks, bytes_stored, blocks_of_others } = *report;
    if global.json {
        let message_type = "resealed";
        return output::json_line(&Resealed { message_type, blocks, bytes, chunks, bytes_stored, blocks_of_others });
    }
    if global.quiet {
        return Ok(());
    }
    let mut text =
        format!("resealed {blocks} blocks, {}: {chunks} chunks, {}\n", output::size(bytes), output::size(bytes_stored));
    if blocks_of_others > 0 {
        text += &format!("{blocks_of_others} blocks of write-only agents stay as they are\n");
    }
    output::print(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_a_percentage_or_a_size() {
        assert_eq!(unused("5%"), Ok(Unused::Percent(5)));
        assert_eq!(unused("1G"), Ok(Unused::Bytes(1 << 30)));
        assert_eq!(unused("0"), Ok(Unused::Bytes(0)));
        assert_eq!(Unused::Percent(5).bytes(1000), 50);
        assert!(unused("101%").is_err() && unused("x").is_err());
    }
}
