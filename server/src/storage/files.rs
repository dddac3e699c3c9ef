//! The file operations on which durability rests, behind a trait so that a test can fail or record each of them, and the one
//! helper that writes small files.

use std::fs::{self, File, OpenOptions};
use std::io::{self, IoSlice, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::io::ReadWriteFlags;

use super::StorageError;
use crate::failpoint;

/// Free space that blocks never take, bytes: the catalog, the index and footers need it so that a full disk can still be
/// read from, listed and cleaned up.
pub const RESERVE_BYTES: u64 = 16 << 20;

/// Shorter writes than this go through the page cache: a disk takes few large writes better than many small ones, bytes.
const UNCACHED_FROM_BYTES: usize = 128 << 10;

/// What the pack writer does to files. The system's implementation is [`SystemFiles`].
pub trait FileOps: Send + Sync + std::fmt::Debug {
    /// Creates a file that must not exist yet, for reading and writing.
    fn create(&self, path: &Path) -> io::Result<File>;
    /// Writes all `bytes` from `offset` (bytes) on.
    fn write_at(&self, file: &File, path: &Path, bytes: &[u8], offset: u64) -> io::Result<()>;
    /// Fails with [`io::ErrorKind::StorageFull`] if `bytes` more would leave less than [`RESERVE_BYTES`] free where `file` is.
    fn ensure_room(&self, file: &File, bytes: u64) -> io::Result<()> {
        let stat = rustix::fs::fstatvfs(file)?;
        let free_bytes = stat.f_bavail.saturating_mul(stat.f_frsize);
        // Some network file systems do not know their size.
        if stat.f_blocks > 0 && free_bytes < bytes.saturating_add(RESERVE_BYTES) {
            let text =
                format!("{free_bytes} bytes are free, of which {RESERVE_BYTES} are kept for the catalog and the index");
            return Err(io::Error::new(io::ErrorKind::StorageFull, text));
        }
        Ok(())
    }
    /// Makes the file's bytes durable (`fdatasync`).
    fn sync(&self, file: &File, path: &Path) -> io::Result<()>;
    /// Makes the names in a directory durable.
    fn sync_directory(&self, path: &Path) -> io::Result<()>;
}

/// The operating system's files.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemFiles;

impl FileOps for SystemFiles {
    fn create(&self, path: &Path) -> io::Result<File> {
        let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(path)?;
        failpoint::reached("pack/created");
        Ok(file)
    }

    fn write_at(&self, file: &File, _path: &Path, bytes: &[u8], offset: u64) -> io::Result<()> {
        let written = if bytes.len() >= UNCACHED_FROM_BYTES { write_uncached(file, bytes, offset) } else { 0 };
        file.write_all_at(bytes.get(written..).unwrap_or_default(), offset + written as u64)?;
        failpoint::reached("pack/written");
        Ok(())
    }

    fn sync(&self, file: &File, _path: &Path) -> io::Result<()> {
        failpoint::sync("pack/sync", || file.sync_data())
    }

    fn sync_directory(&self, path: &Path) -> io::Result<()> {
        failpoint::sync("directory/sync", || File::open(path)?.sync_all())
    }
}

/// Writes so that the disk gets the bytes at once and the page cache keeps none of them (`RWF_DONTCACHE`, Linux 6.14): they are
/// about to be synced, will not be read soon, and the memory belongs to others. How many bytes were written: none where kernel
/// or file system cannot, or on an error, which whoever writes the rest will meet again.
fn write_uncached(file: &File, bytes: &[u8], offset: u64) -> usize {
    const DONTCACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);
    rustix::io::pwritev2(file, &[IoSlice::new(bytes)], offset, DONTCACHE).unwrap_or(0)
}

/// Makes the names in `path` durable.
pub fn sync_directory(path: &Path) -> Result<(), StorageError> {
    SystemFiles.sync_directory(path).map_err(StorageError::io("sync", path))
}

/// Creates `path` and every missing directory above it; each new name is synced into its parent.
pub fn create_directory(path: &Path) -> Result<(), StorageError> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    if let Some(parent) = parent {
        create_directory(parent)?;
    }
    match fs::create_dir(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        other => other.map_err(StorageError::io("create", path))?,
    }
    failpoint::reached("directory/created");
    sync_directory(parent.unwrap_or(Path::new(".")))
}

/// Writes a whole small file so that a power cut leaves either the old one or the new one: temporary file in the same
/// directory (mode 600), sync, rename, sync of the directory.
pub fn write_atomically(path: &Path, bytes: &[u8]) -> Result<(), StorageError> {
    let directory = path.parent().unwrap_or(Path::new("."));
    let write = || -> io::Result<()> {
        let mut file = tempfile::Builder::new().prefix(TEMPORARY_PREFIX).tempfile_in(directory)?;
        file.write_all(bytes)?;
        failpoint::reached("file/written");
        failpoint::sync("file/sync", || file.as_file().sync_all())?;
        file.persist(path).map_err(|error| error.error)?;
        failpoint::reached("file/renamed");
        Ok(())
    };
    write().map_err(StorageError::io("write", path))?;
    sync_directory(directory)
}

/// What [`has_room`] asks for, bytes: more than the catalog needs to be opened.
const PROBE_BYTES: usize = 256 << 10;

/// Whether new files can be made in `directory` and take some bytes: not on a medium that cannot be written, and not where space
/// or inodes are used up.
pub fn has_room(directory: &Path) -> Result<bool, StorageError> {
    let probe = || -> io::Result<()> {
        // Two, as the catalog needs beside its database.
        let _one = tempfile::Builder::new().prefix(TEMPORARY_PREFIX).tempfile_in(directory)?;
        let mut other = tempfile::Builder::new().prefix(TEMPORARY_PREFIX).tempfile_in(directory)?;
        other.write_all(&vec![0; PROBE_BYTES])
    };
    match probe() {
        Ok(()) => Ok(true),
        Err(error) if is_no_room(&error) => Ok(false),
        Err(error) => Err(StorageError::io("write", directory)(error)),
    }
}

/// Whether an error says that nothing more can be written here, whatever it is.
pub fn is_no_room(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded | io::ErrorKind::ReadOnlyFilesystem
    )
}

/// Opens a file with `options`; on a medium that cannot be written for reading alone, so that writing to it fails later.
pub fn open_or_read(options: &OpenOptions, path: &Path) -> io::Result<File> {
    match options.open(path) {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => File::open(path),
        other => other,
    }
}

/// How the names of unfinished files begin; [`remove_temporaries`] knows them by it.
pub const TEMPORARY_PREFIX: &str = ".unfinished-";

/// Removes what writers left unfinished in `directory` when their process died; on a medium that cannot be written it stays.
pub fn remove_temporaries(directory: &Path) -> Result<(), StorageError> {
    let failed = |error| StorageError::io("clean", directory)(error);
    for entry in fs::read_dir(directory).map_err(failed)? {
        let entry = entry.map_err(StorageError::io("clean", directory))?;
        if entry.file_name().to_string_lossy().starts_with(TEMPORARY_PREFIX) {
            let path = entry.path();
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            match removed {
                Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => continue,
                other => other.map_err(StorageError::io("remove", &path))?,
            }
            failpoint::reached("unfinished/removed");
        }
    }
    Ok(())
}

/// Reads a small file whole; one longer than `bytes_max` is refused before it is read. `None` if it does not exist.
pub fn read_small(path: &Path, bytes_max: usize) -> Result<Option<Vec<u8>>, StorageError> {
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(StorageError::io("read", path)(error)),
        Ok(metadata) if metadata.len() > bytes_max as u64 => {
            let found = metadata.len();
            let source = strandline_messages::format::FormatError::Limit { what: "file", found, max: bytes_max as u64 };
            return Err(StorageError::format(path)(source));
        }
        Ok(_) => {}
    }
    fs::read(path).map(Some).map_err(StorageError::io("read", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_file_is_replaced_whole_and_leaves_no_temporary() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/file");
        create_directory(path.parent().unwrap()).unwrap();
        write_atomically(&path, b"one").unwrap();
        write_atomically(&path, b"two").unwrap();
        assert_eq!(read_small(&path, 3).unwrap().unwrap(), b"two");
        assert!(read_small(&path, 2).is_err());
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn what_a_dead_writer_left_unfinished_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(".unfinished-x"), b"x").unwrap();
        fs::write(dir.path().join("kept"), b"x").unwrap();
        remove_temporaries(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
