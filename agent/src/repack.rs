//! Resealing: the needed chunks of blocks that are partly dead are fetched, put into new blocks and stored again, so that the
//! server can free the old blocks. Needs the full key: the server cannot take a block apart.
//!
//! Two connections: a restore session fetches, a repack session stores. A crash leaves both copies, which the next collection
//! sees: it keeps one. Memory: one page of blocks, the send window, and the credit of the restore session.

use std::collections::HashSet;
use std::sync::Arc;

use actix::Actor;
use bytes::Bytes;
use strandline_actors::control_channel::Dispatching;
use strandline_actors::dispatcher::{AbandonDispatch, FinishDispatch};
use strandline_actors::runtime::budget::ByteBudget;
use strandline_messages::format::repository::RepositoryV1;
use strandline_messages::wire::manage::{Operation, Outcome, PartlyDeadBlock};
use strandline_messages::wire::{SessionKind, split_ids};
use strandline_messages::{ChunkId, ChunkKind, DomainId, RepositoryName, limits};

use crate::backup::BackupError;
use crate::backup::blocks::OpenBlock;
use crate::backup::ports::BlockSink;
use crate::job::{Job, JobView};
use crate::keys::Keyset;
use crate::net::{Client, ClientError, SessionSettings, WindowSink};
use crate::seal::{DataKey, OpenError, SealError, Sealer};
use crate::trees::{ChunkSource, FetchError};

/// Blocks that are asked for at a time.
const PAGE: u32 = 64;

/// Why blocks were not resealed.
#[derive(Debug, thiserror::Error)]
pub enum RepackError {
    /// The server refused or is gone.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// A chunk did not come.
    #[error("{0}; nothing was freed")]
    Fetch(#[from] FetchError),
    /// A chunk is not what its id says.
    #[error("{0}; nothing was freed; run `strand check --read-data`")]
    Open(#[from] OpenError),
    /// A block could not be sealed.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// The session that stores was lost.
    #[error("{0}; nothing was freed, what was stored again is harmless; run the command again")]
    Session(String),
    /// A thread ended early.
    #[error("resealing ended early; nothing was freed; run the command again")]
    Interrupted,
}

impl From<BackupError> for RepackError {
    fn from(error: BackupError) -> Self {
        Self::Session(error.to_string())
    }
}

/// What was resealed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RepackReport {
    /// Old blocks whose needed chunks were stored again.
    pub blocks: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Chunks stored again.
    pub chunks: u64,
    /// Bytes of the new blocks.
    pub bytes_stored: u64,
    /// Partly dead blocks of write-only agents, which only those agents' own repository keys could reseal: left.
    pub blocks_of_others: u64,
}

/// Where blocks are resealed.
pub struct Repack<'a> {
    /// Asks, and fetches through its restore session.
    pub client: &'a Client,
    /// The repository.
    pub repository: &'a RepositoryV1,
    /// Its full key.
    pub keyset: &'a Arc<Keyset>,
    /// Where chunks of the full key's own writer domain come from.
    pub source: Arc<dyn ChunkSource>,
    /// How blocks travel.
    pub session: SessionSettings,
    /// zstd level.
    pub level: i32,
}

impl Repack<'_> {
    /// Reseals the partly dead blocks that the last collection found, those that waste most first, until about
    /// `bytes_wasted` less is wasted.
    pub async fn run(self, bytes_wasted: u64) -> Result<RepackReport, RepackError> {
        let view = Arc::new(JobView::default());
        let writer = self.client.another();
        let budget = ByteBudget::new(self.session.window_bytes);
        let job = Job { view: Arc::clone(&view), budget: budget.clone() }.start();
        let dispatcher =
            writer.dispatcher(&self.session, budget.clone(), Arc::clone(&view.dispatch), job.clone().recipient());
        let news = Dispatching {
            session: dispatcher.clone().recipient(),
            durable: dispatcher.clone().recipient(),
            again: dispatcher.clone().recipient(),
            failed: job.recipient(),
        };
        writer.begin(SessionKind::Repack, &self.repository.name, self.keyset, Some(news)).await?;
        let sink: Arc<dyn BlockSink> = WindowSink::new(dispatcher.clone(), budget);
        let resealed = self.reseal(&sink, bytes_wasted).await;
        let reason = if resealed.is_ok() {
            // Answered when every block is acknowledged durable; the dispatcher ends with this run.
            let _ = dispatcher.send(FinishDispatch).await;
            ""
        } else {
            let _ = dispatcher.send(AbandonDispatch).await;
            "blocks were not resealed"
        };
        let lost = view.take_fault();
        writer.end_session(reason).await;
        writer.close().await;
        let (report, old) = match (resealed, lost) {
            (Ok(_), Some(fault)) => return Err(RepackError::Session(fault)),
            (resealed, _) => resealed?,
        };
        for page in old.chunks(limits::MANAGED_BLOCKS_MAX) {
            let blocks: Vec<u8> =
                page.iter().flat_map(|(pack, offset)| [pack.to_le_bytes(), offset.to_le_bytes()].concat()).collect();
            let operation = Operation::Supersede { blocks: blocks.into() };
            self.client.manage(&self.repository.name, self.keyset, &operation).await?;
        }
        Ok(report)
    }

    /// What was stored again, and the places of the old blocks.
    async fn reseal(
        &self,
        sink: &Arc<dyn BlockSink>,
        bytes_wasted: u64,
    ) -> Result<(RepackReport, Vec<(u32, u32)>), RepackError> {
        let plaintext_max = self.repository.chunking.block_plaintext as usize;
        let mut resealer = Some(Resealer {
            sealer: Sealer::with_data_key(DataKey::generate(self.keyset)?, self.level),
            sink: Arc::clone(sink),
            plaintext_max,
            data: OpenBlock::new(ChunkKind::Data, plaintext_max),
            trees: OpenBlock::new(ChunkKind::Tree, plaintext_max),
            report: RepackReport::default(),
        });
        let (mut old, mut skip, mut wasted) = (Vec::new(), 0, 0u64);
        let mut of_others = 0;
        while wasted < bytes_wasted {
            let page = self.partly_dead(&self.repository.name, skip).await?;
            skip += u32::try_from(page.len()).unwrap_or(PAGE);
            if page.is_empty() {
                break;
            }
            let (mine, others): (Vec<_>, Vec<_>) = page.into_iter().partition(|block| block.domain == DomainId::FULL);
            of_others += others.len() as u64;
            let mut ids = Vec::new();
            for block in mine {
                let needed = split_ids(&block.needed, limits::BLOCK_CHUNKS_MAX).unwrap_or_default();
                if needed.is_empty() {
                    // It was freed or moved since it was listed.
                    continue;
                }
                wasted += wasted_by(&block, needed.len());
                old.push((block.pack, block.offset));
                if let Some(resealer) = &mut resealer {
                    resealer.report.blocks += 1;
                    resealer.report.bytes += u64::from(block.bytes);
                }
                ids.extend(needed);
                if wasted >= bytes_wasted {
                    break;
                }
            }
            let Some(mut taken) = resealer.take() else { return Err(RepackError::Interrupted) };
            let source = Arc::clone(&self.source);
            let working = tokio::task::spawn_blocking(move || taken.take_page(source.as_ref(), &ids).map(|()| taken));
            resealer = Some(working.await.map_err(|_| RepackError::Interrupted)??);
        }
        let Some(mut resealer) = resealer else { return Err(RepackError::Interrupted) };
        let working = tokio::task::spawn_blocking(move || resealer.finish().map(|()| resealer.report));
        let mut report = working.await.map_err(|_| RepackError::Interrupted)??;
        report.blocks_of_others = of_others;
        Ok((report, old))
    }

    async fn partly_dead(&self, name: &RepositoryName, skip: u32) -> Result<Vec<PartlyDeadBlock>, RepackError> {
        let operation = Operation::ListPartlyDead { skip, limit: PAGE };
        match self.client.manage(name, self.keyset, &operation).await? {
            Outcome::PartlyDead { blocks } => Ok(blocks),
            _ => Err(ClientError::Answer { found: "another outcome", expected: "partly dead blocks" }.into()),
        }
    }
}

fn wasted_by(block: &PartlyDeadBlock, needed: usize) -> u64 {
    let dead = u64::from(block.chunks).saturating_sub(needed as u64);
    u64::from(block.bytes) * dead / u64::from(block.chunks).max(1)
}

/// Puts chunks into new blocks.
struct Resealer {
    sealer: Sealer,
    sink: Arc<dyn BlockSink>,
    plaintext_max: usize,
    data: OpenBlock,
    trees: OpenBlock,
    report: RepackReport,
}

impl Resealer {
    fn take_page(&mut self, source: &dyn ChunkSource, ids: &[ChunkId]) -> Result<(), RepackError> {
        for batch in ids.chunks(limits::FETCH_IDS_MAX) {
            let mut wanted: HashSet<ChunkId> = batch.iter().copied().collect();
            for block in source.fetch(batch.to_vec())? {
                let block = block?;
                for (place, row) in block.rows().iter().enumerate() {
                    if !wanted.remove(&row.id) {
                        continue;
                    }
                    let chunk = block.chunk(place)?;
                    self.push(block.kind(), chunk.id, chunk.references.to_vec(), chunk.bytes)?;
                }
            }
            if !wanted.is_empty() {
                return Err(FetchError::Missing { chunks: wanted.into_iter().collect() }.into());
            }
        }
        Ok(())
    }

    fn push(
        &mut self,
        kind: ChunkKind,
        id: ChunkId,
        references: Vec<strandline_messages::format::chunk::Reference>,
        bytes: &[u8],
    ) -> Result<(), RepackError> {
        let open = match kind {
            ChunkKind::Data => &mut self.data,
            ChunkKind::Tree => &mut self.trees,
        };
        if !open.has_room(bytes.len(), references.len(), self.plaintext_max) {
            seal(&mut self.sealer, self.sink.as_ref(), open, &mut self.report)?;
        }
        open.push(id, references, bytes);
        self.report.chunks += 1;
        Ok(())
    }

    fn finish(&mut self) -> Result<(), RepackError> {
        for open in [&mut self.data, &mut self.trees] {
            if !open.rows.is_empty() {
                seal(&mut self.sealer, self.sink.as_ref(), open, &mut self.report)?;
            }
        }
        Ok(())
    }
}

fn seal(
    sealer: &mut Sealer,
    sink: &dyn BlockSink,
    open: &mut OpenBlock,
    report: &mut RepackReport,
) -> Result<(), RepackError> {
    let permit = sink.reserve(open.sealed_bytes_max())?;
    let sealed = sealer.seal(open.kind, &open.rows, &mut open.body)?.bytes;
    report.bytes_stored += sealed.len() as u64;
    sink.send(permit, Bytes::from_owner(sealed))?;
    open.clear();
    Ok(())
}
