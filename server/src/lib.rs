//! Strandline's server.

pub mod pki;
pub mod tls;
