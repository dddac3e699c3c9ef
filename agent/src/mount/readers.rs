//! Tree readers of the snapshots that are being looked at, a bounded number.

use std::sync::Arc;

use parking_lot::Mutex;
use strandline_messages::SnapshotId;

use super::patience::{Patience, PatientSource};
use crate::trees::TreeReader;

/// Snapshots whose tree blocks are kept at once.
const READERS_MAX: usize = 8;
/// Opened tree blocks kept of each, bytes.
const TREE_CACHE_BYTES: usize = 16 << 20;

/// Least recently used out first. A reader that is evicted loses its cache and nothing else.
pub(super) struct Readers {
    patience: Arc<Patience>,
    kept: Mutex<Vec<(SnapshotId, TreeReader)>>,
}

impl Readers {
    pub(super) fn new(patience: Arc<Patience>) -> Self {
        Self { patience, kept: Mutex::default() }
    }

    pub(super) fn of(&self, snapshot: SnapshotId) -> TreeReader {
        let mut kept = self.kept.lock();
        let found = kept.iter().position(|(id, _)| *id == snapshot).map(|place| kept.remove(place).1);
        let reader = found.unwrap_or_else(|| {
            let source = PatientSource { patience: Arc::clone(&self.patience), snapshot };
            TreeReader::new(Arc::new(source), TREE_CACHE_BYTES)
        });
        if kept.len() >= READERS_MAX {
            kept.remove(0);
        }
        kept.push((snapshot, reader.clone()));
        reader
    }
}
