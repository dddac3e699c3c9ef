//! Pure machines: every protocol decision, without I/O, clocks or randomness of their own.

pub mod session;
pub mod stream;
