//! The entries that are not in a segment yet.

use std::collections::BTreeMap;
use std::collections::hash_map::{Entry as Slot, HashMap};

use strandline_messages::ChunkId;

use super::Copy;
use super::entry::Entry;

/// Entries in memory, 53 bytes each, and up to as much again for what the map keeps free.
#[derive(Debug, Default)]
pub struct MemoryTable {
    first: HashMap<ChunkId, (u16, Copy)>,
    /// Of the few chunks that were stored more than once lately, the later copies.
    more: HashMap<ChunkId, Vec<(u16, Copy)>>,
    entries: usize,
    /// How far each pack is indexed once this table is in a segment, bytes from its start.
    pub covered: BTreeMap<u32, u32>,
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
        let same = |(other_domain, other): &(u16, Copy)| {
            *other_domain == domain && other.pack == copy.pack && other.offset == copy.offset
        };
        let mut first = match self.first.entry(id) {
            Slot::Vacant(free) => {
                free.insert((domain, copy));
                self.entries += 1;
                return;
            }
            Slot::Occupied(first) => first,
        };
        if same(first.get()) {
            first.get_mut().1 = copy;
            return;
        }
        let more = self.more.entry(id).or_default();
        if let Some(known) = more.iter_mut().find(|known| same(known)) {
            known.1 = copy;
        } else {
            more.push((domain, copy));
            self.entries += 1;
        }
    }

    /// The copies of `id` in `domain`, newest first.
    pub fn find(&self, id: &ChunkId, domain: u16) -> impl Iterator<Item = &Copy> {
        let more = self.more.get(id).into_iter().flat_map(|more| more.iter().rev());
        more.chain(self.first.get(id)).filter(move |(found, _)| *found == domain).map(|(_, copy)| copy)
    }

    /// All entries in the order of a segment.
    pub fn sorted(&self) -> Vec<Entry> {
        let mut entries = Vec::with_capacity(self.entries);
        let later = self.more.iter().flat_map(|(id, more)| more.iter().map(move |copy| (id, copy)));
        entries.extend(self.first.iter().chain(later).map(|(&id, &(domain, copy))| Entry { id, domain, copy }));
        entries.sort_unstable_by_key(Entry::key);
        entries
    }
}

#[cfg(test)]
mod tests {
    use strandline_messages::ChunkKind;

    use super::*;

    fn copy(pack: u32, bytes: u32) -> Copy {
        Copy { pack, offset: 0, bytes, position: 0, kind: ChunkKind::Data, complete: false }
    }

    #[test]
    fn copies_come_newest_first_and_of_their_domain_alone() {
        let (id, other) = (ChunkId([1; 32]), ChunkId([2; 32]));
        let mut table = MemoryTable::default();
        for (pack, domain) in [(5, 0), (3, 0), (4, 1), (9, 0), (6, 1)] {
            table.insert(id, domain, copy(pack, 1));
        }
        table.insert(other, 0, copy(5, 1));
        let packs = |table: &MemoryTable, domain| -> Vec<(u32, u32)> {
            table.find(&id, domain).map(|copy| (copy.pack, copy.bytes)).collect()
        };
        assert_eq!(packs(&table, 0), [(9, 1), (3, 1), (5, 1)]);
        assert_eq!(packs(&table, 1), [(6, 1), (4, 1)]);
        assert_eq!(table.len(), 6);
        // The same copies again, the first of all and a later one: what is known of them is replaced where it stands.
        table.insert(id, 0, copy(5, 2));
        table.insert(id, 0, copy(3, 3));
        assert_eq!(packs(&table, 0), [(9, 1), (3, 3), (5, 2)]);
        assert_eq!(table.len(), 6);
        let sorted = table.sorted();
        assert!(sorted.len() == 6 && sorted.is_sorted_by_key(Entry::key));
    }
}
