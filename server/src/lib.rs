//! Strandline's server: the storage engine and, around it, everything that speaks to the network.

pub mod catalog;
pub mod engine;
pub mod index;
pub mod storage;
