//! A table of bounded size that forgets what was used longest ago.

use std::collections::HashMap;
use std::hash::Hash;

/// Two generations: what is used is in the young one; when that is full, the old one is forgotten and the young one is old.
#[derive(Debug)]
pub struct Recent<K, V> {
    young: HashMap<K, V>,
    old: HashMap<K, V>,
    generation_max: usize,
}

impl<K: Hash + Eq, V: Clone> Recent<K, V> {
    /// Holds at most `entries_max` entries, and at least the half of that which was used last.
    pub fn new(entries_max: usize) -> Self {
        Self { young: HashMap::new(), old: HashMap::new(), generation_max: (entries_max / 2).max(1) }
    }

    /// What is remembered of `key`.
    pub fn get(&mut self, key: &K) -> Option<V> {
        if let Some(value) = self.young.get(key) {
            return Some(value.clone());
        }
        let (key, value) = self.old.remove_entry(key)?;
        self.insert(key, value.clone());
        Some(value)
    }

    /// Remembers it.
    pub fn insert(&mut self, key: K, value: V) {
        if self.young.len() >= self.generation_max {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(key, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_used_stays_and_the_rest_is_forgotten() {
        let mut recent = Recent::new(100);
        recent.insert(0, "used");
        for n in 1..1000 {
            assert_eq!(recent.get(&0), Some("used"));
            recent.insert(n, "once");
            assert!(recent.young.len() + recent.old.len() <= 100);
        }
        assert_eq!(recent.get(&999), Some("once"));
        assert_eq!(recent.get(&500), None);
    }
}
