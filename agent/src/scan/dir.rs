//! Open directories, always reached through their parent, never through a path.
//!
//! A [`Dir`] knows its parent and its name. Its descriptor may be closed at any time when too many are open, and is
//! opened again on demand, component by component, refusing anything that is not the same directory any more. So trees
//! deeper than `PATH_MAX` and deeper than the descriptor limit work, and no symbolic link is ever followed below a root.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;

use super::meta::{Meta, stat_fd};

/// Most directories that one walk keeps open (look-ahead, stack and readers share them).
pub const OPEN_DIRECTORIES_MAX: usize = 256;

/// Bounds the number of open directories; the one opened first is closed first.
#[derive(Debug)]
pub struct DirPool {
    open: Mutex<VecDeque<Weak<Dir>>>,
    limit: usize,
}

impl DirPool {
    /// A pool of at most `limit` (at least 8) open directories.
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { open: Mutex::new(VecDeque::new()), limit: limit.max(8) })
    }

    fn register(&self, dir: &Arc<Dir>) {
        let oldest = {
            let mut open = self.open.lock();
            open.push_back(Arc::downgrade(dir));
            if open.len() > self.limit { open.pop_front() } else { None }
        };
        if let Some(oldest) = oldest.and_then(|weak| weak.upgrade()) {
            *oldest.fd.lock() = None;
        }
    }
}

/// A directory of the source.
#[derive(Debug)]
pub struct Dir {
    parent: Option<Arc<Dir>>,
    name: Box<[u8]>,
    follow: bool,
    device: u64,
    inode: u64,
    fd: Mutex<Option<Arc<OwnedFd>>>,
    pool: Arc<DirPool>,
}

impl Dir {
    /// The root directory.
    pub fn root(pool: &Arc<DirPool>) -> Result<(Arc<Self>, Meta), Errno> {
        let fd = open_directory(CWD, b"/", false)?;
        Self::wrap(None, b"/", false, fd, pool)
    }

    /// The directory `name` in `parent`. A symbolic link is refused (`ELOOP` or `ENOTDIR`) unless `follow`.
    pub fn open(parent: &Arc<Self>, name: &[u8], follow: bool) -> Result<(Arc<Self>, Meta), Errno> {
        let fd = open_directory(parent.fd()?.as_fd(), name, follow)?;
        Self::wrap(Some(parent.clone()), name, follow, fd, &parent.pool)
    }

    fn wrap(
        parent: Option<Arc<Self>>,
        name: &[u8],
        follow: bool,
        fd: OwnedFd,
        pool: &Arc<DirPool>,
    ) -> Result<(Arc<Self>, Meta), Errno> {
        let meta = stat_fd(fd.as_fd())?;
        let dir = Arc::new(Self {
            parent,
            name: name.into(),
            follow,
            device: meta.device,
            inode: meta.inode,
            fd: Mutex::new(Some(Arc::new(fd))),
            pool: pool.clone(),
        });
        pool.register(&dir);
        Ok((dir, meta))
    }

    /// The descriptor, opened again if it was closed. `ESTALE` if the directory is not the same any more.
    pub fn fd(self: &Arc<Self>) -> Result<Arc<OwnedFd>, Errno> {
        if let Some(fd) = self.fd.lock().clone() {
            return Ok(fd);
        }
        let mut closed = vec![self];
        let mut above = self.parent.as_ref();
        let mut fd = None;
        while let Some(dir) = above {
            fd.clone_from(&dir.fd.lock());
            if fd.is_some() {
                break;
            }
            closed.push(dir);
            above = dir.parent.as_ref();
        }
        // Going back up, the directories just above are wanted next: keep those open.
        let keep = (self.pool.limit / 4).max(1);
        for (left, dir) in closed.into_iter().enumerate().rev() {
            let opened = match &fd {
                Some(parent) => open_directory(parent.as_fd(), &dir.name, dir.follow)?,
                None => open_directory(CWD, &dir.name, dir.follow)?,
            };
            let meta = stat_fd(opened.as_fd())?;
            if (meta.device, meta.inode) != (dir.device, dir.inode) {
                return Err(Errno::STALE);
            }
            let opened = Arc::new(opened);
            if left < keep {
                *dir.fd.lock() = Some(opened.clone());
                self.pool.register(dir);
            }
            fd = Some(opened);
        }
        fd.ok_or(Errno::STALE)
    }

    /// Device number of the file system that the directory is on.
    pub fn device(&self) -> u64 {
        self.device
    }

    /// The full path of `name` in this directory, for people; it may be longer than any system call would take.
    pub fn path_of(&self, name: &[u8]) -> Vec<u8> {
        let mut names: Vec<&[u8]> = vec![name];
        let mut dir = Some(self);
        while let Some(this) = dir {
            if this.parent.is_some() {
                names.push(&this.name);
            }
            dir = this.parent.as_deref();
        }
        let mut path = Vec::with_capacity(names.iter().map(|name| name.len() + 1).sum());
        for name in names.into_iter().rev() {
            path.push(b'/');
            path.extend_from_slice(name);
        }
        path
    }
}

impl Drop for Dir {
    // A chain of parents as long as the tree is deep must not be dropped recursively.
    fn drop(&mut self) {
        let mut next = self.parent.take();
        while let Some(mut dir) = next.and_then(Arc::into_inner) {
            next = dir.parent.take();
        }
    }
}

fn open_directory(parent: BorrowedFd<'_>, name: &[u8], follow: bool) -> Result<OwnedFd, Errno> {
    let mut flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    if !follow {
        flags |= OFlags::NOFOLLOW;
    }
    open_quietly(parent, name, flags)
}

/// Opens without moving the access time where that is allowed (the owner and root may ask for it).
pub fn open_quietly(parent: BorrowedFd<'_>, name: &[u8], flags: OFlags) -> Result<OwnedFd, Errno> {
    match rustix::fs::openat(parent, name, flags | OFlags::NOATIME, Mode::empty()) {
        Err(Errno::PERM) => rustix::fs::openat(parent, name, flags, Mode::empty()),
        result => result,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::ffi::OsStrExt;

    use super::*;

    fn descend(pool: &Arc<DirPool>, path: &std::path::Path) -> Arc<Dir> {
        let mut dir = Dir::root(pool).unwrap().0;
        for part in path.components().skip(1) {
            dir = Dir::open(&dir, part.as_os_str().as_bytes(), false).unwrap().0;
        }
        dir
    }

    #[test]
    fn a_closed_directory_is_opened_again_and_a_replaced_one_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let deep = temp.path().join("a/b/c");
        std::fs::create_dir_all(&deep).unwrap();
        let pool = DirPool::new(8);
        let dir = descend(&pool, &deep);
        for _ in 0..20 {
            descend(&pool, temp.path());
        }
        assert!(dir.fd.lock().is_none());
        dir.fd().unwrap();
        assert_eq!(dir.path_of(b"x"), deep.join("x").as_os_str().as_bytes());
        *dir.fd.lock() = None;
        std::fs::rename(&deep, temp.path().join("other")).unwrap();
        std::fs::create_dir(&deep).unwrap();
        assert_eq!(dir.fd().unwrap_err(), Errno::STALE);
    }

    #[test]
    fn s38_a_directory_replaced_by_a_symlink_is_not_followed() {
        let temp = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc", temp.path().join("link")).unwrap();
        let dir = descend(&DirPool::new(8), temp.path());
        assert!(Dir::open(&dir, b"link", false).is_err());
        assert!(Dir::open(&dir, b"link", true).is_ok());
    }
}
