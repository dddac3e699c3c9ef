//! Files in the source that say what to leave out of the directory they are in, and of those below: `.strandignore`, with
//! the patterns of `.gitignore`. A deeper file decides before those above it; within one, the last pattern that matches.
//! Memory: one file's patterns for each directory on the path of the walk that has such a file.

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

/// Longest file that is read.
const BYTES_MAX: u64 = 1 << 20;

/// The patterns of one file.
#[derive(Debug)]
pub struct Rules {
    patterns: Gitignore,
}

impl Rules {
    /// The rules in the file `name` of `dir`, if there is one, and what in it cannot be followed, for people.
    pub fn read(dir: &Arc<Dir>, name: &[u8]) -> (Option<Self>, Vec<String>) {
        match read(dir, name) {
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
            Ok(patterns) => (Some(Self { patterns }), problems),
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

fn read(dir: &Arc<Dir>, name: &[u8]) -> Result<Vec<u8>, Errno> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = open_quietly(dir.fd()?.as_fd(), name, flags)?;
    let meta = stat_fd(file.as_fd())?;
    if !meta.is_file() {
        return Err(Errno::INVAL);
    }
    if meta.size > BYTES_MAX {
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
}
