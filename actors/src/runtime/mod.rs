//! What actors share: the clock.

pub mod clock;
