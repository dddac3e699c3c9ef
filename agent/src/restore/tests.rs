//! Trees made by hand are restored from really sealed blocks into temporary directories.

use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;

use strandline_messages::ChunkKind;
use strandline_messages::format::chunk::Reference;
use strandline_messages::format::tree::{Content, EntryNode, Hole, ListKind, NodeBody, Piece, Timestamp, Xattr};
use tempfile::TempDir;

use super::*;
use crate::trees::memory::{DirMaker, MemoryRepository, MemorySource};

pub(super) struct Case {
    pub(super) keyset: Keyset,
    pub(super) source: Arc<MemorySource>,
    pub(super) root: ChunkId,
    pub(super) options: RestoreOptions,
    pub(super) target: TempDir,
}

impl Case {
    pub(super) fn new(mut repo: MemoryRepository, root: DirMaker) -> Self {
        let root = root.finish(&mut repo);
        Self::at(repo, root)
    }

    pub(super) fn at(repo: MemoryRepository, root: ChunkId) -> Self {
        let target = tempfile::tempdir().unwrap();
        let keyset = repo.keyset.clone();
        let options = RestoreOptions::new(target.path().to_owned());
        Self { keyset, source: repo.finish(), root, options, target }
    }

    pub(super) fn try_run(&self) -> Result<RestoreReport, RestoreError> {
        // Counters belong to one run.
        let options = RestoreOptions { progress: Arc::default(), ..self.options.clone() };
        restore(Arc::<MemorySource>::clone(&self.source), &self.keyset, self.root, &options)
    }

    pub(super) fn run(&self) -> RestoreReport {
        let report = self.try_run().unwrap();
        assert_eq!(leftovers(self.target.path()), Vec::<String>::new());
        report
    }

    pub(super) fn run_clean(&self) -> RestoreReport {
        let report = self.run();
        assert_eq!(report.issues, []);
        report
    }

    pub(super) fn path(&self, path: &str) -> PathBuf {
        self.target.path().join(path)
    }

    pub(super) fn read(&self, path: &str) -> Vec<u8> {
        fs::read(self.path(path)).unwrap()
    }
}

/// All names below a directory, sorted.
pub(super) fn names(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut open = vec![dir.to_owned()];
    while let Some(current) = open.pop() {
        for entry in fs::read_dir(current).unwrap() {
            let entry = entry.unwrap();
            found.push(entry.path().strip_prefix(dir).unwrap().to_string_lossy().into_owned());
            if entry.file_type().unwrap().is_dir() {
                open.push(entry.path());
            }
        }
    }
    found.sort();
    found
}

pub(super) fn leftovers(dir: &Path) -> Vec<String> {
    names(dir).into_iter().filter(|name| name.contains(".strand-")).collect()
}

pub(super) fn noise(bytes: usize) -> Vec<u8> {
    let mut noise = vec![0; bytes];
    getrandom::fill(&mut noise).unwrap();
    noise
}

/// keep/ (one.txt, two.bin, deep/ (three.txt)), other.txt
pub(super) fn small() -> Case {
    let mut repo = MemoryRepository::new();
    let mut deep = DirMaker::default();
    deep.file(&mut repo, b"three.txt", b"three", 2);
    let deep = deep.finish(&mut repo);
    let mut keep = DirMaker::default();
    keep.file(&mut repo, b"one.txt", b"one", 2);
    keep.file(&mut repo, b"two.bin", b"two", 2);
    keep.directory(b"deep", deep);
    let keep = keep.finish(&mut repo);
    let mut root = DirMaker::default();
    root.directory(b"keep", keep);
    root.inline(b"other.txt", b"other");
    Case::new(repo, root)
}

#[test]
fn a_tree_is_restored_byte_for_byte_over_many_windows() {
    let mut repo = MemoryRepository::new();
    let big = noise(300_000);
    let mut dir = DirMaker::default();
    for number in 0..50usize {
        dir.file(&mut repo, format!("f{number:02}").as_bytes(), &big[number * 1000..number * 3000], 700);
    }
    dir.file(&mut repo, b"empty", b"", 1);
    dir.inline(b"inline", b"in the entry");
    dir.inline(b"nothing", b"");
    let dir = dir.finish(&mut repo);
    let mut root = DirMaker::default();
    root.directory(b"dir", dir);
    root.file(&mut repo, b"big", &big, 4096);
    root.file(&mut repo, b"again", &big, 4096);
    let mut case = Case::new(repo, root);
    case.options.verify = true;
    for window_bytes in [1, 10_000, 128 << 20] {
        case.options.window_bytes = window_bytes;
        case.options.writers = if window_bytes == 1 { 1 } else { 4 };
        let report = case.run_clean();
        assert_eq!((report.files, report.directories, report.verified), (55, 1, 55));
        assert!(case.read("big") == big && case.read("again") == big);
        for number in 0..50usize {
            assert!(case.read(&format!("dir/f{number:02}")) == big[number * 1000..number * 3000], "{number}");
        }
        assert_eq!(case.read("dir/inline"), b"in the entry");
        assert_eq!(case.read("dir/empty"), b"");
    }
}

#[test]
fn every_attribute_survives_the_round_trip() {
    let mut repo = MemoryRepository::new();
    let xattr = |name: &[u8], value: &[u8]| Xattr { name: name.to_vec(), value: value.to_vec() };
    // Version 2, then tag, permissions, id: user rwx, user 4711 r, group r, mask r, other none.
    let mut acl = vec![2, 0, 0, 0];
    for (tag, permissions, id) in
        [(1u16, 7u16, u32::MAX), (2, 4, 4711), (4, 4, u32::MAX), (16, 4, u32::MAX), (32, 0, u32::MAX)]
    {
        acl.extend([tag.to_le_bytes(), permissions.to_le_bytes()].concat());
        acl.extend(id.to_le_bytes());
    }
    let mut dir = DirMaker::default();
    dir.file(&mut repo, b"inner", b"x", 1);
    let dir = dir.finish(&mut repo);
    let mut root = DirMaker::default();
    let owner = root.owner(1234, 5678, "", "");
    let as_root = rustix::process::geteuid().is_root();
    let owner = if as_root { owner } else { 0 };
    let entry = root.file(&mut repo, b"file", b"content", 3);
    entry.mode = 0o4750;
    entry.owner = owner;
    entry.xattrs = vec![xattr(b"user.note", b"\0\xff")];
    let entry = root.file(&mut repo, b"acl", b"content", 3);
    entry.mode = 0o740;
    entry.xattrs = vec![xattr(b"system.posix_acl_access", &acl)];
    let entry = root.directory(b"dir", dir);
    entry.mode = 0o1550;
    entry.owner = owner;
    entry.mtime = Timestamp { seconds: -1, nanos: 999_999_999 };
    entry.xattrs = vec![xattr(b"user.dir", b"d")];
    let entry = root.symlink(b"link", b"nowhere/\xff");
    entry.owner = owner;
    root.add(b"fifo", EntryNode::Fifo).mode = 0o620;
    root.add(b"socket", EntryNode::Socket).mode = 0o600;
    if as_root {
        root.add(b"null", EntryNode::CharDevice { major: 1, minor: 3 });
        root.add(b"loop", EntryNode::BlockDevice { major: 7, minor: 300 });
    }
    let case = Case::new(repo, root);
    let report = case.run();
    // A sandbox may forbid device nodes, a file system may lack ACLs: anything else is a fault.
    let excused = |issue: &RestoreIssue| {
        (issue.reason.contains("permitted") && [&b"null"[..], b"loop"].contains(&issue.path.as_slice()))
            || issue.reason.contains("not supported")
    };
    for issue in &report.issues {
        assert!(excused(issue), "{issue}");
        eprintln!("not shown on this machine: {issue}");
    }
    let stat = |name: &str| fs::symlink_metadata(case.path(name)).unwrap();
    let mtime = |name: &str| (stat(name).mtime(), stat(name).mtime_nsec());
    for name in ["file", "acl", "link", "fifo", "socket"] {
        assert_eq!(mtime(name), (1_600_000_000, 123_456_789), "{name}");
    }
    assert_eq!(mtime("dir"), (-1, 999_999_999), "set after its content");
    assert_eq!(stat("file").mode() & 0o7777, 0o4750);
    assert_eq!(stat("dir").mode() & 0o7777, 0o1550);
    assert_eq!(stat("fifo").mode() & 0o7777, 0o620);
    assert!(stat("fifo").file_type().is_fifo() && stat("socket").file_type().is_socket());
    assert_eq!(fs::read_link(case.path("link")).unwrap().as_os_str().as_bytes(), b"nowhere/\xff");
    assert_eq!(xattr::get(case.path("file"), "user.note").unwrap().unwrap(), b"\0\xff");
    assert_eq!(xattr::get(case.path("dir"), "user.dir").unwrap().unwrap(), b"d");
    let mentions = |path: &[u8]| report.issues.iter().any(|issue| issue.path == path);
    if !mentions(b"acl") {
        assert_eq!(xattr::get(case.path("acl"), "system.posix_acl_access").unwrap().unwrap(), acl);
        assert_eq!(stat("acl").mode() & 0o7777, 0o740);
    }
    if as_root {
        for name in ["file", "dir", "link"] {
            assert_eq!((stat(name).uid(), stat(name).gid()), (1234, 5678), "{name}");
        }
        if !mentions(b"null") {
            assert!(stat("null").file_type().is_char_device());
            assert_eq!(stat("null").rdev(), rustix::fs::makedev(1, 3));
        }
        if !mentions(b"loop") {
            assert!(stat("loop").file_type().is_block_device());
            assert_eq!(stat("loop").rdev(), rustix::fs::makedev(7, 300));
        }
    }
}

#[test]
fn s42_names_of_any_bytes_are_restored() {
    let mut repo = MemoryRepository::new();
    let mut root = DirMaker::default();
    let longest = [b'n'; 255];
    let odd: [&[u8]; 6] = [b"\xff\xfe", b"new\nline", b"-rf", b"...", &longest, b" "];
    for name in odd {
        root.file(&mut repo, name, name, 7);
    }
    let case = Case::new(repo, root);
    case.run_clean();
    for name in odd {
        let path = case.target.path().join(std::ffi::OsString::from_vec(name.to_vec()));
        assert_eq!(fs::read(path).unwrap(), name);
    }
}

#[test]
fn holes_stay_holes() {
    let mut repo = MemoryRepository::new();
    let mut root = DirMaker::default();
    let bytes = noise(20_000);
    root.file(&mut repo, b"sparse", &bytes, 3000);
    let mebibyte = 1 << 20;
    let EntryNode::File { size, holes, .. } = &mut root.entries[0].node else { unreachable!() };
    *size = 20 * mebibyte;
    // 10,000 bytes at 1 MiB, 10,000 bytes at 10 MiB.
    *holes = vec![
        Hole { offset: 0, bytes: mebibyte },
        Hole { offset: mebibyte + 10_000, bytes: 9 * mebibyte - 10_000 },
        Hole { offset: 10 * mebibyte + 10_000, bytes: 10 * mebibyte - 10_000 },
    ];
    let hole = EntryNode::File {
        size: 5 * mebibyte,
        content: Content::Inline(Vec::new()),
        holes: vec![Hole { offset: 0, bytes: 5 * mebibyte }],
    };
    root.add(b"all hole", hole);
    let mut case = Case::new(repo, root);
    case.options.verify = true;
    let report = case.run_clean();
    assert_eq!((report.bytes, report.verified), (20_000, 2));
    let found = case.read("sparse");
    let mut expected = vec![0; 20 << 20];
    expected[1 << 20..][..10_000].copy_from_slice(&bytes[..10_000]);
    expected[10 << 20..][..10_000].copy_from_slice(&bytes[10_000..]);
    assert!(found == expected);
    assert!(fs::metadata(case.path("sparse")).unwrap().blocks() * 512 < mebibyte);
    let all = fs::metadata(case.path("all hole")).unwrap();
    assert_eq!((all.len(), all.blocks() < 64), (5 * mebibyte, true));
}

#[test]
fn hard_links_become_one_inode_again() {
    let mut repo = MemoryRepository::new();
    let bytes = noise(5000);
    let mut later = DirMaker::default();
    let mut root = DirMaker::default();
    for (is_later, name, inode, links) in [
        (false, &b"a"[..], 1, 3),
        (false, b"b", 1, 3),
        (true, b"c", 1, 3),
        // Its other links are outside of the snapshot.
        (false, b"alone", 2, 9),
        (true, b"p", 3, 2),
        (false, b"q", 3, 2),
    ] {
        let maker = if is_later { &mut later } else { &mut root };
        let entry = maker.file(&mut repo, name, &bytes, 1000);
        (entry.inode, entry.links) = (inode, links);
    }
    for name in [&b"s1"[..], b"s2"] {
        let entry = root.symlink(name, b"a");
        (entry.inode, entry.links) = (4, 2);
    }
    let later = later.finish(&mut repo);
    root.directory(b"later", later);
    let mut case = Case::new(repo, root);
    let inode = |case: &Case, name: &str| fs::symlink_metadata(case.path(name)).unwrap().ino();
    for (window, overwrite) in
        [(1, Overwrite::Always), (1 << 20, Overwrite::Always), (1 << 20, Overwrite::IfChanged), (1, Overwrite::Never)]
    {
        case.options.window_bytes = window;
        case.options.overwrite = overwrite;
        let report = case.run_clean();
        if overwrite == Overwrite::Always {
            assert_eq!((report.files, report.hard_links, report.others), (3, 4, 1));
        }
        assert_eq!(inode(&case, "a"), inode(&case, "b"));
        assert_eq!(inode(&case, "a"), inode(&case, "later/c"));
        assert_eq!(inode(&case, "q"), inode(&case, "later/p"));
        assert_eq!(inode(&case, "s1"), inode(&case, "s2"));
        assert_ne!(inode(&case, "a"), inode(&case, "alone"));
        assert_eq!(fs::metadata(case.path("a")).unwrap().nlink(), 3);
        assert!(case.read("later/p") == bytes);
    }
    // One link of an unchanged inode is gone: it comes back as a link.
    fs::remove_file(case.path("b")).unwrap();
    case.options.overwrite = Overwrite::IfChanged;
    assert_eq!(case.run_clean().hard_links, 1);
    assert_eq!(inode(&case, "a"), inode(&case, "b"));
}

#[test]
fn includes_and_excludes_choose_what_is_restored() {
    let chosen = |include: &[&str], exclude: &[&str]| {
        let mut case = small();
        case.options.include = include.iter().map(|text| (*text).to_owned()).collect();
        case.options.exclude = exclude.iter().map(|text| (*text).to_owned()).collect();
        case.options.verify = true;
        case.run_clean();
        names(case.target.path())
    };
    let all = ["keep", "keep/deep", "keep/deep/three.txt", "keep/one.txt", "keep/two.bin", "other.txt"];
    assert_eq!(chosen(&[], &[]), all);
    assert_eq!(chosen(&["*.bin"], &[]), ["keep", "keep/two.bin"]);
    assert_eq!(chosen(&["deep"], &[]), ["keep", "keep/deep", "keep/deep/three.txt"]);
    assert_eq!(chosen(&["/deep"], &[]), Vec::<String>::new());
    assert_eq!(chosen(&["/keep/one.txt", "/other.txt"], &[]), ["keep", "keep/one.txt", "other.txt"]);
    assert_eq!(chosen(&[], &["*.txt", "deep/"]), ["keep", "keep/two.bin"]);
    assert_eq!(chosen(&["keep"], &["deep"]), ["keep", "keep/one.txt", "keep/two.bin"]);
    let mut case = small();
    case.options.include = vec!["a[".into()];
    assert!(matches!(case.try_run(), Err(RestoreError::Pattern { .. })));
}

#[test]
fn a_subpath_restores_its_content_and_a_file_itself() {
    let mut case = small();
    case.options.subpath = b"/keep/".to_vec();
    case.options.verify = true;
    assert_eq!(case.run_clean().verified, 3);
    assert_eq!(names(case.target.path()), ["deep", "deep/three.txt", "one.txt", "two.bin"]);
    let mut case = small();
    case.options.subpath = b"keep/deep/three.txt".to_vec();
    case.options.verify = true;
    assert_eq!(case.run_clean().verified, 1);
    assert_eq!(names(case.target.path()), ["three.txt"]);
    case.options.subpath = b"keep/gone".to_vec();
    let error = case.try_run().unwrap_err();
    assert!(error.to_string().contains("no `/keep/gone`"), "{error}");
}

#[test]
fn overwriting_always_replaces_files_and_keeps_strangers() {
    let case = small();
    fs::create_dir_all(case.path("keep")).unwrap();
    fs::write(case.path("keep/one.txt"), "something much longer").unwrap();
    fs::write(case.path("keep/stranger"), "stays").unwrap();
    fs::write(case.path("keep/deep"), "a file where a directory belongs").unwrap();
    let open = fs::File::open(case.path("keep/one.txt")).unwrap();
    case.run_clean();
    assert_eq!(case.read("keep/one.txt"), b"one");
    assert_eq!(case.read("keep/stranger"), b"stays");
    assert_eq!(case.read("keep/deep/three.txt"), b"three");
    assert_eq!(open.metadata().unwrap().len(), 21, "who had the old file open still reads the old file");
}

#[test]
fn overwriting_if_changed_leaves_what_has_size_and_time() {
    let mut case = small();
    case.run_clean();
    case.options.overwrite = Overwrite::IfChanged;
    let inode = fs::metadata(case.path("keep/one.txt")).unwrap().ino();
    fs::write(case.path("keep/two.bin"), "two").unwrap();
    let report = case.run_clean();
    assert_eq!((report.left, report.files), (3, 1), "two.bin has another time");
    assert_eq!(fs::metadata(case.path("keep/one.txt")).unwrap().ino(), inode);
}

#[test]
fn overwriting_never_leaves_whatever_exists() {
    let mut case = small();
    case.options.overwrite = Overwrite::Never;
    case.options.verify = true;
    fs::create_dir_all(case.path("keep")).unwrap();
    fs::write(case.path("keep/one.txt"), "mine").unwrap();
    fs::write(case.path("keep/deep"), "mine").unwrap();
    symlink("/nowhere", case.path("other.txt")).unwrap();
    fs::set_permissions(case.path("keep"), fs::Permissions::from_mode(0o711)).unwrap();
    let report = case.run_clean();
    assert_eq!((report.left, report.files), (3, 1));
    assert_eq!(fs::metadata(case.path("keep")).unwrap().mode() & 0o777, 0o711, "nor are directories changed");
    assert_eq!(case.read("keep/one.txt"), b"mine");
    assert_eq!(case.read("keep/deep"), b"mine");
    assert_eq!(case.read("keep/two.bin"), b"two");
}

#[test]
fn s42_links_in_the_target_are_never_followed() {
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("one.txt"), "untouched").unwrap();
    for overwrite in [Overwrite::Always, Overwrite::IfChanged, Overwrite::Never] {
        let mut case = small();
        case.options.overwrite = overwrite;
        symlink(outside.path(), case.path("keep")).unwrap();
        symlink(outside.path().join("new"), case.path("other.txt")).unwrap();
        case.run_clean();
        assert_eq!(names(outside.path()), ["one.txt"]);
        assert_eq!(fs::read(outside.path().join("one.txt")).unwrap(), b"untouched");
        assert_eq!(case.path("keep").is_symlink(), overwrite == Overwrite::Never);
    }
}

#[test]
fn s42_a_hostile_tree_with_a_link_and_a_directory_of_one_name_cannot_escape() {
    let outside = tempfile::tempdir().unwrap();
    let mut repo = MemoryRepository::new();
    let mut inner = DirMaker::default();
    inner.file(&mut repo, b"evil", b"evil", 2);
    let inner = inner.finish(&mut repo);
    let mut first = DirMaker::default();
    first.symlink(b"a", outside.path().as_os_str().as_bytes());
    let first = first.finish(&mut repo);
    let mut second = DirMaker::default();
    second.directory(b"a", inner);
    let second = second.finish(&mut repo);
    let root = repo.index(ListKind::Directory, 1, &[(first, 1, b"a"), (second, 1, b"b")]);
    let case = Case::at(repo, root);
    let report = case.run();
    assert_eq!(names(outside.path()), Vec::<String>::new());
    assert_eq!(report.issues_total, 1);
    assert!(report.issues[0].reason.contains("names do not follow"), "{}", report.issues[0]);
}

#[test]
fn s42_a_hard_link_to_a_link_of_a_hostile_tree_stays_inside() {
    let outside = tempfile::tempdir().unwrap();
    let secret = outside.path().join("secret");
    fs::write(&secret, "secret").unwrap();
    let mut repo = MemoryRepository::new();
    let mut root = DirMaker::default();
    let entry = root.symlink(b"a", secret.as_os_str().as_bytes());
    (entry.inode, entry.links) = (1, 2);
    // Claims to be the same inode, but is a file: it may at most become the same link.
    let entry = root.file(&mut repo, b"b", b"overwritten", 20);
    (entry.inode, entry.links) = (1, 2);
    let case = Case::new(repo, root);
    case.run();
    assert_eq!(fs::read(&secret).unwrap(), b"secret");
    assert_eq!(fs::metadata(&secret).unwrap().nlink(), 1);
}

#[test]
fn s30_a_flipped_byte_is_an_error_naming_path_and_block_and_never_a_silent_restore() {
    let case = small();
    let blocks = case.source.blocks.lock().len();
    let mut restored_wrong = 0;
    for number in 0..blocks {
        let original = case.source.blocks.lock()[number].clone();
        for place in [200, original.len() - 60] {
            case.source.blocks.lock()[number][place] ^= 1;
            match case.try_run() {
                Ok(report) => {
                    assert!(report.issues_total > 0);
                    let all: Vec<String> = report.issues.iter().map(ToString::to_string).collect();
                    assert!(
                        all.iter().all(|text| text.contains("block number") && text.contains("damaged")),
                        "{all:?}"
                    );
                }
                Err(error) => assert!(error.to_string().contains("damaged"), "{error}"),
            }
            for (path, good) in [("keep/one.txt", "one"), ("keep/two.bin", "two"), ("keep/deep/three.txt", "three")] {
                if fs::read(case.path(path)).is_ok_and(|found| found != good.as_bytes()) {
                    restored_wrong += 1;
                }
            }
            case.source.blocks.lock()[number].clone_from(&original);
            let _ = fs::remove_dir_all(case.path("keep"));
        }
    }
    assert_eq!(restored_wrong, 0);
    case.run_clean();
}

#[test]
fn s48_a_swapped_chunk_fails_its_file_alone() {
    let mut repo = MemoryRepository::new();
    let wanted = repo.keyset.chunk_id(ChunkKind::Data, b"mine", &[]);
    repo.chunk_as(wanted, ChunkKind::Data, b"evil", &[]);
    let mut root = DirMaker::default();
    root.file(&mut repo, b"good", b"good", 4);
    root.file(&mut repo, b"mine", b"mine", 4);
    let case = Case::new(repo, root);
    let report = case.run();
    assert_eq!((report.files, report.issues_total), (1, 1));
    assert_eq!(report.issues[0].path, b"mine");
    assert!(report.issues[0].reason.contains(&wanted.to_string()), "{}", report.issues[0]);
    assert_eq!(names(case.target.path()), ["good"]);
}

#[test]
fn missing_chunks_fail_their_files_and_the_rest_goes_on() {
    let mut repo = MemoryRepository::new();
    let lost = ChunkId([9; 32]);
    let mut root = DirMaker::default();
    root.file(&mut repo, b"before", b"before", 3);
    let entry = root.file(&mut repo, b"holed", b"has a gap", 3);
    let EntryNode::File { content: Content::Pieces(pieces), .. } = &mut entry.node else { unreachable!() };
    let gap = pieces[1].position as usize;
    root.references[gap] = Reference::data(lost);
    root.file(&mut repo, b"later", b"later", 3);
    let case = Case::new(repo, root);
    let report = case.run();
    assert_eq!((report.files, report.issues_total), (2, 1));
    assert_eq!(report.issues[0].path, b"holed");
    assert!(report.issues[0].reason.contains(&lost.to_string()), "{}", report.issues[0]);
    assert_eq!(names(case.target.path()), ["before", "later"]);
}

#[test]
fn a_lost_repository_ends_the_restore_and_leaves_no_half_files() {
    let mut case = small();
    case.options.window_bytes = 1;
    for fetches in 0..6 {
        // What earlier rounds restored would be reused.
        let _ = fs::remove_dir_all(case.path("keep"));
        case.source.fetches.store(0, SeqCst);
        case.source.lost_after.store(fetches, SeqCst);
        let error = case.try_run().unwrap_err();
        assert!(error.to_string().contains("cable pulled"), "{error}");
        assert_eq!(leftovers(case.target.path()), Vec::<String>::new());
        for (path, good) in [("keep/one.txt", "one"), ("keep/two.bin", "two"), ("keep/deep/three.txt", "three")] {
            assert!(fs::read(case.path(path)).is_ok_and(|found| found == good.as_bytes()) || !case.path(path).exists());
        }
    }
    case.source.lost_after.store(usize::MAX, SeqCst);
    case.run_clean();
}

#[test]
fn cancelling_stops_and_leaves_no_temporary_files() {
    let case = small();
    case.options.cancel.store(true, SeqCst);
    let report = case.run();
    assert!(report.cancelled);
    assert_eq!((report.files, report.issues_total), (0, 0));
}

#[test]
fn what_cannot_be_written_is_recorded_and_the_rest_goes_on() {
    let case = small();
    // A full directory where a file belongs is not thrown away.
    fs::create_dir_all(case.path("keep/one.txt/precious")).unwrap();
    let report = case.run();
    assert_eq!((report.files, report.issues_total), (3, 1));
    assert_eq!(report.issues[0].path, b"keep/one.txt");
    assert!(case.path("keep/one.txt/precious").exists());
}

#[test]
fn a_file_whose_list_contradicts_its_chunks_is_refused_or_reported() {
    let mut repo = MemoryRepository::new();
    let id = repo.chunk(ChunkKind::Data, b"four", &[]);
    let mut root = DirMaker::default();
    let position = root.position(Reference::data(id));
    let pieces = |bytes| Content::Pieces(vec![Piece { position, bytes }]);
    root.add(b"lying", EntryNode::File { size: 5, content: pieces(5), holes: vec![] });
    root.add(b"short", EntryNode::File { size: 9, content: pieces(4), holes: vec![] });
    let case = Case::new(repo, root);
    let report = case.run();
    assert_eq!(names(case.target.path()), ["short"]);
    assert_eq!(case.read("short"), b"four");
    let reasons: Vec<_> = report.issues.iter().map(|issue| (issue.path.as_slice(), issue.restored)).collect();
    assert!(reasons.contains(&(b"short", true)) && reasons.contains(&(b"lying", false)), "{reasons:?}");
}

#[test]
fn verification_finds_what_changed_after_it_was_written() {
    let mut repo = MemoryRepository::new();
    let mut root = DirMaker::default();
    for name in [&b"a"[..], b"b", b"c"] {
        root.file(&mut repo, name, name, 1);
    }
    let root = root.finish(&mut repo);
    let mut case = Case::at(repo, root);
    case.run_clean();
    // Same size and time, other bytes: left as unchanged, found by reading it.
    let time = fs::metadata(case.path("b")).unwrap().modified().unwrap();
    fs::write(case.path("b"), "x").unwrap();
    fs::File::options().write(true).open(case.path("b")).unwrap().set_modified(time).unwrap();
    case.options.overwrite = Overwrite::IfChanged;
    case.options.verify = true;
    let report = case.run();
    assert_eq!((report.left, report.verified, report.issues_total), (3, 2, 1));
    assert_eq!(report.issues[0].path, b"b");
}

#[test]
fn a_huge_file_and_a_huge_directory_come_through_lists() {
    let mut repo = MemoryRepository::new();
    let bytes = noise(9000);
    let mut lower = Vec::new();
    for part in bytes.chunks(3000) {
        let references: Vec<_> =
            part.chunks(1000).map(|piece| Reference::data(repo.chunk(ChunkKind::Data, piece, &[]))).collect();
        let pieces = (0..3).map(|position| Piece { position, bytes: 1000 }).collect();
        lower.push((repo.node(ListKind::Content, NodeBody::Content(pieces), &references), 3000, &b""[..]));
    }
    let list = repo.index(ListKind::Content, 1, &lower);
    let mut first = DirMaker::default();
    let position = first.position(Reference::tree(list));
    first.add(b"a", EntryNode::File { size: 9000, content: Content::List { position }, holes: vec![] });
    let first = first.finish(&mut repo);
    let mut second = DirMaker::default();
    second.inline(b"b", b"bee");
    let second = second.finish(&mut repo);
    let root = repo.index(ListKind::Directory, 1, &[(first, 1, b"a"), (second, 1, b"b")]);
    let mut case = Case::at(repo, root);
    case.options.verify = true;
    assert_eq!(case.run_clean().verified, 2);
    assert!(case.read("a") == bytes);
    assert_eq!(case.read("b"), b"bee");
}

#[test]
fn a_deep_tree_needs_neither_long_paths_nor_many_descriptors() {
    let mut repo = MemoryRepository::new();
    let mut top = DirMaker::default().finish(&mut repo);
    for level in 0..1000 {
        let mut dir = DirMaker::default();
        dir.directory(b"directory", top);
        dir.inline(b"file", format!("{level}").as_bytes());
        top = dir.finish(&mut repo);
    }
    let mut case = Case::at(repo, top);
    case.options.verify = true;
    // Not `run`: its search for left-overs goes by path.
    let report = case.try_run().unwrap();
    assert_eq!(report.issues, []);
    assert_eq!((report.directories, report.files, report.verified), (1000, 1000, 1000));
    let mode = fs::metadata(case.path("directory")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o755);
}
