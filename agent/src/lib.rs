//! Strandline's agent: what runs on the machine whose files are saved, and the command `strand`.

pub mod keys;
pub mod seal;
//! Strandline's agent: reads files, deduplicates, compresses, encrypts and sends them; restores them.

pub mod backup;
pub mod cache;
pub mod chunk;
pub mod scan;
