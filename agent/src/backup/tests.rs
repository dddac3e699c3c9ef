//! The pipeline against a server in memory: what is saved, and what is not read or sent again.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::Ordering;

use rustix::fs::{CWD, FileType, Mode, OFlags, makedev, mknodat};
use strandline_messages::format::repository::ChunkingV1;
use strandline_messages::format::tree::{Content, EntryNode};

use super::memory_server::{Rig, noise};
use super::{BackupError, CacheTrust};

#[test]
fn everything_in_a_source_is_saved_as_it_is() {
    let rig = Rig::new();
    rig.write("empty", b"");
    rig.write("small", b"inline");
    rig.write("one-chunk", &noise(1, 9000));
    rig.write("dir/big", &noise(2, 5 << 20));
    rig.write("dir/zeros", &vec![0; 3 << 20]);
    rig.write("dir/sub/x", b"x");
    std::fs::create_dir(rig.path("dir/none")).unwrap();
    std::fs::set_permissions(rig.path("small"), PermissionsExt::from_mode(0o4751)).unwrap();
    symlink("dir/nowhere", rig.path("link")).unwrap();
    std::fs::hard_link(rig.path("dir/big"), rig.path("hard")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(rig.path("socket")).unwrap();
    let node = |name: &str, file_type, device| mknodat(CWD, rig.path(name), file_type, Mode::from(0o640), device);
    node("fifo", FileType::Fifo, 0).unwrap();
    for (name, file_type) in [("char", FileType::CharacterDevice), ("block", FileType::BlockDevice)] {
        if node(name, file_type, makedev(7, 300)).is_err() {
            println!("no permission to make a device node: {name} is not covered");
        }
    }
    for name in ["small", "dir", "dir/big", "empty"] {
        if xattr::set(rig.path(name), "user.colour", b"\0blue\xff").is_err() {
            println!("the file system has no extended attributes: not covered");
        }
    }
    // version 2; user rw-, user 1000 r--, group r--, mask r--, other ---
    let acl: Vec<u8> = [(1u16, 6u16, u32::MAX), (2, 4, 1000), (4, 4, u32::MAX), (16, 4, u32::MAX), (32, 0, u32::MAX)]
        .iter()
        .fold(2u32.to_le_bytes().to_vec(), |mut acl, (tag, permissions, id)| {
            acl.extend(tag.to_le_bytes());
            acl.extend(permissions.to_le_bytes());
            acl.extend(id.to_le_bytes());
            acl
        });
    match xattr::set(rig.path("one-chunk"), "system.posix_acl_access", &acl) {
        Ok(()) => assert!(xattr::get(rig.path("one-chunk"), "system.posix_acl_access").unwrap().is_some()),
        Err(error) => println!("the file system has no ACLs: not covered ({error})"),
    }
    let run = rig.run(CacheTrust::Trust);
    run.assert_equals(rig.source.path());
    assert!(run.errors.is_empty(), "{:?}", run.errors);
    let totals = run.outcome.totals;
    assert_eq!((totals.files, totals.errors), (7, 0));
    assert!(totals.bytes > 13 << 20 && totals.bytes_stored > 5 << 20);
    assert_eq!(run.now.files_opened, 5, "the empty file and the second link need not be opened");
    assert_eq!(run.at(&rig.path("small")).owner.user, run.at(rig.source.path()).owner.user);
}

#[test]
fn an_unchanged_second_run_opens_no_file_and_sends_no_data() {
    let rig = Rig::new();
    for i in 0..700 {
        rig.write(&format!("d{}/file{i}", i % 7), &noise(i, usize::try_from(i * 37).unwrap()));
    }
    rig.write("big", &noise(1000, 3 << 20));
    symlink("big", rig.path("link")).unwrap();
    let first = rig.run(CacheTrust::Trust);
    first.assert_equals(rig.source.path());
    assert!(first.now.files_opened > 600);
    let second = rig.run(CacheTrust::Trust);
    second.assert_equals(rig.source.path());
    assert_eq!((second.now.files_opened, second.now.bytes_read), (0, 0));
    assert_eq!(second.now.files_unchanged, second.now.files);
    // Only the nodes above the source may differ: others use its parent directory too.
    assert!(second.now.chunks_new <= 2, "{:?}", second.now);
    let ignoring = rig.run(CacheTrust::Ignore);
    assert_eq!(ignoring.now.files_opened, first.now.files_opened);
    assert!(ignoring.now.chunks_new <= 2);
}

#[test]
fn only_what_changed_is_read_again() {
    let rig = Rig::new();
    for name in ["a/1", "a/2", "b/1", "b/2", "c"] {
        rig.write(name, &noise(name.len() as u64, 2000));
    }
    rig.run(CacheTrust::Trust);
    rig.write("b/1", &noise(77, 2000));
    rig.write("b/new", &noise(78, 2000));
    std::fs::remove_file(rig.path("a/1")).unwrap();
    std::fs::rename(rig.path("c"), rig.path("d")).unwrap();
    let run = rig.run(CacheTrust::Trust);
    run.assert_equals(rig.source.path());
    assert_eq!((run.now.files_opened, run.now.files_unchanged), (3, 2), "{:?}", run.now);
}

#[test]
fn a_damaged_cache_costs_reading_but_nothing_else() {
    let rig = Rig::new();
    rig.write("a", &noise(1, 3000));
    rig.run(CacheTrust::Trust);
    let mut cache = std::fs::read(rig.cache_path()).unwrap();
    let middle = cache.len() / 2;
    cache[middle] ^= 4;
    std::fs::write(rig.cache_path(), &cache).unwrap();
    let run = rig.run(CacheTrust::Trust);
    run.assert_equals(rig.source.path());
    assert_eq!(run.now.files_opened, 1);
    assert_eq!(rig.run(CacheTrust::Trust).now.files_opened, 0);
}

#[test]
fn a_file_whose_chunks_the_server_lost_is_read_again_when_asked_to_verify() {
    let mut rig = Rig::new();
    rig.chunking = ChunkingV1 { minimum: 64, average: 256, maximum: 1024, block_plaintext: 64 << 10 };
    for i in 0..600 {
        rig.write(&format!("file{i:03}"), &noise(i, 1000));
    }
    rig.write("listed", &noise(5000, 2 << 20));
    let first = rig.run(CacheTrust::Trust);
    assert!(matches!(&first.at(&rig.path("listed")).entry.node, EntryNode::File { content: Content::List { .. }, .. }));
    first.assert_equals(rig.source.path());
    {
        let mut store = rig.server.0.lock();
        let lost = noise(7, 1000);
        store.chunks.retain(|_, chunk| !lost.starts_with(&chunk.plaintext) || chunk.plaintext.len() < 64);
    }
    let run = rig.run(CacheTrust::VerifyWithServer);
    run.assert_equals(rig.source.path());
    assert_eq!((run.now.files_opened, run.now.files_unchanged), (1, 600));
    assert!(run.now.chunks_new > 0);
}

#[test]
fn names_of_any_bytes_are_saved() {
    let rig = Rig::new();
    for name in [&b"\xff\xfe"[..], b"a\nb", b"\x01", &[b'x'; 255], b"-rf", b"~"] {
        let path = rig.source.path().join(OsStr::from_bytes(name));
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join(OsStr::from_bytes(name)), name).unwrap();
    }
    rig.run(CacheTrust::Trust).assert_equals(rig.source.path());
    assert_eq!(rig.run(CacheTrust::Trust).now.files_opened, 0);
}

#[test]
fn paths_longer_than_the_system_takes_are_saved() {
    let rig = Rig::new();
    let name = "n".repeat(40);
    let mut dir = rustix::fs::open(rig.source.path(), OFlags::DIRECTORY, Mode::empty()).unwrap();
    let depth = 700;
    for _ in 0..depth {
        rustix::fs::mkdirat(&dir, &name, Mode::RWXU).unwrap();
        dir = rustix::fs::openat(&dir, &name, OFlags::DIRECTORY, Mode::empty()).unwrap();
    }
    let file = rustix::fs::openat(&dir, "deep", OFlags::CREATE | OFlags::WRONLY, Mode::RUSR).unwrap();
    rustix::io::write(&file, &noise(3, 1000)).unwrap();
    drop(file);
    for trust in [CacheTrust::Ignore, CacheTrust::Trust] {
        let run = rig.run(trust);
        assert!(run.errors.is_empty(), "{:?}", run.errors.first().map(|error| &error.message));
        assert_eq!(run.now.files_opened, u64::from(trust == CacheTrust::Ignore));
        let (path, deep) = run.seen.iter().max_by_key(|(path, _)| path.len()).unwrap();
        assert!(path.len() > depth * 41 && path.ends_with(b"/deep"));
        assert_eq!(deep.bytes.as_deref(), Some(noise(3, 1000).as_slice()));
    }
}

#[test]
fn a_huge_directory_spills_and_is_complete() {
    let mut rig = Rig::new();
    rig.plan.names_in_memory = 100;
    for i in 0..3000 {
        rig.write(&format!("many/f{i}"), format!("{i}").as_bytes());
    }
    for i in 0..150 {
        rig.write(&format!("many/d{i}/x"), b"x");
    }
    let run = rig.run(CacheTrust::Trust);
    run.assert_equals(rig.source.path());
    assert_eq!((run.outcome.totals.files, run.now.estimated), (3150, run.now.estimated_files == 3150));
    assert_eq!(rig.run(CacheTrust::Trust).now.files_opened, 0);
}

#[test]
fn holes_are_not_read_and_come_back() {
    let rig = Rig::new();
    let file = std::fs::File::create(rig.path("sparse")).unwrap();
    file.write_all_at(&noise(1, 100_000), 8 << 20).unwrap();
    file.write_all_at(&noise(2, 5000), 40 << 20).unwrap();
    file.set_len(64 << 20).unwrap();
    drop(file);
    std::fs::File::create(rig.path("all-hole")).unwrap().set_len(1 << 30).unwrap();
    std::fs::remove_file(rig.path("all-hole")).unwrap();
    std::fs::File::create(rig.path("all-hole")).unwrap().set_len(3 << 20).unwrap();
    let run = rig.run(CacheTrust::Trust);
    run.assert_equals(rig.source.path());
    let EntryNode::File { holes, .. } = &run.at(&rig.path("sparse")).entry.node else { panic!("no file") };
    assert!(holes.len() >= 3, "{holes:?}");
    assert!(run.now.bytes_read < 1 << 20);
    let again = rig.run(CacheTrust::Trust);
    again.assert_equals(rig.source.path());
    assert_eq!(again.now.files_opened, 0);
}

#[test]
fn hardlinks_are_read_once_and_repeated_content_is_sent_once() {
    let mut rig = Rig::new();
    rig.plan.readers = 3;
    let content = noise(1, 4 << 20);
    rig.write("a", &content);
    for i in 0..20 {
        std::fs::hard_link(rig.path("a"), rig.path(&format!("l{i}"))).unwrap();
    }
    rig.write("copy", &content);
    let run = rig.run(CacheTrust::Trust);
    run.assert_equals(rig.source.path());
    assert_eq!(run.now.files_opened, 2);
    assert!(run.now.bytes_new < 5 << 20);
    assert_eq!(rig.run(CacheTrust::Trust).now.files_opened, 0);
}

#[test]
fn excluded_paths_and_the_own_state_are_left_out() {
    let mut rig = Rig::new();
    for name in ["keep", "drop.o", "cache/x", "repository/pack", "dir/drop.o", "dir/keep"] {
        rig.write(name, b"x");
    }
    rig.plan.excludes = vec!["*.o".into(), "cache/".into()];
    rig.plan.skip.extend(crate::scan::walk::identity_of(&rig.path("repository")));
    let run = rig.run(CacheTrust::Trust);
    for name in ["drop.o", "cache", "repository", "dir/drop.o"] {
        assert!(!run.has(&rig.path(name)), "{name}");
    }
    assert!(run.has(&rig.path("dir/keep")));
    assert_eq!(run.outcome.totals.files, 2);
    rig.plan.excludes = vec!["[".into()];
    assert!(matches!(rig.try_run(CacheTrust::Trust), Err(BackupError::Pattern(_))));
}

#[test]
fn one_file_system_saves_mount_points_empty() {
    let mut rig = Rig::new();
    let device = |path: &str| crate::scan::walk::identity_of(Path::new(path)).map(|(device, _)| device);
    if device("/dev/pts").is_none() || device("/dev/pts") == device("/dev") {
        println!("/dev/pts is no file system of its own: not covered");
        return;
    }
    rig.plan.paths = vec!["/dev".into()];
    rig.plan.one_file_system = true;
    rig.plan.excludes = vec!["/dev/shm".into()];
    let run = rig.run(CacheTrust::Ignore);
    assert!(run.has(Path::new("/dev/pts")) && !run.has(Path::new("/dev/pts/ptmx")));
    assert!(run.has(Path::new("/dev/null")));
    rig.plan.paths.push("/dev/pts".into());
    assert!(rig.run(CacheTrust::Ignore).has(Path::new("/dev/pts/ptmx")));
}

#[test]
fn the_root_directory_itself_can_be_saved() {
    let mut rig = Rig::new();
    rig.plan.paths = vec!["/".into(), "/etc/..".into()];
    rig.plan.excludes = vec!["/*".into(), "!/etc".into()];
    let run = rig.run(CacheTrust::Trust);
    run.assert_equals(Path::new("/etc"));
    assert!(run.seen.keys().all(|path| path.starts_with(b"/etc")));
    assert_eq!(rig.run(CacheTrust::Trust).now.files_opened, 0);
}

#[test]
fn roots_are_merged_and_links_are_followed_only_with_a_slash() {
    let mut rig = Rig::new();
    rig.write("real/a/f", b"f");
    rig.write("real/b", b"b");
    symlink("real", rig.path("link")).unwrap();
    rig.plan.paths = vec![rig.path("link")];
    let run = rig.run(CacheTrust::Ignore);
    assert!(matches!(run.at(&rig.path("link")).entry.node, EntryNode::Symlink { .. }));
    rig.plan.paths = vec![rig.path("link/"), rig.path("real/a/f"), rig.path("real/./a"), rig.path("gone")];
    let run = rig.run(CacheTrust::Ignore);
    assert!(run.has(&rig.path("link/a/f")) && run.has(&rig.path("real/a/f")) && !run.has(&rig.path("real/b")));
    assert_eq!(run.errors.len(), 1, "{:?}", run.errors);
    assert!(run.errors[0].path.ends_with(b"/gone"));
    rig.plan.paths = vec![rig.path("gone"), rig.path("gone/too")];
    assert!(matches!(rig.try_run(CacheTrust::Ignore), Err(BackupError::NoSource)));
}

#[test]
fn the_first_fault_of_a_port_ends_the_run_and_is_reported() {
    let rig = Rig::new();
    for i in 0..40 {
        rig.write(&format!("f{i}"), &noise(i, 1 << 20));
    }
    for blocks in [0, 3, 15] {
        rig.server.0.lock().fail_after_blocks = Some(blocks);
        let Err(error) = rig.try_run(CacheTrust::Trust) else { panic!("it went on") };
        assert!(error.to_string().contains("disk is full"), "{error}");
        rig.server.0.lock().bytes_reserved = 0;
        rig.server.0.lock().chunks.clear();
    }
    rig.server.0.lock().fail_after_blocks = None;
    rig.run(CacheTrust::Trust).assert_equals(rig.source.path());
}

#[test]
fn an_interrupted_run_ends_and_leaves_the_old_cache() {
    let rig = Rig::new();
    for i in 0..30 {
        rig.write(&format!("f{i}"), &noise(i, 1 << 20));
    }
    rig.run(CacheTrust::Trust);
    let before = std::fs::read(rig.cache_path()).unwrap();
    let cancel = rig.cancel.clone();
    rig.server.0.lock().on_first_query = Some(Box::new(move || cancel.store(true, Ordering::Relaxed)));
    assert!(matches!(rig.try_run(CacheTrust::Ignore), Err(BackupError::Cancelled)));
    assert_eq!(std::fs::read(rig.cache_path()).unwrap(), before);
    assert_eq!(std::fs::read_dir(rig.state.path()).unwrap().count(), 1, "temporary files are left over");
}

#[test]
fn what_one_run_holds_in_memory_does_not_depend_on_the_number_of_files() {
    // The channels and lanes are bounded by constants; what is left to show is that the walk keeps its descriptors bounded.
    let rig = Rig::new();
    for i in 0..400 {
        rig.write(&format!("d{i}/e/f"), b"x");
    }
    let open =
        || std::fs::File::open("/proc/self/fd").map(|dir| rustix::fs::Dir::read_from(dir.as_fd()).unwrap().count());
    let before = open().unwrap();
    rig.run(CacheTrust::Trust).assert_equals(rig.source.path());
    assert!(open().unwrap() < before + 600, "other tests run beside this one, but a leak of 800 would show");
}
