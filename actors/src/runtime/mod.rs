//! What actors share: the clock, byte budgets, memory for blocks, connections, and the link that feeds a connection's frames to its actor.

pub mod budget;
pub mod buffer;
pub mod clock;
pub mod link;
pub mod transport;
