//! A restore session for the commands that read: opened, used from plain threads, closed in good order.

use std::sync::Arc;

use actix::Addr;
use strandline_actors::control_channel::Dispatching;
use strandline_actors::dispatcher::{DispatchFailed, FinishDispatch, LearnDurable, SendAgain};
use strandline_actors::fetcher::Fetcher;
use strandline_messages::SnapshotId;
use strandline_messages::wire::SessionKind;

use super::repository::Opened;
use crate::net::{BlockSource, NetworkSource, SessionSettings};
use crate::trees::ChunkSource;

/// Streams of a session that reads, if nothing else is said.
pub const STREAMS: u16 = 4;

/// See the module. Clones read over the same session.
#[derive(Clone)]
pub struct Reading {
    fetcher: Addr<Fetcher>,
    blocks: Arc<BlockSource>,
}

impl Reading {
    /// Opens a restore session.
    pub async fn open(opened: &Opened, streams: u16) -> anyhow::Result<Self> {
        let client = &opened.server.client;
        let settings = SessionSettings { streams, window_bytes: 0, limit_upload: None };
        let fetcher = client.fetcher(&settings);
        let news = Dispatching {
            session: fetcher.clone().recipient(),
            durable: fetcher.clone().recipient::<LearnDurable>(),
            again: fetcher.clone().recipient::<SendAgain>(),
            failed: fetcher.clone().recipient::<DispatchFailed>(),
        };
        client.begin(SessionKind::Restore, &opened.server.name, &opened.keyset, Some(news)).await?;
        let threads = std::thread::available_parallelism().map_or(2, usize::from);
        let blocks = Arc::new(BlockSource::new(fetcher.clone(), client.arbiter(), &opened.keyset, threads));
        Ok(Self { fetcher, blocks })
    }

    /// Where the chunks of `snapshot` come from. The server keeps the snapshot, whatever is deleted, until this session ends.
    pub fn source(&self, snapshot: SnapshotId) -> Arc<dyn ChunkSource> {
        Arc::new(NetworkSource::new(Arc::clone(&self.blocks), Some(snapshot)))
    }

    /// Where the chunks come from that this key's own writer domain has.
    pub fn own_source(&self) -> Arc<dyn ChunkSource> {
        Arc::new(NetworkSource::new(Arc::clone(&self.blocks), None))
    }

    /// Closes the streams, then the session. An empty reason means that everything was read.
    pub async fn close(self, opened: &Opened, reason: &str) {
        // The fetcher ends with this process.
        let _ = self.fetcher.send(FinishDispatch).await;
        opened.server.client.end_session(reason).await;
    }
}
