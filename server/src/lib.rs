//! Strandline's server: the storage engine and, around it, everything that speaks to the network.
//!
//! Who may come in (`pki`, `tls`, `tenancy`, `admission`), how connections become actors (`listener`, `core`, `host`), where blocks
//! and snapshots are (`engine` over `storage`, `index` and `catalog`), what is done to them by itself and after a disaster
//! (`maintenance`, `rescue`, `inspect`), how it is told what to do (`config`, `admin`, `cli`), and the process itself (`serve`).

pub mod admin;
pub mod admission;
pub mod catalog;
pub mod cli;
pub mod config;
pub mod core;
pub mod engine;
mod failpoint;
pub mod host;
pub mod index;
pub mod inspect;
pub mod listener;
pub mod maintenance;
mod manage;
pub mod pki;
pub mod rescue;
pub mod serve;
pub mod storage;
pub mod tenancy;
pub mod tls;
