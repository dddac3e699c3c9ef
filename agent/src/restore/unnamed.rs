//! Files that have no name until they are complete: a killed restore leaves nothing of them behind, and giving a name costs
//! less than changing it.
//!
//! Linux only, and not on every file system; whoever cannot have such a file takes a temporary name.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, Uid};
use rustix::io::Errno;

/// The user `nobody`.
const SOMEBODY_ELSE: u32 = 65_534;
/// File systems on which an unnamed file was seen to cost less than a temporary name: ext4, XFS, tmpfs. On others it may be
/// the other way round: ZFS waits for the disk before it gives one a name.
const GOOD_FOR_THEM: [i64; 3] = [0xef53, 0x5846_5342, 0x0102_1994];

/// Whether files without a name can be made in `directory`, which is empty, and be given one, even if they belong to
/// somebody else by then. `name` is used to find out, and free again.
pub(super) fn are_possible(directory: &impl AsFd, name: &[u8]) -> bool {
    if !rustix::fs::fstatfs(directory).is_ok_and(|found| GOOD_FOR_THEM.contains(&found.f_type)) {
        return false;
    }
    let tried = make(directory, Mode::RUSR | Mode::WUSR).and_then(|file| {
        // Some may give files away, and may not link to them afterwards. Who may not even do that has only files of its own.
        let _ = rustix::fs::fchown(&file, Some(Uid::from_raw(SOMEBODY_ELSE)), None);
        give_name(&file, directory, name)
    });
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
