//! Disks that fill up or rot, and files that change while they are read.

use std::fs;
use std::os::unix::fs::{FileExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use strandline_tests::mounts::SmallDisk;
use strandline_tests::process::{self, Process};
use strandline_tests::random::Random;
use strandline_tests::rig::{Agent, PATIENCE, Rig, is_long, random_files, unprivileged};

#[test]
fn s28_a_full_disk_of_the_server_refuses_with_the_reason_and_works_again_with_room() -> Result<()> {
    let mount = tempfile::tempdir()?;
    let Some(disk) = SmallDisk::mount(&mount.path().join("disk"), 56)? else { return Ok(()) };
    let rig = Rig::in_directory(&disk.path().join("server"))?;
    let writer = rig.owner("writer")?;
    let (small, big) = (rig.scratch().join("small"), rig.scratch().join("big"));
    random_files(&small, 1, 8, 256 << 10)?;
    random_files(&big, 2, 120, 512 << 10)?;
    let kept = writer.backup(&small, &[])?.snapshot()?;
    let refused = process::run(&mut writer.backup_command(&big, &[])?, PATIENCE)?.expect_code(1)?;
    ensure!(refused.stderr.contains("full"), "{}", refused.stderr);
    writer.restore_and_compare(&kept, &small, &small, &rig.scratch().join("restored-small"))?;
    ensure!(writer.snapshots()? == [kept]);
    disk.resize(200)?;
    let saved = writer.backup(&big, &[])?.snapshot()?;
    writer.restore_and_compare(&saved, &big, &big, &rig.scratch().join("restored-big"))?;
    let result = rig.ensure_no_panic();
    drop(rig);
    result
}

#[test]
fn s28_a_full_disk_of_a_directory_repository_refuses_with_the_reason_and_works_again_with_room() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let Some(disk) = SmallDisk::mount(&scratch.path().join("disk"), 40)? else { return Ok(()) };
    let writer = Agent::local(&scratch.path().join("home"), &disk.path().join("repository"))?;
    let (small, big) = (scratch.path().join("small"), scratch.path().join("big"));
    random_files(&small, 1, 8, 256 << 10)?;
    random_files(&big, 2, 80, 512 << 10)?;
    writer.run(&["init"])?.expect_code(0)?;
    let kept = writer.backup(&small, &[])?.snapshot()?;
    let refused = process::run(&mut writer.backup_command(&big, &[])?, PATIENCE)?.expect_code(1)?;
    ensure!(refused.stderr.contains("full"), "{}", refused.stderr);
    writer.restore_and_compare(&kept, &small, &small, &scratch.path().join("restored-small"))?;
    disk.resize(200)?;
    let saved = writer.backup(&big, &[])?.snapshot()?;
    writer.restore_and_compare(&saved, &big, &big, &scratch.path().join("restored-big"))
}

fn files_below(directory: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() { found.extend(files_below(&path)?) } else { found.push(path) }
    }
    found.sort();
    Ok(found)
}

/// Every file of the target is a file of the source with the same content; returns how many there are.
fn ensure_nothing_wrong(source: &Path, target: &Path) -> Result<usize> {
    let root = target.join(source.strip_prefix("/")?);
    if !target.exists() {
        return Ok(0);
    }
    let restored = files_below(target)?;
    for path in &restored {
        let name =
            path.strip_prefix(&root).with_context(|| format!("a file that was never saved: {}", path.display()))?;
        let expected =
            fs::read(source.join(name)).with_context(|| format!("a file that was never saved: {}", path.display()))?;
        ensure!(fs::read(path)? == expected, "wrong bytes were restored to {}", path.display());
    }
    Ok(restored.len())
}

#[test]
fn s30_a_flipped_bit_in_a_pack_is_an_error_that_names_the_file_and_never_wrong_bytes() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let repository = scratch.path().join("repository");
    let agent = Agent::local(&scratch.path().join("home"), &repository)?;
    let source = scratch.path().join("source");
    random_files(&source, 30, 24, 40 << 10)?;
    agent.backup(&source, &[])?;
    let mut packs = files_below(&repository.join("storage"))?;
    packs.retain(|path| path.parent().is_some_and(|directory| directory.ends_with("packs")));
    ensure!(!packs.is_empty(), "no packs found");
    let mut random = Random::new(30);
    let (mut complete, mut partial) = (0, 0);
    for round in 0..if is_long() { 400 } else { 16 } {
        let pack = packs.get(random.index(packs.len())).context("no packs")?;
        let file = fs::OpenOptions::new().read(true).write(true).open(pack)?;
        let offset = random.below(file.metadata()?.len());
        let mut byte = [0];
        file.read_exact_at(&mut byte, offset)?;
        let [right] = byte;
        file.write_all_at(&[right ^ (1 << random.below(8))], offset)?;

        let target = scratch.path().join(format!("restored-{round}"));
        let finished = agent.run(&["restore", "latest", "--target", target.to_str().context("not text")?, "--json"])?;
        let where_ = format!("round {round}: {pack:?} at {offset}: {finished:?}");
        let restored = ensure_nothing_wrong(&source, &target).context(where_.clone())?;
        match finished.status.code() {
            Some(0) => {
                ensure!(restored == 24, "{restored} files: {where_}");
                complete += 1;
            }
            Some(1 | 3) => {
                let said = format!("{}{}", finished.stdout, finished.stderr);
                ensure!(said.contains("damaged") || said.contains("digest") || said.contains("file-"), "{where_}");
                ensure!(!said.contains("panicked"), "{where_}");
                partial += 1;
            }
            _ => anyhow::bail!(where_),
        }
        file.write_all_at(&[right], offset)?;
        if target.exists() {
            fs::remove_dir_all(target)?;
        }
    }
    ensure!(partial > complete, "{partial} flips were noticed, {complete} hit nothing that matters");
    agent.restore_and_compare("latest", &source, &source, &scratch.path().join("restored"))
}

/// The paths of the error list, as the agent tells them.
fn ensure_tells_of(said: &str, names: &[&str]) -> Result<()> {
    for name in names {
        ensure!(said.contains(name), "nothing is said of {name}:\n{said}");
    }
    Ok(())
}

#[test]
fn s38_files_that_vanish_or_turn_into_links_are_told_and_everything_else_is_saved() -> Result<()> {
    let rig = Rig::proxied()?;
    let writer = rig.owner("writer")?;
    let source = rig.scratch().join("source");
    random_files(&source, 38, 90, 512 << 10)?;
    fs::create_dir(source.join("secret"))?;
    fs::write(source.join("secret/file"), "not to be read through a link")?;
    let backup = writer.start_backup(&source, &["--limit-upload", "8M", "--window", "6M", "-v"])?;
    // Long before the end of the list; the window holds the readers back.
    let start = rig.proxy()?.carried_bytes(strandline_tests::proxy::Direction::ToServer);
    rig.proxy()?.wait_for_bytes(strandline_tests::proxy::Direction::ToServer, start + (1 << 20), PATIENCE)?;
    fs::remove_file(source.join("file-0088"))?;
    fs::remove_file(source.join("file-0089"))?;
    std::os::unix::fs::symlink(source.join("secret/file"), source.join("file-0089"))?;
    let mut backup: Process = backup;
    let status = backup.wait(PATIENCE)?.context("no end")?;
    let said = backup.output();
    ensure!(status.code() == Some(3), "{status}: {said}");
    ensure_tells_of(&said, &["file-0088", "file-0089"])?;
    let target = rig.scratch().join("restored");
    writer.run(&["restore", "latest", "--target", target.to_str().context("not text")?])?.expect_code(0)?;
    let restored = target.join(source.strip_prefix("/")?);
    for n in 0..88 {
        let name = format!("file-{n:04}");
        ensure!(fs::read(source.join(&name))? == fs::read(restored.join(&name))?, "{name}");
    }
    ensure!(fs::read(restored.join("secret/file"))? == b"not to be read through a link");
    ensure!(!restored.join("file-0088").exists());
    rig.ensure_no_panic()
}

#[test]
fn s38_what_may_not_be_read_is_named_and_everything_else_is_saved() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    fs::set_permissions(scratch.path(), PermissionsExt::from_mode(0o777))?;
    let agent = Agent::local(&scratch.path().join("home"), &scratch.path().join("repository"))?;
    fs::set_permissions(agent.home(), PermissionsExt::from_mode(0o777))?;
    let source = scratch.path().join("source");
    random_files(&source, 39, 5, 1000)?;
    fs::create_dir(source.join("closed"))?;
    fs::write(source.join("closed/file"), "x")?;
    fs::set_permissions(source.join("file-0002"), PermissionsExt::from_mode(0o000))?;
    fs::set_permissions(source.join("closed"), PermissionsExt::from_mode(0o000))?;

    let Some(mut command) = unprivileged(agent.backup_command(&source, &[])?)? else { return Ok(()) };
    let finished = process::run(&mut command, PATIENCE)?.expect_code(3)?;
    ensure_tells_of(&finished.stdout, &["file-0002", "closed"])?;
    let target = scratch.path().join("restored");
    agent.restore("latest", &target)?;
    let restored = target.join(source.strip_prefix("/")?);
    for n in [0, 1, 3, 4] {
        let name = format!("file-{n:04}");
        ensure!(fs::read(source.join(&name))? == fs::read(restored.join(&name))?, "{name}");
    }
    Ok(())
}
