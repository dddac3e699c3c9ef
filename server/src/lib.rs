//! Strandline's server: who may come in (`pki`, `tls`, `tenancy`), how it is told what to do (`config`, `admin`, `cli`),
//! and the process itself (`serve`).

pub mod admin;
pub mod cli;
pub mod config;
pub mod data_dir;
pub mod pki;
pub mod serve;
pub mod tenancy;
pub mod tls;
//! Strandline's server: the storage engine and, around it, everything that speaks to the network.

pub mod catalog;
pub mod engine;
pub mod index;
pub mod storage;
