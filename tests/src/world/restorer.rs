//! A restore by an agent's process: the shipped control channel and fetcher, and a reader that only looks at what came.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, Addr};
use bytes::Bytes;
use parking_lot::Mutex;
use strandline_actors::control_channel::{
    AskServer, BeginSession, CloseChannel, ControlChannel, Dispatching, ForgetSession,
};
use strandline_actors::dispatcher::FinishDispatch;
use strandline_actors::fetcher::{BlockTaker, BlockUsed, FetchBlocks, Fetcher};
use strandline_messages::ChunkId;
use strandline_messages::wire::{AbortSession, Message, SessionKind};

use super::agent::{AgentProcess, opener};
use super::storage::chunks_of;
use crate::random::Random;

/// Ids in one fetch.
const FETCH_IDS: usize = 50;
/// Using a block takes at most so long, ms.
const USE_MS: u64 = 20;

/// Brings back these chunks. `Ok`: the ids that did not come, for the oracle to judge. An error: why nothing can come any more.
pub async fn restore(process: &AgentProcess, ids: &[ChunkId], mut random: Random) -> Result<Vec<ChunkId>, String> {
    let control = process.control(&mut random);
    let fetcher = Fetcher::new(process.pool(&mut random), control.clone()).start();
    let result = fetch_all(&control, &fetcher, ids, random).await;
    // In the order in which the agent's own client ends a restore.
    let _ = fetcher.send(FinishDispatch).await;
    if result.is_ok() {
        let _ = control.send(AskServer(Message::AbortSession(AbortSession { reason: String::new() }))).await;
    }
    control.do_send(ForgetSession);
    let _ = control.send(CloseChannel).await;
    result
}

/// Looks at the chunks that come, and uses each block up after a while.
struct Taker {
    wanted: Vec<ChunkId>,
    came: Arc<Mutex<BTreeSet<ChunkId>>>,
    random: Random,
    user: Addr<Fetcher>,
}

impl BlockTaker for Taker {
    fn take(&mut self, block: Bytes) {
        self.came.lock().extend(chunks_of(&block).unwrap_or_default());
        let wait = Duration::from_millis(self.random.below(USE_MS));
        let user = self.user.clone();
        actix_rt::spawn(async move {
            tokio::time::sleep(wait).await;
            user.do_send(BlockUsed(block.len() as u64));
        });
    }

    fn missing(&self) -> Vec<ChunkId> {
        let came = self.came.lock();
        self.wanted.iter().filter(|id| !came.contains(id)).copied().collect()
    }
}

async fn fetch_all(
    control: &Addr<ControlChannel>,
    fetcher: &Addr<Fetcher>,
    ids: &[ChunkId],
    mut random: Random,
) -> Result<Vec<ChunkId>, String> {
    let news = Dispatching {
        session: fetcher.clone().recipient(),
        durable: fetcher.clone().recipient(),
        again: fetcher.clone().recipient(),
        failed: fetcher.clone().recipient(),
    };
    let begin = BeginSession { opener: opener(SessionKind::Restore), dispatcher: Some(news) };
    control.send(begin).await.map_err(|error| error.to_string())?.map_err(|error| error.to_string())?;
    let came: Arc<Mutex<BTreeSet<ChunkId>>> = Arc::default();
    for ids in ids.chunks(FETCH_IDS) {
        let taker = Taker {
            wanted: ids.to_vec(),
            came: Arc::clone(&came),
            random: Random::new(random.number()),
            user: fetcher.clone(),
        };
        let fetch = FetchBlocks { snapshot: None, taker: Box::new(taker) };
        let fetched = fetcher.send(fetch).await.map_err(|error| error.to_string())?;
        let fetched = fetched.map_err(|error| error.to_string())?;
        if !fetched.damage.is_empty() {
            return Err(fetched.damage);
        }
    }
    let came = came.lock();
    Ok(ids.iter().filter(|id| !came.contains(id)).copied().collect())
}
