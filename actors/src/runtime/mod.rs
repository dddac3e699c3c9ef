//! What actors share: the clock, connections, and the link that feeds a connection's frames to its actor.

pub mod clock;
pub mod link;
pub mod transport;
