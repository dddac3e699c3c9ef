//! What a step does.

use super::actions::Action;
use super::state::{Block, BlockCode, Gc, Session, Stage, Standing, State, Violation};
use super::{Model, Rule, bits, has};

/// A commit that an invariant forbids.
const DANGLING: Violation = "a commit succeeded although a chunk that it needs has no healthy live copy";

impl<const B: usize, const S: usize> Model<B, S> {
    /// The state after a step that [`Model::actions`] offered; or what is wrong with the step itself.
    pub fn apply(&self, state: &State<B, S>, action: Action) -> Result<State<B, S>, Violation> {
        let mut next = *state;
        match action {
            Action::Open(at, root) => self.open(&mut next, at.into(), root),
            Action::TakeLease(at) => next.sessions[usize::from(at)].lease = next.epoch,
            Action::TellKnown(at, chunk) => self.tell(&mut next, at.into(), chunk.into())?,
            Action::Store(at, chunk) => self.store(&mut next, at.into(), chunk.into()),
            Action::FlagPass(block) => flag(&mut next, 1 << block),
            Action::Check(at) => self.check(&mut next, at.into()),
            Action::Read(at, block) => self.read(&mut next, at.into(), block),
            Action::Revive(at) => revive(&mut next, at.into()),
            Action::Flag(at) => self.write_flags(&mut next, at.into()),
            Action::Commit(at) => self.commit(&mut next, at.into())?,
            Action::End(at, zombie) => end(&mut next, at.into(), zombie),
            Action::Resume(at, zombie) => self.resume(&mut next, at.into(), zombie),
            Action::ZombieCommit => self.zombie_commit(&mut next)?,
            Action::Delete(root, last) => {
                next.deleted |= 1 << root;
                next.retained &= !(u16::from(last) << root);
            }
            Action::Undelete(root, last) => self.undelete(&mut next, root, last),
            Action::Purge(root) => {
                next.deleted &= !(1 << root);
                if !self.keeps(Rule::PurgeIsFinal) {
                    next.purged |= 1 << root;
                }
            }
            Action::Pin(root) => next.pinned |= 1 << root,
            Action::Unpin(root) => next.pinned &= !(1 << root),
            Action::List => next.gc = Gc::Listed { roots: self.listed(&next) },
            Action::Mark(marked) => next.gc = self.mark(&next, marked),
            Action::MarkFails | Action::Finish => next.gc = Gc::Idle,
            Action::Sweep => next.gc = Gc::Sweeping,
            Action::Move(block) => self.copy(&mut next, block.into()),
            Action::Enumerate => next.gc = self.enumerate(&next),
            Action::Condemn(blocks) => self.condemn(&mut next, blocks),
            Action::Free(block) | Action::Replace(block) => next.blocks[usize::from(block)].code = BlockCode::Freeing,
            Action::Journal(block) => next.blocks[usize::from(block)].code = BlockCode::Journalled,
            Action::Punch(block) => punch(&mut next.blocks[usize::from(block)]),
            Action::Drop(block) => {
                next.blocks[usize::from(block)] = Block::default();
                next.durable.blocks[usize::from(block)] = (BlockCode::Absent, 0);
                self.forget_block(&mut next, block.into());
            }
            Action::Withdraw(block) => self.withdraw(&mut next, block.into()),
            Action::SyncFlags => next.blocks.iter_mut().for_each(|block| block.flagged_on_disk = block.flagged),
            Action::Crash => crash(&mut next),
            Action::Rebuild => self.rebuild(&mut next),
            Action::Checkpoint => {
                next.durable.blocks = next.blocks.map(|block| (block.code, block.epoch));
                next.durable.leases = next.sessions.map(|session| session.lease);
                next.durable.epoch = next.epoch;
            }
            Action::PowerCut => self.power_cut(&mut next),
        }
        for block in &mut next.blocks {
            if block.code != BlockCode::Condemned {
                (block.epoch, block.waits_for) = (0, 0);
            }
        }
        next.lost &= !self.readable(&next);
        Ok(next)
    }

    fn open(&self, state: &mut State<B, S>, at: usize, root: u8) {
        let lease = if self.keeps(Rule::LeaseBeforeAnswers) { state.epoch } else { 0 };
        state.sessions[at] = Session { open: true, lease, root, ..Session::default() };
        // An older lease in this place that a power cut might bring back belongs to nobody: as good as ended.
        state.durable.leases[at] = 0;
    }

    fn tell(&self, state: &mut State<B, S>, at: usize, chunk: usize) -> Result<(), Violation> {
        let lease = state.sessions[at].lease();
        let lease = lease.or((!self.keeps(Rule::LeaseBeforeAnswers)).then_some(state.epoch.into()));
        let mut because = self.shape.copies_of(chunk).filter(|copy| self.known(state, *copy, lease));
        if because.any(|copy| !matches!(state.blocks[copy].code, BlockCode::Live | BlockCode::Condemned)) {
            return Err("an agent was told that a chunk is known whose only copy is freed, being freed, or withdrawn");
        }
        // Who is told that a tree is known sends nothing below it.
        state.sessions[at].relies_on |= self.shape.closure(1 << chunk);
        Ok(())
    }

    fn store(&self, state: &mut State<B, S>, at: usize, chunk: usize) {
        let room = self.shape.copies_of(chunk).find(|copy| state.blocks[*copy].code == BlockCode::Absent);
        if let Some(copy) = room {
            state.blocks[copy] = Block { code: BlockCode::Live, ..Block::default() };
            state.durable.blocks[copy] = (BlockCode::Absent, 0);
            state.sessions[at].relies_on |= 1 << chunk;
        }
    }

    /// A block's place will be another's: nobody who remembers the old one means the new one.
    fn forget_block(&self, state: &mut State<B, S>, at: usize) {
        let keep = !(1 << at);
        if let Gc::Walked { condemn, revive, .. } | Gc::Enumerated { condemn, revive, .. } = &mut state.gc {
            if self.keeps(Rule::CondemnOnlyWhatWasThere) {
                *condemn &= keep;
            }
            *revive &= keep;
        }
        if let Gc::Enumerated { flagged, log, .. } = &mut state.gc {
            (*flagged, *log) = (*flagged & keep, *log & keep);
        }
        for session in &mut state.sessions {
            (session.read, session.revive) = (session.read & keep, session.revive & keep);
        }
    }

    fn check(&self, state: &mut State<B, S>, at: usize) {
        let root = usize::from(state.sessions[at].root);
        let standing = self.standing(state, root, state.sessions[at].lease());
        let session = &mut state.sessions[at];
        session.rest();
        session.fresh = true;
        match standing {
            Standing::Known => session.stage = Stage::Checked,
            Standing::Condemned(_) if !self.keeps(Rule::CommitRevives) => session.stage = Stage::Checked,
            Standing::Condemned(block) => (session.stage, session.revive) = (Stage::Reviving, 1 << block),
            Standing::Incomplete => (session.stage, session.to_read) = (Stage::Walking, 1 << root),
            Standing::Unknown => {
                session.rest();
                session.relies_on &= !(1 << root);
            }
        }
    }

    fn read(&self, state: &mut State<B, S>, at: usize, block: u8) {
        let mut session = state.sessions[at];
        let tree = session.to_read.trailing_zeros() as usize;
        session.to_read &= !(1 << tree);
        let mut missing = if block == u8::MAX { 1 << tree } else { 0u16 };
        if missing == 0 {
            session.read |= 1 << block;
            if state.blocks[usize::from(block)].code == BlockCode::Condemned {
                session.revive |= 1 << block;
            }
            let read = |set: u16, chunk: usize| self.shape.copies_of(chunk).any(|copy| has(set, copy));
            for child in bits(self.shape.chunks[tree].children) {
                match self.standing(state, child, session.lease()) {
                    Standing::Known => {}
                    Standing::Condemned(block) => session.revive |= 1 << block,
                    Standing::Incomplete if read(session.read, child) => {}
                    Standing::Incomplete => session.to_read |= 1 << child,
                    Standing::Unknown => missing |= 1 << child,
                }
            }
        }
        if missing > 0 {
            session.rest();
            session.relies_on &= !missing;
        } else if session.to_read == 0 {
            let revive = session.revive > 0 && self.keeps(Rule::CommitRevives);
            session.stage = if revive { Stage::Reviving } else { Stage::Flagging };
            if revive {
                session.read = 0;
            }
        }
        state.sessions[at] = session;
    }

    fn write_flags(&self, state: &mut State<B, S>, at: usize) {
        let session = state.sessions[at];
        let steady = session.fresh || !self.keeps(Rule::FlagsNeedNoPublication);
        if steady && session.revive == 0 {
            flag(state, session.read);
        }
        let session = &mut state.sessions[at];
        (session.stage, session.read, session.revive) = (Stage::Checked, 0, 0);
    }

    fn commit(&self, state: &mut State<B, S>, at: usize) -> Result<(), Violation> {
        let session = state.sessions[at];
        if !session.fresh && self.keeps(Rule::CommitSeesPublications) {
            state.sessions[at].rest();
            return Ok(());
        }
        self.insert(state, session.root)?;
        end(state, at, false);
        Ok(())
    }

    fn insert(&self, state: &mut State<B, S>, root: u8) -> Result<(), Violation> {
        let healthy = |chunk: usize| self.shape.copies_of(chunk).any(|at| state.blocks[at].code == BlockCode::Live);
        if !bits(self.shape.closure(1 << root)).all(healthy) {
            return Err(DANGLING);
        }
        state.retained |= 1 << root;
        if self.keeps(Rule::CondemnSeesCommits) {
            give_up_marks(state);
        }
        Ok(())
    }

    fn resume(&self, state: &mut State<B, S>, at: usize, zombie: bool) {
        let old = state.sessions[at];
        if zombie {
            state.zombie = 1 + old.root;
        }
        state.sessions[at].rest();
        if !self.keeps(Rule::ResumeKeepsEpoch) {
            state.sessions[at].lease = state.epoch;
        }
    }

    /// The frozen node's check said complete, and its caches are of that time.
    fn zombie_commit(&self, state: &mut State<B, S>) -> Result<(), Violation> {
        let root = state.zombie - 1;
        state.zombie = 0;
        if self.keeps(Rule::CommitAssertsFence) { Ok(()) } else { self.insert(state, root) }
    }

    fn undelete(&self, state: &mut State<B, S>, root: u8, last: bool) {
        if has(state.deleted, root.into()) {
            state.deleted &= !(u16::from(last) << root);
        } else {
            state.purged &= !(1 << root);
        }
        state.retained |= 1 << root;
        if self.keeps(Rule::CondemnSeesUndeletes) {
            give_up_marks(state);
        }
    }

    fn listed(&self, state: &State<B, S>) -> u16 {
        let deleted = if self.keeps(Rule::MarkWalksDeleted) { state.deleted } else { 0 };
        let pinned = if self.keeps(Rule::ReadersPin) { state.pinned } else { 0 };
        state.retained | deleted | pinned
    }

    /// What is needed, seen from the trees whose marked copies can be read, and what that means for each block.
    fn mark(&self, state: &State<B, S>, marked: u16) -> Gc {
        let Gc::Listed { roots } = state.gc else { return Gc::Idle };
        let children = |at: usize| self.shape.chunks[self.shape.chunk_of(at)].children;
        let needed = bits(marked).fold(roots, |set, at| set | children(at));
        let of =
            |code: BlockCode| (0..B).filter(move |at| state.blocks[*at].code == code).fold(0, |set, at| set | 1 << at);
        let there = if self.keeps(Rule::CondemnOnlyWhatWasThere) { of(BlockCode::Live) } else { u16::MAX >> (16 - B) };
        Gc::Walked { needed, condemn: there & !marked, revive: of(BlockCode::Condemned) & marked }
    }

    fn enumerate(&self, state: &State<B, S>) -> Gc {
        let Gc::Walked { needed, condemn, revive } = state.gc else { return Gc::Idle };
        let unmarked = (0..B).filter(|at| state.blocks[*at].flagged && !has(needed, self.shape.chunk_of(*at)));
        Gc::Enumerated { needed, condemn, revive, flagged: unmarked.fold(0, |set, at| set | 1 << at), log: 0 }
    }

    /// The collection stores a block again as it is, and carries its flag over.
    fn copy(&self, state: &mut State<B, S>, at: usize) {
        let room = self.shape.copies_of(self.shape.chunk_of(at)).find(|to| state.blocks[*to].code == BlockCode::Absent);
        if let Some(to) = room {
            state.blocks[to] = Block { code: BlockCode::Live, flagged: state.blocks[at].flagged, ..Block::default() };
            state.durable.blocks[to] = (BlockCode::Absent, 0);
        }
    }

    fn condemn(&self, state: &mut State<B, S>, blocks: u16) {
        let Gc::Enumerated { needed, condemn, revive, flagged, log } = state.gc else { return };
        let rest = condemn & !blocks;
        let more = Gc::Enumerated { needed, condemn: rest, revive: 0, flagged: 0, log: 0 };
        state.gc = if self.shape.long_runs { more } else { Gc::Sweeping };
        let late = if self.keeps(Rule::LateFlagsFall) { log } else { 0 };
        if self.keeps(Rule::UnmarkedAreUnflagged) {
            let unmarked = bits(flagged | late).filter(|at| !has(needed, self.shape.chunk_of(*at)));
            self.unflag(state, unmarked.fold(0, |set, at| set | 1 << at));
        }
        let open = (0..S).filter(|at| state.sessions[*at].lease > 0).fold(0, |set, at| set | 1 << at);
        for (at, block) in state.blocks.iter_mut().enumerate() {
            if has(blocks, at) && block.code == BlockCode::Live {
                (block.code, block.epoch, block.waits_for) = (BlockCode::Condemned, state.epoch, open);
            } else if has(revive, at) || !self.keeps(Rule::FreeingIsFinal) && has(needed, self.shape.chunk_of(at)) {
                match block.code {
                    BlockCode::Condemned => block.code = BlockCode::Live,
                    BlockCode::Freeing | BlockCode::Journalled if !self.keeps(Rule::FreeingIsFinal) => {
                        block.code = BlockCode::Doomed;
                    }
                    _ => {}
                }
            }
        }
        if self.keeps(Rule::EpochMovesOn) {
            state.epoch += 1;
        }
        self.publish(state);
    }

    /// Takes flags away, on the disk first.
    fn unflag(&self, state: &mut State<B, S>, blocks: u16) {
        for at in bits(blocks) {
            state.blocks[at].flagged = false;
            if self.keeps(Rule::UnflaggingIsSynced) {
                state.blocks[at].flagged_on_disk = false;
            }
        }
    }

    /// Every check that is under way will find that the counter has moved.
    fn publish(&self, state: &mut State<B, S>) {
        let doomed = self.keeps(Rule::CommitSeesPublications) && self.keeps(Rule::FlagsNeedNoPublication);
        for session in &mut state.sessions {
            if doomed {
                session.rest();
            } else {
                session.fresh = false;
            }
        }
    }

    fn withdraw(&self, state: &mut State<B, S>, at: usize) {
        let chunk = self.shape.chunk_of(at);
        if state.damage_left < u8::MAX {
            state.damage_left -= 1;
        }
        state.blocks[at].code = BlockCode::Withdrawn;
        if self.keeps(Rule::WithdrawalUnflags) {
            let above = self.shape.ancestors(1 << chunk);
            let fall = (0..B).filter(|block| has(above, self.shape.chunk_of(*block)));
            self.unflag(state, fall.fold(0, |set, block| set | 1 << block));
        }
        if !has(self.readable(state), chunk) {
            state.lost |= 1 << chunk;
        }
        for session in 0..S {
            // The agent will learn of it when it commits: damage is no broken promise.
            let lease = state.sessions[session].lease();
            if !self.shape.copies_of(chunk).any(|copy| self.usable(state.blocks[copy], lease)) {
                state.sessions[session].relies_on &= !(1 << chunk);
            }
        }
        if self.keeps(Rule::WithdrawalIsPublished) {
            self.publish(state);
        }
    }

    /// The catalog is made anew: from the packs and PACK.state, manifests and tombstones. No session is left.
    fn rebuild(&self, state: &mut State<B, S>) {
        crash(state);
        for block in &mut state.blocks {
            (block.flagged, block.flagged_on_disk) = (false, false);
            block.code = self.after_loss(block.code, BlockCode::Live);
        }
        state.sessions = [Session::default(); S];
        (state.epoch, state.zombie) = (1, state.zombie);
        state.durable = self.start().durable;
    }

    /// What a block is once the catalog says `row` of it.
    fn after_loss(&self, now: BlockCode, row: BlockCode) -> BlockCode {
        match now {
            BlockCode::Absent => BlockCode::Absent,
            BlockCode::Journalled | BlockCode::Freed | BlockCode::Withdrawn if self.keeps(Rule::JournalWins) => now,
            // PACK.state is not asked, or says nothing, and the body is gone or wrong.
            BlockCode::Freed | BlockCode::Unjournalled | BlockCode::Withdrawn if row == BlockCode::Live => {
                BlockCode::Hollow
            }
            BlockCode::Freed | BlockCode::Unjournalled | BlockCode::Withdrawn => now,
            _ => row,
        }
    }

    fn power_cut(&self, state: &mut State<B, S>) {
        crash(state);
        let durable = state.durable;
        for (block, (code, epoch)) in state.blocks.iter_mut().zip(durable.blocks) {
            // A block without a row is live if it is in its pack.
            let row = if code == BlockCode::Absent { BlockCode::Live } else { code };
            block.code = self.after_loss(block.code, row);
            block.epoch = epoch;
        }
        state.epoch = durable.epoch;
        for (session, lease) in state.sessions.iter_mut().zip(durable.leases) {
            match (session.open, lease) {
                // The agent names a session that the server has never heard of, and gets a new one.
                (true, 0) => session.lease = state.epoch,
                (true, _) => session.lease = lease,
                (false, 0) => {}
                // Its end was lost, or its commit: it holds its lease until it expires.
                (false, _) => *session = Session { open: true, lease, ..Session::default() },
            }
        }
        for block in &mut state.blocks {
            let holds = |session: &Session| session.lease > 0 && session.lease <= block.epoch;
            let open = (0..S).filter(|at| holds(&state.sessions[*at])).fold(0, |set, at| set | 1 << at);
            block.waits_for = open;
        }
        if self.keeps(Rule::StartRevives) {
            let condemned = state.blocks.iter_mut().filter(|block| block.code == BlockCode::Condemned);
            condemned.for_each(|block| block.code = BlockCode::Live);
        }
        let rows = |block: &Block| (block.code, if block.code == BlockCode::Condemned { block.epoch } else { 0 });
        for (durable, block) in state.durable.blocks.iter_mut().zip(&state.blocks) {
            *durable = rows(block);
        }
        state.durable.leases = state.sessions.map(|session| session.lease);
    }
}

/// Sets complete flags, and tells a collection that has enumerated them before.
fn flag<const B: usize, const S: usize>(state: &mut State<B, S>, blocks: u16) {
    let there = bits(blocks).filter(|at| state.blocks[*at].code != BlockCode::Absent).fold(0, |set, at| set | 1 << at);
    bits(there).for_each(|at| state.blocks[at].flagged = true);
    if let Gc::Enumerated { log, .. } = &mut state.gc {
        *log |= there;
    }
}

/// The transaction that makes condemned blocks live for a commit; then its check begins again.
fn revive<const B: usize, const S: usize>(state: &mut State<B, S>, at: usize) {
    for block in bits(state.sessions[at].revive) {
        if state.blocks[block].code == BlockCode::Condemned {
            state.blocks[block].code = BlockCode::Live;
        }
    }
    state.sessions[at].rest();
}

fn punch(block: &mut Block) {
    block.code = match block.code {
        BlockCode::Journalled => BlockCode::Freed,
        BlockCode::Doomed => BlockCode::Hollow,
        _ => BlockCode::Unjournalled,
    };
}

/// A collection that has not condemned all yet would find that the counter has moved: it begins again.
fn give_up_marks<const B: usize, const S: usize>(state: &mut State<B, S>) {
    if state.gc != Gc::Sweeping {
        state.gc = Gc::Idle;
    }
}

/// Ends a session and its lease.
fn end<const B: usize, const S: usize>(state: &mut State<B, S>, at: usize, zombie: bool) {
    if zombie {
        state.zombie = 1 + state.sessions[at].root;
    }
    state.sessions[at] = Session::default();
    state.blocks.iter_mut().for_each(|block| block.waits_for &= !(1 << at));
}

/// Memory is lost; catalog and files are not. Agents come back with `resume_of`, or do not.
fn crash<const B: usize, const S: usize>(state: &mut State<B, S>) {
    state.sessions.iter_mut().for_each(Session::rest);
    state.gc = Gc::Idle;
    state.pinned = 0;
    state.blocks.iter_mut().for_each(|block| block.flagged = block.flagged_on_disk);
}
