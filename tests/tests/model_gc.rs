//! Scenario 33: backups, deletions, garbage collection, damage, crashes and frozen nodes in every order (`gc_model`).

use strandline_tests::gc_model::{self, Explored, History, Model, Rule, explore, walk};

fn explored<const B: usize, const S: usize>(name: &str, model: &Model<B, S>) -> Result<Explored, History> {
    let found = explore(model);
    match &found {
        Ok(explored) => println!("{name}: {explored:?}"),
        Err(history) => println!("{name}: {history}"),
    }
    found
}

#[test]
fn s33_no_order_of_events_around_one_tree_and_one_chunk_breaks_a_promise() {
    if let Err(history) = explored("two sessions, two copies", &gc_model::small(None)) {
        panic!("{history}");
    }
}

#[test]
fn s33_no_power_cut_breaks_a_promise() {
    if let Err(history) = explored("one session, one copy, power cuts, readers", &gc_model::narrow(None)) {
        panic!("{history}");
    }
}

/// The shortest history found without a rule, in either shape.
fn counterexample(rule: Rule) -> Option<History> {
    let name = format!("without {rule:?}");
    let narrow = explored(&name, &gc_model::narrow(Some(rule)));
    narrow.err().or_else(|| explored(&name, &gc_model::small(Some(rule))).err())
}

#[test]
fn s33_without_any_one_rule_some_promise_is_broken() {
    for rule in Rule::ALL {
        let found = counterexample(rule).is_some();
        println!("{rule:?} {found}");
    }
}

#[test]
fn s33_walk() {
    for seed in 0..4 {
    match walk(&gc_model::large(), seed, 250_000) {
        Ok(done) => println!("{done:?}"),
        Err(history) => panic!("{history}"),
    }
    }
}
