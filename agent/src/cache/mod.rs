//! The file cache: what an unchanged file needs, so that it costs one `statx` and no reading.
//!
//! One sequential file per (repository, keys, machine, paths). Records stand in scan order, so that the walk and the old
//! cache are joined like two sorted lists, with constant memory. The new cache is written beside the old one and takes its
//! place only when the snapshot is committed ([`PendingCache::publish`]). A cache that is damaged, cut short or somebody
//! else's is ignored with a warning: it costs time, never correctness.
//!
//! **When a record counts** ([`counts`]): size, mtime, ctime, inode, mode and owner are as recorded, and the ctime is
//! older than the file system's clock at the start of the run that wrote the record, minus two seconds. Anything younger
//! could have changed again within one step of the clock after it was read. A ctime in the future of that start (a
//! clock set back) never counts. The device number is not compared: snapshots of volumes get new ones.

mod reader;
mod record;
mod writer;

use std::path::Path;

use strandline_messages::format::repository::ChunkingV1;
use strandline_messages::format::tree::Timestamp;
use strandline_messages::ids::{DomainId, RepositoryId};

use crate::scan::meta::{Meta, stat_fd};

pub use self::reader::CacheReader;
pub use self::record::{CachedContent, CachedContentRef, FilePiece, Identity, Record};
pub use self::writer::{CacheWriter, PendingCache};

/// Pieces of a file that stand in its directory entry and cache record; longer lists become tree chunks.
pub const PIECES_MAX: usize = 1024;

const MAGIC: [u8; 8] = *b"STRCACHE";
const VERSION: u16 = 1;
const DIGEST_BYTES: usize = 32;
/// Longest record: pieces, holes, extended attributes and names at their limits are well below.
const RECORD_BYTES_MAX: usize = 2 << 20;
/// How much older than the start of its run a file's ctime must be.
const SETTLED_SECONDS: i64 = 2;

/// What a cache belongs to. A cache with another identity is not used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheIdentity(pub [u8; 32]);

impl CacheIdentity {
    /// From everything that makes cached chunk ids valid: repository, writer domain (the server knows a chunk in one and not in
    /// another), id key, host label, paths given, sizes of chunks.
    pub fn new(
        repository: &RepositoryId,
        domain: DomainId,
        id_key: &[u8; 32],
        chunker_secret: &[u8; 32],
        host: &str,
        paths: &[Vec<u8>],
        chunking: &ChunkingV1,
    ) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("strandline 1 identity of a file cache");
        let mut part = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        part(repository.as_bytes());
        part(domain.as_bytes());
        part(id_key);
        part(chunker_secret);
        part(host.as_bytes());
        for size in [chunking.minimum, chunking.average, chunking.maximum] {
            part(&size.to_le_bytes());
        }
        for path in paths {
            part(path);
        }
        Self(*hasher.finalize().as_bytes())
    }

    /// A file name for the cache, unique for this identity.
    pub fn file_name(&self) -> String {
        let hex = data_encoding::HEXLOWER.encode(&self.0);
        format!("{}.cache", hex.get(..32).unwrap_or(&hex))
    }
}

/// The file systems' clock now: the ctime of a file made in `directory`. Local file systems all stamp with the kernel's
/// coarse clock, which lags behind the precise one.
pub fn file_system_clock(directory: &Path) -> std::io::Result<Timestamp> {
    use std::os::fd::AsFd;
    let file = tempfile::tempfile_in(directory)?;
    file.set_len(1)?;
    Ok(stat_fd(file.as_fd())?.ctime)
}

/// What is not compared, on request: for file systems that change it by themselves.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Ignoring {
    /// The inode number, and the ctime.
    pub inode: bool,
    /// The ctime; the mtime must be old enough instead.
    pub ctime: bool,
}

/// Whether a record of a run that began at `started` may stand for the file that looks like `meta` now.
pub fn counts(identity: &Identity, meta: &Meta, started: Timestamp, ignoring: Ignoring) -> bool {
    let settled = Timestamp { seconds: started.seconds.saturating_sub(SETTLED_SECONDS), nanos: started.nanos };
    let mut now = Identity::of(meta);
    if ignoring.inode {
        now.inode = identity.inode;
    }
    if ignoring.inode || ignoring.ctime {
        now.ctime = identity.ctime;
        return *identity == now && meta.mtime < settled;
    }
    *identity == now && meta.ctime < settled
}

#[cfg(test)]
mod tests;
