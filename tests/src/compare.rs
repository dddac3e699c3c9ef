//! Compares two trees exactly: the oracle of every restore.
//!
//! Compared: names, type, size, content byte for byte, mode, owner and group, mtime to the nanosecond, extended
//! attributes (ACLs among them, as raw bytes), link targets, device numbers, which names are hard links of one another,
//! and where holes are. Not compared: atime, ctime, inode numbers, sizes of directories.
//!
//! Both trees are walked together, directory by directory in byte order of the names, through descriptors and without
//! following links. Memory: the names of one directory per level, the extents of one file, and the inodes of files with
//! more than one link.

#![expect(
    clippy::unnecessary_debug_formatting,
    reason = "names hold newlines and bytes that are not UTF-8: escaped is meant"
)]

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, OsStr, OsString};
use std::fmt::{self, Write as _};
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, SeekFrom, Stat};

use crate::ranges;

/// Most differences that are remembered; the rest is only counted.
pub const DIFFERENCES_MAX: usize = 100;
const BLOCK: u64 = 4096;
const BUFFER: usize = 256 << 10;

/// How holes are judged, at a granularity of 4 KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holes {
    /// The second tree must have a hole exactly where the first has one.
    Same,
    /// The second tree must have a hole wherever the first has one, and may have more.
    SameOrMore,
    /// Holes do not matter.
    Ignore,
}

/// What is compared besides names, types and contents.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Owner and group. Off when the restoring user is not root.
    pub owner: bool,
    /// Modification times.
    pub times: bool,
    /// Extended attributes.
    pub xattrs: bool,
    /// Holes.
    pub holes: Holes,
    /// Attributes of the two roots themselves.
    pub root: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { owner: true, times: true, xattrs: true, holes: Holes::SameOrMore, root: true }
    }
}

/// One thing that differs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Difference {
    /// Where, relative to the roots.
    pub path: PathBuf,
    /// What, the first tree's value before the second's.
    pub what: String,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.path, self.what)
    }
}

/// The outcome of [`compare`].
#[derive(Clone, Debug, Default)]
pub struct Comparison {
    /// Names that were compared, in either tree.
    pub entries: u64,
    /// Bytes of content that were read from each tree and are the same.
    pub bytes: u64,
    /// How many differences there are.
    pub count: u64,
    /// The first [`DIFFERENCES_MAX`] of them.
    pub differences: Vec<Difference>,
}

impl Comparison {
    /// Whether nothing differs.
    pub fn is_same(&self) -> bool {
        self.count == 0
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for difference in &self.differences {
            writeln!(f, "{difference}")?;
        }
        write!(f, "{} entries, {} bytes compared: {} differences", self.entries, self.bytes, self.count)
    }
}

/// Compares the directories `a` and `b`. An error means that something could not be read, not that it differs.
pub fn compare(a: &Path, b: &Path, options: Options) -> Result<Comparison> {
    let open = |path: &Path| {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        rustix::fs::open(path, flags, Mode::empty())
            .with_context(|| format!("cannot open the directory {}", path.display()))
    };
    let mut walk = Walk { options, ..Walk::default() };
    walk.entry(&open(a)?, &open(b)?, c".")?;
    Ok(walk.found)
}

/// Fails with the differences as its text unless `a` and `b` are the same by the default options.
pub fn ensure_same(a: &Path, b: &Path) -> Result<()> {
    let found = compare(a, b, Options::default())?;
    anyhow::ensure!(found.is_same(), "{} and {} differ:\n{found}", a.display(), b.display());
    Ok(())
}

type Inode = (u64, u64);

#[derive(Default)]
struct Walk {
    options: Options,
    path: PathBuf,
    found: Comparison,
    /// Which inode of the other tree goes with an inode of this one, for files with several links: first → second.
    links: BTreeMap<Inode, Inode>,
    /// Second → first.
    links_back: BTreeMap<Inode, Inode>,
    buffers: Buffers,
}

impl Walk {
    fn differ(&mut self, what: impl Into<String>) {
        self.found.count += 1;
        if self.found.differences.len() < DIFFERENCES_MAX {
            self.found.differences.push(Difference { path: self.path.clone(), what: what.into() });
        }
    }

    fn differ_unless_equal<T: PartialEq + fmt::Debug>(&mut self, what: &str, a: &T, b: &T) {
        if a != b {
            self.differ(format!("{what} {a:?} / {b:?}"));
        }
    }

    /// Compares what is called `name` in both directories, and everything below.
    fn entry(&mut self, a: &OwnedFd, b: &OwnedFd, name: &CStr) -> Result<()> {
        self.found.entries += 1;
        let is_root = name == c".";
        let stat_a = self.stat(a, name)?;
        let stat_b = self.stat(b, name)?;
        let kind = FileType::from_raw_mode(stat_a.st_mode);
        let kind_b = FileType::from_raw_mode(stat_b.st_mode);
        if kind != kind_b {
            self.differ(format!("type {kind:?} / {kind_b:?}"));
            return Ok(());
        }
        if self.options.root || !is_root {
            self.attributes(&stat_a, &stat_b);
            if self.options.xattrs {
                let (xattrs_a, xattrs_b) = (self.xattrs(a, name)?, self.xattrs(b, name)?);
                self.compare_xattrs(&xattrs_a, &xattrs_b);
            }
        }
        match kind {
            FileType::Directory => return self.directory(a, b, name),
            FileType::RegularFile => self.content(a, b, name, &stat_a, &stat_b)?,
            FileType::Symlink => {
                let (target_a, target_b) = (self.target(a, name)?, self.target(b, name)?);
                self.differ_unless_equal("link target", &target_a, &target_b);
            }
            FileType::CharacterDevice | FileType::BlockDevice => {
                let numbers = |stat: &Stat| (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev));
                self.differ_unless_equal("device", &numbers(&stat_a), &numbers(&stat_b));
            }
            _ => {}
        }
        self.hard_links(&stat_a, &stat_b);
        Ok(())
    }

    fn attributes(&mut self, a: &Stat, b: &Stat) {
        self.differ_unless_equal("mode", &Octal(a.st_mode & 0o7777), &Octal(b.st_mode & 0o7777));
        if self.options.owner {
            self.differ_unless_equal("owner", &(a.st_uid, a.st_gid), &(b.st_uid, b.st_gid));
        }
        if self.options.times {
            self.differ_unless_equal("mtime", &(a.st_mtime, a.st_mtime_nsec), &(b.st_mtime, b.st_mtime_nsec));
        }
    }

    fn compare_xattrs(&mut self, a: &Xattrs, b: &Xattrs) {
        for (name, value) in a {
            match b.get(name) {
                None => self.differ(format!("extended attribute {name:?} is missing in the second")),
                Some(other) if other != value => {
                    self.differ(format!("extended attribute {name:?}: {} / {}", hex(value), hex(other)));
                }
                Some(_) => {}
            }
        }
        for name in b.keys().filter(|name| !a.contains_key(*name)) {
            self.differ(format!("extended attribute {name:?} is missing in the first"));
        }
    }

    /// Both sides' names must fall into the same groups: the relation between inodes is one to one.
    fn hard_links(&mut self, a: &Stat, b: &Stat) {
        if a.st_nlink < 2 && b.st_nlink < 2 {
            return;
        }
        let (inode_a, inode_b) = ((a.st_dev, a.st_ino), (b.st_dev, b.st_ino));
        let expected_b = *self.links.entry(inode_a).or_insert(inode_b);
        let expected_a = *self.links_back.entry(inode_b).or_insert(inode_a);
        if expected_b != inode_b {
            self.differ("hard link: one file with an earlier name in the first, a file of its own in the second");
        } else if expected_a != inode_a {
            self.differ("hard link: a file of its own in the first, one file with an earlier name in the second");
        }
    }

    fn directory(&mut self, a: &OwnedFd, b: &OwnedFd, name: &CStr) -> Result<()> {
        let a = self.open(a, name, OFlags::DIRECTORY)?;
        let b = self.open(b, name, OFlags::DIRECTORY)?;
        let mut names_a = self.names(&a)?.into_iter().peekable();
        let mut names_b = self.names(&b)?.into_iter().peekable();
        loop {
            let (only_a, only_b) = match (names_a.peek(), names_b.peek()) {
                (None, None) => return Ok(()),
                (Some(in_a), Some(in_b)) => (in_a < in_b, in_b < in_a),
                (in_a, in_b) => (in_a.is_some(), in_b.is_some()),
            };
            let next_a = if only_b { None } else { names_a.next() };
            let next_b = if only_a { None } else { names_b.next() };
            let Some(name) = next_a.or(next_b) else { return Ok(()) };
            self.path.push(OsStr::from_bytes(name.as_bytes()));
            if only_a || only_b {
                self.found.entries += 1;
                self.differ(if only_a { "only in the first" } else { "only in the second" });
            } else {
                self.entry(&a, &b, &name)?;
            }
            self.path.pop();
        }
    }

    fn names(&self, directory: &OwnedFd) -> Result<Vec<CString>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(directory).with_context(|| self.cannot("list"))? {
            let entry = entry.with_context(|| self.cannot("list"))?;
            if entry.file_name() != c"." && entry.file_name() != c".." {
                names.push(entry.file_name().to_owned());
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn content(&mut self, a: &OwnedFd, b: &OwnedFd, name: &CStr, stat_a: &Stat, stat_b: &Stat) -> Result<()> {
        if stat_a.st_size != stat_b.st_size {
            self.differ(format!("size {} / {}", stat_a.st_size, stat_b.st_size));
            return Ok(());
        }
        let size = u64::try_from(stat_a.st_size).unwrap_or(0);
        if size == 0 {
            return Ok(());
        }
        let a = File::from(self.open(a, name, OFlags::empty())?);
        let b = File::from(self.open(b, name, OFlags::empty())?);
        let sparse = |stat: &Stat| stat.st_blocks.saturating_mul(512) < stat.st_size;
        let whole = vec![Range { start: 0, end: size }];
        let (data_a, data_b) = if sparse(stat_a) || sparse(stat_b) {
            (self.extents(&a, size)?, self.extents(&b, size)?)
        } else {
            (whole.clone(), whole)
        };
        self.compare_holes(&data_a, &data_b);
        for range in ranges::union(&data_a, &data_b) {
            let different =
                self.buffers.first_difference(&a, &b, range.clone()).with_context(|| self.cannot("read"))?;
            if let Some(at) = different {
                self.differ(format!("content differs from byte {at} on"));
                break;
            }
            self.found.bytes += range.end - range.start;
        }
        Ok(())
    }

    fn compare_holes(&mut self, data_a: &[Range<u64>], data_b: &[Range<u64>]) {
        if self.options.holes == Holes::Ignore {
            return;
        }
        let lost = ranges::subtract(data_b, data_a);
        if !lost.is_empty() {
            self.differ(format!("holes of the first are allocated in the second: {}", ranges::text(&lost)));
        }
        let gained = ranges::subtract(data_a, data_b);
        if self.options.holes == Holes::Same && !gained.is_empty() {
            self.differ(format!("the second has holes where the first is allocated: {}", ranges::text(&gained)));
        }
    }

    /// Where `file` is allocated, widened to whole blocks of 4 KiB but not beyond `size`.
    fn extents(&self, file: &File, size: u64) -> Result<Vec<Range<u64>>> {
        let mut extents: Vec<Range<u64>> = Vec::new();
        let mut at = 0;
        while at < size {
            let start = match rustix::fs::seek(file, SeekFrom::Data(at)) {
                Ok(start) => start,
                Err(rustix::io::Errno::NXIO) => break,
                Err(error) => return Err(error).with_context(|| self.cannot("find the holes of")),
            };
            at = rustix::fs::seek(file, SeekFrom::Hole(start)).with_context(|| self.cannot("find the holes of"))?;
            let (start, stop) = (start / BLOCK * BLOCK, at.div_ceil(BLOCK).saturating_mul(BLOCK).min(size));
            match extents.last_mut() {
                Some(last) if last.end >= start => last.end = last.end.max(stop),
                _ => extents.push(start..stop),
            }
        }
        Ok(extents)
    }

    fn cannot(&self, what: &str) -> String {
        format!("cannot {what} {:?}", self.path)
    }

    fn stat(&self, directory: &OwnedFd, name: &CStr) -> Result<Stat> {
        rustix::fs::statat(directory, name, AtFlags::SYMLINK_NOFOLLOW).with_context(|| self.cannot("look at"))
    }

    fn open(&self, directory: &OwnedFd, name: &CStr, flags: OFlags) -> Result<OwnedFd> {
        let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        rustix::fs::openat(directory, name, flags, Mode::empty()).with_context(|| self.cannot("open"))
    }

    fn target(&self, directory: &OwnedFd, name: &CStr) -> Result<CString> {
        rustix::fs::readlinkat(directory, name, Vec::new()).with_context(|| self.cannot("read the link"))
    }

    fn xattrs(&self, directory: &OwnedFd, name: &CStr) -> Result<Xattrs> {
        // The only way to the attributes of any kind of file relative to a descriptor.
        let mut path = format!("/proc/self/fd/{}/", directory.as_fd().as_raw_fd()).into_bytes();
        path.extend_from_slice(name.to_bytes());
        let path = PathBuf::from(OsString::from_vec(path));
        let mut xattrs = BTreeMap::new();
        match xattr::list(&path) {
            Ok(names) => {
                for name in names {
                    let value = xattr::get(&path, &name).with_context(|| self.cannot("read the attributes of"))?;
                    xattrs.insert(name, value.unwrap_or_default());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {}
            Err(error) => return Err(error).with_context(|| self.cannot("list the attributes of")),
        }
        Ok(xattrs)
    }
}

type Xattrs = BTreeMap<OsString, Vec<u8>>;

#[derive(PartialEq)]
struct Octal(u32);

impl fmt::Debug for Octal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

/// For content; made once, because a fresh pair for each small file costs more than reading it.
struct Buffers(Vec<u8>, Vec<u8>);

impl Default for Buffers {
    fn default() -> Self {
        Self(vec![0; BUFFER], vec![0; BUFFER])
    }
}

impl Buffers {
    /// Where in `range` the two files first differ. A file that ends inside the range is an error: it was changed
    /// while it was being compared.
    fn first_difference(&mut self, a: &File, b: &File, range: Range<u64>) -> io::Result<Option<u64>> {
        let mut at = range.start;
        while at < range.end {
            let want = usize::try_from(range.end - at).unwrap_or(BUFFER).min(BUFFER);
            let part_a = fill(a, &mut self.0, at, want)?;
            let part_b = fill(b, &mut self.1, at, want)?;
            if part_a.len() < want || part_b.len() < want {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            if part_a != part_b {
                let same = part_a.iter().zip(part_b).take_while(|(x, y)| x == y).count();
                return Ok(Some(at + same as u64));
            }
            at += want as u64;
        }
        Ok(None)
    }
}

/// Reads `want` bytes at `at`, fewer only at the end of the file.
fn fill<'a>(file: &File, buffer: &'a mut [u8], at: u64, want: usize) -> io::Result<&'a [u8]> {
    let mut done = 0;
    while let Some(rest) = buffer.get_mut(done..want).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, at + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(buffer.get(..done).unwrap_or_default())
}

fn hex(bytes: &[u8]) -> String {
    let shown = bytes.iter().take(32).fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    });
    if bytes.len() > 32 { format!("{shown}… ({} bytes)", bytes.len()) } else { shown }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    /// Two equal trees, then one change to the second, and what must be said about it.
    fn after(change: impl FnOnce(&Path)) -> Vec<String> {
        let scratch = tempfile::tempdir().unwrap();
        let trees = [scratch.path().join("a"), scratch.path().join("b")];
        for tree in &trees {
            std::fs::create_dir_all(tree.join("dir")).unwrap();
            std::fs::write(tree.join("dir/file"), "content").unwrap();
            std::fs::hard_link(tree.join("dir/file"), tree.join("dir/link")).unwrap();
            std::fs::write(tree.join("other"), "content").unwrap();
            symlink("dir/file", tree.join("symlink")).unwrap();
            let file = File::create(tree.join("sparse")).unwrap();
            file.set_len(1 << 20).unwrap();
            file.write_all_at(b"x", 300_000).unwrap();
            for name in ["dir/file", "dir", "other", "sparse", "."] {
                File::open(tree.join(name)).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
            }
        }
        let options = Options { times: false, ..Options::default() };
        let same = compare(&trees[0], &trees[1], options).unwrap();
        assert!(same.is_same(), "{same}");
        assert_eq!(same.entries, 7);
        change(&trees[1]);
        compare(&trees[0], &trees[1], options).unwrap().differences.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn each_kind_of_difference_is_found_and_named() {
        let contains = |change: fn(&Path), expected: &[&str]| {
            let found = after(change);
            assert_eq!(found.len(), expected.len(), "{found:?}");
            for (found, expected) in found.iter().zip(expected) {
                assert!(found.contains(expected), "{found} does not say {expected}");
            }
        };
        contains(|b| std::fs::write(b.join("other"), "contend").unwrap(), &["\"other\": content differs from byte 6"]);
        contains(|b| std::fs::write(b.join("other"), "").unwrap(), &["size 7 / 0"]);
        contains(|b| std::fs::remove_file(b.join("other")).unwrap(), &["only in the first"]);
        contains(|b| std::fs::write(b.join("z"), "").unwrap(), &["\"z\": only in the second"]);
        contains(
            |b| std::fs::set_permissions(b.join("other"), PermissionsExt::from_mode(0o4711)).unwrap(),
            &["mode 0644 / 4711"],
        );
        contains(
            |b| {
                std::fs::remove_file(b.join("symlink")).unwrap();
                symlink("elsewhere", b.join("symlink")).unwrap();
            },
            &["link target"],
        );
        contains(
            |b| {
                std::fs::remove_file(b.join("symlink")).unwrap();
                std::fs::create_dir(b.join("symlink")).unwrap();
            },
            &["type Symlink / Directory"],
        );
        contains(
            |b| {
                std::fs::remove_file(b.join("dir/link")).unwrap();
                std::fs::write(b.join("dir/link"), "content").unwrap();
            },
            &["\"dir/link\": hard link: one file with an earlier name in the first"],
        );
        contains(
            |b| {
                std::fs::remove_file(b.join("other")).unwrap();
                std::fs::hard_link(b.join("dir/file"), b.join("other")).unwrap();
            },
            &["\"other\": hard link: a file of its own in the first"],
        );
        contains(|b| xattr::set(b.join("other"), "user.x", b"1").unwrap(), &["\"user.x\" is missing in the first"]);
        contains(
            |b| {
                let file = File::options().write(true).open(b.join("sparse")).unwrap();
                file.write_all_at(&[0; 5000], 8192).unwrap();
            },
            &["\"sparse\": holes of the first are allocated in the second: 8192..16384 (1 ranges, 8192 bytes)"],
        );
    }

    #[test]
    fn mtimes_are_compared_to_the_nanosecond() {
        let scratch = tempfile::tempdir().unwrap();
        for (tree, ns) in [("a", 1), ("b", 2)] {
            let tree = scratch.path().join(tree);
            std::fs::create_dir(&tree).unwrap();
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_nanos(ns);
            File::open(&tree).unwrap().set_modified(time).unwrap();
        }
        let found = compare(&scratch.path().join("a"), &scratch.path().join("b"), Options::default()).unwrap();
        assert_eq!(found.differences[0].what, "mtime (0, 1) / (0, 2)");
    }

    #[test]
    fn differences_are_bounded_and_still_counted() {
        let scratch = tempfile::tempdir().unwrap();
        let (a, b) = (scratch.path().join("a"), scratch.path().join("b"));
        std::fs::create_dir(&a).unwrap();
        std::fs::create_dir(&b).unwrap();
        for n in 0..250 {
            std::fs::write(a.join(n.to_string()), "").unwrap();
        }
        let found = compare(&a, &b, Options { times: false, ..Options::default() }).unwrap();
        assert_eq!((found.count, found.differences.len()), (250, DIFFERENCES_MAX));
        assert!(ensure_same(&a, &b).is_err());
    }
}
