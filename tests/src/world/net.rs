//! The network: connections with latency, limited room and speed, that may be cut, stall, or lose one direction.

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use bytes::{Buf, Bytes};
use parking_lot::Mutex;
use strandline_actors::runtime::clock;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

use super::World;
use super::plan::{Ending, LinePlan, Plan};
use crate::random::Random;

/// Which end of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Side {
    Agent,
    Server,
}

/// Whose ends: everything of a process is reset when it dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processes {
    /// The agent's process, counted over all that were started.
    pub agent: u64,
    /// The server's process.
    pub server: u64,
}

/// One direction.
#[derive(Default)]
struct Way {
    /// What is under way, and when it arrives.
    queue: VecDeque<(Instant, Bytes)>,
    queued_bytes: usize,
    written_bytes: u64,
    /// Its cut has come.
    cut: bool,
    free_at: Option<Instant>,
    /// The reader sees the end after the queue, not before this.
    ends_at: Option<Instant>,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

struct Line {
    number: u64,
    plan: LinePlan,
    processes: Processes,
    /// To the server, to the agent.
    ways: [Way; 2],
    reset: bool,
    random: Random,
}

impl Line {
    fn wake(&mut self) {
        for way in &mut self.ways {
            for waker in [way.reader.take(), way.writer.take()].into_iter().flatten() {
                waker.wake();
            }
        }
    }

    fn reset(&mut self) {
        self.reset = true;
        for way in &mut self.ways {
            way.queue.clear();
            way.queued_bytes = 0;
        }
        self.wake();
    }
}

struct Shared {
    world: World,
    plan: Plan,
    random: Mutex<Random>,
    made: AtomicU64,
    cuts: AtomicU64,
    ends: AtomicUsize,
    lines: Mutex<Vec<Arc<Mutex<Line>>>>,
}

/// All connections. Cheap to clone.
#[derive(Clone)]
pub struct Net {
    shared: Arc<Shared>,
}

impl Net {
    /// No connection yet.
    pub fn new(world: &World, plan: Plan) -> Self {
        let random = Mutex::new(world.fork());
        let shared = Shared {
            world: world.clone(),
            plan,
            random,
            made: AtomicU64::new(0),
            cuts: AtomicU64::new(0),
            ends: AtomicUsize::new(0),
            lines: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// A new connection: the agent's end, the server's end.
    pub fn connect(&self, processes: Processes) -> (End, End) {
        let shared = &self.shared;
        let number = shared.made.fetch_add(1, Ordering::Relaxed);
        let mut random = shared.random.lock();
        let plan = shared.plan.line(number, &mut random, shared.world.age());
        let line = Line {
            number,
            plan,
            processes,
            ways: Default::default(),
            reset: false,
            random: Random::new(random.number()),
        };
        shared.world.tell(|| format!("line {number} {processes:?} {plan:?}"));
        let line = Arc::new(Mutex::new(line));
        let mut lines = shared.lines.lock();
        lines.retain(|line| Arc::strong_count(line) > 1);
        lines.push(Arc::clone(&line));
        shared.ends.fetch_add(2, Ordering::Relaxed);
        let end = |side| End { net: self.clone(), line: Arc::clone(&line), side, sleep: None, finished: false };
        (end(Side::Agent), end(Side::Server))
    }

    /// How long a connection takes to be refused or lost in the dark.
    pub fn some_latency(&self) -> Duration {
        let micros = self.shared.plan.latency.as_micros().try_into().unwrap_or(u64::MAX);
        Duration::from_micros(20 + self.shared.random.lock().below(micros))
    }

    /// Resets every connection that `which` picks.
    pub fn reset(&self, which: impl Fn(Processes) -> bool) {
        for line in self.shared.lines.lock().iter() {
            let mut line = line.lock();
            if which(line.processes) {
                line.reset();
            }
        }
    }

    /// Connections made so far.
    pub fn made(&self) -> u64 {
        self.shared.made.load(Ordering::Relaxed)
    }

    /// Connections that were cut at the byte of their plan.
    pub fn cuts(&self) -> u64 {
        self.shared.cuts.load(Ordering::Relaxed)
    }

    /// Ends that somebody still holds.
    pub fn open_ends(&self) -> usize {
        self.shared.ends.load(Ordering::Relaxed)
    }
}

/// One end of a connection.
pub struct End {
    net: Net,
    line: Arc<Mutex<Line>>,
    side: Side,
    sleep: Option<Pin<Box<Sleep>>>,
    finished: bool,
}

impl End {
    /// Indices of the direction that this side writes, and of the one that it reads.
    fn ways(&self) -> (usize, usize) {
        if self.side == Side::Agent { (0, 1) } else { (1, 0) }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.net.shared.ends.fetch_sub(1, Ordering::Relaxed);
        let (writes, reads) = self.ways();
        let mut line = self.line.lock();
        let number = line.number;
        if !self.finished && !line.reset {
            line.reset();
        }
        // Whoever still writes to it finds nobody.
        if let Some(way) = line.ways.get_mut(reads) {
            way.ends_at.get_or_insert_with(clock::now);
            if let Some(writer) = way.writer.take() {
                writer.wake();
            }
        }
        let written = line.ways.get(writes).map_or(0, |way| way.written_bytes);
        drop(line);
        self.net.shared.world.tell(|| format!("line {number} {:?} closes, {written} bytes", self.side));
    }
}

fn reset_error() -> io::Error {
    io::ErrorKind::ConnectionReset.into()
}

impl AsyncRead for End {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let (_, reads) = self.ways();
            let now = clock::now();
            let wait_until = {
                let mut line = self.line.lock();
                if line.reset {
                    return Poll::Ready(Err(reset_error()));
                }
                let Some(way) = line.ways.get_mut(reads) else { return Poll::Ready(Err(reset_error())) };
                match way.queue.front_mut() {
                    Some((at, piece)) if *at <= now => {
                        let bytes = piece.len().min(buf.remaining());
                        buf.put_slice(piece.get(..bytes).unwrap_or_default());
                        piece.advance(bytes);
                        if piece.is_empty() {
                            way.queue.pop_front();
                        }
                        way.queued_bytes -= bytes;
                        if let Some(writer) = way.writer.take() {
                            writer.wake();
                        }
                        return Poll::Ready(Ok(()));
                    }
                    Some((at, _)) => Some(*at),
                    None => match way.ends_at {
                        Some(at) if at <= now => return Poll::Ready(Ok(())),
                        at => {
                            way.reader = Some(cx.waker().clone());
                            at
                        }
                    },
                }
            };
            let Some(at) = wait_until else { return Poll::Pending };
            // Something else may come first: a reset.
            if let Some(way) = self.line.lock().ways.get_mut(reads) {
                way.reader = Some(cx.waker().clone());
            }
            let mut sleep = self.sleep.take().unwrap_or_else(|| Box::pin(tokio::time::sleep(Duration::ZERO)));
            sleep.as_mut().reset(tokio::time::Instant::from_std(at));
            let slept = sleep.as_mut().poll(cx);
            self.sleep = Some(sleep);
            if slept.is_pending() {
                return Poll::Pending;
            }
        }
    }
}

impl AsyncWrite for End {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let (writes, _) = self.ways();
        let now = clock::now();
        let mut guard = self.line.lock();
        let line = &mut *guard;
        let plan = line.plan;
        if line.reset {
            return Poll::Ready(Err(reset_error()));
        }
        let cut = plan.cuts.get(writes).copied().flatten();
        let jitter = Duration::from_micros(line.random.below(plan.jitter.as_micros().try_into().unwrap_or(u64::MAX)));
        let Some(way) = line.ways.get_mut(writes) else { return Poll::Ready(Err(reset_error())) };
        if way.ends_at.is_some() {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let before_cut = cut.map_or(u64::MAX, |(at, _)| at.saturating_sub(way.written_bytes));
        let room = plan.room_bytes.saturating_sub(way.queued_bytes);
        if room == 0 {
            way.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        if before_cut == 0 {
            let Some((_, ending)) = cut else { return Poll::Ready(Err(reset_error())) };
            self.net.shared.cuts.fetch_add(u64::from(!std::mem::replace(&mut way.cut, true)), Ordering::Relaxed);
            match ending {
                Ending::Reset => {
                    line.reset();
                    return Poll::Ready(Err(reset_error()));
                }
                Ending::Finish => {
                    for way in &mut line.ways {
                        way.ends_at = Some(way.free_at.unwrap_or(now).max(now + plan.latency));
                    }
                    line.wake();
                    return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
                }
                Ending::Stall => {
                    // The kernel takes what fits and delivers it never.
                    let taken = bytes.len().min(room);
                    way.queued_bytes += taken;
                    return Poll::Ready(Ok(taken));
                }
            }
        }
        let taken = bytes.len().min(room).min(usize::try_from(before_cut).unwrap_or(usize::MAX));
        let begins = way.free_at.unwrap_or(now).max(now);
        let takes = plan.bytes_per_second.map_or(Duration::ZERO, |rate| {
            Duration::from_nanos((taken as u64).saturating_mul(1_000_000_000) / rate.max(1))
        });
        way.free_at = Some(begins + takes);
        let last = way.queue.back().map_or(now, |(at, _)| *at);
        let arrives = (begins + takes + plan.latency + jitter).max(last);
        way.queue.push_back((arrives, Bytes::copy_from_slice(bytes.get(..taken).unwrap_or_default())));
        way.queued_bytes += taken;
        way.written_bytes += taken as u64;
        if let Some(reader) = way.reader.take() {
            reader.wake();
        }
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(if self.line.lock().reset { Err(reset_error()) } else { Ok(()) })
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let (writes, _) = self.ways();
        self.finished = true;
        let now = clock::now();
        let mut guard = self.line.lock();
        let line = &mut *guard;
        let stalled = line.plan.cuts.get(writes).copied().flatten().is_some_and(|(_, ending)| ending == Ending::Stall);
        let latency = line.plan.latency;
        if let Some(way) = line.ways.get_mut(writes)
            && !(stalled && way.queued_bytes > 0)
        {
            let last = way.queue.back().map_or(now, |(at, _)| *at);
            way.ends_at.get_or_insert((now + latency).max(last));
            if let Some(reader) = way.reader.take() {
                reader.wake();
            }
        }
        Poll::Ready(Ok(()))
    }
}
