//! To whom what is restored belongs, and who may read it.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use strandline_messages::format::tree::{EntryNode, Xattr};

use super::attributes::Attributes;
use super::tests::Case;
use crate::trees::memory::{DirMaker, MemoryRepository};

#[test]
fn owners_go_by_number_unless_names_are_asked_for() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not shown on this machine: only root gives files away");
        return;
    }
    let repo = MemoryRepository::new();
    let mut root = DirMaker::default();
    let known = root.owner(4001, 4001, "root", "root");
    root.inline(b"known", b"").owner = known;
    let unknown = root.owner(4001, 4002, "nobody-here", "nobody-here");
    root.inline(b"unknown", b"").owner = unknown;
    let mut case = Case::new(repo, root);
    let owner = |case: &Case, name: &str| {
        let stat = fs::metadata(case.path(name)).unwrap();
        (stat.uid(), stat.gid())
    };
    case.run_clean();
    assert_eq!(owner(&case, "known"), (4001, 4001));
    case.options.owners_by_name = true;
    case.run_clean();
    assert_eq!(owner(&case, "known"), (0, 0));
    assert_eq!(owner(&case, "unknown"), (4001, 4002));
}

#[test]
fn without_privilege_owners_are_skipped_and_set_id_bits_are_not_given_away() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not shown on this machine: needs root to become somebody else");
        return;
    }
    let repo = MemoryRepository::new();
    let mut root = DirMaker::default();
    let foreign = root.owner(4001, 4001, "", "");
    let entry = root.inline(b"foreign", b"");
    (entry.owner, entry.mode) = (foreign, 0o6755);
    entry.xattrs = vec![Xattr { name: b"trusted.x".to_vec(), value: b"x".to_vec() }];
    let own = root.owner(65_534, 65_534, "", "");
    let entry = root.inline(b"own", b"");
    (entry.owner, entry.mode) = (own, 0o4755);
    root.add(b"device", EntryNode::CharDevice { major: 1, minor: 3 });
    let case = Case::new(repo, root);
    std::os::unix::fs::chown(case.target.path(), Some(65_534), Some(65_534)).unwrap();
    let report = as_nobody(|| case.run());
    let mode = |name: &str| fs::metadata(case.path(name)).unwrap().mode() & 0o7777;
    assert_eq!((mode("foreign"), mode("own")), (0o755, 0o4755));
    assert_eq!((report.owners_skipped, report.attributes_skipped, report.issues_total), (1, 1, 1));
    assert_eq!(report.issues[0].path, b"device");
}

#[test]
fn the_group_of_a_directory_is_not_that_of_what_is_restored_into_it() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not shown on this machine: needs root to become somebody else");
        return;
    }
    let mut repo = MemoryRepository::new();
    let mut dir = DirMaker::default();
    let own = dir.owner(65_534, 65_534, "", "");
    let entry = dir.inline(b"file", b"for the group");
    (entry.owner, entry.mode) = (own, 0o2640);
    let dir = dir.finish(&mut repo);
    let mut root = DirMaker::default();
    let own = root.owner(65_534, 65_534, "", "");
    let entry = root.directory(b"dir", dir);
    (entry.owner, entry.mode) = (own, 0o750);
    let entry = root.inline(b"file", b"for the group");
    (entry.owner, entry.mode) = (own, 0o640);
    let entry = root.add(b"link", EntryNode::Symlink { target: b"file".to_vec() });
    entry.owner = own;
    let case = Case::new(repo, root);
    std::os::unix::fs::chown(case.target.path(), Some(65_534), Some(4001)).unwrap();
    fs::set_permissions(case.target.path(), fs::Permissions::from_mode(0o2770)).unwrap();
    as_nobody(|| case.run_clean());
    for (path, mode) in [("dir", 0o750), ("dir/file", 0o2640), ("file", 0o640), ("link", 0o777)] {
        let found = fs::symlink_metadata(case.path(path)).unwrap();
        assert_eq!((found.gid(), found.mode() & 0o7777), (65_534, mode), "{path}");
    }
    // What somebody gave to another group later.
    std::os::unix::fs::chown(case.path("file"), None, Some(4001)).unwrap();
    as_nobody(|| case.run_clean());
    assert_eq!(fs::metadata(case.path("file")).unwrap().gid(), 65_534);
}

#[test]
fn what_a_directory_grants_by_default_is_not_granted_to_what_is_restored_into_it() {
    let mut repo = MemoryRepository::new();
    let mut dir = DirMaker::default();
    dir.inline(b"inline", b"secret");
    dir.file(&mut repo, b"file", b"secret", 2);
    let dir = dir.finish(&mut repo);
    let mut root = DirMaker::default();
    root.directory(b"dir", dir);
    root.file(&mut repo, b"file", b"secret", 2);
    let case = Case::new(repo, root);
    // Tag, permissions, id: owner, user 4001, group, mask, others.
    let entries: [(u16, u16, u32); 5] = [(1, 7, !0), (2, 7, 4001), (4, 5, !0), (16, 7, !0), (32, 0, !0)];
    let mut acl = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        acl.extend([tag.to_le_bytes(), permissions.to_le_bytes()].concat());
        acl.extend(id.to_le_bytes());
    }
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(case.target.path(), "system.posix_acl_default", &acl, flags).unwrap();
    case.run_clean();
    for path in ["dir", "dir/inline", "dir/file", "file"] {
        for name in ["system.posix_acl_access", "system.posix_acl_default"] {
            let found = rustix::fs::getxattr(case.path(path), name, vec![0u8; 256].as_mut_slice());
            assert!(found.is_err(), "{path} has {name}");
        }
    }
}

#[test]
fn a_directory_that_goes_on_giving_is_known_as_such() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not shown on this machine: needs root to become somebody else");
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let handle = fs::File::open(directory.path()).unwrap();
    // Of root: like a file system that gives all files the same group, it does not let itself be told.
    assert!(as_nobody(|| !Attributes::new(false).give_nothing_on(&handle)));
    fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o2770)).unwrap();
    assert!(Attributes::new(false).give_nothing_on(&handle));
    assert_eq!(fs::metadata(directory.path()).unwrap().mode() & 0o7777, 0o700);
}

/// Runs in a thread that is `nobody`: what it starts is, too.
fn as_nobody<T: Send>(run: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let running = scope.spawn(|| {
            let (uid, gid) = (rustix::thread::Uid::from_raw(65_534), rustix::thread::Gid::from_raw(65_534));
            rustix::thread::set_thread_res_gid(gid, gid, gid).unwrap();
            rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
            run()
        });
        running.join().unwrap()
    })
}
