//! What a restore does with a target that is not empty: deletes, reuses, changes in place, pretends, cleans up.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;
use std::sync::atomic::Ordering::SeqCst;

use parking_lot::Mutex;
use rustix::fs::{Dir, FlockOperation};
use strandline_messages::format::tree::{EntryNode, Hole, ListKind, NodeBody, SourceError};

use super::tests::{Case, leftovers, names, noise, small};
use super::*;
use crate::trees::memory::{DirMaker, MemoryRepository};

fn deletion() -> Deletion {
    Deletion { saved: vec![Vec::new()], errors: None, keep: Vec::new(), scratch: std::env::temp_dir() }
}

fn identity(path: &Path) -> (u64, u64) {
    let meta = fs::symlink_metadata(path).unwrap();
    (meta.dev(), meta.ino())
}

/// A snapshot of one file of noise, in pieces of 4 KiB.
fn one_file(bytes: &[u8]) -> Case {
    let mut repo = MemoryRepository::new();
    let mut root = DirMaker::default();
    root.file(&mut repo, b"image", bytes, 4096);
    Case::new(repo, root)
}

#[test]
fn s42_what_the_snapshot_does_not_have_is_deleted_and_nothing_behind_a_link() {
    let mut case = small();
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("precious"), "outside").unwrap();
    case.run_clean();
    fs::create_dir_all(case.path("keep/stranger/deep")).unwrap();
    for extra in ["aaa", "keep/stranger/deep/x", "keep/zzz", "keep/deep/extra.keep", "keep/stranger/y.keep", "repo"] {
        fs::write(case.path(extra), "x").unwrap();
    }
    symlink(outside.path(), case.path("keep/link")).unwrap();
    case.options.exclude = vec!["*.keep".into()];
    case.options.overwrite = Overwrite::IfChanged;
    case.options.delete = Some(Deletion { keep: vec![identity(&case.path("repo"))], ..deletion() });
    let report = case.run_clean();
    let left = ["keep", "keep/deep", "keep/deep/extra.keep", "keep/deep/three.txt", "keep/one.txt"];
    let more = ["keep/stranger", "keep/stranger/y.keep", "keep/two.bin", "other.txt", "repo"];
    assert_eq!(names(case.target.path()), [&left[..], &more[..]].concat());
    assert_eq!(report.deleted, 5, "aaa, zzz, link, deep, deep/x");
    assert!(outside.path().join("precious").exists());
    assert_eq!(
        fs::metadata(case.path("keep")).unwrap().mtime(),
        1_600_000_000,
        "deleting in a directory does not change its time"
    );
}

#[test]
fn only_what_was_saved_as_a_whole_is_deleted_from() {
    for (saved, expected) in [
        (&b"keep"[..], &["beside"][..]),
        (b"keep/deep", &["beside", "keep/extra"]),
        (b"kee", &["beside", "keep/deep/x", "keep/extra"]),
        (b"", &[]),
    ] {
        let mut case = small();
        case.run_clean();
        let extra = ["beside", "keep/deep/x", "keep/extra"];
        for name in extra {
            fs::write(case.path(name), "x").unwrap();
        }
        case.options.delete = Some(Deletion { saved: vec![saved.to_vec()], ..deletion() });
        case.run_clean();
        let left: Vec<&str> = extra.into_iter().filter(|extra| case.path(extra).exists()).collect();
        assert_eq!(left, expected);
    }
}

#[test]
fn what_could_not_be_saved_is_not_deleted() {
    let mut repo = MemoryRepository::new();
    let error = |path: &str| SourceError { path: path.into(), message: "permission denied".into() };
    let list = NodeBody::Errors(vec![error("/closed"), error("/secret")]);
    let errors = repo.node(ListKind::Errors, list, &[]);
    let closed = DirMaker::default().finish(&mut repo);
    let mut root = DirMaker::default();
    root.directory(b"closed", closed);
    let mut case = Case::new(repo, root);
    fs::create_dir(case.path("closed")).unwrap();
    for extra in ["closed/inside", "secret", "extra"] {
        fs::write(case.path(extra), "x").unwrap();
    }
    case.options.delete = Some(Deletion { errors: Some(errors), ..deletion() });
    case.run_clean();
    assert_eq!(names(case.target.path()), ["closed", "closed/inside", "secret"]);
}

#[test]
fn include_patterns_bound_what_is_deleted_and_a_list_that_cannot_be_read_deletes_nothing() {
    let mut case = small();
    case.run_clean();
    for extra in ["extra.txt", "keep/extra.txt", "keep/extra.bin"] {
        fs::write(case.path(extra), "x").unwrap();
    }
    case.options.delete = Some(deletion());
    case.options.include = vec!["/keep/*.bin".into()];
    assert_eq!(case.run_clean().deleted, 1);
    assert!(case.path("extra.txt").exists() && case.path("keep/extra.txt").exists());
    case.options.include = Vec::new();
    // The last two blocks hold the directories.
    for block in case.source.blocks.lock().iter_mut().rev().take(1) {
        let middle = block.len() / 2;
        block[middle] ^= 1;
    }
    assert!(case.try_run().is_err() || case.path("extra.txt").exists());
}

#[test]
fn deleting_is_refused_where_it_would_surprise() {
    let refused = |change: &dyn Fn(&mut RestoreOptions)| {
        let mut case = small();
        case.options.delete = Some(deletion());
        change(&mut case.options);
        matches!(case.try_run(), Err(RestoreError::Refused { .. }))
    };
    assert!(!refused(&|_| ()));
    assert!(refused(&|options| options.overwrite = Overwrite::Never));
    assert!(refused(&|options| options.subpath = b"keep/one.txt".to_vec()));
    assert!(refused(&|options| options.target = "/".into()));
    assert!(refused(&|options| (options.in_place, options.sparse) = (true, true)));
}

#[test]
fn a_directory_in_the_place_of_a_file_gives_way_only_to_delete() {
    let mut case = small();
    fs::create_dir_all(case.path("keep/one.txt/full")).unwrap();
    let report = case.run();
    assert_eq!(report.issues.len(), 1);
    case.options.delete = Some(deletion());
    case.run_clean();
    assert_eq!(case.read("keep/one.txt"), b"one");
}

#[test]
fn a_dry_run_changes_nothing_and_tells_what_would_be() {
    let mut case = small();
    let told = Arc::new(Mutex::new(Vec::new()));
    let tell = {
        let told = Arc::clone(&told);
        move |action, path: &[u8]| told.lock().push((action, String::from_utf8_lossy(path).into_owned()))
    };
    case.options.dry_run = true;
    case.options.listener = Listener::new(tell);
    case.options.target = case.path("not/yet");
    let report = case.run_clean();
    assert_eq!((report.files, report.directories, report.bytes), (4, 2, 16));
    assert_eq!(names(case.target.path()), Vec::<String>::new());
    assert_eq!(told.lock().len(), 6);

    case.options.dry_run = false;
    case.run_clean();
    fs::write(case.path("not/yet/keep/extra"), "x").unwrap();
    fs::write(case.path("not/yet/keep/one.txt"), "changed").unwrap();
    case.options.dry_run = true;
    case.options.delete = Some(deletion());
    case.options.overwrite = Overwrite::IfChanged;
    told.lock().clear();
    let report = case.run_clean();
    assert_eq!((report.files, report.left, report.deleted), (1, 3, 1));
    assert!(told.lock().contains(&(Action::Deleted, "keep/extra".into())));
    assert!(told.lock().contains(&(Action::Restored, "keep/one.txt".into())));
    assert_eq!(case.read("not/yet/keep/one.txt"), b"changed");
    assert!(case.path("not/yet/keep/extra").exists());
}

#[test]
fn a_file_whose_content_is_right_is_kept_and_gets_its_attributes() {
    let bytes = noise(100_000);
    let case = one_file(&bytes);
    fs::write(case.path("image"), &bytes).unwrap();
    xattr::set(case.path("image"), "user.foreign", b"x").unwrap();
    let inode = identity(&case.path("image"));
    let report = case.run_clean();
    assert_eq!((report.bytes, report.bytes_reused, report.files), (0, 100_000, 1));
    assert_eq!(identity(&case.path("image")), inode);
    assert_eq!(fs::metadata(case.path("image")).unwrap().mtime(), 1_600_000_000);
    assert_eq!(xattr::get(case.path("image"), "user.foreign").unwrap(), None);
    // With another name, it is replaced: the other name must not change along with it.
    fs::hard_link(case.path("image"), case.path("other name")).unwrap();
    case.run_clean();
    assert_ne!(identity(&case.path("image")), inode);
}

#[test]
fn only_ranges_that_differ_are_fetched_and_the_file_is_replaced_as_a_whole() {
    let bytes = noise(1 << 20);
    let case = one_file(&bytes);
    let mut changed = bytes.clone();
    changed[300_000] ^= 1;
    changed.truncate(1_000_000);
    fs::write(case.path("image"), &changed).unwrap();
    let inode = identity(&case.path("image"));
    let report = case.run_clean();
    assert!(case.read("image") == bytes);
    assert_ne!(identity(&case.path("image")), inode, "the default never changes a file that is there");
    assert_eq!(report.bytes, 1 << 20);
    assert!(report.bytes_reused > 980_000, "{}", report.bytes_reused);
    assert!(report.received.bytes < 120_000, "{:?}", report.received);
}

#[test]
fn in_place_only_ranges_that_differ_are_written() {
    let bytes = noise(1 << 20);
    let mut case = one_file(&bytes);
    case.options.in_place = true;
    for length in [1 << 20, 1_000_000, 2 << 20] {
        let mut changed = bytes.clone();
        changed.resize(length, 7);
        changed[300_000] ^= 1;
        fs::write(case.path("image"), &changed).unwrap();
        let inode = identity(&case.path("image"));
        let report = case.run_clean();
        assert!(case.read("image") == bytes);
        assert_eq!(identity(&case.path("image")), inode);
        let lost = (bytes.len().saturating_sub(length)) as u64;
        assert!(report.bytes <= 2 * 4096 + lost, "{} bytes written", report.bytes);
        assert_eq!(fs::metadata(case.path("image")).unwrap().mtime(), 1_600_000_000);
    }
    // Somebody else's name for the file: it is not changed under them.
    fs::hard_link(case.path("image"), case.path("backup")).unwrap();
    fs::File::options().write(true).open(case.path("image")).unwrap().write_all_at(b"x", 0).unwrap();
    let before = case.read("backup");
    case.run_clean();
    assert!(case.read("image") == bytes && case.read("backup") == before);
}

#[test]
fn a_file_half_changed_in_place_never_looks_complete() {
    let bytes = noise(1 << 20);
    let mut case = one_file(&bytes);
    case.options.in_place = true;
    case.options.overwrite = Overwrite::IfChanged;
    case.options.window_bytes = 1;
    let other = noise(1 << 20);
    fs::write(case.path("image"), &other).unwrap();
    case.source.lost_after.store(20, SeqCst);
    assert!(case.try_run().is_err());
    let half = fs::metadata(case.path("image")).unwrap();
    assert_eq!(half.len(), 1 << 20);
    assert_ne!(half.mtime(), 1_600_000_000, "its time says that it is not complete");
    assert!(case.read("image") != other && case.read("image") != bytes);
    case.source.lost_after.store(usize::MAX, SeqCst);
    let report = case.run_clean();
    assert!(case.read("image") == bytes);
    assert!(report.bytes_reused > 0, "what was written before is not fetched again");
}

#[test]
fn in_place_holes_become_holes_again() {
    let mut repo = MemoryRepository::new();
    let mut root = DirMaker::default();
    let bytes = noise(8192);
    root.file(&mut repo, b"sparse", &bytes, 4096);
    let EntryNode::File { size, holes, .. } = &mut root.entries[0].node else { unreachable!() };
    *size = 1 << 20;
    *holes = vec![Hole { offset: 4096, bytes: (1 << 20) - 8192 }];
    let mut case = Case::new(repo, root);
    case.options.in_place = true;
    fs::write(case.path("sparse"), vec![7; 1 << 20]).unwrap();
    let inode = identity(&case.path("sparse"));
    case.run_clean();
    let found = case.read("sparse");
    assert!(found[..4096] == bytes[..4096] && found[(1 << 20) - 4096..] == bytes[4096..]);
    assert!(found[4096..(1 << 20) - 4096].iter().all(|byte| *byte == 0));
    let meta = fs::metadata(case.path("sparse")).unwrap();
    assert!(identity(&case.path("sparse")) == inode && meta.blocks() * 512 < 65_536);
}

#[test]
fn runs_of_zeros_become_holes_on_request() {
    let mut bytes = vec![0; 4 << 20];
    bytes[100_000..101_000].copy_from_slice(&noise(1000));
    bytes[3_000_000..3_000_010].copy_from_slice(b"0123456789");
    let mut case = one_file(&bytes);
    case.options.sparse = true;
    case.options.verify = true;
    case.run_clean();
    assert!(case.read("image") == bytes);
    let blocks = fs::metadata(case.path("image")).unwrap().blocks();
    assert!(blocks * 512 <= 32_768, "{blocks} blocks");
    case.options.sparse = false;
    fs::remove_file(case.path("image")).unwrap();
    case.run_clean();
    assert!(fs::metadata(case.path("image")).unwrap().blocks() * 512 >= 4 << 20);
}

#[test]
fn what_a_killed_restore_left_is_removed_and_two_restores_do_not_share_a_target() {
    let case = small();
    case.run_clean();
    let token = "0123456789abcdef";
    for place in [".", "keep", "keep/deep"] {
        fs::write(case.path(place).join(format!(".strand-{token}-7")), "half").unwrap();
    }
    fs::create_dir(case.path(&format!(".strand-links-{token}"))).unwrap();
    fs::write(case.path(&format!(".strand-links-{token}/1-2")), "linked").unwrap();
    fs::write(case.path(".strandignore"), "mine").unwrap();
    case.run_clean();
    assert!(case.path(".strandignore").exists());

    // Another restore has its target below.
    let nested = fs::File::open(case.path("keep")).unwrap();
    rustix::fs::flock(&nested, FlockOperation::LockExclusive).unwrap();
    let theirs = case.path("keep").join(format!(".strand-{token}-8"));
    fs::write(&theirs, "half").unwrap();
    case.try_run().unwrap();
    assert!(theirs.exists());
    drop(nested);
    case.run_clean();

    let target = fs::File::open(case.target.path()).unwrap();
    rustix::fs::flock(&target, FlockOperation::LockExclusive).unwrap();
    assert!(matches!(case.try_run(), Err(RestoreError::Busy { .. })));
    drop(target);
    case.run_clean();
    assert_eq!(leftovers(case.target.path()), Vec::<String>::new());
    assert!(Dir::read_from(fs::File::open(case.target.path()).unwrap().as_fd()).is_ok());
}

#[test]
fn one_file_costs_the_blocks_on_its_way_and_patterns_that_match_nothing_are_told() {
    let mut repo = MemoryRepository::new();
    let mut root = DirMaker::default();
    for number in 0..100 {
        let mut dir = DirMaker::default();
        for file in 0..20 {
            dir.file(&mut repo, format!("f{file:02}").as_bytes(), &noise(500), 500);
        }
        let dir = dir.finish(&mut repo);
        root.directory(format!("d{number:02}").as_bytes(), dir);
    }
    let mut case = Case::new(repo, root);
    let before = case.source.received().blocks;
    case.options.subpath = b"d50/f10".to_vec();
    let by_path = case.run_clean().received.blocks - before;
    assert!(by_path <= 3, "root, directory, file: {by_path} blocks");
    case.options.subpath = Vec::new();
    case.options.include = vec!["/d50/f10".into(), "/d50/none".into()];
    let report = case.run_clean();
    assert!(report.received.blocks - before - by_path <= 3, "{:?}", report.received);
    assert_eq!(report.unmatched, ["/d50/none"]);
    assert_eq!(names(case.target.path()), ["d50", "d50/f10", "f10"]);
}

#[test]
fn a_name_that_somebody_takes_in_a_new_directory_is_replaced_and_told_or_left() {
    for overwrite in [Overwrite::Always, Overwrite::IfChanged, Overwrite::Never] {
        let mut repo = MemoryRepository::new();
        let mut dir = DirMaker::default();
        dir.file(&mut repo, b"chunk", b"one chunk", 100);
        dir.file(&mut repo, b"chunks", b"several", 2);
        dir.inline(b"inline", b"in the entry");
        dir.file(&mut repo, b"other", b"nobody's", 100);
        let dir = dir.finish(&mut repo);
        let mut root = DirMaker::default();
        root.directory(b"dir", dir);
        let mut case = Case::new(repo, root);
        let dir = case.path("dir");
        // Told when the directory has been made, before anything is in it.
        let take = move |_: Action, path: &[u8]| {
            if path == b"dir" {
                for name in ["chunk", "chunks", "inline"] {
                    fs::write(dir.join(name), "mine").unwrap();
                }
            }
        };
        case.options.listener = Listener::new(take);
        case.options.overwrite = overwrite;
        let report = case.run();
        assert_eq!(case.read("dir/other"), b"nobody's");
        let found = ["chunk", "chunks", "inline"].map(|name| case.read(&format!("dir/{name}")));
        if overwrite == Overwrite::Never {
            assert_eq!((report.files, report.issues_total), (1, 3), "{report:?}");
            assert_eq!(found, [b"mine"; 3]);
        } else {
            assert_eq!((report.files, report.issues_total), (4, 3), "{report:?}");
            assert!(report.issues.iter().all(|issue| issue.restored && issue.reason.contains("was replaced")));
            assert_eq!(found, [&b"one chunk"[..], b"several", b"in the entry"]);
        }
    }
}
