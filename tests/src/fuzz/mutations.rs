//! Inputs made from a corpus by a seed: what an ordinary test run tries, without looking at which code they reach.

use crate::random::Random;

/// Numbers at which lengths and counts go wrong.
const EDGES: [u64; 14] = [
    0,
    1,
    0x7f,
    0x80,
    0xff,
    0x100,
    0x7fff,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0xffff_ffff,
    0x1_0000_0000,
    0x7fff_ffff_ffff_ffff,
    u64::MAX,
];
/// Most changes to one input.
const CHANGES_MAX: u64 = 6;

/// One of `corpus`, changed in a few places, at most `bytes_max` long.
pub fn mutated(corpus: &[Vec<u8>], bytes_max: usize, random: &mut Random) -> Vec<u8> {
    let chosen = corpus.get(random.index(corpus.len())).cloned();
    let mut bytes = chosen.unwrap_or_default();
    for _ in 0..=random.below(CHANGES_MAX) {
        change(&mut bytes, corpus, random);
    }
    bytes.truncate(bytes_max);
    bytes
}

fn change(bytes: &mut Vec<u8>, corpus: &[Vec<u8>], random: &mut Random) {
    let at = random.index(bytes.len() + 1);
    match random.below(10) {
        0 => flip(bytes, at, random),
        1 => overwrite(bytes, at, &[u8::try_from(random.below(256)).unwrap_or(0)]),
        2 => {
            let width = [1, 2, 4, 8].get(random.index(4)).copied().unwrap_or(1);
            overwrite(bytes, at, edge(random).to_le_bytes().get(..width).unwrap_or_default());
        }
        3 => {
            // A number as LEB128, in the place of one byte.
            let leb = leb(edge(random));
            bytes.splice(at..(at + 1).min(bytes.len()), leb);
        }
        4 => bytes.truncate(at),
        5 => {
            let end = (at + 1 + random.index(8)).min(bytes.len());
            bytes.drain(at..end);
        }
        6 => {
            let len = 1 + random.index(8);
            let new = random.bytes(len);
            bytes.splice(at..at, new);
        }
        7 => {
            // A piece of itself once more, or many times.
            let end = (at + 1 + random.index(32)).min(bytes.len());
            let piece = bytes.get(at..end).unwrap_or_default().repeat(1 + random.index(4));
            bytes.splice(at..at, piece);
        }
        8 => {
            // A number written in digits, or the place where one could stand.
            let digits = |bytes: &[u8]| bytes.iter().take_while(|byte| byte.is_ascii_digit()).count();
            let rest = bytes.get(at..).unwrap_or_default();
            let start = at + rest.iter().position(u8::is_ascii_digit).unwrap_or(0);
            let end = start + digits(bytes.get(start..).unwrap_or_default());
            bytes.splice(start..end, edge(random).to_string().into_bytes());
        }
        _ => {
            let other = corpus.get(random.index(corpus.len())).map(Vec::as_slice).unwrap_or_default();
            let from = random.index(other.len() + 1);
            let to = (from + 1 + random.index(64)).min(other.len());
            overwrite(bytes, at, other.get(from..to).unwrap_or_default());
        }
    }
}

fn flip(bytes: &mut [u8], at: usize, random: &mut Random) {
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= 1 << random.below(8);
    }
}

fn overwrite(bytes: &mut Vec<u8>, at: usize, with: &[u8]) {
    let end = (at + with.len()).min(bytes.len());
    bytes.splice(at.min(end)..end, with.iter().copied());
}

fn edge(random: &mut Random) -> u64 {
    let edge = EDGES.get(random.index(EDGES.len())).copied().unwrap_or(0);
    edge.wrapping_add(random.below(3)).wrapping_sub(1)
}

fn leb(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while value >= 0x80 {
        bytes.push(u8::try_from(value & 0x7f).unwrap_or(0) | 0x80);
        value >>= 7;
    }
    bytes.push(u8::try_from(value).unwrap_or(0));
    bytes
}
