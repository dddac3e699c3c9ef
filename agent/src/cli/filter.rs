//! `--host`, `--tag` and `--path`: which snapshots a command is about, with restic's meaning.

use std::collections::BTreeSet;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use clap::Args;

use super::selector::Snapshot;

/// The options.
#[derive(Args, Debug, Clone, Default)]
pub struct Filter {
    /// Only snapshots of this host; repeated: of any of them
    #[arg(long, value_name = "HOST")]
    pub host: Vec<String>,
    /// Only snapshots with these tags; repeated: with all of any of the lists
    #[arg(long, value_name = "TAG[,TAG]")]
    pub tag: Vec<String>,
    /// Only snapshots that saved this path; repeated: all of them
    #[arg(long, value_name = "PATH")]
    pub path: Vec<PathBuf>,
}

impl Filter {
    /// Whether nothing is left out.
    pub fn is_empty(&self) -> bool {
        self.host.is_empty() && self.tag.is_empty() && self.path.is_empty()
    }

    /// Whether the command is about `snapshot`.
    pub fn matches(&self, snapshot: &Snapshot) -> bool {
        let has_path = |path: &PathBuf| {
            let absolute = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            snapshot.details.paths.iter().any(|saved| saved == absolute.as_os_str().as_bytes())
        };
        (self.host.is_empty() || self.host.contains(&snapshot.manifest.host))
            && (self.tag.is_empty() || self.tag.iter().any(|list| has_all(snapshot, &tags(list))))
            && self.path.iter().all(has_path)
    }
}

fn has_all(snapshot: &Snapshot, tags: &BTreeSet<String>) -> bool {
    tags.iter().all(|tag| snapshot.tags.contains(tag))
}

/// The tags of a list such as `a,b`; empty ones are nothing.
pub fn tags(list: &str) -> BTreeSet<String> {
    list.split(',').map(str::trim).filter(|tag| !tag.is_empty()).map(str::to_owned).collect()
}
