//! `catalog rebuild` and `repair`: arguments, and what is shown of their results.

use std::io::Write;

use clap::{Args, Subcommand};
use serde_json::json;

use super::output::print_json;
use super::{EXIT_DONE, EXIT_FAILED};
use crate::admin::values::RepositoryPath;
use crate::rescue::rebuild::Rebuilt;
use crate::rescue::repair::{Repaired, RepairedRepository};

#[derive(Debug, Subcommand)]
pub(super) enum CatalogCommand {
    /// Make the catalog and all indexes anew from the storage. The old catalog is kept under another name. The server must
    /// not be running.
    Rebuild,
}

#[derive(Debug, Args)]
pub(super) struct RepairArguments {
    /// TENANT/NAME; all repositories if left out.
    pub(super) repository: Option<RepositoryPath>,
    /// Only tell what is wrong.
    #[arg(short = 'n', long)]
    pub(super) dry_run: bool,
}

/// Shows what the catalog was made anew with; returns the exit code.
pub(super) fn rebuilt(out: &mut dyn Write, err: &mut dyn Write, json: bool, rebuilt: &Rebuilt) -> anyhow::Result<u8> {
    let unusable = rebuilt.repositories.iter().any(|repository| repository.error.is_some());
    let code = if unusable { EXIT_FAILED } else { EXIT_DONE };
    if json {
        let mut object = serde_json::to_value(rebuilt)?;
        if let Some(object) = object.as_object_mut() {
            object.insert("message_type".to_owned(), json!("rebuilt"));
        }
        print_json(out, &object)?;
        return Ok(code);
    }
    if let (Some(tenants), Some(agents)) = (rebuilt.tenants, rebuilt.agents) {
        writeln!(out, "{tenants} tenants, {agents} agents")?;
    }
    for repository in &rebuilt.repositories {
        let name = &repository.repository;
        if let Some(error) = &repository.error {
            writeln!(err, "{name} cannot be used: {error}")?;
            continue;
        }
        let (snapshots, deleted, packs) = (repository.snapshots, repository.deleted, repository.packs);
        write!(out, "{name}: {snapshots} snapshots, {deleted} deleted ones that can be brought back, {packs} packs")?;
        let damaged = repository.damaged_blocks;
        writeln!(out, "{}", if damaged > 0 { format!(", {damaged} damaged blocks") } else { String::new() })?;
    }
    let seconds = |ms: u64| format!("{}.{} s", ms / 1000, ms % 1000 / 100);
    write!(out, "{} chunks indexed in {}", rebuilt.chunks, seconds(rebuilt.took_ms))?;
    match rebuilt.ms_per_million_chunks {
        Some(ms) => writeln!(out, ", {} for a million", seconds(ms))?,
        None => writeln!(out)?,
    }
    match rebuilt.kept.first() {
        Some(kept) => writeln!(err, "the old catalog was kept as {}: delete it when all is well", kept.display())?,
        None => writeln!(err, "there was no old catalog")?,
    }
    Ok(code)
}

/// Shows what a repair found and did; returns the exit code: failed if something is damaged that could not be repaired.
pub(super) fn repaired(out: &mut dyn Write, json: bool, repaired: &Repaired) -> anyhow::Result<u8> {
    let damaged = repaired.repositories.iter().any(RepairedRepository::is_damaged);
    for repository in &repaired.repositories {
        if json {
            let mut object = serde_json::to_value(repository)?;
            if let Some(object) = object.as_object_mut() {
                object.insert("message_type".to_owned(), json!("repaired"));
                object.insert("dry_run".to_owned(), json!(repaired.dry_run));
            }
            print_json(out, &object)?;
        } else {
            show(out, repository)?;
        }
    }
    if !json && repaired.dry_run {
        writeln!(out, "nothing was changed; which snapshots are affected is told by a repair without --dry-run")?;
    }
    Ok(if damaged { EXIT_FAILED } else { EXIT_DONE })
}

fn show(out: &mut dyn Write, report: &RepairedRepository) -> anyhow::Result<()> {
    writeln!(out, "{}: {} packs", report.repository, report.packs)?;
    report.findings.iter().try_for_each(|finding| writeln!(out, "  pack {} {}", finding.pack, finding.text))?;
    if let Some(error) = &report.error {
        writeln!(out, "  NOT REPAIRED: {error}")?;
        return Ok(());
    }
    if report.damaged_blocks == 0 {
        writeln!(out, "  every block was read and is intact")?;
    } else {
        writeln!(out, "  DAMAGED: {} blocks; the next backup of their data replaces them", report.damaged_blocks)?;
        report.damaged.iter().try_for_each(|damaged| writeln!(out, "    {damaged}"))?;
    }
    match report.affected.as_deref() {
        None => {}
        Some([]) => writeln!(out, "  every snapshot can be restored completely")?,
        Some(affected) => {
            writeln!(out, "  cannot be restored completely:")?;
            affected.iter().try_for_each(|snapshot| writeln!(out, "    {snapshot}"))?;
        }
    }
    Ok(())
}
