//! One direction of one connection of the proxy: reads, holds back what delay and rate ask for, writes, breaks.

use std::collections::VecDeque;
use std::io::{self, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use strandline_actors::runtime::clock;

use super::{Direction, Fault, Link, Plan, QUEUE_BYTES_MAX, REACTION, Shared};

/// Most bytes moved at a time.
const PIECE_BYTES_MAX: usize = 64 << 10;

/// Carries one direction of one connection.
pub(super) struct Pump {
    shared: Arc<Shared>,
    link: Arc<Link>,
    direction: Direction,
    /// Bytes that get through, and what happens then.
    cut: Option<(u64, Fault)>,
    delay: Duration,
    bytes_per_second: Option<u64>,
    /// Pieces under way, with the time when each is due.
    queue: VecDeque<(Instant, Vec<u8>)>,
    queued_bytes: usize,
    /// When the rate limit lets the next piece go.
    free_at: Instant,
    written_bytes: u64,
}

impl Pump {
    /// A pump for `direction` of `link`, which is connection `number` and lives under `plan`.
    pub(super) fn new(shared: Arc<Shared>, link: Arc<Link>, direction: Direction, number: u64, plan: &Plan) -> Self {
        Self {
            shared,
            link,
            direction,
            cut: plan.cut_of(number, direction),
            delay: plan.delay,
            bytes_per_second: plan.bytes_per_second.map(|rate| rate.max(1)),
            queue: VecDeque::new(),
            queued_bytes: 0,
            free_at: clock::now(),
            written_bytes: 0,
        }
    }

    pub(super) fn run(mut self) {
        let mut ended = false;
        loop {
            match self.link.fault() {
                Some(Fault::Reset) => return,
                Some(Fault::Finish) => return self.swallow(),
                Some(Fault::Stall) => {
                    thread::sleep(REACTION);
                    continue;
                }
                None => {}
            }
            if let Some((_, fault)) = self.cut.filter(|(after, _)| self.written_bytes >= *after) {
                if self.link.break_with(fault) {
                    self.shared.cuts.fetch_add(1, Ordering::SeqCst);
                }
                continue;
            }
            if ended && self.queue.is_empty() {
                let _ = self.sink().shutdown(Shutdown::Write);
                return;
            }
            let step = self.deliver().and_then(|()| if ended { Ok(false) } else { self.take() });
            match step {
                Ok(is_end) => ended |= is_end,
                Err(_) => drop(self.link.break_with(Fault::Reset)),
            }
            if ended && let Some((due, _)) = self.queue.front() {
                thread::sleep(due.saturating_duration_since(clock::now()).min(REACTION));
            }
        }
    }

    fn source(&self) -> &TcpStream {
        if self.direction == Direction::ToServer { &self.link.client } else { &self.link.server }
    }

    fn sink(&self) -> &TcpStream {
        if self.direction == Direction::ToServer { &self.link.server } else { &self.link.client }
    }

    /// Most bytes that may be under way: what delay and rate make of them, so that a slow link is not a deep buffer.
    fn room(&self) -> usize {
        let most = self.bytes_per_second.map_or(QUEUE_BYTES_MAX, |rate| {
            let bytes = u128::from(rate) * (self.delay + Duration::from_millis(50)).as_millis() / 1000;
            usize::try_from(bytes).unwrap_or(QUEUE_BYTES_MAX)
        });
        most.clamp(1, QUEUE_BYTES_MAX).saturating_sub(self.queued_bytes)
    }

    /// Reads one piece, if there is room and something comes soon. True at the end of the stream.
    fn take(&mut self) -> io::Result<bool> {
        let room = self.room().min(PIECE_BYTES_MAX);
        if room == 0 {
            thread::sleep(Duration::from_millis(1));
            return Ok(false);
        }
        let due_soon = self.queue.front().map_or(REACTION, |(due, _)| due.saturating_duration_since(clock::now()));
        self.source().set_read_timeout(Some(due_soon.clamp(Duration::from_millis(1), REACTION)))?;
        let mut piece = vec![0; room];
        match self.source().read(&mut piece) {
            Ok(0) => Ok(true),
            Ok(n) => {
                piece.truncate(n);
                let takes = self.bytes_per_second.map_or(Duration::ZERO, |rate| time_for(n, rate));
                self.free_at = self.free_at.max(clock::now()) + takes;
                self.queued_bytes += n;
                self.queue.push_back((self.free_at + self.delay, piece));
                Ok(false)
            }
            Err(error) if is_patience(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Writes what is due, up to the cut.
    fn deliver(&mut self) -> io::Result<()> {
        while let Some((due, mut piece)) = self.queue.pop_front() {
            let left = self.cut.map_or(u64::MAX, |(after, _)| after - self.written_bytes.min(after));
            if due > clock::now() || left == 0 {
                self.queue.push_front((due, piece));
                return Ok(());
            }
            let part = piece.get(..usize::try_from(left).unwrap_or(usize::MAX).min(piece.len())).unwrap_or_default();
            let written = match write_some(self.sink(), part) {
                Ok(written) => written,
                Err(error) if is_patience(&error) => 0,
                Err(error) => return Err(error),
            };
            self.written_bytes += written as u64;
            self.queued_bytes -= written;
            self.shared.carried(self.direction).fetch_add(written as u64, Ordering::SeqCst);
            if written < piece.len() {
                self.queue.push_front((due, piece.split_off(written)));
            }
            if written == 0 {
                return Ok(());
            }
        }
        Ok(())
    }

    /// Reads and forgets, until the peer closes or the connection is reset.
    fn swallow(&self) {
        let mut scratch = [0; 4096];
        while self.link.fault() != Some(Fault::Reset) {
            match self.source().read(&mut scratch) {
                Ok(0) => return,
                Err(error) if !is_patience(&error) => return,
                _ => {}
            }
        }
    }
}

/// How long `bytes` take at `rate` bytes per second.
fn time_for(bytes: usize, rate: u64) -> Duration {
    Duration::from_nanos((bytes as u64).saturating_mul(1_000_000_000) / rate)
}

#[expect(clippy::disallowed_methods, reason = "the time-out of a half-done write must not lose how much was written")]
fn write_some(mut sink: &TcpStream, bytes: &[u8]) -> io::Result<usize> {
    sink.write(bytes)
}

pub(super) fn is_patience(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut | io::ErrorKind::Interrupted)
}
