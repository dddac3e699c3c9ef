//! What actors share: the clock, byte budgets, connections, and the link that feeds a connection's frames to its actor.

pub mod budget;
pub mod clock;
pub mod link;
pub mod transport;
