//! One state for all that differ only in what nothing can tell apart: numbers of epochs, order of copies, order of sessions.

use super::state::{Block, BlockCode, Gc, State};
use super::{Model, Rule, has};

impl<const B: usize, const S: usize> Model<B, S> {
    /// The representative of a state.
    pub(crate) fn canonical(&self, state: &State<B, S>) -> State<B, S> {
        let mut state = *state;
        self.forget(&mut state);
        self.renumber(&mut state);
        self.sort_copies(&mut state);
        if S == 2 && state.sessions[0] > state.sessions[1] {
            swap_sessions(&mut state);
        }
        state
    }

    /// Takes steps that nothing can notice, and forgets what no step can depend on, as long as the rules hold that make it so.
    fn forget(&self, state: &mut State<B, S>) {
        if self.keeps(Rule::CommitAssertsFence) {
            // Its transaction will fail.
            state.zombie = 0;
        }
        let noticed = [Rule::JournalBeforePunch, Rule::JournalWins, Rule::FreeingIsFinal, Rule::FreedIsUnknown];
        let punched = noticed.into_iter().all(|rule| self.keeps(rule));
        for (block, row) in state.blocks.iter_mut().zip(&mut state.durable.blocks) {
            if punched && block.code == BlockCode::Journalled {
                block.code = BlockCode::Freed;
            }
            if punched && self.shape.drops_at_once && matches!(block.code, BlockCode::Freed | BlockCode::Withdrawn) {
                (*block, *row) = (Block::default(), (BlockCode::Absent, 0));
            }
            let gone = !matches!(block.code, BlockCode::Condemned) && !block.code.is_live();
            if gone && self.keeps(Rule::FreedIsUnknown) {
                // Nobody asks whether it is complete.
                (block.flagged, block.flagged_on_disk) = (false, false);
            }
        }
        if state.gc == Gc::Sweeping && !self.shape.long_runs && !state.blocks.iter().copied().any(is_condemned) {
            // There is nothing to free: it ends.
            state.gc = Gc::Idle;
        }
        // All flags of unmarked trees fall, listed or logged: what was listed when makes no difference.
        let all_fall = self.keeps(Rule::UnmarkedAreUnflagged) && self.keeps(Rule::LateFlagsFall);
        let unmarked = |needed: u16| (0..B).filter(move |at| !has(needed, self.shape.chunk_of(*at)));
        match &mut state.gc {
            Gc::Enumerated { needed, flagged, log, .. } if !all_fall => {
                let mask = unmarked(*needed).fold(0, |set, at| set | 1 << at);
                (*flagged, *log) = (*flagged & mask, *log & mask & !*flagged);
            }
            _ => {}
        }
        let live = (0..B).filter(|at| state.blocks[*at].code == BlockCode::Live).fold(0, |set, at| set | 1 << at);
        let condemned = (0..B).filter(|at| is_condemned(state.blocks[*at])).fold(0, |set, at| set | 1 << at);
        let there = self.keeps(Rule::CondemnOnlyWhatWasThere);
        if let Gc::Walked { condemn, revive, .. } | Gc::Enumerated { condemn, revive, .. } = &mut state.gc {
            // What has been revived by a commit meanwhile is condemned again at worst; a live block is not revived.
            if there {
                *condemn &= live;
            }
            *revive &= condemned;
        }
        if all_fall
            && let Gc::Walked { needed, condemn, revive } | Gc::Enumerated { needed, condemn, revive, .. } = state.gc
        {
            let flagged = unmarked(needed).fold(0, |set, at| set | 1 << at);
            state.gc = Gc::Enumerated { needed, condemn, revive, flagged, log: 0 };
        }
    }

    /// Gives epochs the smallest numbers that compare alike.
    pub(crate) fn renumber(&self, state: &mut State<B, S>) {
        let mut epochs: [u8; B] = state.blocks.map(|block| if is_condemned(block) { block.epoch } else { 0 });
        let mut leases: [u8; S] = state.sessions.map(|session| session.lease);
        // Without these rules an epoch may matter to leases that are yet to come.
        let exact = self.keeps(Rule::EpochMovesOn) && self.keeps(Rule::KnownUnderLeaseOnly);
        state.epoch = renumbered(&mut epochs, &state.blocks.map(is_condemned), &mut leases, state.epoch, exact);
        state.blocks.iter_mut().zip(epochs).for_each(|(block, epoch)| block.epoch = epoch);
        state.sessions.iter_mut().zip(leases).for_each(|(session, lease)| session.lease = lease);
        if self.shape.power_cuts {
            // What is durable is compared with nothing but itself.
            let condemned = state.durable.blocks.map(|(code, _)| code == BlockCode::Condemned);
            let mut epochs = state.durable.blocks.map(|(_, epoch)| epoch);
            let durable = &mut state.durable;
            durable.epoch = renumbered(&mut epochs, &condemned, &mut durable.leases, durable.epoch, exact);
            durable.blocks.iter_mut().zip(epochs).for_each(|(row, epoch)| row.1 = epoch);
        }
    }

    /// Sorts the two copies of each chunk; they lie side by side.
    fn sort_copies(&self, state: &mut State<B, S>) {
        for at in 1..B {
            if self.shape.copies[at - 1] == self.shape.copies[at] && key(state, at) < key(state, at - 1) {
                swap_copies(state, at - 1, at);
            }
        }
    }
}

fn is_condemned(block: Block) -> bool {
    block.code == BlockCode::Condemned
}

/// Gives epochs new numbers that compare alike; returns that of the next lease.
///
/// Only two questions are ever asked: is a lease at most a block's epoch, and (by a lease that is yet to come) is the next
/// epoch at most a block's epoch, which is never so. Hence a block's epoch may be lowered to the newest lease that is at most
/// that, and leases that no block tells apart may be made one. If not `exact`, ranks are all that is done.
fn renumbered<const B: usize, const S: usize>(
    epochs: &mut [u8; B],
    condemned: &[bool; B],
    leases: &mut [u8; S],
    next: u8,
    exact: bool,
) -> u8 {
    if !exact {
        let (old_epochs, old_leases) = (*epochs, *leases);
        let rank = |value: u8| -> u8 {
            if value == 0 {
                return 0;
            }
            let smaller = |other: u8| other > 0 && other < value;
            let all = || old_epochs.iter().chain(&old_leases).copied().chain([next]);
            let mut rank = 1;
            // Distinct smaller values: count each at its first place.
            for (at, other) in all().enumerate() {
                rank += u8::from(smaller(other) && all().take(at).all(|earlier| earlier != other));
            }
            rank
        };
        for epoch in epochs.iter_mut().chain(leases) {
            *epoch = rank(*epoch);
        }
        return rank(next);
    }
    let old = *leases;
    let below = |epoch: u8| old.iter().copied().filter(|lease| *lease > 0 && *lease <= epoch).max().unwrap_or(0);
    let mut told_apart = [0u8; B];
    for ((epoch, condemned), told) in epochs.iter_mut().zip(condemned).zip(&mut told_apart) {
        *epoch = if *condemned { below(*epoch) } else { 0 };
        *told = *epoch;
    }
    // A lease's number is one more than the number of distinct block epochs that are smaller than it.
    let number = |lease: u8| -> u8 {
        let distinct = |at: usize| told_apart[..at].iter().all(|earlier| *earlier != told_apart[at]);
        let smaller = (0..B).filter(|at| told_apart[*at] > 0 && told_apart[*at] < lease && distinct(*at)).count();
        1 + u8::try_from(smaller).unwrap_or(u8::MAX)
    };
    epochs.iter_mut().filter(|epoch| **epoch > 0).for_each(|epoch| *epoch = number(*epoch));
    leases.iter_mut().filter(|lease| **lease > 0).for_each(|lease| *lease = number(*lease));
    number(u8::MAX)
}

type Key = (Block, (BlockCode, u8), u16, [u16; 4]);

/// Everything that is known of a copy.
fn key<const B: usize, const S: usize>(state: &State<B, S>, at: usize) -> Key {
    let bit = |set: u16| u16::from(has(set, at));
    let gc = match state.gc {
        Gc::Walked { condemn, revive, .. } => bit(condemn) | bit(revive) << 1,
        Gc::Enumerated { condemn, revive, flagged, log, .. } => {
            bit(condemn) | bit(revive) << 1 | bit(flagged) << 2 | bit(log) << 3
        }
        _ => 0,
    };
    let mut sessions = [0; 4];
    for (session, key) in state.sessions.iter().zip(&mut sessions) {
        *key = bit(session.read) | bit(session.revive) << 1;
    }
    (state.blocks[at], state.durable.blocks[at], gc, sessions)
}

fn swap_copies<const B: usize, const S: usize>(state: &mut State<B, S>, a: usize, b: usize) {
    let swap = |set: &mut u16| {
        if has(*set, a) != has(*set, b) {
            *set ^= 1 << a | 1 << b;
        }
    };
    state.blocks.swap(a, b);
    state.durable.blocks.swap(a, b);
    match &mut state.gc {
        Gc::Walked { condemn, revive, .. } => [condemn, revive].into_iter().for_each(swap),
        Gc::Enumerated { condemn, revive, flagged, log, .. } => {
            [condemn, revive, flagged, log].into_iter().for_each(swap);
        }
        Gc::Idle | Gc::Listed { .. } | Gc::Sweeping => {}
    }
    for session in &mut state.sessions {
        swap(&mut session.read);
        swap(&mut session.revive);
    }
}

fn swap_sessions<const B: usize, const S: usize>(state: &mut State<B, S>) {
    state.sessions.swap(0, 1);
    state.durable.leases.swap(0, 1);
    for block in &mut state.blocks {
        block.waits_for = block.waits_for >> 1 & 1 | (block.waits_for & 1) << 1;
    }
}
