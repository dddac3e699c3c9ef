//! A restore session for the commands that read: opened, used from plain threads, closed in good order.

use std::sync::Arc;

use actix::Addr;
use strandline_actors::control_channel::Dispatching;
use strandline_actors::dispatcher::{DispatchFailed, FinishDispatch, LearnDurable, SendAgain};
use strandline_actors::fetcher::Fetcher;
use strandline_messages::wire::SessionKind;

use super::repository::Opened;
use crate::net::{NetworkSource, SessionSettings};
use crate::trees::ChunkSource;

/// Streams of a session that reads, if nothing else is said.
pub const STREAMS: u16 = 4;

/// See the module.
pub struct Reading {
    fetcher: Addr<Fetcher>,
    source: Arc<NetworkSource>,
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
        let source = Arc::new(NetworkSource::new(fetcher.clone(), client.arbiter(), &opened.keyset, threads));
        Ok(Self { fetcher, source })
    }

    /// Where chunks come from.
    pub fn source(&self) -> Arc<dyn ChunkSource> {
        Arc::clone(&self.source) as Arc<dyn ChunkSource>
    }

    /// Closes the streams, then the session. An empty reason means that everything was read.
    pub async fn close(self, opened: &Opened, reason: &str) {
        // The fetcher ends with this process.
        let _ = self.fetcher.send(FinishDispatch).await;
        opened.server.client.end_session(reason).await;
    }
}
