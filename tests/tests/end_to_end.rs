//! Whole backups and restores of trees that hold everything a file system can.

use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};
use strandline_tests::corpus::Corpus;
use strandline_tests::mutate::mutate;
use strandline_tests::rig::{Agent, Rig, settle};

/// Three backups of a changing tree; each must come back as it was, on another machine.
fn three_generations(scratch: &Path, writer: &Agent, reader: &Agent, streams: &str) -> Result<()> {
    let corpus = Corpus { files: 600, big_bytes: 2 << 20, ..Corpus::default() };
    // Attributes of the directories above the source are saved, too: nothing else is made in its parent.
    fs::create_dir(scratch.join("tree"))?;
    let source = scratch.join("tree/source");
    corpus.create(&source)?;
    let streams = ["--streams", streams];

    settle();
    let first = writer.backup(&source, &streams)?;
    ensure!(first.count("reconnects")? == 0, "{first:?}");
    // The same seed makes the same tree; its paths are too long for `cp`.
    corpus.create(&scratch.join("copy-1"))?;
    let second = writer.backup(&source, &streams)?;
    ensure!(second.count("files_read")? == 0, "nothing has changed: {second:?}");
    // Only the directories above the source may have new times.
    ensure!(second.count("bytes_new")? < 2_000, "nothing has changed: {second:?}");
    mutate(&source, 7, 5)?;
    let third = writer.backup(&source, &streams)?;
    let (read, files) = (third.count("files_read")?, third.count("files")?);
    ensure!(0 < read && read < files / 3, "{read} of {files} files read");
    ensure!(third.count("bytes_stored")? < first.count("bytes_stored")? / 2, "{third:?}");

    for (n, (summary, expected)) in
        [(&first, "copy-1"), (&second, "copy-1"), (&third, "tree/source")].iter().enumerate()
    {
        let target = scratch.join(format!("restored-{n}"));
        reader.restore_and_compare(&summary.snapshot()?, &source, &scratch.join(expected), &target)?;
        fs::remove_dir_all(target)?;
    }
    let ids = [first.snapshot()?, second.snapshot()?, third.snapshot()?];
    ensure!(reader.snapshots()? == ids);
    Ok(())
}

#[test]
fn three_generations_of_a_nasty_tree_go_over_eight_streams_and_come_back_on_another_machine() -> Result<()> {
    let mut rig = Rig::direct()?;
    let writer = rig.owner("writer")?;
    let reader = rig.second("reader", &writer)?;
    three_generations(rig.scratch(), &writer, &reader, "8")?;
    rig.server()?.ensure_no_panic()
}

#[test]
fn three_generations_of_a_nasty_tree_go_into_a_directory_and_come_back_with_only_the_key_file() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let scratch = scratch.path();
    let writer = Agent::local(&scratch.join("writer"), &scratch.join("repository"))?;
    let reader = Agent::local(&scratch.join("reader"), &scratch.join("repository"))?;
    // The key file exists only once the first backup has made the repository.
    writer.run(&["init"])?.expect_code(0)?;
    reader.take_keys_of(&writer)?;
    three_generations(scratch, &writer, &reader, "8")
}
