//! The chunks of one block, laid out as the codec takes them: their lengths, then their bytes.
//!
//! How many lengths there will be is known only at the end, so room for them is kept in front of the bytes. The content
//! is copied into its place once and compressed from there.

/// Room kept at first for so many lengths; it doubles when they become more.
const LENGTHS_FIRST: usize = 512;
const LENGTH_BYTES: usize = 4;

/// See the module.
#[derive(Debug)]
pub struct Body {
    /// `front` bytes of room, then the chunks one after the other.
    bytes: Vec<u8>,
    front: usize,
    lengths: Vec<u32>,
}

impl Default for Body {
    fn default() -> Self {
        Self::with_room(0)
    }
}

impl Body {
    /// Empty, with room for so many bytes of chunks.
    pub fn with_room(content_bytes: usize) -> Self {
        let front = LENGTHS_FIRST * LENGTH_BYTES;
        let mut bytes = Vec::with_capacity(front + content_bytes);
        bytes.resize(front, 0);
        Self { bytes, front, lengths: Vec::new() }
    }

    /// Empties it, keeping its memory.
    pub fn clear(&mut self) {
        self.bytes.truncate(self.front);
        self.lengths.clear();
    }

    /// Appends a chunk.
    pub fn push(&mut self, chunk: &[u8]) {
        if (self.lengths.len() + 1) * LENGTH_BYTES > self.front {
            let more = self.front;
            self.bytes.splice(..0, std::iter::repeat_n(0, more));
            self.front += more;
        }
        self.bytes.extend_from_slice(chunk);
        // A chunk that is longer than its length can say is refused by whoever seals it.
        self.lengths.push(u32::try_from(chunk.len()).unwrap_or(u32::MAX));
    }

    /// Bytes of the chunks.
    pub fn content_bytes(&self) -> usize {
        self.bytes.len() - self.front
    }

    /// Bytes of what is compressed: lengths and chunks.
    pub fn input_bytes(&self) -> usize {
        self.lengths.len() * LENGTH_BYTES + self.content_bytes()
    }

    /// The lengths of the chunks.
    pub fn lengths(&self) -> &[u32] {
        &self.lengths
    }

    /// What is compressed: the lengths, little-endian, and the chunks.
    pub fn input(&mut self) -> &[u8] {
        let start = self.front.saturating_sub(self.lengths.len() * LENGTH_BYTES);
        let room = self.bytes.get_mut(start..self.front).unwrap_or_default();
        for (to, length) in room.as_chunks_mut::<LENGTH_BYTES>().0.iter_mut().zip(&self.lengths) {
            *to = length.to_le_bytes();
        }
        self.bytes.get(start..).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_stand_before_the_chunks_however_many_there_are() {
        let mut body = Body::default();
        for chunks in [0, 1, 3, LENGTHS_FIRST, LENGTHS_FIRST + 1, 5 * LENGTHS_FIRST] {
            body.clear();
            let mut expected = Vec::new();
            let mut content = Vec::new();
            for number in 0..chunks {
                let chunk = vec![u8::try_from(number % 251).unwrap(); number % 7];
                body.push(&chunk);
                expected.extend_from_slice(&u32::try_from(chunk.len()).unwrap().to_le_bytes());
                content.extend_from_slice(&chunk);
            }
            expected.extend_from_slice(&content);
            assert_eq!(body.input_bytes(), expected.len());
            assert_eq!(body.content_bytes(), content.len());
            assert_eq!(body.input(), expected, "{chunks} chunks");
            assert_eq!(body.input(), expected, "and again");
        }
    }
}
