//! What a restore session has handed to the connections of its streams, and how much of that is lost.
//!
//! Invariants: every byte of credit that was handed to a connection is in the end received or lost, never both; a connection
//! that its agent has called over is handed nothing more. It remembers only connections that are not known to be over.

use std::collections::BTreeMap;

use strandline_messages::wire::{Carried, Receipt};
use strandline_messages::{Incarnation, StreamIndex, limits};

#[derive(Debug, Default)]
struct Account {
    /// Handed to connections that are over, bytes.
    over: u64,
    /// Connections before this one are over.
    over_before: Incarnation,
    /// Handed to each that may not be over, bytes.
    open: BTreeMap<Incarnation, u64>,
    /// Lost in all, bytes.
    lost: u64,
}

/// How many blocks each stream's newest connection had a part in, of those connections that had any.
#[derive(Debug, Default)]
pub struct NewestBlocks(BTreeMap<StreamIndex, (Incarnation, u32)>);

impl NewestBlocks {
    /// One more over this connection.
    pub fn count(&mut self, stream: StreamIndex, incarnation: Incarnation) {
        let newest = self.0.entry(stream).or_default();
        let before = if newest.0 == incarnation { newest.1 } else { 0 };
        *newest = (incarnation, before + 1);
    }

    /// Whether these have all come: as many over this connection, or any over a later one.
    pub fn has(&self, carried: &Carried) -> bool {
        self.0.get(&carried.stream).is_some_and(|&newest| newest >= (carried.incarnation, carried.blocks))
    }

    /// As they are told.
    pub fn carried(&self) -> Vec<Carried> {
        let carried = |(&stream, &(incarnation, blocks)): (&StreamIndex, &(Incarnation, u32))| Carried {
            stream,
            incarnation,
            blocks,
        };
        self.0.iter().map(carried).collect()
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct StreamLedger {
    accounts: BTreeMap<StreamIndex, Account>,
}

impl StreamLedger {
    /// Whether this connection may be handed blocks: the agent has not called it over.
    pub fn is_open(&self, stream: StreamIndex, incarnation: Incarnation) -> bool {
        self.accounts.get(&stream).is_none_or(|account| incarnation >= account.over_before)
    }

    /// A block that costs so much was handed to a connection.
    pub fn handed(&mut self, stream: StreamIndex, incarnation: Incarnation, cost: u64) {
        let account = self.accounts.entry(stream).or_default();
        *account.open.entry(incarnation).or_default() += cost;
    }

    /// The agent says what came over the connections that are over; how many bytes more than it said before are lost.
    pub fn settle(&mut self, receipt: &Receipt) -> u64 {
        if receipt.stream.0 >= limits::STREAMS_MAX {
            return 0;
        }
        let account = self.accounts.entry(receipt.stream).or_default();
        account.over_before = account.over_before.max(receipt.over_before);
        let open = account.open.split_off(&account.over_before);
        account.over += std::mem::replace(&mut account.open, open).values().sum::<u64>();
        // An older receipt that comes late says less.
        let lost = if receipt.over_before < account.over_before {
            account.lost
        } else {
            account.over.saturating_sub(receipt.received)
        };
        let more = lost.saturating_sub(account.lost);
        account.lost += more;
        more
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STREAM: StreamIndex = StreamIndex(3);

    fn receipt(over_before: u32, received: u64) -> Receipt {
        Receipt { stream: STREAM, over_before: Incarnation(over_before), received }
    }

    #[test]
    fn what_was_handed_to_a_connection_and_did_not_come_is_lost_once() {
        let mut ledger = StreamLedger::default();
        ledger.handed(STREAM, Incarnation(1), 100);
        ledger.handed(STREAM, Incarnation(1), 100);
        assert_eq!(ledger.settle(&receipt(1, 0)), 0, "it may still come");
        assert_eq!(ledger.settle(&receipt(2, 100)), 100);
        assert_eq!(ledger.settle(&receipt(2, 100)), 0, "the same again");
        ledger.handed(STREAM, Incarnation(2), 50);
        ledger.handed(STREAM, Incarnation(5), 70);
        assert_eq!(ledger.settle(&receipt(3, 150)), 0, "everything came");
        assert_eq!(ledger.settle(&receipt(2, 0)), 0, "an old receipt");
        assert_eq!(ledger.settle(&receipt(6, 150)), 70);
    }

    #[test]
    fn a_connection_that_was_called_over_is_handed_nothing_more() {
        let mut ledger = StreamLedger::default();
        assert!(ledger.is_open(STREAM, Incarnation(1)));
        ledger.settle(&receipt(2, 0));
        assert!(!ledger.is_open(STREAM, Incarnation(1)));
        assert!(ledger.is_open(STREAM, Incarnation(2)));
        assert!(ledger.is_open(StreamIndex(4), Incarnation(1)));
    }

    #[test]
    fn it_remembers_only_connections_that_may_not_be_over() {
        let mut ledger = StreamLedger::default();
        for incarnation in 1..1000 {
            ledger.handed(STREAM, Incarnation(incarnation), 10);
            ledger.settle(&receipt(incarnation + 1, 0));
        }
        assert!(ledger.accounts.values().all(|account| account.open.is_empty()));
    }
}
