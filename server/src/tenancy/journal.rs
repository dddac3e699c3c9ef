//! The journal of identities in the storage: what tenants and agents there are, and who was revoked, so that a catalog
//! that was lost is rebuilt closed, not open.
//!
//! `DATA/storage/identities.journal`, append only. One event per line: `<BLAKE3-256 of the JSON, 64 hex digits> <JSON>`.
//! An event counts once its line is fsynced. A crash may leave part of a line at the end; opening ends such a line with
//! NUL, `discarded` and a newline, in this order in one write, so that no crash during that can make it look whole: JSON
//! has no NUL. Any other line that cannot be read is damage.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use strandline_messages::{AgentId, TenantName};

use crate::pki::files;

/// The journal's name inside the storage directory. No tenant may have it.
pub const JOURNAL_NAME: &str = "identities.journal";
/// Longest line, bytes.
const LINE_BYTES_MAX: usize = 64 << 10;
/// How a line ends that a crash tore.
const DISCARDED: &[u8] = b"\0discarded\n";

/// What can happen to identities.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case", deny_unknown_fields)]
pub enum Event {
    /// A tenant was added.
    TenantAdded {
        /// Its name.
        tenant: TenantName,
        /// When, ns since 1970.
        at_ns: i64,
    },
    /// An agent redeemed a token.
    AgentEnrolled {
        /// The agent.
        agent: AgentIdText,
        /// Its tenant.
        tenant: TenantName,
        /// Host name that it gave.
        label: String,
        /// BLAKE3-256 of its public key, hexadecimal.
        key_hash: String,
        /// When, ns since 1970.
        at_ns: i64,
        /// End of its certificate, ns since 1970.
        expires_ns: i64,
    },
    /// An agent got a new certificate for the key that it enrolled with.
    AgentRenewed {
        /// The agent.
        agent: AgentIdText,
        /// When, ns since 1970.
        at_ns: i64,
        /// End of its certificate, ns since 1970.
        expires_ns: i64,
    },
    /// An agent was revoked, for ever.
    AgentRevoked {
        /// The agent.
        agent: AgentIdText,
        /// When, ns since 1970.
        at_ns: i64,
    },
}

/// An agent id as hexadecimal text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AgentIdText(pub AgentId);

impl TryFrom<String> for AgentIdText {
    type Error = strandline_messages::ids::IdError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse().map(Self)
    }
}

impl From<AgentIdText> for String {
    fn from(id: AgentIdText) -> Self {
        id.0.to_string()
    }
}

/// What a journal says.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Replay {
    /// The events, oldest first.
    pub events: Vec<Event>,
    /// Numbers (from 1) of the lines that cannot be read and were not left by a crash.
    pub damaged: Vec<u64>,
}

/// The open journal.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    /// An append failed part-way: the file must be looked at again before the next.
    doubtful: bool,
}

impl Journal {
    /// Opens the journal in `storage` (both made if missing) and closes a torn last line.
    pub fn open(storage: &Path) -> io::Result<Self> {
        files::create_directory(storage)?;
        let path = storage.join(JOURNAL_NAME);
        let file = files::open_append(&path)?;
        let mut journal = Self { path, file, doubtful: true };
        journal.close_torn_tail()?;
        Ok(journal)
    }

    /// The journal's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Appends `event` and fsyncs. After an error the event does not count now; if its line got to the disk all the same,
    /// it counts from the next start on.
    pub fn append(&mut self, event: &Event) -> io::Result<()> {
        self.close_torn_tail()?;
        self.write_line(event)
    }

    /// Everything that counts, oldest first. Memory grows with the number of events: one per machine and change.
    pub fn replay(&self) -> io::Result<Replay> {
        let mut reader = BufReader::new(File::open(&self.path)?);
        let mut replay = Replay::default();
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

    fn write_line(&mut self, event: &Event) -> io::Result<()> {
        let json = serde_json::to_string(event)?;
        let line = format!("{} {json}\n", blake3::hash(json.as_bytes()).to_hex());
        if line.len() > LINE_BYTES_MAX {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "the event is too long for one line"));
        }
        self.doubtful = true;
        self.file.write_all(line.as_bytes())?;
        self.file.sync_data()?;
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
            self.file.sync_data()?;
        }
        self.doubtful = false;
        Ok(())
    }
}

fn parse_line(line: &[u8]) -> Option<Event> {
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

    fn event(number: u8) -> Event {
        Event::AgentRevoked { agent: AgentIdText(AgentId([number; 16])), at_ns: i64::from(number) }
    }

    fn journal_of(events: &[Event]) -> (tempfile::TempDir, Journal) {
        let storage = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(storage.path()).unwrap();
        for event in events {
            journal.append(event).unwrap();
        }
        (storage, journal)
    }

    #[test]
    fn every_kind_of_event_reads_back() {
        let tenant: TenantName = "acme".parse().unwrap();
        let agent = AgentIdText(AgentId([9; 16]));
        let events = [
            Event::TenantAdded { tenant: tenant.clone(), at_ns: 1 },
            Event::AgentEnrolled {
                agent,
                tenant,
                label: "line\nbreak \u{2028}".into(),
                key_hash: "00".repeat(32),
                at_ns: 2,
                expires_ns: 3,
            },
            Event::AgentRenewed { agent, at_ns: 4, expires_ns: 5 },
            event(1),
        ];
        let (storage, journal) = journal_of(&events);
        drop(journal);
        let replay = Journal::open(storage.path()).unwrap().replay().unwrap();
        assert_eq!(replay, Replay { events: events.to_vec(), damaged: vec![] });
    }

    #[test]
    fn s27_a_tail_torn_at_any_byte_is_no_damage_and_hides_nothing() {
        let (storage, journal) = journal_of(&[event(1)]);
        let kept = fs::metadata(journal.path()).unwrap().len();
        let path = journal.path().to_owned();
        drop(journal);
        Journal::open(storage.path()).unwrap().append(&event(2)).unwrap();
        let whole = fs::read(&path).unwrap();
        for cut in usize::try_from(kept).unwrap()..whole.len() {
            fs::write(&path, &whole[..cut]).unwrap();
            let mut journal = Journal::open(storage.path()).unwrap();
            assert_eq!(journal.replay().unwrap(), Replay { events: vec![event(1)], damaged: vec![] }, "cut {cut}");
            journal.append(&event(3)).unwrap();
            let replay = journal.replay().unwrap();
            assert_eq!(replay, Replay { events: vec![event(1), event(3)], damaged: vec![] }, "cut {cut}");
        }
    }

    #[test]
    fn s52_a_flipped_byte_is_reported_by_its_line() {
        let (_storage, journal) = journal_of(&[event(1), event(2), event(3)]);
        let whole = fs::read(journal.path()).unwrap();
        let first = whole.iter().position(|&byte| byte == b'\n').unwrap();
        for position in first + 1..first + 20 {
            let mut bad = whole.clone();
            bad[position] ^= 1;
            fs::write(journal.path(), &bad).unwrap();
            let replay = journal.replay().unwrap();
            assert_eq!(replay.damaged, [2], "byte {position}");
            assert_eq!(replay.events, [event(1), event(3)]);
        }
    }

    #[test]
    fn s25_a_crash_while_a_torn_tail_is_being_discarded_changes_nothing() {
        let (storage, journal) = journal_of(&[event(1)]);
        let mut torn = fs::read(journal.path()).unwrap();
        torn.extend(b"0123");
        for cut in 0..DISCARDED.len() {
            let mut bytes = torn.clone();
            bytes.extend(&DISCARDED[..cut]);
            fs::write(journal.path(), &bytes).unwrap();
            let mut journal = Journal::open(storage.path()).unwrap();
            journal.append(&event(2)).unwrap();
            assert_eq!(journal.replay().unwrap(), Replay { events: vec![event(1), event(2)], damaged: vec![] });
        }
    }
}
