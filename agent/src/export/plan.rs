//! The planner: walks the tree in order and cuts it into windows of steps, whose chunks it has fetched ahead of need.

use std::collections::HashSet;
use std::path::Path;

use crossbeam_channel::{Sender, bounded};
use strandline_messages::ChunkId;
use strandline_messages::format::tree::{Content, EntryNode};
use strandline_messages::limits;

use super::item::{Item, Kind};
use super::links::Links;
use super::window::{Shared, Step, Window, collect};
use super::{Export, ExportError, Start};
use crate::trees::{DirEntry, TreeReader};

/// Most steps of one window: one chunk may be needed many times.
const STEPS_MAX: usize = 65_536;

pub(super) struct Planner<'scope, 'env> {
    scope: &'scope std::thread::Scope<'scope, 'env>,
    shared: &'env Shared<'env>,
    reader: &'env TreeReader,
    links: Option<Links>,
    windows: Sender<Window>,
    draft: Draft,
}

#[derive(Default)]
struct Draft {
    steps: Vec<Step>,
    ids: Vec<ChunkId>,
    wanted: HashSet<ChunkId>,
    bytes: u64,
}

/// The consumer has gone, or something cannot be read: the plan ends there.
struct Ended;

impl<'scope, 'env> Planner<'scope, 'env> {
    /// `temporary`: where to remember hard links; `None` makes a copy of each.
    pub(super) fn new(
        scope: &'scope std::thread::Scope<'scope, 'env>,
        shared: &'env Shared<'env>,
        reader: &'env TreeReader,
        temporary: Option<&Path>,
        windows: Sender<Window>,
    ) -> Self {
        let links = temporary.map(|directory| Links::new(directory.to_owned()));
        Self { scope, shared, reader, links, windows, draft: Draft::default() }
    }

    pub(super) fn run(mut self, export: &Export) {
        // An error stands in the plan as its last step; a consumer that has gone needs no plan.
        if self.plan(export).is_ok() {
            self.draft.steps.push(Step::Complete);
        }
        let _ = self.flush();
    }

    fn plan(&mut self, export: &Export) -> Result<(), Ended> {
        match &export.start {
            Start::Entry(entry) => self.entry(&entry.entry.name, entry),
            Start::Directory { top, entry } => {
                if let Some(entry) = entry {
                    self.entry(b".", entry)?;
                }
                for step in self.reader.walk(*top, &[]) {
                    match step {
                        Ok((path, crate::trees::Step::Enter(entry) | crate::trees::Step::Entry(entry))) => {
                            self.entry(&path, &entry)?;
                        }
                        Ok((_, crate::trees::Step::Leave)) => {}
                        Err(problem) => return self.unreadable(&problem.path, &problem.error.to_string()),
                    }
                }
                Ok(())
            }
        }
    }

    fn entry(&mut self, path: &[u8], entry: &DirEntry) -> Result<(), Ended> {
        let mut item = Item::new(path.to_vec(), entry);
        if let Some(links) = &mut self.links
            && entry.entry.links > 1
            && !matches!(item.kind, Kind::Directory)
        {
            match links.earlier(&entry.entry, path) {
                Ok(Some(first)) => item.kind = Kind::HardLink(first),
                Ok(None) => {}
                Err(error) => {
                    self.draft.steps.push(Step::Failed(ExportError::Temporary(error)));
                    return Err(Ended);
                }
            }
        }
        let has_content = matches!(item.kind, Kind::File { .. });
        self.step(item.memory_bytes(), Step::Begin(Box::new(item)))?;
        if has_content {
            self.content(path, entry)?;
        }
        self.step(0, Step::End)
    }

    fn content(&mut self, path: &[u8], entry: &DirEntry) -> Result<(), Ended> {
        if let EntryNode::File { content: Content::Inline(bytes), .. } = &entry.entry.node {
            return if bytes.is_empty() { Ok(()) } else { self.step(bytes.len() as u64, Step::Inline(bytes.clone())) };
        }
        for piece in self.reader.pieces(entry) {
            match piece {
                Ok((id, bytes)) => {
                    if self.draft.wanted.insert(id) {
                        self.draft.ids.push(id);
                        self.draft.bytes += u64::from(bytes);
                    }
                    self.step(0, Step::Piece { id, bytes })?;
                }
                Err(error) => return self.unreadable(path, &error.to_string()),
            }
        }
        Ok(())
    }

    fn unreadable(&mut self, path: &[u8], reason: &str) -> Result<(), Ended> {
        self.draft.steps.push(Step::Failed(ExportError::unreadable(&self.shared.full(path), reason)));
        Err(Ended)
    }

    fn step(&mut self, bytes: u64, step: Step) -> Result<(), Ended> {
        self.draft.bytes += bytes;
        self.draft.steps.push(step);
        let full = self.draft.ids.len() >= limits::FETCH_IDS_MAX
            || self.draft.steps.len() >= STEPS_MAX
            || self.draft.bytes >= self.shared.options.window_bytes;
        if full { self.flush() } else { Ok(()) }
    }

    /// Starts the fetch of what was planned and hands it over; waits until the window before is being written.
    fn flush(&mut self) -> Result<(), Ended> {
        let Draft { steps, ids, wanted, .. } = std::mem::take(&mut self.draft);
        if self.shared.stopped() {
            return Err(Ended);
        }
        // One message for each chunk, so the collector never waits.
        let (sender, arrivals) = bounded(ids.len());
        if !ids.is_empty() {
            let fetched = self.reader.source().fetch(ids);
            let shared = self.shared;
            self.scope.spawn(move || collect(fetched, wanted, &sender, shared));
        }
        self.windows.send(Window { steps, arrivals }).map_err(|_| Ended)
    }
}
