//! The administrator's and the maintenance's view of a repository: every repository by name, jobs that leave a note of how they
//! ended, and short forms of their reports.

use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};
use strandline_actors::machines::retention::{PolicyError, Subject, Terms, Verdict};
use strandline_actors::runtime::clock;
use strandline_messages::format::manifest::ManifestV1;
use strandline_messages::format::receipt::ReceiptV1;
use strandline_messages::wire::codec;
use strandline_messages::wire::manage::{GcReport, ScrubReport, ScrubSubset, SnapshotTags};
use strandline_messages::{RepositoryName, SnapshotId, TenantName};

use super::gc::GcOptions;
use super::keeping::Deleter;
use super::{Arc, Engine, EngineError, Entry, Repository};
use crate::catalog::snapshots::SnapshotRow;
use crate::catalog::verified::MaintenanceRow;

/// The job that collects garbage, in the catalog.
pub const GC_JOB: &str = "gc";
/// The job that reads blocks again, in the catalog.
pub const SCRUB_JOB: &str = "scrub";

/// The job that deletes what the repository's own policy does not keep, in the catalog.
pub const RETENTION_JOB: &str = "retention";
/// Snapshots that are read, and that are deleted, at a time.
const PAGE: usize = 1000;

/// A repository of the data directory.
#[derive(Clone, Debug)]
pub struct Listed {
    /// Its tenant.
    pub tenant: TenantName,
    /// Its name.
    pub name: RepositoryName,
    /// The repository, or why it cannot be used.
    pub repository: Result<Arc<Repository>, Arc<EngineError>>,
}

/// A [`ScrubReport`] with ids as text.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScrubSummary {
    /// Blocks read.
    pub blocks: u64,
    /// Bytes read.
    pub bytes: u64,
    /// How many blocks were found damaged and withdrawn now.
    pub damaged_blocks: u64,
    /// Packs whose header or footer is damaged; their blocks count for themselves.
    pub damaged_packs: u64,
    /// Which, for people; at most `limits::DAMAGE_ROWS_MAX`.
    pub damaged: Vec<String>,
    /// Blocks that had been withdrawn before.
    pub withdrawn_before: u64,
    /// Ids of the snapshots that cannot be restored completely; at most `limits::DAMAGE_ROWS_MAX`.
    pub affected: Vec<String>,
    /// When the least recently verified block was verified, ns since 1970; zero if one never was.
    pub oldest_ns: i64,
}

/// What is said of a deletion by the repository's own policy.
const DELETED_BY_POLICY: &str = "the repository's retention policy does not keep it";

impl From<ScrubReport> for ScrubSummary {
    fn from(report: ScrubReport) -> Self {
        Self {
            blocks: report.blocks,
            bytes: report.bytes,
            damaged_blocks: report.damaged_blocks,
            damaged_packs: report.damaged_packs,
            damaged: report.damaged,
            withdrawn_before: report.withdrawn_before,
            affected: report.affected.iter().map(ToString::to_string).collect(),
            oldest_ns: report.oldest_ns,
        }
    }
}

/// What the repository's own policy came to.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RetentionSummary {
    /// Snapshots that were looked at.
    pub snapshots: u64,
    /// How many were deleted; they can be brought back for the undelete time.
    pub deleted: u64,
    /// How many no rule keeps and nobody may delete.
    pub left: u64,
}

impl Engine {
    /// Every repository of every tenant, by tenant and name, those that cannot be used among them.
    pub fn census(&self) -> Vec<Listed> {
        let known = self.repositories.read();
        let listed = known.iter().map(|((tenant, name), entry)| Listed {
            tenant: tenant.clone(),
            name: name.clone(),
            repository: match entry {
                Entry::Open(repository) => Ok(Arc::clone(repository)),
                Entry::Unusable(reason) => Err(Arc::clone(reason)),
            },
        });
        let mut listed: Vec<Listed> = listed.collect();
        listed.sort_by(|a, b| (&a.tenant, &a.name).cmp(&(&b.tenant, &b.name)));
        listed
    }
}

impl Repository {
    /// Whose it is.
    pub fn tenant(&self) -> &TenantName {
        &self.state.tenant
    }

    /// The ids of all snapshots that are not purged.
    pub async fn snapshot_ids(&self) -> Result<Vec<SnapshotId>, EngineError> {
        Ok(self.state.common.catalog.snapshot_ids(self.state.number).await?)
    }

    /// How each job of maintenance last came to its end, by job.
    pub async fn maintenance(&self) -> Result<Vec<MaintenanceRow>, EngineError> {
        Ok(self.state.common.catalog.maintenance(self.state.number).await?)
    }

    /// [`Repository::collect_garbage`], and a note of how it ended. Looking only leaves no note, being stopped neither.
    pub async fn collect_garbage_noted(&self, options: GcOptions) -> Result<GcReport, EngineError> {
        let outcome = self.collect_garbage(options).await;
        if !options.dry_run {
            self.note(GC_JOB, &outcome).await;
        }
        outcome
    }

    /// [`Repository::scrub`], and a note of how it ended. Being stopped leaves none.
    pub async fn scrub_noted(&self, subset: ScrubSubset, bytes_per_second: u64) -> Result<ScrubSummary, EngineError> {
        let outcome = self.scrub(subset, bytes_per_second).await.map(ScrubSummary::from);
        self.note(SCRUB_JOB, &outcome).await;
        outcome
    }

    /// Deletes what the repository's own policy does not keep, and notes how that ended. Without a policy nothing is deleted.
    /// Memory in proportion to the number of snapshots.
    pub async fn retain_noted(&self) -> Result<RetentionSummary, EngineError> {
        let outcome = self.retain().await;
        self.note(RETENTION_JOB, &outcome).await;
        outcome
    }

    async fn retain(&self) -> Result<RetentionSummary, EngineError> {
        let settings = self.settings().await?;
        let mut summary = RetentionSummary::default();
        let Some(policy) = settings.retention else { return Ok(summary) };
        let (mut subjects, mut after) = (Vec::new(), 0);
        loop {
            let page = self.snapshots(after, PAGE).await?;
            let Some(last) = page.last() else { break };
            after = last.place;
            subjects.extend(page.iter().filter_map(subject));
        }
        summary.snapshots = subjects.len() as u64;
        let (now_ns, min_retention) = (clock::wall_ns(), settings.min_retention);
        let terms = Terms { now_ns, min_retention, zone: TimeZone::system() };
        let unusable = |error: PolicyError| EngineError::BadPolicy { reason: error.to_string() };
        let groups = policy.decide(subjects, &terms).map_err(unusable)?;
        let decisions = groups.into_iter().flat_map(|group| group.decisions);
        let removed: Vec<SnapshotId> =
            decisions.filter(|decision| decision.verdict == Verdict::Remove).map(|decision| decision.id).collect();
        for ids in removed.chunks(PAGE) {
            let left = self.delete_snapshots(ids, Deleter::Server, DELETED_BY_POLICY).await?;
            summary.left += left.len() as u64;
            summary.deleted += ids.len().saturating_sub(left.len()) as u64;
        }
        Ok(summary)
    }

    /// Writes down how a job ended. What cannot be written down is done again sooner, which does no harm.
    async fn note<T: Serialize + Sync>(&self, job: &str, outcome: &Result<T, EngineError>) {
        let (failed, report) = match outcome {
            Err(EngineError::Stopping) => return,
            Err(error) => (true, error.to_string()),
            Ok(report) => (false, serde_json::to_string(report).unwrap_or_default()),
        };
        let row = MaintenanceRow { job: job.to_owned(), finished_ns: clock::wall_ns(), failed, report };
        if let Err(error) = self.state.common.catalog.note_maintenance(self.state.number, &row).await {
            tracing::warn!(job, %error, "the end of a job of maintenance could not be noted");
        }
    }
}

/// A snapshot as a policy sees it; none if its row cannot be read, which no row of ours is: what cannot be judged is kept.
fn subject(row: &SnapshotRow) -> Option<Subject> {
    let manifest = ManifestV1::decode(&row.manifest).ok()?;
    let receipt = ReceiptV1::decode(&row.receipt).ok()?;
    Some(Subject {
        id: receipt.snapshot,
        time_ns: receipt.committed_ns,
        tags: tags_of_today(row, &manifest),
        host: manifest.host,
        job: manifest.job,
        paths: Vec::new(),
        protected: row.protected,
    })
}

/// A snapshot's tags: those that replaced the manifest's, if any did.
pub(crate) fn tags_of_today(row: &SnapshotRow, manifest: &ManifestV1) -> Vec<String> {
    let replaced = row.tags.as_ref().and_then(|tags| codec::decode::<SnapshotTags>("tags", tags).ok());
    replaced.map_or_else(|| manifest.tags.clone(), |tags| tags.tags)
}
