//! Reading the old cache alongside the walk.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use strandline_messages::format::cursor::Decoder;
use strandline_messages::format::tree::Timestamp;

use super::record::{Key, Record};
use super::{CacheIdentity, DIGEST_BYTES, Ignoring, MAGIC, RECORD_BYTES_MAX, VERSION, counts};
use crate::scan::meta::Meta;

const BUFFER_BYTES: usize = 256 << 10;

/// A cursor over a cache, moved by the walk: [`CacheReader::enter`], [`CacheReader::lookup`] and [`CacheReader::leave`] in
/// scan order.
#[derive(Debug)]
pub struct CacheReader {
    file: BufReader<io::Take<File>>,
    started: Timestamp,
    ignoring: Ignoring,
    /// The next record's bytes, if it has been read and not been used.
    record: Vec<u8>,
    loaded: bool,
    ended: bool,
    /// Directories entered that the cache has, and those below that it does not have.
    matched: u64,
    unmatched: u64,
}

impl CacheReader {
    /// Opens and verifies the cache at `path`. `None` if there is none, or none that can be used (with a warning).
    pub fn open(path: &Path, identity: CacheIdentity) -> Option<Self> {
        match Self::try_open(path, identity) {
            Ok(reader) => Some(reader),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => {
                tracing::warn!(path = %path.display(), %error, "the file cache is not used; everything is read again");
                None
            }
        }
    }

    fn try_open(path: &Path, identity: CacheIdentity) -> io::Result<Self> {
        let mut file = File::open(path)?;
        let bytes = verify(&mut file)?;
        file.seek(SeekFrom::Start(0))?;
        let mut file = BufReader::with_capacity(BUFFER_BYTES, file.take(bytes));
        let mut head = [0; MAGIC.len() + 2 + 32];
        file.read_exact(&mut head)?;
        let mut decoder = Decoder::new(&head, "file cache");
        decoder.magic(&MAGIC).map_err(io::Error::other)?;
        decoder.version(VERSION).map_err(io::Error::other)?;
        if decoder.array::<32>().map_err(io::Error::other)? != identity.0 {
            return Err(io::Error::other("it belongs to another repository, machine or set of paths"));
        }
        let seconds = varint(&mut file)?;
        let seconds = (seconds >> 1).cast_signed() ^ -((seconds & 1).cast_signed());
        let nanos = u32::try_from(varint(&mut file)?).map_err(io::Error::other)?;
        let started = Timestamp { seconds, nanos };
        Ok(Self {
            file,
            started,
            ignoring: Ignoring::default(),
            record: Vec::new(),
            loaded: false,
            ended: false,
            matched: 0,
            unmatched: 0,
        })
    }

    /// Does not compare these.
    #[must_use]
    pub fn ignoring(mut self, ignoring: Ignoring) -> Self {
        self.ignoring = ignoring;
        self
    }

    /// When the run began that wrote this cache, by the file systems' clock.
    pub fn started(&self) -> Timestamp {
        self.started
    }

    /// The walk enters the directory `name`. Its record, if it is unchanged by the rules of [`counts`].
    pub fn enter(&mut self, name: &[u8], meta: &Meta) -> Option<Record> {
        if self.unmatched == 0 && self.seek(name) == Some(true) {
            self.matched += 1;
            return self.take(meta);
        }
        self.unmatched += 1;
        None
    }

    /// The walk leaves the directory that it entered last.
    pub fn leave(&mut self) {
        if self.unmatched > 0 {
            self.unmatched -= 1;
            return;
        }
        self.matched = self.matched.saturating_sub(1);
        let matched = self.matched;
        while self.key().is_some_and(|key| key.depth > matched) {
            self.loaded = false;
        }
    }

    /// The record of `name`, which is no directory, if it is unchanged by the rules of [`counts`].
    pub fn lookup(&mut self, name: &[u8], meta: &Meta) -> Option<Record> {
        if self.unmatched > 0 || self.seek(name) != Some(false) {
            return None;
        }
        self.take(meta)
    }

    // Moves to the record of `name` in the present directory; says whether it is a directory.
    fn seek(&mut self, name: &[u8]) -> Option<bool> {
        self.load();
        loop {
            let matched = self.matched;
            let key = self.key()?;
            if key.depth < matched || (key.depth == matched && key.name > name) {
                return None;
            }
            if key.depth == matched && key.name == name {
                return Some(key.directory);
            }
            self.loaded = false;
            self.load();
        }
    }

    fn take(&mut self, meta: &Meta) -> Option<Record> {
        self.loaded = false;
        let mut decoder = Decoder::new(&self.record, "file cache record");
        let record = Key::decode(&mut decoder).and_then(|_| Record::decode(&mut decoder));
        match record {
            Ok(record) => counts(&record.identity, meta, self.started, self.ignoring).then_some(record),
            Err(error) => {
                self.give_up(&error);
                None
            }
        }
    }

    fn key(&mut self) -> Option<Key<'_>> {
        self.load();
        if !self.loaded {
            return None;
        }
        Key::decode(&mut Decoder::new(&self.record, "file cache record")).ok()
    }

    // Reads the next record unless one is waiting.
    fn load(&mut self) {
        if self.loaded || self.ended {
            return;
        }
        match self.load_next() {
            Ok(loaded) => {
                self.loaded = loaded;
                self.ended = !loaded;
            }
            Err(error) => self.give_up(&error),
        }
    }

    fn load_next(&mut self) -> io::Result<bool> {
        if self.file.fill_buf()?.is_empty() {
            return Ok(false);
        }
        let length = varint(&mut self.file)?;
        let length = usize::try_from(length).ok().filter(|&length| length <= RECORD_BYTES_MAX);
        let length = length.ok_or_else(|| io::Error::other("a record is too long"))?;
        self.record.resize(length, 0);
        self.file.read_exact(&mut self.record)?;
        Ok(true)
    }

    fn give_up(&mut self, error: &dyn std::error::Error) {
        tracing::warn!(%error, "the rest of the file cache is not used");
        self.ended = true;
        self.loaded = false;
    }
}

// Compares the digest at the end; returns the number of bytes before it.
fn verify(file: &mut File) -> io::Result<u64> {
    let length = file.metadata()?.len();
    let body = length.checked_sub(DIGEST_BYTES as u64).ok_or_else(|| io::Error::other("it is cut short"))?;
    let mut hasher = blake3::Hasher::new();
    let mut buffer = vec![0; BUFFER_BYTES];
    let mut left = body;
    while left > 0 {
        let wanted = usize::try_from(left).unwrap_or(usize::MAX).min(buffer.len());
        let chunk = buffer.get_mut(..wanted).unwrap_or_default();
        file.read_exact(chunk)?;
        hasher.update(chunk);
        left -= wanted as u64;
    }
    let mut digest = [0; DIGEST_BYTES];
    file.read_exact(&mut digest)?;
    if hasher.finalize().as_bytes() == &digest {
        Ok(body)
    } else {
        Err(io::Error::other("its digest does not match its bytes"))
    }
}

fn varint(file: &mut impl Read) -> io::Result<u64> {
    let mut bytes = [0; 10];
    for length in 1..=bytes.len() {
        let Some(byte) = bytes.get_mut(length - 1) else { break };
        file.read_exact(std::slice::from_mut(byte))?;
        if *byte & 0x80 == 0 {
            let number = bytes.get(..length).unwrap_or_default();
            return Decoder::new(number, "file cache").varint().map_err(io::Error::other);
        }
    }
    Err(io::Error::other("a number exceeds 64 bits"))
}
