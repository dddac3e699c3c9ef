//! A window: the chunks of one fetch, and where in which files they go. Writer threads empty it together.

use std::collections::HashMap;
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

/// The file written last, kept open because neighbours in a block are mostly neighbours in a file.
type Current = Option<(Arc<FileJob>, OwnedFd)>;

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
        let mut current: Current = None;
        for (index, row) in block.rows().iter().enumerate() {
            let Some(targets) = self.wanted.lock().remove(&row.id) else { continue };
            match block.chunk(index) {
                Ok(chunk) => {
                    for target in targets {
                        write(restorer, &target, chunk.bytes, &mut current);
                        let handle = current.as_ref().filter(|(file, _)| Arc::ptr_eq(file, &target.file));
                        target.file.release(restorer, handle.map(|(_, handle)| handle));
                    }
                }
                Err(error) => {
                    for target in targets {
                        target.file.fail(error.to_string());
                        target.file.release(restorer, None);
                    }
                }
            }
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

fn write(restorer: &Restorer, target: &Target, bytes: &[u8], current: &mut Current) {
    let file = &target.file;
    if file.has_failed() {
        return;
    }
    if bytes.len() != target.bytes as usize {
        file.fail("the tree contradicts itself: a chunk has another length than the file's list of pieces says".into());
        return;
    }
    let handle = match current {
        Some((open, handle)) if Arc::ptr_eq(open, file) => handle,
        _ => match file.open(restorer) {
            Ok(handle) => &mut current.insert((Arc::clone(file), handle)).1,
            Err(error) => return file.fail(format!("it cannot be written: {error}")),
        },
    };
    if let Err(error) = file.write(restorer, handle, target.offset, bytes) {
        file.fail(format!("it cannot be written: {error}"));
    }
}
