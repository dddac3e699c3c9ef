//! Sorting more than fits into memory: pairs of a 32-byte key and a number, ascending.
//!
//! Memory: [`RECORDS_MAX`] pairs (10 MiB) while they come in; a buffer of 64 KiB for each of at most [`RUNS_MAX`] sorted runs
//! while they are merged. Runs are unlinked temporary files of 40 bytes a pair.

use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::PathBuf;

/// Pairs in memory.
const RECORDS_MAX: usize = 262_144;
/// Runs on disk; when there are more, they are merged into one.
const RUNS_MAX: usize = 64;
const BUFFER_BYTES: usize = 64 << 10;

type Record = ([u8; 32], u64);

/// Takes pairs in any order.
#[derive(Debug)]
pub struct Sorter {
    directory: PathBuf,
    distinct: bool,
    records_max: usize,
    records: Vec<Record>,
    runs: Vec<File>,
}

impl Sorter {
    /// Keeps every pair. Temporary files are made in `directory`, which must exist when there is much to sort.
    pub fn all(directory: PathBuf) -> Self {
        Self { directory, distinct: false, records_max: RECORDS_MAX, records: Vec::new(), runs: Vec::new() }
    }

    /// Keeps of equal pairs one.
    pub fn distinct(directory: PathBuf) -> Self {
        Self { distinct: true, ..Self::all(directory) }
    }

    /// One more pair.
    pub fn push(&mut self, key: [u8; 32], value: u64) -> io::Result<()> {
        if self.records.len() >= self.records_max {
            self.sort();
            // Much may be equal: only what is left after that is worth a run.
            if !self.distinct || self.records.len() > self.records_max / 2 {
                self.spill()?;
            }
        }
        self.records.push((key, value));
        Ok(())
    }

    fn sort(&mut self) {
        self.records.sort_unstable();
        if self.distinct {
            self.records.dedup();
        }
    }

    fn spill(&mut self) -> io::Result<()> {
        let mut run = BufWriter::new(tempfile::tempfile_in(&self.directory)?);
        for record in self.records.drain(..) {
            write(&mut run, &record)?;
        }
        self.runs.push(rewound(run)?);
        if self.runs.len() > RUNS_MAX {
            let runs = std::mem::take(&mut self.runs);
            let mut merged = BufWriter::new(tempfile::tempfile_in(&self.directory)?);
            Merge::new(Vec::new(), runs, self.distinct)?.try_for_each(|record| write(&mut merged, &record?))?;
            self.runs.push(rewound(merged)?);
        }
        Ok(())
    }

    /// All pairs, ascending by key, then by number.
    pub fn merge(mut self) -> io::Result<Merge> {
        self.sort();
        Merge::new(self.records, self.runs, self.distinct)
    }
}

fn write(run: &mut BufWriter<File>, (key, value): &Record) -> io::Result<()> {
    run.write_all(key)?;
    run.write_all(&value.to_le_bytes())
}

fn rewound(run: BufWriter<File>) -> io::Result<File> {
    let mut file = run.into_inner().map_err(io::IntoInnerError::into_error)?;
    file.seek(SeekFrom::Start(0))?;
    Ok(file)
}

/// Sorted pairs.
#[derive(Debug)]
pub struct Merge {
    memory: std::vec::IntoIter<Record>,
    runs: Vec<BufReader<File>>,
    /// The next pair of each source: a run by its place, or memory.
    heap: BinaryHeap<Reverse<(Record, usize)>>,
    distinct: bool,
    last: Option<Record>,
}

impl Merge {
    fn new(memory: Vec<Record>, runs: Vec<File>, distinct: bool) -> io::Result<Self> {
        let runs: Vec<_> = runs.into_iter().map(|run| BufReader::with_capacity(BUFFER_BYTES, run)).collect();
        let sources = runs.len();
        let mut merge = Self { memory: memory.into_iter(), runs, heap: BinaryHeap::new(), distinct, last: None };
        for source in 0..=sources {
            merge.advance(source)?;
        }
        Ok(merge)
    }

    fn advance(&mut self, source: usize) -> io::Result<()> {
        let next = match self.runs.get_mut(source) {
            Some(run) => read(run)?,
            None => self.memory.next(),
        };
        if let Some(record) = next {
            self.heap.push(Reverse((record, source)));
        }
        Ok(())
    }

    fn step(&mut self) -> io::Result<Option<Record>> {
        while let Some(Reverse((record, source))) = self.heap.pop() {
            self.advance(source)?;
            if !self.distinct || self.last != Some(record) {
                self.last = Some(record);
                return Ok(Some(record));
            }
        }
        Ok(None)
    }
}

fn read(run: &mut BufReader<File>) -> io::Result<Option<Record>> {
    let (mut key, mut value) = ([0; 32], [0; 8]);
    match run.read_exact(&mut key) {
        Err(error) if error.kind() == ErrorKind::UnexpectedEof => return Ok(None),
        read => read?,
    }
    run.read_exact(&mut value)?;
    Ok(Some((key, u64::from_le_bytes(value))))
}

impl Iterator for Merge {
    type Item = io::Result<Record>;

    fn next(&mut self) -> Option<Self::Item> {
        self.step().transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: u64) -> [u8; 32] {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_be_bytes());
        key
    }

    fn sorted(mut sorter: Sorter, numbers: impl Iterator<Item = u64>) -> (Vec<Record>, usize) {
        sorter.records_max = 10;
        for n in numbers {
            sorter.push(key(n), n).unwrap();
        }
        let runs = sorter.runs.len();
        (sorter.merge().unwrap().map(Result::unwrap).collect(), runs)
    }

    #[test]
    fn what_exceeds_memory_comes_back_sorted_and_complete() {
        let scratch = tempfile::tempdir().unwrap();
        let (found, runs) = sorted(Sorter::all(scratch.path().to_owned()), (0..5000).chain(0..5000));
        let mut expected: Vec<_> = (0..5000).chain(0..5000).map(|n| (key(n), n)).collect();
        expected.sort_unstable();
        assert!(found == expected);
        assert!(runs > 1 && runs <= RUNS_MAX, "{runs}");
        assert_eq!(std::fs::read_dir(scratch.path()).unwrap().count(), 0, "the files have no names");
    }

    #[test]
    fn equal_pairs_are_kept_once_if_asked_wherever_they_meet() {
        let scratch = tempfile::tempdir().unwrap();
        let numbers = (0..2000).map(|n| n * 7 % 100).chain(0..2000);
        let (found, _) = sorted(Sorter::distinct(scratch.path().to_owned()), numbers);
        let mut expected: Vec<_> = (0..2000).map(|n| (key(n), n)).collect();
        expected.sort_unstable();
        assert!(found == expected);
        let (few, runs) = sorted(Sorter::distinct(scratch.path().to_owned()), (0..1000).map(|n| n % 5));
        assert_eq!((few.len(), runs), (5, 0), "what repeats needs no disk");
    }
}
