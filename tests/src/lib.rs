//! What the whole-system tests are made of: nasty trees, an exact comparison, a proxy that cuts connections, a client that
//! says what no agent would, and the real processes. Nothing here is part of the product.

pub mod clock;
pub mod compare;
pub mod corpus;
pub mod fuzz;
pub mod gc_model;
pub mod mortal;
pub mod mounts;
pub mod mutate;
pub mod process;
pub mod proxy;
pub mod random;
pub mod ranges;
pub mod raw;
pub mod rig;
pub mod sockets;
pub mod world;
