//! Measures the chunk index: `cargo run --release --example index_bench -- [ENTRIES] [DIRECTORY]`.
//!
//! Inserts in groups as a pack writer does, then looks up batches of ids that are there and ids that are not. Ids are uniform,
//! so the sequence of lookups is random over the whole index.

use std::path::PathBuf;
use std::sync::Arc;

use strandline_actors::runtime::clock;
use strandline_messages::{ChunkId, ChunkKind, DomainId};
use strandline_server::index::cache::PageCache;
use strandline_server::index::engine::{FLUSH_ENTRIES, SegmentIndex};
use strandline_server::index::{ChunkIndex, Copy};

const GROUP: u32 = 1000;
const BATCH: u32 = 8192;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let entries: u32 = arguments.next().as_deref().unwrap_or("1000000").parse()?;
    let scratch = tempfile::tempdir()?;
    let directory = arguments.next().map_or_else(|| scratch.path().to_path_buf(), PathBuf::from);
    let index = SegmentIndex::open(&directory, Arc::new(PageCache::new(64 << 20)), FLUSH_ENTRIES)?;
    let began = clock::now();
    for first in (0..entries).step_by(GROUP as usize) {
        let copies: Vec<(ChunkId, Copy)> = (first..entries.min(first + GROUP)).map(|i| (id(i), copy(i))).collect();
        index.insert(DomainId::FULL, 1, first + 1, &copies)?;
    }
    report("inserts", entries, began.elapsed().as_secs_f64());
    let queries = entries.min(1_000_000);
    for (name, offset) in [("hits, cold", 0), ("hits, warm", 0), ("misses", entries)] {
        let batches: Vec<Vec<ChunkId>> = (0..queries / BATCH)
            .map(|batch| (0..BATCH).map(|i| id(offset + spread(batch * BATCH + i, entries))).collect())
            .collect();
        let began = clock::now();
        let mut found = 0;
        for batch in &batches {
            found += index.find(DomainId::FULL, batch)?.rows().len();
        }
        report(name, queries / BATCH * BATCH, began.elapsed().as_secs_f64());
        anyhow::ensure!((found > 0) == (offset == 0), "the index answers wrongly");
    }
    let began = clock::now();
    index.close()?;
    println!("close          {:>10.3} s, {} segments", began.elapsed().as_secs_f64(), index.segment_count());
    Ok(())
}

fn id(i: u32) -> ChunkId {
    ChunkId(*blake3::hash(&i.to_le_bytes()).as_bytes())
}

// Visits every number below `entries` in an order that jumps about.
fn spread(i: u32, entries: u32) -> u32 {
    u32::try_from(u64::from(i) * 2_654_435_761 % u64::from(entries)).unwrap_or(0)
}

fn copy(i: u32) -> Copy {
    Copy { pack: 1, offset: i, bytes: 1 << 20, position: 0, kind: ChunkKind::Data, complete: false }
}

fn report(what: &str, count: u32, seconds: f64) {
    println!("{what:<14} {count:>10} in {seconds:>8.3} s = {:>10.0}/s", f64::from(count) / seconds);
}
