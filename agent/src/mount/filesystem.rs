//! The kernel's requests, answered by the service. Thin on purpose: numbers and handles in, replies out.
//!
//! `fuser` calls this from a fixed number of threads; a request that waits for the network holds up its own thread only.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fuser::{
    AccessFlags, Errno, FileHandle, Filesystem, FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig,
    LockOwner, OpenAccMode, OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyDirectoryPlus, ReplyEmpty,
    ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyXattr, Request,
};
use parking_lot::Mutex;

use super::item::{Body, Item};
use super::node::Node;
use super::patience::Patience;
use super::read_ahead::OpenFile;
use super::service::{Listed, OpenDirectory, Service};

/// Requests for reading ahead that the kernel may have under way.
const BACKGROUND_MAX: u16 = 32;
const BLOCK_BYTES: u32 = 4096;
const NAME_BYTES_MAX: u32 = 255;
const SEEK_DATA: i32 = 3;
const SEEK_HOLE: i32 = 4;

/// See the module. Handles: one for each open file or directory of the kernel's.
pub(super) struct StrandFilesystem {
    service: Service,
    patience: Arc<Patience>,
    /// The kernel checks permissions, access control lists among them.
    permissions: bool,
    files: Handles<OpenFile>,
    directories: Handles<OpenDirectory>,
}

struct Handles<T> {
    last: AtomicU64,
    open: Mutex<HashMap<u64, Arc<T>>>,
}

impl<T> Default for Handles<T> {
    fn default() -> Self {
        Self { last: AtomicU64::new(0), open: Mutex::default() }
    }
}

impl<T> Handles<T> {
    fn add(&self, value: T) -> FileHandle {
        let handle = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        self.open.lock().insert(handle, Arc::new(value));
        FileHandle(handle)
    }

    fn get(&self, handle: FileHandle) -> Result<Arc<T>, Errno> {
        self.open.lock().get(&handle.0).cloned().ok_or(Errno::EBADF)
    }

    fn remove(&self, handle: FileHandle) {
        self.open.lock().remove(&handle.0);
    }
}

impl StrandFilesystem {
    pub(super) fn new(service: Service, patience: Arc<Patience>, permissions: bool) -> Self {
        Self { service, patience, permissions, files: Handles::default(), directories: Handles::default() }
    }

    fn item(&self, number: INodeNo) -> Result<Option<Arc<Item>>, Errno> {
        match self.service.node(number.0)? {
            Node::Item { item, .. } => Ok(Some(item)),
            Node::Place(_) | Node::Latest { .. } => Ok(None),
        }
    }

    fn seek(&self, number: INodeNo, offset: i64, whence: i32) -> Result<i64, Errno> {
        let item = self.item(number)?.ok_or(Errno::EINVAL)?;
        let Body::File { extents, .. } = &item.body else { return Err(Errno::EINVAL) };
        let offset = u64::try_from(offset).map_err(|_| Errno::ENXIO)?;
        let found = match whence {
            SEEK_DATA => extents.next_data(offset),
            SEEK_HOLE => extents.next_hole(offset),
            _ => return Err(Errno::EINVAL),
        };
        found.and_then(|found| i64::try_from(found).ok()).ok_or(Errno::ENXIO)
    }

    fn readlink_of(&self, number: INodeNo) -> Result<Vec<u8>, Errno> {
        match self.service.node(number.0)? {
            Node::Latest { target, .. } => Ok(target.to_vec()),
            Node::Item { item, .. } => match &item.body {
                Body::Symlink { target } => Ok(target.to_vec()),
                _ => Err(Errno::EINVAL),
            },
            Node::Place(_) => Err(Errno::EINVAL),
        }
    }
}

/// Answers a request for extended attributes: the length if there is no room, or the bytes.
fn reply_xattr(reply: ReplyXattr, room: u32, value: Result<&[u8], Errno>) {
    match value {
        Err(error) => reply.error(error),
        Ok(value) => match u32::try_from(value.len()) {
            Ok(length) if room == 0 => reply.size(length),
            Ok(length) if length <= room => reply.data(value),
            _ => reply.error(Errno::ERANGE),
        },
    }
}

/// How long a name may be used without asking: the names of a snapshot never change.
fn name_valid_for(parent: &Node) -> Duration {
    parent.valid_for()
}

impl Filesystem for StrandFilesystem {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let mut wanted =
            vec![InitFlags::FUSE_PARALLEL_DIROPS, InitFlags::FUSE_DO_READDIRPLUS, InitFlags::FUSE_READDIRPLUS_AUTO];
        if self.permissions {
            wanted.push(InitFlags::FUSE_POSIX_ACL);
        }
        for capability in wanted {
            // An older kernel works without, more slowly.
            let _ = config.add_capabilities(capability);
        }
        // Anything but 0 is accepted.
        let _ = config.set_max_background(BACKGROUND_MAX);
        Ok(())
    }

    fn destroy(&mut self) {
        // What is being fetched ahead is of no use any more.
        self.patience.close();
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let found = self.service.node(parent.0).and_then(|above| {
            let (number, node) = self.service.lookup(parent.0, name.as_bytes())?;
            Ok((above, number, node))
        });
        match found {
            Ok((above, number, node)) => {
                let attributes = node.attributes(number, self.service.mounted);
                reply.entry_with_ttls(&node.valid_for(), &name_valid_for(&above), &attributes, Generation(0));
            }
            Err(error) => reply.error(error),
        }
    }

    fn forget(&self, _: &Request, number: INodeNo, lookups: u64) {
        self.service.inodes.forget(number.0, lookups);
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match self.service.node(number.0) {
            Ok(node) => reply.attr(&node.valid_for(), &node.attributes(number.0, self.service.mounted)),
            Err(error) => reply.error(error),
        }
    }

    fn readlink(&self, _: &Request, number: INodeNo, reply: ReplyData) {
        match self.readlink_of(number) {
            Ok(target) => reply.data(&target),
            Err(error) => reply.error(error),
        }
    }

    fn open(&self, _: &Request, number: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if flags.acc_mode() != OpenAccMode::O_RDONLY {
            return reply.error(Errno::EROFS);
        }
        match self.service.open_file(number.0) {
            // Content never changes: what the kernel has cached stays good.
            Ok(file) => {
                reply.opened(self.files.add(file), FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH);
            }
            Err(error) => reply.error(error),
        }
    }

    fn read(
        &self,
        _: &Request,
        number: INodeNo,
        handle: FileHandle,
        offset: u64,
        bytes: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let read = self.files.get(handle).and_then(|file| self.service.read(number.0, &file, offset, bytes.into()));
        match read {
            Ok(bytes) => reply.data(&bytes),
            Err(error) => reply.error(error),
        }
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.ok();
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.files.remove(handle);
        reply.ok();
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.ok();
    }

    fn lseek(&self, _: &Request, number: INodeNo, _: FileHandle, offset: i64, whence: i32, reply: ReplyLseek) {
        match self.seek(number, offset, whence) {
            Ok(offset) => reply.offset(offset),
            Err(error) => reply.error(error),
        }
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        reply.error(Errno::ENOTTY);
    }

    fn opendir(&self, _: &Request, number: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match self.service.open_directory(number.0) {
            Ok(directory) => reply.opened(self.directories.add(directory), FopenFlags::empty()),
            Err(error) => reply.error(error),
        }
    }

    fn readdir(&self, _: &Request, number: INodeNo, handle: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let mut sink = |listed: Listed<'_>| {
            let child = self.service.number(number.0, &listed);
            !reply.add(INodeNo(child), listed.next, listed.kind, OsStr::from_bytes(listed.name))
        };
        let open = self.directories.get(handle);
        match open.and_then(|open| self.service.list(number.0, &open, offset, &mut sink)) {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }

    fn readdirplus(
        &self,
        _: &Request,
        number: INodeNo,
        handle: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let listed = self.directories.get(handle).and_then(|open| {
            let valid = name_valid_for(&self.service.node(number.0)?);
            let mut sink = |listed: Listed<'_>| {
                // Known before the kernel is told, so that it can ask at once.
                let Ok((child, node)) = self.service.remember(number.0, &listed) else { return true };
                let attributes = node.attributes(child, self.service.mounted);
                let name = OsStr::from_bytes(listed.name);
                let full = reply.add(INodeNo(child), listed.next, name, &valid, &attributes, Generation(0));
                if full {
                    self.service.take_back(&listed, child);
                }
                !full
            };
            self.service.list(number.0, &open, offset, &mut sink)
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(error),
        }
    }

    fn releasedir(&self, _: &Request, _: INodeNo, handle: FileHandle, _: OpenFlags, reply: ReplyEmpty) {
        self.directories.remove(handle);
        reply.ok();
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        // How much room a repository takes, or has, is not the business of a snapshot.
        reply.statfs(0, 0, 0, 0, 0, BLOCK_BYTES, NAME_BYTES_MAX, BLOCK_BYTES);
    }

    fn getxattr(&self, _: &Request, number: INodeNo, name: &OsStr, room: u32, reply: ReplyXattr) {
        match self.item(number) {
            Err(error) => reply.error(error),
            Ok(item) => {
                let xattrs = item.iter().flat_map(|item| item.xattrs.iter());
                let found = xattrs.into_iter().find(|xattr| xattr.name == name.as_bytes());
                reply_xattr(reply, room, found.map(|xattr| xattr.value.as_slice()).ok_or(Errno::ENODATA));
            }
        }
    }

    fn listxattr(&self, _: &Request, number: INodeNo, room: u32, reply: ReplyXattr) {
        match self.item(number) {
            Err(error) => reply.error(error),
            Ok(item) => {
                let xattrs = item.iter().flat_map(|item| item.xattrs.iter());
                let names: Vec<u8> = xattrs.flat_map(|xattr| xattr.name.iter().copied().chain([0])).collect();
                reply_xattr(reply, room, Ok(&names));
            }
        }
    }

    fn access(&self, _: &Request, number: INodeNo, wanted: AccessFlags, reply: ReplyEmpty) {
        match self.service.node(number.0) {
            Err(error) => reply.error(error),
            Ok(_) if wanted.contains(AccessFlags::W_OK) => reply.error(Errno::EROFS),
            Ok(_) => reply.ok(),
        }
    }
}
