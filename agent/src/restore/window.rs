//! A window: the chunks of one fetch, and where in which files they go. Writer threads empty it together.

use std::collections::HashMap;
use std::ops::RangeInclusive;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use crossbeam_channel::RecvTimeoutError;
use parking_lot::Mutex;
use strandline_messages::{ChunkId, ChunkKind, limits};

use super::file_job::FileJob;
use super::{Restorer, TARGETS_MAX};
use crate::seal::OpenedBlock;
use crate::trees::{FetchError, Fetched};

/// How often a waiting writer looks at the cancel flag.
const LOOK_UP: Duration = Duration::from_millis(200);

/// A place for a chunk.
pub(super) struct Target {
    pub(super) file: Arc<FileJob>,
    /// Where in the file's content stream.
    pub(super) offset: u64,
    /// The length that the chunk must have.
    pub(super) bytes: u32,
}

/// A window being planned.
#[derive(Default)]
pub(super) struct Draft {
    pub(super) ids: Vec<ChunkId>,
    wanted: HashMap<ChunkId, Vec<Target>>,
    bytes: u64,
    targets: usize,
}

impl Draft {
    pub(super) fn add(&mut self, id: ChunkId, target: Target) {
        self.targets += 1;
        let places = self.wanted.entry(id).or_default();
        if places.is_empty() {
            self.ids.push(id);
            self.bytes += u64::from(target.bytes);
        }
        places.push(target);
    }

    pub(super) fn is_full(&self, bytes_max: u64) -> bool {
        self.ids.len() >= limits::FETCH_IDS_MAX || self.targets >= TARGETS_MAX || self.bytes >= bytes_max
    }

    /// With the fetch's answer, to be emptied by `writers` threads.
    pub(super) fn into_window(self, answer: Result<Fetched, FetchError>, writers: usize) -> Window {
        let (fetched, problems) = match answer {
            Ok(fetched) => (Some(fetched), Vec::new()),
            Err(error) => (None, vec![error]),
        };
        Window {
            fetched,
            wanted: Mutex::new(self.wanted),
            problems: Mutex::new(problems),
            writers: AtomicUsize::new(writers),
        }
    }
}

pub(super) struct Window {
    fetched: Option<Fetched>,
    wanted: Mutex<HashMap<ChunkId, Vec<Target>>>,
    problems: Mutex<Vec<FetchError>>,
    /// Writers that have not left yet.
    writers: AtomicUsize,
}

/// Chunks that are neighbours in a block and in a file: they are written at once, and then released.
struct Run {
    file: Arc<FileJob>,
    /// `None` if the file cannot be opened or has failed.
    handle: Option<Arc<OwnedFd>>,
    /// Where in the file's content stream.
    offset: u64,
    chunks: RangeInclusive<usize>,
    bytes: u64,
}

impl Run {
    /// The run that has this chunk: `run` made longer, or a new one after `run` has been written.
    fn after(run: Option<Self>, restorer: &Restorer, block: &OpenedBlock, target: Target, chunk: usize) -> Self {
        let Target { file, offset, bytes } = target;
        let bytes = u64::from(bytes);
        let mut handle = None;
        if let Some(mut run) = run {
            let is_same = Arc::ptr_eq(&run.file, &file);
            if is_same && offset == run.offset + run.bytes && chunk == run.chunks.end() + 1 {
                run.chunks = *run.chunks.start()..=chunk;
                run.bytes += bytes;
                return run;
            }
            run.write(restorer, block);
            handle = run.handle.filter(|_| is_same);
        }
        let handle = handle.or_else(|| {
            if file.has_failed() {
                return None;
            }
            file.open(restorer).map_err(|error| file.fail(format!("it cannot be written: {error}"))).ok()
        });
        Self { file, handle, offset, chunks: chunk..=chunk, bytes }
    }

    fn write(&self, restorer: &Restorer, block: &OpenedBlock) {
        if let Some(handle) = &self.handle
            && !self.file.has_failed()
            && let Err(error) = self.file.write(restorer, handle, self.offset, block.span(self.chunks.clone()))
        {
            self.file.fail(format!("it cannot be written: {error}"));
        }
        for _ in self.chunks.clone() {
            self.file.release(restorer, self.handle.as_ref());
        }
    }
}

impl Window {
    /// What every writer thread does: takes blocks until there are no more. The last one out settles what did not come.
    pub(super) fn empty(&self, restorer: &Restorer) {
        while !restorer.stopped() {
            let Some(fetched) = &self.fetched else { break };
            match fetched.recv_timeout(LOOK_UP) {
                Ok(Ok(block)) => self.write_block(restorer, &block),
                Ok(Err(error @ FetchError::Lost { .. })) => restorer.issues.end(error.to_string()),
                Ok(Err(error)) => self.problems.lock().push(error),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        if self.writers.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.settle(restorer);
        }
    }

    fn write_block(&self, restorer: &Restorer, block: &OpenedBlock) {
        if block.kind() != ChunkKind::Data {
            return;
        }
        let mut run: Option<Run> = None;
        for (index, row) in block.rows().iter().enumerate() {
            let Some(targets) = self.wanted.lock().remove(&row.id) else { continue };
            let chunk = block.chunk(index).map_err(|error| error.to_string());
            for target in targets {
                let fits = chunk.as_ref().map_err(String::as_str).and_then(|chunk| {
                    let contradiction =
                        "the tree contradicts itself: a chunk has another length than the file's list of pieces says";
                    if chunk.bytes.len() == target.bytes as usize { Ok(()) } else { Err(contradiction) }
                });
                match fits {
                    Ok(()) => run = Some(Run::after(run, restorer, block, target, index)),
                    Err(reason) => {
                        target.file.fail(reason.to_owned());
                        target.file.release(restorer, None);
                    }
                }
            }
        }
        if let Some(run) = run {
            run.write(restorer, block);
        }
    }

    /// What did not come fails, with the reason that was given or is most likely.
    fn settle(&self, restorer: &Restorer) {
        let problems = std::mem::take(&mut *self.problems.lock());
        if let Some(lost) = problems.iter().find(|problem| matches!(problem, FetchError::Lost { .. })) {
            restorer.issues.end(lost.to_string());
        }
        let damaged = problems
            .iter()
            .find(|problem| matches!(problem, FetchError::Damaged { .. } | FetchError::Unreadable { .. }));
        for (id, targets) in std::mem::take(&mut *self.wanted.lock()) {
            let named = problems.iter().find(|problem| problem.concerns(&id));
            let reason = match named.or(damaged) {
                Some(FetchError::Missing { .. }) | None => FetchError::Missing { chunks: vec![id] }.to_string(),
                Some(problem) => problem.to_string(),
            };
            for target in targets {
                target.file.fail(reason.clone());
                target.file.release(restorer, None);
            }
        }
    }
}
