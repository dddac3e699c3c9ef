//! Reading and writing the fields of a format: little endian, LEB128 variable-length integers, nothing implicit.

use super::FormatError;

/// Reads fields off a byte slice. `what` names the thing being decoded in every error.
#[derive(Debug, Clone)]
pub struct Decoder<'a> {
    rest: &'a [u8],
    what: &'static str,
}

impl<'a> Decoder<'a> {
    /// Starts at the first byte of `bytes`.
    pub fn new(bytes: &'a [u8], what: &'static str) -> Self {
        Self { rest: bytes, what }
    }

    /// Bytes not read yet.
    pub fn remaining(&self) -> usize {
        self.rest.len()
    }

    /// An [`FormatError::Invalid`] about the thing being decoded.
    pub fn invalid(&self, why: &'static str) -> FormatError {
        FormatError::Invalid { what: self.what, why }
    }

    /// The next `n` bytes.
    pub fn bytes(&mut self, n: usize) -> Result<&'a [u8], FormatError> {
        let (head, tail) = self.rest.split_at_checked(n).ok_or(FormatError::Truncated { what: self.what })?;
        self.rest = tail;
        Ok(head)
    }

    /// The next `N` bytes as an array.
    pub fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let (head, tail) = self.rest.split_first_chunk().ok_or(FormatError::Truncated { what: self.what })?;
        self.rest = tail;
        Ok(*head)
    }

    /// One byte.
    pub fn u8(&mut self) -> Result<u8, FormatError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    /// Two bytes.
    pub fn u16(&mut self) -> Result<u16, FormatError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    /// Four bytes.
    pub fn u32(&mut self) -> Result<u32, FormatError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    /// Eight bytes.
    pub fn u64(&mut self) -> Result<u64, FormatError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    /// Eight bytes, two's complement.
    pub fn i64(&mut self) -> Result<i64, FormatError> {
        Ok(i64::from_le_bytes(self.array()?))
    }

    /// An unsigned LEB128 integer of at most 64 bits, in as few bytes as it takes.
    pub fn varint(&mut self) -> Result<u64, FormatError> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            let bits = u64::from(byte & 0x7f);
            if shift == 63 && bits > 1 {
                return Err(self.invalid("a number exceeds 64 bits"));
            }
            value |= bits << shift;
            if byte == 0 && shift > 0 {
                return Err(self.invalid("a number is longer than it need be"));
            }
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(self.invalid("a number exceeds 64 bits"))
    }

    /// A signed integer, zigzag in LEB128.
    pub fn zigzag(&mut self) -> Result<i64, FormatError> {
        let raw = self.varint()?;
        Ok((raw >> 1).cast_signed() ^ -((raw & 1).cast_signed()))
    }

    /// A count or length as LEB128, refused above `max`.
    pub fn count(&mut self, what: &'static str, max: usize) -> Result<usize, FormatError> {
        let found = self.varint()?;
        check_limit(what, found, max)
    }

    /// A byte string with its LEB128 length in front, refused above `max`.
    pub fn string(&mut self, what: &'static str, max: usize) -> Result<&'a [u8], FormatError> {
        let len = self.count(what, max)?;
        self.bytes(len)
    }

    /// A UTF-8 text with its LEB128 length in front, refused above `max` bytes.
    pub fn text(&mut self, what: &'static str, max: usize) -> Result<String, FormatError> {
        let bytes = self.string(what, max)?;
        std::str::from_utf8(bytes).map(str::to_owned).map_err(|_| FormatError::Invalid { what, why: "not UTF-8" })
    }

    /// Checks the magic bytes.
    pub fn magic(&mut self, magic: &[u8; 8]) -> Result<(), FormatError> {
        if &self.array::<8>().map_err(|_| FormatError::Magic { what: self.what })? == magic {
            Ok(())
        } else {
            Err(FormatError::Magic { what: self.what })
        }
    }

    /// Checks that the version is `known`.
    pub fn version(&mut self, known: u16) -> Result<(), FormatError> {
        match self.u16()? {
            found if found == known => Ok(()),
            found => Err(FormatError::Version { what: self.what, found, known }),
        }
    }

    /// Refuses bytes that are left over.
    pub fn finish(self) -> Result<(), FormatError> {
        match self.rest.len() {
            0 => Ok(()),
            extra => Err(FormatError::Trailing { what: self.what, extra }),
        }
    }
}

/// `found` as a `usize`, refused above `max`.
pub fn check_limit(what: &'static str, found: u64, max: usize) -> Result<usize, FormatError> {
    match usize::try_from(found) {
        Ok(n) if n <= max => Ok(n),
        _ => Err(FormatError::Limit { what, found, max: max as u64 }),
    }
}

/// Appends fields to a byte vector.
pub trait Encoder {
    /// One byte.
    fn put_u8(&mut self, value: u8);
    /// Two bytes.
    fn put_u16(&mut self, value: u16);
    /// Four bytes.
    fn put_u32(&mut self, value: u32);
    /// Eight bytes.
    fn put_u64(&mut self, value: u64);
    /// Eight bytes, two's complement.
    fn put_i64(&mut self, value: i64);
    /// An unsigned LEB128 integer.
    fn put_varint(&mut self, value: u64);
    /// A signed integer, zigzag in LEB128.
    fn put_zigzag(&mut self, value: i64);
    /// A byte string with its LEB128 length in front.
    fn put_string(&mut self, value: &[u8]);
}

impl Encoder for Vec<u8> {
    fn put_u8(&mut self, value: u8) {
        self.push(value);
    }

    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_i64(&mut self, value: i64) {
        self.extend_from_slice(&value.to_le_bytes());
    }

    fn put_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.push((value & 0x7f) as u8 | 0x80);
            value >>= 7;
        }
        self.push((value & 0x7f) as u8);
    }

    fn put_zigzag(&mut self, value: i64) {
        self.put_varint(((value << 1) ^ (value >> 63)).cast_unsigned());
    }

    fn put_string(&mut self, value: &[u8]) {
        self.put_varint(value.len() as u64);
        self.extend_from_slice(value);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn every_number_reads_back(value: u64, signed: i64) {
            let mut bytes = Vec::new();
            bytes.put_varint(value);
            bytes.put_zigzag(signed);
            let mut decoder = Decoder::new(&bytes, "test");
            prop_assert_eq!(decoder.varint().unwrap(), value);
            prop_assert_eq!(decoder.zigzag().unwrap(), signed);
            decoder.finish().unwrap();
        }

        #[test]
        fn a_number_is_written_in_one_way(bytes in proptest::collection::vec(prop_oneof![Just(0u8), Just(0x80), any::<u8>()], 1..11)) {
            let mut decoder = Decoder::new(&bytes, "test");
            if let Ok(value) = decoder.varint() {
                let mut again = Vec::new();
                again.put_varint(value);
                prop_assert_eq!(&again[..], &bytes[..bytes.len() - decoder.remaining()]);
            }
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let mut decoder = Decoder::new(&bytes, "test");
            while decoder.varint().is_ok() {}
            let _ = decoder.string("s", 10);
        }
    }

    #[test]
    fn a_length_beyond_its_limit_is_refused_before_anything_is_read() {
        let mut bytes = Vec::new();
        bytes.put_varint(1 << 40);
        let error = Decoder::new(&bytes, "test").string("name", 255).unwrap_err();
        assert_eq!(error, FormatError::Limit { what: "name", found: 1 << 40, max: 255 });
    }
}
