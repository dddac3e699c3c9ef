//! `Job`: one backup from end to end, scan → chunk → seal → dispatch → commit.
//!
//! The actor owns the fate of its run: the first fault is the one that is reported, and an interruption ends the pipeline
//! in good order (what is sealed is still delivered and acknowledged, so that the next run does not send it again). It
//! ends when its terminal state is reported. The pipeline itself runs on plain threads.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use actix::{Actor, ActorContext, Addr, Context, Handler};
use parking_lot::Mutex;
use strandline_actors::control_channel::{AskError, Dispatching};
use strandline_actors::dispatcher::{
    AbandonDispatch, CountBlocks, DispatchCounters, DispatchFailed, Dispatcher, FinishDispatch, LearnDurable,
};
use strandline_actors::runtime::budget::ByteBudget;
use strandline_actors::runtime::clock;
use strandline_messages::format::block::ChunkRow;
use strandline_messages::format::manifest::{DetailsV1, Totals};
use strandline_messages::format::repository::RepositoryV1;
use strandline_messages::wire::{Ack, Commit, Committed, Message, SessionKind, SnapshotFate};
use strandline_messages::{ChunkKind, SnapshotId};
use tokio::sync::Notify;

use crate::backup::ports::{BlockSealer, BlockSink, DiscardingSink, NullSealer, Ports};
use crate::backup::progress::{Issue, Progress};
use crate::backup::{BackupError, BackupPlan, CacheTrust, ChunkKeys, PassOutcome, run_pass};
use crate::cache::{CacheIdentity, CacheReader, Ignoring, PendingCache};
use crate::keys::Keyset;
use crate::net::{Client, ClientError, NetworkOracle, SessionSettings, WindowSink};
use crate::seal::{Body, DataKey, ManifestFields, SealError, SealedBlock, Sealer, sign_manifest};

/// How often a commit may be answered with missing chunks before the run gives up.
const PASSES_MAX: usize = 5;
/// How long an interrupted run may take to deliver what is sealed.
const INTERRUPT_MAX: Duration = Duration::from_secs(8);

/// Why a backup made no snapshot.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    /// SIGINT, SIGTERM or the daemon.
    #[error(
        "interrupted; no snapshot was made, and what the server has acknowledged is not sent again by the next run"
    )]
    Interrupted,
    /// The pipeline failed.
    #[error(transparent)]
    Backup(#[from] BackupError),
    /// The server refused or cannot be reached.
    #[error(transparent)]
    Client(#[from] ClientError),
    /// The manifest or a block could not be made.
    #[error(transparent)]
    Seal(#[from] SealError),
    /// Blocks could not be delivered, or the server ended the session.
    #[error("{0}; no snapshot was made, earlier ones are intact, and what was acknowledged is not sent again")]
    Session(String),
    /// The server keeps missing chunks.
    #[error(
        "the server still misses chunks after {PASSES_MAX} passes; no snapshot was made, earlier ones are intact: is \
         somebody else changing the repository?"
    )]
    KeepsMissing,
    /// A thread of the run panicked.
    #[error("an internal task of the backup ended early; no snapshot was made, earlier ones are intact: run it again")]
    Lost,
}

impl From<AskError> for JobError {
    fn from(error: AskError) -> Self {
        Self::Client(error.into())
    }
}

impl BlockSealer for Sealer {
    fn set_level(&mut self, level: i32) -> Result<(), BackupError> {
        Self::set_level(self, level).map_err(|error| BackupError::Port(Box::new(error)))
    }

    fn seal(&mut self, kind: ChunkKind, rows: &[ChunkRow], body: &mut Body) -> Result<SealedBlock, BackupError> {
        Self::seal(self, kind, rows, body).map_err(|error| BackupError::Port(Box::new(error)))
    }
}

/// What to back up and how.
#[derive(Clone, Debug)]
pub struct BackupRequest {
    /// Sources, excludes, threads. Its `cache` is filled in by the job.
    pub plan: BackupPlan,
    /// Where file caches are kept.
    pub cache_directory: PathBuf,
    /// Streams, window, upload limit.
    pub session: SessionSettings,
    /// Read everything, whatever the file cache says.
    pub force: bool,
    /// What the file cache does not compare.
    pub ignoring: Ignoring,
    /// Time of the snapshot, ns since 1970; `None`: now.
    pub time_ns: Option<i64>,
    /// Send and store nothing.
    pub dry_run: bool,
    /// Host label.
    pub host: String,
    /// Tags.
    pub tags: Vec<String>,
    /// What only key holders may read.
    pub details: DetailsV1,
}

/// What a backup came to.
#[derive(Clone, Debug)]
pub struct BackupReport {
    /// The snapshot; none in a dry run.
    pub snapshot: Option<SnapshotId>,
    /// The snapshot that the file cache was made by.
    pub parent: Option<SnapshotId>,
    /// The snapshot that the file cache was made by, if the server has no memory of it: it went back to an older state.
    pub lost_parent: Option<SnapshotId>,
    /// Counts.
    pub totals: Totals,
    /// Wall time of the run.
    pub elapsed: Duration,
    /// Connections made after the first of each stream.
    pub reconnects: u64,
    /// The first things that could not be saved as they are; all of them are in the snapshot's error list.
    pub issues: Vec<Issue>,
}

/// What others may look at while a job runs.
#[derive(Debug, Default)]
pub struct JobView {
    /// The pipeline's counters.
    pub progress: Progress,
    /// The dispatcher's counters.
    pub dispatch: Arc<DispatchCounters>,
    /// Ends the pipeline soon.
    cancel: AtomicBool,
    interrupted: AtomicBool,
    fault: Mutex<Option<String>>,
    ended: Notify,
}

impl JobView {
    /// Asks the run to end in good order.
    pub fn interrupt(&self) {
        self.interrupted.store(true, Ordering::Relaxed);
        self.cancel.store(true, Ordering::Relaxed);
        self.ended.notify_waiters();
        self.ended.notify_one();
    }

    /// Why the session was lost, if it was.
    pub(crate) fn take_fault(&self) -> Option<String> {
        self.fault.lock().take()
    }

    fn is_interrupted(&self) -> bool {
        self.interrupted.load(Ordering::Relaxed)
    }
}

/// See the module.
pub(crate) struct Job {
    /// Learns why the session is lost.
    pub(crate) view: Arc<JobView>,
    /// Closed then, so that nobody waits for room any more.
    pub(crate) budget: ByteBudget,
}

impl Actor for Job {
    type Context = Context<Self>;
}

impl Handler<DispatchFailed> for Job {
    type Result = ();

    fn handle(&mut self, DispatchFailed(reason): DispatchFailed, ctx: &mut Context<Self>) {
        self.view.fault.lock().get_or_insert(reason);
        self.view.cancel.store(true, Ordering::Relaxed);
        self.budget.close();
        self.view.ended.notify_one();
        ctx.stop();
    }
}

/// Runs one backup. `view` may be looked at, and interrupted, by others meanwhile.
pub async fn run_backup(
    client: &Client,
    repository: &RepositoryV1,
    keyset: &Arc<Keyset>,
    request: BackupRequest,
    view: &Arc<JobView>,
) -> Result<BackupReport, JobError> {
    let budget = ByteBudget::new(request.session.window_bytes);
    let job = Job { view: Arc::clone(view), budget: budget.clone() }.start();
    let dispatcher =
        client.dispatcher(&request.session, budget.clone(), Arc::clone(&view.dispatch), job.clone().recipient());
    let news = Dispatching {
        session: dispatcher.clone().recipient(),
        durable: dispatcher.clone().recipient(),
        again: dispatcher.clone().recipient(),
        failed: job.recipient(),
    };
    client.begin(SessionKind::Backup, &repository.name, keyset, Some(news)).await?;
    let run = Run { client, repository, keyset, request: Arc::new(request), view, dispatcher, budget };
    run.complete().await
}

/// What the passes came to.
struct Passed {
    snapshot: Option<SnapshotId>,
    parent: Option<SnapshotId>,
    lost_parent: Option<SnapshotId>,
    totals: Totals,
}

struct Run<'a> {
    client: &'a Client,
    repository: &'a RepositoryV1,
    keyset: &'a Arc<Keyset>,
    request: Arc<BackupRequest>,
    view: &'a Arc<JobView>,
    dispatcher: Addr<Dispatcher>,
    budget: ByteBudget,
}

impl Run<'_> {
    async fn complete(self) -> Result<BackupReport, JobError> {
        let started = clock::now();
        let outcome = self.passes().await.map_err(|error| self.root_cause(error));
        match &outcome {
            Ok(_) => self.finish().await,
            Err(JobError::Interrupted) => {
                // What is sealed is delivered, as far as the server can be reached.
                let finishing = self.dispatcher.send(FinishDispatch);
                let delivered = tokio::time::timeout(INTERRUPT_MAX, finishing).await.is_ok();
                self.give_up("interrupted", delivered).await;
            }
            Err(error) => self.give_up(&error.to_string(), false).await,
        }
        let Passed { snapshot, parent, lost_parent, totals } = outcome?;
        let reconnects = self.view.dispatch.reconnects.load(Ordering::Relaxed);
        Ok(BackupReport {
            snapshot,
            parent,
            lost_parent,
            totals,
            elapsed: clock::now().saturating_duration_since(started),
            reconnects,
            issues: self.view.progress.issues(),
        })
    }

    async fn finish(&self) {
        if self.request.dry_run {
            return self.give_up("dry run", false).await;
        }
        // The dispatcher ends with this run.
        let _ = self.dispatcher.send(FinishDispatch).await;
        self.client.forget_session();
    }

    async fn give_up(&self, reason: &str, delivered: bool) {
        let closing = async {
            if !delivered {
                // The dispatcher ends with this run.
                let _ = self.dispatcher.send(AbandonDispatch).await;
            }
            self.client.end_session(reason).await;
        };
        // A server that cannot be reached lets the session expire.
        let _ = tokio::time::timeout(Duration::from_secs(2), closing).await;
    }

    /// The pipeline only knows that somebody stopped it; the view knows who, and why.
    fn root_cause(&self, error: JobError) -> JobError {
        if self.view.is_interrupted() {
            return JobError::Interrupted;
        }
        match self.view.fault.lock().take() {
            Some(reason) => JobError::Session(reason),
            None => error,
        }
    }

    /// The parent by the file cache; or, second, one that the server has no memory of. Such a server went back to an older
    /// state: what the cache takes for stored may be gone.
    async fn parents(&self, cache: &Path) -> Result<(Option<SnapshotId>, Option<SnapshotId>), JobError> {
        let parent = if self.request.force { None } else { read_parent(cache) };
        let Some(parent) = parent else { return Ok((None, None)) };
        if self.client.find_snapshot(&self.repository.name, parent).await? != SnapshotFate::Unknown {
            return Ok((Some(parent), None));
        }
        tracing::warn!(
            snapshot = %parent.short(),
            "the last snapshot of these paths is not on the server and was never deleted there: the server went back to an \
             older state. Every file is read again; what is missing is sent again"
        );
        Ok((None, Some(parent)))
    }

    async fn passes(&self) -> Result<Passed, JobError> {
        let started_ns = clock::wall_ns();
        let data_key = DataKey::generate(self.keyset)?;
        let identity = self.cache_identity();
        let cache = self.request.cache_directory.join(identity.file_name());
        let (parent, lost_parent) = self.parents(&cache).await?;
        let is_cache_good = !self.request.force && lost_parent.is_none();
        let mut trust = if is_cache_good { CacheTrust::Trust } else { CacheTrust::Ignore };
        let old = if is_cache_good { CacheReader::open(&cache, identity) } else { None };
        let mut old = old.map(|old| old.ignoring(self.request.ignoring));
        let mut earlier = Totals::default();
        for _ in 0..PASSES_MAX {
            let outcome = self.pass(&data_key, (cache.clone(), identity), old, trust).await?;
            let totals = sum_of_new(&earlier, &outcome.totals);
            if self.request.dry_run {
                return Ok(Passed { snapshot: None, parent, lost_parent, totals });
            }
            let fields = ManifestFields {
                root: outcome.root,
                errors: outcome.errors_root,
                parent,
                started_ns: self.request.time_ns.unwrap_or(started_ns),
                finished_ns: self.request.time_ns.unwrap_or_else(clock::wall_ns),
                job: String::new(),
                host: self.request.host.clone(),
                tags: self.request.tags.clone(),
                totals,
            };
            let manifest = sign_manifest(self.keyset, &data_key, fields, &self.request.details)?;
            if let Some(committed) = self.commit(manifest).await? {
                if let Some(new_cache) = outcome.new_cache {
                    publish(new_cache, &cache, committed.snapshot);
                }
                return Ok(Passed { snapshot: Some(committed.snapshot), parent, lost_parent, totals });
            }
            tracing::warn!("the server misses chunks that the file cache took for stored; reading those files again");
            earlier = totals;
            trust = CacheTrust::VerifyWithServer;
            old = outcome.new_cache.as_ref().and_then(PendingCache::reader);
        }
        Err(JobError::KeepsMissing)
    }

    fn cache_identity(&self) -> CacheIdentity {
        use std::os::unix::ffi::OsStrExt;
        let plan = &self.request.plan;
        let names = if plan.cached_as.is_empty() { &plan.paths } else { &plan.cached_as };
        let paths: Vec<_> = names.iter().map(|path| path.as_os_str().as_bytes().to_vec()).collect();
        CacheIdentity::new(
            &self.repository.id,
            self.keyset.writer_certificate().domain(),
            self.keyset.id_key(),
            self.keyset.chunker_secret(),
            &self.request.host,
            &paths,
            &self.repository.chunking,
        )
    }

    async fn pass(
        &self,
        data_key: &DataKey,
        cache: (PathBuf, CacheIdentity),
        old: Option<CacheReader>,
        trust: CacheTrust,
    ) -> Result<PassOutcome, JobError> {
        let (request, view) = (Arc::clone(&self.request), Arc::clone(self.view));
        let keys = ChunkKeys { id_key: *self.keyset.id_key(), chunker_secret: *self.keyset.chunker_secret() };
        let chunking = self.repository.chunking;
        let oracle = NetworkOracle::new(self.client.control().clone(), self.client.arbiter());
        let sink = WindowSink::new(self.dispatcher.clone(), self.budget.clone());
        let data_key = data_key.clone();
        let mut running = tokio::task::spawn_blocking(move || {
            let mut plan = request.plan.clone();
            let sealers = || -> Result<Box<dyn BlockSealer>, BackupError> {
                if request.dry_run {
                    return Ok(Box::new(NullSealer));
                }
                Ok(Box::new(Sealer::with_data_key(data_key.clone(), request.plan.compression.first())))
            };
            let discarding = DiscardingSink;
            let sink: &dyn BlockSink = if request.dry_run {
                &discarding
            } else {
                plan.cache = Some(cache).filter(|_| plan.stream.is_none());
                sink.as_ref()
            };
            let ports = Ports { oracle: Box::new(oracle), sink, sealers: &sealers };
            run_pass(&plan, &keys, &chunking, old, trust, ports, &view.progress, &view.cancel)
        });
        let stopped = async {
            self.view.ended.notified().await;
            self.budget.close();
            // Queries that are never answered must not hold an interrupted run.
            tokio::time::sleep(INTERRUPT_MAX).await;
        };
        tokio::select! {
            outcome = &mut running => outcome.map_err(|_| JobError::Lost)?.map_err(JobError::from),
            () = stopped => {
                self.client.close().await;
                running.await.map_err(|_| JobError::Lost)?.map_err(JobError::from)
            }
        }
    }

    /// Commits; `None`: chunks are missing.
    async fn commit(&self, manifest: Vec<u8>) -> Result<Option<Committed>, JobError> {
        loop {
            let blocks = self.dispatcher.send(CountBlocks).await.map_err(|_| JobError::Lost)?;
            let commit = Commit { manifest: manifest.clone().into(), blocks };
            let asking = self.client.ask(Message::Commit(commit));
            let answer = tokio::select! {
                answer = asking => answer,
                () = self.view.ended.notified() => return Err(JobError::Lost),
            };
            match answer {
                Ok(Message::Committed(committed)) => {
                    // A commit is the acknowledgement of every block: those on the streams may have been lost with them, and
                    // no stream can join an ended session to hear them again.
                    let everything = Ack { watermark: blocks, ranges: Vec::new() };
                    // The dispatcher ends with this run.
                    let _ = self.dispatcher.send(LearnDurable(everything)).await;
                    return Ok(Some(committed));
                }
                Ok(Message::MissingChunks(_)) => return Ok(None),
                Ok(other) => {
                    return Err(ClientError::Answer { found: other.name(), expected: "Committed" }.into());
                }
                // The blocks have other numbers in the session that carries on: count again.
                Err(AskError::Replaced) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Counts of this pass; what is new adds up over the passes of one run.
fn sum_of_new(earlier: &Totals, totals: &Totals) -> Totals {
    Totals {
        files_read: earlier.files_read + totals.files_read,
        bytes_new: earlier.bytes_new + totals.bytes_new,
        bytes_stored: earlier.bytes_stored + totals.bytes_stored,
        ..*totals
    }
}

fn parent_path(cache: &Path) -> PathBuf {
    cache.with_extension("parent")
}

fn read_parent(cache: &Path) -> Option<SnapshotId> {
    std::fs::read_to_string(parent_path(cache)).ok()?.trim().parse().ok()
}

/// The snapshot is safe whatever happens here: without a cache the next run only reads more.
fn publish(new_cache: PendingCache, cache: &Path, snapshot: SnapshotId) {
    let published = new_cache.publish().and_then(|()| std::fs::write(parent_path(cache), format!("{snapshot}\n")));
    if let Err(error) = published {
        tracing::warn!(%error, "the file cache could not be written; the next backup reads everything again");
    }
}
