//! Strandline's agent: what runs on the machine whose files are saved, and the command `strand`.

pub mod keys;
pub mod restore;
pub mod seal;
pub mod trees;
