//! What must hold in every state.

use super::state::{BlockCode, Gc, Session, State, Violation};
use super::{Action, Model, Rule, bits, has};

impl<const B: usize, const S: usize> Model<B, S> {
    /// What is wrong with a state, if anything is.
    pub fn broken(&self, state: &State<B, S>) -> Option<Violation> {
        let live = self.live(state);
        if state.blocks.iter().any(|block| block.code == BlockCode::Hollow) {
            return Some("a block is taken for live and its bytes are gone");
        }
        // What damage has taken cannot be demanded, and nothing else can be missing.
        let snapshots = self.shape.closure(state.retained | state.deleted | state.pinned);
        if snapshots & !(self.readable(state) | state.lost) != 0 {
            return Some("a chunk of a snapshot that is kept, can be undeleted or is being read has no copy");
        }
        for (at, block) in state.blocks.iter().enumerate() {
            let children = self.shape.chunks[self.shape.chunk_of(at)].children;
            if block.code.is_live() && block.flagged && children & !live != 0 {
                return Some("a live tree is flagged complete and something directly below it has no live copy");
            }
            if block.code == BlockCode::Condemned {
                let waits = |session: &Session| session.lease > 0 && session.lease <= block.epoch;
                if (0..S).any(|session| waits(&state.sessions[session]) && !has(block.waits_for.into(), session)) {
                    return Some("freeing a block waits for a session that began after it was condemned");
                }
            }
        }
        for session in state.sessions.iter().filter(|session| session.open) {
            let usable = |chunk: &usize| {
                self.shape.copies_of(*chunk).any(|at| {
                    matches!(state.blocks[at].code, BlockCode::Live | BlockCode::Condemned | BlockCode::Doomed)
                        && self.usable(state.blocks[at], session.lease())
                })
            };
            if bits(session.relies_on).any(|chunk| !usable(&chunk)) {
                return Some("an agent relies on a chunk that its session can no longer use");
            }
        }
        if state.retained | state.deleted | state.pinned == 0 && state.sessions.iter().all(|session| !session.open) {
            return self.leaks(state).then_some("nothing is needed by anybody, and yet not everything can be freed");
        }
        None
    }

    /// Whether a collection that is not disturbed leaves anything behind.
    fn leaks(&self, state: &State<B, S>) -> bool {
        if self.without == Some(Rule::PurgeIsFinal) {
            return false;
        }
        let mut state = *state;
        let step = |state: &mut State<B, S>, action| match self.apply(state, action) {
            Ok(next) => *state = next,
            Err(_) => state.gc = Gc::Idle,
        };
        state.gc = Gc::Idle;
        for action in [Action::List, Action::Mark(0), Action::Enumerate] {
            step(&mut state, action);
        }
        let live = (0..B).filter(|at| state.blocks[*at].code == BlockCode::Live).fold(0, |set, at| set | 1 << at);
        step(&mut state, Action::Condemn(live));
        step(&mut state, Action::Sweep);
        let mut actions = Vec::new();
        // Free, journal, punch, drop: four steps for each block.
        for _ in 0..4 * B {
            self.gc_steps(&state, &mut actions);
            let Some(action) = actions.first().copied() else { break };
            step(&mut state, action);
        }
        state.blocks.iter().any(|block| block.code != BlockCode::Absent)
    }

    /// The steps that take a block towards its end.
    fn gc_steps(&self, state: &State<B, S>, into: &mut Vec<Action>) {
        self.actions(state, into);
        into.retain(|action| {
            matches!(action, Action::Free(_) | Action::Journal(_) | Action::Punch(_) | Action::Drop(_))
        });
    }
}
