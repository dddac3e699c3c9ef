//! Journals: files of events that say what the catalog must not forget, so that a catalog that was lost is made again from
//! the storage. Append only.
//!
//! One event per line: `<BLAKE3-256 of the JSON, 64 hex digits> <JSON>`. An event counts once its line is fsynced. A crash may
//! leave part of a line at the end; opening ends such a line with NUL, `discarded` and a newline, in this order in one write,
//! so that no crash during that can make it look whole: JSON has no NUL. Any other line that cannot be read is damage.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::marker::PhantomData;
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::failpoint;
use crate::pki::files;

/// Longest line, bytes.
const LINE_BYTES_MAX: usize = 64 << 10;
/// How a line ends that a crash tore.
const DISCARDED: &[u8] = b"\0discarded\n";

/// What a journal says.
#[derive(Debug, PartialEq, Eq)]
pub struct Replay<E> {
    /// The events, oldest first.
    pub events: Vec<E>,
    /// Numbers (from 1) of the lines that cannot be read and were not left by a crash.
    pub damaged: Vec<u64>,
}

/// The open journal.
#[derive(Debug)]
pub struct Journal<E> {
    path: PathBuf,
    file: File,
    /// An append failed part-way: the file must be looked at again before the next.
    doubtful: bool,
    events: PhantomData<fn(E)>,
}

impl<E: Serialize + DeserializeOwned> Journal<E> {
    /// Opens the journal `path` (made with its directory if missing, mode 600) and closes a torn last line.
    pub fn open(path: &Path) -> io::Result<Self> {
        if let Some(directory) = path.parent() {
            files::create_directory(directory)?;
        }
        let file = files::open_append(path)?;
        let mut journal = Self { path: path.to_owned(), file, doubtful: true, events: PhantomData };
        journal.close_torn_tail()?;
        Ok(journal)
    }

    /// The journal's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends `event` and fsyncs. After an error the event does not count now; if its line got to the disk all the same,
    /// it counts from the next start on.
    pub fn append(&mut self, event: &E) -> io::Result<()> {
        self.append_all(std::slice::from_ref(event))
    }

    /// As [`Journal::append`], for several events at the price of one fsync. After an error any number of them, the first ones,
    /// may count from the next start on.
    pub fn append_all(&mut self, events: &[E]) -> io::Result<()> {
        self.close_torn_tail()?;
        self.write_lines(events)
    }

    /// Everything that counts, oldest first. Memory grows with the number of events.
    pub fn replay(&self) -> io::Result<Replay<E>> {
        let mut reader = BufReader::new(File::open(&self.path)?);
        let mut replay = Replay { events: Vec::new(), damaged: Vec::new() };
        let mut line = Vec::new();
        for number in 1.. {
            line.clear();
            if reader.by_ref().take(2 * LINE_BYTES_MAX as u64).read_until(b'\n', &mut line)? == 0 {
                break;
            }
            match parse_line(&line) {
                Some(event) => replay.events.push(event),
                None if line.ends_with(DISCARDED) => {}
                None => replay.damaged.push(number),
            }
        }
        Ok(replay)
    }

    fn write_lines(&mut self, events: &[E]) -> io::Result<()> {
        let mut lines = String::new();
        for event in events {
            let json = serde_json::to_string(event)?;
            let line = format!("{} {json}\n", blake3::hash(json.as_bytes()).to_hex());
            if line.len() > LINE_BYTES_MAX {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "the event is too long for one line"));
            }
            lines.push_str(&line);
        }
        self.doubtful = true;
        self.file.write_all(lines.as_bytes())?;
        failpoint::reached("journal/written");
        failpoint::sync("journal/sync", || self.file.sync_data())?;
        self.doubtful = false;
        Ok(())
    }

    fn close_torn_tail(&mut self) -> io::Result<()> {
        if !self.doubtful {
            return Ok(());
        }
        let mut last = [b'\n'];
        if self.file.seek(SeekFrom::End(0))? > 0 {
            self.file.seek(SeekFrom::End(-1))?;
            self.file.read_exact(&mut last)?;
        }
        if last != *b"\n" {
            self.file.write_all(DISCARDED)?;
            failpoint::reached("journal/closed");
            failpoint::sync("journal/sync", || self.file.sync_data())?;
        }
        self.doubtful = false;
        Ok(())
    }
}

fn parse_line<E: DeserializeOwned>(line: &[u8]) -> Option<E> {
    let text = std::str::from_utf8(line.strip_suffix(b"\n")?).ok()?;
    let (sum, json) = text.split_once(' ')?;
    let sum = blake3::Hash::from_hex(sum).ok()?;
    if blake3::hash(json.as_bytes()) != sum {
        return None;
    }
    serde_json::from_str(json).ok()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn journal_of(events: &[u8]) -> (tempfile::TempDir, Journal<u8>) {
        let storage = tempfile::tempdir().unwrap();
        let mut journal = Journal::<u8>::open(&storage.path().join("journal")).unwrap();
        for event in events {
            journal.append(event).unwrap();
        }
        (storage, journal)
    }

    #[test]
    fn s27_a_tail_torn_at_any_byte_is_no_damage_and_hides_nothing() {
        let (storage, journal) = journal_of(&[1u8]);
        let kept = fs::metadata(journal.path()).unwrap().len();
        let path = journal.path().to_owned();
        drop(journal);
        Journal::<u8>::open(&storage.path().join("journal")).unwrap().append(&2).unwrap();
        let whole = fs::read(&path).unwrap();
        for cut in usize::try_from(kept).unwrap()..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let mut journal = Journal::<u8>::open(&storage.path().join("journal")).unwrap();
            assert_eq!(journal.replay().unwrap(), Replay { events: vec![1u8], damaged: vec![] }, "cut {cut}");
            journal.append(&3).unwrap();
            let replay = journal.replay().unwrap();
            assert_eq!(replay, Replay { events: vec![1u8, 3], damaged: vec![] }, "cut {cut}");
        }
    }

    #[test]
    fn s52_a_flipped_byte_is_reported_by_its_line() {
        let (_storage, journal) = journal_of(&[1u8, 2, 3]);
        let whole = fs::read(journal.path()).unwrap();
        let first = whole.iter().position(|&byte| byte == b'\n').unwrap();
        for position in first + 1..first + 20 {
            let mut bad = whole.clone();
            bad[position] ^= 1;
            fs::write(journal.path(), &bad).unwrap();
            let replay = journal.replay().unwrap();
            assert_eq!(replay.damaged, [2], "byte {position}");
            assert_eq!(replay.events, [1u8, 3]);
        }
    }

    #[test]
    fn s25_a_crash_while_a_torn_tail_is_being_discarded_changes_nothing() {
        let (storage, journal) = journal_of(&[1u8]);
        let mut torn = fs::read(journal.path()).unwrap();
        torn.extend(b"0123");
        for cut in 0..DISCARDED.len() {
            let mut bytes = torn.clone();
            bytes.extend(&DISCARDED[..cut]);
            fs::write(journal.path(), &bytes).unwrap();
            let mut journal = Journal::<u8>::open(&storage.path().join("journal")).unwrap();
            journal.append(&2).unwrap();
            assert_eq!(journal.replay().unwrap(), Replay { events: vec![1u8, 2], damaged: vec![] });
        }
    }
}
