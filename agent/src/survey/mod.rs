//! Looking into snapshots without their content: finding names, comparing two trees, counting.
//!
//! Everything reads tree chunks only. What was seen is remembered in tables of stated size ([`Recent`]), what must be counted
//! exactly is sorted on disk ([`Sorter`]), so that memory grows neither with snapshots nor with files.

mod changes;
mod chunks;
mod content;
mod recent;
mod search;
mod sorter;
mod switch;
mod totals;

#[cfg(test)]
mod tests;

use std::sync::Arc;

use crate::trees::{ChunkSource, TreeReader};

pub use changes::{Change, Changed, Changes, Counts, compare};
pub use chunks::{ChunkTotals, UniqueChunks};
pub use content::{ContentChange, ContentError, content_change};
pub use recent::Recent;
pub use search::{EntryType, Found, Pattern, PatternError, Prefix, Query, Search, SizeTest};
pub use sorter::Sorter;
pub use switch::Switch;
pub use totals::{FileTotals, RestoreSize, UniqueFiles};

/// Opened tree blocks kept, bytes.
const CACHE_BYTES: usize = 32 << 20;

/// One reader for many snapshots, one after another.
struct Look {
    switch: Arc<Switch>,
    reader: TreeReader,
}

impl Look {
    fn new() -> Self {
        let switch = Arc::new(Switch::default());
        let reader = TreeReader::new(Arc::clone(&switch) as Arc<dyn ChunkSource>, CACHE_BYTES);
        Self { switch, reader }
    }
}
