//! `strand check`: what the server can tell without a key (digests, completeness), and what needs one (trees, contents).

use std::sync::Arc;
use std::sync::atomic::Ordering;

use anyhow::{Context, bail};
use clap::Args;
use serde::Serialize;
use strandline_messages::format::keys::Capability;
use strandline_messages::wire::manage::{Operation, Outcome, ScrubReport, ScrubSubset};
use strandline_messages::{BlockDigest, ChunkId};

use super::Fate;
use super::args::{self, Global};
use super::output;
use super::repository::Opened;
use super::selector::{self, Snapshot};
use super::session::{Reading, STREAMS};
use super::settings::Place;
use crate::verify::{Findings, Progress, Verifier};

/// `strand check`.
#[derive(Args, Debug)]
pub struct Check {
    /// Snapshots whose trees are verified: ids or their beginnings, `latest`, `latest~N` [default: all]
    pub snapshots: Vec<String>,
    /// Read every block and every file of these snapshots, too
    #[arg(long)]
    pub read_data: bool,
    /// Have the server read a part of its blocks: the N-th of T parts (`1/5`), a share (`10%`) or a size (`50G`)
    #[arg(long, value_name = "SUBSET", value_parser = subset, conflicts_with = "read_data")]
    pub read_data_subset: Option<ScrubSubset>,
}

fn subset(text: &str) -> Result<ScrubSubset, String> {
    if let Some((part, of)) = text.split_once('/') {
        return match (part.trim().parse(), of.trim().parse()) {
            (Ok(part), Ok(of)) if 1 <= part && part <= of => Ok(ScrubSubset::Part { part, of }),
            _ => Err(format!("`{text}` is not a part such as 1/5")),
        };
    }
    if let Some(number) = text.strip_suffix('%') {
        let share: f64 = number.trim().parse().map_err(|_| format!("`{text}` is not a share such as 10%"))?;
        if !(0.1..=100.0).contains(&share) {
            return Err(format!("`{text}` is not between 0.1% and 100%"));
        }
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is between 1 and 1000")]
        return Ok(ScrubSubset::Share { permille: (share * 10.0).round() as u32 });
    }
    args::bytes(text).map(|bytes| ScrubSubset::Bytes { bytes })
}

/// Runs the command.
pub async fn run(global: &Global, place: &Place, check: &Check) -> anyhow::Result<Fate> {
    let opened = Opened::existing(global, place).await?;
    let checked = checked(global, &opened, check).await;
    let closed = opened.server.close().await;
    let problems = checked?;
    closed?;
    if problems > 0 {
        bail!(
            "{problems} problems were found; everything else is intact; a backup of the same files heals damaged blocks, \
             and `strand restore` still gets back what is not affected"
        );
    }
    Ok(Fate::Done)
}

async fn checked(global: &Global, opened: &Opened, check: &Check) -> anyhow::Result<u64> {
    let mut snapshots = Vec::new();
    if check.snapshots.is_empty() {
        snapshots = selector::all(opened).await?;
    }
    for wanted in &check.snapshots {
        snapshots.push(selector::one(opened, wanted).await?);
    }
    let subset = match check.read_data_subset {
        Some(subset) => subset,
        None if check.read_data => ScrubSubset::All,
        // Nothing is read; what is known of damage is told.
        None => ScrubSubset::Bytes { bytes: 0 },
    };
    let scrubbed = scrub(opened, subset).await?;
    tell_scrubbed(global, &scrubbed)?;
    let mut problems = scrubbed.damaged_blocks + scrubbed.damaged_packs + scrubbed.affected.len() as u64;
    problems += trees(global, opened, &snapshots, check.read_data, &scrubbed).await?;
    Ok(problems)
}

async fn scrub(opened: &Opened, subset: ScrubSubset) -> anyhow::Result<ScrubReport> {
    let operation = Operation::Scrub { subset };
    match opened.server.client.manage(&opened.server.name, &opened.keyset, &operation).await? {
        Outcome::Scrubbed(report) => Ok(report),
        _ => bail!("the server answered with something else than a report: its version may not fit this program"),
    }
}

/// Verifies the trees, and the files if `read_data`; how many problems there are that the server did not tell.
async fn trees(
    global: &Global,
    opened: &Opened,
    snapshots: &[Snapshot],
    read_data: bool,
    scrubbed: &ScrubReport,
) -> anyhow::Result<u64> {
    let reading = Reading::open(opened, STREAMS).await?;
    let progress = Arc::new(Progress::default());
    let mut verifier = Verifier::new(read_data, Arc::clone(&progress));
    let (mut problems, mut lost) = (0, None);
    for snapshot in snapshots {
        let (source, manifest) = (reading.source(snapshot.id), snapshot.manifest.clone());
        let working = tokio::task::spawn_blocking(move || {
            let findings = verifier.verify(&source, manifest.root, manifest.errors);
            (verifier, findings)
        });
        let (back, findings) = working.await.context("verifying ended early")?;
        verifier = back;
        if findings.lost.is_some() && is_gone(opened, snapshot).await {
            tracing::warn!(snapshot = %snapshot.id.short(), "a snapshot was deleted for good while it was verified");
            continue;
        }
        // What the server knows to be affected was counted there.
        if !scrubbed.affected.contains(&snapshot.id) {
            problems += findings.problems_total;
        }
        tell_findings(global, snapshot, &findings)?;
        report_damage(opened, snapshot, &findings).await?;
        lost = findings.lost;
        if lost.is_some() {
            break;
        }
    }
    reading.close(opened, "").await;
    if let Some(reason) = lost {
        bail!("the repository cannot be read any more: {reason}; what was verified so far is told above");
    }
    tell_trees(global, snapshots.len(), &progress, read_data)?;
    Ok(problems)
}

/// Whether the snapshot is not listed any more: it was purged since the command began.
async fn is_gone(opened: &Opened, snapshot: &Snapshot) -> bool {
    match selector::all(opened).await {
        Ok(kept) => kept.iter().all(|other| other.id != snapshot.id),
        Err(_) => false,
    }
}

/// Contents that are wrong under right digests only a key holder can find: the server is told, so that they heal.
async fn report_damage(opened: &Opened, snapshot: &Snapshot, findings: &Findings) -> anyhow::Result<()> {
    if findings.wrong.is_empty() || opened.keyset.capability() != Capability::Full {
        return Ok(());
    }
    let pair = |(chunk, block): &(ChunkId, BlockDigest)| [*chunk.as_bytes(), *block.as_bytes()].concat();
    for page in findings.wrong.chunks(strandline_messages::limits::MANAGED_BLOCKS_MAX) {
        let blocks: Vec<u8> = page.iter().flat_map(pair).collect();
        let operation = Operation::ReportDamage { snapshot: snapshot.id, blocks: blocks.into() };
        opened.server.client.manage(&opened.server.name, &opened.keyset, &operation).await?;
    }
    Ok(())
}

#[derive(Serialize)]
struct Scrubbed<'a> {
    message_type: &'static str,
    blocks: u64,
    bytes: u64,
    damaged_blocks: u64,
    damaged_packs: u64,
    damaged: &'a [String],
    withdrawn_before: u64,
    affected_snapshots: Vec<String>,
    least_recently_verified: Option<String>,
}

fn tell_scrubbed(global: &Global, report: &ScrubReport) -> anyhow::Result<()> {
    let affected: Vec<String> = report.affected.iter().map(ToString::to_string).collect();
    let oldest = (report.oldest_ns > 0).then(|| output::rfc3339(report.oldest_ns));
    if global.json {
        return output::json_line(&Scrubbed {
            message_type: "scrubbed",
            blocks: report.blocks,
            bytes: report.bytes,
            damaged_blocks: report.damaged_blocks,
            damaged_packs: report.damaged_packs,
            damaged: &report.damaged,
            withdrawn_before: report.withdrawn_before,
            affected_snapshots: affected,
            least_recently_verified: oldest,
        });
    }
    for damaged in &report.damaged {
        output::error(false, 1, damaged);
    }
    for id in &affected {
        let id = id.get(..8).unwrap_or_default();
        output::error(false, 1, &format!("snapshot {id} cannot be restored completely"));
    }
    if global.quiet {
        return Ok(());
    }
    let mut text = String::new();
    if report.blocks > 0 {
        text += &format!("server: {} blocks read, {}\n", report.blocks, output::size(report.bytes));
    }
    if report.withdrawn_before > 0 {
        text += &format!("server: {} blocks were found damaged earlier\n", report.withdrawn_before);
    }
    output::print(text.as_bytes())
}

#[derive(Serialize)]
struct ProblemLine {
    message_type: &'static str,
    snapshot: String,
    path: String,
    message: String,
}

fn tell_findings(global: &Global, snapshot: &Snapshot, findings: &Findings) -> anyhow::Result<()> {
    for problem in &findings.problems {
        let path = format!("/{}", output::path(&problem.path));
        if global.json {
            let (snapshot, message) = (snapshot.id.to_string(), problem.reason.clone());
            output::json_line(&ProblemLine { message_type: "problem", snapshot, path, message })?;
        } else {
            output::error(false, 1, &format!("snapshot {}: {path}: {}", snapshot.id.short(), problem.reason));
        }
    }
    Ok(())
}

#[derive(Serialize)]
struct Summary {
    message_type: &'static str,
    snapshots: usize,
    entries: u64,
    chunks_read: u64,
    bytes_read: u64,
}

fn tell_trees(global: &Global, snapshots: usize, progress: &Progress, read_data: bool) -> anyhow::Result<()> {
    let entries = progress.entries.load(Ordering::Relaxed);
    let (chunks_read, bytes_read) = (progress.chunks.load(Ordering::Relaxed), progress.bytes.load(Ordering::Relaxed));
    if global.json {
        return output::json_line(&Summary { message_type: "summary", snapshots, entries, chunks_read, bytes_read });
    }
    if global.quiet {
        return Ok(());
    }
    let mut text = format!("{snapshots} snapshots: {entries} entries of distinct directories verified\n");
    if read_data {
        text += &format!("{chunks_read} chunks of files, {}, read and compared\n", output::size(bytes_read));
    }
    output::print(text.as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_subset_is_a_part_a_share_or_a_size() {
        assert_eq!(subset("2/5"), Ok(ScrubSubset::Part { part: 2, of: 5 }));
        assert_eq!(subset("2.5%"), Ok(ScrubSubset::Share { permille: 25 }));
        assert_eq!(subset("1G"), Ok(ScrubSubset::Bytes { bytes: 1 << 30 }));
        for bad in ["0/5", "6/5", "0%", "101%", "x", "1/x"] {
            assert!(subset(bad).is_err(), "{bad}");
        }
    }
}
