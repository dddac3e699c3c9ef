//! Reads single blocks out of packs. Owns a bounded set of open pack files; every block that leaves it has had its digest
//! compared.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::num::NonZeroU64;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;
use rustix::fs::Advice;
use strandline_actors::runtime::buffer::BlockBuffer;
use strandline_messages::ChunkId;
use strandline_messages::format::FormatError;
use strandline_messages::format::block::{BlockHeaderV1, BlockView, FIXED_HEADER_BYTES, TableRows};
use strandline_messages::limits;

use super::StorageError;
use super::layout::RepositoryPaths;

/// Most pack files of one repository that are held open for reading.
const OPEN_PACKS_MAX: usize = 64;

/// Reads blocks of one repository.
#[derive(Debug)]
pub struct PackReader {
    paths: RepositoryPaths,
    open: Mutex<OpenPacks>,
}

#[derive(Debug, Default)]
struct OpenPacks {
    files: HashMap<u32, (Arc<File>, u64)>,
    uses: u64,
}

impl PackReader {
    /// Of the repository at `paths`.
    pub fn new(paths: RepositoryPaths) -> Self {
        Self { paths, open: Mutex::default() }
    }

    /// The block of `bytes` bytes at `offset` of pack `pack`, its digest verified. Blocks the calling thread.
    pub fn read_block(&self, pack: u32, offset: u32, bytes: u32) -> Result<Bytes, StorageError> {
        let damaged = |source| StorageError::Damaged { pack, offset, source };
        if bytes as usize > limits::BLOCK_BYTES_MAX {
            let max = limits::BLOCK_BYTES_MAX as u64;
            return Err(damaged(FormatError::Limit { what: "block", found: bytes.into(), max }));
        }
        let file = self.file(pack)?;
        let mut buffer = BlockBuffer::with_len(bytes as usize);
        file.read_exact_at(&mut buffer, offset.into()).map_err(|error| match error.kind() {
            io::ErrorKind::UnexpectedEof => damaged(FormatError::Truncated { what: "block" }),
            _ => StorageError::io("read", &self.paths.pack(pack))(error),
        })?;
        BlockView::parse(&buffer).and_then(|view| view.verify_digest()).map_err(damaged)?;
        Ok(Bytes::from_owner(buffer))
    }

    /// The chunk ids in the table of the block at `offset`, as they stand there: nothing is compared. `None` if they do not make
    /// a table. For finding out what a damaged block may have held.
    pub fn read_table(&self, pack: u32, offset: u32) -> Option<Vec<ChunkId>> {
        let file = self.file(pack).ok()?;
        let mut fixed = [0; FIXED_HEADER_BYTES];
        file.read_exact_at(&mut fixed, offset.into()).ok()?;
        let header = BlockHeaderV1::decode(&fixed).ok()?;
        let mut table = vec![0; header.table_bytes as usize];
        let at = u64::from(offset) + FIXED_HEADER_BYTES as u64 + u64::from(header.wrapped_key_bytes);
        file.read_exact_at(&mut table, at).ok()?;
        TableRows::new(header.kind, header.chunks, &table)
            .map(|row| row.map(|row| row.id))
            .collect::<Result<_, _>>()
            .ok()
    }

    /// Has the next read of these bytes come from the disk, as far as the kernel takes the advice.
    pub fn forget_cached(&self, pack: u32, offset: u32, bytes: u32) -> Result<(), StorageError> {
        let file = self.file(pack)?;
        // Advice: where it is ignored, the read sees the cache, as any reader would.
        let _ = rustix::fs::fadvise(&file, offset.into(), NonZeroU64::new(bytes.into()), Advice::DontNeed);
        Ok(())
    }

    /// Closes the file of a pack that is about to go away.
    pub fn forget(&self, pack: u32) {
        self.open.lock().files.remove(&pack);
    }

    fn file(&self, pack: u32) -> Result<Arc<File>, StorageError> {
        let mut guard = self.open.lock();
        let open = &mut *guard;
        open.uses += 1;
        if let Some((file, used)) = open.files.get_mut(&pack) {
            *used = open.uses;
            return Ok(Arc::clone(file));
        }
        let path = self.paths.pack(pack);
        let file = match File::open(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(StorageError::Gone { pack }),
            opened => Arc::new(opened.map_err(StorageError::io("open", &path))?),
        };
        if open.files.len() >= OPEN_PACKS_MAX {
            let oldest = open.files.iter().min_by_key(|(_, (_, used))| *used).map(|(&pack, _)| pack);
            oldest.map(|pack| open.files.remove(&pack));
        }
        open.files.insert(pack, (Arc::clone(&file), open.uses));
        Ok(file)
    }
}
