//! Files that have no name until they are complete: nobody sees half a file, a killed restore leaves nothing behind, and
//! giving the name costs less than changing it.
//!
//! Linux only, and not on every file system; whoever cannot have such a file takes a temporary name.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;

/// Whether files without a name can be made in `directory` and be given one. `name` is used to find out, and free again.
pub(super) fn are_possible(directory: &impl AsFd, name: &[u8]) -> bool {
    let tried = make(directory, Mode::RUSR | Mode::WUSR).and_then(|file| give_name(&file, directory, name));
    tried.is_ok() && rustix::fs::unlinkat(directory, name, AtFlags::empty()).is_ok()
}

/// Makes a file without a name on the file system of `directory`, open for writing.
pub(super) fn make(directory: &impl AsFd, mode: Mode) -> Result<OwnedFd, Errno> {
    let flags = OFlags::WRONLY | OFlags::TMPFILE | OFlags::CLOEXEC;
    rustix::fs::openat(directory, c".", flags, mode)
}

/// Gives the file a name in `directory`. What has that name already is an error and stays.
pub(super) fn give_name(file: &impl AsFd, directory: &impl AsFd, name: &[u8]) -> Result<(), Errno> {
    match rustix::fs::linkat(file, c"", directory, name, AtFlags::EMPTY_PATH) {
        // Before Linux 6.10 only the privileged may; everybody may by way of /proc.
        Err(Errno::NOENT) => {
            let path = format!("/proc/self/fd/{}", file.as_fd().as_raw_fd());
            rustix::fs::linkat(CWD, path, directory, name, AtFlags::SYMLINK_FOLLOW)
        }
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_file_gets_a_free_name_and_takes_nobody_elses() {
        let directory = tempfile::tempdir().unwrap();
        let handle = fs::File::open(directory.path()).unwrap();
        assert!(are_possible(&handle, b"try"));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "nothing is left of it");

        let file = make(&handle, Mode::from_raw_mode(0o640)).unwrap();
        rustix::io::write(&file, b"content").unwrap();
        fs::write(directory.path().join("taken"), "mine").unwrap();
        assert_eq!(give_name(&file, &handle, b"taken"), Err(Errno::EXIST));
        assert_eq!(fs::read(directory.path().join("taken")).unwrap(), b"mine");
        give_name(&file, &handle, b"free").unwrap();
        let free = directory.path().join("free");
        assert_eq!(fs::read(&free).unwrap(), b"content");
        assert_eq!(fs::metadata(&free).unwrap().permissions().mode() & 0o177, 0o040);
    }

    #[test]
    fn where_no_file_can_be_made_it_is_not_possible() {
        assert!(!are_possible(&fs::File::open("/proc").unwrap(), b"try"));
    }
}
