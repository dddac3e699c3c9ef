//! Strandline's server.

pub mod config;
pub mod pki;
pub mod tenancy;
pub mod tls;
