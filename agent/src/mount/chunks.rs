//! Chunks of file content, verified, in a cache of stated size.
//!
//! Why chunks are copied out of their blocks: an opened data block holds credit of the session until it is dropped, and
//! without credit the server sends nothing. A cache of blocks would soon hold all credit there is, and every reader would
//! wait for ever. So whoever receives a block copies what it holds (each chunk after its id has been verified) and drops
//! it before it does anything else; nobody waits for anything while it holds a block. What the cache keeps is its own
//! memory, and the session's credit is always on its way back.
//!
//! A chunk that several readers want at once is fetched once: the first to miss it claims it, the others wait for that
//! claim. Nobody waits for a claim before its own claims are settled, so waiting never goes in a circle.
//!
//! Memory: `bytes_max`, and what readers hold of chunks that have been evicted meanwhile (one request each).

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use parking_lot::{Condvar, Mutex};
use strandline_actors::runtime::clock;
use strandline_messages::{ChunkId, ChunkKind, SnapshotId, limits};

use super::patience::Patience;
use super::why_not_fetched;
use crate::seal::OpenedBlock;
use crate::trees::FetchError;

/// What a kept chunk costs besides its bytes: its places in two maps.
const OVERHEAD_BYTES: usize = 160;
/// How long damage is remembered: a file manager that looks again and again must not fetch again and again.
const DAMAGE_KEPT: Duration = Duration::from_secs(15);
/// Most damaged chunks remembered.
const DAMAGED_MAX: usize = 1024;

/// Why a chunk cannot be had, for people.
pub(super) type Reason = Arc<str>;

/// See the module.
pub(super) struct Chunks {
    patience: Arc<Patience>,
    bytes_max: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    slots: HashMap<ChunkId, Slot>,
    /// Kept chunks by their last use.
    uses: BTreeMap<u64, ChunkId>,
    clock: u64,
    bytes: usize,
    damaged: HashMap<ChunkId, (Instant, Reason)>,
}

enum Slot {
    Kept { bytes: Bytes, used: u64 },
    Coming(Arc<Flight>),
}

/// A chunk on its way. Always settled by whoever claimed it.
#[derive(Default)]
struct Flight {
    outcome: Mutex<Option<Result<Bytes, Reason>>>,
    settled: Condvar,
}

impl Flight {
    fn settle(&self, outcome: Result<Bytes, Reason>) {
        self.outcome.lock().get_or_insert(outcome);
        self.settled.notify_all();
    }

    fn wait(&self) -> Result<Bytes, Reason> {
        let mut outcome = self.outcome.lock();
        loop {
            if let Some(outcome) = &*outcome {
                return outcome.clone();
            }
            self.settled.wait(&mut outcome);
        }
    }
}

impl State {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// A kept chunk, used now.
    fn touch(&mut self, id: &ChunkId) -> Option<Bytes> {
        let now = self.tick();
        let Some(Slot::Kept { bytes, used }) = self.slots.get_mut(id) else { return None };
        self.uses.remove(used);
        *used = now;
        self.uses.insert(now, *id);
        Some(bytes.clone())
    }

    fn keep(&mut self, id: ChunkId, bytes: Bytes, bytes_max: usize) {
        let used = self.tick();
        self.bytes += bytes.len() + OVERHEAD_BYTES;
        self.uses.insert(used, id);
        if let Some(Slot::Kept { bytes, used }) = self.slots.insert(id, Slot::Kept { bytes, used }) {
            self.bytes -= bytes.len() + OVERHEAD_BYTES;
            self.uses.remove(&used);
        }
        while self.bytes > bytes_max
            && let Some((_, oldest)) = self.uses.pop_first()
        {
            if let Some(Slot::Kept { bytes, .. }) = self.slots.remove(&oldest) {
                self.bytes -= bytes.len() + OVERHEAD_BYTES;
            }
        }
    }

    fn damage(&mut self, id: &ChunkId) -> Option<Reason> {
        let (since, reason) = self.damaged.get(id)?;
        let fresh = clock::now().saturating_duration_since(*since) < DAMAGE_KEPT;
        let reason = fresh.then(|| Arc::clone(reason));
        if !fresh {
            self.damaged.remove(id);
        }
        reason
    }
}

/// Chunks that one fetch is to bring. Whatever is not settled when it is dropped fails.
struct Claim<'a> {
    chunks: &'a Chunks,
    open: HashMap<ChunkId, Arc<Flight>>,
}

impl Claim<'_> {
    fn settle(&mut self, id: &ChunkId, outcome: Result<Bytes, Reason>, lasting: bool) {
        let Some(flight) = self.open.remove(id) else { return };
        let mut state = self.chunks.state.lock();
        match &outcome {
            Ok(bytes) => state.keep(*id, bytes.clone(), self.chunks.bytes_max),
            Err(reason) => {
                state.slots.remove(id);
                if lasting {
                    if state.damaged.len() >= DAMAGED_MAX {
                        state.damaged.clear();
                    }
                    state.damaged.insert(*id, (clock::now(), Arc::clone(reason)));
                }
            }
        }
        drop(state);
        flight.settle(outcome);
    }

    /// Copies what the block holds.
    fn take(&mut self, block: &OpenedBlock) {
        if block.kind() != ChunkKind::Data {
            return;
        }
        for (row, wanted) in block.rows().iter().enumerate() {
            let claimed = self.open.contains_key(&wanted.id);
            // A neighbour in the block is likely to be wanted soon; one that is there or on its way already is not copied.
            if !claimed && self.chunks.state.lock().slots.contains_key(&wanted.id) {
                continue;
            }
            match block.chunk(row) {
                Ok(chunk) if claimed => self.settle(&wanted.id, Ok(Bytes::copy_from_slice(chunk.bytes)), true),
                Ok(chunk) => self.chunks.keep_neighbour(wanted.id, chunk.bytes),
                Err(error) => self.settle(&wanted.id, Err(error.to_string().into()), true),
            }
        }
    }

    /// What did not come fails with the reason that was given or is most likely.
    fn fail_the_rest(&mut self, problems: &[FetchError]) {
        let open: Vec<ChunkId> = self.open.keys().copied().collect();
        for id in open {
            let likely = |problem: &&FetchError| {
                matches!(problem, FetchError::Damaged { .. } | FetchError::Unreadable { .. } | FetchError::Lost { .. })
            };
            let named = problems.iter().find(|problem| problem.concerns(&id));
            let (reason, lasting) = match named.or_else(|| problems.iter().find(likely)) {
                Some(FetchError::Missing { .. }) | None => (FetchError::Missing { chunks: vec![id] }.to_string(), true),
                Some(problem) => (why_not_fetched(problem), !matches!(problem, FetchError::Lost { .. })),
            };
            self.settle(&id, Err(reason.into()), lasting);
        }
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.fail_the_rest(&[FetchError::Lost { reason: "the fetch ended early".into() }]);
    }
}

impl Chunks {
    /// Keeps up to about `bytes_max`.
    pub(super) fn new(patience: Arc<Patience>, bytes_max: usize) -> Self {
        Self { patience, bytes_max, state: Mutex::default() }
    }

    /// The chunks, in the order of `ids`. Waits for the network if it must, a bounded time.
    pub(super) fn get(&self, snapshot: SnapshotId, ids: &[ChunkId]) -> Vec<Result<Bytes, Reason>> {
        enum Found {
            Settled(Result<Bytes, Reason>),
            Coming(Arc<Flight>),
        }
        let mut claimed = Vec::new();
        let found: Vec<Found> = {
            let mut state = self.state.lock();
            let found = ids.iter().map(|id| match state.slots.get(id) {
                Some(Slot::Coming(flight)) => Found::Coming(Arc::clone(flight)),
                Some(Slot::Kept { bytes, .. }) => {
                    let kept = bytes.clone();
                    Found::Settled(Ok(state.touch(id).unwrap_or(kept)))
                }
                None => match state.damage(id) {
                    Some(reason) => Found::Settled(Err(reason)),
                    None => Found::Coming(claim(&mut state, &mut claimed, id)),
                },
            });
            found.collect()
        };
        self.fetch(snapshot, &claimed);
        let settled = found.into_iter().map(|found| match found {
            Found::Settled(outcome) => outcome,
            Found::Coming(flight) => flight.wait(),
        });
        settled.collect()
    }

    /// Fetches what is neither there nor on its way.
    pub(super) fn prefetch(&self, snapshot: SnapshotId, ids: &[ChunkId]) {
        let mut claimed = Vec::new();
        {
            let mut state = self.state.lock();
            for id in ids {
                if !state.slots.contains_key(id) && state.damage(id).is_none() {
                    claim(&mut state, &mut claimed, id);
                }
            }
        }
        self.fetch(snapshot, &claimed);
    }

    fn fetch(&self, snapshot: SnapshotId, claimed: &[(ChunkId, Arc<Flight>)]) {
        // All claims exist before the first is fetched, so that each is settled whatever happens.
        let batches = claimed.chunks(limits::FETCH_IDS_MAX).map(|batch| {
            let wanted: Vec<ChunkId> = batch.iter().map(|(id, _)| *id).collect();
            (wanted, Claim { chunks: self, open: batch.iter().cloned().collect() })
        });
        for (wanted, mut claim) in batches.collect::<Vec<_>>() {
            let mut problems = Vec::new();
            self.patience.fetch(snapshot, wanted, |answer| match answer {
                Ok(block) => claim.take(&block),
                Err(error) => problems.push(error),
            });
            claim.fail_the_rest(&problems);
        }
    }

    fn keep_neighbour(&self, id: ChunkId, bytes: &[u8]) {
        let copy = Bytes::copy_from_slice(bytes);
        let mut state = self.state.lock();
        if !state.slots.contains_key(&id) {
            state.keep(id, copy, self.bytes_max);
        }
    }
}

fn claim(state: &mut State, claimed: &mut Vec<(ChunkId, Arc<Flight>)>, id: &ChunkId) -> Arc<Flight> {
    let flight = Arc::new(Flight::default());
    state.slots.insert(*id, Slot::Coming(Arc::clone(&flight)));
    claimed.push((*id, Arc::clone(&flight)));
    flight
}
