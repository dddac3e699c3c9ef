//! Attributes: owner, extended attributes and ACLs, mode, modification time, in that order.
//!
//! The order matters: changing the owner clears set-id bits and file capabilities, and the mode's group bits are the mask
//! of an ACL. A set-id bit is not given to a file whose owner could not be set.

use std::collections::HashMap;
use std::fs;
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::{AtFlags, Gid, Mode, Timespec, Timestamps, UTIME_OMIT, Uid, XattrFlags};
use rustix::io::Errno;
use strandline_messages::format::tree::{EntryNode, Owner, Timestamp, Xattr};

use super::report::{Issues, count};
use crate::trees::DirEntry;

const SET_ID_BITS: u32 = 0o6000;
/// The kernel's limit for the list of names.
const XATTR_NAMES_BYTES_MAX: usize = 65_536;

/// What an entry will look like.
#[derive(Clone, Debug)]
pub(super) struct Meta {
    /// Path in the snapshot, for messages.
    pub(super) path: Vec<u8>,
    pub(super) name: Vec<u8>,
    pub(super) mtime: Timestamp,
    mode: u16,
    owner: Owner,
    xattrs: Vec<Xattr>,
    is_symlink: bool,
}

impl Meta {
    pub(super) fn new(path: Vec<u8>, entry: &DirEntry) -> Self {
        let owner = entry.owner();
        let entry = &entry.entry;
        Self {
            path,
            name: entry.name.clone(),
            mtime: entry.mtime,
            mode: entry.mode,
            owner,
            xattrs: entry.xattrs.clone(),
            is_symlink: matches!(entry.node, EntryNode::Symlink { .. }),
        }
    }

    fn times(&self) -> Timestamps {
        Timestamps {
            last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
            last_modification: Timespec { tv_sec: self.mtime.seconds, tv_nsec: self.mtime.nanos.into() },
        }
    }

    fn mode_bits(&self, owned: bool) -> Mode {
        let mode = u32::from(self.mode);
        Mode::from_raw_mode(if owned { mode } else { mode & !SET_ID_BITS })
    }
}

/// Sets attributes as far as this process may.
pub(super) struct Attributes {
    privileged: bool,
    uid: u32,
    gid: u32,
    users: HashMap<Vec<u8>, u32>,
    groups: HashMap<Vec<u8>, u32>,
}

impl Attributes {
    pub(super) fn new(owners_by_name: bool) -> Self {
        let names = |file| if owners_by_name { names_of(&fs::read(file).unwrap_or_default()) } else { HashMap::new() };
        let uid = rustix::process::geteuid();
        Self {
            privileged: uid.is_root(),
            uid: uid.as_raw(),
            gid: rustix::process::getegid().as_raw(),
            users: names("/etc/passwd"),
            groups: names("/etc/group"),
        }
    }

    /// With what permissions a file should be made so that it needs no change when it is complete: its own, if whoever
    /// makes it is its owner and the directory gives it nothing else (`inherits`), else those of a file under way. Always
    /// writable: several threads open it by name.
    pub(super) fn mode_while_written(&self, meta: &Meta, inherits: bool) -> Mode {
        let plain = self.numbers(meta) == (self.uid, self.gid) && meta.xattrs.is_empty() && !inherits;
        let shared = if plain { u32::from(meta.mode) & 0o077 } else { 0 };
        Mode::RUSR | Mode::WUSR | Mode::from_raw_mode(shared)
    }

    /// For files and directories that are open (not by O_PATH). Sets only what differs: each change costs the file system
    /// an entry in its journal.
    pub(super) fn apply_to_open(&self, handle: &impl AsFd, meta: &Meta, issues: &Issues) {
        let found = rustix::fs::fstat(handle).ok();
        let owner = found.as_ref().map(|found| (found.st_uid, found.st_gid));
        let owned = self.owner(meta, issues, owner, |uid, gid| rustix::fs::fchown(handle, uid, Some(gid)));
        self.xattrs(meta, issues, |xattr| {
            rustix::fs::fsetxattr(handle, xattr.name.as_slice(), &xattr.value, XattrFlags::empty())
        });
        let mode = meta.mode_bits(owned);
        // A change of owner may take set-id bits away, and an ACL changes the permissions.
        let has_it = found.is_some_and(|found| found.st_mode & 0o7777 == mode.as_raw_mode());
        if !has_it || !meta.xattrs.is_empty() || mode.as_raw_mode() & SET_ID_BITS != 0 {
            report(meta, issues, "mode", rustix::fs::fchmod(handle, mode));
        }
        report(meta, issues, "time", rustix::fs::futimens(handle, &meta.times()));
    }

    /// What is made in a new directory should get nothing from it: neither its group nor its default ACL. The directory's
    /// own attributes are set when it is complete. Not every file system lets itself be told; whether this one did.
    pub(super) fn give_nothing_on(&self, directory: &impl AsFd) -> bool {
        let acls = ["system.posix_acl_default", "system.posix_acl_access"].map(|acl| {
            matches!(rustix::fs::fremovexattr(directory, acl), Ok(()) | Err(Errno::NODATA | Errno::OPNOTSUPP))
        });
        let Ok(found) = rustix::fs::fstat(directory) else { return false };
        let group = Gid::from_raw(self.gid);
        let owned = found.st_gid == self.gid || rustix::fs::fchown(directory, None, Some(group)).is_ok();
        let is_private = found.st_mode & 0o7777 == Mode::RWXU.as_raw_mode();
        acls == [true; 2] && owned && (is_private || rustix::fs::fchmod(directory, Mode::RWXU).is_ok())
    }

    /// Removes what a file has from somewhere else and the snapshot does not: it might give somebody access. What the
    /// system guards by itself (labels of security modules) stays.
    pub(super) fn remove_others(handle: &impl AsFd, meta: &Meta, issues: &Issues) {
        let mut buffer = vec![0; XATTR_NAMES_BYTES_MAX];
        // A file system without extended attributes has none.
        let Ok(listed) = rustix::fs::flistxattr(handle, buffer.as_mut_slice()) else { return };
        let names = buffer.get(..listed).unwrap_or_default().split(|byte| *byte == 0);
        let removable = [&b"user."[..], b"trusted.", b"system.posix_acl_", b"security.capability"];
        for name in names.filter(|name| removable.iter().any(|prefix| name.starts_with(prefix))) {
            if meta.xattrs.iter().all(|xattr| xattr.name != name)
                && let Err(error) = rustix::fs::fremovexattr(handle, name)
                && error != Errno::NODATA
            {
                let name = String::from_utf8_lossy(name);
                issues.add_flaw(&meta.path, format!("its attribute {name} cannot be removed: {error}"));
            }
        }
    }

    /// For links, pipes, sockets and devices: `name` in `directory`, never followed.
    pub(super) fn apply_to_name(&self, directory: &impl AsFd, name: &[u8], meta: &Meta, issues: &Issues) {
        let owned = self.owner(meta, issues, None, |uid, gid| {
            rustix::fs::chownat(directory, name, uid, Some(gid), AtFlags::SYMLINK_NOFOLLOW)
        });
        if !meta.xattrs.is_empty() {
            // There is no call for an attribute of a name in a directory; /proc leads to it without following the name.
            let mut path = format!("/proc/self/fd/{}/", directory.as_fd().as_raw_fd()).into_bytes();
            path.extend_from_slice(name);
            self.xattrs(meta, issues, |xattr| {
                rustix::fs::lsetxattr(path.as_slice(), xattr.name.as_slice(), &xattr.value, XattrFlags::empty())
            });
        }
        if !meta.is_symlink {
            let mode = rustix::fs::chmodat(directory, name, meta.mode_bits(owned), AtFlags::empty());
            report(meta, issues, "mode", mode);
        }
        let times = rustix::fs::utimensat(directory, name, &meta.times(), AtFlags::SYMLINK_NOFOLLOW);
        report(meta, issues, "time", times);
    }

    /// User and group as this machine numbers them.
    fn numbers(&self, meta: &Meta) -> (u32, u32) {
        let uid = self.users.get(&meta.owner.user).copied().unwrap_or(meta.owner.uid);
        (uid, self.groups.get(&meta.owner.group).copied().unwrap_or(meta.owner.gid))
    }

    /// Whether the owner is as it should be afterwards; `found`: user and group now, if known.
    fn owner(
        &self,
        meta: &Meta,
        issues: &Issues,
        found: Option<(u32, u32)>,
        set: impl FnOnce(Option<Uid>, Gid) -> Result<(), Errno>,
    ) -> bool {
        let (uid, gid) = self.numbers(meta);
        if !self.privileged {
            // The group may be another than ours: that of the directory, or what somebody made it. We may take it back.
            let ours = (uid, gid) == (self.uid, self.gid);
            let owned = ours && (found == Some((uid, gid)) || set(None, Gid::from_raw(gid)).is_ok());
            if !owned {
                count(&issues.progress.owners_skipped);
            }
            return owned;
        }
        // The numbers with all bits set mean "do not change" to the system.
        if uid == u32::MAX || gid == u32::MAX {
            issues.add_flaw(&meta.path, "its owner is not a legal number".into());
            return false;
        }
        if found == Some((uid, gid)) {
            return true;
        }
        match set(Some(Uid::from_raw(uid)), Gid::from_raw(gid)) {
            Ok(()) => true,
            Err(Errno::PERM) => {
                count(&issues.progress.owners_skipped);
                false
            }
            Err(error) => {
                issues.add_flaw(&meta.path, format!("its owner cannot be set: {error}"));
                false
            }
        }
    }

    fn xattrs(&self, meta: &Meta, issues: &Issues, set: impl Fn(&Xattr) -> Result<(), Errno>) {
        for xattr in &meta.xattrs {
            let system = !xattr.name.starts_with(b"user.") && !xattr.name.starts_with(b"system.posix_acl_");
            match set(xattr) {
                Ok(()) => {}
                Err(Errno::PERM | Errno::ACCESS) if system && !self.privileged => {
                    count(&issues.progress.attributes_skipped);
                }
                Err(Errno::OPNOTSUPP) if system => count(&issues.progress.attributes_skipped),
                Err(error) => {
                    let name = String::from_utf8_lossy(&xattr.name);
                    issues.add_flaw(&meta.path, format!("its attribute {name} cannot be set: {error}"));
                }
            }
        }
    }
}

fn report(meta: &Meta, issues: &Issues, what: &str, result: Result<(), Errno>) {
    if let Err(error) = result {
        issues.add_flaw(&meta.path, format!("its {what} cannot be set: {error}"));
    }
}

/// Names and numbers of `/etc/passwd` or `/etc/group`.
fn names_of(file: &[u8]) -> HashMap<Vec<u8>, u32> {
    let line = |line: &[u8]| {
        let mut fields = line.split(|byte| *byte == b':');
        let name = fields.next().filter(|name| !name.is_empty())?.to_vec();
        let number = std::str::from_utf8(fields.nth(1)?).ok()?.parse().ok()?;
        Some((name, number))
    };
    file.split(|byte| *byte == b'\n').filter_map(line).collect()
}
