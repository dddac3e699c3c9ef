//! What a seed means: how many of everything there are, and what will go wrong when.

use std::time::Duration;

use crate::random::Random;

/// How a direction of a connection ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Both directions fail; what was under way is lost.
    Reset,
    /// The reader sees the end of the stream where the cut is, and nothing can be written any more.
    Finish,
    /// Nothing more arrives, and nobody says so.
    Stall,
}

/// What becomes of one connection.
#[derive(Clone, Copy, Debug)]
pub struct LinePlan {
    /// One way.
    pub latency: Duration,
    /// Added to the latency of each piece, at most.
    pub jitter: Duration,
    /// `None`: as fast as it goes.
    pub bytes_per_second: Option<u64>,
    /// Bytes under way in each direction before the writer waits.
    pub room_bytes: usize,
    /// Where the direction to the server ends, bytes, and how; then the other direction.
    pub cuts: [Option<(u64, Ending)>; 2],
}

/// Something that happens to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blow {
    /// The server dies and comes back after so long.
    KillServer(Duration),
    /// The agent of this number dies; whoever runs it starts it again after so long.
    KillAgent(usize, Duration),
    /// Every connection is reset.
    CutEverything,
    /// Writing to the server's disk fails for so long: with an error of the disk, or because it is full.
    FailDisk(Duration, bool),
}

/// The whole of it.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Agents.
    pub agents: usize,
    /// Streams of each session.
    pub streams: u16,
    /// Backups that each agent makes, one after the other.
    pub backups: usize,
    /// Chunks that a backup refers to, at most.
    pub chunks: usize,
    /// Different chunks there are.
    pub universe: usize,
    /// A block is longer than what stands in it by at most so much.
    pub block_bytes: usize,
    /// In 100 connections, how many are cut.
    pub cut_percent: u64,
    /// In 100 connections, how many are slow.
    pub slow_percent: u64,
    /// Latency of all connections, at most.
    pub latency: Duration,
    /// Writing a block takes at most so long, and syncing it again.
    pub disk: Duration,
    /// In 100 backups, how many are restored afterwards.
    pub restore_percent: u64,
    /// How long each backup has nothing to send after its first blocks.
    pub pause: Duration,
    /// Connections are cut, processes killed and disks fail only before this; then the world is calm and must come to its end.
    pub storm: Duration,
    /// What happens when.
    pub blows: Vec<(Duration, Blow)>,
    /// What becomes of one connection, whatever the seed says of the others.
    pub cut: Option<OneCut>,
}

/// One direction of one connection ends at an exact byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OneCut {
    /// The connection, counted from 0 in the order in which they are made.
    pub connection: u64,
    /// 0: what goes to the server; 1: what comes from it.
    pub way: usize,
    /// After so many bytes.
    pub after: u64,
    /// How.
    pub ending: Ending,
}

/// A number below `usual`, in `percent` of 100 cases one below `other`.
fn mostly(random: &mut Random, usual: u64, other: u64, percent: u64) -> u64 {
    let bound = if random.percent(percent) { other } else { usual };
    random.below(bound)
}

const STORM: Duration = Duration::from_mins(3);
/// The storm of a world whose backups pause: longer than an incident may last, and than a session may be alone.
const LONG_STORM: Duration = Duration::from_hours(1);

impl Plan {
    /// What this seed means.
    pub fn of(seed: u64) -> Self {
        let mut random = Random::new(seed ^ 0x5eed);
        let profile = random.below(6);
        let small = random.percent(50);
        let mut plan = Self {
            agents: 1 + random.index(if small { 2 } else { 4 }),
            streams: 1 + u16::try_from(random.below(6)).unwrap_or(0),
            backups: 1 + random.index(3),
            chunks: 20 + random.index(if small { 60 } else { 400 }),
            universe: 100 + random.index(800),
            block_bytes: 3000,
            cut_percent: 0,
            slow_percent: 0,
            latency: Duration::from_micros(50 + mostly(&mut random, 2_000, 200_000, 30)),
            disk: Duration::from_micros(100 + mostly(&mut random, 20_000, 400_000, 20)),
            restore_percent: random.below(100),
            pause: Duration::ZERO,
            storm: STORM,
            blows: Vec::new(),
            cut: None,
        };
        // 0: calm. Later ones have more of everything.
        if profile == 0 && random.percent(20) {
            plan.pause = Duration::from_secs(random.below(1200));
        }
        if profile >= 1 {
            plan.cut_percent = random.below(60);
            plan.slow_percent = random.below(15);
        }
        if profile >= 2 {
            let count = 1 + random.index(if profile >= 5 { 12 } else { 3 });
            for _ in 0..count {
                let at = Duration::from_millis(mostly(&mut random, 100_000, 4_000, 60));
                let away = Duration::from_millis(10 + mostly(&mut random, 2_000, 40_000, 20));
                let blow = match random.below(if profile >= 4 { 8 } else { 6 }) {
                    0..3 => Blow::KillServer(away),
                    3 | 4 => Blow::KillAgent(random.index(plan.agents), away),
                    5 => Blow::CutEverything,
                    full => Blow::FailDisk(away, full == 6),
                };
                plan.blows.push((at, blow));
            }
            if random.percent(6) {
                plan.pause_long(&mut random);
            }
            plan.blows.sort_by_key(|(at, _)| *at);
        }
        plan
    }

    /// Backups that wait for a long time in their middle, and connections that are cut meanwhile.
    fn pause_long(&mut self, random: &mut Random) {
        self.pause = Duration::from_mins(1 + random.below(50));
        self.storm = LONG_STORM;
        for _ in 0..=random.index(5) {
            self.blows.push((Duration::from_secs(random.below(LONG_STORM.as_secs())), Blow::CutEverything));
        }
    }

    /// One agent that makes and restores one small snapshot over one stream; nothing goes wrong but `cut`.
    pub fn one_cut(cut: OneCut) -> Self {
        Self {
            agents: 1,
            streams: 1,
            backups: 1,
            chunks: 64,
            universe: 800,
            block_bytes: 24_000,
            cut_percent: 0,
            slow_percent: 0,
            latency: Duration::from_micros(500),
            disk: Duration::from_micros(500),
            restore_percent: 100,
            pause: Duration::ZERO,
            storm: STORM,
            blows: Vec::new(),
            cut: Some(cut),
        }
    }

    /// Whether nothing goes wrong.
    pub fn is_calm(&self) -> bool {
        self.cut_percent == 0 && self.slow_percent == 0 && self.blows.is_empty() && self.cut.is_none()
    }

    /// What becomes of connection `number`, which is made at `age`.
    pub fn line(&self, number: u64, random: &mut Random, age: Duration) -> LinePlan {
        let stormy = age < self.storm;
        let mut cuts = [None, None];
        if let Some(one) = self.cut.filter(|one| one.connection == number)
            && let Some(cut) = cuts.get_mut(one.way)
        {
            *cut = Some((one.after, one.ending));
        }
        if stormy && random.percent(self.cut_percent) {
            let way = random.index(2);
            let after = if random.percent(50) { random.below(400) } else { random.below(60_000) };
            let ending = match random.below(5) {
                0 | 1 => Ending::Reset,
                2 | 3 => Ending::Finish,
                _ => Ending::Stall,
            };
            if let Some(cut) = cuts.get_mut(way) {
                *cut = Some((after, ending));
            }
        }
        let slow = stormy && random.percent(self.slow_percent);
        LinePlan {
            latency: Duration::from_micros(random.below(self.latency.as_micros().try_into().unwrap_or(u64::MAX)) + 20),
            jitter: Duration::from_micros(random.below(2_000)),
            bytes_per_second: slow.then(|| 200 + random.below(20_000)),
            room_bytes: 512 << random.below(8),
            cuts,
        }
    }
}
