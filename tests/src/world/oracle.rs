//! What was promised to whom, and whether it is kept. It looks at the disk, never at the actors.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use parking_lot::Mutex;
use strandline_actors::dispatcher::DispatchCounters;
use strandline_messages::{ChunkId, SnapshotId};

use super::World;
use super::storage::{Disk, Row};

/// What one run of a backup has sent, and how much of it the agent believes to be durable.
struct Sent {
    blocks: Vec<Vec<ChunkId>>,
    counters: Arc<DispatchCounters>,
}

struct Shared {
    world: World,
    disk: Disk,
    sent: Mutex<Vec<Sent>>,
    promised: Mutex<Vec<(SnapshotId, Vec<ChunkId>)>>,
    broken: Mutex<Vec<String>>,
}

/// See the module. Cheap to clone.
#[derive(Clone)]
pub struct Oracle {
    shared: Arc<Shared>,
}

/// Which run of a backup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RunNumber(usize);

impl Oracle {
    /// Nothing is promised yet.
    pub fn new(world: &World, disk: &Disk) -> Self {
        let shared = Shared {
            world: world.clone(),
            disk: disk.clone(),
            sent: Mutex::default(),
            promised: Mutex::default(),
            broken: Mutex::default(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// A backup begins.
    pub fn begins(&self, counters: Arc<DispatchCounters>) -> RunNumber {
        let mut sent = self.shared.sent.lock();
        sent.push(Sent { blocks: Vec::new(), counters });
        RunNumber(sent.len() - 1)
    }

    /// It gives a block to its dispatcher.
    pub fn sends(&self, run: RunNumber, ids: &[ChunkId]) {
        if let Some(sent) = self.shared.sent.lock().get_mut(run.0) {
            sent.blocks.push(ids.to_vec());
        }
    }

    /// Its dispatcher says that every block is durable.
    pub fn finished(&self, run: RunNumber) {
        let sent = self.shared.sent.lock();
        if let Some(sent) = sent.get(run.0) {
            let (durable, blocks) = (sent.counters.blocks_durable.load(Ordering::Relaxed), sent.blocks.len() as u64);
            if durable != blocks {
                self.broke(&format!("a dispatcher ended in good order with {durable} of {blocks} blocks acknowledged"));
            }
        }
    }

    /// The agent was told that its snapshot is committed.
    pub fn committed(&self, snapshot: SnapshotId, ids: &[ChunkId]) {
        self.shared.world.tell(|| format!("promised {snapshot}"));
        self.shared.promised.lock().push((snapshot, ids.to_vec()));
        self.check("a commit");
    }

    /// A promise that was seen to be broken.
    pub fn broke(&self, what: &str) {
        self.shared.world.tell(|| format!("BROKEN: {what}"));
        self.shared.broken.lock().push(format!("after {:?}: {what}", self.shared.world.age()));
    }

    /// What was acknowledged is durable, what was committed is complete.
    pub fn check(&self, after: &str) {
        for (number, sent) in self.shared.sent.lock().iter().enumerate() {
            let believed = sent.counters.blocks_durable.load(Ordering::Relaxed);
            let there = self.shared.disk.look(|disk| {
                sent.blocks.iter().filter(|ids| ids.iter().all(|id| disk.chunks.contains_key(id))).count() as u64
            });
            if there < believed {
                self.broke(&format!(
                    "{after}: {believed} blocks of run {number} were acknowledged, {there} are on the disk"
                ));
            }
        }
        for (snapshot, ids) in self.shared.promised.lock().iter() {
            let kept = self.shared.disk.look(|disk| disk.snapshots.get(snapshot).cloned());
            let Some(kept) = kept else {
                self.broke(&format!("{after}: snapshot {snapshot} was promised and is gone"));
                continue;
            };
            let (wanted, kept): (BTreeSet<_>, BTreeSet<_>) = (ids.iter().collect(), kept.iter().collect());
            if wanted != kept {
                self.broke(&format!("{after}: snapshot {snapshot} is another than the one that was promised"));
            }
        }
        let committed = self.shared.disk.look(|disk| {
            let snapshot =
                |(_, row): &(_, Row)| if let Row::Committed(snapshot) = row { Some(*snapshot) } else { None };
            disk.sessions.values().filter_map(snapshot).collect::<Vec<_>>()
        });
        if committed.iter().collect::<BTreeSet<_>>().len() < committed.len() {
            self.broke(&format!("{after}: two sessions have committed one snapshot"));
        }
        let dangling = self.shared.disk.look(|disk| {
            let is_dangling = |ids: &Vec<ChunkId>| ids.iter().any(|id| !disk.chunks.contains_key(id));
            disk.snapshots.iter().find(|(_, ids)| is_dangling(ids)).map(|(snapshot, _)| *snapshot)
        });
        if let Some(snapshot) = dangling {
            self.broke(&format!("{after}: snapshot {snapshot} needs chunks that are not there"));
        }
    }

    /// Promises kept so far, and what was broken.
    pub fn verdict(&self) -> (usize, Vec<String>) {
        (self.shared.promised.lock().len(), self.shared.broken.lock().clone())
    }
}
