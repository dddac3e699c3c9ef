//! What is done to a data directory that no server uses: its catalog and indexes are made anew from the storage, and packs
//! are repaired. Both hold the directory's lock from the first look to the end.

pub mod rebuild;
pub mod repair;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Context;
use strandline_messages::TenantName;
use strandline_messages::format::repository::RepositoryV1;

use crate::failpoint;
use crate::storage::files;
use crate::storage::layout::{DataPaths, RepositoryPaths};

/// Longest repository file, bytes.
const REPOSITORY_FILE_BYTES_MAX: usize = 4096;

/// A repository's directory as it is found in the storage.
struct Found {
    tenant: TenantName,
    paths: RepositoryPaths,
    /// The repository file, or what is wrong with it.
    file: Result<RepositoryV1, String>,
}

/// The directories below the tenants' that hold a repository file, by name.
fn find(paths: &DataPaths) -> anyhow::Result<Vec<Found>> {
    let mut found = Vec::new();
    for tenant_directory in directories(&paths.storage())? {
        let tenant = tenant_directory.file_name().and_then(|name| name.to_str()?.parse::<TenantName>().ok());
        let Some(tenant) = tenant else { continue };
        for directory in directories(&tenant_directory)? {
            let home = RepositoryPaths::new(directory);
            let file = match files::read_small(&home.file(), REPOSITORY_FILE_BYTES_MAX) {
                Ok(None) => continue,
                Ok(Some(bytes)) => RepositoryV1::decode(&bytes).map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            found.push(Found { tenant: tenant.clone(), paths: home, file });
        }
    }
    Ok(found)
}

fn directories(path: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let cannot = || format!("cannot list {}", path.display());
    let mut found = Vec::new();
    for entry in fs::read_dir(path).with_context(cannot)? {
        let path = entry.with_context(cannot)?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if path.is_dir() && !hidden {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Removes a repository's chunk index, which is made anew from its packs when it is opened.
fn remove_index(paths: &RepositoryPaths) -> anyhow::Result<()> {
    let index = paths.index();
    match fs::remove_dir_all(&index) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove the index {}", index.display()))
        }
        _ => {
            failpoint::reached("index/removed");
            Ok(())
        }
    }
}
