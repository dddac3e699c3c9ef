//! Changes a tree the way that a day of use does, by a seed.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use crate::random::Random;

/// Files above this are changed in place or appended to, but not rewritten, bytes.
const REWRITE_BYTES_MAX: u64 = 64 << 20;
/// Paths longer than this are left alone, because they cannot be used as paths, bytes.
const PATH_BYTES_MAX: usize = 4000;

/// How many files went through which change.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Changes {
    /// Some bytes overwritten; the size is the same.
    pub edited: u64,
    /// Bytes inserted in the middle, so that everything behind them moves.
    pub inserted: u64,
    /// Bytes added at the end.
    pub appended: u64,
    /// Cut short.
    pub truncated: u64,
    /// Renamed within its directory.
    pub renamed: u64,
    /// Deleted.
    pub deleted: u64,
    /// New mode, same content.
    pub chmodded: u64,
    /// New files beside changed ones.
    pub created: u64,
}

impl Changes {
    /// All changes together.
    pub fn total(&self) -> u64 {
        let changed = self.edited + self.inserted + self.appended + self.truncated;
        changed + self.renamed + self.deleted + self.chmodded + self.created
    }
}

/// Changes about `percent` of the regular files below `root`. The same seed on the same tree does the same.
pub fn mutate(root: &Path, seed: u64, percent: u64) -> io::Result<Changes> {
    let mut files = Vec::new();
    collect(root, &mut files)?;
    let mut random = Random::new(seed);
    let mut changes = Changes::default();
    for path in files {
        if random.percent(percent) {
            change(&path, &mut random, &mut changes)?;
        }
    }
    Ok(changes)
}

/// The regular files below `dir` by ascending path. Holds all paths in memory: a test's trees are small enough.
fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    let mut entries = fs::read_dir(dir)?.collect::<io::Result<Vec<_>>>()?;
    entries.sort_by_key(fs::DirEntry::file_name);
    for entry in entries {
        let (path, kind) = (entry.path(), entry.file_type()?);
        if path.as_os_str().len() > PATH_BYTES_MAX {
            continue;
        }
        if kind.is_dir() {
            collect(&path, files)?;
        } else if kind.is_file() {
            files.push(path);
        }
    }
    Ok(())
}

fn change(path: &Path, random: &mut Random, changes: &mut Changes) -> io::Result<()> {
    let len = fs::symlink_metadata(path)?.len();
    let open = || File::options().read(true).write(true).open(path);
    let some_len = 1 + random.index(3000);
    let some = random.bytes(some_len);
    match random.below(10) {
        0..=2 if len > 0 => {
            let at = random.below(len);
            let room = usize::try_from(len - at).unwrap_or(usize::MAX);
            open()?.write_all_at(some.get(..room.min(some.len())).unwrap_or_default(), at)?;
            changes.edited += 1;
        }
        3 | 4 if len <= REWRITE_BYTES_MAX => {
            let mut content = fs::read(path)?;
            let at = random.index(content.len() + 1);
            content.splice(at..at, some);
            fs::write(path, content)?;
            changes.inserted += 1;
        }
        5 => {
            // A short name, so that a name of 255 bytes can be renamed too.
            let name = format!("renamed-{}", random.number());
            fs::rename(path, path.with_file_name(name))?;
            changes.renamed += 1;
        }
        6 => {
            fs::remove_file(path)?;
            changes.deleted += 1;
        }
        7 if len > 0 => {
            open()?.set_len(random.below(len))?;
            changes.truncated += 1;
        }
        8 => {
            let mode = fs::symlink_metadata(path)?.mode();
            fs::set_permissions(path, PermissionsExt::from_mode(mode & 0o7777 ^ 0o011))?;
            fs::write(path.with_file_name(format!("created-{}", random.number())), some)?;
            changes.chmodded += 1;
            changes.created += 1;
        }
        _ => {
            open()?.write_all_at(&some, len)?;
            changes.appended += 1;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::{Options, compare};
    use crate::corpus::Corpus;

    #[test]
    fn the_same_seed_makes_the_same_changes() {
        let scratch = tempfile::tempdir().unwrap();
        let tree = |name: &str| {
            let path = scratch.path().join(name);
            Corpus { files: 400, big_bytes: 100_000, ..Corpus::default() }.create(&path).unwrap();
            path
        };
        let (before, one, other) = (tree("before"), tree("one"), tree("other"));
        let changes = mutate(&one, 9, 30).unwrap();
        assert_eq!(mutate(&other, 9, 30).unwrap(), changes);
        assert!((100..200).contains(&changes.total()), "{changes:?}");
        let each = [changes.edited, changes.inserted, changes.appended, changes.truncated, changes.renamed];
        assert!(each.iter().chain([&changes.deleted, &changes.chmodded]).all(|&n| n > 0), "{changes:?}");
        // Times are the clock's, so they are left out.
        let options = Options { times: false, ..Options::default() };
        let found = compare(&one, &other, options).unwrap();
        assert!(found.is_same(), "{found}");
        assert!(compare(&before, &one, options).unwrap().count >= changes.total() / 2);
    }
}
