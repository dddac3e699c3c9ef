//! The writing thread: every block goes behind the last one of its domain's pack as soon as it comes.

use std::collections::HashMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use crossbeam_channel::{Receiver, Select, Sender};
use strandline_actors::runtime::clock;
use strandline_messages::format::FormatError;
use strandline_messages::format::pack::{FooterEntry, PACK_HEADER_BYTES, PackHeaderV1};
use strandline_messages::{DomainId, limits};

use super::commit::{Group, Step};
use super::{Job, NewBlock, OPEN_PACKS_MAX, Queued, Shared, StoredBlock};
use crate::failpoint;
use crate::storage::pack_file::PackInfo;
use crate::storage::store_error::StoreError;

/// A pack's file while both threads use it.
pub(super) struct PackFile {
    pub(super) file: File,
    pub(super) path: PathBuf,
    failed: AtomicBool,
}

impl PackFile {
    /// From now on neither thread writes or syncs it.
    pub(super) fn fail(&self) {
        self.failed.store(true, Ordering::SeqCst);
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::SeqCst)
    }

    /// Removes the file of a pack in which nothing was ever confirmed.
    pub(super) fn remove(&self) {
        // If even this fails, the next start seals the pack or sets it aside.
        let _ = std::fs::remove_file(&self.path);
        failpoint::reached("pack/given-up");
    }
}

/// A pack that takes blocks, and what was written to it, durable or not.
pub(super) struct OpenPack {
    pub(super) pack: Arc<PackFile>,
    pub(super) info: PackInfo,
    pub(super) entries: Vec<FooterEntry>,
    /// When it was last written to, counted in blocks.
    used: u64,
}

impl OpenPack {
    /// A new file that holds a header. Neither it nor its name is durable yet.
    pub(super) fn create(shared: &Shared, domain: DomainId) -> Result<Self, StoreError> {
        let number = shared.next_pack.fetch_add(1, Ordering::Relaxed);
        let path = shared.paths.pack(number);
        let header = PackHeaderV1 { repository: shared.repository, domain, number, created_ns: clock::wall_ns() };
        let header = Bytes::from(header.encode());
        let file = shared.ops.create(&path).map_err(StoreError::from_io)?;
        let pack = PackFile { file, path, failed: AtomicBool::new(false) };
        if let Err(error) = shared.ops.write_at(&pack.file, &pack.path, &header, 0) {
            pack.remove();
            return Err(StoreError::from_io(error));
        }
        let file_bytes = header.len() as u64;
        let blocks_end = u32::try_from(file_bytes).map_err(|_| too_large())?;
        let info = PackInfo { number, domain, sealed: false, file_bytes, blocks_end, blocks: 0 };
        Ok(Self { pack: Arc::new(pack), info, entries: Vec::new(), used: 0 })
    }

    /// Writes a block behind the last one. An error of the file itself fails the pack.
    pub(super) fn append(&mut self, shared: &Shared, block: &NewBlock) -> Result<StoredBlock, StoreError> {
        let offset = self.info.blocks_end;
        let bytes = u32::try_from(block.bytes.len()).map_err(|_| too_large())?;
        let blocks_end = offset.checked_add(bytes).ok_or_else(too_large)?;
        let chunks = u16::try_from(block.ids.len()).map_err(|_| too_large())?;
        let PackFile { file, path, .. } = self.pack.as_ref();
        shared.ops.ensure_room(file, bytes.into()).map_err(StoreError::from_io)?;
        if let Err(error) = shared.ops.write_at(file, path, &block.bytes, offset.into()) {
            self.pack.fail();
            return Err(StoreError::from_io(error));
        }
        let (kind, digest) = (block.header.kind, block.digest);
        self.entries.push(FooterEntry { offset, bytes, kind, chunks, digest });
        self.info.blocks_end = blocks_end;
        self.info.file_bytes = blocks_end.into();
        self.info.blocks += 1;
        let (session, sequence, ids) = (block.session, block.sequence, block.ids.clone());
        Ok(StoredBlock { session, sequence, kind, offset, bytes, ids })
    }

    fn fits(&self, block: &NewBlock, pack_bytes_max: u64) -> bool {
        let end = u64::from(self.info.blocks_end);
        let is_empty = end <= PACK_HEADER_BYTES as u64;
        let has_room = end + block.bytes.len() as u64 <= pack_bytes_max;
        is_empty || (has_room && self.entries.len() < limits::PACK_BLOCKS_MAX)
    }
}

/// A block in its place, and its pack as it is with it.
struct Written {
    pack: Arc<PackFile>,
    info: PackInfo,
    stored: StoredBlock,
}

/// What was written since the committer last took something.
#[derive(Default)]
struct Batch {
    steps: Vec<Step>,
    bytes: usize,
}

impl Batch {
    fn add(&mut self, written: Written, queued: Queued) {
        let Written { pack, info, stored } = written;
        self.bytes += queued.0.bytes.len();
        let group = self.steps.iter_mut().rev().find_map(|step| match step {
            Step::Commit(group) if Arc::ptr_eq(&group.pack, &pack) => Some(group),
            _ => None,
        });
        if let Some(group) = group {
            group.info = info;
            group.blocks.push(queued);
            group.stored.push(stored);
        } else {
            self.steps.push(Step::Commit(Group { pack, info, blocks: vec![queued], stored: vec![stored] }));
        }
    }

    fn take(&mut self) -> Vec<Step> {
        self.bytes = 0;
        std::mem::take(&mut self.steps)
    }
}

/// The thread's state.
pub(super) struct Appender {
    shared: Arc<Shared>,
    open: HashMap<DomainId, OpenPack>,
    batch: Batch,
    uses: u64,
}

impl Appender {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, open: HashMap::new(), batch: Batch::default(), uses: 0 }
    }

    /// Until the handle is closed or dropped. `committer` takes a batch only when it is idle.
    pub(super) fn run(&mut self, jobs: &Receiver<Job>, committer: &Sender<Vec<Step>>) {
        while let Some(job) = self.next(jobs, committer) {
            match job {
                Job::Block(block, permit) => self.write((block, permit)),
                Job::Seal(asker) => {
                    self.seal_all();
                    self.batch.steps.push(Step::Tell(asker));
                }
                Job::Close => {
                    self.seal_all();
                    break;
                }
            }
        }
        // Fails only if the committer is gone; then nobody gets an answer, as after a crash.
        let _ = committer.send(self.batch.take());
    }

    /// The next job; while waiting for it, what was written goes to the committer as soon as that is idle.
    fn next(&mut self, jobs: &Receiver<Job>, committer: &Sender<Vec<Step>>) -> Option<Job> {
        while !self.batch.steps.is_empty() {
            if self.batch.bytes >= self.shared.options.group_bytes_max {
                committer.send(self.batch.take()).ok()?;
                continue;
            }
            let mut either = Select::new();
            let job = either.recv(jobs);
            either.send(committer);
            let ready = either.select();
            if ready.index() == job {
                return ready.recv(jobs).ok();
            }
            ready.send(committer, self.batch.take()).ok()?;
        }
        jobs.recv().ok()
    }

    fn write(&mut self, queued: Queued) {
        let domain = queued.0.domain;
        let result = self.append(&queued.0).or_else(|error| match error {
            StoreError::Io { source } => {
                tracing::error!(%domain, error = %source, "a pack was closed after an error; its blocks go to a new one");
                self.append(&queued.0)
            }
            other => Err(other),
        });
        match result {
            Ok(written) => self.batch.add(written, queued),
            Err(error) => {
                tracing::error!(%domain, %error, "a block was not stored");
                self.shared.refuse(&queued.0, &error);
            }
        }
    }

    fn append(&mut self, block: &NewBlock) -> Result<Written, StoreError> {
        self.uses += 1;
        let mut open = self.pack_for(block)?;
        open.used = self.uses;
        match open.append(&self.shared, block) {
            Ok(stored) => {
                let written = Written { pack: Arc::clone(&open.pack), info: open.info, stored };
                self.open.insert(block.domain, open);
                Ok(written)
            }
            Err(error) => {
                if open.entries.is_empty() {
                    // An agent that keeps trying on a full disk would otherwise leave a pack without blocks each time.
                    open.pack.remove();
                } else if !open.pack.has_failed() {
                    self.open.insert(block.domain, open);
                }
                Err(error)
            }
        }
    }

    /// The domain's open pack if the block fits into it, or a new one.
    fn pack_for(&mut self, block: &NewBlock) -> Result<OpenPack, StoreError> {
        match self.open.remove(&block.domain) {
            Some(open) if open.pack.has_failed() => {}
            Some(open) if open.fits(block, self.shared.options.pack_bytes_max) => return Ok(open),
            Some(full) => self.batch.steps.push(Step::Seal(full)),
            None => {}
        }
        if self.open.len() >= OPEN_PACKS_MAX {
            let quiet = self.open.iter().min_by_key(|(_, open)| open.used).map(|(&domain, _)| domain);
            let quiet = quiet.and_then(|domain| self.open.remove(&domain));
            self.batch.steps.extend(quiet.map(Step::Seal));
        }
        OpenPack::create(&self.shared, block.domain)
    }

    fn seal_all(&mut self) {
        self.batch.steps.extend(self.open.drain().map(|(_, open)| Step::Seal(open)));
    }
}

fn too_large() -> StoreError {
    StoreError::Refused(FormatError::Invalid { what: "block", why: "too large for a pack" })
}
