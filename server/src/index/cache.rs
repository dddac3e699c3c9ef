//! A bounded cache of segment pages, shared by all repositories of an engine. CLOCK eviction, sharded to keep its locks short.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::Mutex;

use super::segment::Page;

const SHARDS: usize = 16;

/// Which page: the segment's number in this process, the page's number in the segment.
pub type PageKey = (u64, u32);

/// The cache.
#[derive(Debug)]
pub struct PageCache {
    shards: Vec<Mutex<Shard>>,
    pages_per_shard: usize,
    next_owner: AtomicU64,
}

#[derive(Debug, Default)]
struct Shard {
    places: HashMap<PageKey, usize>,
    slots: Vec<Slot>,
    hand: usize,
}

#[derive(Debug)]
struct Slot {
    key: PageKey,
    page: Arc<Page>,
    used: bool,
}

impl PageCache {
    /// Holds at most `bytes` of pages (and at least one page per shard).
    pub fn new(bytes: usize) -> Self {
        let pages_per_shard = (bytes / size_of::<Page>() / SHARDS).max(1);
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        Self { shards, pages_per_shard, next_owner: AtomicU64::new(1) }
    }

    /// A number under which one more segment may keep its pages; never given twice.
    pub fn new_owner(&self) -> u64 {
        self.next_owner.fetch_add(1, Ordering::Relaxed)
    }

    /// The page, if it is here.
    pub fn get(&self, key: PageKey) -> Option<Arc<Page>> {
        let mut shard = self.shard(key)?.lock();
        let place = *shard.places.get(&key)?;
        let slot = shard.slots.get_mut(place)?;
        slot.used = true;
        Some(Arc::clone(&slot.page))
    }

    /// Keeps the page, in place of one that was not asked for lately.
    pub fn put(&self, key: PageKey, page: Arc<Page>) {
        let Some(shard) = self.shard(key) else { return };
        let mut guard = shard.lock();
        let shard = &mut *guard;
        if shard.places.contains_key(&key) {
            return;
        }
        let slot = Slot { key, page, used: false };
        if shard.slots.len() < self.pages_per_shard {
            shard.places.insert(key, shard.slots.len());
            shard.slots.push(slot);
            return;
        }
        // Ends after at most two rounds: the first clears every mark.
        while let Some(victim) = shard.slots.get_mut(shard.hand) {
            if !std::mem::take(&mut victim.used) {
                shard.places.remove(&victim.key);
                *victim = slot;
                shard.places.insert(key, shard.hand);
                shard.hand = (shard.hand + 1) % self.pages_per_shard;
                return;
            }
            shard.hand = (shard.hand + 1) % self.pages_per_shard;
        }
    }

    fn shard(&self, (owner, page): PageKey) -> Option<&Mutex<Shard>> {
        let spread = owner.wrapping_mul(31).wrapping_add(page.into()) % SHARDS as u64;
        self.shards.get(usize::try_from(spread).ok()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_keeps_what_is_asked_for_and_never_exceeds_its_bound() {
        let cache = PageCache::new(SHARDS * 4 * size_of::<Page>());
        let page = Arc::new(Page::default());
        cache.put((1, 0), Arc::clone(&page));
        for i in 1..1000 {
            assert!(cache.get((1, 0)).is_some(), "evicted after {i}");
            cache.put((1, i), Arc::clone(&page));
        }
        let held: usize = cache.shards.iter().map(|shard| shard.lock().slots.len()).sum();
        assert!(held <= SHARDS * 4);
        let placed: usize = cache.shards.iter().map(|shard| shard.lock().places.len()).sum();
        assert_eq!(held, placed);
    }
}
