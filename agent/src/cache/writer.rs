//! Writing a new cache and putting it in the old one's place.
//!
//! `magic "STRCACHE" · version u16 · identity 32 · started (zigzag seconds, LEB128 nanos)`, then per record its LEB128 length
//! and its bytes, then BLAKE3-256 of everything before.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use strandline_messages::format::cursor::Encoder;
use strandline_messages::format::tree::{Hole, Timestamp, Xattr};

use super::record::{CachedContentRef, Identity, Key, Record};
use super::{CacheIdentity, CacheReader, MAGIC, RECORD_BYTES_MAX, VERSION};

const BUFFER_BYTES: usize = 256 << 10;

/// Writes records as the run goes. A write that fails ends the cache with a warning; the backup goes on.
#[derive(Debug)]
pub struct CacheWriter {
    state: Option<State>,
    record: Vec<u8>,
}

#[derive(Debug)]
struct State {
    target: PathBuf,
    temporary: Temporary,
    file: File,
    hasher: blake3::Hasher,
    buffer: Vec<u8>,
    identity: CacheIdentity,
}

/// Removes its file unless it was renamed.
#[derive(Debug)]
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        if let Err(error) = std::fs::remove_file(&self.0)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(path = %self.0.display(), %error, "a temporary file is left over");
        }
    }
}

impl CacheWriter {
    /// Begins a cache that will stand at `target`. `started`: the file systems' clock before anything was scanned.
    pub fn create(target: &Path, identity: CacheIdentity, started: Timestamp) -> Self {
        let state = State::create(target, identity, started)
            .inspect_err(|error| {
                tracing::warn!(path = %target.display(), %error, "no file cache is written; the next backup reads everything");
            })
            .ok();
        Self { state, record: Vec::new() }
    }

    /// Writes nothing.
    pub fn none() -> Self {
        Self { state: None, record: Vec::new() }
    }

    /// Appends one entry at `depth` (0: directly below `/`).
    #[expect(
        clippy::too_many_arguments,
        reason = "the parts are borrowed from where they are; a struct would say the same"
    )]
    pub fn put(
        &mut self,
        depth: usize,
        directory: bool,
        name: &[u8],
        identity: &Identity,
        xattrs: &[Xattr],
        holes: &[Hole],
        content: CachedContentRef<'_>,
    ) {
        let Some(state) = &mut self.state else { return };
        self.record.clear();
        Key { depth: depth as u64, directory, name }.encode(&mut self.record);
        Record::encode(identity, xattrs, holes, content, &mut self.record);
        if self.record.len() > RECORD_BYTES_MAX {
            return;
        }
        state.buffer.put_string(&self.record);
        if state.buffer.len() >= BUFFER_BYTES
            && let Err(error) = state.flush()
        {
            tracing::warn!(path = %state.target.display(), %error, "the file cache is given up; the next backup reads everything");
            self.state = None;
        }
    }

    /// Ends the records. Nothing is visible before [`PendingCache::publish`].
    pub fn finish(self) -> Option<PendingCache> {
        let mut state = self.state?;
        let ended = state.flush().and_then(|()| state.file.write_all(state.hasher.finalize().as_bytes()));
        if let Err(error) = ended {
            tracing::warn!(path = %state.target.display(), %error, "the file cache is given up; the next backup reads everything");
            return None;
        }
        Some(PendingCache { state })
    }
}

impl State {
    fn create(target: &Path, identity: CacheIdentity, started: Timestamp) -> io::Result<Self> {
        let directory = target.parent().ok_or(io::ErrorKind::InvalidInput)?;
        remove_abandoned(target, directory)?;
        let name = target.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(io::Error::other)?;
        let path = directory.join(format!("{name}.new-{}", data_encoding::HEXLOWER.encode(&random)));
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&path)?;
        let temporary = Temporary(path);
        rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        let mut buffer = Vec::with_capacity(BUFFER_BYTES + 4096);
        buffer.extend_from_slice(&MAGIC);
        buffer.put_u16(VERSION);
        buffer.extend_from_slice(&identity.0);
        buffer.put_zigzag(started.seconds);
        buffer.put_varint(started.nanos.into());
        let target = target.to_owned();
        Ok(Self { target, temporary, file, hasher: blake3::Hasher::new(), buffer, identity })
    }

    fn flush(&mut self) -> io::Result<()> {
        self.hasher.update(&self.buffer);
        self.file.write_all(&self.buffer)?;
        self.buffer.clear();
        Ok(())
    }
}

// What a killed run left behind: nobody holds its lock any more.
fn remove_abandoned(target: &Path, directory: &Path) -> io::Result<()> {
    let prefix = format!("{}.new-", target.file_name().unwrap_or_default().to_string_lossy());
    for entry in std::fs::read_dir(directory)? {
        let entry = entry?;
        if !entry.file_name().to_string_lossy().starts_with(&prefix) {
            continue;
        }
        let Ok(file) = File::open(entry.path()) else { continue };
        if rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive).is_ok() {
            drop(Temporary(entry.path()));
        }
    }
    Ok(())
}

/// A complete new cache that is not in place yet. Dropping it leaves the old one.
#[derive(Debug)]
pub struct PendingCache {
    state: State,
}

impl PendingCache {
    /// Puts the new cache in the old one's place, durably. To be called once the snapshot is committed.
    pub fn publish(self) -> io::Result<()> {
        self.state.file.sync_all()?;
        std::fs::rename(&self.state.temporary.0, &self.state.target)?;
        if let Some(directory) = self.state.target.parent() {
            File::open(directory)?.sync_all()?;
        }
        Ok(())
    }

    /// Reads the cache before it is in place: for a second pass after the server answered that chunks are missing.
    pub fn reader(&self) -> Option<CacheReader> {
        CacheReader::open(&self.state.temporary.0, self.state.identity)
    }
}
