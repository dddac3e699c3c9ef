//! Between the agent's plain threads and the actors that speak to a server.

mod client;
mod oracle;
mod source;
pub mod tls;

pub use client::{Client, ClientError, RepositoryInfo, SessionSettings, SnapshotListing};
pub use oracle::{NetworkOracle, WindowSink};
pub use source::{BlockSource, NetworkSource};
