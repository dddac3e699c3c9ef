//! What storing a block costs the server: format and digest verified, written to a pack, synced, indexed, confirmed.
//!
//! `cargo bench -p strandline-server --bench ingest`. The data directory is in `/dev/shm` if there is one (then no disk
//! is measured), or where `STRAND_BENCH_DIR` says. MB per CPU second, over all threads, is what one core can take in.

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::ensure;
use bytes::Bytes;
use futures_util::{StreamExt, TryStreamExt, stream};
use strandline_actors::runtime::clock;
use strandline_messages::format::block::{BlockHeaderV1, Codec, encode_row};
use strandline_messages::format::repository::{ChunkingV1, RepositoryV1};
use strandline_messages::{AgentId, ChunkId, ChunkKind, DomainId, RepositoryId, Sequence, SessionId};
use strandline_server::engine::{Engine, EngineOptions, Lease, Opened, Repository};

const REPOSITORY: RepositoryId = RepositoryId([0x77; 16]);
/// Chunks of one block, each 64 KiB.
const CHUNKS: u64 = 16;
const BODY_BYTES: usize = 1 << 20;
/// Blocks of one round.
const BLOCKS: u64 = 512;
const ROUNDS: u64 = 6;
/// Blocks on their way at once: a few streams' worth.
const AT_ONCE: usize = 32;

fn main() -> anyhow::Result<()> {
    let given = std::env::var_os("STRAND_BENCH_DIR").map(PathBuf::from);
    let shared_memory = Some(PathBuf::from("/dev/shm")).filter(|path| path.is_dir());
    let parent = given.or(shared_memory).unwrap_or_else(std::env::temp_dir);
    let scratch = tempfile::tempdir_in(&parent)?;
    println!("{BLOCKS} blocks of 1 MiB in each round, in {}\n", parent.display());
    println!("{:<8}{:>10}{:>10}{:>12}{:>16}", "round", "s", "CPU s", "MB/s", "MB per CPU s");
    actix_rt::System::new().block_on(async {
        let engine = Engine::open(scratch.path(), EngineOptions::default()).await?;
        let repository = engine.create_repository(&"bench".parse()?, repository_file()?, Vec::new()).await?;
        let session = repository.open_session(SessionId([1; 16]), AgentId([2; 16]), DomainId::FULL, None).await?;
        let Opened::Fresh(lease) = session else { anyhow::bail!("a new session resumes nothing") };
        for round in 0..ROUNDS {
            let blocks: Vec<(Sequence, Bytes)> = (round * BLOCKS..(round + 1) * BLOCKS)
                .map(|n| Ok((Sequence(n), block(n)?)))
                .collect::<anyhow::Result<_>>()?;
            store(&repository, &lease, round, blocks).await?;
        }
        engine.close().await?;
        Ok(())
    })
}

#[expect(clippy::cast_precision_loss, reason = "megabytes are far below 2^53")]
async fn store(
    repository: &Repository,
    lease: &Lease,
    round: u64,
    blocks: Vec<(Sequence, Bytes)>,
) -> anyhow::Result<()> {
    let megabytes = blocks.iter().map(|(_, block)| block.len()).sum::<usize>() as f64 / 1e6;
    let (began, cpu_began) = (clock::now(), cpu_seconds());
    let storing = stream::iter(blocks).map(|(sequence, block)| repository.store(lease, sequence, block));
    let stored: Vec<_> = storing.buffer_unordered(AT_ONCE).try_collect().await?;
    let (took, cpu): (Duration, f64) = (began.elapsed(), cpu_seconds() - cpu_began);
    ensure!(stored.len() as u64 == BLOCKS, "only {} blocks are durable", stored.len());
    let seconds = took.as_secs_f64();
    println!("{round:<8}{seconds:>10.3}{cpu:>10.2}{:>12.0}{:>16.0}", megabytes / seconds, megabytes / cpu);
    Ok(())
}

/// What all threads of this process have computed so far; a busy neighbour does not count. Resolves 10 ms.
fn cpu_seconds() -> f64 {
    let stat = fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace().skip(11).take(2);
    fields.filter_map(|ticks| ticks.parse::<f64>().ok()).sum::<f64>() / 100.0
}

fn repository_file() -> anyhow::Result<RepositoryV1> {
    let chunking = ChunkingV1 { minimum: 16 << 10, average: 64 << 10, maximum: 256 << 10, block_plaintext: 1 << 20 };
    let (root_public, kem_public) = ([1; 32], [3; 32]);
    let name = "main".parse()?;
    Ok(RepositoryV1 { id: REPOSITORY, name, created_ns: 1, root_public, wrap_algorithm: 1, kem_public, chunking })
}

/// The `n`th block: a table of chunks that no other block has, a body that the server cannot look into anyway.
fn block(n: u64) -> anyhow::Result<Bytes> {
    let mut table = Vec::new();
    for chunk in n * CHUNKS..(n + 1) * CHUNKS {
        let id = ChunkId(*blake3::hash(&chunk.to_le_bytes()).as_bytes());
        encode_row(ChunkKind::Data, &id, &[], &mut table);
    }
    let wrapped_key = [6; 80];
    let header = BlockHeaderV1 {
        kind: ChunkKind::Data,
        codec: Codec::Zstd,
        wrap_algorithm: 1,
        wrapped_key_bytes: u16::try_from(wrapped_key.len())?,
        chunks: u32::try_from(CHUNKS)?,
        table_bytes: u32::try_from(table.len())?,
        body_bytes: u32::try_from(BODY_BYTES)?,
        repository: REPOSITORY,
        salt: *blake3::hash(&n.to_be_bytes()).as_bytes(),
        commitment: [5; 32],
    };
    let mut bytes = Vec::with_capacity(BODY_BYTES + 4096);
    header.encode(&mut bytes);
    bytes.extend_from_slice(&wrapped_key);
    bytes.extend_from_slice(&table);
    bytes.resize(bytes.len() + BODY_BYTES, 7);
    let digest = blake3::hash(&bytes);
    bytes.extend_from_slice(digest.as_bytes());
    Ok(bytes.into())
}
