//! One pass: starts the threads of the pipeline, waits for them, and says what came of it.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use crossbeam_channel::{Receiver, bounded};
use parking_lot::Mutex;
use strandline_actors::runtime::clock;
use strandline_messages::format::manifest::Totals;
use strandline_messages::format::repository::ChunkingV1;
use strandline_messages::format::tree::Timestamp;
use strandline_messages::ids::ChunkId;
use zeroize::{Zeroize, ZeroizeOnDrop};

use super::BackupError;
use super::assemble::{Assembled, Assembler};
use super::blocks::{BlockChannels, Emitter};
use super::feed::{Feeder, read_batches};
use super::items::Ordered;
use super::ports::{BlockSealer, BlockSink, ChunkOracle, Ports};
use super::progress::Progress;
use super::reader::FileReader;
use super::seal_stage::SealStage;
use super::stream::StreamSource;
use crate::cache::{CacheIdentity, CacheReader, CacheWriter, PendingCache, file_system_clock};
use crate::chunk::Cutter;
use crate::scan::ScanEvent;
use crate::scan::exclude::Excludes;
use crate::scan::flush::Flusher;
use crate::scan::list::{ListContext, Lookahead, work};
use crate::scan::markers::Marker;
use crate::scan::names::SpillPolicy;
use crate::scan::roots::RootNode;
use crate::scan::walk::{WalkPlan, Walker, identity_of};
use crate::seal::Compression;

/// Names of one directory that are sorted in memory.
const NAMES_IN_MEMORY: usize = 65_536;
/// Batches between feeder and assembler beyond those being read: each holds at most about one part.
const BATCHES_AHEAD: usize = 4;
/// Directories that may wait to be listed ahead.
const LISTINGS_QUEUED_MAX: usize = 64;

/// Runs that are over sooner are not estimated: walking the source a second time costs as much as finding it unchanged.
const ESTIMATE_FROM: Duration = Duration::from_secs(1);

/// What to save and how.
#[derive(Clone, Debug)]
pub struct BackupPlan {
    /// Paths, absolute or relative to the current directory.
    pub paths: Vec<PathBuf>,
    /// What names the file cache in place of `paths`, if it is not empty: the paths may differ each time.
    pub cached_as: Vec<PathBuf>,
    /// Exclude patterns (see [`crate::scan::exclude`]).
    pub excludes: Vec<String>,
    /// The same without regard to case; they count as later ones.
    pub iexcludes: Vec<String>,
    /// Of a directory with one of these, only the marker is saved.
    pub markers: Vec<Marker>,
    /// Longer files are left out, bytes.
    pub larger_than: Option<u64>,
    /// Name of files in the source that say what to leave out around them ([`crate::scan::ignore_file`]).
    pub ignore_file: Option<Vec<u8>>,
    /// Save this one file, which comes through a pipe, instead of `paths`.
    pub stream: Option<StreamSource>,
    /// Do not enter other file systems.
    pub one_file_system: bool,
    /// (device, inode) of what is never saved, such as the repository's directory ([`identity_of`]). The state
    /// directory is added by itself.
    pub skip: Vec<(u64, u64)>,
    /// The agent's state directory: temporary files, and the clock.
    pub state_directory: PathBuf,
    /// Where the new file cache will stand; `None` (dry runs): none is written.
    pub cache: Option<(PathBuf, CacheIdentity)>,
    /// Reading threads.
    pub readers: usize,
    /// Threads sealing data blocks; one more seals trees.
    pub sealers: usize,
    /// Threads that list directories ahead.
    pub scanners: usize,
    /// Count files and bytes ahead, for an estimate of what is left, in runs that take longer than a second.
    pub estimate: bool,
    /// Flush a file system before the first content on it is read (see [`crate::scan::flush`]).
    pub flush_sources: bool,
    /// How hard blocks are compressed.
    pub compression: Compression,
    /// Names of one directory that are sorted in memory; more spill to the state directory.
    pub names_in_memory: usize,
    /// The file systems' clock at the start; `None`: ask.
    pub started: Option<Timestamp>,
}

impl BackupPlan {
    /// With usual settings: as many readers and sealers as processors, estimate and flush on, no cache.
    pub fn new(paths: Vec<PathBuf>, state_directory: PathBuf) -> Self {
        let processors = thread::available_parallelism().map_or(2, usize::from);
        Self {
            paths,
            cached_as: Vec::new(),
            excludes: Vec::new(),
            iexcludes: Vec::new(),
            markers: Vec::new(),
            larger_than: None,
            ignore_file: None,
            stream: None,
            one_file_system: false,
            skip: Vec::new(),
            state_directory,
            cache: None,
            readers: processors.clamp(1, 16),
            sealers: processors.clamp(1, 16),
            scanners: 4,
            estimate: true,
            flush_sources: true,
            compression: Compression::Auto,
            names_in_memory: NAMES_IN_MEMORY,
            started: None,
        }
    }
}

/// Secrets of the repository that the pipeline needs. Wiped on drop.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct ChunkKeys {
    /// Key of chunk ids.
    pub id_key: [u8; 32],
    /// Secret of the chunker.
    pub chunker_secret: [u8; 32],
}

impl std::fmt::Debug for ChunkKeys {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ChunkKeys(…)")
    }
}

/// How far the file cache is believed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheTrust {
    /// Chunks of unchanged files are not asked about.
    Trust,
    /// They are asked about; a file of which the server lacks a chunk is read again. After the answer `Missing`.
    VerifyWithServer,
    /// Everything is read.
    Ignore,
}

/// What a pass came to. Every block has been handed to the sink; nothing is committed yet.
#[derive(Debug)]
pub struct PassOutcome {
    /// Top node of the root directory.
    pub root: ChunkId,
    /// Top node of the error list, if anything could not be saved (exit code 3).
    pub errors_root: Option<ChunkId>,
    /// Counts for the manifest.
    pub totals: Totals,
    /// The new file cache, to be published once the snapshot is committed.
    pub new_cache: Option<PendingCache>,
}

/// The first fault, and the sign for everybody to stop.
#[derive(Debug)]
pub(super) struct Fault<'a> {
    first: Mutex<Option<BackupError>>,
    stop: AtomicBool,
    cancel: &'a AtomicBool,
}

impl Fault<'_> {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed) || self.cancel.load(Ordering::Relaxed)
    }

    /// An error if this stage is to stop, too.
    pub(super) fn check(&self) -> Result<(), BackupError> {
        if self.stopped() { Err(BackupError::Stopped) } else { Ok(()) }
    }

    // Errors that only say that somebody else stopped are not the cause.
    fn record<T>(&self, result: Result<T, BackupError>) -> Option<T> {
        match result {
            Ok(value) => Some(value),
            Err(error) => {
                self.stop.store(true, Ordering::Relaxed);
                if !matches!(error, BackupError::Stopped) {
                    self.first.lock().get_or_insert(error);
                }
                None
            }
        }
    }

    fn cause(self) -> BackupError {
        let cancelled = self.cancel.load(Ordering::Relaxed);
        match self.first.into_inner() {
            _ if cancelled => BackupError::Cancelled,
            Some(error) => error,
            None => BackupError::Stopped,
        }
    }
}

/// Runs one pass over the source, in this thread and others of its own, until every block is with the sink.
///
/// `cancel` ends the pass soon; calls of ports that wait must return an error by themselves then.
#[expect(clippy::too_many_arguments, reason = "each is another party's; a struct would only rename the list")]
pub fn run_pass(
    plan: &BackupPlan,
    keys: &ChunkKeys,
    chunking: &ChunkingV1,
    old: Option<CacheReader>,
    trust: CacheTrust,
    ports: Ports<'_>,
    progress: &Progress,
    cancel: &AtomicBool,
) -> Result<PassOutcome, BackupError> {
    let (cache, started) = new_cache(plan);
    let walk = walk_plan(plan)?;
    let context = Arc::new(list_context(plan));
    let flusher = Flusher::new(plan.flush_sources);
    let cutter = Cutter::new(chunking, &keys.chunker_secret);
    let fault = Fault { first: Mutex::new(None), stop: AtomicBool::new(false), cancel };
    let Ports { oracle, sink, sealers } = ports;
    let pass = Pass {
        plan,
        keys,
        chunking,
        cutter: &cutter,
        sink,
        progress,
        fault: &fault,
        context: &context,
        flusher: &flusher,
    };
    tracing::debug!(?started, readers = plan.readers, sealers = plan.sealers, "pass begins");
    let before = progress.now();
    let sealers = (0..=plan.sealers.max(1)).map(|_| sealers.sealer()).collect::<Result<Vec<_>, _>>()?;
    let assembled = pass.run(&walk, cache, old, trust, oracle, sealers);
    let Some(Assembled { root, errors_root, mut totals, cache }) = assembled else { return Err(fault.cause()) };
    totals.bytes_stored = progress.bytes_stored.get() - before.bytes_stored;
    totals.bytes_new = progress.bytes_new.get() - before.bytes_new;
    totals.files_read = progress.files_read.get() - before.files_read;
    let new_cache = if flusher.failed() { None } else { cache.finish() };
    Ok(PassOutcome { root, errors_root, totals, new_cache })
}

fn new_cache(plan: &BackupPlan) -> (CacheWriter, Option<Timestamp>) {
    let Some((path, identity)) = &plan.cache else { return (CacheWriter::none(), None) };
    match plan.started.map_or_else(|| file_system_clock(&plan.state_directory), Ok) {
        Ok(started) => (CacheWriter::create(path, *identity, started), Some(started)),
        Err(error) => {
            tracing::warn!(%error, "the file system's clock cannot be read; no file cache is written");
            (CacheWriter::none(), None)
        }
    }
}

fn walk_plan(plan: &BackupPlan) -> Result<WalkPlan, BackupError> {
    let machine = |source| BackupError::Machine { what: "finding the current directory", source };
    let current = if plan.paths.iter().all(|path| path.is_absolute()) {
        PathBuf::from("/")
    } else {
        std::env::current_dir().map_err(machine)?
    };
    let mut skip = plan.skip.clone();
    skip.extend(identity_of(&plan.state_directory));
    Ok(WalkPlan {
        roots: RootNode::merge(&plan.paths, &current),
        excludes: Excludes::with_insensitive(&plan.excludes, &plan.iexcludes)?,
        markers: plan.markers.clone(),
        larger_than: plan.larger_than,
        ignore_file: plan.ignore_file.clone(),
        one_file_system: plan.one_file_system,
        skip,
    })
}

fn list_context(plan: &BackupPlan) -> ListContext {
    ListContext { spill: SpillPolicy::new(plan.state_directory.clone(), plan.names_in_memory) }
}

/// What the threads of one pass share.
struct Pass<'a> {
    plan: &'a BackupPlan,
    keys: &'a ChunkKeys,
    chunking: &'a ChunkingV1,
    cutter: &'a Cutter,
    sink: &'a dyn BlockSink,
    progress: &'a Progress,
    fault: &'a Fault<'a>,
    context: &'a Arc<ListContext>,
    flusher: &'a Flusher,
}

impl Pass<'_> {
    // `None`: the fault says why.
    fn run(
        &self,
        walk: &WalkPlan,
        cache: CacheWriter,
        old: Option<CacheReader>,
        trust: CacheTrust,
        oracle: Box<dyn ChunkOracle + '_>,
        mut sealers: Vec<Box<dyn BlockSealer>>,
    ) -> Option<Assembled> {
        let fault = self.fault;
        let readers = self.plan.readers.max(1);
        let oracle = Mutex::new(oracle);
        let over = AtomicBool::new(false);
        // A full block waits for each sealing thread at most; two blocks of trees wait.
        let (data, data_blocks) = bounded(1);
        let (trees, tree_blocks) = bounded(2);
        let (emptied_sender, emptied) = bounded(sealers.len());
        let (jobs_sender, jobs) = bounded(1);
        let (ordered_sender, ordered) = bounded(readers + BATCHES_AHEAD);
        let (lookahead, listings) = Lookahead::new(LISTINGS_QUEUED_MAX);
        let channels = BlockChannels { data, trees, emptied };
        let emitter = Emitter::new(&oracle, self.progress, self.keys.id_key, self.chunking, channels);
        let reader = || FileReader::new(self.cutter, self.keys.id_key, self.progress, self.flusher);
        let assembler = Assembler::new(emitter, reader(), self.progress, self.keys, cache);
        let tree_sealer = sealers.pop();

        thread::scope(|scope| {
            for _ in 0..self.plan.scanners {
                let (context, listings) = (self.context.as_ref(), listings.clone());
                fault.record(spawn(scope, "scan", move || work(context, &listings)));
            }
            drop(listings);
            let oracle = &oracle;
            let feeder = move || {
                if let Some(stream) = &self.plan.stream {
                    return stream.feed(&jobs_sender, &ordered_sender);
                }
                let walker = open_walker(walk, self.context, lookahead)?;
                Feeder::new(walker, old, trust, oracle, jobs_sender, ordered_sender).run(|| fault.stopped())
            };
            fault.record(spawn(scope, "feed", move || fault.record(feeder())));
            for _ in 0..readers {
                let (mut reader, jobs) = (reader(), jobs.clone());
                let read = move || fault.record(read_batches(&mut reader, &jobs, || fault.stopped()));
                fault.record(spawn(scope, "read", read));
            }
            drop(jobs);
            for (sealer, blocks) in sealers
                .into_iter()
                .map(|sealer| (sealer, data_blocks.clone()))
                .chain(tree_sealer.map(|sealer| (sealer, tree_blocks.clone())))
            {
                let emptied = emptied_sender.clone();
                let sealing = self.sealing();
                let seal = move || fault.record(sealing.run(sealer, &blocks, &emptied));
                fault.record(spawn(scope, "seal", seal));
            }
            drop((data_blocks, tree_blocks));
            if self.plan.estimate && self.plan.stream.is_none() {
                let over = &over;
                fault.record(spawn(scope, "estimate", move || self.estimate(walk, over)));
            }
            let assembled = fault.record(self.assemble(assembler, &ordered));
            // After a fault readers may wait to hand parts to nobody: a channel keeps its messages, here the receiving ends
            // of theirs, until its last sender is gone. At the regular end there is nothing left.
            ordered.iter().for_each(drop);
            over.store(true, Ordering::Relaxed);
            assembled
        })
        .filter(|_| !fault.stopped())
    }

    fn assemble(&self, mut assembler: Assembler<'_>, ordered: &Receiver<Ordered>) -> Result<Assembled, BackupError> {
        for next in ordered {
            match next {
                Ordered::Ready(part) => {
                    self.fault.check()?;
                    assembler.part(part)?;
                }
                Ordered::Parts(parts) => {
                    for part in parts {
                        self.fault.check()?;
                        assembler.part(part)?;
                    }
                }
            }
        }
        self.fault.check()?;
        assembler.finish()
    }

    fn sealing(&self) -> SealStage<'_> {
        let Self { sink, progress, fault, .. } = *self;
        SealStage { sink, progress, fault, compression: self.plan.compression }
    }

    fn estimate(&self, walk: &WalkPlan, over: &AtomicBool) {
        let began = clock::now();
        while clock::now().saturating_duration_since(began) < ESTIMATE_FROM {
            if over.load(Ordering::Relaxed) || self.fault.stopped() {
                return;
            }
            thread::sleep(ESTIMATE_FROM / 100);
        }
        let context = Arc::new(list_context(self.plan));
        let Ok(walker) = open_walker(walk, &context, Lookahead::none()) else { return };
        for event in walker {
            if over.load(Ordering::Relaxed) || self.fault.stopped() {
                return;
            }
            if let ScanEvent::Node { meta, .. } = event {
                self.progress.estimated_files.add(1);
                self.progress.estimated_bytes.add(if meta.is_file() { meta.size } else { 0 });
            }
        }
        self.progress.estimated.store(true, Ordering::Relaxed);
    }
}

fn open_walker(walk: &WalkPlan, context: &Arc<ListContext>, lookahead: Lookahead) -> Result<Walker, BackupError> {
    let machine = |error: rustix::io::Errno| BackupError::Machine { what: "opening `/`", source: error.into() };
    Walker::new(walk.clone(), context.clone(), lookahead).map_err(machine)
}

fn spawn<'scope, 'env, T: Send + 'scope>(
    scope: &'scope thread::Scope<'scope, 'env>,
    name: &str,
    run: impl FnOnce() -> T + Send + 'scope,
) -> Result<(), BackupError> {
    let spawned = thread::Builder::new().name(name.into()).spawn_scoped(scope, run);
    spawned.map(drop).map_err(|source| BackupError::Machine { what: "starting a thread", source })
}
