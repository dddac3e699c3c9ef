//! The backup pipeline: from files to sealed blocks, without any networking.
//!
//! ```text
//! scan workers ─▶ feeder ─────────▶ readers ──────▶ assembler ─────▶ sealers ─▶ BlockSink
//!  list, statx    walk, file cache   read, cut, hash  queries, trees,  compress,
//!                 batches            in parallel      blocks, cache    encrypt
//! ```
//! The feeder hands out batches in scan order; readers take them in that order and the assembler consumes their parts in
//! that order, so no lock orders anything. Every channel is bounded; a part is about 1 MiB; chunks wait for the
//! server's answer within `blocks::HELD_BYTES_MAX`. Nothing grows with the number of files or chunks.
//!
//! The wait-for graph is a line from left to right: each stage waits only for the ones right of it, the sealers only for
//! the sink. Blocks of trees are sealed by one thread, so that children are always sent before their parents.

mod assemble;
pub(crate) mod blocks;
mod feed;
mod items;
pub mod ports;
pub mod progress;
mod reader;
mod run;
mod seal_stage;
mod stream;
mod trees;

pub use self::run::{BackupPlan, CacheTrust, ChunkKeys, PassOutcome, run_pass};
pub use self::stream::{Pipe, StreamSource};

/// Why a backup cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// None of the paths exists.
    #[error("none of the paths given exists; nothing was saved: check their spelling")]
    NoSource,
    /// The user or the daemon stopped it.
    #[error("the backup was interrupted; earlier snapshots are intact: run it again")]
    Cancelled,
    /// A path pattern is not valid.
    #[error(transparent)]
    Pattern(#[from] crate::scan::exclude::PatternError),
    /// The machine failed the program itself (threads, temporary files).
    #[error("{what} failed: {source}; no snapshot was made, earlier ones are intact")]
    Machine {
        /// What was being done.
        what: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// A query came back with another number of answers.
    #[error(
        "the server answered {answered} of {asked} questions; no snapshot was made, earlier ones are intact: its version may not fit this program"
    )]
    Answer {
        /// Ids asked.
        asked: usize,
        /// Answers.
        answered: usize,
    },
    /// What was to be read from a pipe is not complete.
    #[error("{0}; no snapshot was made, earlier ones are intact")]
    Stream(String),
    /// Whoever asks, seals or sends has failed.
    #[error(transparent)]
    Port(Box<dyn std::error::Error + Send + Sync>),
    /// Another part of the pipeline stopped first; its error is the one to look at.
    #[error(
        "the backup pipeline stopped; no snapshot was made, earlier ones are intact: this is a bug if nothing else is reported"
    )]
    Stopped,
}

#[cfg(test)]
mod memory_server;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_live;
