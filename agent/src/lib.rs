//! Strandline's agent: what runs on the machine whose files are saved, and the command `strand`.
//!
//! `scan`, `chunk`, `cache` and `backup` turn files into sealed blocks; `trees` and `restore` turn blocks into files again;
//! `export` turns them into one stream, `mount` into a file system, `survey` looks into snapshots without their content;
//! `repack` and `verify` look after what is stored; `keys` and `seal` hold the cryptography; `net` and `embedded` reach a
//! server; `job` runs one backup from end to end; `cli` is the command line. Only `embedded` knows the server's crate.

pub mod backup;
pub mod cache;
pub mod chunk;
pub mod cli;
pub mod embedded;
pub mod export;
pub mod identity;
pub mod job;
pub mod keys;
pub mod mount;
pub mod net;
pub mod repack;
pub mod restore;
pub mod scan;
pub mod seal;
pub mod survey;
pub mod trees;
pub mod verify;
