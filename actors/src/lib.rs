//! Strandline's behaviour: pure machines that decide, and actix actors that drive them.
//!
//! `machines` hold every protocol decision and do no I/O: time is an argument, outputs are polled. The actors own the
//! machines and their resources. Nothing here names a file system, a database or TLS.

pub mod control_channel;
pub mod control_host;
pub mod dispatcher;
pub mod fetcher;
pub mod gap_tracker;
pub mod machines;
pub mod planted;
pub mod ports;
pub mod runtime;
pub mod session;
pub mod session_registry;
pub mod stream;
pub mod stream_pool;
