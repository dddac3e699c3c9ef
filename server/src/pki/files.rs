//! Files that must be whole or absent: written beside, fsynced, renamed, and their directory fsynced.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use tempfile::{Builder, NamedTempFile};

use crate::failpoint;
use crate::storage::files::{TEMPORARY_PREFIX, open_or_read, remove_temporaries};

/// Makes `directory` (mode 700) and its missing parents, and fsyncs the directories that gained an entry.
pub fn create_directory(directory: &Path) -> io::Result<()> {
    if directory.is_dir() {
        return Ok(());
    }
    let parent = parent_of(directory);
    create_directory(parent)?;
    match DirBuilder::new().mode(0o700).create(directory) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(error),
        _ => {}
    }
    failpoint::reached("private-directory/created");
    sync_directory(parent)
}

/// Replaces `path` by `bytes`, mode 600: after a crash the file is the old one or the new one.
pub fn write_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = parent_of(path);
    // tempfile makes its files with mode 600.
    let mut file = Builder::new().prefix(TEMPORARY_PREFIX).tempfile_in(directory)?;
    write_and_sync(&mut file, bytes)?;
    file.persist(path).map_err(|error| error.error)?;
    failpoint::reached("private-file/renamed");
    sync_directory(directory)
}

/// Writes `bytes` to `path`, which must not exist yet; mode 600, fsynced with its directory.
pub fn create_private(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let directory = parent_of(path);
    let mut file = Builder::new().prefix(TEMPORARY_PREFIX).tempfile_in(directory)?;
    write_and_sync(&mut file, bytes)?;
    file.persist_noclobber(path).map_err(|error| error.error)?;
    failpoint::reached("private-file/renamed");
    sync_directory(directory)
}

fn write_and_sync(file: &mut NamedTempFile, bytes: &[u8]) -> io::Result<()> {
    file.write_all(bytes)?;
    failpoint::reached("private-file/written");
    failpoint::sync("private-file/sync", || file.as_file().sync_all())
}

/// Removes what a process that died was writing in `directory`, if it is there: parts of keys may be in it.
pub fn remove_unfinished(directory: &Path) -> io::Result<()> {
    if directory.is_dir() { remove_temporaries(directory).map_err(io::Error::other) } else { Ok(()) }
}

/// Opens `path` for appending, mode 600, made and fsynced into its directory if missing. On a medium that cannot be written it is
/// opened if it is there, and appending fails.
pub fn open_append(path: &Path) -> io::Result<File> {
    let missing = !path.exists();
    let file = open_or_read(OpenOptions::new().read(true).append(true).create(true).mode(0o600), path)?;
    if missing {
        failpoint::reached("journal/created");
        failpoint::sync("journal/sync", || file.sync_all())?;
        sync_directory(parent_of(path))?;
    }
    Ok(file)
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    failpoint::sync("private-directory/sync", || File::open(directory)?.sync_all())
}

fn parent_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// The bytes of `path`, at most `max`; a longer file is an error.
pub fn read_at_most(path: &Path, max: u64) -> io::Result<Vec<u8>> {
    if fs::metadata(path)?.len() > max {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("longer than {max} bytes")));
    }
    fs::read(path)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_private_file_is_readable_by_its_owner_alone_and_leaves_nothing_beside_it() {
        let root = tempfile::tempdir().unwrap();
        let directory = root.path().join("a/b");
        create_directory(&directory).unwrap();
        let path = directory.join("key");
        write_private(&path, b"one").unwrap();
        write_private(&path, b"two").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(fs::metadata(&directory).unwrap().permissions().mode() & 0o777, 0o700);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
        assert_eq!(create_private(&path, b"three").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read(&path).unwrap(), b"two");
    }
}
