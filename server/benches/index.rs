//! The chunk index from the first insert to lookups past every cache, with the memory that it holds meanwhile.
//!
//! `cargo bench -p strandline-server --bench index`. `STRAND_BENCH_ENTRIES` says how many entries (1,000,000), and
//! `STRAND_BENCH_DIR` where they are put (a new temporary directory; the one that is named must not hold an index).
//!
//! Entries come in groups as from a pack writer, lookups in batches as from an agent. Ids are uniform, so lookups jump
//! about the whole index. *Cold*: the system's page cache was told to drop the segments before; that is what an index
//! beyond the memory of its machine costs. *Warm*: the system's page cache holds the segments, ours a few MiB of them.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use rustix::fs::{Advice, fadvise};
use strandline_actors::runtime::clock;
use strandline_messages::{ChunkId, ChunkKind, DomainId, limits};
use strandline_server::engine::INDEX_CACHE_BYTES;
use strandline_server::index::cache::PageCache;
use strandline_server::index::engine::{FLUSH_ENTRIES, SegmentIndex};
use strandline_server::index::{ChunkIndex, Copy};

/// Entries of one group commit.
const GROUP: u64 = 1000;
/// Ids of one question.
const BATCH: u64 = limits::QUERY_IDS_MAX as u64;
/// Most lookups of one phase, and of one whose every lookup reads the disk.
const LOOKUPS_MAX: u64 = 4_000_000;
const COLD_LOOKUPS_MAX: u64 = 250_000;

fn main() -> anyhow::Result<()> {
    let entries: u64 = std::env::var("STRAND_BENCH_ENTRIES").map_or(Ok(1_000_000), |text| text.parse())?;
    let scratch = tempfile::tempdir()?;
    let directory = std::env::var_os("STRAND_BENCH_DIR").map_or_else(|| scratch.path().to_path_buf(), PathBuf::from);
    let cache = || Arc::new(PageCache::new(INDEX_CACHE_BYTES));
    println!("{entries} entries in {}\n", directory.display());
    println!(
        "{:<24}{:>11}{:>10}{:>10}{:>11}{:>9}{:>9}",
        "phase", "count", "s", "CPU s", "per s", "RSS MiB", "peak MiB"
    );

    let index = SegmentIndex::open(&directory, cache(), FLUSH_ENTRIES)?;
    ensure!(index.entries() == 0, "there is an index in {} already", directory.display());
    phase("insert", entries, || insert(&index, entries))?;
    println!("  {} segments", index.segment_count());
    let lookups = entries.min(LOOKUPS_MAX);
    phase("miss, while it merges", lookups, || look_up(&index, lookups, entries, false))?;
    phase("merge to the end", entries, || wait_for_merges(&directory))?;
    println!("  {} segments", index.segment_count());
    phase("miss", lookups, || look_up(&index, lookups, entries, false))?;
    phase("hit, warm", lookups, || look_up(&index, lookups, entries, true))?;
    phase("close", entries, || Ok(index.close()?))?;
    drop(index);

    let mut opened = None;
    phase("open", entries, || {
        opened = Some(SegmentIndex::open(&directory, cache(), FLUSH_ENTRIES)?);
        Ok(())
    })?;
    let index = opened.context("opened")?;
    forget_pages(&directory)?;
    let lookups = entries.min(COLD_LOOKUPS_MAX);
    phase("hit, cold", lookups, || look_up(&index, lookups, entries, true))?;
    forget_pages(&directory)?;
    phase("miss, cold", lookups, || look_up(&index, lookups, entries, false))?;
    Ok(())
}

/// Carries one phase out and prints its row.
#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^53")]
fn phase(name: &str, count: u64, work: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
    // The highest of this phase, not of all before.
    fs::write("/proc/self/clear_refs", "5")?;
    let (began, cpu_began) = (clock::now(), cpu_seconds());
    work()?;
    let (seconds, cpu) = (began.elapsed().as_secs_f64(), cpu_seconds() - cpu_began);
    let [now, peak] = ["VmRSS:", "VmHWM:"].map(memory_mib);
    println!("{name:<24}{count:>11}{seconds:>10.3}{cpu:>10.2}{:>11.0}{now:>9}{peak:>9}", count as f64 / seconds);
    Ok(())
}

/// What all threads of this process have computed so far; a busy neighbour does not count. Resolves 10 ms.
fn cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    fields.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

fn memory_mib(field: &str) -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix(field));
    line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok()).unwrap_or(0) / 1024
}

fn insert(index: &SegmentIndex, entries: u64) -> anyhow::Result<()> {
    for first in (0..entries).step_by(usize::try_from(GROUP)?) {
        let copies: Vec<(ChunkId, Copy)> = (first..entries.min(first + GROUP)).map(|i| (id(i), copy(i))).collect();
        let last = copies.last().context("a group")?.1;
        index.insert(DomainId::FULL, last.pack, last.offset + 1, &copies)?;
    }
    Ok(())
}

/// Asks for ids all over the index, or for as many that were never inserted.
fn look_up(index: &SegmentIndex, lookups: u64, entries: u64, hits: bool) -> anyhow::Result<()> {
    let offset = if hits { 0 } else { entries };
    let mut found = 0;
    for first in (0..lookups).step_by(usize::try_from(BATCH)?) {
        let asked = first..lookups.min(first + BATCH);
        // A large prime: jumps about, and meets each entry once before it meets one again.
        let ids: Vec<ChunkId> = asked.map(|i| id(offset + i.wrapping_mul(2_654_435_761) % entries)).collect();
        found += index.find(DomainId::FULL, &ids)?.rows().len() as u64;
    }
    ensure!(found == if hits { lookups } else { 0 }, "the index answers wrongly: {found} found");
    Ok(())
}

/// While a merge runs there is a temporary file beside the segments; its end, when the new segment is opened, takes
/// less than a second.
fn wait_for_merges(directory: &Path) -> anyhow::Result<()> {
    let mut quiet = 0;
    while quiet < 20 {
        thread::sleep(Duration::from_millis(50));
        let files = fs::read_dir(directory)?.collect::<Result<Vec<_>, _>>()?;
        let done = |file: &fs::DirEntry| {
            let path = file.path();
            path.extension().is_some_and(|extension| extension == "segment") || path.ends_with("MANIFEST")
        };
        quiet = if files.iter().all(done) { quiet + 1 } else { 0 };
    }
    Ok(())
}

/// Tells the system to drop what it holds of the segments in memory.
fn forget_pages(directory: &Path) -> anyhow::Result<()> {
    for file in fs::read_dir(directory)? {
        fadvise(File::open(file?.path())?, 0, None, Advice::DontNeed)?;
    }
    Ok(())
}

/// The `i`th of a sequence of uniform ids: four steps of SplitMix64, cheap beside any lookup.
fn id(i: u64) -> ChunkId {
    let mut id = [0; ChunkId::LEN];
    for (place, word) in (0u64..).zip(id.as_chunks_mut::<8>().0) {
        let mut x = (4 * i + place + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        *word = (x ^ (x >> 31)).to_le_bytes();
    }
    ChunkId(id)
}

/// The copy that belongs to it: blocks of sixteen chunks in packs of 512 blocks.
fn copy(i: u64) -> Copy {
    let number = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
    let (block, position) = (i / 16, u16::try_from(i % 16).unwrap_or(0));
    let (pack, offset) = (number(1 + block / 512), number((block % 512) << 20));
    Copy { pack, offset, bytes: 1 << 20, position, kind: ChunkKind::Data, complete: false }
}
