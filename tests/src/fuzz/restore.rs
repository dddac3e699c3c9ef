//! Restoring and exporting snapshots that were made to do harm: scenario 42 with any tree.

use std::fs::{self, DirBuilder};
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use strandline_agent::export::{Archive, Export, ExportOptions};
use strandline_agent::restore::{Deletion, Listener, Overwrite, RestoreOptions, restore as restore_tree};

use super::snapshot::{Snapshot, keyset};
use super::{formats, scratch};

/// Most bytes of an archive that are written before its disk is full.
const ARCHIVE_BYTES_MAX: usize = 64 << 10;
/// Content that a window of these small restores takes.
const WINDOW_BYTES: u64 = 64 << 10;

/// How to restore, and from what: the beginning of an input.
///
/// First byte: bits 0 and 1 what happens to what exists, 2 in place, 3 sparse, 4 delete, 5 verify, 6 a target that is not
/// empty, 7 owners by name. Then a pattern and a path in the snapshot, each with a byte for its length in front.
struct Wishes<'a> {
    form: u8,
    pattern: String,
    subpath: &'a [u8],
    nodes: &'a [u8],
}

impl<'a> Wishes<'a> {
    fn of(data: &'a [u8]) -> Option<Self> {
        let (&form, rest) = data.split_first()?;
        let (pattern, rest) = short(rest)?;
        let (subpath, nodes) = short(rest)?;
        Some(Self { form, pattern: String::from_utf8_lossy(pattern).into_owned(), subpath, nodes })
    }

    fn is(&self, bit: u8) -> bool {
        self.form >> bit & 1 == 1
    }
}

fn short(data: &[u8]) -> Option<(&[u8], &[u8])> {
    let (&length, rest) = data.split_first()?;
    Some(rest.split_at(usize::from(length).min(rest.len())))
}

/// A hostile tree (`Wishes`, then nodes as [`Snapshot::of`] takes them) is restored beside a directory that is not the
/// target's, into a target in which links lead there.
///
/// Whatever it is made of: nothing outside of the target is made, changed, linked to or removed; no path that is told leaves
/// the target; nothing of the restore's own is left over.
pub fn restore(data: &[u8]) {
    let Some(wishes) = Wishes::of(data) else { return };
    let Some(snapshot) = Snapshot::of(wishes.nodes) else { return };
    scratch::with(|cage| {
        let (outside, target) = (cage.join("outside"), cage.join("target"));
        remove(&target);
        let prepared = prepare(&outside, &target, wishes.is(6));
        assert!(prepared.is_ok(), "{prepared:?}");
        let before = looks(cage, &outside);
        // Its report says what could not be made; what was made is looked at.
        let _ = restore_tree(snapshot.source, keyset(), snapshot.root, &options(&wishes, &target));
        assert_eq!(looks(cage, &outside), before, "something outside of the target has changed");
        nothing_left_over(&target, wishes.nodes);
    });
}

fn options(wishes: &Wishes<'_>, target: &Path) -> RestoreOptions {
    let overwrite = match wishes.form & 3 {
        0 | 3 => Overwrite::Always,
        1 => Overwrite::IfChanged,
        _ => Overwrite::Never,
    };
    let deletion = || Deletion { saved: vec![Vec::new()], errors: None, keep: Vec::new(), scratch: target.to_owned() };
    let (includes, excludes) = match wishes.pattern.strip_prefix('!') {
        Some(exclude) => (Vec::new(), vec![exclude.to_owned()]),
        None if wishes.pattern.is_empty() => (Vec::new(), Vec::new()),
        None => (vec![wishes.pattern.clone()], Vec::new()),
    };
    RestoreOptions {
        subpath: wishes.subpath.to_vec(),
        include: includes,
        exclude: excludes,
        overwrite,
        in_place: wishes.is(2),
        sparse: wishes.is(3),
        delete: wishes.is(4).then(deletion),
        verify: wishes.is(5),
        owners_by_name: wishes.is(7),
        writers: 1,
        window_bytes: WINDOW_BYTES,
        listener: Listener::new(|_, path| {
            path.split(|&byte| byte == b'/').for_each(formats::check_name);
        }),
        ..RestoreOptions::new(target.to_owned())
    }
}

/// What must not be touched, and links to it where the target is not empty.
fn prepare(outside: &Path, target: &Path, with_links: bool) -> io::Result<()> {
    if !outside.exists() {
        DirBuilder::new().mode(0o755).create(outside)?;
        fs::write(outside.join("precious"), "outside")?;
        DirBuilder::new().mode(0o755).create(outside.join("below"))?;
    }
    DirBuilder::new().mode(0o755).create(target)?;
    if with_links {
        DirBuilder::new().mode(0o755).create(target.join("c"))?;
        fs::write(target.join("c/a"), "old")?;
        fs::write(target.join("a"), "old")?;
        fs::hard_link(target.join("a"), target.join("twin"))?;
        symlink("../outside", target.join("b"))?;
        symlink(outside, target.join("d"))?;
        symlink("../../outside/precious", target.join("c/b"))?;
        symlink("../outside/precious", target.join("e"))?;
    }
    Ok(())
}

/// What is beside the target, with everything that a change would change.
fn looks(cage: &Path, outside: &Path) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for directory in [cage, outside, &outside.join("below")] {
        let Ok(entries) = fs::read_dir(directory) else { continue };
        found.extend(entries.flatten().map(|entry| entry.path().display().to_string()));
    }
    for path in [outside.to_owned(), outside.join("precious"), outside.join("below")] {
        let meta = fs::symlink_metadata(&path);
        found.push(meta.map_or_else(
            |error| error.to_string(),
            |meta| {
                let changed = (meta.ctime(), meta.ctime_nsec(), meta.mtime(), meta.mtime_nsec());
                format!("{} {:o} {} {} {changed:?}", meta.ino(), meta.mode(), meta.nlink(), meta.len())
            },
        ));
    }
    found.sort();
    found
}

/// No temporary name of the restore's own at the top of the target, where the directory of links would be, that is not one
/// in the tree.
fn nothing_left_over(target: &Path, nodes: &[u8]) {
    for entry in fs::read_dir(target).into_iter().flatten().flatten() {
        let name = entry.file_name();
        let in_tree = nodes.windows(name.len().max(1)).any(|window| window == name.as_bytes());
        let is_own = name.as_bytes().starts_with(b".strand-");
        assert!(!is_own || in_tree, "{} is left over", entry.path().display());
    }
}

fn remove(target: &Path) {
    if fs::remove_dir_all(target).is_err() && target.exists() {
        // Directories without permissions stop everybody but root.
        open_up(target);
        let removed = fs::remove_dir_all(target);
        assert!(removed.is_ok(), "{removed:?}");
    }
}

fn open_up(directory: &Path) {
    let _ = fs::set_permissions(directory, PermissionsExt::from_mode(0o700));
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            open_up(&entry.path());
        }
    }
}

/// A disk that is soon full.
struct Bounded(Vec<u8>);

impl Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > ARCHIVE_BYTES_MAX {
            return Err(io::ErrorKind::StorageFull.into());
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The same input as for [`restore`]; bit 0 of the first byte says whether it becomes a tar or a zip archive.
///
/// A tar archive that is complete can be read, and none of its names leaves the directory in which it is unpacked.
pub fn export(data: &[u8]) {
    let Some(wishes) = Wishes::of(data) else { return };
    let Some(snapshot) = Snapshot::of(wishes.nodes) else { return };
    let archive = if wishes.is(0) { Archive::Zip } else { Archive::Tar };
    scratch::with(|directory| {
        let options = ExportOptions { window_bytes: WINDOW_BYTES, ..ExportOptions::new(directory.to_owned()) };
        let mut out = Bounded(Vec::new());
        let found = Export::find(snapshot.source, snapshot.root, wishes.subpath, Some(archive));
        let Ok(exported) = found.and_then(|export| export.write(&mut out, &options)) else { return };
        if archive == Archive::Tar {
            let mut names = 0;
            let mut archive = tar::Archive::new(out.0.as_slice());
            for entry in archive.entries().into_iter().flatten() {
                let Ok(entry) = entry else { panic!("a complete archive cannot be read") };
                entry
                    .path_bytes()
                    .split(|&byte| byte == b'/')
                    .filter(|name| !name.is_empty() && *name != b".")
                    .for_each(formats::check_name);
                assert!(!entry.path_bytes().starts_with(b"/"));
                names += 1;
            }
            assert_eq!(names, exported.entries);
        }
    });
}
