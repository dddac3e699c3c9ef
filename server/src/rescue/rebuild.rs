//! `strand-server catalog rebuild`: everything that is derived is made anew from the storage. The old catalog is moved aside,
//! never deleted; chunk indexes, which hold nothing of their own, are deleted.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use jiff::Timestamp;
use serde::Serialize;
use strandline_actors::runtime::clock;

use super::{find, remove_index};
use crate::engine::{Engine, EngineOptions};
use crate::failpoint;
use crate::storage::files;
use crate::storage::layout::DataPaths;
use crate::storage::lock::DirectoryLock;
use crate::tenancy::{JOURNAL_NAME, Tenancy};

/// What a catalog was made anew with.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Rebuilt {
    /// Where the old catalog's files are now.
    pub kept: Vec<PathBuf>,
    /// Tenants that the journal of identities names; none without one, as in a local directory.
    pub tenants: Option<u64>,
    /// Agents that it names, revoked ones among them.
    pub agents: Option<u64>,
    /// Repositories by tenant and name.
    pub repositories: Vec<RebuiltRepository>,
    /// Copies of chunks in all indexes.
    pub chunks: u64,
    /// How long it took, ms.
    pub took_ms: u64,
    /// The same for each million chunks; none if there are too few to tell.
    pub ms_per_million_chunks: Option<u64>,
}

/// A repository of which the catalog knows again.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RebuiltRepository {
    /// `TENANT/NAME`.
    pub repository: String,
    /// Kept snapshots.
    pub snapshots: u64,
    /// Deleted ones that can be brought back.
    pub deleted: u64,
    /// Packs.
    pub packs: u64,
    /// Blocks that are withdrawn as damaged.
    pub damaged_blocks: u64,
    /// Why it cannot be used, if so.
    pub error: Option<String>,
}

/// With fewer chunks the time for a million of them says nothing.
const CHUNKS_MIN: u64 = 10_000;

/// Makes catalog and indexes of `data` anew.
pub async fn rebuild(data: &Path, lock_wait: Duration) -> anyhow::Result<Rebuilt> {
    let paths = DataPaths::new(data);
    let lock = DirectoryLock::take(data, &paths.lock(), lock_wait)?;
    let began = clock::now();
    let mut rebuilt = Rebuilt { kept: move_aside(&paths)?, ..Rebuilt::default() };
    for found in find(&paths)? {
        remove_index(&found.paths)?;
    }
    let engine = Engine::open_locked(data, lock, EngineOptions::default()).await?;
    if paths.storage().join(JOURNAL_NAME).exists() {
        let tenancy = Tenancy::open(engine.pool().clone(), data).await?;
        rebuilt.tenants = Some(tenancy.tenants().await?.len() as u64);
        rebuilt.agents = Some(tenancy.agents(None).await?.len() as u64);
    }
    for listed in engine.census() {
        let repository = format!("{}/{}", listed.tenant, listed.name);
        let totals = match &listed.repository {
            Ok(repository) => repository.totals().await.map_err(|error| error.to_string()),
            Err(error) => Err(error.to_string()),
        };
        rebuilt.repositories.push(match totals {
            Ok(totals) => {
                rebuilt.chunks += totals.chunks;
                RebuiltRepository {
                    repository,
                    snapshots: totals.snapshots,
                    deleted: totals.deleted,
                    packs: totals.packs,
                    damaged_blocks: totals.damaged,
                    error: None,
                }
            }
            Err(error) => RebuiltRepository { repository, error: Some(error), ..RebuiltRepository::default() },
        });
    }
    engine.close().await?;
    rebuilt.took_ms = u64::try_from(clock::now().saturating_duration_since(began).as_millis()).unwrap_or(u64::MAX);
    if rebuilt.chunks >= CHUNKS_MIN {
        rebuilt.ms_per_million_chunks = Some(rebuilt.took_ms.saturating_mul(1_000_000) / rebuilt.chunks);
    }
    Ok(rebuilt)
}

/// Renames the catalog's files. The write-ahead log goes first: it must never stand beside a catalog that it is not of.
fn move_aside(paths: &DataPaths) -> anyhow::Result<Vec<PathBuf>> {
    let (catalog, seconds) = (paths.catalog(), i64::try_from(clock::wall().as_secs()).unwrap_or_default());
    let time = Timestamp::from_second(seconds).unwrap_or_default().strftime("%Y%m%dT%H%M%SZ").to_string();
    let named = |suffix: &str, stamp: &str| {
        let mut name = catalog.clone().into_os_string();
        name.push(stamp);
        name.push(suffix);
        PathBuf::from(name)
    };
    // Two rebuilds within a second.
    let mut stamp = format!(".{time}");
    for n in 1.. {
        if ["", "-wal", "-shm"].iter().all(|suffix| !named(suffix, &stamp).exists()) {
            break;
        }
        stamp = format!(".{time}-{n}");
    }
    let mut kept = Vec::new();
    for suffix in ["-wal", "-shm", ""] {
        let (from, to) = (named(suffix, ""), named(suffix, &stamp));
        match fs::rename(&from, &to) {
            Ok(()) => {
                kept.push(to);
                failpoint::reached("catalog/set-aside");
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => {
                let (from, to) = (from.display(), to.display());
                return Err(error).with_context(|| format!("cannot rename {from} to {to}; nothing was rebuilt"));
            }
        }
    }
    files::sync_directory(paths.root())?;
    kept.reverse();
    Ok(kept)
}
