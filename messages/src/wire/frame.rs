//! The envelope: `len u32 · kind u16 · flags u8 · body`, little endian; `len` counts the body alone.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::WireError;
use super::message::{is_known_kind, kinds};
use crate::ids::Sequence;
use crate::limits;

/// Bytes before the body.
pub const HEADER_BYTES: usize = 7;
/// Flag: a peer that does not know the kind must end the connection instead of skipping the frame.
pub const FLAG_CRITICAL: u8 = 1;
/// Bytes of a block frame's body before the block: its sequence number.
pub const BLOCK_PREFIX_BYTES: usize = 8;

/// The first seven bytes of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Length of the body, bytes.
    pub len: u32,
    /// What the body is (see [`super::message::kinds`]).
    pub kind: u16,
    /// Bit 0: critical.
    pub flags: u8,
}

impl FrameHeader {
    /// The seven bytes.
    pub fn encode(self) -> [u8; HEADER_BYTES] {
        let word = u64::from(self.len) | u64::from(self.kind) << 32 | u64::from(self.flags) << 48;
        *word.to_le_bytes().first_chunk().unwrap_or(&[0; HEADER_BYTES])
    }

    /// Reads the seven bytes and compares the length with the limit of the kind.
    pub fn decode(bytes: [u8; HEADER_BYTES]) -> Result<Self, WireError> {
        let word = bytes.iter().rev().fold(0u64, |word, &byte| word << 8 | u64::from(byte));
        let [len, kind, flags] = [word & 0xffff_ffff, word >> 32 & 0xffff, word >> 48];
        let header = Self {
            len: u32::try_from(len).unwrap_or(u32::MAX),
            kind: u16::try_from(kind).unwrap_or(u16::MAX),
            flags: u8::try_from(flags).unwrap_or(u8::MAX),
        };
        let max = if header.kind == kinds::BLOCK { limits::DATA_FRAME_BYTES_MAX } else { limits::CONTROL_BYTES_MAX };
        if header.len as usize > max {
            return Err(WireError::FrameTooLong { kind: header.kind, found: header.len.into(), max: max as u64 });
        }
        Ok(header)
    }
}

/// A whole frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// What the body is.
    pub kind: u16,
    /// Bit 0: critical.
    pub flags: u8,
    /// The body.
    pub body: Bytes,
}

impl Frame {
    /// The frame's bytes.
    pub fn encode(&self) -> Bytes {
        let mut out = BytesMut::with_capacity(HEADER_BYTES + self.body.len());
        let len = u32::try_from(self.body.len()).unwrap_or(u32::MAX);
        out.put_slice(&FrameHeader { len, kind: self.kind, flags: self.flags }.encode());
        out.put_slice(&self.body);
        out.freeze()
    }
}

/// A block on its way, with its place in the session. Its bytes are never copied into a frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockFrame {
    /// Backup: the block's sequence number. Restore: request number in the upper 32 bits, ordinal in the lower.
    pub sequence: Sequence,
    /// The block, byte for byte as it is stored.
    pub block: Bytes,
}

impl BlockFrame {
    /// Everything before the block: header and sequence number.
    pub fn head(&self) -> [u8; HEADER_BYTES + BLOCK_PREFIX_BYTES] {
        let len = u32::try_from(self.block.len() + BLOCK_PREFIX_BYTES).unwrap_or(u32::MAX);
        let header = FrameHeader { len, kind: kinds::BLOCK, flags: FLAG_CRITICAL }.encode();
        let mut head = [0; HEADER_BYTES + BLOCK_PREFIX_BYTES];
        let (front, back) = head.split_at_mut(HEADER_BYTES);
        front.copy_from_slice(&header);
        back.copy_from_slice(&self.sequence.0.to_le_bytes());
        head
    }

    /// Takes a frame of kind `BLOCK` apart without copying.
    pub fn from_frame(frame: Frame) -> Result<Self, WireError> {
        let mut block = frame.body;
        if block.len() < BLOCK_PREFIX_BYTES {
            return Err(WireError::Malformed { what: "Block", why: "shorter than its sequence number".into() });
        }
        let sequence = Sequence(block.get_u64_le());
        if block.len() > limits::BLOCK_BYTES_MAX {
            return Err(WireError::FrameTooLong {
                kind: kinds::BLOCK,
                found: block.len() as u64,
                max: limits::BLOCK_BYTES_MAX as u64,
            });
        }
        Ok(Self { sequence, block })
    }
}

/// Cuts a byte stream into frames. Holds at most one frame and what was read with it.
#[derive(Debug, Default)]
pub struct FrameDecoder {
    header: Option<FrameHeader>,
}

impl FrameDecoder {
    /// The next frame of `buffer`, or `None` until more bytes have come.
    ///
    /// Frames of unknown kinds are skipped unless they are critical.
    pub fn next(&mut self, buffer: &mut BytesMut) -> Result<Option<Frame>, WireError> {
        loop {
            let header = match self.header {
                Some(header) => header,
                None => match buffer.first_chunk::<HEADER_BYTES>() {
                    None => return Ok(None),
                    Some(bytes) => {
                        let header = FrameHeader::decode(*bytes)?;
                        buffer.advance(HEADER_BYTES);
                        *self.header.insert(header)
                    }
                },
            };
            let len = header.len as usize;
            if buffer.len() < len {
                return Ok(None);
            }
            if let Some(frame) = self.complete(buffer.split_to(len).freeze())? {
                return Ok(Some(frame));
            }
        }
    }

    /// Length of the body that is not whole yet, if its header has come, bytes. It is within the limit of its kind.
    ///
    /// Whoever reads may wait for it in the buffer, or take what the buffer has of it and put it together elsewhere, for
    /// [`FrameDecoder::complete`].
    pub fn awaited_body(&self) -> Option<usize> {
        self.header.map(|header| header.len as usize)
    }

    /// The frame whose body was awaited, or `None` if its kind is unknown and not critical.
    pub fn complete(&mut self, body: Bytes) -> Result<Option<Frame>, WireError> {
        match self.header.take() {
            Some(FrameHeader { kind, flags, .. }) if is_known_kind(kind) => Ok(Some(Frame { kind, flags, body })),
            Some(FrameHeader { kind, flags, .. }) if flags & FLAG_CRITICAL != 0 => {
                Err(WireError::UnknownCritical { kind })
            }
            _ => Ok(None),
        }
    }

    /// Whether the stream may end here: not in the middle of a frame.
    pub fn is_between_frames(&self, buffer: &BytesMut) -> bool {
        self.header.is_none() && buffer.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ack(body: &'static [u8]) -> Frame {
        Frame { kind: kinds::ACK, flags: 0, body: Bytes::from_static(body) }
    }

    #[test]
    fn an_unknown_kind_is_skipped_unless_it_is_critical() {
        let mut unknown = Frame { kind: 0x7fff, flags: 0, body: Bytes::from_static(b"future") };
        let mut buffer = BytesMut::from(&unknown.encode()[..]);
        buffer.extend_from_slice(&ack(b"x").encode());
        assert_eq!(FrameDecoder::default().next(&mut buffer).unwrap(), Some(ack(b"x")));

        unknown.flags = FLAG_CRITICAL;
        let mut buffer = BytesMut::from(&unknown.encode()[..]);
        let error = FrameDecoder::default().next(&mut buffer).unwrap_err();
        assert_eq!(error, WireError::UnknownCritical { kind: 0x7fff });
    }

    #[test]
    fn s43_an_endless_frame_is_refused_before_anything_is_reserved() {
        let header = FrameHeader { len: u32::MAX, kind: kinds::BLOCK, flags: 0 }.encode();
        let mut buffer = BytesMut::from(&header[..]);
        assert!(FrameDecoder::default().next(&mut buffer).is_err());
        assert!(buffer.capacity() < 1024);
    }

    #[test]
    fn a_block_frame_reads_back_without_a_copy_of_its_head() {
        let sent = BlockFrame { sequence: Sequence(7), block: Bytes::from_static(b"block") };
        let mut buffer = BytesMut::from(&sent.head()[..]);
        buffer.extend_from_slice(&sent.block);
        let frame = FrameDecoder::default().next(&mut buffer).unwrap().unwrap();
        assert_eq!(BlockFrame::from_frame(frame).unwrap(), sent);
    }

    proptest! {
        #[test]
        fn s11_frames_cut_at_any_byte_arrive_whole(bodies in proptest::collection::vec(any::<Vec<u8>>(), 0..6), step in 1usize..40) {
            let mut wire = Vec::new();
            for body in &bodies {
                wire.extend_from_slice(&Frame { kind: kinds::ACK, flags: 0, body: Bytes::copy_from_slice(body) }.encode());
            }
            let (mut decoder, mut buffer, mut seen) = (FrameDecoder::default(), BytesMut::new(), Vec::new());
            for piece in wire.chunks(step) {
                buffer.extend_from_slice(piece);
                while let Some(frame) = decoder.next(&mut buffer).unwrap() { seen.push(frame.body.to_vec()); }
            }
            prop_assert_eq!(seen, bodies);
            prop_assert!(decoder.is_between_frames(&buffer));
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let mut buffer = BytesMut::from(&bytes[..]);
            let mut decoder = FrameDecoder::default();
            while let Ok(Some(frame)) = decoder.next(&mut buffer) { let _ = super::super::Message::decode(&frame); }
        }
    }
}
