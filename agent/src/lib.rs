//! Strandline's agent: what runs on the machine whose files are saved, and the command `strand`.
//!
//! `scan`, `chunk`, `cache` and `backup` turn files into sealed blocks; `trees`, `restore` and `mount` turn blocks into files again;
//! `keys` and `seal` hold the cryptography; `net` and `embedded` reach a server; `job` runs one backup from end to end;
//! `cli` is the command line. Only `embedded` knows the server's crate.

pub mod backup;
pub mod cache;
pub mod chunk;
pub mod cli;
pub mod embedded;
pub mod identity;
pub mod job;
pub mod keys;
pub mod mount;
pub mod net;
pub mod restore;
pub mod scan;
pub mod seal;
pub mod trees;
