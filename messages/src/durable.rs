//! The type-level half of guarantee G1: *acknowledged means durable*.

/// Marks the one type of a process that makes bytes durable (a storage writer). Nothing else implements it.
///
/// A tidy test in `tests/` counts the implementations outside test code.
pub trait DurableWriter {}

/// A value whose bytes have reached stable storage and are indexed.
///
/// Only a [`DurableWriter`] can make one, after its fsync of file and directory (or the object store's confirmation) has
/// returned. Acknowledgements are built from `Durable<Sequence>` and from nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Durable<T>(T);

impl<T> Durable<T> {
    /// States that `value` is durable. `_writer` is the storage writer that has just synced it.
    pub fn confirmed_by<W: DurableWriter>(_writer: &W, value: T) -> Self {
        Self(value)
    }

    /// The value.
    pub fn get(&self) -> &T {
        &self.0
    }

    /// The value, consuming the proof.
    pub fn into_inner(self) -> T {
        self.0
    }
}
