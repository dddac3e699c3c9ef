//! Windows: steps in order, and the chunks that they need as they arrive. Collectors fetch, the calling thread writes.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, bounded};
use strandline_messages::{ChunkId, ChunkKind};

use super::item::{Item, zeros};
use super::plan::Planner;
use super::{Export, ExportError, ExportOptions, Exported, REMARKS_MAX, Sink, Taken};
use crate::trees::{FetchError, Fetched};

/// How often a waiting thread looks whether to stop.
const LOOK_UP: Duration = Duration::from_millis(200);

/// One thing to be done, in order.
pub(super) enum Step {
    Begin(Box<Item>),
    Inline(Vec<u8>),
    Piece {
        id: ChunkId,
        bytes: u32,
    },
    End,
    /// Everything was planned.
    Complete,
    /// The plan ends here.
    Failed(ExportError),
}

pub(super) struct Window {
    pub(super) steps: Vec<Step>,
    pub(super) arrivals: Receiver<Arrival>,
}

/// A verified chunk, or why there is none.
pub(super) type Arrival = (ChunkId, Result<Vec<u8>, String>);

/// What all threads of one export share.
pub(super) struct Shared<'a> {
    pub(super) options: &'a ExportOptions,
    /// Path in the snapshot of what is exported.
    pub(super) prefix: &'a [u8],
    /// The writing thread is done, well or not.
    over: AtomicBool,
}

impl Shared<'_> {
    pub(super) fn stopped(&self) -> bool {
        self.over.load(Ordering::Relaxed) || self.options.cancel.load(Ordering::Relaxed)
    }

    /// The path in the snapshot.
    pub(super) fn full(&self, path: &[u8]) -> Vec<u8> {
        match (self.prefix, path) {
            (prefix, [] | b".") => prefix.to_vec(),
            ([], path) => path.to_vec(),
            (prefix, path) => [prefix, path].join(&b'/'),
        }
    }
}

/// Writes everything into `sink`.
pub(super) fn run<S: Sink>(export: &Export, options: &ExportOptions, sink: &mut S) -> Result<Exported, ExportError> {
    // A single entry is planned under its own name, which its path ends with.
    let prefix = match &export.start {
        super::Start::Directory { .. } => export.path.as_slice(),
        super::Start::Entry(_) => {
            let slash = export.path.iter().rposition(|byte| *byte == b'/').unwrap_or(0);
            export.path.get(..slash).unwrap_or_default()
        }
    };
    let shared = Shared { options, prefix, over: AtomicBool::new(false) };
    std::thread::scope(|scope| {
        // No room: the planner hands over a window when the one before is written, so that there are two.
        let (sender, windows) = bounded(0);
        let temporary = S::HARD_LINKS.then_some(options.temporary.as_path());
        let planner = Planner::new(scope, &shared, &export.reader, temporary, sender);
        scope.spawn(move || planner.run(export));
        let mut writing = Writing { sink, shared: &shared, done: Exported::default(), current: None };
        let written = writing.all(&windows);
        shared.over.store(true, Ordering::Relaxed);
        written.map(|()| writing.done)
    })
}

/// Takes the wanted chunks out of the blocks as they come: a block is held no longer than that, so its credit is free
/// for those that another window waits for.
pub(super) fn collect(
    fetched: Result<Fetched, FetchError>,
    mut wanted: HashSet<ChunkId>,
    arrivals: &Sender<Arrival>,
    shared: &Shared<'_>,
) {
    let mut problems = Vec::new();
    match fetched {
        Err(error) => problems.push(error),
        Ok(fetched) => loop {
            match fetched.recv_timeout(LOOK_UP) {
                Ok(Ok(block)) if block.kind() == ChunkKind::Data => {
                    for (index, row) in block.rows().iter().enumerate() {
                        if wanted.remove(&row.id) {
                            let chunk = block.chunk(index).map(|chunk| chunk.bytes.to_vec());
                            // Whoever waits for it may have gone.
                            let _ = arrivals.try_send((row.id, chunk.map_err(|error| error.to_string())));
                        }
                    }
                }
                Ok(Err(error)) => problems.push(error),
                Err(RecvTimeoutError::Timeout) if shared.stopped() => return,
                Ok(Ok(_)) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => break,
            }
        },
    }
    // What did not come fails, with the reason that was given or is most likely.
    let likely =
        problems.iter().find(|problem| matches!(problem, FetchError::Damaged { .. } | FetchError::Unreadable { .. }));
    for id in wanted {
        let named = problems.iter().find(|problem| problem.concerns(&id));
        let reason = match named.or(likely) {
            Some(FetchError::Missing { .. }) | None => FetchError::Missing { chunks: vec![id] }.to_string(),
            Some(problem) => problem.to_string(),
        };
        let _ = arrivals.try_send((id, Err(reason)));
    }
}

/// The entry being written.
struct Current {
    path: Vec<u8>,
    expected: u64,
    found: u64,
    taken: bool,
}

struct Writing<'a, S> {
    sink: &'a mut S,
    shared: &'a Shared<'a>,
    done: Exported,
    current: Option<Current>,
}

/// The chunks of one window that came, and how often each is still needed.
struct Chunks {
    arrivals: Receiver<Arrival>,
    uses: HashMap<ChunkId, usize>,
    here: HashMap<ChunkId, Result<Vec<u8>, String>>,
}

impl<S: Sink> Writing<'_, S> {
    fn all(&mut self, windows: &Receiver<Window>) -> Result<(), ExportError> {
        loop {
            let window = match windows.recv_timeout(LOOK_UP) {
                Ok(window) => window,
                Err(RecvTimeoutError::Timeout) if !self.shared.stopped() => continue,
                Err(_) => return Err(ExportError::Cancelled),
            };
            if self.window(window)? {
                return self.sink.finish();
            }
        }
    }

    /// Whether this was the last one.
    fn window(&mut self, window: Window) -> Result<bool, ExportError> {
        let mut chunks = Chunks::new(&window.steps, window.arrivals);
        for step in window.steps {
            if self.shared.stopped() {
                return Err(ExportError::Cancelled);
            }
            match step {
                Step::Begin(item) => self.begin(*item)?,
                Step::Inline(bytes) => self.content(&bytes)?,
                Step::Piece { id, bytes } => self.piece(&mut chunks, id, bytes)?,
                Step::End => self.end()?,
                Step::Complete => return Ok(true),
                Step::Failed(error) => return Err(error),
            }
        }
        Ok(false)
    }

    fn begin(&mut self, item: Item) -> Result<(), ExportError> {
        let (path, expected) = (item.path.clone(), item.content_bytes());
        let taken = match self.sink.begin(item)? {
            Taken::Yes => {
                self.done.entries += 1;
                true
            }
            Taken::No(why) => {
                self.done.left_out += 1;
                self.remark(&path, format!("left out: {why}"));
                false
            }
            Taken::Unneeded => false,
        };
        self.current = Some(Current { path, expected, found: 0, taken });
        Ok(())
    }

    fn piece(&mut self, chunks: &mut Chunks, id: ChunkId, bytes: u32) -> Result<(), ExportError> {
        let content = match chunks.take(&id, self.shared)? {
            Ok(content) if content.len() == bytes as usize => content,
            Ok(_) => {
                return Err(
                    self.unreadable("the tree contradicts itself: a chunk has another length than its list says")
                );
            }
            Err(reason) => return Err(self.unreadable(&reason)),
        };
        self.content(&content)?;
        chunks.put_back(id, content);
        Ok(())
    }

    fn unreadable(&self, reason: &str) -> ExportError {
        let path = self.current.as_ref().map(|current| current.path.as_slice()).unwrap_or_default();
        ExportError::unreadable(&self.shared.full(path), reason)
    }

    /// What exceeds the length that was announced is cut off.
    fn content(&mut self, bytes: &[u8]) -> Result<(), ExportError> {
        let Some(current) = self.current.as_mut().filter(|current| current.taken) else { return Ok(()) };
        let room = usize::try_from(current.expected.saturating_sub(current.found)).unwrap_or(usize::MAX);
        current.found = current.found.saturating_add(bytes.len() as u64);
        let fitting = bytes.get(..room).unwrap_or(bytes);
        self.done.bytes += fitting.len() as u64;
        self.sink.content(fitting)
    }

    /// What is missing of the length that was announced becomes zeros.
    fn end(&mut self) -> Result<(), ExportError> {
        let Some(Current { path, expected, found, taken: true }) = self.current.take() else { return Ok(()) };
        if found != expected {
            self.done.flaws += 1;
            let why = format!("the snapshot holds {found} bytes of it where {expected} were expected; padded or cut");
            self.remark(&path, why);
        }
        let (sink, shared) = (&mut self.sink, self.shared);
        zeros(expected.saturating_sub(found), &mut |bytes: &[u8]| {
            if shared.stopped() { Err(ExportError::Cancelled) } else { sink.content(bytes) }
        })?;
        self.sink.end()
    }

    fn remark(&mut self, path: &[u8], why: String) {
        if self.done.remarks.len() < REMARKS_MAX {
            self.done.remarks.push((self.shared.full(path), why));
        }
    }
}

impl Chunks {
    fn new(steps: &[Step], arrivals: Receiver<Arrival>) -> Self {
        let mut uses = HashMap::new();
        for step in steps {
            if let Step::Piece { id, .. } = step {
                *uses.entry(*id).or_insert(0) += 1;
            }
        }
        Self { arrivals, uses, here: HashMap::new() }
    }

    /// Waits until the chunk is here, and takes it.
    fn take(&mut self, id: &ChunkId, shared: &Shared<'_>) -> Result<Result<Vec<u8>, String>, ExportError> {
        loop {
            if let Some(chunk) = self.here.remove(id) {
                return Ok(chunk);
            }
            match self.arrivals.recv_timeout(LOOK_UP) {
                Ok((other, chunk)) => {
                    self.here.insert(other, chunk);
                }
                Err(RecvTimeoutError::Timeout) if !shared.stopped() => {}
                Err(_) => return Err(ExportError::Cancelled),
            }
        }
    }

    /// Keeps the chunk if the window needs it once more.
    fn put_back(&mut self, id: ChunkId, chunk: Vec<u8>) {
        if let Some(uses) = self.uses.get_mut(&id) {
            *uses -= 1;
            if *uses > 0 {
                self.here.insert(id, Ok(chunk));
            }
        }
    }
}
