//! Metadata of one file as the kernel gives it: `statx`, extended attributes, link targets.

use std::os::fd::{AsRawFd, BorrowedFd};

use rustix::fs::{AtFlags, FileType, Statx, StatxFlags};
use rustix::io::Errno;
use strandline_messages::format::tree::{Timestamp, Xattr};
use strandline_messages::limits;

/// Most bytes of extended attributes (names and values) that are saved of one file. The rest is reported.
pub const XATTR_BYTES_MAX: usize = 512 << 10;

/// What `statx` says about one file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Meta {
    /// Type and permissions (`st_mode`).
    pub mode: u32,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Length in bytes.
    pub size: u64,
    /// Blocks of 512 bytes on the medium.
    pub blocks: u64,
    /// Modification time.
    pub mtime: Timestamp,
    /// Status change time.
    pub ctime: Timestamp,
    /// Inode number.
    pub inode: u64,
    /// Device number of the file system.
    pub device: u64,
    /// Number of hard links.
    pub links: u32,
    /// Major number, if this is a device.
    pub major: u32,
    /// Minor number, if this is a device.
    pub minor: u32,
}

impl Meta {
    fn from_statx(stat: &Statx) -> Self {
        let time = |t: rustix::fs::StatxTimestamp| Timestamp { seconds: t.tv_sec, nanos: t.tv_nsec.min(999_999_999) };
        Self {
            mode: stat.stx_mode.into(),
            uid: stat.stx_uid,
            gid: stat.stx_gid,
            size: stat.stx_size,
            blocks: stat.stx_blocks,
            mtime: time(stat.stx_mtime),
            ctime: time(stat.stx_ctime),
            inode: stat.stx_ino,
            device: rustix::fs::makedev(stat.stx_dev_major, stat.stx_dev_minor),
            links: stat.stx_nlink,
            major: stat.stx_rdev_major,
            minor: stat.stx_rdev_minor,
        }
    }

    /// The file's type.
    pub fn file_type(&self) -> FileType {
        FileType::from_raw_mode(self.mode)
    }

    /// Whether this is a directory.
    pub fn is_dir(&self) -> bool {
        self.file_type() == FileType::Directory
    }

    /// Whether this is a regular file.
    pub fn is_file(&self) -> bool {
        self.file_type() == FileType::RegularFile
    }

    /// The lower twelve bits of the mode.
    pub fn permissions(&self) -> u16 {
        u16::try_from(self.mode & 0o7777).unwrap_or_default()
    }
}

/// Metadata of `name` in the directory `dir`; a symbolic link is looked through only if `follow`.
pub fn stat_at(dir: BorrowedFd<'_>, name: &[u8], follow: bool) -> Result<Meta, Errno> {
    let mut flags = AtFlags::NO_AUTOMOUNT;
    if !follow {
        flags |= AtFlags::SYMLINK_NOFOLLOW;
    }
    rustix::fs::statx(dir, name, flags, StatxFlags::BASIC_STATS).map(|stat| Meta::from_statx(&stat))
}

/// Metadata of an open file.
pub fn stat_fd(fd: BorrowedFd<'_>) -> Result<Meta, Errno> {
    rustix::fs::statx(fd, c"", AtFlags::EMPTY_PATH, StatxFlags::BASIC_STATS).map(|stat| Meta::from_statx(&stat))
}

/// The target of the symbolic link `name` in `dir`.
pub fn read_link(dir: BorrowedFd<'_>, name: &[u8]) -> Result<Vec<u8>, Errno> {
    rustix::fs::readlinkat(dir, name, Vec::new()).map(std::ffi::CString::into_bytes)
}

/// Whose extended attributes are wanted.
#[derive(Clone, Copy, Debug)]
pub enum XattrTarget<'a> {
    /// Of an open file or directory.
    Open(BorrowedFd<'a>),
    /// Of a name in an open directory, links not followed. Works for every type and needs no permission to read it.
    At(BorrowedFd<'a>, &'a [u8]),
}

/// What was found: the attributes sorted by name, and the first thing that went wrong.
#[derive(Debug, Default)]
pub struct XattrsFound {
    /// Sorted by name.
    pub xattrs: Vec<Xattr>,
    /// Why some are missing.
    pub problem: Option<String>,
}

/// Reads extended attributes into reused buffers (128 KiB per reader thread, the kernel's limits).
#[derive(Debug)]
pub struct XattrReader {
    list: Vec<u8>,
    value: Vec<u8>,
}

impl Default for XattrReader {
    fn default() -> Self {
        Self { list: vec![0; 65_536], value: vec![0; limits::XATTR_VALUE_BYTES_MAX] }
    }
}

impl XattrReader {
    /// All attributes of `target`. A file system without extended attributes has none.
    pub fn read(&mut self, target: XattrTarget<'_>) -> XattrsFound {
        let mut path = Vec::new();
        if let XattrTarget::At(dir, name) = target {
            path.extend_from_slice(format!("/proc/self/fd/{}/", dir.as_raw_fd()).as_bytes());
            path.extend_from_slice(name);
        }
        let listed = match target {
            XattrTarget::Open(fd) => rustix::fs::flistxattr(fd, self.list.as_mut_slice()),
            XattrTarget::At(..) => rustix::fs::llistxattr(path.as_slice(), self.list.as_mut_slice()),
        };
        let mut found = XattrsFound::default();
        let listed = match listed {
            Ok(listed) => listed,
            Err(Errno::NOTSUP) => return found,
            Err(error) => {
                found.problem = Some(format!("the extended attributes could not be listed: {error}"));
                return found;
            }
        };
        let mut bytes = 0;
        let names = self.list.get(..listed).unwrap_or_default();
        for name in names.split(|&byte| byte == 0).filter(|name| !name.is_empty()) {
            let got = match target {
                XattrTarget::Open(fd) => rustix::fs::fgetxattr(fd, name, self.value.as_mut_slice()),
                XattrTarget::At(..) => rustix::fs::lgetxattr(path.as_slice(), name, self.value.as_mut_slice()),
            };
            match got {
                Ok(len) => {
                    let value = self.value.get(..len).unwrap_or_default();
                    bytes += name.len() + value.len();
                    if bytes > XATTR_BYTES_MAX || found.xattrs.len() >= limits::XATTRS_MAX {
                        found.problem = Some("more extended attributes than can be saved: the rest is missing".into());
                        break;
                    }
                    found.xattrs.push(Xattr { name: name.to_vec(), value: value.to_vec() });
                }
                Err(Errno::NODATA) => {}
                Err(error) => {
                    let name = String::from_utf8_lossy(name);
                    found.problem.get_or_insert(format!("extended attribute {name} could not be read: {error}"));
                }
            }
        }
        found.xattrs.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        found
    }
}
