//! Strandline's agent: reads files, deduplicates, compresses, encrypts and sends them; restores them.

pub mod backup;
pub mod cache;
pub mod chunk;
pub mod scan;
