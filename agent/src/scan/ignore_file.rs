//! Files in the source that say what to leave out of the directory they are in, and of those below: `.strandignore`, with
//! the patterns of `.gitignore`. A deeper file decides before those above it; within one, the last pattern that matches.
//! Memory: the patterns of the files on the path of the walk, which is why they are bounded: compiled they take up to a
//! thousand times as much, and whoever owns the source need not be whoever saves it.

use std::ffi::OsStr;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use ignore::Match;
use ignore::gitignore::{Gitignore, GitignoreBuilder};
use rustix::fs::OFlags;
use rustix::io::Errno;

use super::dir::{Dir, open_quietly};
use super::meta::stat_fd;

/// Longest file that is read, bytes.
const BYTES_MAX: u64 = 64 << 10;
/// Most bytes of such files on one path.
const PATH_BYTES_MAX: u64 = 4 * BYTES_MAX;

/// The patterns of one file.
#[derive(Debug)]
pub struct Rules {
    patterns: Gitignore,
    /// Of the file, bytes.
    bytes: u64,
}

impl Rules {
    /// The rules in the file `name` of `dir`, if there is one, and what in it cannot be followed, for people. `above` are
    /// the rules of the directories on the way.
    pub fn read<'a>(dir: &Arc<Dir>, name: &[u8], above: impl Iterator<Item = &'a Self>) -> (Option<Self>, Vec<String>) {
        let taken: u64 = above.map(|rules| rules.bytes).sum();
        match read(dir, name, PATH_BYTES_MAX.saturating_sub(taken).min(BYTES_MAX)) {
            Ok(bytes) => Self::parse(&bytes),
            Err(Errno::NOENT) => (None, Vec::new()),
            Err(error) => (None, vec![format!("nothing is left out because of it: it cannot be used: {error}")]),
        }
    }

    /// The rules that `bytes` are, and what in them cannot be followed, for people.
    pub fn parse(bytes: &[u8]) -> (Option<Self>, Vec<String>) {
        let mut builder = GitignoreBuilder::new("");
        let mut problems = Vec::new();
        for (number, line) in String::from_utf8_lossy(bytes).lines().enumerate() {
            if let Err(error) = builder.add_line(None, line) {
                problems.push(format!("line {} leaves nothing out: {error}", number + 1));
            }
        }
        match builder.build() {
            Ok(patterns) => (Some(Self { patterns, bytes: bytes.len() as u64 }), problems),
            Err(error) => (None, vec![format!("nothing is left out because of it: {error}")]),
        }
    }

    /// Whether `path`, relative to the directory of the file, is left out; `None`: these rules say nothing about it.
    pub fn decide(&self, path: &[u8], is_dir: bool) -> Option<bool> {
        match self.patterns.matched(Path::new(OsStr::from_bytes(path)), is_dir) {
            Match::None => None,
            Match::Ignore(_) => Some(true),
            Match::Whitelist(_) => Some(false),
        }
    }
}

fn read(dir: &Arc<Dir>, name: &[u8], bytes_max: u64) -> Result<Vec<u8>, Errno> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = open_quietly(dir.fd()?.as_fd(), name, flags)?;
    let meta = stat_fd(file.as_fd())?;
    if !meta.is_file() {
        return Err(Errno::INVAL);
    }
    if meta.size > bytes_max {
        return Err(Errno::FBIG);
    }
    let mut bytes = vec![0; usize::try_from(meta.size).map_err(|_| Errno::FBIG)?];
    let mut done = 0;
    while let Some(rest) = bytes.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match rustix::io::pread(&file, rest, done as u64) {
            Ok(0) => break,
            Ok(read) => done += read,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    bytes.truncate(done);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::super::dir::DirPool;
    use super::*;

    #[test]
    fn patterns_mean_what_they_mean_to_git() {
        let (rules, problems) = Rules::parse(b"# comment\n*.o\n!keep.o\n/top\nbuild/\ndoc/*.txt\n\\#odd\n\xff\n");
        assert_eq!(problems, Vec::<String>::new());
        let rules = rules.unwrap();
        for (path, is_dir, expected) in [
            ("a.o", false, Some(true)),
            ("x/y/a.o", false, Some(true)),
            ("keep.o", false, Some(false)),
            ("top", false, Some(true)),
            ("x/top", false, None),
            ("build", true, Some(true)),
            ("build", false, None),
            ("doc/a.txt", false, Some(true)),
            ("doc/x/a.txt", false, None),
            ("x/doc/a.txt", false, None),
            ("#odd", false, Some(true)),
        ] {
            assert_eq!(rules.decide(path.as_bytes(), is_dir), expected, "{path}");
        }
        assert_eq!(rules.decide(b"\xff\xfe.o", false), Some(true));
    }

    #[test]
    fn s43_files_that_are_too_long_or_too_many_on_one_path_leave_nothing_out_and_say_so() {
        let scratch = tempfile::tempdir().unwrap();
        let (mut dir, _) = Dir::root(&DirPool::new(8)).unwrap();
        for name in scratch.path().components().skip(1) {
            dir = Dir::open(&dir, name.as_os_str().as_bytes(), true).unwrap().0;
        }
        let write = |bytes: u64| {
            let text = format!("*.o\n#{}\n", "x".repeat(usize::try_from(bytes).unwrap() - 6));
            std::fs::write(scratch.path().join("rules"), text).unwrap();
        };
        write(BYTES_MAX);
        let mut above = Vec::new();
        for _ in 0..PATH_BYTES_MAX / BYTES_MAX {
            let (rules, problems) = Rules::read(&dir, b"rules", above.iter());
            assert_eq!(problems, Vec::<String>::new());
            above.push(rules.unwrap());
        }
        for (bytes, above) in [(7, above.as_slice()), (BYTES_MAX + 1, &[])] {
            write(bytes);
            let (rules, problems) = Rules::read(&dir, b"rules", above.iter());
            assert!(rules.is_none() && problems.len() == 1, "{problems:?}");
        }
    }
}
