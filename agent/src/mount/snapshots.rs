//! The list of snapshots, refreshed when somebody looks and it is old.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use jiff::tz::TimeZone;
use parking_lot::Mutex;
use strandline_actors::runtime::clock;
use strandline_messages::SnapshotId;

use super::Repository;
use super::layout::{Layout, Shown};

/// A list at least so old is asked for again; more rarely where asking takes long.
const REFRESH: Duration = Duration::from_secs(5);
/// After the server did not answer.
const REFRESH_AFTER_FAILURE: Duration = Duration::from_secs(30);
/// How many times as long as the last answer took the list counts as fresh.
const REFRESH_COSTS: u32 = 20;

/// See the module. Memory: the list, and what was looked at and has been deleted since.
pub(super) struct Snapshots {
    repository: Arc<dyn Repository>,
    state: Mutex<State>,
    /// Held by whoever asks; others go on with the old list.
    asking: Mutex<()>,
}

#[derive(Default)]
struct State {
    layout: Arc<Layout>,
    /// Looked into: they stay, because the server keeps them for this mount's session whatever is deleted.
    entered: BTreeMap<SnapshotId, Arc<Shown>>,
    fresh_until: Option<Instant>,
}

impl Snapshots {
    /// With the first list.
    pub(super) fn new(repository: Arc<dyn Repository>, first: Vec<Shown>) -> Self {
        let snapshots = Self { repository, state: Mutex::default(), asking: Mutex::default() };
        snapshots.learn(first, Duration::ZERO);
        snapshots
    }

    /// The directories as they were when somebody last asked.
    pub(super) fn last(&self) -> Arc<Layout> {
        Arc::clone(&self.state.lock().layout)
    }

    /// The directories as they are now, or as they were when the server was last heard.
    pub(super) fn current(&self) -> Arc<Layout> {
        let fresh = |state: &State| state.fresh_until.is_some_and(|until| clock::now() < until);
        if !fresh(&self.state.lock())
            && let Some(_asking) = self.asking.try_lock()
        {
            let began = clock::now();
            match self.repository.snapshots() {
                Ok(list) => self.learn(list, clock::now().saturating_duration_since(began)),
                Err(reason) => {
                    tracing::warn!(reason, "the list of snapshots cannot be refreshed; the last one is shown");
                    self.state.lock().fresh_until = Some(clock::now() + REFRESH_AFTER_FAILURE);
                }
            }
        }
        self.last()
    }

    fn learn(&self, list: Vec<Shown>, cost: Duration) {
        let mut state = self.state.lock();
        let mut all: BTreeMap<u64, Arc<Shown>> =
            state.entered.values().map(|shown| (shown.order, Arc::clone(shown))).collect();
        all.extend(list.into_iter().map(|shown| (shown.order, Arc::new(shown))));
        let all: Vec<_> = all.into_values().collect();
        state.layout = Arc::new(Layout::new(&all, &TimeZone::system()));
        state.fresh_until = Some(clock::now() + REFRESH.max(cost * REFRESH_COSTS));
    }

    /// Somebody looks into the snapshot.
    pub(super) fn enter(&self, shown: &Arc<Shown>) {
        self.state.lock().entered.entry(shown.id).or_insert_with(|| Arc::clone(shown));
    }
}
