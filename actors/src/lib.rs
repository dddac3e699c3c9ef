//! Strandline's behaviour: pure machines that decide, and actix actors that drive them.
//!
//! `machines` hold every protocol decision and do no I/O: time is an argument, outputs are polled. The actors own the
//! machines and their resources. Nothing here names a file system, a database or TLS.

pub mod machines;
pub mod runtime;
