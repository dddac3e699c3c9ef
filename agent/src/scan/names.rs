//! The names of one directory in bytewise order, with memory that does not depend on how many there are.
//!
//! Up to a limit the names are sorted in memory. Beyond it, sorted runs go to an unlinked temporary file and are merged
//! while they are consumed. Runs are read back through small buffers that share `MERGE_BYTES`.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::fs::RawDir;

/// Bytes that all read-back buffers of one merge share (but at least [`RUN_BUFFER_BYTES_MIN`] each).
const MERGE_BYTES: usize = 4 << 20;
const RUN_BUFFER_BYTES_MIN: usize = 1024;
/// Once this many names are in memory in all open directories together, runs become short.
const NAMES_IN_MEMORY_MAX: usize = 1 << 20;
const SHORT_RUN: usize = 1024;

/// A file name.
pub type Name = Box<[u8]>;

/// Where and when long lists of names go to disk.
#[derive(Clone, Debug)]
pub struct SpillPolicy {
    /// Directory for temporary files.
    pub directory: PathBuf,
    /// Names of one directory that are sorted in memory.
    pub names_max: usize,
    in_memory: Arc<AtomicUsize>,
}

impl SpillPolicy {
    /// Spills to `directory` what exceeds `names_max` names (65,536 is right outside of tests).
    pub fn new(directory: PathBuf, names_max: usize) -> Self {
        Self { directory, names_max: names_max.max(2), in_memory: Arc::default() }
    }

    fn run_names_max(&self) -> usize {
        match self.in_memory.load(Ordering::Relaxed) {
            n if n > NAMES_IN_MEMORY_MAX => self.names_max.min(SHORT_RUN),
            _ => self.names_max,
        }
    }
}

/// The names, each once, ascending.
#[derive(Debug)]
pub struct Names {
    source: Source,
    policy: SpillPolicy,
    counted: usize,
}

#[derive(Debug)]
enum Source {
    Memory(std::vec::IntoIter<Name>),
    Spilled(Merge),
}

impl Drop for Names {
    fn drop(&mut self) {
        self.policy.in_memory.fetch_sub(self.counted, Ordering::Relaxed);
    }
}

impl Names {
    /// Names that are known already. Sorts them.
    pub fn from_vec(mut names: Vec<Name>, policy: &SpillPolicy) -> Self {
        names.sort_unstable();
        names.dedup();
        let counted = names.len();
        policy.in_memory.fetch_add(counted, Ordering::Relaxed);
        Self { source: Source::Memory(names.into_iter()), policy: policy.clone(), counted }
    }

    /// All names in the open directory `fd` except `.` and `..`.
    pub fn read(fd: BorrowedFd<'_>, policy: &SpillPolicy) -> io::Result<Self> {
        let mut buffer = Vec::with_capacity(64 << 10);
        let mut entries = RawDir::new(fd, buffer.spare_capacity_mut());
        let mut names: Vec<Name> = Vec::new();
        let mut spill: Option<Spill> = None;
        let limit = policy.run_names_max();
        while let Some(entry) = entries.next() {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if name == b"." || name == b".." {
                continue;
            }
            if names.len() >= limit {
                let spill = match &mut spill {
                    Some(spill) => spill,
                    empty => empty.insert(Spill::new(policy)?),
                };
                spill.write_run(&mut names)?;
            }
            names.push(name.into());
        }
        match spill {
            None => Ok(Self::from_vec(names, policy)),
            Some(mut spill) => {
                spill.write_run(&mut names)?;
                Ok(Self { source: Source::Spilled(spill.merge()?), policy: policy.clone(), counted: 0 })
            }
        }
    }

    /// Whether the names went to disk.
    pub fn spilled(&self) -> bool {
        matches!(self.source, Source::Spilled(_))
    }

    /// The next `count` names, fewer only at the end.
    pub fn next_batch(&mut self, count: usize) -> io::Result<Vec<Name>> {
        match &mut self.source {
            Source::Memory(names) => Ok(names.take(count).collect()),
            Source::Spilled(merge) => {
                let mut batch = Vec::with_capacity(count);
                while batch.len() < count {
                    match merge.next()? {
                        Some(name) => batch.push(name),
                        None => break,
                    }
                }
                Ok(batch)
            }
        }
    }
}

#[derive(Debug)]
struct Spill {
    file: File,
    offset: u64,
    runs: Vec<(u64, u64)>,
}

impl Spill {
    fn new(policy: &SpillPolicy) -> io::Result<Self> {
        Ok(Self { file: tempfile::tempfile_in(&policy.directory)?, offset: 0, runs: Vec::new() })
    }

    // A run is `length u8 ‖ name` repeated, ascending.
    fn write_run(&mut self, names: &mut Vec<Name>) -> io::Result<()> {
        names.sort_unstable();
        let mut bytes = Vec::with_capacity(names.iter().map(|name| name.len() + 1).sum());
        for name in names.drain(..) {
            let length = u8::try_from(name.len()).map_err(|_| io::Error::other("a file name exceeds 255 bytes"))?;
            bytes.push(length);
            bytes.extend_from_slice(&name);
        }
        self.file.write_all(&bytes)?;
        let end = self.offset + bytes.len() as u64;
        self.runs.push((self.offset, end));
        self.offset = end;
        Ok(())
    }

    fn merge(self) -> io::Result<Merge> {
        let buffer_bytes = (MERGE_BYTES / self.runs.len().max(1)).max(RUN_BUFFER_BYTES_MIN);
        let mut merge =
            Merge { file: self.file, runs: Vec::new(), heap: BinaryHeap::new(), buffer_bytes, last: Name::default() };
        for (index, (offset, end)) in self.runs.into_iter().enumerate() {
            merge.runs.push(Run { offset, end, buffer: Vec::new(), position: 0 });
            merge.advance(index)?;
        }
        Ok(merge)
    }
}

#[derive(Debug)]
struct Run {
    offset: u64,
    end: u64,
    buffer: Vec<u8>,
    position: usize,
}

#[derive(Debug)]
struct Merge {
    file: File,
    runs: Vec<Run>,
    heap: BinaryHeap<Reverse<(Name, usize)>>,
    buffer_bytes: usize,
    last: Name,
}

impl Merge {
    fn advance(&mut self, index: usize) -> io::Result<()> {
        let Some(run) = self.runs.get_mut(index) else { return Ok(()) };
        if let Some(name) = run.next(&self.file, self.buffer_bytes)? {
            self.heap.push(Reverse((name, index)));
        }
        Ok(())
    }

    // A directory that changes while it is listed may show one name twice.
    fn next(&mut self) -> io::Result<Option<Name>> {
        while let Some(Reverse((name, index))) = self.heap.pop() {
            self.advance(index)?;
            if name != self.last {
                self.last.clone_from(&name);
                return Ok(Some(name));
            }
        }
        Ok(None)
    }
}

impl Run {
    fn next(&mut self, file: &File, buffer_bytes: usize) -> io::Result<Option<Name>> {
        loop {
            let rest = self.buffer.get(self.position..).unwrap_or_default();
            if let Some((&length, tail)) = rest.split_first()
                && let Some(name) = tail.get(..usize::from(length))
            {
                self.position += 1 + name.len();
                return Ok(Some(name.into()));
            }
            if self.offset >= self.end {
                return Ok(None);
            }
            self.buffer.drain(..self.position.min(self.buffer.len()));
            self.position = 0;
            let kept = self.buffer.len();
            let wanted = usize::try_from(self.end - self.offset).unwrap_or(usize::MAX).min(buffer_bytes);
            self.buffer.resize(kept + wanted, 0);
            let fresh = self.buffer.get_mut(kept..).unwrap_or_default();
            file.read_exact_at(fresh, self.offset)?;
            self.offset += wanted as u64;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn a_huge_directory_spills_and_still_comes_in_order_once() {
        let temp = tempfile::tempdir().unwrap();
        let state = tempfile::tempdir().unwrap();
        let mut wanted: Vec<Name> = (0..1000u32).map(|i| format!("{:x}", i * 7919).into_bytes().into()).collect();
        for name in &wanted {
            std::fs::write(temp.path().join(std::str::from_utf8(name).unwrap()), b"").unwrap();
        }
        wanted.sort_unstable();
        for (limit, spills) in [(7, true), (999, true), (1000, false)] {
            let policy = SpillPolicy::new(state.path().to_owned(), limit);
            let dir = File::open(temp.path()).unwrap();
            let mut names = Names::read(dir.as_fd(), &policy).unwrap();
            assert_eq!(names.spilled(), spills, "{limit}");
            let mut got = Vec::new();
            loop {
                let batch = names.next_batch(13).unwrap();
                if batch.is_empty() {
                    break;
                }
                got.extend(batch);
            }
            assert_eq!(got, wanted);
            drop(names);
            assert_eq!(policy.in_memory.load(Ordering::Relaxed), 0);
        }
        assert_eq!(std::fs::read_dir(state.path()).unwrap().count(), 0);
    }
}
