//! What may happen next.

use super::state::{BlockCode, Gc, Stage, State};
use super::{Model, Rule, bits, has};

/// A step. Sessions, chunks, roots and blocks by their numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// An agent opens a session for a root, and gets its lease.
    Open(u8, u8),
    /// The lease comes late. Only without [`Rule::LeaseBeforeAnswers`].
    TakeLease(u8),
    /// A session's agent is told that a chunk is known.
    TellKnown(u8, u8),
    /// A session's block with this chunk becomes durable and is acknowledged.
    Store(u8, u8),
    /// The pass over new tree blocks flags one.
    FlagPass(u8),
    /// A commit begins with its check: a look at the root.
    Check(u8),
    /// The check reads a tree from this block, or finds no usable copy of it (255).
    Read(u8, u8),
    /// The transaction that makes condemned blocks live for a commit.
    Revive(u8),
    /// The check writes its flags.
    Flag(u8),
    /// The commit transaction.
    Commit(u8),
    /// The session expires or is aborted. Its node may wake up later as a zombie.
    End(u8, bool),
    /// The agent resumes its session elsewhere. The old node may wake up later as a zombie.
    Resume(u8, bool),
    /// A zombie tries its commit transaction.
    ZombieCommit,
    /// A snapshot is deleted; it is the last of its root, or not.
    Delete(u8, bool),
    /// A snapshot is undeleted; it is the last deleted one of its root, or not.
    Undelete(u8, bool),
    /// The last deleted snapshot of a root is purged.
    Purge(u8),
    /// A snapshot is being read.
    Pin(u8),
    /// It is no longer.
    Unpin(u8),
    /// Mark lists the snapshots.
    List,
    /// Mark walks their trees; these blocks hold the copies that it marks.
    Mark(u16),
    /// Mark meets a needed tree of which no copy can be read.
    MarkFails,
    /// The collection lists the flags that must fall.
    Enumerate,
    /// The condemning transaction, with these blocks; there may be several.
    Condemn(u16),
    /// The collection goes on to free.
    Sweep,
    /// The collection copies a live block.
    Move(u8),
    /// The collection frees a live block of which there is another live copy.
    Replace(u8),
    /// The collection ends.
    Finish,
    /// The transaction that makes a condemned block `freeing`.
    Free(u8),
    /// PACK.state says that a block is freed.
    Journal(u8),
    /// Its body is punched.
    Punch(u8),
    /// Its pack is dropped.
    Drop(u8),
    /// A block is found damaged and withdrawn.
    Withdraw(u8),
    /// The index is synced.
    SyncFlags,
    /// The server crashes and starts again.
    Crash,
    /// The catalog is lost and made anew.
    Rebuild,
    /// The catalog's transactions so far are on disk.
    Checkpoint,
    /// The power is cut: later transactions are lost.
    PowerCut,
}

fn small(at: usize) -> u8 {
    u8::try_from(at).unwrap_or(u8::MAX)
}

impl<const B: usize, const S: usize> Model<B, S> {
    /// Everything that may happen in a state, into `into`.
    pub fn actions(&self, state: &State<B, S>, into: &mut Vec<Action>) {
        into.clear();
        for at in 0..S {
            self.session_actions(state, at, into);
        }
        self.snapshot_actions(state, into);
        self.gc_actions(state, into);
        for (at, block) in state.blocks.iter().enumerate() {
            let tree = self.shape.is_tree(self.shape.chunk_of(at));
            if tree && block.code.is_live() && !block.flagged && self.children_known(state, at) {
                into.push(Action::FlagPass(small(at)));
            }
            let turn = state.gc == Gc::Idle || !self.keeps(Rule::MaintenanceIsExclusive);
            if turn && state.damage_left > 0 && matches!(block.code, BlockCode::Live | BlockCode::Condemned) {
                into.push(Action::Withdraw(small(at)));
            }
        }
        if state.zombie > 0 {
            into.push(Action::ZombieCommit);
        }
        if state.blocks.iter().any(|block| block.flagged != block.flagged_on_disk) {
            into.push(Action::SyncFlags);
        }
        into.extend([Action::Crash, Action::Rebuild]);
        if self.shape.power_cuts {
            into.extend([Action::Checkpoint, Action::PowerCut]);
        }
    }

    pub(crate) fn children_known(&self, state: &State<B, S>, block: usize) -> bool {
        let known = |chunk: usize| self.shape.copies_of(chunk).any(|at| self.known(state, at, None));
        bits(self.shape.chunks[self.shape.chunk_of(block)].children).all(known)
    }

    fn session_actions(&self, state: &State<B, S>, at: usize, into: &mut Vec<Action>) {
        let (session, number) = (&state.sessions[at], small(at));
        if !session.open {
            into.extend(bits(self.shape.roots).map(|root| Action::Open(number, small(root))));
            return;
        }
        if session.lease == 0 {
            into.push(Action::TakeLease(number));
        }
        // Without the rule, an agent is answered before the lease exists, as if it had one of this moment.
        let lease = session.lease().or((!self.keeps(Rule::LeaseBeforeAnswers)).then_some(state.epoch.into()));
        for chunk in bits(self.shape.closure(1 << session.root)).filter(|chunk| !session.relies(*chunk)) {
            if self.shape.copies_of(chunk).any(|copy| self.known(state, copy, lease)) {
                into.push(Action::TellKnown(number, small(chunk)));
            }
            let room = self.shape.copies_of(chunk).any(|copy| state.blocks[copy].code == BlockCode::Absent);
            if session.lease > 0 && room {
                into.push(Action::Store(number, small(chunk)));
            }
        }
        into.push(Action::End(number, false));
        if session.lease == 0 {
            return;
        }
        into.push(Action::Resume(number, false));
        match session.stage {
            Stage::Idle => into.push(Action::Check(number)),
            Stage::Walking => {
                let tree = session.to_read.trailing_zeros() as usize;
                let usable =
                    self.shape.copies_of(tree).filter(|copy| self.usable(state.blocks[*copy], session.lease()));
                let before = into.len();
                into.extend(usable.map(|copy| Action::Read(number, small(copy))));
                if into.len() == before {
                    into.push(Action::Read(number, u8::MAX));
                }
            }
            Stage::Reviving => into.push(Action::Revive(number)),
            Stage::Flagging => into.push(Action::Flag(number)),
            Stage::Checked => {
                into.push(Action::Commit(number));
                if state.zombie == 0 {
                    into.extend([Action::End(number, true), Action::Resume(number, true)]);
                }
            }
        }
    }

    fn snapshot_actions(&self, state: &State<B, S>, into: &mut Vec<Action>) {
        for root in bits(self.shape.roots) {
            let number = small(root);
            if has(state.retained, root) {
                into.extend([true, false].map(|last| Action::Delete(number, last)));
            }
            if has(state.deleted, root) {
                into.extend([true, false].map(|last| Action::Undelete(number, last)));
                into.push(Action::Purge(number));
            }
            if has(state.purged, root) {
                into.push(Action::Undelete(number, true));
            }
            if self.shape.readers && has(state.retained, root) && !has(state.pinned, root) {
                into.push(Action::Pin(number));
            }
            if has(state.pinned, root) {
                into.push(Action::Unpin(number));
            }
        }
    }

    fn gc_actions(&self, state: &State<B, S>, into: &mut Vec<Action>) {
        match state.gc {
            Gc::Idle => into.push(Action::List),
            Gc::Listed { roots } => self.marks(state, 0, roots, 0, into),
            Gc::Walked { .. } => into.push(Action::Enumerate),
            Gc::Enumerated { condemn, revive, .. } => {
                // All subsets; the empty one only revives.
                let mut subset = condemn;
                while subset > 0 {
                    into.push(Action::Condemn(subset));
                    subset = (subset - 1) & condemn;
                }
                into.push(if revive > 0 { Action::Condemn(0) } else { Action::Sweep });
            }
            Gc::Sweeping => into.push(Action::Finish),
        }
        for at in 0..B {
            self.block_actions(state, at, into);
        }
    }

    /// What the collection may do with one block.
    fn block_actions(&self, state: &State<B, S>, at: usize, into: &mut Vec<Action>) {
        let (block, number) = (&state.blocks[at], small(at));
        let sweeping = state.gc == Gc::Sweeping;
        match block.code {
            BlockCode::Live if sweeping && self.shape.long_runs => {
                let others = || self.shape.copies_of(self.shape.chunk_of(at)).filter(move |other| *other != at);
                if others().any(|other| state.blocks[other].code == BlockCode::Absent) {
                    into.push(Action::Move(number));
                }
                let replaces = |other: usize| match state.blocks[other].code {
                    BlockCode::Live => true,
                    BlockCode::Absent => false,
                    _ => !self.keeps(Rule::ReplacedByLiveOnly),
                };
                if others().any(replaces) {
                    into.push(Action::Replace(number));
                }
            }
            BlockCode::Condemned if sweeping || !self.keeps(Rule::FreeingFollowsMark) => {
                let waits = state.sessions.iter().any(|session| session.lease > 0 && session.lease <= block.epoch);
                if !waits || !self.keeps(Rule::FreeingWaits) {
                    into.push(Action::Free(number));
                }
            }
            BlockCode::Freeing => {
                into.push(Action::Journal(number));
                if !self.keeps(Rule::JournalBeforePunch) {
                    into.push(Action::Punch(number));
                }
            }
            BlockCode::Journalled | BlockCode::Doomed => into.push(Action::Punch(number)),
            BlockCode::Freed | BlockCode::Withdrawn | BlockCode::Unjournalled => into.push(Action::Drop(number)),
            BlockCode::Absent | BlockCode::Live | BlockCode::Condemned | BlockCode::Hollow => {}
        }
    }

    /// The ways of marking what is needed from `chunk` on: any live copy of each chunk, or if there is none, any condemned one.
    fn marks(&self, state: &State<B, S>, chunk: usize, needed: u16, marked: u16, into: &mut Vec<Action>) {
        if chunk == self.shape.chunks.len() {
            into.push(Action::Mark(marked));
            return;
        }
        if !has(needed, chunk) {
            return self.marks(state, chunk + 1, needed, marked, into);
        }
        let below = needed | self.shape.chunks[chunk].children;
        let mut found = false;
        for code in [BlockCode::Live, BlockCode::Condemned] {
            let copies = self.shape.copies_of(chunk).filter(|at| !found && state.blocks[*at].code == code);
            let copies: Vec<usize> = copies.collect();
            found |= !copies.is_empty();
            for at in copies {
                self.marks(state, chunk + 1, below, marked | 1 << at, into);
            }
        }
        if !found && self.shape.is_tree(chunk) && self.keeps(Rule::MarkNeedsToRead) {
            into.push(Action::MarkFails);
        } else if !found {
            self.marks(state, chunk + 1, needed, marked, into);
        }
    }
}
