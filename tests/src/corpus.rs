//! Makes trees that are as unpleasant as real ones: every file type, names that no one expects, holes, hard links,
//! attributes, odd times, paths beyond `PATH_MAX`, and many small files.
//!
//! The same seed gives the same tree, times included, so two of them compare as equal. As root the tree also holds
//! device nodes, foreign owners and privileged attributes; without root these are left out.

use std::ffi::{CStr, CString, OsStr};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT};

use crate::random::Random;

const KIB: usize = 1 << 10;
const MIB: usize = 1 << 20;

/// What to make.
#[derive(Clone, Copy, Debug)]
pub struct Corpus {
    /// Decides every byte, name and time.
    pub seed: u64,
    /// How many small files, besides the special ones (about 120).
    pub files: u64,
    /// Bytes of each big file: one compressible, one random, one a near-copy of the random one.
    pub big_bytes: usize,
    /// Whether a path longer than `PATH_MAX` is among them. Tools that work by whole paths cannot reach it.
    pub beyond_path_max: bool,
}

impl Default for Corpus {
    /// Seed 1, 1,000 small files, big files of 4 MiB.
    fn default() -> Self {
        Self { seed: 1, files: 1000, big_bytes: 4 * MIB, beyond_path_max: true }
    }
}

impl Corpus {
    /// Makes the tree at `root`, which must not exist yet.
    pub fn create(&self, root: &Path) -> io::Result<()> {
        let mut random = Random::new(self.seed);
        fs::create_dir(root)?;
        names(&subdirectory(root, "names")?, &mut random)?;
        empties(&subdirectory(root, "empty")?)?;
        sparse(&subdirectory(root, "sparse")?, &mut random)?;
        links(&subdirectory(root, "links")?)?;
        attributes(&subdirectory(root, "attributes")?, &mut random)?;
        special(&subdirectory(root, "special")?)?;
        times(&subdirectory(root, "times")?)?;
        big(&subdirectory(root, "big")?, self.big_bytes, &mut random)?;
        many(&subdirectory(root, "many")?, self.files, &mut random)?;
        deep(&subdirectory(root, "deep")?, if self.beyond_path_max { 70 } else { 20 })?;
        let root = open_directory(CWD, &CString::new(root.as_os_str().as_bytes())?)?;
        settle_times(&root, &mut random)
    }
}

fn subdirectory(parent: &Path, name: impl AsRef<OsStr>) -> io::Result<PathBuf> {
    let path = parent.join(name.as_ref());
    fs::create_dir(&path)?;
    Ok(path)
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Names that break quoting, sorting, decoding and length assumptions.
fn names(dir: &Path, random: &mut Random) -> io::Result<()> {
    let longest = [b'n'; 255];
    let longest_wide = "ß".repeat(127);
    let odd: [&[u8]; 27] = [
        b"latin1-\xe9\xff",
        b"\xff\xfe",
        b"\xc3",
        b"new\nline",
        b"\n",
        b"tab\tand\rreturn",
        b"quote'\"`",
        b"back\\slash",
        b"-rf",
        b"--",
        b"...",
        b"..hidden",
        b" leading",
        b"trailing ",
        b"trailing.",
        b"*?[glob]{a,b}",
        b"$HOME $(id) !",
        b"%00%n%s",
        b"\x01\x1b[31m\x7f",
        b"con",
        b"a:b",
        "emoji-🦀".as_bytes(),
        "e\u{301}".as_bytes(),
        "é".as_bytes(),
        "\u{202e}txt.exe".as_bytes(),
        &longest,
        longest_wide.as_bytes(),
    ];
    for name in odd {
        fs::write(dir.join(OsStr::from_bytes(name)), random.text(100))?;
    }
    for name in [b"dir\nectory".as_slice(), b"\x80\x81", &[b'd'; 255]] {
        fs::write(subdirectory(dir, OsStr::from_bytes(name))?.join("file"), name)?;
    }
    // Names between which `/` sorts: a walk that sorts whole paths orders these otherwise than one by components.
    fs::write(subdirectory(dir, "sort")?.join("x"), "x")?;
    fs::write(dir.join("sort-"), "-")?;
    fs::write(dir.join("sort0"), "0")
}

fn empties(dir: &Path) -> io::Result<()> {
    fs::write(dir.join("file"), "")?;
    fs::write(dir.join("one-byte"), "\0")?;
    subdirectory(dir, "directory")?;
    subdirectory(&subdirectory(&subdirectory(dir, "a")?, "b")?, "c")?;
    Ok(())
}

/// Holes at the start, in the middle, at the end, everywhere, and a huge one.
fn sparse(dir: &Path, random: &mut Random) -> io::Result<()> {
    let mib = MIB as u64;
    let shapes: [(&str, u64, &[u64]); 7] = [
        ("start", 3 * mib, &[2 * mib]),
        ("middle", 4 * mib, &[0, 3 * mib]),
        ("end", 5 * mib, &[0]),
        ("only-hole", 100 * mib, &[]),
        ("huge", 6 << 30, &[5 << 30]),
        ("odd-length", 1_234_567, &[700_001]),
        ("data-at-the-end", 2 * mib, &[2 * mib - 5]),
    ];
    for (name, len, data) in shapes {
        let file = File::create_new(dir.join(name))?;
        for &offset in data {
            let room = usize::try_from(len - offset).unwrap_or(usize::MAX);
            file.write_all_at(&random.bytes(room.min(50_000)), offset)?;
        }
        file.set_len(len)?;
    }
    let comb = File::create_new(dir.join("comb"))?;
    for tooth in 0..64 {
        comb.write_all_at(&random.bytes(8 * KIB), tooth * 128 * KIB as u64)?;
    }
    // Allocated zeros are not a hole.
    fs::write(dir.join("zeros"), vec![0; MIB])
}

/// Hard links across directories, of several types, and symbolic links of every kind.
fn links(dir: &Path) -> io::Result<()> {
    let other = subdirectory(dir, "other")?;
    fs::write(dir.join("original"), "one inode, four names")?;
    for name in ["a-link", "z-link"] {
        fs::hard_link(dir.join("original"), dir.join(name))?;
    }
    fs::hard_link(dir.join("original"), other.join("link"))?;
    // The same bytes, but not the same inode.
    fs::write(dir.join("not-a-link"), "one inode, four names")?;
    fs::write(dir.join("empty"), "")?;
    fs::hard_link(dir.join("empty"), other.join("empty"))?;

    symlink("original", dir.join("relative"))?;
    symlink("/etc/hostname", dir.join("absolute"))?;
    symlink("nowhere/at/all", dir.join("dangling"))?;
    symlink("other", dir.join("to-directory"))?;
    symlink("itself", dir.join("itself"))?;
    symlink("../../../../../../../../etc/passwd", dir.join("escaping"))?;
    symlink(OsStr::from_bytes(b"\xff\n\xfe"), dir.join("to-bytes"))?;
    symlink("l".repeat(4095), dir.join("longest"))?;
    fs::hard_link(dir.join("relative"), other.join("hard-link-of-a-symlink"))
}

/// Modes, owners, extended attributes, ACLs.
fn attributes(dir: &Path, random: &mut Random) -> io::Result<()> {
    let file = |name: &str| -> io::Result<PathBuf> {
        let path = dir.join(name);
        fs::write(&path, name)?;
        Ok(path)
    };
    let attributed = file("attributed")?;
    for n in 0..20 {
        xattr::set(&attributed, format!("user.attribute-{n}"), &random.bytes(n * 7))?;
    }
    xattr::set(file("attribute-with-odd-name")?, OsStr::from_bytes(b"user.\xff\n"), b"\0binary\0")?;
    xattr::set(file("big-attribute")?, "user.big", &random.bytes(3000))?;
    xattr::set(subdirectory(dir, "attributed-directory")?, "user.on-a-directory", b"yes")?;

    let acl_file = file("acl")?;
    let acl_directory = subdirectory(dir, "acl-directory")?;
    if is_root() {
        for (n, name) in ["owned", "owned-setuid"].into_iter().enumerate() {
            let path = file(name)?;
            lchown(&path, Some(12_345), Some(54_321))?;
            fs::set_permissions(&path, PermissionsExt::from_mode(if n == 0 { 0o640 } else { 0o4755 }))?;
        }
        let link = dir.join("owned-symlink");
        symlink("owned", &link)?;
        lchown(&link, Some(u32::MAX - 1), Some(1))?;
        // Capabilities of revision 2: CAP_NET_BIND_SERVICE, permitted and effective.
        let capability = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        xattr::set(file("capability")?, "security.capability", &capability)?;
        xattr::set(file("trusted")?, "trusted.strandline", b"only root sees this")?;
    }
    for (name, mode) in [("setuid", 0o4755), ("setgid", 0o2755), ("no-permissions", 0), ("all", 0o7777)] {
        fs::set_permissions(file(name)?, PermissionsExt::from_mode(mode))?;
    }
    for (name, mode) in [("sticky-directory", 0o1777), ("setgid-directory", 0o2775), ("private-directory", 0o700)] {
        fs::set_permissions(subdirectory(dir, name)?, PermissionsExt::from_mode(mode))?;
    }
    // Not every file system has ACLs.
    let acl =
        acl(&[(1, 6, u32::MAX), (2, 7, 1001), (4, 4, u32::MAX), (8, 5, 2002), (16, 7, u32::MAX), (32, 0, u32::MAX)]);
    for (path, name) in [
        (&acl_file, "system.posix_acl_access"),
        (&acl_directory, "system.posix_acl_access"),
        (&acl_directory, "system.posix_acl_default"),
    ] {
        match xattr::set(path, name, &acl) {
            Err(error) if error.kind() != io::ErrorKind::Unsupported => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

/// An ACL as the kernel keeps it: version 2, then (tag, permissions, id) each.
fn acl(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend_from_slice(&tag.to_le_bytes());
        bytes.extend_from_slice(&permissions.to_le_bytes());
        bytes.extend_from_slice(&id.to_le_bytes());
    }
    bytes
}

/// Pipes, sockets, and device nodes as root.
fn special(dir: &Path) -> io::Result<()> {
    let dir = open_directory(CWD, &CString::new(dir.as_os_str().as_bytes())?)?;
    let mut nodes = vec![("pipe", FileType::Fifo, 0), ("socket", FileType::Socket, 0)];
    if is_root() {
        nodes.push(("character-device", FileType::CharacterDevice, rustix::fs::makedev(1, 3)));
        nodes.push(("block-device", FileType::BlockDevice, rustix::fs::makedev(7, 250)));
        nodes.push(("big-numbers", FileType::CharacterDevice, rustix::fs::makedev(4000, 1_000_000)));
    }
    for (name, kind, device) in nodes {
        rustix::fs::mknodat(&dir, name, kind, Mode::from_raw_mode(0o640), device)?;
    }
    Ok(())
}

/// Times before 1970, after 2038 and after 2106, on files, directories and links.
fn times(dir: &Path) -> io::Result<()> {
    // Kept by `settle_times`, which reads them off the names.
    for seconds in [-1i64, -86_400 * 365 * 60, 0, 1, i64::from(i32::MAX), i64::from(u32::MAX) + 1, 4_102_444_800] {
        fs::write(dir.join(format!("at{seconds}")), "")?;
        symlink("x", dir.join(format!("at{seconds}.link")))?;
        subdirectory(dir, format!("at{seconds}.directory"))?;
    }
    Ok(())
}

fn big(dir: &Path, len: usize, random: &mut Random) -> io::Result<()> {
    fs::write(dir.join("text"), random.text(len))?;
    let mut bytes = random.bytes(len);
    fs::write(dir.join("random"), &bytes)?;
    fs::write(dir.join("random-copy"), &bytes)?;
    // A near-copy: everything after the first tenth is shifted by a few bytes.
    let at = len / 10;
    bytes.splice(at..at, *b"inserted");
    fs::write(dir.join("random-shifted"), &bytes)
}

/// Small files of many sizes, a hundred in each directory; some are copies of others.
fn many(dir: &Path, files: u64, random: &mut Random) -> io::Result<()> {
    let mut directory = dir.to_owned();
    for n in 0..files {
        if n % 100 == 0 {
            directory = subdirectory(dir, format!("{:04}", n / 100))?;
        }
        let magnitude = random.below(7);
        let len = usize::try_from(random.below(16 << (2 * magnitude))).unwrap_or(0);
        let content = match random.below(10) {
            0 => b"the same in many files\n".repeat(len / 64 + 1),
            1..=3 => random.bytes(len / 4),
            _ => random.text(len),
        };
        fs::write(directory.join(format!("file-{n}")), content)?;
    }
    Ok(())
}

/// A chain of directories with names of 60 bytes, made through descriptors, with a file at the bottom.
fn deep(dir: &Path, levels: u32) -> io::Result<()> {
    let mut at = open_directory(CWD, &CString::new(dir.as_os_str().as_bytes())?)?;
    for level in 0..levels {
        let name = CString::new(format!("{level:_>60}"))?;
        rustix::fs::mkdirat(&at, &name, Mode::from_raw_mode(0o755))?;
        at = open_directory(&at, &name)?;
    }
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(&at, "bottom", flags, Mode::from_raw_mode(0o644))?);
    file.write_all_at(b"nobody reaches this by its path", 0)
}

fn open_directory(parent: impl AsFd, name: &CStr) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(parent, name, flags, Mode::empty())?)
}

/// Gives everything below `dir`, and `dir` itself, an mtime that depends on the seed alone, children first.
fn settle_times(dir: &OwnedFd, random: &mut Random) -> io::Result<()> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)? {
        let entry = entry?;
        if entry.file_name() != c"." && entry.file_name() != c".." {
            names.push(entry.file_name().to_owned());
        }
    }
    names.sort_unstable();
    for name in names {
        let stat = rustix::fs::statat(dir, &name, AtFlags::SYMLINK_NOFOLLOW)?;
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            settle_times(&open_directory(dir, &name)?, random)?;
        }
        set_mtime(dir, &name, seconds_in_name(&name), random)?;
    }
    set_mtime(dir, c".", None, random)
}

/// The time that a name such as `at-1.link` asks for.
fn seconds_in_name(name: &CStr) -> Option<i64> {
    name.to_str().ok()?.strip_prefix("at")?.split('.').next()?.parse().ok()
}

fn set_mtime(dir: &OwnedFd, name: &CStr, seconds: Option<i64>, random: &mut Random) -> io::Result<()> {
    let drawn = 1_500_000_000 + i64::try_from(random.below(200_000_000)).unwrap_or(0);
    let nanoseconds = i64::try_from(random.below(1_000_000_000)).unwrap_or(0);
    let times = Timestamps {
        last_access: Timespec { tv_sec: 0, tv_nsec: UTIME_OMIT },
        last_modification: Timespec { tv_sec: seconds.unwrap_or(drawn), tv_nsec: nanoseconds },
    };
    Ok(rustix::fs::utimensat(dir, name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::{Holes, Options, compare};

    #[test]
    fn the_same_seed_makes_the_same_tree_and_another_seed_does_not() {
        let scratch = tempfile::tempdir().unwrap();
        let tree = |name: &str, seed| {
            let path = scratch.path().join(name);
            Corpus { seed, files: 250, big_bytes: 300_000, ..Corpus::default() }.create(&path).unwrap();
            path
        };
        let (one, same, other) = (tree("one", 3), tree("same", 3), tree("other", 4));
        let found = compare(&one, &same, Options { holes: Holes::Same, ..Options::default() }).unwrap();
        assert!(found.is_same(), "{found}");
        assert!(found.entries > 400, "{found}");
        assert!(found.bytes < 64 << 20, "holes are not read: {found}");
        assert!(compare(&one, &other, Options::default()).unwrap().count > 300);
    }

    #[test]
    fn what_it_promises_is_in_the_tree() {
        let scratch = tempfile::tempdir().unwrap();
        let root = scratch.path().join("tree");
        Corpus { files: 1, big_bytes: 1000, ..Corpus::default() }.create(&root).unwrap();
        let stat = |name: &str| rustix::fs::statat(CWD, root.join(name), AtFlags::SYMLINK_NOFOLLOW).unwrap();
        assert_eq!(stat("times/at-1.link").st_mtime, -1);
        assert_eq!(stat("times/at4102444800.directory").st_mtime, 4_102_444_800);
        assert_eq!(stat("links/other/link").st_nlink, 4);
        assert_eq!(stat("attributes/all").st_mode & 0o7777, 0o7777);
        assert_eq!(stat("sparse/huge").st_size, 6 << 30);
        assert!(stat("sparse/huge").st_blocks < 1000);
        assert_eq!(xattr::list(root.join("attributes/attributed")).unwrap().count(), 20);
        if is_root() {
            assert_eq!(stat("attributes/owned-setuid").st_mode & 0o7777, 0o4755);
            assert_eq!(stat("special/character-device").st_rdev, rustix::fs::makedev(1, 3));
        }
    }
}
