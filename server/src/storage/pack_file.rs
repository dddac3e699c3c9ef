//! Reading packs as a whole: their headers, footers, and, where there is no footer to trust, every block by its magic and digest.
//!
//! A scan trusts no length alone: a block counts only if its digest matches, and after garbage the scan goes on at the next
//! magic whose block verifies. So one corrupt length loses one block, never those behind it.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use strandline_messages::format::block::{BLOCK_MAGIC, BlockHeaderV1, BlockView, FIXED_HEADER_BYTES};
use strandline_messages::format::pack::{
    FooterEntry, PACK_HEADER_BYTES, PackFooterV1, PackHeaderV1, TRAILER_BYTES, decode_trailer,
};
use strandline_messages::limits;
use strandline_messages::{DomainId, RepositoryId};

use super::StorageError;
use super::files::FileOps;

/// How much is read at a time while looking for a magic, bytes.
const WINDOW_BYTES: usize = 1 << 20;

/// What is known of one pack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackInfo {
    /// Its number.
    pub number: u32,
    /// The writer domain of its blocks.
    pub domain: DomainId,
    /// Whether it has a footer and will not grow.
    pub sealed: bool,
    /// Length of the file, bytes.
    pub file_bytes: u64,
    /// Where the blocks end (and the footer begins), bytes from the start.
    pub blocks_end: u32,
    /// How many blocks.
    pub blocks: u32,
}

/// A pack's contents as its footer, or a scan, says.
#[derive(Clone, Debug)]
pub struct PackContents {
    /// What is known of it.
    pub info: PackInfo,
    /// Its blocks by ascending offset.
    pub blocks: Vec<FooterEntry>,
}

/// Reads a pack's header.
pub fn read_header(file: &File, path: &Path) -> Result<PackHeaderV1, StorageError> {
    let mut bytes = [0; PACK_HEADER_BYTES];
    match file.read_exact_at(&mut bytes, 0) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
            let source = strandline_messages::format::FormatError::Truncated { what: "pack header" };
            return Err(StorageError::format(path)(source));
        }
        other => other.map_err(StorageError::io("read", path))?,
    }
    PackHeaderV1::decode(&bytes).map_err(StorageError::format(path))
}

/// Reads the footer of a sealed pack; `None` if there is none that can be trusted.
pub fn read_footer(file: &File, path: &Path) -> Result<Option<(PackFooterV1, u32)>, StorageError> {
    let file_bytes = file.metadata().map_err(StorageError::io("read", path))?.len();
    let mut trailer = [0; TRAILER_BYTES];
    let Some(trailer_at) = file_bytes.checked_sub(TRAILER_BYTES as u64) else { return Ok(None) };
    file.read_exact_at(&mut trailer, trailer_at).map_err(StorageError::io("read", path))?;
    let Ok((length, digest)) = decode_trailer(&trailer) else { return Ok(None) };
    let Some(footer_at) = trailer_at.checked_sub(length.into()) else { return Ok(None) };
    let Ok(blocks_end) = u32::try_from(footer_at) else { return Ok(None) };
    let mut footer = vec![0; length as usize];
    file.read_exact_at(&mut footer, footer_at).map_err(StorageError::io("read", path))?;
    Ok(PackFooterV1::decode(&footer, &digest).ok().map(|footer| (footer, blocks_end)))
}

/// What a sealed pack holds, by its footer; by a scan if the footer is damaged. `number` is the file name's.
pub fn contents(
    file: &File,
    path: &Path,
    number: u32,
    domain: DomainId,
    repository: RepositoryId,
) -> Result<PackContents, StorageError> {
    let file_bytes = file.metadata().map_err(StorageError::io("read", path))?.len();
    let (blocks, blocks_end, sealed) = match read_footer(file, path)? {
        Some((footer, blocks_end)) => (footer.blocks, blocks_end, true),
        None => (scan(file, path, repository)?, u32::try_from(file_bytes).unwrap_or(u32::MAX), false),
    };
    let count = u32::try_from(blocks.len()).unwrap_or(u32::MAX);
    Ok(PackContents { info: PackInfo { number, domain, sealed, file_bytes, blocks_end, blocks: count }, blocks })
}

/// Finds every intact block of `repository` in a pack, whatever lies between them.
pub fn scan(file: &File, path: &Path, repository: RepositoryId) -> Result<Vec<FooterEntry>, StorageError> {
    let failed = |error| StorageError::io("read", path)(error);
    let file_bytes = file.metadata().map_err(failed)?.len().min(u32::MAX.into());
    let mut blocks = Vec::new();
    let mut buffer = Vec::new();
    let mut at = PACK_HEADER_BYTES as u64;
    while at < file_bytes {
        match block_at(file, at, file_bytes, repository, &mut buffer).map_err(StorageError::io("read", path))? {
            Some(entry) => {
                at += u64::from(entry.bytes);
                blocks.push(entry);
            }
            None => match next_magic(file, at + 1, file_bytes).map_err(StorageError::io("read", path))? {
                Some(found) => at = found,
                None => break,
            },
        }
    }
    Ok(blocks)
}

fn block_at(
    file: &File,
    at: u64,
    end: u64,
    repository: RepositoryId,
    buffer: &mut Vec<u8>,
) -> io::Result<Option<FooterEntry>> {
    if end - at < FIXED_HEADER_BYTES as u64 {
        return Ok(None);
    }
    let mut fixed = [0; FIXED_HEADER_BYTES];
    file.read_exact_at(&mut fixed, at)?;
    let Ok(header) = BlockHeaderV1::decode(&fixed) else { return Ok(None) };
    let bytes = header.block_bytes();
    if header.repository != repository || end - at < bytes as u64 || bytes > limits::BLOCK_BYTES_MAX {
        return Ok(None);
    }
    buffer.resize(bytes, 0);
    file.read_exact_at(buffer, at)?;
    let verified = BlockView::parse(buffer).and_then(|view| Ok((view.header, view.verify_digest()?)));
    let (Ok((header, digest)), Ok(offset)) = (verified, u32::try_from(at)) else { return Ok(None) };
    let (Ok(bytes), Ok(chunks)) = (u32::try_from(bytes), u16::try_from(header.chunks)) else { return Ok(None) };
    Ok(Some(FooterEntry { offset, bytes, kind: header.kind, chunks, digest }))
}

fn next_magic(file: &File, from: u64, end: u64) -> io::Result<Option<u64>> {
    let overlap = BLOCK_MAGIC.len() as u64 - 1;
    let mut window = vec![0; WINDOW_BYTES];
    let mut at = from;
    while at + overlap < end {
        let length = usize::try_from(end - at).unwrap_or(WINDOW_BYTES).min(WINDOW_BYTES);
        let Some(part) = window.get_mut(..length) else { break };
        file.read_exact_at(part, at)?;
        if let Some(found) = part.windows(BLOCK_MAGIC.len()).position(|bytes| bytes == BLOCK_MAGIC) {
            return Ok(Some(at + found as u64));
        }
        at += (length as u64).saturating_sub(overlap).max(1);
    }
    Ok(None)
}

/// Makes a pack that its writer left without footer safe to rely on: whatever the kernel still holds of it is synced, then
/// dropped from its cache, so that the scan sees what the disk has; then the footer is appended and synced.
///
/// Never truncates. If the disk refuses the footer (full, failing) the pack stays unsealed, is still readable, and is
/// recovered again at the next start.
pub fn recover(
    ops: &dyn FileOps,
    file: &File,
    path: &Path,
    number: u32,
    domain: DomainId,
    repository: RepositoryId,
) -> Result<PackContents, StorageError> {
    let synced = ops.sync(file, path);
    // Advice: where the kernel ignores it the scan reads its cache, as any reader would.
    let _ = rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed);
    let blocks = scan(file, path, repository)?;
    let end = file.metadata().map_err(StorageError::io("read", path))?.len();
    let blocks_end = u32::try_from(end).unwrap_or(u32::MAX);
    let count = u32::try_from(blocks.len()).unwrap_or(u32::MAX);
    let mut info = PackInfo { number, domain, sealed: false, file_bytes: end, blocks_end, blocks: count };
    let sealed = synced.and_then(|()| seal(ops, file, path, &blocks, end));
    match sealed {
        Ok(bytes) => info = PackInfo { sealed: true, file_bytes: bytes, ..info },
        Err(error) => {
            tracing::warn!(pack = number, %error, "a pack could not be sealed; its blocks are intact and readable, sealing is tried again at the next start");
        }
    }
    Ok(PackContents { info, blocks })
}

/// Appends the footer at `end` and syncs; the file's new length, bytes.
pub fn seal(ops: &dyn FileOps, file: &File, path: &Path, blocks: &[FooterEntry], end: u64) -> io::Result<u64> {
    let footer = PackFooterV1 { blocks: blocks.to_vec() }.encode();
    let bytes = end + footer.len() as u64;
    ops.write_at(file, path, &footer, end)?;
    ops.sync(file, path)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use strandline_messages::ChunkId;

    use super::*;
    use crate::engine::fixture;
    use crate::storage::files::SystemFiles;

    const REPOSITORY: RepositoryId = RepositoryId([3; 16]);

    fn pack_of(blocks: &[Vec<u8>]) -> (Vec<u8>, Vec<u32>) {
        let mut bytes =
            PackHeaderV1 { repository: REPOSITORY, domain: DomainId::FULL, number: 1, created_ns: 0 }.encode();
        let mut offsets = Vec::new();
        for block in blocks {
            offsets.push(u32::try_from(bytes.len()).unwrap());
            bytes.extend_from_slice(block);
        }
        (bytes, offsets)
    }

    fn blocks() -> Vec<Vec<u8>> {
        (0..4u8).map(|i| fixture::data_block(REPOSITORY, &[ChunkId([i; 32]), ChunkId([i + 100; 32])])).collect()
    }

    fn recovered(bytes: &[u8]) -> (PackContents, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pack");
        fs::write(&path, bytes).unwrap();
        let file = File::options().read(true).write(true).open(&path).unwrap();
        let contents = recover(&SystemFiles, &file, &path, 1, DomainId::FULL, REPOSITORY).unwrap();
        let (footer, end) = read_footer(&file, &path).unwrap().expect("sealed");
        assert_eq!(footer.blocks, contents.blocks);
        assert_eq!(end, contents.info.blocks_end);
        (contents, fs::read(&path).unwrap())
    }

    #[test]
    fn s27_a_tail_torn_at_any_byte_is_dropped_and_the_rest_is_intact() {
        let (whole, offsets) = pack_of(&blocks());
        for cut in PACK_HEADER_BYTES..=whole.len() {
            let (contents, after) = recovered(&whole[..cut]);
            let ends: Vec<usize> = offsets.iter().skip(1).map(|&o| o as usize).chain([whole.len()]).collect();
            assert_eq!(contents.blocks.len(), ends.iter().filter(|&&end| end <= cut).count(), "cut at {cut}");
            assert_eq!(&after[..cut], &whole[..cut], "recovery changed bytes that were there");
        }
    }

    #[test]
    fn s53_a_corrupt_length_drops_one_block_and_nothing_behind_it() {
        let (whole, offsets) = pack_of(&blocks());
        for field in [14usize, 16, 20, 24] {
            for value in [0u8, 0xff] {
                let mut bad = whole.clone();
                let at = offsets[1] as usize + field;
                bad[at] ^= 1;
                bad[at + 1] = value;
                let (contents, _) = recovered(&bad);
                let found: Vec<u32> = contents.blocks.iter().map(|b| b.offset).collect();
                assert_eq!(found, [offsets[0], offsets[2], offsets[3]], "field {field}");
            }
        }
    }

    #[test]
    fn s25_recovery_interrupted_while_it_seals_is_repeated_without_loss() {
        let (whole, _) = pack_of(&blocks());
        let (first, sealed) = recovered(&whole);
        for cut in whole.len()..sealed.len() {
            let (again, _) = recovered(&sealed[..cut]);
            assert_eq!(again.blocks, first.blocks, "cut at {cut}");
        }
    }

    #[test]
    fn a_block_of_a_foreign_repository_is_not_taken_for_ours() {
        let mut all = blocks();
        all[1] = fixture::data_block(RepositoryId([4; 16]), &[ChunkId([1; 32])]);
        let (contents, _) = recovered(&pack_of(&all).0);
        assert_eq!(contents.blocks.len(), 3);
    }

    #[test]
    fn a_damaged_footer_is_replaced_by_a_scan() {
        let (whole, _) = pack_of(&blocks());
        let (first, mut sealed) = recovered(&whole);
        sealed[whole.len() + 20] ^= 1;
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pack");
        fs::write(&path, &sealed).unwrap();
        let file = File::open(&path).unwrap();
        let found = contents(&file, &path, 1, DomainId::FULL, REPOSITORY).unwrap();
        assert_eq!(found.blocks, first.blocks);
        assert!(!found.info.sealed);
    }
}
