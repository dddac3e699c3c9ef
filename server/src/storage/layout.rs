//! Where things lie in a data directory. Names come from validated types only, so none can leave its directory.

use std::path::{Path, PathBuf};

use strandline_messages::{RepositoryId, SnapshotId, TenantName};

/// The lock file's name inside a data directory.
pub const LOCK_NAME: &str = "LOCK";

/// The paths of a data directory.
#[derive(Clone, Debug)]
pub struct DataPaths {
    root: PathBuf,
}

impl DataPaths {
    /// Of the data directory `root`.
    pub fn new(root: &Path) -> Self {
        Self { root: root.to_path_buf() }
    }

    /// The data directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Held with `flock` by the process that owns the directory.
    pub fn lock(&self) -> PathBuf {
        self.root.join(LOCK_NAME)
    }

    /// The catalog.
    pub fn catalog(&self) -> PathBuf {
        self.root.join("catalog.sqlite")
    }

    /// The Ed25519 seed that signs receipts.
    pub fn server_key(&self) -> PathBuf {
        self.root.join("server.key")
    }

    /// The tenants' directories.
    pub fn storage(&self) -> PathBuf {
        self.root.join("storage")
    }

    /// The repositories of a tenant.
    pub fn tenant(&self, tenant: &TenantName) -> PathBuf {
        self.storage().join(tenant.as_str())
    }

    /// One repository.
    pub fn repository(&self, tenant: &TenantName, id: &RepositoryId) -> RepositoryPaths {
        RepositoryPaths::new(self.tenant(tenant).join(id.to_string()))
    }
}

/// The paths of one repository.
#[derive(Clone, Debug)]
pub struct RepositoryPaths {
    root: PathBuf,
}

impl RepositoryPaths {
    /// Of the repository directory `root`.
    pub fn new(root: PathBuf) -> Self {
        Self { root }
    }

    /// The repository's directory.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The repository file.
    pub fn file(&self) -> PathBuf {
        self.root.join("REPOSITORY")
    }

    /// The directory of the key slots.
    pub fn keys(&self) -> PathBuf {
        self.root.join("keys")
    }

    /// The directory of the packs.
    pub fn packs(&self) -> PathBuf {
        self.root.join("packs")
    }

    /// A pack.
    pub fn pack(&self, number: u32) -> PathBuf {
        self.packs().join(format!("{number:08x}.pack"))
    }

    /// The state file beside a pack.
    pub fn pack_state(&self, number: u32) -> PathBuf {
        self.packs().join(format!("{number:08x}.state"))
    }

    /// What was decided about the repository's snapshots.
    pub fn keeping_journal(&self) -> PathBuf {
        self.root.join("keeping.journal")
    }

    /// A pack that was set aside because not even its header could be read.
    pub fn damaged_pack(&self, number: u32) -> PathBuf {
        self.packs().join(format!("{number:08x}.damaged"))
    }

    /// The directory of manifests and receipts.
    pub fn snapshots(&self) -> PathBuf {
        self.root.join("snapshots")
    }

    /// A snapshot's manifest.
    pub fn manifest(&self, snapshot: &SnapshotId) -> PathBuf {
        self.snapshots().join(format!("{snapshot}.manifest"))
    }

    /// A snapshot's receipt.
    pub fn receipt(&self, snapshot: &SnapshotId) -> PathBuf {
        self.snapshots().join(format!("{snapshot}.receipt"))
    }

    /// The directory of the chunk index (derived data).
    pub fn index(&self) -> PathBuf {
        self.root.join("index")
    }
}

/// The number of the pack that a file name names, with its extension (`pack`, `state` or `damaged`).
pub fn pack_number(name: &str) -> Option<(u32, &str)> {
    let (digits, extension) = name.split_once('.')?;
    let well_formed = digits.len() == 8 && digits.bytes().all(|c| c.is_ascii_digit() || (b'a'..=b'f').contains(&c));
    let number = if well_formed { u32::from_str_radix(digits, 16).ok()? } else { return None };
    matches!(extension, "pack" | "state" | "damaged").then_some((number, extension))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_well_formed_pack_names_are_packs() {
        assert_eq!(pack_number("0000000a.pack"), Some((10, "pack")));
        assert_eq!(pack_number("0000000a.damaged"), Some((10, "damaged")));
        for bad in ["a.pack", "0000000A.pack", "+000000a.pack", "0000000a.packs", "0000000a"] {
            assert_eq!(pack_number(bad), None, "{bad}");
        }
    }
}
