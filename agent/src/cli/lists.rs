//! Files named on the command line that hold paths or patterns, one on each line.

use std::ffi::OsString;
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use globset::GlobBuilder;

/// Longest list, bytes: it is held in memory.
const BYTES_MAX: u64 = 256 << 20;

/// Lists of paths.
#[derive(clap::Args, Debug, Default)]
#[expect(clippy::struct_field_names, reason = "they are the words of the command line")]
pub struct PathLists {
    /// Save what this file lists, one path or pattern (`*`, `?`, `[…]`) on each line; `#` begins a comment; `-` is standard
    /// input; may be repeated
    #[arg(long, value_name = "FILE")]
    pub files_from: Vec<PathBuf>,
    /// The same without patterns, comments and trimming: each line is a path
    #[arg(long, value_name = "FILE")]
    pub files_from_verbatim: Vec<PathBuf>,
    /// The same with paths that end in NUL, as of `find -print0`
    #[arg(long, value_name = "FILE")]
    pub files_from_raw: Vec<PathBuf>,
}

impl PathLists {
    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.files_from.is_empty() && self.files_from_verbatim.is_empty() && self.files_from_raw.is_empty()
    }

    /// The names of the lists.
    pub fn names(&self) -> impl Iterator<Item = &PathBuf> {
        self.files_from.iter().chain(&self.files_from_verbatim).chain(&self.files_from_raw)
    }

    /// The paths in them. A pattern that matches nothing is said in the log.
    pub fn paths(&self) -> anyhow::Result<Vec<PathBuf>> {
        ensure!(self.names().filter(|name| *name == "-").count() < 2, "standard input can be only one list of paths");
        let mut paths = Vec::new();
        for list in &self.files_from {
            for line in read(list)?.split(|byte| *byte == b'\n') {
                let line = line.trim_ascii();
                if !line.is_empty() && !line.starts_with(b"#") {
                    expand(line, &mut paths)?;
                }
            }
        }
        for list in &self.files_from_verbatim {
            let bytes = read(list)?;
            paths.extend(bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).map(to_path));
        }
        for list in &self.files_from_raw {
            let bytes = read(list)?;
            let Some(all) = bytes.strip_suffix(b"\0") else {
                ensure!(
                    bytes.is_empty(),
                    "{}: the last path does not end in NUL: is the list cut short?",
                    list.display()
                );
                continue;
            };
            for path in all.split(|byte| *byte == 0) {
                ensure!(!path.is_empty(), "{}: there is an empty path in it", list.display());
                paths.push(to_path(path));
            }
        }
        Ok(paths)
    }
}

/// The patterns in a file: one on each line, trimmed; empty lines and those that begin with `#` do not count.
pub fn patterns(list: &Path) -> anyhow::Result<Vec<String>> {
    let bytes = read(list)?;
    let text = std::str::from_utf8(&bytes).with_context(|| format!("{} is not UTF-8", list.display()))?;
    let lines = text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#'));
    Ok(lines.map(str::to_owned).collect())
}

fn read(list: &Path) -> anyhow::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let read = if list == Path::new("-") {
        std::io::stdin().lock().take(BYTES_MAX + 1).read_to_end(&mut bytes)
    } else {
        std::fs::File::open(list).and_then(|file| file.take(BYTES_MAX + 1).read_to_end(&mut bytes))
    };
    read.with_context(|| format!("cannot read {}; nothing was saved", list.display()))?;
    if bytes.len() as u64 > BYTES_MAX {
        bail!("{} is longer than {} MiB; nothing was saved", list.display(), BYTES_MAX >> 20);
    }
    Ok(bytes)
}

fn to_path(bytes: &[u8]) -> PathBuf {
    OsString::from_vec(bytes.to_vec()).into()
}

/// Appends what the pattern matches, in order; a path without wildcards as it is.
fn expand(pattern: &[u8], paths: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let has_wildcard = |name: &[u8]| name.iter().any(|byte| b"*?[\\".contains(byte));
    let Some(text) = std::str::from_utf8(pattern).ok().filter(|_| has_wildcard(pattern)) else {
        paths.push(to_path(pattern));
        return Ok(());
    };
    let mut found = vec![PathBuf::from(if text.starts_with('/') { "/" } else { "" })];
    for name in text.split('/').filter(|name| !name.is_empty()) {
        if !has_wildcard(name.as_bytes()) {
            for path in &mut found {
                path.push(name);
            }
            continue;
        }
        // Braces mean nothing in such lists.
        let literal = name.replace('{', "[{]").replace('}', "[}]");
        let glob = GlobBuilder::new(&literal).literal_separator(true).build();
        let matcher = glob.with_context(|| format!("the pattern `{text}` is not valid"))?.compile_matcher();
        found = found.iter().flat_map(|directory| names_in(directory, |name| matcher.is_match(name))).collect();
    }
    found.retain(|path| path.symlink_metadata().is_ok());
    if found.is_empty() {
        tracing::warn!(pattern = text, "nothing matches this pattern of a list of paths");
    }
    paths.extend(found);
    Ok(())
}

fn names_in(directory: &Path, matches: impl Fn(&Path) -> bool) -> Vec<PathBuf> {
    let here = if directory.as_os_str().as_bytes().is_empty() { Path::new(".") } else { directory };
    let entries = std::fs::read_dir(here).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries.map(|entry| entry.file_name()).filter(|name| matches(Path::new(name))).collect();
    names.sort();
    names.into_iter().map(|name| directory.join(name)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_as_restic_reads_them() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a1", "a2", "b", " spaced ", "#hash", "{x}"] {
            std::fs::create_dir(dir.path().join(name)).unwrap();
            std::fs::write(dir.path().join(name).join("f.txt"), "x").unwrap();
        }
        let list = dir.path().join("list");
        let paths = |lists: PathLists| -> Vec<String> {
            let relative = |path: PathBuf| path.strip_prefix(dir.path()).unwrap_or(&path).display().to_string();
            lists.paths().unwrap().into_iter().map(relative).collect()
        };
        let root = dir.path().display();
        std::fs::write(&list, format!("# all\n\n  {root}/a*/f.txt  \n{root}/b\n{root}/none*\n{root}/{{x*\nplain\n"))
            .unwrap();
        let lists = PathLists { files_from: vec![list.clone()], ..PathLists::default() };
        assert_eq!(paths(lists), ["a1/f.txt", "a2/f.txt", "b", "{x}", "plain"]);
        std::fs::write(&list, format!("{root}/#hash\n{root}/ spaced \n\n{root}/a*\n")).unwrap();
        let lists = PathLists { files_from_verbatim: vec![list.clone()], ..PathLists::default() };
        assert_eq!(paths(lists), ["#hash", " spaced ", "a*"]);
        std::fs::write(&list, "x\ny\0z\0").unwrap();
        let lists = || PathLists { files_from_raw: vec![list.clone()], ..PathLists::default() };
        assert_eq!(paths(lists()), ["x\ny", "z"]);
        for bad in ["x\0y", "x\0\0"] {
            std::fs::write(&list, bad).unwrap();
            assert!(lists().paths().is_err(), "{bad:?}");
        }
        std::fs::write(&list, " *.o \n#no\n\n!keep.o\n").unwrap();
        assert_eq!(patterns(&list).unwrap(), ["*.o", "!keep.o"]);
        let twice =
            PathLists { files_from: vec!["-".into()], files_from_raw: vec!["-".into()], ..PathLists::default() };
        assert!(twice.paths().is_err());
    }
}
