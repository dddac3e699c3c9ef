//! The entries that are not in a segment yet.

use std::collections::{BTreeMap, HashMap};

use strandline_messages::ChunkId;

use super::Copy;
use super::entry::Entry;

/// Entries in memory, about 100 bytes each.
#[derive(Debug, Default)]
pub struct MemoryTable {
    rows: HashMap<ChunkId, Row>,
    entries: usize,
    /// How far each pack is indexed once this table is in a segment, bytes from its start.
    pub covered: BTreeMap<u32, u32>,
}

#[derive(Debug)]
struct Row {
    first: (u16, Copy),
    // Empty, and then without an allocation, unless the chunk was stored more than once lately.
    more: Vec<(u16, Copy)>,
}

impl MemoryTable {
    /// How many entries.
    pub fn len(&self) -> usize {
        self.entries
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Adds an entry; one of the same copy is replaced.
    pub fn insert(&mut self, id: ChunkId, domain: u16, copy: Copy) {
        let Some(row) = self.rows.get_mut(&id) else {
            self.rows.insert(id, Row { first: (domain, copy), more: Vec::new() });
            self.entries += 1;
            return;
        };
        let same = |(other_domain, other): &(u16, Copy)| {
            *other_domain == domain && other.pack == copy.pack && other.offset == copy.offset
        };
        if same(&row.first) {
            row.first.1 = copy;
        } else if let Some(known) = row.more.iter_mut().find(|known| same(known)) {
            known.1 = copy;
        } else {
            row.more.push((domain, copy));
            self.entries += 1;
        }
    }

    /// The copies of `id` in `domain`, newest first.
    pub fn find(&self, id: &ChunkId, domain: u16) -> impl Iterator<Item = &Copy> {
        let row = self.rows.get(id);
        let all = row.into_iter().flat_map(|row| row.more.iter().rev().chain([&row.first]));
        all.filter(move |(found, _)| *found == domain).map(|(_, copy)| copy)
    }

    /// All entries in the order of a segment.
    pub fn sorted(&self) -> Vec<Entry> {
        let mut entries = Vec::with_capacity(self.entries);
        for (&id, row) in &self.rows {
            entries.extend([&row.first].into_iter().chain(&row.more).map(|&(domain, copy)| Entry { id, domain, copy }));
        }
        entries.sort_unstable_by_key(Entry::key);
        entries
    }
}
