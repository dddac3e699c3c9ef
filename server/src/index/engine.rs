//! Our chunk index: a table in memory, frozen tables on their way to disk, and immutable sorted segments.
//!
//! Owns the index directory of one repository and, from the first full table on, two threads: one writes frozen tables as
//! segments, one merges segments so that their number grows with the logarithm of the entries. Readers take a snapshot of the
//! lists and never wait for either. Writers wait only when [`FROZEN_MAX`] tables have piled up.
//!
//! Invariants: of two entries of one copy the newer one wins, and the lists go from new to old. A segment counts only once the
//! manifest names it. A pack's covered position in the manifest never lies beyond what the named segments hold. After damage
//! was seen the manifest is removed and never written again, so that the next start builds the index from the packs.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use parking_lot::{Condvar, Mutex, RwLock};
use strandline_messages::{ChunkId, DomainId};

use super::cache::PageCache;
use super::entry::Entry;
use super::manifest::{self, DROPPED, IndexManifest};
use super::memory::MemoryTable;
use super::merge::{Merge, merge_due};
use super::segment::{self, Segment};
use super::{COPIES_MAX, ChunkIndex, Copy, Found, IndexError};
use crate::failpoint;

/// Most full tables that wait to be written: two of them and the active one are about 20 MiB per repository at the default size.
pub const FROZEN_MAX: usize = 2;
/// Most entries of a table, unless more of them come at once: a map of 2^17 places takes so many.
pub const FLUSH_ENTRIES: usize = 7 << 14;

/// Entries that are not left in memory when a session ends; a smaller segment costs more than it frees.
const RELIEVED_ENTRIES: usize = 1 << 13;

/// The index of one repository.
#[derive(Debug)]
pub struct SegmentIndex {
    shared: Arc<Shared>,
    threads: Mutex<Vec<JoinHandle<()>>>,
}

#[derive(Debug)]
struct Shared {
    directory: PathBuf,
    cache: Arc<PageCache>,
    flush_entries: usize,
    active: RwLock<MemoryTable>,
    /// Changed only while `book` is held; locked for no longer than it takes to copy or replace the pointer.
    tables: RwLock<Arc<Tables>>,
    domains: RwLock<Vec<DomainId>>,
    /// Packs that are gone: their entries count no more, and merges leave them out.
    dropped: RwLock<HashSet<u32>>,
    /// What the manifest on disk says.
    book: Mutex<IndexManifest>,
    /// Held while a frozen table is written; taken before `book`.
    flushing: Mutex<()>,
    signal: Mutex<Signal>,
    changed: Condvar,
    damaged: AtomicBool,
}

#[derive(Debug, Default)]
struct Tables {
    /// Newest first.
    frozen: Vec<Arc<MemoryTable>>,
    /// Newest first, all older than the frozen ones.
    segments: Vec<Arc<Segment>>,
}

/// What a background thread does until it is told to end.
type Work = fn(&Shared);

#[derive(Debug, Default)]
struct Signal {
    flush: bool,
    merge: bool,
    closing: bool,
    error: Option<String>,
}

impl SegmentIndex {
    /// Opens the index in `directory` (which exists), or begins an empty one. Damage is an error: see [`SegmentIndex::anew`].
    pub fn open(directory: &Path, cache: Arc<PageCache>, flush_entries: usize) -> Result<Self, IndexError> {
        let book = IndexManifest::load(directory)?.unwrap_or_default();
        let open = |&number: &u64| Segment::open(directory, number, Arc::clone(&cache)).map(Arc::new);
        let segments = book.segments.iter().map(open).collect::<Result<Vec<_>, _>>()?;
        remove_strangers(directory, &book)?;
        let shared = Shared {
            directory: directory.to_path_buf(),
            cache,
            flush_entries: flush_entries.max(1),
            active: RwLock::default(),
            tables: RwLock::new(Arc::new(Tables { frozen: Vec::new(), segments })),
            domains: RwLock::new(book.domains.clone()),
            dropped: RwLock::new(book.dropped().collect()),
            book: Mutex::new(book),
            flushing: Mutex::default(),
            signal: Mutex::default(),
            changed: Condvar::new(),
            damaged: AtomicBool::new(false),
        };
        Ok(Self { shared: Arc::new(shared), threads: Mutex::default() })
    }

    /// Forgets what is in `directory` and begins an empty index.
    pub fn anew(directory: &Path, cache: Arc<PageCache>, flush_entries: usize) -> Result<Self, IndexError> {
        match fs::remove_file(manifest::path(directory)) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            other => other.map_err(IndexError::io("reset", directory))?,
        }
        failpoint::reached("index/reset");
        Self::open(directory, cache, flush_entries)
    }

    /// The highest number of a pack of which the index knows anything, be it that it is gone; 0 if there is none.
    pub fn highest_pack(&self) -> u32 {
        self.shared.book.lock().covered.last_key_value().map_or(0, |(&pack, _)| pack)
    }

    /// Whether the pack was dropped, durably.
    pub fn is_dropped(&self, pack: u32) -> bool {
        self.shared.dropped.read().contains(&pack)
    }

    /// How many segments there are.
    pub fn segment_count(&self) -> usize {
        self.shared.tables().segments.len()
    }

    fn put(
        &self,
        domain: u16,
        copies: impl ExactSizeIterator<Item = (ChunkId, Copy)>,
        covered: Option<(u32, u32)>,
    ) -> Result<(), IndexError> {
        if self.shared.signal.lock().closing {
            return Err(closing());
        }
        let present = self.shared.active.read().len();
        if present > 0 && present + copies.len() > self.shared.flush_entries {
            self.freeze(true)?;
        }
        let mut active = self.shared.active.write();
        copies.for_each(|(id, copy)| active.insert(id, domain, copy));
        if let Some((pack, covered)) = covered {
            active.covered.insert(pack, covered);
        }
        Ok(())
    }

    /// Moves the active table to the frozen ones, waiting for room if there is none.
    fn freeze(&self, wait: bool) -> Result<(), IndexError> {
        let shared = &self.shared;
        let mut signal = shared.signal.lock();
        while wait && shared.tables().frozen.len() >= FROZEN_MAX {
            if signal.closing {
                return Err(closing());
            }
            signal.flush = true;
            shared.changed.notify_all();
            if let Some(reason) = signal.error.take() {
                return Err(IndexError::Stuck { reason });
            }
            self.start_threads()?;
            shared.changed.wait(&mut signal);
        }
        {
            let _book = shared.book.lock();
            let mut active = shared.active.write();
            let frozen = Arc::new(std::mem::take(&mut *active));
            let old = shared.tables();
            let frozen = [frozen].into_iter().chain(old.frozen.iter().cloned()).collect();
            *shared.tables.write() = Arc::new(Tables { frozen, segments: old.segments.clone() });
        }
        signal.flush = true;
        shared.changed.notify_all();
        if wait { self.start_threads() } else { Ok(()) }
    }

    fn start_threads(&self) -> Result<(), IndexError> {
        let mut threads = self.threads.lock();
        if !threads.is_empty() {
            return Ok(());
        }
        let works: [(&str, Work); 2] = [("index-flush", Shared::flush_loop), ("index-merge", Shared::merge_loop)];
        for (name, work) in works {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || work(&shared));
            threads.push(thread.map_err(IndexError::io("start a thread for", &self.shared.directory))?);
        }
        Ok(())
    }

    fn stop_threads(&self) {
        {
            let mut signal = self.shared.signal.lock();
            signal.closing = true;
            self.shared.changed.notify_all();
        }
        // Not joined under the lock: a writer that starts threads holds the signal, which they need in order to end.
        let threads = std::mem::take(&mut *self.threads.lock());
        for thread in threads {
            // A thread that panicked has nothing left to write; the packs have it all.
            let _ = thread.join();
        }
    }
}

impl Drop for SegmentIndex {
    fn drop(&mut self) {
        self.stop_threads();
    }
}

impl ChunkIndex for SegmentIndex {
    fn insert(&self, domain: DomainId, pack: u32, covered: u32, copies: &[(ChunkId, Copy)]) -> Result<(), IndexError> {
        let domain = self.shared.register(domain)?;
        self.put(domain, copies.iter().copied(), Some((pack, covered)))
    }

    fn flag(&self, domain: DomainId, copies: &[(ChunkId, Copy)], complete: bool) -> Result<(), IndexError> {
        let domain = self.shared.register(domain)?;
        self.put(domain, copies.iter().map(|&(id, copy)| (id, Copy { complete, ..copy })), None)
    }

    fn find(&self, domain: DomainId, ids: &[ChunkId]) -> Result<Found, IndexError> {
        self.shared.find(domain, ids)
    }

    fn covered(&self, pack: u32) -> u32 {
        self.shared.book.lock().covered.get(&pack).copied().unwrap_or(0)
    }

    fn covered_packs(&self) -> Vec<u32> {
        let book = self.shared.book.lock();
        book.covered.iter().filter(|(_, covered)| **covered != DROPPED).map(|(pack, _)| *pack).collect()
    }

    fn drop_pack(&self, pack: u32) -> Result<(), IndexError> {
        let mut book = self.shared.book.lock();
        let mut next = book.clone();
        next.covered.insert(pack, DROPPED);
        self.shared.publish(&mut book, next)?;
        self.shared.dropped.write().insert(pack);
        Ok(())
    }

    fn chunks_at(&self, pack: u32, offset: u32) -> Result<Vec<ChunkId>, IndexError> {
        let here = |entry: &Entry| entry.copy.pack == pack && entry.copy.offset == offset;
        let mut found = BTreeSet::new();
        let mut note = |entry: Entry| {
            if here(&entry) {
                found.insert((entry.copy.position, entry.id));
            }
        };
        self.shared.active.read().sorted().into_iter().for_each(&mut note);
        let tables = self.shared.tables();
        tables.frozen.iter().flat_map(|table| table.sorted()).for_each(&mut note);
        for segment in &tables.segments {
            for entry in segment.scan() {
                note(entry.inspect_err(|error| self.shared.note(error))?);
            }
        }
        Ok(found.into_iter().map(|(_, id)| id).collect())
    }

    fn domains(&self) -> Vec<DomainId> {
        self.shared.domains.read().clone()
    }

    fn entries(&self) -> u64 {
        let active = self.shared.active.read();
        let tables = self.shared.tables();
        let frozen: usize = tables.frozen.iter().map(|table| table.len()).sum();
        tables.segments.iter().map(|segment| segment.entries).sum::<u64>() + (frozen + active.len()) as u64
    }

    fn relieve(&self) -> Result<(), IndexError> {
        let worth_it = self.shared.active.read().len() >= RELIEVED_ENTRIES.min(self.shared.flush_entries);
        if !worth_it || self.shared.tables().frozen.len() >= FROZEN_MAX || self.shared.signal.lock().closing {
            return Ok(());
        }
        self.freeze(false)?;
        self.start_threads()
    }

    fn close(&self) -> Result<(), IndexError> {
        self.stop_threads();
        self.sync()
    }

    fn sync(&self) -> Result<(), IndexError> {
        let unwritten = {
            let active = self.shared.active.read();
            !active.is_empty() || !active.covered.is_empty()
        };
        if unwritten {
            self.freeze(false)?;
        }
        while self.shared.flush_oldest()? {}
        Ok(())
    }
}

impl Shared {
    fn tables(&self) -> Arc<Tables> {
        Arc::clone(&self.tables.read())
    }

    fn number_of(&self, domain: DomainId) -> Option<u16> {
        let place = self.domains.read().iter().position(|known| *known == domain)?;
        u16::try_from(place).ok()
    }

    fn register(&self, domain: DomainId) -> Result<u16, IndexError> {
        if let Some(number) = self.number_of(domain) {
            return Ok(number);
        }
        let mut domains = self.domains.write();
        let place = domains.iter().position(|known| *known == domain).unwrap_or(domains.len());
        let number = u16::try_from(place).ok().filter(|&number| number < u16::MAX).ok_or(IndexError::TooManyDomains)?;
        if place == domains.len() {
            domains.push(domain);
        }
        Ok(number)
    }

    fn find(&self, domain: DomainId, ids: &[ChunkId]) -> Result<Found, IndexError> {
        let Some(domain) = self.number_of(domain) else { return Ok(Found::default()) };
        let mut rows: Vec<(u32, Copy)> = Vec::new();
        let numbered = || (0u32..).zip(ids);
        let tables = {
            let active = self.active.read();
            for (at, id) in numbered() {
                rows.extend(active.find(id, domain).take(COPIES_MAX).map(|&copy| (at, copy)));
            }
            self.tables()
        };
        for table in &tables.frozen {
            for (at, id) in numbered() {
                rows.extend(table.find(id, domain).take(COPIES_MAX).map(|&copy| (at, copy)));
            }
        }
        let mut ascending: Vec<(u32, &ChunkId)> = numbered().collect();
        if !ids.is_sorted() {
            ascending.sort_unstable_by_key(|&(_, id)| id);
        }
        for segment in &tables.segments {
            let mut finder = segment.finder();
            for &(at, id) in &ascending {
                let mut room = COPIES_MAX;
                let keep = |entry: Entry| {
                    if entry.domain == domain && room > 0 {
                        room -= 1;
                        rows.push((at, entry.copy));
                    }
                };
                finder.find(id, keep).inspect_err(|error| self.note(error))?;
            }
        }
        {
            let dropped = self.dropped.read();
            if !dropped.is_empty() {
                rows.retain(|(_, copy)| !dropped.contains(&copy.pack));
            }
        }
        // Stable: for one id the newest source stays in front.
        rows.sort_by_key(|&(at, _)| at);
        Ok(Found::new(without_old_versions(rows)))
    }

    /// Damage means that the next start must build the index anew.
    fn note(&self, error: &IndexError) {
        if matches!(error, IndexError::Damaged { .. }) && !self.damaged.swap(true, Ordering::SeqCst) {
            tracing::error!(%error, "the chunk index is damaged; it is built again at the next start");
            let _book = self.book.lock();
            // If this fails too, the damage is met, and this tried, again.
            let _ = fs::remove_file(manifest::path(&self.directory));
        }
    }

    fn flush_loop(&self) {
        self.work(
            |signal| std::mem::take(&mut signal.flush),
            || {
                while self.flush_oldest()? {
                    let mut signal = self.signal.lock();
                    signal.merge = true;
                    self.changed.notify_all();
                    if signal.closing {
                        break;
                    }
                }
                Ok(())
            },
        );
    }

    fn merge_loop(&self) {
        self.work(
            |signal| std::mem::take(&mut signal.merge),
            || {
                while !self.signal.lock().closing && self.merge_once()? {}
                Ok(())
            },
        );
    }

    fn work(&self, wanted: impl Fn(&mut Signal) -> bool, act: impl Fn() -> Result<(), IndexError>) {
        loop {
            let mut signal = self.signal.lock();
            while !signal.closing && !wanted(&mut signal) {
                self.changed.wait(&mut signal);
            }
            if signal.closing {
                return;
            }
            drop(signal);
            let result = act();
            if let Err(error) = &result {
                tracing::warn!(%error, "background work on the chunk index failed; it is tried again");
                self.note(error);
            }
            let mut signal = self.signal.lock();
            signal.error = result.err().map(|error| error.to_string());
            self.changed.notify_all();
        }
    }

    /// Writes the oldest frozen table as a segment; `false` if there is none.
    fn flush_oldest(&self) -> Result<bool, IndexError> {
        let _one_at_a_time = self.flushing.lock();
        let Some(table) = self.tables().frozen.last().cloned() else { return Ok(false) };
        let entries = table.sorted();
        let number = self.new_number();
        segment::write(&self.directory, number, entries.len(), entries.into_iter().map(Ok))?;
        let segment = Arc::new(Segment::open(&self.directory, number, Arc::clone(&self.cache))?);
        let mut book = self.book.lock();
        let old = self.tables();
        let mut next = IndexManifest { domains: self.domains.read().clone(), ..book.clone() };
        next.segments.insert(0, number);
        for (&pack, &covered) in &table.covered {
            // A pack that was dropped while the table waited stays so.
            next.covered.entry(pack).and_modify(|known| *known = (*known).max(covered)).or_insert(covered);
        }
        self.publish(&mut book, next)?;
        let (_, frozen) = old.frozen.split_last().unzip();
        let segments = [segment].into_iter().chain(old.segments.iter().cloned()).collect();
        *self.tables.write() = Arc::new(Tables { frozen: frozen.unwrap_or_default().to_vec(), segments });
        Ok(true)
    }

    /// Merges one run of the newest segments, if that is due; `false` if it is not.
    fn merge_once(&self) -> Result<bool, IndexError> {
        let segments = self.tables().segments.clone();
        let sizes: Vec<u64> = segments.iter().map(|segment| segment.entries).collect();
        let Some(run) = merge_due(&sizes).and_then(|count| segments.get(..count)) else { return Ok(false) };
        let number = self.new_number();
        let entries: u64 = run.iter().map(|segment| segment.entries).sum();
        let dropped = self.dropped.read().clone();
        let merged = Merge::of(run)?.filter(|entry| !matches!(entry, Ok(entry) if dropped.contains(&entry.copy.pack)));
        segment::write(&self.directory, number, usize::try_from(entries).unwrap_or(usize::MAX), merged)?;
        let merged = Arc::new(Segment::open(&self.directory, number, Arc::clone(&self.cache))?);
        let gone = |candidate: u64| run.iter().any(|segment| segment.number == candidate);
        let mut book = self.book.lock();
        let old = self.tables();
        // Tables flushed meanwhile stand in front of the run; it stays in one piece.
        let place = old.segments.iter().position(|segment| gone(segment.number)).unwrap_or(0);
        let mut list: Vec<Arc<Segment>> =
            old.segments.iter().filter(|segment| !gone(segment.number)).cloned().collect();
        list.insert(place.min(list.len()), merged);
        let next = IndexManifest { segments: list.iter().map(|segment| segment.number).collect(), ..book.clone() };
        self.publish(&mut book, next)?;
        *self.tables.write() = Arc::new(Tables { frozen: old.frozen.clone(), segments: list });
        drop(book);
        for segment in run {
            // What cannot be removed now is a stranger at the next start.
            let _ = fs::remove_file(segment.path());
            failpoint::reached("segment/removed");
        }
        Ok(true)
    }

    fn publish(&self, book: &mut IndexManifest, next: IndexManifest) -> Result<(), IndexError> {
        if self.damaged.load(Ordering::SeqCst) {
            return Err(IndexError::damaged(&self.directory, "damage was found earlier"));
        }
        next.store(&self.directory)?;
        failpoint::reached("index/published");
        *book = next;
        Ok(())
    }

    fn new_number(&self) -> u64 {
        let mut book = self.book.lock();
        book.next_segment += 1;
        book.next_segment
    }
}

fn closing() -> IndexError {
    IndexError::Stuck { reason: "it is being closed".to_owned() }
}

fn without_old_versions(mut rows: Vec<(u32, Copy)>) -> Vec<(u32, Copy)> {
    let mut kept: Vec<(u32, Copy)> = Vec::with_capacity(rows.len());
    for row in rows.drain(..) {
        let same_id = kept.iter().rev().take_while(|(at, _)| *at == row.0);
        let mut count = 0;
        let known = same_id.inspect(|_| count += 1).any(|(_, c)| c.pack == row.1.pack && c.offset == row.1.offset);
        if !known && count < COPIES_MAX {
            kept.push(row);
        }
    }
    kept
}

fn remove_strangers(directory: &Path, book: &IndexManifest) -> Result<(), IndexError> {
    let named: Vec<PathBuf> = book.segments.iter().map(|&number| segment::path(directory, number)).collect();
    for entry in fs::read_dir(directory).map_err(IndexError::io("list", directory))? {
        let path = entry.map_err(IndexError::io("list", directory))?.path();
        if path != manifest::path(directory) && !named.contains(&path) && path.is_file() {
            match fs::remove_file(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::ReadOnlyFilesystem => continue,
                other => other.map_err(IndexError::io("clean", &path))?,
            }
            failpoint::reached("index/cleaned");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;
    use strandline_messages::ChunkKind;

    use super::*;

    const DOMAIN: DomainId = DomainId([7; 16]);

    fn id(i: u32) -> ChunkId {
        ChunkId(*blake3::hash(&i.to_le_bytes()).as_bytes())
    }

    fn copy(pack: u32, offset: u32) -> Copy {
        Copy { pack, offset, bytes: 99, position: 1, kind: ChunkKind::Tree, complete: false }
    }

    fn open(dir: &Path, flush: usize) -> SegmentIndex {
        SegmentIndex::open(dir, Arc::new(PageCache::new(1 << 20)), flush).unwrap()
    }

    fn found(index: &SegmentIndex, id: ChunkId) -> Vec<Copy> {
        let found = index.find(DOMAIN, &[id]).unwrap();
        let mut copies: Vec<Copy> = found.copies(0).copied().collect();
        copies.sort();
        copies
    }

    #[test]
    fn entries_survive_flushes_merges_and_a_clean_restart() {
        let dir = tempfile::tempdir().unwrap();
        let index = open(dir.path(), 100);
        for i in 0..5000u32 {
            index.insert(DOMAIN, 1 + i / 1000, 96 + i, &[(id(i), copy(1 + i / 1000, i))]).unwrap();
        }
        let check = |index: &SegmentIndex| {
            let ids: Vec<ChunkId> = (0..6000).map(id).collect();
            let found = index.find(DOMAIN, &ids).unwrap();
            for i in 0..6000u32 {
                let copies: Vec<Copy> = found.copies(i as usize).copied().collect();
                let expected = if i < 5000 { vec![copy(1 + i / 1000, i)] } else { vec![] };
                assert_eq!(copies, expected, "id {i}");
            }
        };
        check(&index);
        index.close().unwrap();
        check(&index);
        let index = open(dir.path(), 100);
        check(&index);
        assert_eq!(index.covered(5), 96 + 4999);
        assert_eq!(index.covered(6), 0);
        assert!(index.find(DomainId::FULL, &[id(1)]).unwrap().rows().is_empty(), "another domain sees nothing");
    }

    #[test]
    fn what_is_in_memory_is_written_when_it_is_relieved() {
        let dir = tempfile::tempdir().unwrap();
        let index = open(dir.path(), 100);
        let insert = |numbers: std::ops::Range<u32>| {
            numbers.for_each(|i| index.insert(DOMAIN, 1, 96 + i, &[(id(i), copy(1, i))]).unwrap());
        };
        insert(0..50);
        index.relieve().unwrap();
        assert_eq!(index.shared.active.read().len(), 50, "too few to be worth a segment");
        insert(50..100);
        index.relieve().unwrap();
        assert!(index.shared.active.read().is_empty());
        while index.segment_count() == 0 {
            std::thread::yield_now();
        }
        assert_eq!(index.find(DOMAIN, &(0..101).map(id).collect::<Vec<_>>()).unwrap().rows().len(), 100);
    }

    #[test]
    fn a_newer_flag_wins_wherever_the_older_entry_is() {
        let dir = tempfile::tempdir().unwrap();
        let index = open(dir.path(), 3);
        index.insert(DOMAIN, 1, 100, &[(id(1), copy(1, 96))]).unwrap();
        for i in 10..40 {
            index.insert(DOMAIN, 1, 100, &[(id(i), copy(1, 96))]).unwrap();
        }
        index.flag(DOMAIN, &[(id(1), copy(1, 96))], true).unwrap();
        assert_eq!(found(&index, id(1)), [Copy { complete: true, ..copy(1, 96) }]);
        index.close().unwrap();
        let index = open(dir.path(), 3);
        assert_eq!(found(&index, id(1)), [Copy { complete: true, ..copy(1, 96) }]);
        index.flag(DOMAIN, &[(id(1), copy(1, 96))], false).unwrap();
        assert_eq!(found(&index, id(1)), [copy(1, 96)]);
        index.sync().unwrap();
        drop(index);
        assert_eq!(found(&open(dir.path(), 3), id(1)), [copy(1, 96)], "synced changes survive a crash");
    }

    #[test]
    fn a_dropped_pack_is_forgotten_for_good_and_its_entries_disappear_with_the_next_merge() {
        let dir = tempfile::tempdir().unwrap();
        let index = open(dir.path(), 4);
        for i in 0..40u32 {
            index.insert(DOMAIN, 1 + i % 2, 100 + i, &[(id(i), copy(1 + i % 2, i))]).unwrap();
        }
        assert_eq!(index.chunks_at(1, 6).unwrap(), [id(6)]);
        index.drop_pack(1).unwrap();
        let check = |index: &SegmentIndex| {
            assert_eq!(found(index, id(6)), []);
            assert_eq!(found(index, id(7)), [copy(2, 7)]);
            assert_eq!(index.covered_packs(), [2]);
        };
        // What is in memory only must not bring it back.
        index.sync().unwrap();
        check(&index);
        index.close().unwrap();
        let index = open(dir.path(), 4);
        check(&index);
        while index.shared.merge_once().unwrap() {}
        check(&index);
    }

    #[test]
    fn a_damaged_page_is_an_error_and_the_next_start_begins_anew() {
        let dir = tempfile::tempdir().unwrap();
        let index = open(dir.path(), 1000);
        index.insert(DOMAIN, 1, 100, &[(id(1), copy(1, 96))]).unwrap();
        index.close().unwrap();
        drop(index);
        let segment = segment::path(dir.path(), IndexManifest::load(dir.path()).unwrap().unwrap().segments[0]);
        let mut bytes = fs::read(&segment).unwrap();
        bytes[40] ^= 1;
        fs::write(&segment, bytes).unwrap();
        let index = open(dir.path(), 1000);
        assert!(matches!(index.find(DOMAIN, &[id(1)]), Err(IndexError::Damaged { .. })));
        drop(index);
        let index = open(dir.path(), 1000);
        assert_eq!(index.covered(1), 0);
        assert_eq!(index.entries(), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn the_index_agrees_with_a_map(
            operations in prop::collection::vec((0u32..60, 1u32..4, 0u32..3, any::<bool>()), 1..200),
            flush in 1usize..20,
            reopen in 0usize..200,
        ) {
            let dir = tempfile::tempdir().unwrap();
            let mut index = open(dir.path(), flush);
            let mut model: HashMap<(u32, u32, u32), Copy> = HashMap::new();
            for (step, (key, pack, offset, complete)) in operations.into_iter().enumerate() {
                if step == reopen {
                    index.close().unwrap();
                    index = open(dir.path(), flush);
                }
                let new = Copy { complete, ..copy(pack, offset) };
                if complete {
                    index.flag(DOMAIN, &[(id(key), new)], true).unwrap();
                } else {
                    index.insert(DOMAIN, pack, 100, &[(id(key), new)]).unwrap();
                }
                model.insert((key, pack, offset), new);
            }
            for key in 0..60 {
                let mut expected: Vec<Copy> = model.iter().filter(|(k, _)| k.0 == key).map(|(_, c)| *c).collect();
                expected.sort();
                prop_assert_eq!(found(&index, id(key)), expected);
            }
        }
    }
}
