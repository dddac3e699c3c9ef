//! An immutable sorted run of entries in one file, and the writer that makes it.
//!
//! ```text
//! pages     4096 bytes each: 85 entries of 48 bytes (the last page may hold fewer, then zeros) · first 16 bytes of the
//!           BLAKE3-256 of the page with zeros in their place (four whole BLAKE3 chunks, which are hashed side by side)
//! filter    see `filter`
//! fences    per page the first 8 bytes of its first id
//! trailer   magic "STRINDXS" · version u16 = 2 · 6 zero bytes · entries u64 · filter length u64 · BLAKE3-256 of filter and
//!           fences · BLAKE3-256 of the trailer before it
//! ```
//! Filter and fences are in memory while the segment is open: 12 bits + 0.75 bit per entry. A lookup reads one page (two when
//! the copies of an id straddle pages).

use std::cmp::Ordering;
use std::fs::File;
use std::io::{self, BufReader, BufWriter, ErrorKind, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use strandline_messages::ChunkId;
use strandline_messages::format::cursor::{Decoder, Encoder};

use super::IndexError;
use super::cache::PageCache;
use super::entry::{ENTRY_BYTES, Entry};
use super::filter::Filter;
use crate::failpoint;
use crate::storage::files::TEMPORARY_PREFIX;

/// Bytes of a page.
pub const PAGE_BYTES: usize = 4096;
/// Entries of a full page.
pub const PAGE_ENTRIES: usize = 85;
const PAGE_BODY_BYTES: usize = PAGE_ENTRIES * ENTRY_BYTES;
const CHECK_BYTES: usize = PAGE_BYTES - PAGE_BODY_BYTES;
const BUFFER_BYTES: usize = 1 << 20;
const MAGIC: [u8; 8] = *b"STRINDXS";
const VERSION: u16 = 2;
const TRAILER_BYTES: usize = 8 + 2 + 6 + 8 + 8 + 32 + 32;

/// The entries of one page.
#[derive(Debug)]
pub struct Page {
    bytes: [u8; PAGE_BYTES],
    count: usize,
}

impl Default for Page {
    fn default() -> Self {
        Self { bytes: [0; PAGE_BYTES], count: 0 }
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
        let tables_bytes = pages.saturating_mul(8).saturating_add(filter_bytes);
        let expected = tables_at.saturating_add(tables_bytes);
        if expected != trailer_at {
            return Err(IndexError::damaged(&path, "a segment's lengths"));
        }
        (&file).seek(SeekFrom::Start(tables_at)).map_err(failed)?;
        let mut tables = BufReader::with_capacity(BUFFER_BYTES, Hashing::of((&file).take(tables_bytes)));
        let filter = Filter::read(&mut tables, filter_bytes).map_err(|error| match error.kind() {
            ErrorKind::InvalidData => IndexError::damaged(&path, "a segment's filter"),
            _ => failed(error),
        })?;
        let mut fences = vec![0; usize::try_from(pages).unwrap_or(0)];
        for fence in &mut fences {
            let mut bytes = [0; 8];
            tables.read_exact(&mut bytes).map_err(failed)?;
            *fence = u64::from_be_bytes(bytes);
        }
        if tables.into_inner().hasher.finalize().as_bytes() != &digest {
            return Err(IndexError::damaged(&path, "a segment's filter"));
        }
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
        let before = u64::from(number) * PAGE_ENTRIES as u64;
        let count = usize::try_from(self.entries.saturating_sub(before)).unwrap_or(PAGE_ENTRIES).min(PAGE_ENTRIES);
        let mut page = Page { bytes: [0; PAGE_BYTES], count };
        let offset = u64::from(number) * PAGE_BYTES as u64;
        self.file.read_exact_at(&mut page.bytes, offset).map_err(IndexError::io("read", &self.path))?;
        let stored = page.bytes.last_chunk_mut().map(std::mem::take);
        if stored != Some(check(&page.bytes)) {
            return Err(IndexError::damaged(&self.path, "a page's digest"));
        }
        Ok(Arc::new(page))
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
    let mut out = BufWriter::with_capacity(BUFFER_BYTES, file);
    let mut filter = Filter::with_capacity(entries_max).map_err(failed())?;
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
    let mut tables = BufWriter::with_capacity(BUFFER_BYTES, Hashing::of(&mut out));
    filter.write(&mut tables).and_then(|()| tables.write_all(&fences)).map_err(failed())?;
    let hashed = tables.into_inner().map_err(|error| failed()(error.into_error()))?;
    let digest = hashed.hasher.finalize();
    let trailer = encode_trailer(count, filter.encoded_bytes() as u64, digest.as_bytes());
    out.write_all(&trailer).map_err(failed())?;
    let file = out.into_inner().map_err(|error| IndexError::io("write", &path)(error.into_error()))?;
    failpoint::reached("segment/written");
    failpoint::sync("segment/sync", || file.as_file().sync_all()).map_err(failed())?;
    file.persist(&path).map_err(|error| IndexError::io("write", &path)(error.error))?;
    failpoint::reached("segment/renamed");
    Ok(())
}

fn write_page(out: &mut impl Write, body: &mut Vec<u8>) -> io::Result<()> {
    body.resize(PAGE_BYTES, 0);
    let check = check(body);
    body.truncate(PAGE_BODY_BYTES);
    out.write_all(body)?;
    out.write_all(&check)?;
    body.clear();
    Ok(())
}

/// What a page ends with; `page` has zeros there.
fn check(page: &[u8]) -> [u8; CHECK_BYTES] {
    blake3::hash(page).as_bytes().first_chunk().copied().unwrap_or_default()
}

/// Hashes what passes, on its way to or from `inner`.
#[derive(Debug)]
struct Hashing<T> {
    inner: T,
    hasher: blake3::Hasher,
}

impl<T> Hashing<T> {
    fn of(inner: T) -> Self {
        Self { inner, hasher: blake3::Hasher::new() }
    }
}

impl<T: Read> Read for Hashing<T> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(bytes)?;
        self.hasher.update(bytes.get(..count).unwrap_or_default());
        Ok(count)
    }
}

impl<T: Write> Write for Hashing<T> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.inner.write_all(bytes)?;
        self.hasher.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
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
