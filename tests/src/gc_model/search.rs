//! Breadth-first over all states, and a random walk where there are too many.

use std::collections::HashSet;
use std::hash::{BuildHasherDefault, Hasher};

use super::state::{State, Violation};
use super::{Action, Model};
use crate::random::Random;

/// A history that ends in a broken invariant: as short as any, if it was searched breadth-first.
#[derive(Clone, Debug)]
pub struct History {
    /// Its steps.
    pub steps: Vec<Action>,
    /// What is broken then.
    pub violation: Violation,
}

impl std::fmt::Display for History {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let steps: Vec<String> = self.steps.iter().map(|step| format!("{step:?}")).collect();
        write!(f, "{}\n        after {}", self.violation, steps.join(" → "))
    }
}

/// What an exploration saw.
#[derive(Clone, Copy, Debug)]
pub struct Explored {
    /// Distinct states, symmetric ones counted once.
    pub states: usize,
    /// Steps between them.
    pub steps: u64,
    /// The longest of the shortest histories.
    pub depth: usize,
}

/// FNV-like, a word at a time: the states are no adversary, and there are millions of them.
#[derive(Clone, Copy, Default)]
struct Folding(u64);

impl Folding {
    fn fold(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
}

impl Hasher for Folding {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.fold((*byte).into());
        }
    }

    fn write_u8(&mut self, value: u8) {
        self.fold(value.into());
    }

    fn write_u16(&mut self, value: u16) {
        self.fold(value.into());
    }

    fn write_u64(&mut self, value: u64) {
        self.fold(value);
    }

    fn write_usize(&mut self, value: usize) {
        self.fold(value as u64);
    }

    fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 29
    }
}

/// Explores every reachable state. Memory: the states, and 8 bytes for the way to each.
pub fn explore<const B: usize, const S: usize>(model: &Model<B, S>) -> Result<Explored, History> {
    let mut seen: HashSet<State<B, S>, BuildHasherDefault<Folding>> = HashSet::default();
    // The way to each state: where from, by which step.
    let mut ways: Vec<(u32, Action)> = Vec::new();
    let mut level: Vec<(State<B, S>, u32)> = Vec::new();
    let start = model.canonical(&model.start());
    seen.insert(start);
    ways.push((0, Action::Crash));
    level.push((start, 0));
    let (mut steps, mut depth, mut actions) = (0, 0, Vec::new());
    while !level.is_empty() {
        let mut next_level = Vec::new();
        for (state, number) in &level {
            model.actions(state, &mut actions);
            for action in actions.iter().copied() {
                steps += 1;
                let history = |violation| History { steps: way(&ways, *number, action), violation };
                let next = model.apply(state, action).map_err(history)?;
                let next = model.canonical(&next);
                if !seen.insert(next) {
                    continue;
                }
                if let Some(violation) = model.broken(&next) {
                    return Err(history(violation));
                }
                next_level.push((next, u32::try_from(ways.len()).unwrap_or(u32::MAX)));
                ways.push((*number, action));
            }
        }
        depth += usize::from(!next_level.is_empty());
        level = next_level;
    }
    Ok(Explored { states: seen.len(), steps, depth })
}

fn way(ways: &[(u32, Action)], mut number: u32, last: Action) -> Vec<Action> {
    let mut steps = vec![last];
    while number > 0 {
        let (from, action) = ways[number as usize];
        steps.push(action);
        number = from;
    }
    steps.reverse();
    steps
}

/// How much less often than others steps are taken that throw much away.
const RARELY: u64 = 40;
/// Steps that a history of a walk shows.
const SHOWN: usize = 60;

/// Takes `steps` random steps. Returns how many commits succeeded and how many blocks were freed; or the end of the history.
pub fn walk<const B: usize, const S: usize>(model: &Model<B, S>, seed: u64, steps: u64) -> Result<(u64, u64), History> {
    let mut random = Random::new(seed);
    let (mut state, mut actions, mut taken) = (model.start(), Vec::new(), Vec::new());
    let (mut commits, mut freed) = (0, 0);
    for _ in 0..steps {
        model.actions(&state, &mut actions);
        let action = loop {
            let at = usize::try_from(random.below(actions.len() as u64)).unwrap_or(0);
            let action = actions[at];
            let rare = matches!(
                action,
                Action::Crash | Action::Rebuild | Action::PowerCut | Action::Withdraw(_) | Action::End(..)
            );
            if !rare || random.below(RARELY) == 0 {
                break action;
            }
        };
        taken.push(action);
        let history = |violation| {
            let from = taken.len().saturating_sub(SHOWN);
            History { steps: taken[from..].to_vec(), violation }
        };
        let mut next = model.apply(&state, action).map_err(history)?;
        model.renumber(&mut next);
        if let Some(violation) = model.broken(&next) {
            return Err(history(violation));
        }
        let ended = |state: &State<B, S>| state.sessions.iter().filter(|session| session.open).count();
        commits += u64::from(matches!(action, Action::Commit(_)) && ended(&next) < ended(&state));
        freed += u64::from(matches!(action, Action::Punch(_)));
        state = next;
        if taken.len() > 4 * SHOWN {
            taken.drain(..2 * SHOWN);
        }
    }
    Ok((commits, freed))
}
