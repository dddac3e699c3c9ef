//! What an administrator may ask of repositories, and what is answered.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use strandline_messages::wire::manage::{GcReport, ScrubSubset};

use super::values::RepositoryPath;
use crate::engine::settings::RepositorySettings;
use crate::engine::upkeep::ScrubSummary;

/// Most snapshots in one listing; its reply stays below what a client reads.
pub const LISTED_MAX: usize = 100_000;

/// What an administrator asks of repositories. Where one repository is meant and none is named, it is the only one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "action", rename_all = "snake_case", deny_unknown_fields)]
pub enum RepositoryRequest {
    /// All repositories.
    List {},
    /// Settings, sizes and the last results of maintenance.
    Show {
        /// Which.
        repository: Option<RepositoryPath>,
    },
    /// Changes settings.
    Set {
        /// Of which.
        repository: Option<RepositoryPath>,
        /// Values by key, as text.
        settings: BTreeMap<String, String>,
    },
    /// The snapshots of a repository in the order of commits, at most [`LISTED_MAX`], the newest ones.
    Snapshots {
        /// Of which.
        repository: Option<RepositoryPath>,
        /// The deleted ones instead of the kept ones.
        deleted: bool,
    },
    /// Decides about snapshots.
    Decide {
        /// Of which repository.
        repository: Option<RepositoryPath>,
        /// What.
        decision: SnapshotDecision,
        /// Beginnings of their ids, at least four hexadecimal digits each.
        snapshots: Vec<String>,
        /// Why, for people; only of a deletion.
        reason: String,
    },
    /// Collects garbage.
    CollectGarbage {
        /// Of which; of all if none is named.
        repository: Option<RepositoryPath>,
        /// Only looks.
        dry_run: bool,
        /// Does not wait for the undelete time.
        purge: bool,
    },
    /// Reads blocks again.
    Scrub {
        /// Of which; of all if none is named.
        repository: Option<RepositoryPath>,
        /// Which blocks.
        subset: ScrubSubset,
        /// Most bytes a second, 0 for no limit; the repository's setting if not given.
        bytes_per_second: Option<u64>,
    },
}

impl RepositoryRequest {
    /// Whether it may take hours.
    pub fn is_long(&self) -> bool {
        matches!(self, Self::CollectGarbage { .. } | Self::Scrub { .. })
    }
}

/// What becomes of snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SnapshotDecision {
    /// They are deleted, and can be brought back for a while.
    Delete,
    /// They are brought back.
    Undelete,
    /// Nobody can delete them.
    Protect,
    /// They can be deleted again.
    Unprotect,
}

/// What is answered.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "snake_case")]
pub enum RepositoryReply {
    /// Repositories by tenant and name.
    List {
        /// All of them.
        repositories: Vec<RepositorySummary>,
    },
    /// One repository.
    Shown(Box<RepositoryDetails>),
    /// Its snapshots in the order of commits.
    Snapshots {
        /// At most [`LISTED_MAX`].
        snapshots: Vec<SnapshotSummary>,
    },
    /// What was decided.
    Decided {
        /// Ids of the snapshots of which it holds now, or held already.
        done: Vec<String>,
        /// Those that were left as they were.
        kept: Vec<Kept>,
    },
    /// Collections, by repository.
    Collected {
        /// What each came to.
        results: Vec<JobResult<GcReport>>,
    },
    /// Scrubs, by repository.
    Scrubbed {
        /// What each came to.
        results: Vec<JobResult<ScrubSummary>>,
    },
}

/// A repository in the list.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositorySummary {
    /// `TENANT/NAME`.
    pub repository: RepositoryPath,
    /// Its id; none if it cannot be used.
    pub id: Option<String>,
    /// Its sizes; none if it cannot be used.
    pub totals: Option<RepositoryTotals>,
    /// Why it cannot be used.
    pub error: Option<String>,
}

/// Sizes of a repository.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryTotals {
    /// Kept snapshots.
    pub snapshots: u64,
    /// Deleted ones that can be brought back.
    pub deleted: u64,
    /// Packs.
    pub packs: u64,
    /// Blocks in them.
    pub blocks: u64,
    /// What they take on disk, bytes.
    pub stored_bytes: u64,
    /// Copies of chunks.
    pub chunks: u64,
    /// Blocks that wait to be freed.
    pub condemned_blocks: u64,
    /// Blocks that were found damaged and are not replaced yet.
    pub damaged_blocks: u64,
}

/// One repository in full.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RepositoryDetails {
    /// `TENANT/NAME`.
    pub repository: RepositoryPath,
    /// Its id.
    pub id: String,
    /// When it was made, ns since 1970.
    pub created_ns: i64,
    /// Its sizes.
    pub totals: RepositoryTotals,
    /// Its settings.
    pub settings: RepositorySettings,
    /// How each job of maintenance last ended, by job.
    pub maintenance: Vec<JobNote>,
}

/// How a job of maintenance last ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobNote {
    /// Which job.
    pub job: String,
    /// When, ns since 1970.
    pub finished_ns: i64,
    /// Why it failed, if it did.
    pub error: Option<String>,
    /// What it said, if it came through.
    pub report: Option<serde_json::Value>,
}

/// What can be told of a snapshot without a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotSummary {
    /// Its id.
    pub id: String,
    /// Start of the backup by the agent's clock, ns since 1970.
    pub started_ns: i64,
    /// Commit by the server's clock, ns since 1970.
    pub committed_ns: i64,
    /// The machine that committed it, its agent id; zero if unknown or local.
    pub agent: String,
    /// Host label.
    pub host: String,
    /// Job label.
    pub job: String,
    /// Its tags of today.
    pub tags: Vec<String>,
    /// Regular files.
    pub files: u64,
    /// Sum of their sizes, bytes.
    pub bytes: u64,
    /// Bytes of the blocks that were sent for it.
    pub bytes_stored: u64,
    /// What could not be saved.
    pub errors: u64,
    /// Whether nobody can delete it.
    pub protected: bool,
    /// That it was deleted.
    pub deletion: Option<DeletionSummary>,
}

/// A deletion that can be taken back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeletionSummary {
    /// When, ns since 1970.
    pub deleted_ns: i64,
    /// From when on it is final, ns since 1970.
    pub final_ns: i64,
    /// Who asked: an agent's id, zero for the server.
    pub agent: String,
    /// Why, for people.
    pub reason: String,
}

/// A snapshot that was left as it was.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kept {
    /// Its id.
    pub snapshot: String,
    /// Why, for people.
    pub reason: String,
}

/// What a job came to in one repository: a report or an error.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobResult<R> {
    /// Which repository.
    pub repository: RepositoryPath,
    /// What was found and done.
    pub report: Option<R>,
    /// Why it failed, for people.
    pub error: Option<String>,
}
