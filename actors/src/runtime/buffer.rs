//! Memory for blocks: megabytes that come and go by the thousand.
//!
//! An allocator keeps what is freed in the arena of the thread that asked for it, between smaller things that stay: a process
//! through which gigabytes have passed keeps several times what it holds. A long buffer is memory of its own from the system.
//! When it is dropped it waits for the next block, or goes back.

use std::collections::VecDeque;
use std::ops::{Deref, DerefMut};

use memmap2::MmapMut;
use parking_lot::Mutex;

/// Shorter buffers come from the allocator, bytes.
pub const LONG_BYTES_MIN: usize = 16 << 10;
/// Most bytes that wait for the next block, in the whole process.
const SPARE_BYTES_MAX: usize = 12 << 20;

static SPARE: Mutex<Spare> = Mutex::new(Spare { memories: VecDeque::new(), bytes: 0 });

/// Memory that nobody uses, least recently used first.
struct Spare {
    memories: VecDeque<Memory>,
    bytes: usize,
}

/// A mapping of one of a few sizes, of which the system provides the pages that have been written to.
struct Memory {
    map: MmapMut,
    written_bytes_max: usize,
}

impl Spare {
    fn take(&mut self, size: usize) -> Option<Memory> {
        let place = self.memories.iter().rposition(|memory| memory.map.len() == size)?;
        let memory = self.memories.remove(place)?;
        self.bytes -= memory.written_bytes_max;
        Some(memory)
    }

    /// What there is no room for any more.
    fn put(&mut self, memory: Memory) -> Vec<Memory> {
        self.bytes += memory.written_bytes_max;
        self.memories.push_back(memory);
        let mut surplus = Vec::new();
        while self.bytes > SPARE_BYTES_MAX
            && let Some(oldest) = self.memories.pop_front()
        {
            self.bytes -= oldest.written_bytes_max;
            surplus.push(oldest);
        }
        surplus
    }
}

enum Place {
    Allocated(Vec<u8>),
    Mapped(Memory),
}

/// Bytes of a block, sealed or open, or of what will stand in one. See the module.
pub struct BlockBuffer {
    place: Place,
    len: usize,
}

impl BlockBuffer {
    /// So many bytes. What is in them is left over from other blocks.
    pub fn with_len(len: usize) -> Self {
        let mut buffer = Self::with_capacity(len);
        buffer.grow(len);
        buffer
    }

    /// Empty, with room for so many bytes.
    pub fn with_capacity(capacity: usize) -> Self {
        let place = map(capacity).map_or_else(|| Place::Allocated(vec![0; capacity]), Place::Mapped);
        Self { place, len: 0 }
    }

    /// How many bytes have room.
    pub fn capacity(&self) -> usize {
        self.memory().len()
    }

    /// Appends so many bytes, in other memory if there is no room here. What is in them is left over from other blocks.
    pub fn grow(&mut self, bytes: usize) -> &mut [u8] {
        let (before, len) = (self.len, self.len.saturating_add(bytes));
        if len > self.capacity() {
            let mut larger = Self::with_capacity(len.max(2 * before));
            larger.grow(before).copy_from_slice(self);
            *self = larger;
        }
        self.len = len;
        if let Place::Mapped(memory) = &mut self.place {
            memory.written_bytes_max = memory.written_bytes_max.max(len);
        }
        self.get_mut(before..).unwrap_or_default()
    }

    /// Appends these.
    pub fn extend_from_slice(&mut self, bytes: &[u8]) {
        self.grow(bytes.len()).copy_from_slice(bytes);
    }

    /// Leaves the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        self.len = self.len.min(len);
    }

    /// The same bytes in memory that fits them, if this is much more: for those that are kept.
    #[must_use]
    pub fn fitted(self) -> Self {
        if self.memory_bytes() <= 2 * self.len.max(LONG_BYTES_MIN) {
            return self;
        }
        let mut fitted = Self::with_len(self.len);
        fitted.copy_from_slice(&self);
        fitted
    }

    /// What it takes of the machine's memory, bytes: what was written to it, by earlier blocks too.
    pub fn memory_bytes(&self) -> usize {
        match &self.place {
            Place::Allocated(bytes) => bytes.capacity(),
            Place::Mapped(memory) => memory.written_bytes_max,
        }
    }

    fn memory(&self) -> &[u8] {
        match &self.place {
            Place::Allocated(bytes) => bytes,
            Place::Mapped(memory) => &memory.map,
        }
    }
}

fn map(capacity: usize) -> Option<Memory> {
    let size = mapped_bytes(capacity).filter(|_| capacity >= LONG_BYTES_MIN)?;
    let spare = SPARE.lock().take(size);
    // Where the system does not give it, the allocator may have some left.
    match spare {
        Some(memory) => Some(memory),
        None => Some(Memory { map: MmapMut::map_anon(size).ok()?, written_bytes_max: 0 }),
    }
}

/// Four sizes between a power of two and the next: few, so that memory fits again; close, so that little of it stays unused.
fn mapped_bytes(capacity: usize) -> Option<usize> {
    let step = (1 << capacity.checked_ilog2()?) / 4;
    capacity.checked_next_multiple_of(step.max(1))
}

impl Default for BlockBuffer {
    /// Empty, without memory.
    fn default() -> Self {
        Vec::new().into()
    }
}

impl From<Vec<u8>> for BlockBuffer {
    fn from(bytes: Vec<u8>) -> Self {
        Self { len: bytes.len(), place: Place::Allocated(bytes) }
    }
}

impl std::fmt::Debug for BlockBuffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("BlockBuffer").field("len", &self.len).finish_non_exhaustive()
    }
}

impl Drop for BlockBuffer {
    fn drop(&mut self) {
        if let Place::Mapped(memory) = std::mem::replace(&mut self.place, Place::Allocated(Vec::new())) {
            // Given back after the lock has been.
            let surplus = SPARE.lock().put(memory);
            drop(surplus);
        }
    }
}

impl Deref for BlockBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        self.memory().get(..self.len).unwrap_or_default()
    }
}

impl DerefMut for BlockBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        let memory = match &mut self.place {
            Place::Allocated(bytes) => &mut bytes[..],
            Place::Mapped(memory) => &mut memory.map[..],
        };
        memory.get_mut(..self.len).unwrap_or_default()
    }
}

impl AsRef<[u8]> for BlockBuffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn memory(size: usize, written_bytes_max: usize) -> Memory {
        Memory { map: MmapMut::map_anon(size).unwrap(), written_bytes_max }
    }

    #[test]
    fn a_buffer_has_its_length_whatever_its_memory_is() {
        for len in [0, 1, LONG_BYTES_MIN - 1, LONG_BYTES_MIN, LONG_BYTES_MIN + 1, (4 << 20) + 12] {
            let mut buffer = BlockBuffer::with_len(len);
            assert_eq!(buffer.len(), len);
            buffer.fill(7);
            buffer.truncate(len / 2);
            assert!(buffer.len() == len / 2 && buffer.iter().all(|byte| *byte == 7));
            buffer.truncate(len);
            assert_eq!(buffer.len(), len / 2, "what is cut off does not come back");
        }
    }

    #[test]
    fn a_buffer_grows_and_keeps_what_is_in_it() {
        for capacity in [0, 10, LONG_BYTES_MIN, 1 << 20] {
            let mut buffer = BlockBuffer::with_capacity(capacity);
            assert!(buffer.is_empty() && buffer.capacity() >= capacity);
            let mut expected = Vec::new();
            for number in 0..17 {
                let more = vec![number; 17 << number];
                buffer.extend_from_slice(&more);
                expected.extend_from_slice(&more);
                assert!(buffer[..] == expected[..] && buffer.memory_bytes() >= buffer.len());
            }
            assert_eq!(buffer.grow(5).len(), 5);
            buffer.truncate(3);
            assert_eq!(&buffer[..], &expected[..3]);
        }
        let mut owned = BlockBuffer::from(vec![1, 2]);
        owned.extend_from_slice(&[3]);
        assert_eq!(&owned[..], [1, 2, 3]);
        assert!(BlockBuffer::default().is_empty());
    }

    #[test]
    fn sizes_of_mappings_are_few_and_close() {
        assert_eq!(mapped_bytes(0), None);
        assert_eq!(mapped_bytes(LONG_BYTES_MIN), Some(LONG_BYTES_MIN));
        assert_eq!(mapped_bytes((1 << 20) + 1), Some((1 << 20) + (1 << 18)));
        assert_eq!(mapped_bytes(usize::MAX), None);
        let sizes: std::collections::BTreeSet<_> = (1 << 20..2 << 20).step_by(999).filter_map(mapped_bytes).collect();
        assert!(sizes.len() <= 5);
    }

    #[test]
    fn what_is_kept_takes_what_it_needs() {
        let mut large = BlockBuffer::with_len(4 << 20);
        large.fill(3);
        large.truncate(100);
        assert!(large.memory_bytes() >= 4 << 20);
        let fitted = large.fitted();
        assert!(fitted.len() == 100 && fitted.iter().all(|byte| *byte == 3) && fitted.memory_bytes() < 1000);
        let exact = BlockBuffer::with_len(1 << 20).fitted();
        assert!(exact.len() == 1 << 20 && exact.memory_bytes() == 1 << 20);
    }

    #[test]
    fn memory_is_used_again_by_its_size_and_what_waits_is_bounded() {
        let mut spare = Spare { memories: VecDeque::new(), bytes: 0 };
        let size = 4 << 20;
        assert!(spare.put(memory(size, size)).is_empty() && spare.put(memory(size / 2, 5)).is_empty());
        assert!(spare.take(2 * size).is_none());
        assert_eq!(spare.take(size).unwrap().written_bytes_max, size);
        assert_eq!(spare.bytes, 5);
        let surplus: usize = (0..9).map(|_| spare.put(memory(size, size)).len()).sum();
        assert!(spare.bytes <= SPARE_BYTES_MAX && spare.memories.len() == SPARE_BYTES_MAX / size);
        assert_eq!(surplus + spare.memories.len(), 1 + 9);
        assert!(spare.take(size / 2).is_none(), "the oldest goes first");
    }
}
