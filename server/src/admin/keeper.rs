//! Carries out what an administrator asks of repositories: in the running server, or in a command that has opened the data
//! directory by itself.

use std::collections::BTreeMap;
use std::sync::Arc;

use strandline_actors::machines::retention::Policy;
use strandline_messages::format::manifest::{ManifestV1, snapshot_id};
use strandline_messages::format::receipt::ReceiptV1;
use strandline_messages::wire::manage::ScrubSubset;
use strandline_messages::{SnapshotId, limits};

use super::handler::Failure;
use super::repositories::{
    DeletionSummary, JobNote, JobResult, Kept, LISTED_MAX, RepositoryDetails, RepositoryReply, RepositoryRequest,
    RepositorySummary, RepositoryTotals, SnapshotDecision, SnapshotSummary,
};
use super::values::{RepositoryPath, change_setting};
use crate::catalog::snapshots::SnapshotRow;
use crate::catalog::verified::MaintenanceRow;
use crate::cli::EXIT_NO_REPOSITORY;
use crate::engine::gc::GcOptions;
use crate::engine::keeping::{Deleter, LeftAlone};
use crate::engine::upkeep::{Listed, ScrubSummary, tags_of_today};
use crate::engine::{Engine, EngineError, Repository, Totals};

/// Snapshots that are read at a time.
const PAGE: usize = 1000;
/// Shortest beginning of a snapshot id, hexadecimal digits.
const PREFIX_DIGITS_MIN: usize = 4;

/// Answers one request.
pub(super) async fn answer(engine: &Engine, request: RepositoryRequest) -> Result<RepositoryReply, Failure> {
    match request {
        RepositoryRequest::List {} => list(engine).await,
        RepositoryRequest::Show { repository } => show(&*find(engine, repository.as_ref())?).await,
        RepositoryRequest::Set { repository, settings } => set(&*find(engine, repository.as_ref())?, &settings).await,
        RepositoryRequest::Snapshots { repository, deleted } => {
            snapshots(&*find(engine, repository.as_ref())?, deleted).await
        }
        RepositoryRequest::Decide { repository, decision, snapshots, reason } => {
            decide(&*find(engine, repository.as_ref())?, decision, &snapshots, &reason).await
        }
        RepositoryRequest::CollectGarbage { repository, dry_run, purge } => {
            let mut results = Vec::new();
            for (path, repository) in meant(engine, repository)? {
                let outcome = match repository {
                    Ok(repository) => repository.collect_garbage_noted(GcOptions { dry_run, purge }).await,
                    Err(error) => Err(error),
                };
                results.push(result(path, outcome));
            }
            Ok(RepositoryReply::Collected { results })
        }
        RepositoryRequest::Scrub { repository, subset, bytes_per_second } => {
            let mut results = Vec::new();
            for (path, repository) in meant(engine, repository)? {
                let outcome = match repository {
                    Ok(repository) => scrub(&repository, subset, bytes_per_second).await,
                    Err(error) => Err(error),
                };
                results.push(result(path, outcome));
            }
            Ok(RepositoryReply::Scrubbed { results })
        }
    }
}

fn path_of(listed: &Listed) -> RepositoryPath {
    RepositoryPath { tenant: listed.tenant.clone(), name: listed.name.clone() }
}

fn unusable(listed: Listed) -> (RepositoryPath, Result<Arc<Repository>, EngineError>) {
    let path = path_of(&listed);
    let error = |reason| EngineError::Unusable { name: listed.name.clone(), reason };
    (path, listed.repository.map_err(error))
}

/// The repository that is named, or the only one.
fn find(engine: &Engine, path: Option<&RepositoryPath>) -> Result<Arc<Repository>, Failure> {
    let mut all = engine.census();
    let no_such = |message: String| Failure { exit_code: EXIT_NO_REPOSITORY, message };
    if let Some(path) = path {
        all.retain(|listed| path_of(listed) == *path);
    } else if all.len() > 1 {
        let names: Vec<String> = all.iter().take(5).map(|listed| path_of(listed).to_string()).collect();
        return Err(Failure::new(format!(
            "there are {} repositories ({}{}): say which one is meant",
            all.len(),
            names.join(", "),
            if all.len() > 5 { ", …" } else { "" }
        )));
    }
    match (all.pop(), path) {
        (Some(listed), _) => unusable(listed).1.map_err(Failure::from),
        (None, None) => Err(no_such("there is no repository here; `strand init` makes one".to_owned())),
        (None, Some(path)) => Err(no_such(format!(
            "there is no repository `{path}`; `strand-server repository list` shows those that there are"
        ))),
    }
}

type Meant = Vec<(RepositoryPath, Result<Arc<Repository>, EngineError>)>;

/// The repository that is named, or all.
fn meant(engine: &Engine, path: Option<RepositoryPath>) -> Result<Meant, Failure> {
    match path {
        Some(path) => {
            let repository = find(engine, Some(&path))?;
            Ok(vec![(path, Ok(repository))])
        }
        None => Ok(engine.census().into_iter().map(unusable).collect()),
    }
}

fn result<R>(repository: RepositoryPath, outcome: Result<R, EngineError>) -> JobResult<R> {
    match outcome {
        Ok(report) => JobResult { repository, report: Some(report), error: None },
        Err(error) => JobResult { repository, report: None, error: Some(error.to_string()) },
    }
}

async fn list(engine: &Engine) -> Result<RepositoryReply, Failure> {
    let mut repositories = Vec::new();
    for (path, repository) in meant(engine, None)? {
        let found = match repository {
            Ok(repository) => repository.totals().await.map(|totals| (repository.file().id.to_string(), totals)),
            Err(error) => Err(error),
        };
        repositories.push(match found {
            Ok((id, totals)) => {
                RepositorySummary { repository: path, id: Some(id), totals: Some(totals.into()), error: None }
            }
            Err(error) => {
                RepositorySummary { repository: path, id: None, totals: None, error: Some(error.to_string()) }
            }
        });
    }
    Ok(RepositoryReply::List { repositories })
}

impl From<Totals> for RepositoryTotals {
    fn from(totals: Totals) -> Self {
        Self {
            snapshots: totals.snapshots,
            deleted: totals.deleted,
            packs: totals.packs,
            blocks: totals.blocks,
            stored_bytes: totals.stored_bytes,
            chunks: totals.chunks,
            condemned_blocks: totals.condemned,
            damaged_blocks: totals.damaged,
        }
    }
}

async fn show(repository: &Repository) -> Result<RepositoryReply, Failure> {
    let note = |row: MaintenanceRow| {
        let (error, report) =
            if row.failed { (Some(row.report), None) } else { (None, serde_json::from_str(&row.report).ok()) };
        JobNote { job: row.job, finished_ns: row.finished_ns, error, report }
    };
    let file = repository.file();
    Ok(RepositoryReply::Shown(Box::new(RepositoryDetails {
        repository: RepositoryPath { tenant: repository.tenant().clone(), name: file.name.clone() },
        id: file.id.to_string(),
        created_ns: file.created_ns,
        totals: repository.totals().await?.into(),
        settings: repository.settings().await?,
        maintenance: repository.maintenance().await?.into_iter().map(note).collect(),
    })))
}

async fn set(repository: &Repository, changes: &BTreeMap<String, String>) -> Result<RepositoryReply, Failure> {
    let mut settings = repository.settings().await?;
    for (key, value) in changes {
        settings =
            change_setting(&settings, key, value).map_err(|why| Failure::new(format!("{why}; nothing was changed")))?;
    }
    if let Some(Err(why)) = settings.retention.as_deref().map(Policy::check) {
        return Err(Failure::new(format!("{why}; no setting was changed")));
    }
    repository.set_settings(settings).await?;
    tracing::info!(tenant = %repository.tenant(), repository = %repository.file().name, ?changes, "settings changed");
    show(repository).await
}

async fn snapshots(repository: &Repository, deleted: bool) -> Result<RepositoryReply, Failure> {
    let (mut found, mut after) = (std::collections::VecDeque::new(), 0);
    loop {
        let page = if deleted {
            repository.deleted_snapshots(after, PAGE).await?
        } else {
            repository.snapshots(after, PAGE).await?
        };
        let Some(last) = page.last() else { break };
        after = last.place;
        found.extend(page.iter().filter_map(summary));
        while found.len() > LISTED_MAX {
            found.pop_front();
        }
    }
    Ok(RepositoryReply::Snapshots { snapshots: found.into() })
}

/// A row for people; none if its manifest cannot be read, which no row of ours is.
fn summary(row: &SnapshotRow) -> Option<SnapshotSummary> {
    let manifest = ManifestV1::decode(&row.manifest).ok()?;
    let receipt = ReceiptV1::decode(&row.receipt).ok()?;
    Some(SnapshotSummary {
        id: snapshot_id(&row.manifest).to_string(),
        started_ns: manifest.started_ns,
        committed_ns: receipt.committed_ns,
        agent: receipt.agent.to_string(),
        tags: tags_of_today(row, &manifest),
        host: manifest.host,
        job: manifest.job,
        files: manifest.totals.files,
        bytes: manifest.totals.bytes,
        bytes_stored: manifest.totals.bytes_stored,
        errors: manifest.totals.errors,
        protected: row.protected,
        deletion: row.deletion.as_ref().map(|deletion| DeletionSummary {
            deleted_ns: deletion.deleted_ns,
            final_ns: deletion.final_ns,
            agent: deletion.agent.to_string(),
            reason: deletion.reason.clone(),
        }),
    })
}

async fn decide(
    repository: &Repository,
    decision: SnapshotDecision,
    prefixes: &[String],
    reason: &str,
) -> Result<RepositoryReply, Failure> {
    let ids = named(&repository.snapshot_ids().await?, prefixes)?;
    let mut left: Vec<LeftAlone> = Vec::new();
    for ids in ids.chunks(limits::MANAGED_SNAPSHOTS_MAX) {
        left.extend(match decision {
            SnapshotDecision::Delete => repository.delete_snapshots(ids, Deleter::Server, reason).await?,
            SnapshotDecision::Undelete => repository.undelete_snapshots(ids).await?,
            SnapshotDecision::Protect => repository.protect_snapshots(ids, true).await?,
            SnapshotDecision::Unprotect => repository.protect_snapshots(ids, false).await?,
        });
    }
    let was_left = |id: &&SnapshotId| !left.iter().any(|(kept, _)| kept == *id);
    let done: Vec<String> = ids.iter().filter(was_left).map(ToString::to_string).collect();
    let (tenant, name) = (repository.tenant(), &repository.file().name);
    tracing::info!(%tenant, repository = %name, ?decision, done = done.len(), kept = left.len(), "decided about snapshots");
    let kept = left.into_iter().map(|(id, reason)| Kept { snapshot: id.to_string(), reason }).collect();
    Ok(RepositoryReply::Decided { done, kept })
}

/// The snapshots that these beginnings name, each once; nothing is done if one of them names none or several.
fn named(all: &[SnapshotId], prefixes: &[String]) -> Result<Vec<SnapshotId>, Failure> {
    let texts: Vec<(String, SnapshotId)> = all.iter().map(|id| (id.to_string(), *id)).collect();
    let mut named = Vec::new();
    for prefix in prefixes {
        let digits = prefix.to_ascii_lowercase();
        let why = if digits.len() < PREFIX_DIGITS_MIN || !digits.bytes().all(|c| c.is_ascii_hexdigit()) {
            Some("an id is given by at least four of its hexadecimal digits".to_owned())
        } else {
            let mut found = texts.iter().filter(|(text, _)| text.starts_with(&digits));
            match (found.next(), found.next()) {
                (Some((_, id)), None) => {
                    if !named.contains(id) {
                        named.push(*id);
                    }
                    None
                }
                (None, _) => Some("there is no such snapshot; it may have been purged".to_owned()),
                (Some((a, _)), Some((b, _))) => Some(format!("it is ambiguous ({a}, {b}): give more digits")),
            }
        };
        if let Some(why) = why {
            return Err(Failure::new(format!("`{prefix}`: {why}; nothing was changed")));
        }
    }
    Ok(named)
}

async fn scrub(
    repository: &Repository,
    subset: ScrubSubset,
    bytes_per_second: Option<u64>,
) -> Result<ScrubSummary, EngineError> {
    let rate = match bytes_per_second {
        Some(rate) => rate,
        None => repository.settings().await?.scrub_bytes_per_second,
    };
    repository.scrub_noted(subset, rate).await
}
