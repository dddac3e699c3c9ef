//! Scenario 33: backups, deletions, garbage collection, damage, crashes and frozen nodes in every order (`gc_model`).

#![expect(clippy::unwrap_used, clippy::panic, reason = "helpers of tests fail their test by panicking")]

use strandline_tests::gc_model::Action::{
    Check, Commit, Condemn, Crash, Delete, End, Enumerate, Flag, FlagPass, Free, Journal, List, Mark, Open, Punch,
    Purge, Read, Resume, Revive, Store, Sweep, SyncFlags, TellKnown, Undelete, Withdraw, ZombieCommit,
};
use strandline_tests::gc_model::{
    self, Action, BlockCode, Explored, History, Model, Rule, Stage, State, explore, walk,
};

fn explored<const B: usize, const S: usize>(name: &str, model: &Model<B, S>) -> Result<Explored, History> {
    let found = explore(model);
    match &found {
        Ok(explored) => println!("{name}: {explored:?}"),
        Err(history) => println!("{name}: {history}"),
    }
    found
}

fn ensure_sound<const B: usize, const S: usize>(name: &str, model: &Model<B, S>, states_min: usize) {
    match explored(name, model) {
        Ok(explored) => assert!(explored.states >= states_min, "the model has lost behaviour: {explored:?}"),
        Err(history) => panic!("{history}"),
    }
}

#[test]
fn s33_no_order_of_events_around_one_tree_and_one_chunk_breaks_a_promise() {
    ensure_sound("two sessions, two copies", &gc_model::small(None), 1_000_000);
}

#[test]
fn s33_no_power_cut_breaks_a_promise() {
    ensure_sound("one session, one copy, power cuts, readers", &gc_model::narrow(None), 50_000);
}

#[test]
fn s33_no_collection_that_moves_blocks_breaks_a_promise() {
    ensure_sound("one session, two copies, moves", &gc_model::moving(None), 100_000);
}

/// The shortest history to a broken promise without a rule, in the first shape that has one.
fn counterexample(rule: Rule) -> Option<History> {
    let name = format!("without {rule:?}");
    let narrow = || explored(&name, &gc_model::narrow(Some(rule))).err();
    let moving = || explored(&name, &gc_model::moving(Some(rule))).err();
    let small = || explored(&name, &gc_model::small(Some(rule))).err();
    narrow().or_else(moving).or_else(small)
}

#[test]
fn s33_without_any_one_rule_some_promise_is_broken() {
    for rule in Rule::ALL {
        let (found, needed) = (counterexample(rule).is_some(), !Rule::REDUNDANT.contains(&rule));
        assert!(!needed || found, "{rule:?} is needed for nothing: a behaviour is missing, or the rule is redundant");
        assert!(needed || !found, "{rule:?} is not redundant");
    }
}

/// Steps of a walk in all, and their seeds.
fn walks() -> (u64, std::ops::Range<u64>) {
    let long = std::env::var("STRAND_LONG").is_ok_and(|value| value == "1");
    if long { (2_000_000, 0..50) } else { (250_000, 0..4) }
}

#[test]
fn s33_no_random_walk_among_shared_trees_and_three_sessions_breaks_a_promise() {
    let (steps, seeds) = walks();
    for seed in seeds {
        match walk(&gc_model::large(None), seed, steps) {
            Ok((commits, freed)) => assert!(commits > 1000 && freed > 300, "{commits} commits, {freed} blocks freed"),
            Err(history) => panic!("seed {seed}: {history}"),
        }
    }
}

#[test]
fn s33_random_walks_notice_rules_that_are_missing() {
    let rules = [
        Rule::CommitRevives,
        Rule::CommitSeesPublications,
        Rule::CondemnSeesCommits,
        Rule::CondemnOnlyWhatWasThere,
        Rule::UnmarkedAreUnflagged,
        Rule::FreeingWaits,
        Rule::MarkWalksDeleted,
        Rule::WithdrawalUnflags,
        Rule::ResumeKeepsEpoch,
        Rule::JournalWins,
    ];
    for rule in rules {
        let noticed = (0..4).any(|seed| walk(&gc_model::large(Some(rule)), seed, 250_000).is_err());
        assert!(noticed, "{rule:?}");
    }
}

// Blocks of the small shape: 0 and 1 hold T, 2 and 3 hold C. Chunks: 0 is T, 1 is C.
const T: usize = 0;
const C: usize = 2;
const BOTH: u16 = 1 << T | 1 << C;

/// A history of the small shape: each step must be possible after those before it.
#[derive(Clone)]
struct Played {
    model: Model<4, 2>,
    state: State<4, 2>,
}

impl Played {
    /// Session 0 saves T and C and ends.
    fn saved() -> Self {
        let model = gc_model::small(None);
        let state = model.start();
        Self { model, state }.then(&[Open(0, 0), Store(0, 1), Store(0, 0), FlagPass(0), Check(0), Commit(0)])
    }

    /// The same, and the snapshot is gone again.
    fn purged() -> Self {
        Self::saved().then(&[Delete(0, true), Purge(0)])
    }

    fn offers(&self, action: Action) -> bool {
        let mut actions = Vec::new();
        self.model.actions(&self.state, &mut actions);
        actions.contains(&action)
    }

    fn condemns(&self) -> bool {
        (1..16).any(|blocks| self.offers(Condemn(blocks)))
    }

    fn then(mut self, steps: &[Action]) -> Self {
        for (at, step) in steps.iter().enumerate() {
            assert!(self.offers(*step), "step {at}, {step:?}, is not possible in {:?}", self.state);
            self.state = self.model.apply(&self.state, *step).unwrap();
            assert_eq!(self.model.broken(&self.state), None, "after {step:?}");
        }
        self
    }
}

#[test]
fn s33_history_told_known_committed_and_ended_then_condemned() {
    let played = Played::purged().then(&[List, Mark(0), Enumerate]);
    assert!(played.condemns());
    let played = played.then(&[Open(1, 0), TellKnown(1, 0), Check(1), Commit(1)]);
    assert!(!played.condemns(), "the lease has ended; the commit is what stops the condemnation");
    let played = played.then(&[List, Mark(BOTH), Enumerate]);
    assert!(!played.condemns());
}

#[test]
fn s33_history_a_check_comes_to_a_tree_above_a_freed_chunk() {
    let played = Played::purged();
    assert!(played.state.blocks[T].flagged);
    let played = played.then(&[List, Mark(0), Enumerate, Condemn(1 << C), Free(2), Journal(2), Punch(2), Open(0, 0)]);
    assert!(played.state.blocks[T].code == BlockCode::Live && !played.state.blocks[T].flagged);
    assert!(!played.offers(TellKnown(0, 0)) && !played.offers(TellKnown(0, 1)));
    let played = played.then(&[Check(0), Read(0, 0)]);
    assert_eq!((played.state.sessions[0].stage, played.state.retained), (Stage::Idle, 0), "C is missing");
}

#[test]
fn s33_history_a_resumed_session_asks_again_for_a_part_only() {
    let told = Played::purged().then(&[Open(0, 0), TellKnown(0, 0), List, Mark(0), Enumerate, Condemn(BOTH), Crash]);
    let played = told.then(&[Resume(0, false), List, Mark(0), Enumerate, Sweep]);
    assert!(!played.offers(Free(0)) && !played.offers(Free(2)), "the resumed session holds the old lease");
    let played = played.then(&[Check(0), Read(0, 0), Revive(0), Check(0), Read(0, 0), Flag(0), Commit(0)]);
    assert_eq!(played.state.retained, 1);
}

#[test]
fn s33_history_a_node_thaws_between_check_and_commit() {
    let frozen = Played::purged().then(&[Open(0, 0), TellKnown(0, 0), Check(0), End(0, true)]);
    let freed = frozen.then(&[List, Mark(0), Enumerate, Condemn(BOTH), Free(0), Free(2), Journal(2), Punch(2)]);
    let thawed = freed.then(&[ZombieCommit]);
    assert_eq!(thawed.state.retained, 0);
}

#[test]
fn s33_history_a_tree_is_freed_while_its_flag_was_on_the_disk() {
    let played = Played::saved().then(&[SyncFlags, Delete(0, true), Purge(0), List, Mark(0), Enumerate]);
    let played = played.then(&[Condemn(1 << T), Free(0), Journal(0), Punch(0), Crash, Open(0, 0)]);
    assert!(!played.state.blocks[T].flagged && !played.offers(TellKnown(0, 0)));
    assert!(played.offers(TellKnown(0, 1)), "C is still there");
}

#[test]
fn s33_history_a_deleted_snapshot_is_undeleted_after_mark() {
    let played = Played::saved().then(&[Delete(0, true), List, Mark(BOTH), Enumerate]);
    assert!(!played.condemns());
    let played = played.then(&[Undelete(0, true)]);
    assert!(played.state.retained == 1 && played.state.blocks[C].code == BlockCode::Live);
}

#[test]
fn s33_history_a_damaged_chunk_lies_below_a_flagged_tree_and_heals() {
    let played = Played::saved().then(&[Withdraw(2), Open(0, 0)]);
    assert!(!played.offers(TellKnown(0, 0)), "its flag fell");
    let played = played.then(&[Check(0), Read(0, 0)]);
    assert_eq!(played.state.sessions[0].stage, Stage::Idle, "C is missing");
    let played = played.then(&[Store(0, 1), FlagPass(0), Check(0), Commit(0)]);
    assert_eq!((played.state.retained, played.state.lost), (1, 0));
}
