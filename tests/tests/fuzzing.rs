//! Scenario 43, and 42 for the paths of a restore: hostile bytes for every decoder, without a special build.
//!
//! Every target of `strandline_tests::fuzz` decodes its committed corpus and so many seeded mutations of it.
//! `STRAND_FUZZ_RUNS=N`: N mutations for each target. What a failure prints replays it. Coverage-guided: `tests/fuzz/run`.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail their test by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use strandline_tests::fuzz::{TARGETS, Target, memory, mutations, seeds, target};
use strandline_tests::random::Random;
use strandline_tests::rig::number;

/// Bytes of the committed corpus of one target, at most.
const CORPUS_BYTES_MAX: usize = 64 << 10;

fn corpora() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus")
}

/// The inputs of a target's corpus by name.
fn corpus(name: &str) -> Result<Vec<Vec<u8>>> {
    let directory = corpora().join(name);
    let entries = fs::read_dir(&directory).with_context(|| directory.display().to_string())?;
    let mut paths = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    paths.sort();
    paths.iter().map(|path| Ok(fs::read(path)?)).collect()
}

fn meter(work: &mut dyn FnMut()) -> u64 {
    allocation_counter::measure(work).bytes_max
}

/// Runs a target on its corpus and on mutations; writes the input that it does not bear to a file, and says where.
fn fuzz(target: &Target) -> Result<()> {
    memory::measure_with(meter);
    let corpus = corpus(target.name)?;
    ensure!(!corpus.is_empty());
    for input in &corpus {
        run(target, input);
    }
    for seed in 0..number("STRAND_FUZZ_RUNS", target.runs) {
        let input = mutations::mutated(&corpus, target.bytes_max, &mut Random::new(seed));
        run(target, &input);
    }
    Ok(())
}

fn run(target: &Target, input: &[u8]) {
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (target.run)(input))) {
        let file = tempfile::Builder::new().prefix(target.name).tempfile().unwrap();
        fs::write(file.path(), input).unwrap();
        let (_, path) = file.keep().unwrap();
        eprintln!("the input is in {}; again: tests/fuzz/run {} {}", path.display(), target.name, path.display());
        resume_unwind(panic);
    }
}

macro_rules! targets {
    ($($test:ident $name:ident),+ $(,)?) => {
        $(#[test]
        fn $test() -> Result<()> {
            fuzz(target(stringify!($name)).context("no such target")?)
        })+

        const TESTED: &[&str] = &[$(stringify!($name)),+];
    };
}

targets! {
    s43_greetings_of_any_bytes handshake,
    s43_frames_of_any_bytes frames,
    s43_certificates_of_any_bytes certificates,
    s43_messages_of_any_bytes messages,
    s43_operations_of_any_bytes operations,
    s43_any_numbers_in_the_machines machines,
    s43_blocks_of_any_bytes block,
    s43_any_bytes_in_a_genuine_block sealed,
    s43_tree_nodes_of_any_bytes tree,
    s42_s43_restores_of_any_tree restore,
    s42_s43_exports_of_any_tree export,
    s43_manifests_of_any_bytes manifest,
    s43_details_of_any_bytes details,
    s43_key_slots_of_any_bytes key_slot,
    s43_keysets_and_writer_certificates_of_any_bytes keyset,
    s43_receipts_of_any_bytes receipt,
    s43_repository_files_of_any_bytes repository_file,
    s43_tokens_of_any_text token,
    s43_names_of_any_text names,
    s43_patterns_of_any_text patterns,
    s43_server_configurations_of_any_text server_configuration,
    s43_agent_configurations_of_any_text agent_configuration,
    s43_packs_of_any_bytes pack,
    s43_file_caches_of_any_bytes file_cache,
    s43_journals_of_any_bytes journal,
    s43_indexes_of_any_bytes index,
}

#[test]
fn every_target_has_its_test_and_a_small_corpus_and_every_corpus_has_a_target() -> Result<()> {
    let targets: BTreeSet<&str> = TARGETS.iter().map(|target| target.name).collect();
    assert_eq!(targets, TESTED.iter().copied().collect());
    for entry in fs::read_dir(corpora())? {
        let name = entry?.file_name();
        ensure!(targets.contains(name.to_str().context("not text")?), "{} is nobody's", name.display());
    }
    for target in &TARGETS {
        let bytes: usize = corpus(target.name)?.iter().map(Vec::len).sum();
        ensure!(bytes <= CORPUS_BYTES_MAX, "the corpus of {} has {bytes} bytes", target.name);
    }
    Ok(())
}

#[test]
fn s43_the_mutations_find_a_length_that_is_not_checked() -> Result<()> {
    // Two kinds of fault, planted: an index that trusts a length, and memory that trusts a count.
    fn trusting_index(data: &[u8]) {
        if let Some((&[_, _, length, _], rest)) = data.split_first_chunk::<4>() {
            let _ = rest[..usize::from(length).min(255)].len();
        }
    }
    fn trusting_count(data: &[u8]) {
        memory::within(64 * data.len() + (64 << 10), || {
            let count = data.first_chunk().map_or(0, |count| u32::from_le_bytes(*count));
            Vec::<u64>::with_capacity((count as usize).min(1 << 20)).len()
        });
    }
    memory::measure_with(meter);
    let corpus = corpus("operations")?;
    let found = [trusting_index as fn(&[u8]), trusting_count].map(|planted| {
        (0..2000u64).find(|&seed| {
            let input = mutations::mutated(&corpus, 4096, &mut Random::new(seed));
            catch_unwind(|| planted(&input)).is_err()
        })
    });
    ensure!(found.iter().all(Option::is_some), "not found: {found:?}");
    Ok(())
}

#[test]
#[ignore = "makes the seeds of the corpora anew; see tests/fuzz/README.md"]
fn make_the_seeds_anew() -> Result<()> {
    for target in &TARGETS {
        let directory = corpora().join(target.name);
        fs::create_dir_all(&directory)?;
        for (name, bytes) in seeds::of(target.name)? {
            ensure!(bytes.len() <= target.bytes_max.max(bytes.len()), "{name}");
            fs::write(directory.join(name), bytes)?;
        }
    }
    Ok(())
}
