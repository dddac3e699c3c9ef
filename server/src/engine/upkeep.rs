//! The administrator's and the maintenance's view of a repository: every repository by name, jobs that leave a note of how they
//! ended, and short forms of their reports.

use serde::{Deserialize, Serialize};
use strandline_actors::runtime::clock;
use strandline_messages::wire::manage::{GcReport, ScrubReport, ScrubSubset};
use strandline_messages::{RepositoryName, SnapshotId, TenantName};

use super::gc::GcOptions;
use super::{Arc, Engine, EngineError, Entry, Repository};
use crate::catalog::verified::MaintenanceRow;

/// The job that collects garbage, in the catalog.
pub const GC_JOB: &str = "gc";
/// The job that reads blocks again, in the catalog.
pub const SCRUB_JOB: &str = "scrub";

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
    /// Which, for people; at most `limits::DAMAGE_ROWS_MAX`.
    pub damaged: Vec<String>,
    /// Blocks that had been withdrawn before.
    pub withdrawn_before: u64,
    /// Ids of the snapshots that cannot be restored completely; at most `limits::DAMAGE_ROWS_MAX`.
    pub affected: Vec<String>,
    /// When the least recently verified block was verified, ns since 1970; zero if one never was.
    pub oldest_ns: i64,
}

impl From<ScrubReport> for ScrubSummary {
    fn from(report: ScrubReport) -> Self {
        Self {
            blocks: report.blocks,
            bytes: report.bytes,
            damaged_blocks: report.damaged_blocks,
            damaged: report.damaged,
            withdrawn_before: report.withdrawn_before,
            affected: report.affected.iter().map(ToString::to_string).collect(),
            oldest_ns: report.oldest_ns,
        }
    }
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
