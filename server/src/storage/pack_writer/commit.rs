//! The syncing thread: it makes what was written durable, has it indexed, and confirms it, in this order.

use std::sync::Arc;

use crossbeam_channel::Receiver;
use tokio::sync::oneshot;

use super::append::{OpenPack, PackFile};
use super::{Queued, Shared, StoredBlock};
use crate::storage::pack_file::{self, PackInfo};
use crate::storage::store_error::StoreError;

/// Blocks of one pack that one sync makes durable.
pub(super) struct Group {
    pub(super) pack: Arc<PackFile>,
    /// The pack as it is with these blocks.
    pub(super) info: PackInfo,
    pub(super) blocks: Vec<Queued>,
    pub(super) stored: Vec<StoredBlock>,
}

impl Group {
    /// Whether nothing of its pack was durable before.
    fn is_first(&self) -> bool {
        self.info.blocks as usize == self.stored.len()
    }
}

/// What the writing thread asks for. The steps of one pack come in the order in which it was written.
pub(super) enum Step {
    Commit(Group),
    /// The pack gets no more blocks.
    Seal(OpenPack),
    /// Everything before this was done.
    Tell(oneshot::Sender<()>),
}

/// Until the writing thread ends.
pub(super) fn run(shared: &Shared, batches: &Receiver<Vec<Step>>) {
    for step in batches.iter().flatten() {
        match step {
            Step::Commit(group) => commit(shared, &group),
            Step::Seal(open) => seal(shared, &open),
            // Whoever asked may have gone away.
            Step::Tell(asker) => drop(asker.send(())),
        }
    }
}

fn commit(shared: &Shared, group: &Group) {
    let result = match make_durable(shared, group) {
        Err(StoreError::Io { source }) => {
            let domain = group.info.domain;
            tracing::error!(%domain, error = %source, "a pack was closed after an error; its blocks go to a new one");
            store_elsewhere(shared, group)
        }
        other => other,
    };
    if let Err(error) = &result {
        tracing::error!(domain = %group.info.domain, blocks = group.blocks.len(), %error, "blocks were not stored");
    }
    for (block, _permit) in &group.blocks {
        match &result {
            Ok(()) => shared.confirm(block),
            Err(error) => shared.refuse(block, error),
        }
    }
}

fn make_durable(shared: &Shared, group: &Group) -> Result<(), StoreError> {
    let Group { pack, info, stored, .. } = group;
    if let Err(error) = sync(shared, group) {
        pack.fail();
        if group.is_first() {
            pack.remove();
        }
        return Err(error);
    }
    if group.is_first() {
        shared.sink.pack_changed(*info);
    }
    shared.sink.stored(*info, stored).map_err(|reason| {
        pack.fail();
        StoreError::Index { reason: reason.into() }
    })
}

fn sync(shared: &Shared, group: &Group) -> Result<(), StoreError> {
    let pack = &group.pack;
    if pack.has_failed() {
        let source = Arc::new(std::io::Error::other("the pack failed before these blocks were synced"));
        return Err(StoreError::Io { source });
    }
    let synced = shared
        .ops
        .sync(&pack.file, &pack.path)
        .and_then(|()| if group.is_first() { shared.ops.sync_directory(&shared.paths.packs()) } else { Ok(()) });
    synced.map_err(StoreError::from_io)
}

/// The second attempt: the blocks of a pack that failed get a pack of their own.
fn store_elsewhere(shared: &Shared, group: &Group) -> Result<(), StoreError> {
    let mut open = OpenPack::create(shared, group.info.domain)?;
    let mut blocks = group.blocks.iter();
    let stored = match blocks.try_fold(Vec::new(), |mut stored, (block, _)| {
        stored.push(open.append(shared, block)?);
        Ok(stored)
    }) {
        Ok(stored) => stored,
        Err(error) => {
            open.pack.remove();
            return Err(error);
        }
    };
    let again = Group { pack: Arc::clone(&open.pack), info: open.info, blocks: Vec::new(), stored };
    make_durable(shared, &again)?;
    seal(shared, &open);
    Ok(())
}

/// Writes the footer. If that fails, recovery does it at the next start.
fn seal(shared: &Shared, open: &OpenPack) {
    let OpenPack { pack, info, entries, .. } = open;
    if pack.has_failed() {
        return;
    }
    match pack_file::seal(shared.ops.as_ref(), &pack.file, &pack.path, entries, info.blocks_end.into()) {
        Ok(file_bytes) => shared.sink.pack_changed(PackInfo { sealed: true, file_bytes, ..*info }),
        Err(error) => {
            tracing::warn!(pack = info.number, %error, "a pack could not be sealed; its blocks are intact, the next start seals it");
        }
    }
}
