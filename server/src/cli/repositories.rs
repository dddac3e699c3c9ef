//! Commands about repositories and their snapshots: arguments, and the requests that they stand for.

use std::collections::BTreeMap;

use anyhow::{anyhow, bail};
use clap::{Args, Subcommand};
use strandline_messages::wire::manage::ScrubSubset;

use crate::admin::AdminRequest;
use crate::admin::repositories::{RepositoryRequest, SnapshotDecision};
use crate::admin::values::{RepositoryPath, parse_size, parse_subset};

/// What is said of a deletion for which nobody gave a reason.
const DELETED_BY_HAND: &str = "deleted by the server's administrator";

#[derive(Debug, Subcommand)]
pub(super) enum RepositoryCommand {
    /// List the repositories of all tenants.
    List,
    /// Show a repository's settings, sizes and last maintenance.
    Show {
        /// TENANT/NAME; may be left out if there is only one.
        repository: Option<RepositoryPath>,
    },
    /// Change a repository's settings.
    #[command(override_usage = "strand-server repository set [REPOSITORY] KEY=VALUE...")]
    Set {
        /// TENANT/NAME (may be left out if there is only one), then settings; `repository show` lists them.
        #[arg(required = true, value_name = "KEY=VALUE")]
        words: Vec<String>,
    },
}

#[derive(Debug, Subcommand)]
pub(super) enum SnapshotCommand {
    /// List snapshots: what can be told without a key.
    List {
        /// TENANT/NAME; may be left out if there is only one.
        repository: Option<RepositoryPath>,
        /// Those that were deleted and can still be brought back.
        #[arg(long)]
        deleted: bool,
    },
    /// Delete snapshots. They can be brought back for the repository's undelete time.
    #[command(override_usage = "strand-server snapshot delete [OPTIONS] [REPOSITORY] ID...")]
    Delete {
        #[command(flatten)]
        named: Named,
        /// Why; shown with the deleted snapshot.
        #[arg(long, value_name = "TEXT", default_value = DELETED_BY_HAND)]
        reason: String,
    },
    /// Bring deleted snapshots back.
    #[command(override_usage = "strand-server snapshot undelete [REPOSITORY] ID...")]
    Undelete(Named),
    /// Keep snapshots from being deleted by anybody.
    #[command(override_usage = "strand-server snapshot protect [REPOSITORY] ID...")]
    Protect(Named),
    /// Let snapshots be deleted again.
    #[command(override_usage = "strand-server snapshot unprotect [REPOSITORY] ID...")]
    Unprotect(Named),
}

#[derive(Debug, Args)]
pub(super) struct Named {
    /// TENANT/NAME (may be left out if there is only one), then ids: at least their first four digits each.
    #[arg(required = true, value_name = "ID")]
    words: Vec<String>,
}

#[derive(Debug, Args)]
pub(super) struct GcArguments {
    /// TENANT/NAME; all repositories if left out.
    repository: Option<RepositoryPath>,
    /// Only tell what would be freed.
    #[arg(short = 'n', long)]
    dry_run: bool,
    /// Free deleted snapshots now, though their undelete time is not over: they cannot be brought back.
    #[arg(long, conflicts_with = "dry_run")]
    purge: bool,
}

#[derive(Debug, Args)]
pub(super) struct ScrubArguments {
    /// TENANT/NAME; all repositories if left out.
    repository: Option<RepositoryPath>,
    /// Read only a part, first what was verified longest ago: n/t (the n-th of t parts), p%, or a size such as 10G.
    #[arg(long, value_name = "SUBSET", value_parser = parse_subset)]
    read_data_subset: Option<ScrubSubset>,
    /// Most bytes a second, such as 50M; 0 for no limit. The repository's setting if not given.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    limit: Option<u64>,
}

/// The request of `repository …`.
pub(super) fn repository(command: RepositoryCommand) -> anyhow::Result<AdminRequest> {
    Ok(AdminRequest::Repository(match command {
        RepositoryCommand::List => RepositoryRequest::List {},
        RepositoryCommand::Show { repository } => RepositoryRequest::Show { repository },
        RepositoryCommand::Set { words } => {
            let (repository, words) = split(words, '=')?;
            let mut settings = BTreeMap::new();
            for word in words {
                let (key, value) = word.split_once('=').ok_or_else(|| anyhow!("`{word}`: write KEY=VALUE"))?;
                if settings.insert(key.to_owned(), value.to_owned()).is_some() {
                    bail!("`{key}` is given twice");
                }
            }
            if settings.is_empty() {
                bail!("no setting is given: write KEY=VALUE; `repository show` lists the settings");
            }
            RepositoryRequest::Set { repository, settings }
        }
    }))
}

/// The request of `snapshot …`.
pub(super) fn snapshot(command: SnapshotCommand) -> anyhow::Result<AdminRequest> {
    let (decision, named, reason) = match command {
        SnapshotCommand::List { repository, deleted } => {
            return Ok(AdminRequest::Repository(RepositoryRequest::Snapshots { repository, deleted }));
        }
        SnapshotCommand::Delete { named, reason } => (SnapshotDecision::Delete, named, reason),
        SnapshotCommand::Undelete(named) => (SnapshotDecision::Undelete, named, String::new()),
        SnapshotCommand::Protect(named) => (SnapshotDecision::Protect, named, String::new()),
        SnapshotCommand::Unprotect(named) => (SnapshotDecision::Unprotect, named, String::new()),
    };
    let (repository, snapshots) = split(named.words, '\0')?;
    if snapshots.is_empty() {
        bail!("no snapshot is given; `snapshot list` shows their ids");
    }
    Ok(AdminRequest::Repository(RepositoryRequest::Decide { repository, decision, snapshots, reason }))
}

/// The request of `gc`.
pub(super) fn gc(GcArguments { repository, dry_run, purge }: GcArguments) -> AdminRequest {
    AdminRequest::Repository(RepositoryRequest::CollectGarbage { repository, dry_run, purge })
}

/// The request of `scrub`.
pub(super) fn scrub(ScrubArguments { repository, read_data_subset, limit }: ScrubArguments) -> AdminRequest {
    let subset = read_data_subset.unwrap_or(ScrubSubset::All);
    AdminRequest::Repository(RepositoryRequest::Scrub { repository, subset, bytes_per_second: limit })
}

/// Takes the repository off the front of `words`, if it stands there: it has a slash, and what follows it has not, or has
/// `other` before.
fn split(mut words: Vec<String>, other: char) -> anyhow::Result<(Option<RepositoryPath>, Vec<String>)> {
    let is_path = words.first().is_some_and(|word| word.contains('/') && !word.contains(other));
    if !is_path {
        return Ok((None, words));
    }
    let path = words.remove(0).parse().map_err(anyhow::Error::msg)?;
    Ok((Some(path), words))
}
