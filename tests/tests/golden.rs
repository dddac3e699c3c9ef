//! Repositories that earlier versions wrote must stay readable: `fixtures/golden-v1` is restored and compared with what
//! was saved into it, entry by entry.
//!
//! `cargo test -p strandline-tests --test golden -- --ignored` makes the fixture anew; see `fixtures/README.md` for when
//! that is allowed.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps};
use strandline_tests::random::Random;
use strandline_tests::rig::{Agent, copy_tree};

const PASSWORD: &str = "password";
const EXPECTED: &str = "expected.txt";

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/golden-v1")
}

/// One entry of every type, with fixed contents, modes, owners and times. Needs root for devices and owners.
fn create(root: &Path) -> Result<()> {
    let mut random = Random::new(1);
    fs::create_dir(root)?;
    fs::create_dir(root.join("directory"))?;
    fs::create_dir(root.join("directory/empty"))?;
    fs::write(root.join("empty"), "")?;
    fs::write(root.join("small"), "a small file\n")?;
    fs::write(root.join("text"), random.text(60_000))?;
    fs::write(root.join("directory/random"), random.bytes(90_000))?;
    for n in 0..40 {
        fs::write(root.join(format!("directory/file-{n:02}")), random.text(200 + n * 10))?;
    }
    fs::write(root.join(std::ffi::OsStr::from_bytes(b"bytes-\xff\n")), "its name is not text")?;
    let sparse = File::create(root.join("sparse"))?;
    sparse.write_all_at(b"data behind a hole", 1 << 20)?;
    sparse.set_len(3 << 20)?;
    fs::write(root.join("hard-link-a"), "one inode, two names")?;
    fs::hard_link(root.join("hard-link-a"), root.join("directory/hard-link-b"))?;
    symlink("directory/random", root.join("symlink"))?;
    symlink("/nowhere", root.join("dangling"))?;
    let mode = Mode::from_raw_mode(0o640);
    rustix::fs::mknodat(CWD, root.join("pipe"), FileType::Fifo, mode, 0)?;
    rustix::fs::mknodat(CWD, root.join("socket"), FileType::Socket, mode, 0)?;
    rustix::fs::mknodat(CWD, root.join("device"), FileType::CharacterDevice, mode, rustix::fs::makedev(1, 3))?;
    rustix::fs::mknodat(CWD, root.join("disk"), FileType::BlockDevice, mode, rustix::fs::makedev(7, 99))?;
    xattr::set(root.join("small"), "user.golden", b"\0value\xff")?;
    fs::set_permissions(root.join("small"), PermissionsExt::from_mode(0o4751))?;
    std::os::unix::fs::lchown(root.join("text"), Some(1234), Some(5678))?;
    fs::set_permissions(root.join("directory/empty"), PermissionsExt::from_mode(0o1700))?;
    let mut paths = walk(root)?;
    // Children before their directory: making them moves its time.
    paths.reverse();
    for (n, path) in paths.iter().enumerate() {
        let moment = Timespec { tv_sec: 1_600_000_000 + i64::try_from(n)?, tv_nsec: 123_456_789 };
        let times = Timestamps { last_access: moment, last_modification: moment };
        rustix::fs::utimensat(CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?;
    }
    Ok(())
}

/// `root` and everything below it, in byte order of the paths.
fn walk(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = vec![root.to_owned()];
    if fs::symlink_metadata(root)?.is_dir() {
        let mut entries = fs::read_dir(root)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
        entries.sort();
        for entry in entries {
            found.extend(walk(&entry)?);
        }
    }
    Ok(found)
}

/// A tree as text, one line for each entry: type, mode, owner, time, size, content or target, attributes.
fn describe(root: &Path) -> Result<String> {
    let (mut text, mut inodes) = (String::new(), BTreeMap::new());
    for (n, path) in walk(root)?.iter().enumerate() {
        let metadata = fs::symlink_metadata(path)?;
        let kind = metadata.file_type();
        let first = *inodes.entry(metadata.ino()).or_insert(n);
        let name = path.strip_prefix(root)?.as_os_str().as_bytes().escape_ascii().to_string();
        let (mode, owner) = (metadata.mode() & 0o7777, format!("{}:{}", metadata.uid(), metadata.gid()));
        write!(text, "{name:?} {mode:04o} {owner} {}.{:09}", metadata.mtime(), metadata.mtime_nsec())?;
        if kind.is_file() && first != n {
            write!(text, " linked")?;
        }
        if kind.is_file() {
            write!(text, " file {} {:016x}", metadata.len(), digest(&fs::read(path)?))?;
        } else if kind.is_dir() {
            write!(text, " directory")?;
        } else if kind.is_symlink() {
            write!(text, " symlink {}", fs::read_link(path)?.display())?;
        } else if kind.is_fifo() {
            write!(text, " pipe")?;
        } else if kind.is_socket() {
            write!(text, " socket")?;
        } else {
            let letter = if kind.is_block_device() { 'b' } else { 'c' };
            let device = metadata.rdev();
            write!(text, " device {letter} {}:{}", rustix::fs::major(device), rustix::fs::minor(device))?;
        }
        if !kind.is_symlink() {
            for name in xattr::list(path)? {
                let value = xattr::get(path, &name)?.unwrap_or_default();
                if name.as_bytes().starts_with(b"user.") {
                    write!(text, " {}={}", name.display(), value.escape_ascii())?;
                }
            }
        }
        text.push('\n');
    }
    Ok(text)
}

/// FNV-1a: enough to tell one file of the fixture from another.
fn digest(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

/// What an ordinary user can restore: no devices, everything their own.
fn without_owners(text: &str) -> String {
    let lines = text.lines().filter(|line| !line.contains(" device "));
    lines
        .map(|line| {
            [&line.split(' ').take(2).collect::<Vec<_>>()[..], &line.split(' ').skip(3).collect::<Vec<_>>()]
                .concat()
                .join(" ")
                + "\n"
        })
        .collect()
}

#[test]
fn format_1_as_it_was_first_written_is_restored_entry_by_entry() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let repository = scratch.path().join("repository");
    copy_tree(&fixture().join("repository"), &repository)?;
    let agent = Agent::local(&scratch.path().join("home"), &repository)?;
    let target = scratch.path().join("restored");
    let (password, at) = (fixture().join(PASSWORD), target.to_str().context("not text")?.to_owned());
    let password = password.to_str().context("not text")?;
    let snapshots = agent.run(&["snapshots", "--json", "--password-file", password])?.expect_code(0)?.stdout;
    ensure!(snapshots.lines().count() == 2, "{snapshots}");
    let is_root = rustix::process::geteuid().is_root();
    let options = ["restore", "latest", "--target", &at, "--password-file", password, "--verify"];
    let restored = agent.run(&options)?;
    ensure!(!is_root || restored.status.code() == Some(0), "{restored:?}");
    let root = target.join("golden");
    let (found, expected) = (describe(&root)?, fs::read_to_string(fixture().join(EXPECTED))?);
    if is_root {
        ensure!(found == expected, "found:\n{found}\nexpected:\n{expected}");
    } else {
        ensure!(without_owners(&found) == without_owners(&expected), "found:\n{found}\nexpected:\n{expected}");
    }
    // What is written today goes on from there.
    let more = scratch.path().join("more");
    fs::write(&more, "more")?;
    agent.backup(&more, &["--password-file", password])?;
    Ok(())
}

#[test]
#[ignore = "makes the fixture anew, as root; see fixtures/README.md"]
fn make_the_fixture_of_format_1_anew() -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "only root can make devices");
    let scratch = tempfile::tempdir()?;
    let (home, repository) = (scratch.path().join("home"), scratch.path().join("repository"));
    // A short path of its own, so that the snapshot holds nothing of the machine where it was made.
    let source = Path::new("/golden");
    ensure!(!source.exists(), "/golden exists");
    let made = (|| -> Result<()> {
        create(source)?;
        let agent = Agent::local(&home, &repository)?;
        let password = fixture().join(PASSWORD);
        let password = password.to_str().context("not text")?;
        agent.backup(&source.join("text"), &["--password-file", password, "--host", "golden"])?;
        agent.backup(source, &["--password-file", password, "--host", "golden", "--tag", "golden"])?;
        fs::write(fixture().join(EXPECTED), describe(source)?)?;
        Ok(())
    })();
    fs::remove_dir_all(source)?;
    made?;
    let target = fixture().join("repository");
    if target.exists() {
        fs::remove_dir_all(&target)?;
    }
    copy_tree(&repository, &target)?;
    // Derived, or of the process that ran.
    let mut derived = vec![target.join("LOCK")];
    for entry in fs::read_dir(&target)? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name.as_bytes().starts_with(b"catalog.sqlite")) {
            derived.push(path);
        }
    }
    for entry in fs::read_dir(target.join("storage/local"))? {
        derived.push(entry?.path().join("index"));
    }
    for path in derived.iter().filter(|path| path.exists()) {
        if path.is_dir() { fs::remove_dir_all(path)? } else { fs::remove_file(path)? }
    }
    Ok(())
}
