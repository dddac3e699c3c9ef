//! Strandline's server: who may come in (`pki`, `tls`, `tenancy`), how it is told what to do (`config`, `admin`, `cli`),
//! and the process itself (`serve`).

pub mod admin;
pub mod config;
pub mod data_dir;
pub mod pki;
pub mod tenancy;
pub mod tls;
