//! How hard blocks are compressed: always the same, or as hard as costs no time.
//!
//! A sealing thread that waits for the connection, the server or the reading of files has time to compress harder; what it
//! saves makes the next wait shorter. A thread that has to share its processor has none. [`LevelControl`] is told how
//! long each wait and each sealing took, and says the level of the next block. It asks for no time itself.

use std::str::FromStr;
use std::time::Duration;

use strandline_messages::format::block::Codec;

/// zstd's own default, and the lowest level that is chosen by itself.
pub const USUAL_LEVEL: i32 = 3;
/// Levels that are chosen by themselves, and how many times as long as at the first one they take (text and programs
/// in blocks of 2 MiB). Higher ones need several MiB more for each thread.
const LADDER: [(i32, f64); 3] = [(USUAL_LEVEL, 1.0), (5, 2.1), (6, 2.9)];
/// The part of a period that sealing may take.
const BUSY_MAX: f64 = 0.7;
/// A thread that got less than this part of the time of its processor shares it.
const ALONE_MIN: f64 = 0.8;
/// A wait counts as so many sealings at the first level, if it was longer: more says nothing more, but would be remembered.
const WAIT_MAX: f64 = 8.0;
/// What is expected of the first block, seconds for a byte at the first level.
const FIRST_S_PER_BYTE: f64 = 4e-9;
/// What earlier blocks count for, compared with the last one.
const MEMORY: f64 = 0.5;

/// The wish of a user.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compression {
    /// [`USUAL_LEVEL`], and more while it costs no time.
    #[default]
    Auto,
    /// A level of zstd, 1 to 19.
    Level(i32),
}

impl Compression {
    /// The level to begin with.
    pub fn first(self) -> i32 {
        match self {
            Self::Auto => USUAL_LEVEL,
            Self::Level(level) => level,
        }
    }

    /// The level of what is compressed once again, to become smaller: no lower than it was before.
    pub fn thorough(self) -> i32 {
        match self {
            Self::Auto => LADDER.last().map_or(USUAL_LEVEL, |(level, _)| *level),
            Self::Level(level) => level,
        }
    }
}

impl FromStr for Compression {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.parse() {
            _ if text == "auto" => Ok(Self::Auto),
            Ok(level @ 1..=19) => Ok(Self::Level(level)),
            _ => Err(format!("`{text}` is neither `auto` nor a level from 1 (fast) to 19 (small)")),
        }
    }
}

/// How one block was sealed.
#[derive(Clone, Copy, Debug)]
pub struct Sealing {
    /// From its beginning to its end.
    pub elapsed: Duration,
    /// Time that the thread had a processor.
    pub processor: Duration,
    /// Bytes before.
    pub bytes: u32,
    /// Whether they became fewer.
    pub codec: Codec,
}

/// Chooses the level of each block of one sealing thread.
#[derive(Debug)]
pub struct LevelControl {
    compression: Compression,
    /// Index into [`LADDER`] of the block that is being sealed.
    step: usize,
    /// Of the last block's sealing, s.
    last_s: f64,
    /// Decaying sums: what was sealed, B; what it would have taken at the first level, s; the same of elapsed and
    /// processor time, s.
    bytes: f64,
    usual_s: f64,
    elapsed_s: f64,
    processor_s: f64,
    /// Decaying sums of whole periods, from the end of one block to the end of the next, s, and their bytes.
    period_s: f64,
    period_bytes: f64,
}

impl LevelControl {
    /// Begins at the usual level.
    pub fn new(compression: Compression) -> Self {
        Self {
            compression,
            step: 0,
            last_s: 0.0,
            bytes: 0.0,
            usual_s: 0.0,
            elapsed_s: 0.0,
            processor_s: 0.0,
            period_s: 0.0,
            period_bytes: 0.0,
        }
    }

    /// The level of the next block, of so many bytes before compression, for which the thread has `waited`.
    pub fn next(&mut self, bytes: u32, waited: Duration) -> i32 {
        if let Compression::Level(level) = self.compression {
            return level;
        }
        let bytes = f64::from(bytes).max(1.0);
        let usual_s = bytes * if self.bytes > 0.0 { self.usual_s / self.bytes } else { FIRST_S_PER_BYTE };
        let last_s = if self.last_s > 0.0 { self.last_s } else { usual_s };
        let waited_s = waited.as_secs_f64().min(WAIT_MAX * usual_s);
        self.period_s = self.period_s * MEMORY + waited_s + last_s;
        self.period_bytes = self.period_bytes * MEMORY + bytes;
        let budget_s = BUSY_MAX * self.period_s / self.period_bytes * bytes;
        let alone = self.processor_s >= ALONE_MIN * self.elapsed_s;
        let fits = |&(_, times): &(i32, f64)| usual_s * times <= budget_s;
        self.step = if alone { LADDER.iter().rposition(fits).unwrap_or(0) } else { 0 };
        LADDER.get(self.step).map_or(USUAL_LEVEL, |(level, _)| *level)
    }

    /// The block of the last [`Self::next`] is sealed.
    pub fn sealed(&mut self, sealing: Sealing) {
        let elapsed_s = sealing.elapsed.as_secs_f64();
        let processor_s = sealing.processor.as_secs_f64();
        self.last_s = elapsed_s;
        self.elapsed_s = self.elapsed_s * MEMORY + elapsed_s;
        self.processor_s = self.processor_s * MEMORY + processor_s;
        // What does not become smaller is stored as it is, at every level, and says nothing about them.
        if sealing.codec != Codec::Stored {
            let times = LADDER.get(self.step).map_or(1.0, |(_, times)| *times);
            self.usual_s = self.usual_s * MEMORY + processor_s / times;
            self.bytes = self.bytes * MEMORY + f64::from(sealing.bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: u32 = 2 << 20;
    /// Of one block at the usual level.
    const USUAL_S: f64 = 0.008;

    struct Thread {
        control: LevelControl,
        levels: Vec<i32>,
    }

    impl Thread {
        fn new() -> Self {
            Self { control: LevelControl::new(Compression::Auto), levels: Vec::new() }
        }

        // Seals blocks, one of which may leave every `period_s`; the thread gets `share` of its processor.
        fn seal(&mut self, blocks: usize, period_s: f64, share: f64, shrinks: bool) {
            let mut sealing_s = USUAL_S;
            for _ in 0..blocks {
                let waited = Duration::from_secs_f64((period_s - sealing_s).max(0.0));
                let level = self.control.next(BLOCK, waited);
                self.levels.push(level);
                let times = LADDER.iter().find(|(known, _)| *known == level).unwrap().1;
                let processor_s = if shrinks { USUAL_S * times } else { USUAL_S / 10.0 };
                sealing_s = processor_s / share;
                self.control.sealed(Sealing {
                    elapsed: Duration::from_secs_f64(sealing_s),
                    processor: Duration::from_secs_f64(processor_s),
                    bytes: BLOCK,
                    codec: if shrinks { Codec::Zstd } else { Codec::Stored },
                });
            }
        }

        fn last(&self) -> i32 {
            *self.levels.last().unwrap()
        }
    }

    #[test]
    fn a_thread_that_never_waits_stays_at_the_usual_level() {
        let mut thread = Thread::new();
        thread.seal(50, 0.0, 1.0, true);
        assert!(thread.levels.iter().all(|level| *level == 3), "{:?}", thread.levels);
    }

    #[test]
    fn the_level_is_the_highest_that_leaves_some_waiting() {
        for (periods, level) in [(1.2, 3), (2.5, 3), (3.2, 5), (4.0, 5), (4.5, 6), (100.0, 6)] {
            let mut thread = Thread::new();
            thread.seal(20, USUAL_S * periods, 1.0, true);
            let settled = &thread.levels[10..];
            assert!(settled.iter().all(|chosen| *chosen == level), "{periods} times: {:?}", thread.levels);
        }
    }

    #[test]
    fn it_falls_again_within_a_few_blocks_when_the_connection_becomes_fast() {
        let mut thread = Thread::new();
        thread.seal(10, 1.0, 1.0, true);
        assert_eq!(thread.last(), 6);
        let before = thread.levels.len();
        thread.seal(10, 0.0, 1.0, true);
        assert!(thread.levels[before + 6..].iter().all(|level| *level == 3), "{:?}", thread.levels);
    }

    #[test]
    fn a_thread_that_shares_its_processor_stays_at_the_usual_level_however_long_it_waits() {
        let mut thread = Thread::new();
        thread.seal(20, 1.0, 0.5, true);
        assert!(thread.levels[1..].iter().all(|level| *level == 3), "{:?}", thread.levels);
    }

    #[test]
    fn what_cannot_be_compressed_says_nothing_about_what_comes_next() {
        let mut thread = Thread::new();
        thread.seal(20, 0.0, 1.0, false);
        thread.seal(5, 0.0, 1.0, true);
        assert!(thread.levels.iter().all(|level| *level == 3), "{:?}", thread.levels);
    }

    #[test]
    fn a_first_block_that_was_long_in_coming_is_compressed_hard() {
        let mut control = LevelControl::new(Compression::Auto);
        assert_eq!(control.next(100_000, Duration::from_millis(300)), 6);
        assert_eq!(LevelControl::new(Compression::Auto).next(BLOCK, Duration::from_millis(5)), 3);
    }

    #[test]
    fn a_level_that_was_wished_for_is_kept() {
        let mut control = LevelControl::new(Compression::Level(12));
        assert_eq!(control.next(BLOCK, Duration::from_secs(9)), 12);
        assert_eq!(control.next(0, Duration::ZERO), 12);
        for (text, parsed) in [("auto", Some(Compression::Auto)), ("19", Some(Compression::Level(19)))] {
            assert_eq!(text.parse::<Compression>().ok(), parsed);
        }
        for wrong in ["0", "20", "-1", "", "fast", "3.5"] {
            assert!(wrong.parse::<Compression>().unwrap_err().contains("from 1 (fast) to 19"), "{wrong}");
        }
    }
}
