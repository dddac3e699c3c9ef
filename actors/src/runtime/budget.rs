//! A budget of bytes that plain threads wait for and actors give back: the bound of the send window.

use std::sync::Arc;

use parking_lot::{Condvar, Mutex};

/// The budget was closed: the session has ended, and nothing more will be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the session has ended")]
pub struct BudgetClosed;

#[derive(Debug)]
struct State {
    free: usize,
    total: usize,
    closed: bool,
}

/// See the module. Cheap to clone.
#[derive(Clone, Debug)]
pub struct ByteBudget {
    shared: Arc<(Mutex<State>, Condvar)>,
}

impl ByteBudget {
    /// `total` bytes, all free.
    pub fn new(total: usize) -> Self {
        Self { shared: Arc::new((Mutex::new(State { free: total, total, closed: false }), Condvar::new())) }
    }

    /// Waits until `bytes` are free and takes them. More than the total is taken when everything is free.
    pub fn acquire(&self, bytes: usize) -> Result<Reservation, BudgetClosed> {
        let (state, changed) = &*self.shared;
        let mut state = state.lock();
        let bytes = bytes.min(state.total);
        while state.free < bytes && !state.closed {
            changed.wait(&mut state);
        }
        if state.closed {
            return Err(BudgetClosed);
        }
        state.free -= bytes;
        Ok(Reservation { budget: self.clone(), bytes })
    }

    /// Gives bytes back.
    pub fn release(&self, bytes: usize) {
        let (state, changed) = &*self.shared;
        let mut state = state.lock();
        state.free = state.total.min(state.free + bytes);
        changed.notify_all();
    }

    /// Wakes everybody: nothing more will be sent.
    pub fn close(&self) {
        let (state, changed) = &*self.shared;
        state.lock().closed = true;
        changed.notify_all();
    }

    /// Bytes taken now.
    pub fn taken(&self) -> usize {
        let state = self.shared.0.lock();
        state.total - state.free
    }
}

/// Bytes taken from a budget; given back when dropped, unless kept.
#[derive(Debug)]
pub struct Reservation {
    budget: ByteBudget,
    bytes: usize,
}

impl Reservation {
    /// Keeps at most `bytes` of it taken until somebody calls [`ByteBudget::release`], and gives the rest back.
    /// Returns what is kept.
    pub fn keep(mut self, bytes: usize) -> usize {
        let kept = bytes.min(self.bytes);
        self.bytes -= kept;
        kept
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget.release(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_kept_comes_back() {
        let budget = ByteBudget::new(100);
        let kept = budget.acquire(80).unwrap().keep(30);
        assert_eq!((kept, budget.taken()), (30, 30));
        drop(budget.acquire(70).unwrap());
        budget.release(kept);
        assert_eq!(budget.taken(), 0);
    }

    #[test]
    fn more_than_everything_waits_for_everything() {
        let budget = ByteBudget::new(10);
        assert_eq!(budget.acquire(50).unwrap().keep(50), 10);
    }

    #[test]
    fn closing_wakes_whoever_waits() {
        let budget = ByteBudget::new(10);
        let held = budget.acquire(10).unwrap();
        let waiting = {
            let budget = budget.clone();
            std::thread::spawn(move || budget.acquire(1).err())
        };
        budget.close();
        assert_eq!(waiting.join().unwrap(), Some(BudgetClosed));
        drop(held);
    }
}
