//! A source of chunks that is pointed at one snapshot after another, so that opened tree blocks stay in one cache.

use std::sync::Arc;

use parking_lot::Mutex;
use strandline_messages::ChunkId;

use crate::trees::{ChunkSource, FetchError, Fetched};

/// See the module. Chunks are named by their content, so what was read for one snapshot is right for all.
#[derive(Default)]
pub struct Switch {
    source: Mutex<Option<Arc<dyn ChunkSource>>>,
}

impl Switch {
    /// Fetches come from `source` from now on.
    pub fn to(&self, source: Arc<dyn ChunkSource>) {
        *self.source.lock() = Some(source);
    }
}

impl ChunkSource for Switch {
    fn fetch(&self, wanted: Vec<ChunkId>) -> Result<Fetched, FetchError> {
        let source = self.source.lock().clone();
        match source {
            Some(source) => source.fetch(wanted),
            None => Err(FetchError::Missing { chunks: wanted }),
        }
    }
}
