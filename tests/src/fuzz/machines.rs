//! Numbers that a peer chooses, in the machines that reckon with them: acknowledgements, sequences, requests and credit.

use std::collections::BTreeMap;
use std::ops::Range;

use strandline_actors::machines::fetch::FetchQueue;
use strandline_actors::machines::gap_tracker::{GapTracker, Inserted};
use strandline_actors::machines::send_window::SendWindow;
use strandline_actors::ports::BlockPlace;
use strandline_actors::runtime::clock;
use strandline_messages::wire::Credit;
use strandline_messages::{ChunkId, Incarnation, StreamIndex};

use super::memory::within;

/// Width of the windows.
const WINDOW: u64 = 64;
/// Most steps of one input.
const STEPS_MAX: usize = 400;
/// Memory for so few blocks, numbers and requests.
const BYTES_MAX: usize = 2 << 20;

/// Takes numbers off an input: small ones in one byte, any other in nine.
struct Numbers<'a>(&'a [u8]);

impl Numbers<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (&byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(byte)
    }

    fn number(&mut self) -> Option<u64> {
        match self.byte()? {
            0xff => {
                let (number, rest) = self.0.split_first_chunk()?;
                self.0 = rest;
                Some(u64::from_le_bytes(*number))
            }
            small => Some(small.into()),
        }
    }

    fn range(&mut self) -> Option<Range<u64>> {
        Some(self.number()?..self.number()?)
    }
}

/// First byte: which machine. Then steps for it, with whatever numbers a peer may send.
pub fn machines(data: &[u8]) {
    let Some((&which, rest)) = data.split_first() else { return };
    // A machine that is out of steps has said everything.
    within(BYTES_MAX, || {
        let mut numbers = Numbers(rest);
        let _ = match which % 3 {
            0 => send_window(&mut numbers),
            1 => gap_tracker(&mut numbers),
            _ => fetch_queue(&mut numbers),
        };
    });
}

/// The agent's window under any acknowledgements: each block leaves it once, and only after it was sent; what it holds is
/// what was pushed and has not left.
fn send_window(numbers: &mut Numbers<'_>) -> Option<()> {
    let mut window = SendWindow::new(WINDOW);
    let (mut pushed, mut sent, mut held) = (0u64, Vec::new(), BTreeMap::new());
    for _ in 0..STEPS_MAX {
        let step = numbers.byte()?;
        let stream = StreamIndex(u16::from(step >> 4));
        match step % 8 {
            0..=2 => {
                assert!(window.push(pushed, 10 + pushed % 7).is_ok());
                held.insert(pushed, 10 + pushed % 7);
                pushed += 1;
            }
            3 => sent.extend(window.next_for(stream).map(|(_, block)| block)),
            4 => {
                let watermark = numbers.number()?;
                let ranges = [numbers.range()?, numbers.range()?];
                for (_, block) in window.acknowledge(watermark, &ranges).blocks {
                    assert!(sent.contains(&block) && held.remove(&block).is_some(), "block {block}");
                }
            }
            5 => {
                let ranges = [numbers.range()?];
                window.retransmit(&ranges);
            }
            6 => {
                window.stream_lost(stream);
            }
            _ => {
                window.restart();
                sent.clear();
            }
        }
        assert_eq!((window.blocks(), window.bytes()), (held.len(), held.values().sum()));
        assert!(window.unacknowledged().all(|(_, block)| held.contains_key(block)));
    }
    Some(())
}

/// The server's tracker under any sequences: what it says is in is what was put in, and memory stays as it was.
fn gap_tracker(numbers: &mut Numbers<'_>) -> Option<()> {
    let mut tracker = GapTracker::new(WINDOW);
    let (memory, now) = (tracker.memory_bytes(), clock::now());
    let mut inside = std::collections::BTreeSet::new();
    for _ in 0..STEPS_MAX {
        let sequence = numbers.number()?;
        let watermark = tracker.watermark();
        match tracker.insert(now, sequence) {
            Inserted::New => assert!(inside.insert(sequence)),
            Inserted::Duplicate => assert!(inside.contains(&sequence)),
            Inserted::BeyondWindow => assert!(sequence == u64::MAX || sequence - watermark >= WINDOW),
        }
        assert!(tracker.watermark() >= watermark);
        assert_eq!(tracker.memory_bytes(), memory);
        let above: u64 = tracker.intervals().map(|range| range.end - range.start).sum();
        assert_eq!(tracker.watermark() + above, inside.len() as u64);
        assert!(tracker.gaps(8).iter().all(|gap| gap.start < gap.end && !inside.contains(&gap.start)));
    }
    Some(())
}

/// The server's queue of a restore under any requests and credit: nothing is read that the credit does not cover.
fn fetch_queue(numbers: &mut Numbers<'_>) -> Option<()> {
    let mut credit = numbers.number()?;
    let mut granted = 0;
    let mut queue = FetchQueue::new(credit);
    for _ in 0..STEPS_MAX {
        match numbers.byte()? % 4 {
            0 => {
                let request = u32::try_from(numbers.number()? % (1 << 32)).unwrap_or(0);
                let place = numbers.byte()?;
                let places: Vec<(ChunkId, Option<BlockPlace>)> =
                    (0..place % 8).map(|i| (ChunkId([i; 32]), place_of(place, i))).collect();
                queue.add(request, &places);
            }
            1 => {
                let sum: u64 = numbers.number()?;
                queue.grant(sum);
                credit = credit.saturating_add(sum.saturating_sub(granted));
                granted = granted.max(sum);
            }
            step => {
                let Some(errand) = queue.next_errand() else { continue };
                let cost = Credit::cost(errand.place.bytes.into());
                let Some(left) = credit.checked_sub(cost) else { panic!("{cost} bytes beyond the credit of {credit}") };
                credit = left;
                if step == 2 {
                    queue.handed(&errand, StreamIndex(1), Incarnation(1));
                } else {
                    queue.failed(&errand, "damaged");
                    credit = credit.saturating_add(cost);
                }
            }
        }
    }
    Some(())
}

/// Every fourth chunk is nowhere; some lie in the same block.
fn place_of(place: u8, i: u8) -> Option<BlockPlace> {
    let bytes = u32::from(place) << (i % 4 * 8);
    (i % 4 != 3).then_some(BlockPlace { pack: 1, offset: u32::from(i / 2), bytes })
}
