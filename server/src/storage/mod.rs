//! Directory storage: where packs, manifests, receipts and key slots live. The truth from which all else is derived.
//!
//! Invariants: nothing in here is ever truncated; every file except a pack is written whole under a temporary name, synced,
//! renamed, and its directory synced; a pack is only appended to, and only by its [`pack_writer::PackWriter`].

pub mod files;
pub mod journal;
pub mod layout;
pub mod lock;
pub mod pack_file;
pub mod pack_reader;
pub mod pack_state;
pub mod pack_writer;
pub mod store_error;

use std::io;
use std::path::{Path, PathBuf};

use strandline_messages::format::FormatError;

/// Why the storage could not do what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum StorageError {
    /// The operating system refused.
    #[error("cannot {doing} {path}: {source}; what was stored before is untouched", path = .path.display())]
    Io {
        /// What was being done ("open", "sync").
        doing: &'static str,
        /// To which file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: io::Error,
    },
    /// A file is not what its name says.
    #[error("{path} is not usable: {source}; other files are not affected", path = .path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: FormatError,
    },
    /// A block on disk is not the block that was stored.
    #[error("the block at offset {offset} of pack {pack:08x} is damaged: {source}; other blocks are intact")]
    Damaged {
        /// The pack's number.
        pack: u32,
        /// Where the block begins in it.
        offset: u32,
        /// What is wrong with it.
        source: FormatError,
    },
    /// A pack is not there (any more).
    #[error(
        "pack {pack:08x} is not there: it was removed in this moment, its needed blocks being elsewhere, or it is lost; other packs are intact; try again"
    )]
    Gone {
        /// The pack's number.
        pack: u32,
    },
    /// Another process owns the data directory.
    #[error("{path} is in use by {holder}; nothing was changed; wait for it to end or raise --lock-wait", path = .path.display())]
    Locked {
        /// The data directory.
        path: PathBuf,
        /// Who holds it, as that process wrote it down.
        holder: String,
    },
}

impl StorageError {
    pub(crate) fn io(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Io { doing, path, source }
    }

    pub(crate) fn format(path: &Path) -> impl FnOnce(FormatError) -> Self {
        let path = path.to_path_buf();
        move |source| Self::Format { path, source }
    }
}
