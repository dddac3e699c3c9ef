//! The storage engine: everything that the server, or a program that embeds it, does with a data directory.
//!
//! An [`Engine`] owns one data directory from [`Engine::open`] to [`Engine::close`]: its lock, its catalog, the server's signing
//! key, and every [`Repository`] in it. It knows nothing of networks, and of keys only the public ones.
//!
//! Invariants: nothing in the directory is touched before the lock is held, and the lock outlives every thread that writes.
//! Files come before rows. A repository that cannot be opened does not keep the others from being served.

pub mod error;
#[cfg(test)]
pub(crate) mod fixture;
pub mod gc;
pub mod keeping;
pub mod known;
pub mod repository;
pub mod settings;
pub mod upkeep;

mod check;
mod commit;
mod completeness;
mod damage;
mod packs;
mod scrub;
mod server_key;
mod slots;
pub(crate) mod state;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use parking_lot::RwLock;
use strandline_messages::format::repository::RepositoryV1;
use strandline_messages::{RepositoryId, RepositoryName, TenantName, limits};
use tempfile::TempDir;
use tokio::sync::Mutex;

use crate::catalog::Catalog;
use crate::catalog::repositories::RepositoryRow;
use crate::failpoint;
use crate::index::cache::PageCache;
use crate::index::engine::FLUSH_ENTRIES;
use crate::storage::StorageError;
use crate::storage::files::{self, FileOps, SystemFiles};
use crate::storage::layout::{DataPaths, RepositoryPaths};
use crate::storage::lock::DirectoryLock;
use crate::storage::pack_writer::{GROUP_BYTES_MAX, PackWriterOptions};

pub use crate::catalog::sessions::{Lease, Opened, SessionEnd, SessionRow};
pub use crate::storage::store_error::StoreError;
pub use error::EngineError;
pub use repository::{BlockAddress, CommitOutcome, Repository, Totals};

use server_key::ServerKey;
use slots::{NamedSlots, named_slots};

/// Memory for index pages, shared by all repositories, bytes. Behind it is the system's page cache.
pub const INDEX_CACHE_BYTES: usize = 24 << 20;
/// Longest repository file, bytes.
const REPOSITORY_FILE_BYTES_MAX: usize = 4096;

/// How an engine behaves.
#[derive(Clone, Copy, Debug, Default)]
pub struct EngineOptions {
    /// How long to wait for another process to leave the data directory.
    pub lock_wait: Duration,
}

/// Sizes that tests make small.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Sizes {
    pub group_bytes_max: usize,
    pub pack_bytes_max: u64,
    pub index_flush_entries: usize,
}

impl Default for Sizes {
    fn default() -> Self {
        Self {
            group_bytes_max: GROUP_BYTES_MAX,
            pack_bytes_max: limits::PACK_BYTES_MAX,
            index_flush_entries: FLUSH_ENTRIES,
        }
    }
}

/// What every repository of an engine shares.
#[derive(Debug)]
pub(crate) struct Common {
    pub paths: DataPaths,
    pub catalog: Catalog,
    pub key: ServerKey,
    pub ops: Arc<dyn FileOps>,
    pub cache: Arc<PageCache>,
    pub writer: PackWriterOptions,
    pub sizes: Sizes,
    pub lock: DirectoryLock,
    /// Removed, if it is a temporary one, when nobody uses the catalog any more.
    _home: CatalogHome,
}

/// Where the catalog is.
#[derive(Debug)]
enum CatalogHome {
    /// In the data directory.
    Data,
    /// Nothing can be written there: a new one is made from the storage in a directory that ends with the engine. The storage is
    /// the truth, so whatever is decided meanwhile, if there is room for it, is known to the next start.
    Temporary(TempDir),
}

impl CatalogHome {
    fn choose(paths: &DataPaths) -> Result<Self, StorageError> {
        if files::has_room(paths.root())? {
            return Ok(Self::Data);
        }
        for place in [std::env::temp_dir(), PathBuf::from("/dev/shm"), PathBuf::from("/run")] {
            if let (Ok(true), Ok(directory)) = (files::has_room(&place), TempDir::with_prefix_in("strandline-", &place))
            {
                tracing::warn!(
                    data = %paths.root().display(), catalog = %directory.path().display(),
                    "nothing can be written to the data directory: its snapshots can be listed and restored, with a catalog that \
                     is made from the storage for now; make room and start again"
                );
                return Ok(Self::Temporary(directory));
            }
        }
        // It may do; if not, the error says why.
        Ok(Self::Data)
    }

    fn path(&self, paths: &DataPaths) -> PathBuf {
        match self {
            Self::Data => paths.catalog(),
            Self::Temporary(directory) => DataPaths::new(directory.path()).catalog(),
        }
    }
}

type Known = HashMap<(TenantName, RepositoryName), Entry>;

#[derive(Clone, Debug)]
enum Entry {
    Open(Arc<Repository>),
    /// Why it could not be opened at the start.
    Unusable(Arc<EngineError>),
}

/// An open data directory.
#[derive(Debug)]
pub struct Engine {
    common: Arc<Common>,
    repositories: RwLock<Known>,
    /// One repository is created at a time.
    creating: Mutex<()>,
}

impl Engine {
    /// Opens the data directory `dir`, creating it if it is missing: takes its lock, brings the catalog up to date, recovers
    /// every repository's packs and index, and gives manifests that have no row theirs.
    pub async fn open(dir: &Path, options: EngineOptions) -> Result<Self, EngineError> {
        Self::open_with(dir, options, Sizes::default(), Arc::new(SystemFiles)).await
    }

    /// As [`Engine::open`], with the file operations that packs are written with; a test passes ones that fail.
    pub async fn open_with_files(
        dir: &Path,
        options: EngineOptions,
        ops: Arc<dyn FileOps>,
    ) -> Result<Self, EngineError> {
        Self::open_with(dir, options, Sizes::default(), ops).await
    }

    /// As [`Engine::open`], for a caller that holds the lock of `dir` already.
    pub async fn open_locked(dir: &Path, lock: DirectoryLock, options: EngineOptions) -> Result<Self, EngineError> {
        Self::open_under(dir, Some(lock), options, Sizes::default(), Arc::new(SystemFiles)).await
    }

    pub(crate) async fn open_with(
        dir: &Path,
        options: EngineOptions,
        sizes: Sizes,
        ops: Arc<dyn FileOps>,
    ) -> Result<Self, EngineError> {
        Self::open_under(dir, None, options, sizes, ops).await
    }

    async fn open_under(
        dir: &Path,
        lock: Option<DirectoryLock>,
        options: EngineOptions,
        sizes: Sizes,
        ops: Arc<dyn FileOps>,
    ) -> Result<Self, EngineError> {
        let paths = DataPaths::new(dir);
        let (lock, key, home) = {
            let paths = paths.clone();
            blocking(move || {
                files::create_directory(paths.root())?;
                let lock = match lock {
                    Some(lock) => lock,
                    None => DirectoryLock::take(paths.root(), &paths.lock(), options.lock_wait)?,
                };
                files::remove_temporaries(paths.root())?;
                files::create_directory(&paths.storage())?;
                let home = CatalogHome::choose(&paths)?;
                Ok((lock, ServerKey::load_or_make(&paths.server_key())?, home))
            })
            .await?
        };
        let catalog = Catalog::open(&home.path(&paths)).await?;
        let Sizes { group_bytes_max, pack_bytes_max, .. } = sizes;
        let writer = PackWriterOptions { group_bytes_max, pack_bytes_max };
        let cache = Arc::new(PageCache::new(INDEX_CACHE_BYTES));
        let common = Arc::new(Common { paths, catalog, key, ops, cache, writer, sizes, lock, _home: home });
        let mut known = Known::new();
        let (found, unusable) = find_repositories(&common).await?;
        for Unusable { tenant, name, reason, .. } in unusable {
            known.insert((tenant, name), Entry::Unusable(Arc::new(reason.into())));
        }
        for (row, file) in found {
            let key = (row.tenant.clone(), file.name.clone());
            let entry = match Repository::open(Arc::clone(&common), row, file).await {
                Ok(repository) => Entry::Open(Arc::new(repository)),
                Err(error) => {
                    tracing::error!(tenant = %key.0, repository = %key.1, %error, "a repository cannot be opened");
                    Entry::Unusable(Arc::new(error))
                }
            };
            known.insert(key, entry);
        }
        Ok(Self { common, repositories: RwLock::new(known), creating: Mutex::default() })
    }

    /// The catalog's connections, for the tables of other parts of the server.
    pub fn pool(&self) -> &sqlx::SqlitePool {
        self.common.catalog.pool()
    }

    /// The Ed25519 public key that receipts are verified with.
    pub fn server_public_key(&self) -> [u8; 32] {
        self.common.key.public()
    }

    /// Makes a repository: its files, in one rename, then its row. `slots` are encoded key slots of it.
    pub async fn create_repository(
        &self,
        tenant: &TenantName,
        file: RepositoryV1,
        slots: Vec<Vec<u8>>,
    ) -> Result<Arc<Repository>, EngineError> {
        let _one_at_a_time = self.creating.lock().await;
        let key = (tenant.clone(), file.name.clone());
        let exists = || EngineError::AlreadyExists { tenant: tenant.clone(), name: file.name.clone() };
        if let Some(Entry::Open(there)) = self.repositories.read().get(&key)
            && *there.file() == file
        {
            // A request whose answer was lost comes again.
            return Ok(Arc::clone(there));
        }
        let home = self.common.paths.repository(tenant, &file.id);
        if self.repositories.read().contains_key(&key) || home.root().exists() {
            return Err(exists());
        }
        let slots = named_slots(&file, slots)?;
        {
            let (parent, file) = (self.common.paths.tenant(tenant), file.clone());
            blocking(move || make_repository(&parent, &home, &file, &slots)).await?;
        }
        let number = self.common.catalog.add_repository(tenant, &file).await?.ok_or_else(exists)?;
        let row = RepositoryRow { number, tenant: tenant.clone(), id: file.id };
        let repository = Arc::new(Repository::open(Arc::clone(&self.common), row, file).await?);
        self.repositories.write().insert(key, Entry::Open(Arc::clone(&repository)));
        Ok(repository)
    }

    /// A tenant's repository by name.
    #[expect(clippy::unused_async, reason = "a cluster's engine asks its database here")]
    pub async fn repository(&self, tenant: &TenantName, name: &RepositoryName) -> Result<Arc<Repository>, EngineError> {
        match self.repositories.read().get(&(tenant.clone(), name.clone())) {
            Some(Entry::Open(repository)) => Ok(Arc::clone(repository)),
            Some(Entry::Unusable(reason)) => {
                Err(EngineError::Unusable { name: name.clone(), reason: Arc::clone(reason) })
            }
            None => Err(EngineError::NoSuchRepository { tenant: tenant.clone(), name: name.clone() }),
        }
    }

    /// Every usable repository of every tenant.
    pub fn all(&self) -> Vec<Arc<Repository>> {
        let open = |entry: &Entry| match entry {
            Entry::Open(repository) => Some(Arc::clone(repository)),
            Entry::Unusable(_) => None,
        };
        self.repositories.read().values().filter_map(open).collect()
    }

    /// A tenant's usable repositories by name.
    #[expect(clippy::unused_async, reason = "a cluster's engine asks its database here")]
    pub async fn repositories(&self, tenant: &TenantName) -> Result<Vec<RepositoryV1>, EngineError> {
        let known = self.repositories.read();
        let mine = known.iter().filter(|((owner, _), _)| owner == tenant);
        let mut files: Vec<RepositoryV1> = mine
            .filter_map(|(_, entry)| match entry {
                Entry::Open(repository) => Some(repository.file().clone()),
                Entry::Unusable(_) => None,
            })
            .collect();
        files.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(files)
    }

    /// Free space of the file system that holds the data directory, bytes; zero if it cannot be told.
    pub async fn free_bytes(&self) -> u64 {
        let root = self.common.paths.root().to_path_buf();
        let free = blocking(move || {
            let stat = rustix::fs::statvfs(&root).map_err(|error| StorageError::io("measure", &root)(error.into()))?;
            Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
        });
        free.await.unwrap_or(0)
    }

    /// Writes everything out and lets go of the directory. Blocks that are still queued are stored first; sessions stay open
    /// and can be resumed after the next start. Packs are sealed, because the next start would have to scan them to seal them.
    pub async fn close(&self) -> Result<(), EngineError> {
        let open: Vec<Arc<Repository>> = {
            let mut known = self.repositories.write();
            known
                .drain()
                .filter_map(|(_, entry)| match entry {
                    Entry::Open(repository) => Some(repository),
                    Entry::Unusable(_) => None,
                })
                .collect()
        };
        let mut first_error = None;
        for repository in open {
            if let Err(error) = repository.close().await {
                tracing::error!(repository = %repository.file().name, %error, "a repository was not closed cleanly; the next start recovers it");
                first_error.get_or_insert(error);
            }
        }
        let catalog = self.common.catalog.close().await;
        self.common.lock.release();
        match first_error {
            Some(error) => Err(error),
            None => Ok(catalog?),
        }
    }
}

/// Runs blocking work on a thread for it.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, EngineError> + Send + 'static,
) -> Result<T, EngineError> {
    tokio::task::spawn_blocking(work).await.map_err(|error| EngineError::Interrupted { reason: error.to_string() })?
}

/// Runs blocking work on a thread of its own: for work that is done while a lock is held that tasks in the shared pool may be
/// waiting for, so that a pool full of waiters cannot keep it from being done.
pub(crate) async fn on_own_thread<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, EngineError> + Send + 'static,
) -> Result<T, EngineError> {
    let interrupted = |reason: String| EngineError::Interrupted { reason };
    let (done, result) = tokio::sync::oneshot::channel();
    let run = move || {
        // Whoever asked may have gone away.
        let _ = done.send(work());
    };
    std::thread::Builder::new().name("engine".to_owned()).spawn(run).map_err(|error| interrupted(error.to_string()))?;
    result.await.map_err(|error| interrupted(error.to_string()))?
}

/// What lies in the storage.
#[derive(Default)]
struct Listing {
    found: Vec<(TenantName, RepositoryV1)>,
    unusable: Vec<Unusable>,
}

/// A repository whose file says which it is and no more that can be believed or understood.
struct Unusable {
    tenant: TenantName,
    id: RepositoryId,
    name: RepositoryName,
    reason: StorageError,
}

/// Reads the repositories off the storage, which is the truth, and gives those without a row one.
async fn find_repositories(
    common: &Common,
) -> Result<(Vec<(RepositoryRow, RepositoryV1)>, Vec<Unusable>), EngineError> {
    let storage = common.paths.storage();
    let Listing { found, unusable } = blocking(move || list_repositories(&storage)).await?;
    let rows = common.catalog.repositories().await?;
    let mut repositories = Vec::new();
    for (tenant, file) in found {
        let row = rows.iter().find(|row| row.tenant == tenant && row.id == file.id);
        let number = match row {
            Some(row) => Some(row.number),
            None => common.catalog.add_repository(&tenant, &file).await?,
        };
        match number {
            Some(number) => repositories.push((RepositoryRow { number, tenant, id: file.id }, file)),
            None => {
                tracing::error!(%tenant, repository = %file.name, id = %file.id, "two repositories have one name; this one is not served");
            }
        }
    }
    let is_there = |row: &RepositoryRow| {
        repositories.iter().any(|(found, _)| found.number == row.number)
            || unusable.iter().any(|found| found.tenant == row.tenant && found.id == row.id)
    };
    for row in rows.iter().filter(|row| !is_there(row)) {
        tracing::error!(tenant = %row.tenant, id = %row.id, "a repository of the catalog is missing from the storage");
    }
    Ok((repositories, unusable))
}

fn list_repositories(storage: &Path) -> Result<Listing, EngineError> {
    let mut listing = Listing::default();
    for (name, directory) in subdirectories(storage)? {
        let Ok(tenant) = name.parse::<TenantName>() else { continue };
        files::remove_temporaries(&directory)?;
        for (_, home) in subdirectories(&directory)? {
            let path = RepositoryPaths::new(home).file();
            let bytes = match files::read_small(&path, REPOSITORY_FILE_BYTES_MAX) {
                Ok(Some(bytes)) => bytes,
                Ok(None) => continue,
                Err(error) => {
                    tracing::error!(%tenant, %error, "a repository is not served");
                    continue;
                }
            };
            match RepositoryV1::decode(&bytes).map_err(StorageError::format(&path)) {
                Ok(file) => listing.found.push((tenant.clone(), file)),
                Err(reason) => {
                    tracing::error!(%tenant, %reason, "a repository is not served");
                    // Its name is taken all the same: whoever asks for it must not be told to make it anew.
                    if let Ok((id, name)) = RepositoryV1::identify(&bytes) {
                        listing.unusable.push(Unusable { tenant: tenant.clone(), id, name, reason });
                    }
                }
            }
        }
    }
    Ok(listing)
}

fn subdirectories(path: &Path) -> Result<Vec<(String, PathBuf)>, EngineError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(path).map_err(StorageError::io("list", path))? {
        let entry = entry.map_err(StorageError::io("list", path))?;
        if entry.path().is_dir() {
            found.push((entry.file_name().to_string_lossy().into_owned(), entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

fn make_repository(
    parent: &Path,
    home: &RepositoryPaths,
    file: &RepositoryV1,
    slots: &NamedSlots,
) -> Result<(), EngineError> {
    files::create_directory(parent)?;
    let unfinished = parent.join(format!("{}{}", files::TEMPORARY_PREFIX, file.id));
    let making = RepositoryPaths::new(unfinished.clone());
    for directory in [making.keys(), making.packs(), making.snapshots(), making.index()] {
        files::create_directory(&directory)?;
    }
    for (name, bytes) in slots {
        files::write_atomically(&making.keys().join(name), bytes)?;
    }
    files::write_atomically(&making.file(), &file.encode())?;
    fs::rename(&unfinished, home.root()).map_err(StorageError::io("name", home.root()))?;
    failpoint::reached("repository/renamed");
    Ok(files::sync_directory(parent)?)
}
