//! Strandline's agent: what runs on the machine whose files are saved, and the command `strand`.
//!
//! `scan`, `chunk`, `cache` and `backup` turn files into sealed blocks; `trees` and `restore` turn blocks into files again;
//! `keys` and `seal` hold the cryptography; `net` and `embedded` reach a server; `job` runs one backup from end to end; `repack` and `verify` look after
//! what is stored;
//! `cli` is the command line. Only `embedded` knows the server's crate.

pub mod backup;
pub mod cache;
pub mod chunk;
pub mod cli;
pub mod embedded;
pub mod identity;
pub mod job;
pub mod keys;
pub mod net;
pub mod repack;
pub mod restore;
pub mod scan;
pub mod seal;
pub mod trees;
pub mod verify;
