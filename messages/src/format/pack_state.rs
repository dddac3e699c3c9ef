//! The state file beside a pack: which of its blocks were freed or withdrawn. Append only, synced before anything is freed.
//!
//! ```text
//! header   32 bytes: magic "STRSTATE" · version u16 = 1 · 2 zero bytes · pack number u32 · repository 16
//! records  32 bytes each: offset u32 · state u8 (1 freed, 2 withdrawn) · 3 zero bytes · at i64 ns ·
//!          check 16 (the first bytes of BLAKE3 of the header and the 16 bytes before)
//! ```
//!
//! A record counts if its check is right; a crash may leave part of one, which the next writer fills up with zeros.

use crate::ids::RepositoryId;

use super::FormatError;
use super::cursor::{Decoder, Encoder};

/// First bytes of a state file.
pub const STATE_MAGIC: [u8; 8] = *b"STRSTATE";
/// Version that this module encodes.
pub const STATE_VERSION: u16 = 1;
/// Bytes of the header.
pub const STATE_HEADER_BYTES: usize = 32;
/// Bytes of a record.
pub const STATE_RECORD_BYTES: usize = 32;
const CHECKED_BYTES: usize = 16;

/// What has become of a block for good.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum RecordedState {
    /// Nothing needs it; its body is gone or may go at any moment.
    Freed = 1,
    /// It was found damaged.
    Withdrawn = 2,
}

/// One record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateRecordV1 {
    /// Where the block begins in the pack.
    pub offset: u32,
    /// What has become of it.
    pub state: RecordedState,
    /// When, ns since 1970 by the server's clock.
    pub at_ns: i64,
}

/// The header of a pack's state file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StateHeaderV1 {
    /// The pack's number.
    pub number: u32,
    /// The repository.
    pub repository: RepositoryId,
}

impl StateHeaderV1 {
    /// The 32 bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(STATE_HEADER_BYTES);
        out.extend_from_slice(&STATE_MAGIC);
        out.put_u16(STATE_VERSION);
        out.extend_from_slice(&[0; 2]);
        out.put_u32(self.number);
        out.extend_from_slice(self.repository.as_bytes());
        out
    }

    /// Reads the 32 bytes.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut decoder = Decoder::new(bytes, "pack state header");
        decoder.magic(&STATE_MAGIC)?;
        decoder.version(STATE_VERSION)?;
        decoder.bytes(2)?;
        let header = Self { number: decoder.u32()?, repository: RepositoryId(decoder.array()?) };
        decoder.finish()?;
        Ok(header)
    }

    /// The 32 bytes of a record in this file.
    pub fn encode_record(&self, record: &StateRecordV1) -> Vec<u8> {
        let mut out = Vec::with_capacity(STATE_RECORD_BYTES);
        out.put_u32(record.offset);
        out.put_u8(record.state as u8);
        out.extend_from_slice(&[0; 3]);
        out.put_i64(record.at_ns);
        let check = self.check(&out);
        out.extend_from_slice(&check);
        out
    }

    /// The records of a file with this header, `bytes` being all that follows it; what does not check is passed over.
    pub fn decode_records<'a>(&self, bytes: &'a [u8]) -> impl Iterator<Item = StateRecordV1> + use<'a> {
        let header = *self;
        let (records, _) = bytes.as_chunks::<STATE_RECORD_BYTES>();
        records.iter().filter_map(move |record| header.decode_record(record))
    }

    fn decode_record(&self, bytes: &[u8; STATE_RECORD_BYTES]) -> Option<StateRecordV1> {
        let (checked, check) = bytes.split_at_checked(CHECKED_BYTES)?;
        if check != self.check(checked) {
            return None;
        }
        let mut decoder = Decoder::new(checked, "pack state record");
        let offset = decoder.u32().ok()?;
        let state = match decoder.u8().ok()? {
            1 => RecordedState::Freed,
            2 => RecordedState::Withdrawn,
            _ => return None,
        };
        decoder.bytes(3).ok()?;
        Some(StateRecordV1 { offset, state, at_ns: decoder.i64().ok()? })
    }

    fn check(&self, checked: &[u8]) -> [u8; CHECKED_BYTES] {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.encode()).update(checked);
        let [check @ .., _, _, _, _, _, _, _, _, _, _, _, _, _, _, _, _] = *hasher.finalize().as_bytes();
        check
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: StateHeaderV1 = StateHeaderV1 { number: 7, repository: RepositoryId([9; 16]) };

    fn record(offset: u32) -> StateRecordV1 {
        StateRecordV1 { offset, state: RecordedState::Withdrawn, at_ns: -5 }
    }

    #[test]
    fn header_and_records_read_back_and_belong_to_their_pack() {
        assert_eq!(StateHeaderV1::decode(&HEADER.encode()).unwrap(), HEADER);
        let bytes = [HEADER.encode_record(&record(1)), HEADER.encode_record(&record(2))].concat();
        assert_eq!(HEADER.decode_records(&bytes).collect::<Vec<_>>(), [record(1), record(2)]);
        let other = StateHeaderV1 { number: 8, ..HEADER };
        assert_eq!(other.decode_records(&bytes).count(), 0);
    }

    #[test]
    fn s27_a_torn_or_flipped_record_does_not_count_and_hides_none_behind_it() {
        let bytes = [HEADER.encode_record(&record(1)), HEADER.encode_record(&record(2))].concat();
        for at in 0..STATE_RECORD_BYTES {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert_eq!(HEADER.decode_records(&bad).collect::<Vec<_>>(), [record(2)], "byte {at}");
            let mut torn = bytes[..at].to_vec();
            assert_eq!(HEADER.decode_records(&torn).count(), 0, "cut at {at}");
            torn.resize(STATE_RECORD_BYTES, 0);
            torn.extend(HEADER.encode_record(&record(3)));
            assert_eq!(HEADER.decode_records(&torn).collect::<Vec<_>>(), [record(3)], "cut at {at}");
        }
    }
}
