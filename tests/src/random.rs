//! Seeded randomness: the same seed gives the same bytes on every machine and in every release.

/// A SplitMix64 generator (S. Vigna's public-domain constants). For tests, never for keys.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The sequence that belongs to `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// Any 64-bit number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `bound`; 0 when `bound` is 0.
    pub fn below(&mut self, bound: u64) -> u64 {
        self.number().checked_rem(bound).unwrap_or(0)
    }

    /// An index below `len`; 0 when `len` is 0.
    pub fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).unwrap_or(0)
    }

    /// True in `percent` of 100 calls.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// `len` bytes that no compressor makes shorter.
    pub fn bytes(&mut self, len: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(len + 8);
        while bytes.len() < len {
            bytes.extend_from_slice(&self.number().to_le_bytes());
        }
        bytes.truncate(len);
        bytes
    }

    /// `len` bytes of log-like text that compresses several times.
    pub fn text(&mut self, len: usize) -> Vec<u8> {
        const WORDS: [&str; 16] = [
            "accepted",
            "block",
            "session",
            "stream",
            "durable",
            "watermark",
            "from",
            "host",
            "error",
            "retry",
            "10.0.0.",
            "closed",
            "/var/lib/data/",
            "INFO",
            "WARN",
            "ms",
        ];
        let mut text = Vec::with_capacity(len + 32);
        while text.len() < len {
            let word = WORDS.get(self.index(WORDS.len())).copied().unwrap_or_default();
            text.extend_from_slice(word.as_bytes());
            match self.below(12) {
                0 => text.push(b'\n'),
                1 => text.extend_from_slice(self.below(10_000).to_string().as_bytes()),
                _ => text.push(b' '),
            }
        }
        text.truncate(len);
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_seed_gives_the_same_bytes_for_ever() {
        let mut random = Random::new(1);
        assert_eq!(random.number(), 0x910a_2dec_8902_5cc1, "changing this changes every committed seed");
        assert_eq!(Random::new(7).bytes(33), Random::new(7).bytes(33));
        assert_ne!(Random::new(7).bytes(33), Random::new(8).bytes(33));
        assert_eq!(Random::new(7).text(1000).len(), 1000);
    }
}
