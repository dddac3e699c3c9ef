//! An immutable sorted run of entries in one file, and the writer that makes it.
//!
//! ```text
//! pages     4096 bytes each: 85 entries of 48 bytes (the last page may hold fewer, then zeros) · first 16 bytes of the
//!           BLAKE3-256 of the 4080 bytes before it
//! filter    see `filter`
//! fences    per page the first 8 bytes of its first id
//! trailer   magic "STRINDXS" · version u16 = 1 · 6 zero bytes · entries u64 · filter length u64 · BLAKE3-256 of filter and
//!           fences · BLAKE3-256 of the trailer before it
//! ```
//! Filter and fences are in memory while the segment is open: 12 bits + 0.75 bit per entry. A lookup reads one page (two when
//! the copies of an id straddle pages).

use std::cmp::Ordering;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use strandline_messages::ChunkId;
use strandline_messages::format::cursor::{Decoder, Encoder};

use super::IndexError;
use super::cache::PageCache;
use super::entry::{ENTRY_BYTES, Entry};
use super::filter::Filter;
use crate::storage::files::TEMPORARY_PREFIX;

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// Entries of a full page.
pub const PAGE_ENTRIES: usize = 85;
const PAGE_BODY_BYTES: usize = PAGE_ENTRIES * ENTRY_BYTES;
const CHECK_BYTES: usize = PAGE_BYTES - PAGE_BODY_BYTES;
const MAGIC: [u8; 8] = *b"STRINDXS";
const VERSION: u16 = 1;
const TRAILER_BYTES: usize = 8 + 2 + 6 + 8 + 8 + 32 + 32;

/// The entries of one page.
#[derive(Debug)]
pub struct Page {
    bytes: [u8; PAGE_BODY_BYTES],
    count: usize,
}

impl Default for Page {
    fn default() -> Self {
        Self { bytes: [0; PAGE_BODY_BYTES], count: 0 }
    }
}

impl Page {
    fn entries(&self) -> &[[u8; ENTRY_BYTES]] {
        let (entries, _) = self.bytes.as_chunks();
        entries.get(..self.count).unwrap_or_default()
    }
}

/// An open segment.
#[derive(Debug)]
pub struct Segment {
    file: File,
    path: PathBuf,
    /// Its number, which names its file.
    pub number: u64,
    /// How many entries it holds.
    pub entries: u64,
    filter: Filter,
    fences: Vec<u64>,
    owner: u64,
    cache: Arc<PageCache>,
}

/// The file of segment `number` in `directory`.
pub fn path(directory: &Path, number: u64) -> PathBuf {
    directory.join(format!("{number:016x}.segment"))
}

impl Segment {
    /// Opens a segment; its pages are checked when they are read.
    pub fn open(directory: &Path, number: u64, cache: Arc<PageCache>) -> Result<Self, IndexError> {
        let path = path(directory, number);
        let failed = |error| IndexError::io("open", &path)(error);
        let file = File::open(&path).map_err(failed)?;
        let file_bytes = file.metadata().map_err(failed)?.len();
        let trailer_at = file_bytes.checked_sub(TRAILER_BYTES as u64);
        let trailer_at = trailer_at.ok_or_else(|| IndexError::damaged(&path, "a segment is too short"))?;
        let mut trailer = [0; TRAILER_BYTES];
        file.read_exact_at(&mut trailer, trailer_at).map_err(failed)?;
        let (entries, filter_bytes, digest) =
            decode_trailer(&trailer).ok_or_else(|| IndexError::damaged(&path, "a segment's trailer"))?;
        let pages = entries.div_ceil(PAGE_ENTRIES as u64);
        let tables_at = pages.saturating_mul(PAGE_BYTES as u64);
        let fences_bytes = pages.saturating_mul(8);
        let expected = tables_at.saturating_add(fences_bytes).saturating_add(filter_bytes);
        let (true, Ok(length)) = (expected == trailer_at, usize::try_from(trailer_at.saturating_sub(tables_at))) else {
            return Err(IndexError::damaged(&path, "a segment's lengths"));
        };
        let mut tables = vec![0; length];
        file.read_exact_at(&mut tables, tables_at).map_err(failed)?;
        if blake3::hash(&tables).as_bytes() != &digest {
            return Err(IndexError::damaged(&path, "a segment's filter"));
        }
        let split = usize::try_from(filter_bytes).unwrap_or(usize::MAX);
        let (filter, fences) = tables.split_at_checked(split).unwrap_or_default();
        let filter = Filter::decode(filter).ok_or_else(|| IndexError::damaged(&path, "a segment's filter"))?;
        let fences = fences.as_chunks::<8>().0.iter().map(|bytes| u64::from_be_bytes(*bytes)).collect();
        let owner = cache.new_owner();
        Ok(Self { file, path, number, entries, filter, fences, owner, cache })
    }

    /// Where its file lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Reads along a batch of ascending ids; keeps the page it read last.
    pub fn finder(&self) -> Finder<'_> {
        Finder { segment: self, current: None }
    }

    /// All entries in order.
    pub fn scan(&self) -> SegmentIter<'_> {
        SegmentIter { segment: self, page: 0, at: 0, current: None }
    }

    fn page_count(&self) -> u32 {
        u32::try_from(self.fences.len()).unwrap_or(u32::MAX)
    }

    fn read_page(&self, number: u32) -> Result<Arc<Page>, IndexError> {
        let mut bytes = [0; PAGE_BYTES];
        let offset = u64::from(number) * PAGE_BYTES as u64;
        self.file.read_exact_at(&mut bytes, offset).map_err(IndexError::io("read", &self.path))?;
        let (body, check) = bytes.split_first_chunk::<PAGE_BODY_BYTES>().unwrap_or((&[0; PAGE_BODY_BYTES], &[]));
        if !blake3::hash(body).as_bytes().starts_with(check) || check.len() != CHECK_BYTES {
            return Err(IndexError::damaged(&self.path, "a page's digest"));
        }
        let before = u64::from(number) * PAGE_ENTRIES as u64;
        let count = usize::try_from(self.entries.saturating_sub(before)).unwrap_or(PAGE_ENTRIES).min(PAGE_ENTRIES);
        Ok(Arc::new(Page { bytes: *body, count }))
    }

    fn cached_page(&self, number: u32) -> Result<Arc<Page>, IndexError> {
        if let Some(page) = self.cache.get((self.owner, number)) {
            return Ok(page);
        }
        let page = self.read_page(number)?;
        self.cache.put((self.owner, number), Arc::clone(&page));
        Ok(page)
    }
}

/// Finds ids in one segment.
#[derive(Debug)]
pub struct Finder<'a> {
    segment: &'a Segment,
    current: Option<(u32, Arc<Page>)>,
}

impl Finder<'_> {
    /// Calls `found` with every entry of `id`.
    pub fn find(&mut self, id: &ChunkId, mut found: impl FnMut(Entry)) -> Result<(), IndexError> {
        if !self.segment.filter.may_contain(id) {
            return Ok(());
        }
        let lead = fence(id);
        let first = self.segment.fences.partition_point(|&fence| fence < lead).saturating_sub(1);
        let mut number = u32::try_from(first).unwrap_or(u32::MAX);
        while number < self.segment.page_count() {
            let page = self.page(number)?;
            let entries = page.entries();
            let start = entries.partition_point(|entry| compare(entry, id) == Ordering::Less);
            for entry in entries.iter().skip(start) {
                if compare(entry, id) != Ordering::Equal {
                    return Ok(());
                }
                found(Entry::decode(entry));
            }
            number += 1;
            if self.segment.fences.get(number as usize).is_none_or(|&fence| fence > lead) {
                return Ok(());
            }
        }
        Ok(())
    }

    fn page(&mut self, number: u32) -> Result<Arc<Page>, IndexError> {
        if let Some((current, page)) = &self.current
            && *current == number
        {
            return Ok(Arc::clone(page));
        }
        let page = self.segment.cached_page(number)?;
        self.current = Some((number, Arc::clone(&page)));
        Ok(page)
    }
}

/// Reads a whole segment in order, past the cache.
#[derive(Debug)]
pub struct SegmentIter<'a> {
    segment: &'a Segment,
    page: u32,
    at: usize,
    current: Option<Arc<Page>>,
}

impl Iterator for SegmentIter<'_> {
    type Item = Result<Entry, IndexError>;

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(page) = &self.current {
                if let Some(entry) = page.entries().get(self.at) {
                    self.at += 1;
                    return Some(Ok(Entry::decode(entry)));
                }
                self.current = None;
                self.page += 1;
                self.at = 0;
            }
            if self.page >= self.segment.page_count() {
                return None;
            }
            match self.segment.read_page(self.page) {
                Ok(page) => self.current = Some(page),
                Err(error) => {
                    self.page = u32::MAX;
                    return Some(Err(error));
                }
            }
        }
    }
}

/// Writes entries, which must come in ascending order of their keys, as segment `number`. The file is synced and has its name
/// when this returns; the directory is synced by whoever publishes the segment.
pub fn write(
    directory: &Path,
    number: u64,
    entries_max: usize,
    entries: impl Iterator<Item = Result<Entry, IndexError>>,
) -> Result<(), IndexError> {
    let path = path(directory, number);
    let failed = || IndexError::io("write", &path);
    let file = tempfile::Builder::new().prefix(TEMPORARY_PREFIX).tempfile_in(directory).map_err(failed())?;
    let mut out = BufWriter::with_capacity(1 << 20, file);
    let mut filter = Filter::with_capacity(entries_max);
    let mut fences: Vec<u8> = Vec::with_capacity(entries_max.div_ceil(PAGE_ENTRIES) * 8);
    let mut body: Vec<u8> = Vec::with_capacity(PAGE_BODY_BYTES);
    let mut count = 0u64;
    for entry in entries {
        let entry = entry?;
        if body.is_empty() {
            fences.extend_from_slice(&fence(&entry.id).to_be_bytes());
        }
        filter.insert(&entry.id);
        body.extend_from_slice(&entry.encode());
        count += 1;
        if body.len() == PAGE_BODY_BYTES {
            write_page(&mut out, &mut body).map_err(failed())?;
        }
    }
    if !body.is_empty() {
        write_page(&mut out, &mut body).map_err(failed())?;
    }
    let mut tables = filter.encode();
    let filter_bytes = tables.len() as u64;
    tables.append(&mut fences);
    out.write_all(&tables).map_err(failed())?;
    out.write_all(&encode_trailer(count, filter_bytes, blake3::hash(&tables).as_bytes())).map_err(failed())?;
    let file = out.into_inner().map_err(|error| IndexError::io("write", &path)(error.into_error()))?;
    file.as_file().sync_all().map_err(failed())?;
    file.persist(&path).map_err(|error| IndexError::io("write", &path)(error.error))?;
    Ok(())
}

fn write_page(out: &mut impl Write, body: &mut Vec<u8>) -> std::io::Result<()> {
    body.resize(PAGE_BODY_BYTES, 0);
    let digest = blake3::hash(body);
    out.write_all(body)?;
    out.write_all(digest.as_bytes().get(..CHECK_BYTES).unwrap_or_default())?;
    body.clear();
    Ok(())
}

fn encode_trailer(entries: u64, filter_bytes: u64, digest: &[u8; 32]) -> Vec<u8> {
    let mut out = Vec::with_capacity(TRAILER_BYTES);
    out.extend_from_slice(&MAGIC);
    out.put_u16(VERSION);
    out.extend_from_slice(&[0; 6]);
    out.put_u64(entries);
    out.put_u64(filter_bytes);
    out.extend_from_slice(digest);
    let own = blake3::hash(&out);
    out.extend_from_slice(own.as_bytes());
    out
}

fn decode_trailer(bytes: &[u8; TRAILER_BYTES]) -> Option<(u64, u64, [u8; 32])> {
    let (covered, own) = bytes.split_at_checked(TRAILER_BYTES - 32)?;
    if blake3::hash(covered).as_bytes() != own {
        return None;
    }
    let mut decoder = Decoder::new(covered, "segment trailer");
    decoder.magic(&MAGIC).ok()?;
    decoder.version(VERSION).ok()?;
    decoder.bytes(6).ok()?;
    Some((decoder.u64().ok()?, decoder.u64().ok()?, decoder.array().ok()?))
}

fn fence(id: &ChunkId) -> u64 {
    u64::from_be_bytes(id.as_bytes().first_chunk().copied().unwrap_or_default())
}

fn compare(entry: &[u8; ENTRY_BYTES], id: &ChunkId) -> Ordering {
    entry.first_chunk::<32>().unwrap_or(&[0; 32]).cmp(id.as_bytes())
}

#[cfg(test)]
mod tests {
    use std::fs;

    use strandline_messages::ChunkKind;

    use super::*;
    use crate::index::Copy;

    fn entry(i: u32, pack: u32) -> Entry {
        let copy = Copy { pack, offset: i, bytes: 7, position: 3, kind: ChunkKind::Data, complete: false };
        Entry { id: ChunkId(*blake3::hash(&i.to_le_bytes()).as_bytes()), domain: 1, copy }
    }

    fn sorted(count: u32, copies: u32) -> Vec<Entry> {
        let mut entries: Vec<Entry> = (0..count).flat_map(|i| (0..copies).map(move |pack| entry(i, pack))).collect();
        entries.sort_by_key(Entry::key);
        entries
    }

    #[test]
    fn every_copy_is_found_even_across_pages() {
        let dir = tempfile::tempdir().unwrap();
        let entries = sorted(300, 90);
        write(dir.path(), 5, entries.len(), entries.iter().copied().map(Ok)).unwrap();
        let segment = Segment::open(dir.path(), 5, Arc::new(PageCache::new(1 << 20))).unwrap();
        let mut finder = segment.finder();
        for i in 0..300 {
            let mut found = Vec::new();
            finder.find(&entry(i, 0).id, |entry| found.push(entry)).unwrap();
            assert_eq!(found.len(), 90, "id {i}");
        }
        for i in 300..3000 {
            finder.find(&entry(i, 0).id, |_| panic!("{i} was never written")).unwrap();
        }
        assert_eq!(segment.scan().map(Result::unwrap).collect::<Vec<_>>(), entries);
    }

    #[test]
    fn an_empty_segment_is_legal() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), 0, 0, std::iter::empty()).unwrap();
        let segment = Segment::open(dir.path(), 0, Arc::new(PageCache::new(0))).unwrap();
        segment.finder().find(&ChunkId([0; 32]), |_| panic!("nothing is there")).unwrap();
        assert_eq!(segment.scan().count(), 0);
    }

    #[test]
    fn any_flipped_byte_is_found_when_it_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let entries = sorted(200, 1);
        write(dir.path(), 1, entries.len(), entries.iter().copied().map(Ok)).unwrap();
        let good = fs::read(path(dir.path(), 1)).unwrap();
        for i in (0..good.len()).step_by(7) {
            let mut bad = good.clone();
            bad[i] ^= 0x10;
            fs::write(path(dir.path(), 1), &bad).unwrap();
            let cache = Arc::new(PageCache::new(0));
            let read = Segment::open(dir.path(), 1, cache).and_then(|s| s.scan().collect::<Result<Vec<_>, _>>());
            assert!(read.is_err(), "byte {i}");
        }
    }
}
