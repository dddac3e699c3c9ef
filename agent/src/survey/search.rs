//! Searching snapshots for names.
//!
//! Directories without a match are remembered, by their top node, up to [`BARREN_MAX`] of them, and are not read again in
//! later snapshots. Opened tree blocks stay in one cache for all snapshots.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use data_encoding::HEXLOWER;
use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use strandline_messages::ChunkId;
use strandline_messages::format::tree::EntryNode;

use super::{Look, Recent};
use crate::trees::{ChunkSource, DirEntry, Step, TreeError, WalkError};

/// Directories without a match that are remembered: about 25 MiB.
const BARREN_MAX: usize = 400_000;
/// Why a pattern cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("the pattern `{pattern}` is malformed: {why}")]
pub struct PatternError {
    pattern: String,
    why: String,
}

/// Patterns of which one must match: without `/` the name, with `/` the whole path.
#[derive(Debug)]
pub struct Pattern {
    names: GlobSet,
    paths: GlobSet,
}

impl Pattern {
    /// A pattern that begins with `/` is anchored at the snapshot's root, another one with `/` matches at any depth. `*` and `?`
    /// stay within a name, `**` crosses directories.
    pub fn new(patterns: &[String], ignore_case: bool) -> Result<Self, PatternError> {
        let (mut names, mut paths) = (GlobSetBuilder::new(), GlobSetBuilder::new());
        for pattern in patterns {
            let malformed =
                |error: globset::Error| PatternError { pattern: pattern.clone(), why: error.kind().to_string() };
            let glob =
                |text: &str| GlobBuilder::new(text).literal_separator(true).case_insensitive(ignore_case).build();
            let body = if pattern.len() > 1 { pattern.trim_end_matches('/') } else { pattern };
            if let Some(anchored) = body.strip_prefix('/') {
                paths.add(glob(anchored).map_err(malformed)?);
            } else if body.contains('/') {
                paths.add(glob(body).map_err(malformed)?);
                paths.add(glob(&format!("**/{body}")).map_err(malformed)?);
            } else {
                names.add(glob(body).map_err(malformed)?);
            }
        }
        let failed = |error: globset::Error| PatternError { pattern: patterns.join(" "), why: error.to_string() };
        Ok(Self { names: names.build().map_err(failed)?, paths: paths.build().map_err(failed)? })
    }

    fn matches(&self, path: &[u8], name: &[u8]) -> bool {
        self.names.is_match(as_path(name)) || (!self.paths.is_empty() && self.paths.is_match(as_path(path)))
    }
}

fn as_path(path: &[u8]) -> &Path {
    Path::new(OsStr::from_bytes(path))
}

/// What an entry may be, in the letters of `find -type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EntryType {
    /// Regular file.
    File,
    /// Directory.
    Directory,
    /// Symbolic link.
    Symlink,
    /// Named pipe.
    Fifo,
    /// Socket.
    Socket,
    /// Character device.
    CharDevice,
    /// Block device.
    BlockDevice,
}

impl EntryType {
    /// What `node` is.
    pub fn of(node: &EntryNode) -> Self {
        match node {
            EntryNode::File { .. } => Self::File,
            EntryNode::Directory { .. } => Self::Directory,
            EntryNode::Symlink { .. } => Self::Symlink,
            EntryNode::Fifo => Self::Fifo,
            EntryNode::Socket => Self::Socket,
            EntryNode::CharDevice { .. } => Self::CharDevice,
            EntryNode::BlockDevice { .. } => Self::BlockDevice,
        }
    }
}

/// A comparison with a size in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SizeTest {
    /// `+N`
    More(u64),
    /// `-N`
    Less(u64),
    /// `N`
    Exactly(u64),
}

impl SizeTest {
    fn holds(self, size: u64) -> bool {
        match self {
            Self::More(bytes) => size > bytes,
            Self::Less(bytes) => size < bytes,
            Self::Exactly(bytes) => size == bytes,
        }
    }
}

/// A chunk id, or its beginning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefix {
    bytes: Vec<u8>,
    /// The upper half of the byte that follows.
    nibble: Option<u8>,
}

impl Prefix {
    /// From 1 to 64 hexadecimal digits; `None` if it is anything else.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.to_ascii_lowercase();
        let (even, odd) = text.split_at_checked(text.len() / 2 * 2)?;
        let bytes = HEXLOWER.decode(even.as_bytes()).ok()?;
        let nibble = match odd {
            "" => None,
            digit => Some(u8::from_str_radix(digit, 16).ok()?),
        };
        (!text.is_empty() && text.len() <= 2 * ChunkId::LEN).then_some(Self { bytes, nibble })
    }

    /// Whether the id begins so.
    pub fn begins(&self, id: &ChunkId) -> bool {
        let rest = id.as_bytes().strip_prefix(self.bytes.as_slice());
        rest.is_some_and(|rest| self.nibble.is_none_or(|nibble| rest.first().is_some_and(|byte| byte >> 4 == nibble)))
    }
}

/// What is searched for: everything that is given must hold.
#[derive(Debug, Default)]
pub struct Query {
    /// Names or paths.
    pub pattern: Option<Pattern>,
    /// One of these; all if empty.
    pub types: Vec<EntryType>,
    /// Size of a regular file; nothing else has one.
    pub size: Option<SizeTest>,
    /// Modified after this moment, ns since 1970.
    pub newer_ns: Option<i64>,
    /// Modified before this moment.
    pub older_ns: Option<i64>,
    /// A chunk of a file's content, or the top node of a directory.
    pub chunk: Option<Prefix>,
}

/// Something found.
#[derive(Debug)]
pub struct Found<'a> {
    /// Path in the snapshot.
    pub path: &'a [u8],
    /// The entry.
    pub entry: &'a DirEntry,
    /// The chunk that was searched for, and its place in the content stream.
    pub chunk: Option<(ChunkId, u64)>,
}

/// A search through many snapshots.
pub struct Search {
    query: Query,
    pub(super) look: Look,
    barren: Recent<[u8; 32], ()>,
}

/// A directory that the walk is in.
struct Frame {
    key: [u8; 32],
    barren: bool,
}

impl Search {
    /// For `query`.
    pub fn new(query: Query) -> Self {
        Self { query, look: Look::new(), barren: Recent::new(BARREN_MAX) }
    }

    /// Searches the snapshot whose root is `root`. `found` is told what matches, and which parts cannot be read; the first
    /// error that it returns ends the search.
    pub fn snapshot<E>(
        &mut self,
        source: Arc<dyn ChunkSource>,
        root: ChunkId,
        mut found: impl FnMut(Result<Found<'_>, WalkError>) -> Result<(), E>,
    ) -> Result<(), E> {
        self.look.switch.to(source);
        let key = self.key(&root, &[]);
        if self.barren.get(&key).is_some() {
            return Ok(());
        }
        let mut frames = vec![Frame { key, barren: true }];
        let mut walk = self.look.reader.walk(root, &[]);
        while let Some(step) = walk.next() {
            match step {
                Ok((path, Step::Enter(entry))) => {
                    self.test(&path, &entry, &mut frames, &mut found)?;
                    let key = match entry.directory_top() {
                        Ok(Some(top)) => self.key(&top, &path),
                        _ => continue,
                    };
                    if self.barren.get(&key).is_some() {
                        walk.skip_directory();
                    } else {
                        frames.push(Frame { key, barren: true });
                    }
                }
                Ok((path, Step::Entry(entry))) => self.test(&path, &entry, &mut frames, &mut found)?,
                Ok((_, Step::Leave)) => self.leave(&mut frames),
                Err(problem) => {
                    fruitful(&mut frames);
                    found(Err(problem))?;
                }
            }
        }
        self.leave(&mut frames);
        Ok(())
    }

    /// What a directory is remembered by: whether anything in it matches may depend on its path.
    fn key(&self, top: &ChunkId, path: &[u8]) -> [u8; 32] {
        match &self.query.pattern {
            Some(pattern) if !pattern.paths.is_empty() => {
                *blake3::Hasher::new().update(top.as_bytes()).update(path).finalize().as_bytes()
            }
            _ => *top.as_bytes(),
        }
    }

    fn leave(&mut self, frames: &mut Vec<Frame>) {
        match frames.pop() {
            Some(frame) if frame.barren => self.barren.insert(frame.key, ()),
            Some(_) => fruitful(frames),
            None => {}
        }
    }

    fn test<E>(
        &self,
        path: &[u8],
        entry: &DirEntry,
        frames: &mut [Frame],
        found: &mut impl FnMut(Result<Found<'_>, WalkError>) -> Result<(), E>,
    ) -> Result<(), E> {
        if !self.matches(path, entry) {
            return Ok(());
        }
        let Some(prefix) = &self.query.chunk else {
            fruitful(frames);
            return found(Ok(Found { path, entry, chunk: None }));
        };
        match self.chunk(prefix, entry) {
            Ok(None) => Ok(()),
            Ok(chunk) => {
                fruitful(frames);
                found(Ok(Found { path, entry, chunk }))
            }
            Err(error) => {
                fruitful(frames);
                found(Err(WalkError { path: path.to_vec(), error: Box::new(error) }))
            }
        }
    }

    fn matches(&self, path: &[u8], entry: &DirEntry) -> bool {
        let (query, entry) = (&self.query, &entry.entry);
        let size = || match &entry.node {
            EntryNode::File { size, .. } => Some(*size),
            _ => None,
        };
        let modified = entry.mtime.seconds.saturating_mul(1_000_000_000).saturating_add(entry.mtime.nanos.into());
        (query.types.is_empty() || query.types.contains(&EntryType::of(&entry.node)))
            && query.size.is_none_or(|test| size().is_some_and(|size| test.holds(size)))
            && query.newer_ns.is_none_or(|moment| modified > moment)
            && query.older_ns.is_none_or(|moment| modified < moment)
            && query.pattern.as_ref().is_none_or(|pattern| pattern.matches(path, &entry.name))
    }

    /// The first chunk of the entry that begins with `prefix`.
    fn chunk(&self, prefix: &Prefix, entry: &DirEntry) -> Result<Option<(ChunkId, u64)>, TreeError> {
        if let Some(top) = entry.directory_top()? {
            return Ok(prefix.begins(&top).then_some((top, 0)));
        }
        let mut offset = 0u64;
        for piece in self.look.reader.pieces(entry) {
            let (id, bytes) = piece?;
            if prefix.begins(&id) {
                return Ok(Some((id, offset)));
            }
            offset = offset.saturating_add(bytes.into());
        }
        Ok(None)
    }
}

/// Marks the innermost directory; those around it learn it when it is left.
fn fruitful(frames: &mut [Frame]) {
    if let Some(frame) = frames.last_mut() {
        frame.barren = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_without_a_slash_matches_names_and_one_with_a_slash_paths() {
        let matches = |pattern: &str, path: &str| {
            let name = path.rsplit('/').next().unwrap();
            Pattern::new(&[pattern.to_owned()], false).unwrap().matches(path.as_bytes(), name.as_bytes())
        };
        assert!(matches("*.txt", "home/ann/a.txt"));
        assert!(!matches("home*", "home/ann"));
        assert!(matches("/home/*", "home/ann"));
        assert!(!matches("/home/*", "srv/home/ann"));
        assert!(!matches("/home/*", "home/ann/a.txt"));
        assert!(matches("/home/**", "home/ann/a.txt"));
        assert!(matches("ann/*.txt", "home/ann/a.txt"));
        assert!(!matches("*.TXT", "a.txt"));
        assert!(Pattern::new(&["*.TXT".into()], true).unwrap().matches(b"a.txt", b"a.txt"));
        assert!(Pattern::new(&["*".into()], false).unwrap().matches(b"a/\xff", b"\xff"), "names need not be text");
        assert!(Pattern::new(&["a[".into()], false).unwrap_err().to_string().contains("a["));
    }

    #[test]
    fn a_prefix_may_end_within_a_byte() {
        let id = ChunkId([0xab; 32]);
        for good in ["a", "ab", "aba", "ABAB", &"ab".repeat(32)] {
            assert!(Prefix::parse(good).unwrap().begins(&id), "{good}");
        }
        assert!(!Prefix::parse("b").unwrap().begins(&id));
        assert!(!Prefix::parse("abb").unwrap().begins(&id));
        for bad in ["", "x", "ab ", &"ab".repeat(33)] {
            assert!(Prefix::parse(bad).is_none(), "{bad}");
        }
    }
}
