//! Strandline's agent.

pub mod identity;
