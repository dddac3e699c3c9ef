//! What every byte of a backup or a restore goes through: the chunker, the id, sealing, opening. One thread each.
//!
//! `cargo bench -p strandline-agent --bench pipeline`

#![expect(clippy::unwrap_used, reason = "a bench that meets an error has nothing to measure")]

use divan::counter::BytesCount;
use divan::{Bencher, black_box};
use strandline_agent::chunk::{Cutter, default_chunking};
use strandline_agent::keys::Keyset;
use strandline_agent::seal::{Body, Opener, Sealer};
use strandline_messages::format::block::ChunkRow;
use strandline_messages::format::chunk::chunk_id;
use strandline_messages::{ChunkKind, RepositoryId};

/// The usual level of zstd.
const LEVEL: i32 = 3;
/// Length of a usual chunk, bytes.
const CHUNK_BYTES: usize = 64 << 10;

fn main() {
    divan::main();
}

fn noise(bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    blake3::Hasher::new().finalize_xof().fill(&mut out);
    out
}

/// Words at random, of which zstd makes about a third, as of source text.
fn text(bytes: usize) -> Vec<u8> {
    const WORDS: [&str; 16] = [
        "static ",
        "int ",
        "return ",
        "struct ",
        "device ",
        "->",
        "->private",
        " = ",
        "NULL",
        ";\n\t",
        "if (",
        ") {\n",
        "err",
        "u32 ",
        "data",
        "0x",
    ];
    let words = noise(bytes).into_iter().flat_map(|byte| {
        let word = WORDS.get(usize::from(byte & 15)).unwrap_or(&"");
        word.bytes().chain(byte.is_multiple_of(3).then_some(b'a' + byte % 26))
    });
    words.take(bytes).collect()
}

fn content(name: &str) -> Vec<u8> {
    let bytes = default_chunking().block_plaintext as usize;
    if name == "text" { text(bytes) } else { noise(bytes) }
}

#[divan::bench]
fn chunker(bencher: Bencher<'_, '_>) {
    let data = noise(16 << 20);
    let cutter = Cutter::new(&default_chunking(), &[7; 32]);
    bencher.counter(BytesCount::of_slice(&data)).bench(|| {
        let mut rest = black_box(data.as_slice());
        let mut chunks = 0u32;
        while !rest.is_empty() {
            let window = rest.get(..cutter.maximum()).unwrap_or(rest);
            rest = rest.get(cutter.first_chunk(window)..).unwrap_or_default();
            chunks += 1;
        }
        chunks
    });
}

#[divan::bench(args = [1 << 10, 4 << 10, 16 << 10, CHUNK_BYTES])]
fn id(bencher: Bencher<'_, '_>, bytes: usize) {
    let chunk = noise(bytes);
    bencher.counter(BytesCount::new(bytes)).bench(|| chunk_id(&[7; 32], ChunkKind::Data, black_box(&chunk), &[]));
}

/// A keyset, and a block's rows and chunks.
fn block(name: &str) -> (Keyset, Vec<ChunkRow>, Body) {
    let keyset = Keyset::create(RepositoryId([1; 16])).unwrap();
    let mut body = Body::default();
    let mut rows = Vec::new();
    for chunk in content(name).chunks(CHUNK_BYTES) {
        rows.push(ChunkRow { id: keyset.chunk_id(ChunkKind::Data, chunk, &[]), references: Vec::new() });
        body.push(chunk);
    }
    (keyset, rows, body)
}

#[divan::bench(args = ["text", "noise"])]
fn seal(bencher: Bencher<'_, '_>, name: &str) {
    let (keyset, rows, mut body) = block(name);
    let mut sealer = Sealer::new(&keyset, LEVEL).unwrap();
    bencher
        .counter(BytesCount::new(body.content_bytes()))
        .bench_local(|| sealer.seal(ChunkKind::Data, &rows, &mut body).unwrap());
}

/// Opening a block and verifying every chunk of it.
#[divan::bench(args = ["text", "noise"])]
fn open(bencher: Bencher<'_, '_>, name: &str) {
    let (keyset, rows, mut body) = block(name);
    let sealed = Sealer::new(&keyset, LEVEL).unwrap().seal(ChunkKind::Data, &rows, &mut body).unwrap().bytes;
    let opener = Opener::new(&keyset);
    bencher.counter(BytesCount::new(body.content_bytes())).bench_local(|| {
        let opened = opener.open(black_box(&sealed)).unwrap();
        (0..rows.len()).map(|index| opened.chunk(index).unwrap().bytes.len()).sum::<usize>()
    });
}
