//! The key slots of a repository: files in `keys/`, named after the slots' ids.
//!
//! Invariants: every slot that was added decodes and belongs to this repository; at least one that does stays; at most
//! [`limits::KEY_SLOTS_MAX`] are kept, which have at most [`limits::KEY_SLOTS_BYTES_MAX`] in all. Adding and removing are one at a time, so that two removals cannot take the last two.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use data_encoding::HEXLOWER;
use strandline_messages::format::keys::{KeySlotV1, SlotKind};
use strandline_messages::format::repository::RepositoryV1;
use strandline_messages::{RepositoryId, limits};

use super::{EngineError, Repository, blocking};
use crate::failpoint;
use crate::storage::{StorageError, files};

/// Encoded slots with the names of their files.
pub(super) type NamedSlots = Vec<(String, Vec<u8>)>;

impl Repository {
    /// The encoded key slots, by name, within the limits.
    pub async fn slots(&self) -> Result<Vec<Vec<u8>>, EngineError> {
        let directory = self.state.paths.keys();
        blocking(move || {
            let (mut slots, mut bytes) = (Vec::new(), 0);
            for (_, path) in list(&directory)?.into_iter().take(limits::KEY_SLOTS_MAX) {
                let Some(slot) = files::read_small(&path, limits::KEY_SLOT_BYTES_MAX)? else { continue };
                bytes += slot.len();
                if bytes > limits::KEY_SLOTS_BYTES_MAX {
                    break;
                }
                slots.push(slot);
            }
            Ok(slots)
        })
        .await
    }

    /// Adds an encoded key slot; durable when this returns. The same slot again changes nothing. Refused with
    /// [`EngineError::SlotNotAdded`]: one that does not decode, belongs to another repository, takes the id of a slot that
    /// is there, or is one too many.
    pub async fn add_slot(&self, slot: Vec<u8>) -> Result<(), EngineError> {
        let (directory, repository) = (self.state.paths.keys(), self.state.file.id);
        let one_at_a_time = Arc::clone(&self.slot_changes);
        blocking(move || {
            let _changing = one_at_a_time.lock();
            add(&directory, repository, &slot)
        })
        .await
    }

    /// Removes a key slot; it stays removed after a power cut when this returns. [`EngineError::NoSuchSlot`] if it is not
    /// there, [`EngineError::LastSlot`] if no other is left that a key could open.
    pub async fn remove_slot(&self, id: [u8; 16]) -> Result<(), EngineError> {
        let (directory, repository) = (self.state.paths.keys(), self.state.file.id);
        let one_at_a_time = Arc::clone(&self.slot_changes);
        blocking(move || {
            let _changing = one_at_a_time.lock();
            remove(&directory, repository, &id)
        })
        .await
    }
}

/// The slots of a new repository with their names, checked.
pub(super) fn named_slots(file: &RepositoryV1, slots: Vec<Vec<u8>>) -> Result<NamedSlots, EngineError> {
    let refused = |reason: &str| EngineError::BadSlot { reason: reason.to_owned() };
    if let Some(limit) = exceeded(&slots) {
        return Err(refused(&limit));
    }
    let mut named = NamedSlots::new();
    for bytes in slots {
        let slot = KeySlotV1::decode(&bytes).map_err(|error| refused(&error.to_string()))?;
        if slot.repository != file.id {
            return Err(refused("one belongs to another repository"));
        }
        named.push((HEXLOWER.encode(&slot.id), bytes));
    }
    Ok(named)
}

/// The limit that these slots of one repository exceed together.
fn exceeded(slots: &[Vec<u8>]) -> Option<String> {
    let (count_max, bytes_max, passphrases_max) =
        (limits::KEY_SLOTS_MAX, limits::KEY_SLOTS_BYTES_MAX, limits::PASSPHRASE_SLOTS_MAX);
    if slots.len() > count_max {
        return Some(format!("the limit is {count_max}"));
    }
    if slots.iter().map(Vec::len).sum::<usize>() > bytes_max {
        return Some(format!("the limit is {} KiB for all", bytes_max >> 10));
    }
    let is_passphrase =
        |slot: &&Vec<u8>| KeySlotV1::decode(slot).is_ok_and(|slot| matches!(slot.kind, SlotKind::Passphrase { .. }));
    // On one more no passphrase would be tried.
    let passphrases = slots.iter().filter(is_passphrase).count();
    (passphrases > passphrases_max).then(|| format!("the limit is {passphrases_max} for passphrases"))
}

fn add(directory: &Path, repository: RepositoryId, bytes: &[u8]) -> Result<(), EngineError> {
    let refused = |reason: String| EngineError::SlotNotAdded { reason };
    let slot = KeySlotV1::decode(bytes).map_err(|error| refused(error.to_string()))?;
    if slot.repository != repository {
        return Err(refused(format!("it belongs to repository {}", slot.repository)));
    }
    files::remove_temporaries(directory)?;
    let name = HEXLOWER.encode(&slot.id);
    let path = directory.join(&name);
    if let Some(there) = files::read_small(&path, limits::KEY_SLOT_BYTES_MAX)? {
        // A request whose answer was lost comes again.
        return if there == bytes { Ok(()) } else { Err(refused(format!("there is another slot {name}"))) };
    }
    let mut slots = vec![bytes.to_vec()];
    for (_, path) in list(directory)? {
        slots.extend(files::read_small(&path, limits::KEY_SLOT_BYTES_MAX)?);
    }
    if let Some(limit) = exceeded(&slots) {
        let count = slots.len() - 1;
        return Err(refused(format!("there are {count} already, and {limit}; remove one that nobody needs")));
    }
    Ok(files::write_atomically(&path, bytes)?)
}

fn remove(directory: &Path, repository: RepositoryId, id: &[u8; 16]) -> Result<(), EngineError> {
    let name = HEXLOWER.encode(id);
    let slots = list(directory)?;
    if !slots.iter().any(|(found, _)| *found == name) {
        return Err(EngineError::NoSuchSlot { id: name });
    }
    let mut others = slots.iter().filter(|(found, _)| *found != name);
    if !others.any(|(found, path)| is_usable(path, repository, found)) {
        return Err(EngineError::LastSlot { id: name });
    }
    let path = directory.join(&name);
    std::fs::remove_file(&path).map_err(StorageError::io("remove", &path))?;
    failpoint::reached("slot/removed");
    Ok(files::sync_directory(directory)?)
}

/// Whether a key could open it: a slot that is damaged opens for nobody and does not count as one that is left.
fn is_usable(path: &Path, repository: RepositoryId, name: &str) -> bool {
    let read = files::read_small(path, limits::KEY_SLOT_BYTES_MAX).ok().flatten();
    let slot = read.and_then(|bytes| KeySlotV1::decode(&bytes).ok());
    slot.is_some_and(|slot| slot.repository == repository && HEXLOWER.encode(&slot.id) == name)
}

/// The files of the directory whose names are those of slots, by name. What was left unfinished is none.
fn list(directory: &Path) -> Result<Vec<(String, PathBuf)>, EngineError> {
    let failed = || StorageError::io("list", directory);
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(failed())? {
        let entry = entry.map_err(failed())?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let named = HEXLOWER.decode(name.as_bytes()).is_ok_and(|id| id.len() == 16);
        if named {
            found.push((name, entry.path()));
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use strandline_messages::format::keys::SlotKind;

    use super::*;
    use crate::engine::fixture::{REPOSITORY, open, repository, repository_file, tenant};

    fn slot(n: u8) -> Vec<u8> {
        slot_of(REPOSITORY, [n; 16], "label")
    }

    fn slot_of(repository: RepositoryId, id: [u8; 16], label: &str) -> Vec<u8> {
        sealed_slot(repository, id, label, 300)
    }

    fn sealed_slot(repository: RepositoryId, id: [u8; 16], label: &str, bytes: usize) -> Vec<u8> {
        let (label, salt, sealed) = (label.to_owned(), [7; 32], vec![9; bytes]);
        KeySlotV1 { repository, id, created_ns: 5, label, kind: SlotKind::KeyFile, salt, sealed }.encode()
    }

    #[actix_rt::test]
    async fn slots_come_and_go_and_outlive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let engine = open(dir.path()).await;
        let one = repository(&engine).await;
        one.add_slot(slot(2)).await.unwrap();
        one.add_slot(slot(1)).await.unwrap();
        one.add_slot(slot(3)).await.unwrap();
        one.remove_slot([2; 16]).await.unwrap();
        assert_eq!(one.slots().await.unwrap(), [slot(1), slot(3)]);
        engine.close().await.unwrap();
        let engine = open(dir.path()).await;
        assert_eq!(repository(&engine).await.slots().await.unwrap(), [slot(1), slot(3)]);
    }

    #[actix_rt::test]
    async fn the_last_slot_that_can_be_opened_is_never_removed() {
        let dir = tempfile::tempdir().unwrap();
        let engine = open(dir.path()).await;
        let one = repository(&engine).await;
        one.add_slot(slot(1)).await.unwrap();
        assert!(matches!(one.remove_slot([1; 16]).await, Err(EngineError::LastSlot { .. })));
        one.add_slot(slot(2)).await.unwrap();
        std::fs::write(one.state.paths.keys().join("02".repeat(16)), b"rot").unwrap();
        assert!(matches!(one.remove_slot([1; 16]).await, Err(EngineError::LastSlot { .. })), "a damaged one is none");
        one.remove_slot([2; 16]).await.unwrap();
        assert_eq!(one.slots().await.unwrap(), [slot(1)]);
        assert!(matches!(one.remove_slot([2; 16]).await, Err(EngineError::NoSuchSlot { .. })));
    }

    #[actix_rt::test]
    async fn two_removals_at_once_leave_one_slot() {
        let dir = tempfile::tempdir().unwrap();
        let engine = open(dir.path()).await;
        let one = repository(&engine).await;
        one.add_slot(slot(1)).await.unwrap();
        one.add_slot(slot(2)).await.unwrap();
        let both = futures_util::future::join(one.remove_slot([1; 16]), one.remove_slot([2; 16])).await;
        assert!(both.0.is_ok() ^ both.1.is_ok(), "{both:?}");
        assert_eq!(one.slots().await.unwrap().len(), 1);
    }

    #[actix_rt::test]
    async fn slots_that_are_damaged_foreign_too_many_or_in_anothers_place_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let engine = open(dir.path()).await;
        let one = repository(&engine).await;
        one.add_slot(slot(1)).await.unwrap();
        let refused = |result: Result<(), EngineError>, words: &str| match result {
            Err(EngineError::SlotNotAdded { reason }) => assert!(reason.contains(words), "{reason}"),
            other => panic!("{other:?}"),
        };
        let mut damaged = slot(2);
        damaged[60] ^= 1;
        refused(one.add_slot(damaged).await, "digest");
        refused(one.add_slot(vec![0; limits::KEY_SLOT_BYTES_MAX + 1]).await, "key slot");
        refused(one.add_slot(slot_of(RepositoryId([1; 16]), [2; 16], "")).await, "belongs to repository");
        refused(one.add_slot(slot_of(REPOSITORY, [1; 16], "other")).await, "another slot 0101");
        one.add_slot(slot(1)).await.unwrap();
        let room = limits::KEY_SLOTS_BYTES_MAX - slot(1).len();
        let long = |n: u8| sealed_slot(REPOSITORY, [n; 16], "", 15 << 10);
        let fit = u8::try_from(room / long(2).len()).unwrap();
        for n in 2..2 + fit {
            one.add_slot(long(n)).await.unwrap();
        }
        refused(one.add_slot(long(200)).await, "the limit is 896 KiB");
        assert_eq!(one.slots().await.unwrap().len(), 1 + usize::from(fit));
    }

    #[actix_rt::test]
    async fn no_passphrase_gets_a_slot_on_which_it_would_not_be_tried() {
        let dir = tempfile::tempdir().unwrap();
        let engine = open(dir.path()).await;
        let one = repository(&engine).await;
        let passphrase = |n: u8| {
            let mut slot = KeySlotV1::decode(&slot(n)).unwrap();
            slot.kind = SlotKind::Passphrase { memory_kib: 8, passes: 1, lanes: 1 };
            slot.encode()
        };
        let most = u8::try_from(limits::PASSPHRASE_SLOTS_MAX).unwrap();
        for n in 1..=most {
            one.add_slot(passphrase(n)).await.unwrap();
        }
        let refused = one.add_slot(passphrase(most + 1)).await.unwrap_err().to_string();
        assert!(refused.contains("for passphrases; remove one"), "{refused}");
        one.add_slot(slot(most + 1)).await.unwrap();
    }

    #[actix_rt::test]
    async fn what_a_dead_writer_left_unfinished_is_no_slot() {
        let dir = tempfile::tempdir().unwrap();
        let engine = open(dir.path()).await;
        let file = repository_file("main");
        let one = engine.create_repository(&tenant(), file, vec![slot(1)]).await.unwrap();
        std::fs::write(one.state.paths.keys().join(".unfinished-x"), b"half").unwrap();
        assert_eq!(one.slots().await.unwrap(), [slot(1)]);
        one.add_slot(slot(2)).await.unwrap();
        assert_eq!(std::fs::read_dir(one.state.paths.keys()).unwrap().count(), 2);
    }
}
