//! The feeder: walks, asks the file cache, and hands out work in order.

use std::collections::{HashSet, VecDeque};
use std::mem;

use crossbeam_channel::{Receiver, Sender, bounded};
use rustix::fs::FileType;
use strandline_messages::format::tree::Timestamp;
use strandline_messages::ids::ChunkId;
use strandline_messages::limits;

use super::items::{Node, NodeContent, Ordered, Part, Place, Step};
use super::ports::{QueryTicket, SharedOracle};
use super::{BackupError, CacheTrust};
use crate::cache::{CacheReader, CachedContent, Record};
use crate::chunk::INLINE_BYTES;
use crate::scan::ScanEvent;
use crate::scan::meta::Meta;
use crate::scan::names::Name;
use crate::scan::walk::Walker;

/// A batch ends with so many steps, bytes to be read or carried, or ids to be asked about.
const BATCH_STEPS: usize = 256;
const BATCH_BYTES: u64 = 512 << 10;
const BATCH_IDS: usize = 1024;
/// Batches that wait for the server to confirm cached chunks. A batch asks for at most 2 × `BATCH_IDS` ids, so the ids
/// outstanding stay within a quarter of `QUERY_IDS_OUTSTANDING_MAX`.
const BATCHES_ASKED_MAX: usize = 4;
const _: () = assert!(BATCHES_ASKED_MAX * 2 * BATCH_IDS <= limits::QUERY_IDS_OUTSTANDING_MAX / 4);
/// Hardlinked files remembered per generation.
const LINKS: usize = 32_768;

/// Work for a reader: steps, and where their parts go.
pub type Job = (Vec<Step>, Sender<Part>);

type LinkKey = (u64, u64, Timestamp);

/// A batch with the query about its cached chunks, if it has any.
type AskedBatch = (Vec<Step>, Option<Box<dyn QueryTicket>>);

/// Walks the source and hands out batches.
pub struct Feeder<'a> {
    walker: Walker,
    old: Option<CacheReader>,
    oracle: Option<&'a dyn SharedOracle>,
    jobs: Sender<Job>,
    ordered: Sender<Ordered>,
    batch: Vec<Step>,
    bytes: u64,
    ids: usize,
    asked: VecDeque<AskedBatch>,
    links: [HashSet<LinkKey>; 2],
}

impl<'a> Feeder<'a> {
    /// Batches go to `jobs` and, in order, to `ordered`.
    pub fn new(
        walker: Walker,
        old: Option<CacheReader>,
        trust: CacheTrust,
        oracle: &'a dyn SharedOracle,
        jobs: Sender<Job>,
        ordered: Sender<Ordered>,
    ) -> Self {
        Self {
            walker,
            old: old.filter(|_| trust != CacheTrust::Ignore),
            oracle: (trust == CacheTrust::VerifyWithServer).then_some(oracle),
            jobs,
            ordered,
            batch: Vec::new(),
            bytes: 0,
            ids: 0,
            asked: VecDeque::new(),
            links: Default::default(),
        }
    }

    /// Walks to the end. `stopped` is asked between entries.
    pub fn run(mut self, stopped: impl Fn() -> bool) -> Result<(), BackupError> {
        while let Some(event) = self.walker.next() {
            if stopped() {
                return Err(BackupError::Stopped);
            }
            let step = self.step(event);
            self.bytes += weight(&step);
            self.ids += cached_ids(&step).len();
            self.batch.push(step);
            if self.batch.len() >= BATCH_STEPS || self.bytes >= BATCH_BYTES || self.ids >= BATCH_IDS {
                self.end_batch()?;
            }
        }
        self.end_batch()?;
        while let Some(asked) = self.asked.pop_front() {
            self.confirmed(asked)?;
        }
        if self.walker.roots_found() == 0 { Err(BackupError::NoSource) } else { Ok(()) }
    }

    fn step(&mut self, event: ScanEvent) -> Step {
        match event {
            ScanEvent::Enter { parent, dir, name, meta } => {
                let record = self.old.as_mut().and_then(|old| old.enter(&name, &meta));
                // A directory that could not be listed is reported every time, but its attributes are as they were.
                Step::Enter(Box::new(node(name, meta, record, Place { parent, dir })))
            }
            ScanEvent::Leave => {
                if let Some(old) = &mut self.old {
                    old.leave();
                }
                Step::Leave
            }
            ScanEvent::Node { parent, name, meta } => {
                let record = self.old.as_mut().and_then(|old| old.lookup(&name, &meta));
                let mut node = node(name, meta, record, Place { parent, dir: None });
                if matches!(node.content, NodeContent::Unread) && self.is_further_link(&meta) {
                    node.content = NodeContent::SameInode;
                }
                Step::Node(Box::new(node))
            }
            ScanEvent::Problem { path, message } => Step::Problem { path, message },
        }
    }

    // Whether a file with the same inode was handed out to be read in this run.
    fn is_further_link(&mut self, meta: &Meta) -> bool {
        if meta.links < 2 || !meta.is_file() || meta.size <= INLINE_BYTES as u64 {
            return false;
        }
        let key = (meta.device, meta.inode, meta.ctime);
        let [young, old] = &mut self.links;
        if young.contains(&key) || old.contains(&key) {
            return true;
        }
        if young.len() >= LINKS {
            mem::swap(young, old);
            young.clear();
        }
        young.insert(key);
        false
    }

    fn end_batch(&mut self) -> Result<(), BackupError> {
        self.bytes = 0;
        let ids = mem::take(&mut self.ids);
        let batch = mem::take(&mut self.batch);
        let Some(oracle) = self.oracle else { return self.hand_out(batch) };
        let ticket = if ids == 0 {
            None
        } else {
            let ids = batch.iter().flat_map(cached_ids).collect();
            Some(oracle.ask(ids)?)
        };
        self.asked.push_back((batch, ticket));
        while self.asked.len() >= BATCHES_ASKED_MAX
            && let Some(asked) = self.asked.pop_front()
        {
            self.confirmed(asked)?;
        }
        Ok(())
    }

    // A cached file of which the server lacks a chunk is read again.
    fn confirmed(&mut self, (mut batch, ticket): AskedBatch) -> Result<(), BackupError> {
        if let Some(ticket) = ticket {
            let mut known = ticket.wait()?.into_iter();
            for step in &mut batch {
                let ids = cached_ids(step).len();
                let all_known = known.by_ref().take(ids).filter(|&known| known).count() == ids;
                if let Step::Node(node) = step
                    && !all_known
                {
                    node.content = NodeContent::Unread;
                    node.unchanged = false;
                }
            }
        }
        self.hand_out(batch)
    }

    fn hand_out(&mut self, batch: Vec<Step>) -> Result<(), BackupError> {
        if batch.is_empty() {
            return Ok(());
        }
        let ordered = if batch.iter().any(Step::needs_reading) {
            // One part ahead of the assembler per batch.
            let (sender, receiver) = bounded(1);
            self.jobs.send((batch, sender)).map_err(|_| BackupError::Stopped)?;
            Ordered::Parts(receiver)
        } else {
            let steps = batch.into_iter().map(|step| (0, step)).collect();
            Ordered::Ready(Part { steps, ..Part::default() })
        };
        self.ordered.send(ordered).map_err(|_| BackupError::Stopped)
    }
}

fn node(name: Name, meta: Meta, record: Option<Record>, place: Place) -> Node {
    let mut node = Node {
        name,
        meta,
        xattrs: Vec::new(),
        holes: Vec::new(),
        content: NodeContent::Unread,
        cacheable: true,
        unchanged: false,
        problems: Vec::new(),
        place,
    };
    if let Some(record) = record
        && let Some(content) = content(meta.file_type(), record.content)
    {
        node.content = content;
        node.xattrs = record.xattrs;
        node.holes = record.holes;
        node.unchanged = true;
    }
    node
}

// The content of a record, unless it does not fit the type.
fn content(file_type: FileType, cached: CachedContent) -> Option<NodeContent> {
    match (file_type, cached) {
        (FileType::RegularFile, CachedContent::Inline(bytes)) => Some(NodeContent::Inline(bytes)),
        (FileType::RegularFile, CachedContent::Pieces(pieces)) => Some(NodeContent::Pieces(pieces)),
        (FileType::RegularFile, CachedContent::List(id)) => Some(NodeContent::List(id)),
        (FileType::Symlink, CachedContent::Inline(target)) => Some(NodeContent::Target(target)),
        (FileType::RegularFile | FileType::Symlink, _) => None,
        (_, CachedContent::None) => Some(NodeContent::None),
        _ => None,
    }
}

fn cached_ids(step: &Step) -> Vec<ChunkId> {
    match step {
        Step::Node(node) => match &node.content {
            NodeContent::Pieces(pieces) => pieces.iter().map(|piece| piece.id).collect(),
            NodeContent::List(id) => vec![*id],
            _ => Vec::new(),
        },
        _ => Vec::new(),
    }
}

// Bytes that the step will bring or carries.
fn weight(step: &Step) -> u64 {
    let (Step::Enter(node) | Step::Node(node)) = step else { return 0 };
    let carried: usize = node.xattrs.iter().map(|xattr| xattr.value.len()).sum();
    carried as u64
        + match &node.content {
            NodeContent::Unread if node.meta.is_file() => node.meta.size,
            NodeContent::Pieces(pieces) => pieces.len() as u64 * 36,
            NodeContent::Inline(bytes) | NodeContent::Target(bytes) => bytes.len() as u64,
            _ => 0,
        }
}

/// A reading thread's life: batches in order, until there are none or the assembler has stopped.
pub fn read_batches(
    reader: &mut super::reader::FileReader<'_>,
    jobs: &Receiver<Job>,
    stopped: impl Fn() -> bool,
) -> Result<(), BackupError> {
    for (batch, sender) in jobs {
        let mut out = |part| {
            if stopped() {
                return Err(BackupError::Stopped);
            }
            sender.send(part).map_err(|_| BackupError::Stopped)
        };
        reader.show(&batch);
        for step in batch {
            reader.process(step, &mut out)?;
        }
        reader.flush(&mut out)?;
    }
    Ok(())
}
