//! The frame codec: messages into frames and back, blocks out of a byte stream.
//!
//! `cargo bench -p strandline-messages --bench frames`

#![expect(clippy::unwrap_used, reason = "a bench that meets an error has nothing to measure")]

use bytes::{BufMut, Bytes, BytesMut};
use divan::counter::{BytesCount, ItemsCount};
use divan::{Bencher, black_box};
use serde_bytes::ByteBuf;
use strandline_messages::wire::{Ack, BlockFrame, Frame, FrameDecoder, Message, QueryChunks, SequenceRange, Tag};
use strandline_messages::{ChunkId, Sequence, limits};

/// A usual block, bytes.
const BLOCK_BYTES: usize = 1 << 20;

fn main() {
    divan::main();
}

/// The messages that data flows by: an acknowledgement without gaps, one with many, a full question.
fn message(name: &str) -> Message {
    let ranges = |count: u64| (1..=count).map(|n| SequenceRange { start: 2 * n, end: 2 * n + 1 }).collect();
    match name {
        "Ack" => Message::Ack(Ack { watermark: 1 << 20, ranges: ranges(0) }),
        "Ack, 64 ranges" => Message::Ack(Ack { watermark: 1, ranges: ranges(64) }),
        _ => Message::QueryChunks(QueryChunks { ids: ByteBuf::from(vec![7; limits::QUERY_IDS_MAX * ChunkId::LEN]) }),
    }
}

const MESSAGES: [&str; 3] = ["Ack", "Ack, 64 ranges", "QueryChunks, 8192 ids"];

#[divan::bench(args = MESSAGES)]
fn encode(bencher: Bencher<'_, '_>, name: &str) {
    let message = message(name);
    let bytes = message.to_frame(Tag(1)).unwrap().encode().len();
    bencher.counter(BytesCount::new(bytes)).bench(|| black_box(&message).to_frame(Tag(1)).unwrap().encode());
}

#[divan::bench(args = MESSAGES)]
fn decode(bencher: Bencher<'_, '_>, name: &str) {
    let frame = message(name).to_frame(Tag(1)).unwrap();
    bencher.counter(BytesCount::new(frame.body.len())).bench(|| Message::decode(black_box(&frame)).unwrap());
}

#[divan::bench]
fn head_of_a_block(bencher: Bencher<'_, '_>) {
    let block = BlockFrame { sequence: Sequence(77), block: Bytes::from(vec![7; BLOCK_BYTES]) };
    bencher.counter(ItemsCount::new(1u32)).bench(|| black_box(&block).head());
}

/// Everything that a connection brings, in reads of 64 KiB: what the reader of a stream does, its copying included.
#[divan::bench]
fn blocks_from_a_byte_stream(bencher: Bencher<'_, '_>) {
    const READ_BYTES: usize = 64 << 10;
    const BLOCKS: usize = 16;
    let block = BlockFrame { sequence: Sequence(77), block: Bytes::from(vec![7; BLOCK_BYTES]) };
    let stream: Vec<u8> = [&block.head()[..], &block.block].concat().repeat(BLOCKS);
    bencher.counter(BytesCount::of_slice(&stream)).counter(ItemsCount::new(BLOCKS)).bench(|| {
        let (mut decoder, mut buffer) = (FrameDecoder::default(), BytesMut::with_capacity(READ_BYTES));
        let mut found = 0;
        for read in stream.chunks(READ_BYTES) {
            buffer.put_slice(read);
            while let Some(frame) = decoder.next(&mut buffer).unwrap() {
                black_box(BlockFrame::from_frame(frame).unwrap());
                found += 1;
            }
        }
        assert_eq!(found, BLOCKS);
    });
}

/// Small frames that came in one read.
#[divan::bench]
fn acknowledgements_from_a_byte_stream(bencher: Bencher<'_, '_>) {
    const FRAMES: usize = 1024;
    let frame: Frame = message("Ack").to_frame(Tag(1)).unwrap();
    let stream = frame.encode().repeat(FRAMES);
    bencher.counter(ItemsCount::new(FRAMES)).with_inputs(|| BytesMut::from(&stream[..])).bench_values(|mut buffer| {
        let mut decoder = FrameDecoder::default();
        let mut found = 0;
        while let Some(frame) = decoder.next(&mut buffer).unwrap() {
            black_box(Message::decode(&frame).unwrap());
            found += 1;
        }
        assert_eq!(found, FRAMES);
    });
}
