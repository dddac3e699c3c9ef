//! Bit rot on the real programs (scenario 30): a flipped byte anywhere in a pack is found by a check, never comes out of a restore,
//! and heals with the next backup of the same files.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use strandline_tests::compare::ensure_same;
use strandline_tests::rig::{Agent, random_files};

/// Places that are flipped, spread over the pack.
const PLACES: usize = 16;

fn packs(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut pending = vec![directory.to_owned()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory)? {
            let path = entry?.path();
            if path.is_dir() {
                pending.push(path);
            } else if path.extension().is_some_and(|extension| extension == "pack") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

#[test]
fn s30_a_flipped_byte_is_found_never_restored_and_healed_by_the_next_backup() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let (source, repository) = (scratch.path().join("source"), scratch.path().join("repository"));
    random_files(&source, 30, 12, 40_000)?;
    let agent = Agent::local(&scratch.path().join("home"), &repository)?;
    let first = agent.backup(&source, &[])?.snapshot()?;
    let pack = packs(&repository)?.first().context("no pack")?.clone();
    let whole = fs::read(&pack)?;
    let (mut blocks, mut frames) = (0, 0);
    for place in 0..PLACES {
        // The pack as it was at first, with one bit of it turned.
        let at = place * (whole.len() - 1) / (PLACES - 1);
        let mut bad = whole.clone();
        bad[at] ^= 1 << (place % 8);
        let copy = scratch.path().join(format!("copy-{place}"));
        strandline_tests::rig::copy_tree(&repository, &copy)?;
        let damaged = packs(&copy)?.first().context("no pack")?.clone();
        fs::write(&damaged, &bad)?;
        let agent = agent.at(copy.to_str().context("a path that is not text")?);

        // A restore is right, or says what is missing and writes nothing wrong.
        let target = scratch.path().join(format!("before-{place}"));
        let restored = agent.run(&["restore", &first, "--target", target.to_str().context("not text")?])?;
        let came = target.join(source.strip_prefix("/")?);
        if restored.status.code() == Some(0) {
            ensure_same(&source, &came)?;
        } else if came.exists() {
            for entry in fs::read_dir(&came)? {
                let entry = entry?;
                ensure!(fs::read(entry.path())? == fs::read(source.join(entry.file_name()))?, "byte {at}: {entry:?}");
            }
        }
        let found = agent.run(&["check", "--read-data"])?.expect_code(1)?;
        if found.stderr.contains("header of pack") || found.stderr.contains("footer of pack") {
            frames += 1;
            continue;
        }
        blocks += 1;
        ensure!(found.stderr.contains("cannot be restored completely"), "byte {at}: {}", found.stderr);
        agent.backup(&source, &[])?;
        agent.run(&["check", "--read-data"])?.expect_code(0)?;
        agent.restore_and_compare(&first, &source, &source, &scratch.path().join(format!("after-{place}")))?;
    }
    println!(
        "{PLACES} bytes flipped: {blocks} in blocks, found, named and healed; {frames} in header or footer, found"
    );
    ensure!(blocks > PLACES / 2 && frames > 0, "the places do not cover blocks and frame");
    Ok(())
}
