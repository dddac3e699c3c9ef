//! x
#[cfg(test)] pub(crate) mod fixture {}
