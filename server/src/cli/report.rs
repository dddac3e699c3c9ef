//! What people and programs are shown of repositories.

use std::io::Write;

use serde::Serialize;
use serde_json::{Value, json};
use strandline_messages::wire::manage::GcReport;

use super::output::{date, print_json, size, table};
use super::{EXIT_DONE, EXIT_FAILED};
use crate::admin::repositories::{
    JobNote, JobResult, Kept, RepositoryDetails, RepositoryReply, RepositorySummary, SnapshotSummary,
};
use crate::engine::upkeep::ScrubSummary;

/// Prints the answer; returns the exit code: failed if something was left undone, or damage was found.
pub(super) fn reply(
    out: &mut dyn Write,
    err: &mut dyn Write,
    json: bool,
    reply: RepositoryReply,
) -> anyhow::Result<u8> {
    match reply {
        RepositoryReply::List { repositories } if json => rows(out, &repositories)?,
        RepositoryReply::List { repositories } => list(out, &repositories)?,
        RepositoryReply::Shown(details) if json => print_json(out, &details)?,
        RepositoryReply::Shown(details) => show(out, &details)?,
        RepositoryReply::Snapshots { snapshots } if json => rows(out, &snapshots)?,
        RepositoryReply::Snapshots { snapshots } => list_snapshots(out, &snapshots)?,
        RepositoryReply::Decided { done, kept } => return decided(out, err, json, &done, &kept),
        RepositoryReply::Collected { results } => return jobs(out, err, json, "gc", results, collected),
        RepositoryReply::Scrubbed { results } => return jobs(out, err, json, "scrub", results, scrubbed),
    }
    Ok(EXIT_DONE)
}

fn rows<T: Serialize>(out: &mut dyn Write, rows: &[T]) -> anyhow::Result<()> {
    rows.iter().try_for_each(|row| print_json(out, row))
}

fn list(out: &mut dyn Write, repositories: &[RepositorySummary]) -> anyhow::Result<()> {
    let row = |repository: &RepositorySummary| {
        let totals = repository.totals.unwrap_or_default();
        let state = match (&repository.error, totals.damaged_blocks) {
            (Some(error), _) => format!("cannot be used: {error}"),
            (None, 0) => "fine".to_owned(),
            (None, damaged) => format!("{damaged} damaged blocks"),
        };
        vec![
            repository.repository.to_string(),
            totals.snapshots.to_string(),
            totals.deleted.to_string(),
            size(totals.stored_bytes),
            state,
        ]
    };
    let head = ["REPOSITORY", "SNAPSHOTS", "DELETED", "STORED", "STATE"];
    table(out, &head, repositories.iter().map(row).collect())
}

fn show(out: &mut dyn Write, details: &RepositoryDetails) -> anyhow::Result<()> {
    let RepositoryDetails { repository, id, created_ns, totals, settings, maintenance } = details;
    writeln!(out, "repository {repository}, id {id}, made {}", date(*created_ns))?;
    writeln!(
        out,
        "{} snapshots, {} deleted ones that can be brought back; {} in {} packs, {} blocks, {} chunks",
        totals.snapshots,
        totals.deleted,
        size(totals.stored_bytes),
        totals.packs,
        totals.blocks,
        totals.chunks
    )?;
    if totals.condemned_blocks + totals.damaged_blocks > 0 {
        writeln!(
            out,
            "{} blocks wait to be freed, {} were found damaged and are not replaced yet",
            totals.condemned_blocks, totals.damaged_blocks
        )?;
    }
    writeln!(out, "\nsettings (`repository set {repository} KEY=VALUE`)")?;
    let settings = serde_json::to_value(settings)?;
    for (key, value) in settings.as_object().into_iter().flatten() {
        let value = match value {
            Value::Null => "none".to_owned(),
            Value::String(text) => text.clone(),
            other => other.to_string(),
        };
        writeln!(out, "  {key:<24}{value}")?;
    }
    writeln!(out, "\nmaintenance")?;
    if maintenance.is_empty() {
        writeln!(out, "  nothing was done yet")?;
    }
    for JobNote { job, finished_ns, error, report } in maintenance {
        let told = match (error, report) {
            (Some(error), _) => format!("failed: {error}"),
            (None, report) => nonzero(report.as_ref()),
        };
        writeln!(out, "  {job:<8}{}  {told}", date(*finished_ns))?;
    }
    Ok(())
}

/// The numbers of a report that are not zero, and how many of each list.
fn nonzero(report: Option<&Value>) -> String {
    let told = report.and_then(Value::as_object).into_iter().flatten().filter_map(|(key, value)| {
        let value = match value {
            Value::Array(list) => list.len() as u64,
            _ if key.ends_with("_ns") => {
                return value.as_i64().filter(|ns| *ns > 0).map(|ns| format!("{key} {}", date(ns)));
            }
            _ => value.as_u64()?,
        };
        let key = key.replace('_', " ");
        (value > 0)
            .then(|| if key.starts_with("bytes") { format!("{key} {}", size(value)) } else { format!("{key} {value}") })
    });
    let told: Vec<String> = told.collect();
    if told.is_empty() { "nothing to do".to_owned() } else { told.join(", ") }
}

fn list_snapshots(out: &mut dyn Write, snapshots: &[SnapshotSummary]) -> anyhow::Result<()> {
    let row = |snapshot: &SnapshotSummary| {
        let state = match &snapshot.deletion {
            Some(deletion) => format!(
                "deleted {}, can be brought back until {}: {}",
                date(deletion.deleted_ns),
                date(deletion.final_ns),
                deletion.reason
            ),
            None if snapshot.protected => "protected".to_owned(),
            None => String::new(),
        };
        vec![
            snapshot.id.chars().take(16).collect(),
            date(snapshot.committed_ns),
            snapshot.host.clone(),
            snapshot.job.clone(),
            snapshot.tags.join(","),
            snapshot.files.to_string(),
            size(snapshot.bytes),
            state,
        ]
    };
    let head = ["SNAPSHOT", "COMMITTED", "HOST", "JOB", "TAGS", "FILES", "SIZE", "STATE"];
    table(out, &head, snapshots.iter().map(row).collect())
}

fn decided(out: &mut dyn Write, err: &mut dyn Write, json: bool, done: &[String], kept: &[Kept]) -> anyhow::Result<u8> {
    if json {
        print_json(out, &json!({ "message_type": "decided", "done": done, "kept": kept }))?;
    } else {
        done.iter().try_for_each(|id| writeln!(out, "done      {id}"))?;
        kept.iter().try_for_each(|kept| writeln!(err, "left as is {}: {}", kept.snapshot, kept.reason))?;
    }
    Ok(if kept.is_empty() { EXIT_DONE } else { EXIT_FAILED })
}

/// One paragraph or one line for each repository. `tell` prints a report and says whether all is well.
fn jobs<R: Serialize>(
    out: &mut dyn Write,
    err: &mut dyn Write,
    json: bool,
    kind: &str,
    results: Vec<JobResult<R>>,
    tell: impl Fn(&mut dyn Write, &R) -> anyhow::Result<bool>,
) -> anyhow::Result<u8> {
    let mut code = EXIT_DONE;
    for JobResult { repository, report, error } in results {
        let mut text = Vec::new();
        let well = match (&report, &error) {
            (Some(report), None) => tell(&mut text, report)?,
            _ => false,
        };
        if !well {
            code = EXIT_FAILED;
        }
        if json {
            let mut object = serde_json::to_value(&report)?;
            if !object.is_object() {
                object = json!({ "error": error });
            }
            if let Some(object) = object.as_object_mut() {
                object.insert("message_type".to_owned(), kind.into());
                object.insert("repository".to_owned(), repository.to_string().into());
            }
            print_json(out, &object)?;
        } else if let Some(error) = error {
            writeln!(err, "{repository}: {error}")?;
        } else {
            writeln!(out, "{repository}")?;
            out.write_all(&text)?;
        }
    }
    Ok(code)
}

fn collected(out: &mut dyn Write, report: &GcReport) -> anyhow::Result<bool> {
    let GcReport { snapshots, purged, chunks_needed, chunks_stored, bytes_live, .. } = report;
    let mut line = |what: &str, text: String| writeln!(out, "  {what:<14}{text}");
    line(
        "needed",
        format!("{} by {snapshots} snapshots; {chunks_needed} of {chunks_stored} chunks", size(*bytes_live)),
    )?;
    if *purged > 0 {
        line("purged", format!("{purged} deleted snapshots whose time was over"))?;
    }
    let blocks = |count: u64, bytes: u64| format!("{} in {count} blocks", size(bytes));
    if report.dry_run {
        line("would free", blocks(report.blocks_condemned, report.bytes_condemned))?;
    } else {
        line("freed", blocks(report.blocks_freed, report.bytes_freed))?;
    }
    if report.blocks_waiting > 0 {
        let waiting = blocks(report.blocks_waiting, report.bytes_waiting);
        line("waiting", format!("{waiting}, until sessions end that may rely on them"))?;
    }
    if report.blocks_young > 0 {
        line("kept", format!("{} blocks of backups that did not finish and may go on", report.blocks_young))?;
    }
    if report.blocks_partly_dead > 0 {
        let blocks = blocks(report.blocks_partly_dead, report.bytes_partly_dead);
        line("partly needed", format!("{blocks}; `strand prune --repack` frees about {}", size(report.bytes_pinned)))?;
    }
    if report.blocks_moved + report.packs_dropped > 0 {
        line("packs", format!("{} removed, {} blocks moved", report.packs_dropped, report.blocks_moved))?;
    }
    Ok(true)
}

fn scrubbed(out: &mut dyn Write, report: &ScrubSummary) -> anyhow::Result<bool> {
    writeln!(out, "  read          {} in {} blocks", size(report.bytes), report.blocks)?;
    if report.oldest_ns > 0 {
        writeln!(out, "  verified      every block since {}", date(report.oldest_ns))?;
    } else {
        writeln!(out, "  verified      not every block yet")?;
    }
    if report.withdrawn_before > 0 {
        writeln!(out, "  known damage  {} blocks, found earlier and not replaced yet", report.withdrawn_before)?;
    }
    if report.damaged_packs > 0 {
        writeln!(
            out,
            "  DAMAGED       header or footer of {} packs; `strand-server repair` mends footers",
            report.damaged_packs
        )?;
    }
    if report.damaged_blocks > 0 {
        writeln!(
            out,
            "  DAMAGED       {} blocks; each was withdrawn, the next backup of its data replaces it",
            report.damaged_blocks
        )?;
    }
    report.damaged.iter().try_for_each(|damaged| writeln!(out, "    {damaged}"))?;
    if !report.affected.is_empty() {
        writeln!(out, "  cannot be restored completely now:")?;
        report.affected.iter().try_for_each(|snapshot| writeln!(out, "    {snapshot}"))?;
    }
    Ok(report.damaged_blocks + report.damaged_packs == 0 && report.affected.is_empty())
}
