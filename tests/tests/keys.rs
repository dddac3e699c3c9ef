//! Keys as people and scripts handle them: slots, passphrases, keys for other machines, recovery, and that no secret shows.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use data_encoding::{BASE32_NOPAD, HEXLOWER, HEXLOWER_PERMISSIVE};
use hpke::kem::X25519HkdfSha256;
use hpke::{Deserializable, Kem, Serializable};
use serde_json::Value;
use strandline_agent::keys::{Keyset, SlotSecret, load_key_file, open_slot, unlock};
use strandline_agent::seal::{OpenError, Opener};
use strandline_messages::format::block::{BLOCK_MAGIC, BlockHeaderV1};
use strandline_messages::format::keys::{Capability, KeySlotV1};
use strandline_messages::format::repository::RepositoryV1;
use strandline_tests::process::{self, Finished, Process};
use strandline_tests::rig::{Agent, PATIENCE, Rig, json_lines, random_files, settle};

fn text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not text")
}

/// A repository in a directory, made by `agent` with its key file, and the recovery key.
struct Local {
    scratch: tempfile::TempDir,
    agent: Agent,
    recovery: String,
}

impl Local {
    fn new() -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let agent = Agent::local(&scratch.path().join("home"), &scratch.path().join("repository"))?;
        let said = agent.run(&["init", "--json"])?.expect_code(0)?.stdout;
        let recovery = field(&said, "repository_created", "recovery_key")?;
        Ok(Self { scratch, agent, recovery })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    fn file(&self, name: &str, content: &str) -> Result<String> {
        let path = self.path(name);
        fs::write(&path, content)?;
        Ok(text(&path)?.to_owned())
    }

    /// A machine that has nothing but the path of the repository.
    fn empty_machine(&self, name: &str) -> Result<Agent> {
        Agent::local(&self.path(name), &self.path("repository"))
    }

    /// The repository's directory below its data directory.
    fn home(&self) -> Result<PathBuf> {
        repository_home(&self.path("repository/storage/local"))
    }
}

fn repository_home(tenant: &Path) -> Result<PathBuf> {
    let found = fs::read_dir(tenant)?.next().context("no repository")??;
    Ok(found.path())
}

fn field(stdout: &str, message_type: &str, name: &str) -> Result<String> {
    let lines = json_lines(stdout)?;
    let line = lines.iter().find(|line| line.get("message_type").and_then(Value::as_str) == Some(message_type));
    let value = line.and_then(|line| line.get(name)?.as_str()).with_context(|| format!("no {name} in {stdout}"))?;
    Ok(value.to_owned())
}

/// `strand key list --json`.
fn slots(agent: &Agent, options: &[&str]) -> Result<Vec<Value>> {
    json_lines(&agent.run(&[&["key", "list", "--json"], options].concat())?.expect_code(0)?.stdout)
}

fn id_of(slot: &Value) -> Result<&str> {
    slot.get("id").and_then(Value::as_str).context("a slot without id")
}

fn in_use(slot: &Value) -> bool {
    slot.get("in_use").and_then(Value::as_bool) == Some(true)
}

/// Refused with `code`, and `words` on standard error.
fn ensure_refused(finished: Finished, code: i32, words: &str) -> Result<()> {
    let finished = finished.expect_code(code)?;
    ensure!(finished.stderr.contains(words), "`{words}` is not in: {}", finished.stderr);
    ensure!(!finished.stderr.contains("panicked"), "{}", finished.stderr);
    Ok(())
}

#[test]
fn slots_are_added_listed_and_removed_but_never_the_last_and_the_one_in_use_only_by_force() -> Result<()> {
    let local = Local::new()?;
    let agent = &local.agent;
    let first = slots(agent, &[])?;
    ensure!(first.len() == 2 && first.iter().filter(|slot| in_use(slot)).count() == 1, "{first:?}");
    let own = first.iter().find(|slot| in_use(slot)).context("none in use")?;
    ensure!(own.get("capability").and_then(Value::as_str) == Some("full"), "{own}");
    let own = id_of(own)?.to_owned();

    let password = local.file("password", "first line\nsecond\n")?;
    let key_file = local.path("other.key");
    agent.run(&["key", "add", "--new-password-file", &password, "--label", "desk"])?.expect_code(0)?;
    agent.run(&["key", "add", "--new-password-command", "echo said"])?.expect_code(0)?;
    agent.run(&["key", "add", "--new-key-file", text(&key_file)?])?.expect_code(0)?;
    ensure!(fs::metadata(&key_file)?.permissions().mode() & 0o777 == 0o600);
    let said = agent.run(&["key", "add", "--new-recovery", "--json"])?.expect_code(0)?.stdout;
    let recovery = local.file("recovery", &field(&said, "key_added", "recovery_key")?)?;
    let recovery_slot = field(&said, "key_added", "id")?;
    ensure_refused(agent.run(&["key", "add"])?, 1, "--new-password-file")?;

    let other = local.empty_machine("other")?;
    let openers: [&[&str]; 4] = [
        &["--password-file", &password],
        &["--password-command", "echo said"],
        &["--key-file", text(&key_file)?],
        &["--recovery-key-file", &recovery],
    ];
    for options in openers {
        let seen = slots(&other, options)?;
        ensure!(seen.len() == 6 && seen.iter().filter(|slot| in_use(slot)).count() == 1, "{options:?} {seen:?}");
    }
    let table = agent.run(&["key", "list"])?.expect_code(0)?.stdout;
    for words in ["desk", "passphrase", "recovery key", "key file", "in use, full"] {
        ensure!(table.contains(words), "{table}");
    }

    ensure_refused(agent.run(&["key", "remove", &own])?, 1, "in use")?;
    ensure_refused(agent.run(&["key", "remove", "12345678901"])?, 1, "no key slot begins")?;
    ensure_refused(agent.run(&["key", "remove", "desk"])?, 1, "hexadecimal")?;
    agent.run(&["key", "remove", &recovery_slot[..12]])?.expect_code(0)?;
    other.run(&["snapshots", "--recovery-key-file", &recovery])?.expect_code(12)?;
    let all = slots(agent, &[])?;
    let others = all.iter().filter(|slot| !in_use(slot)).map(id_of).collect::<Result<Vec<_>>>()?;
    agent.run(&[&["key", "remove"], others.as_slice()].concat())?.expect_code(0)?;
    other.run(&["snapshots", "--password-file", &password])?.expect_code(12)?;
    ensure_refused(agent.run(&["key", "remove", &own, "--force"])?, 1, "no other one is left")?;
    ensure!(slots(agent, &[])?.len() == 1);
    Ok(())
}

#[test]
fn a_new_passphrase_replaces_the_old_one_and_a_kill_in_between_leaves_at_least_one() -> Result<()> {
    let local = Local::new()?;
    let agent = &local.agent;
    let words = ["zero", "one", "two", "three"].map(|word| local.file(word, word));
    let words = words.into_iter().collect::<Result<Vec<_>>>()?;
    agent.run(&["key", "add", "--new-password-file", &words[0], "--label", "desk"])?.expect_code(0)?;
    ensure_refused(agent.run(&["key", "passwd", "--new-password-file", &words[1]])?, 1, "no passphrase was given")?;
    let change =
        |old: &str, new: &str| agent.command(&["key", "passwd", "--password-file", old, "--new-password-file", new]);
    process::run(&mut change(&words[0], &words[1])?, PATIENCE)?.expect_code(0)?;
    agent.run(&["snapshots", "--password-file", &words[0]])?.expect_code(12)?;
    let after = slots(agent, &["--password-file", &words[1]])?;
    ensure!(after.len() == 3, "{after:?}");
    ensure!(after.iter().any(|slot| in_use(slot) && slot.get("label").and_then(Value::as_str) == Some("desk")));

    // Killed as soon as the new slot is there.
    let keys = local.home()?.join("keys");
    let names = || -> Result<BTreeSet<_>> {
        let names = fs::read_dir(&keys)?.map(|entry| Ok(entry?.file_name()));
        names.filter(|name| name.as_ref().is_ok_and(|name: &std::ffi::OsString| name.len() == 32)).collect()
    };
    let before = names()?;
    let mut running = Process::spawn(&mut change(&words[1], &words[2])?)?;
    running.wait_until(PATIENCE, || {
        let now = names()?;
        let is_there = !now.is_subset(&before);
        ensure!(is_there || now == before, "the old slot went before the new one came");
        Ok(is_there)
    })?;
    running.kill();
    let now = names()?;
    agent.run(&["snapshots", "--password-file", &words[2]])?.expect_code(0)?;
    let old_code = if before.is_subset(&now) { 0 } else { 12 };
    agent.run(&["snapshots", "--password-file", &words[1]])?.expect_code(old_code)?;
    process::run(&mut change(&words[2], &words[3])?, PATIENCE)?.expect_code(0)?;
    Ok(())
}

/// Another enrolled machine that holds nothing but a key file made for it, and the id of its slot.
fn holder(rig: &Rig, owner: &Agent, capability: &str) -> Result<(Agent, String)> {
    let file = rig.scratch().join(format!("{capability}.key"));
    let export = ["key", "export", "--json", "--capability", capability, "--out", text(&file)?];
    let said = owner.run(&export)?.expect_code(0)?.stdout;
    ensure!(fs::metadata(&file)?.permissions().mode() & 0o777 == 0o600);
    let own = fs::read_dir(owner.config().join("keys"))?.next().context("no key file")??.file_name();
    let machine = rig.enrolled(capability)?;
    fs::create_dir_all(machine.config().join("keys"))?;
    fs::rename(&file, machine.config().join("keys").join(own))?;
    Ok((machine, field(&said, "key_added", "id")?))
}

#[test]
fn s50_a_write_only_machine_saves_incrementally_and_all_that_it_holds_opens_nothing() -> Result<()> {
    let rig = Rig::direct()?;
    let owner = rig.owner("owner")?;
    let source = rig.scratch().join("source");
    random_files(&source, 50, 12, 40_000)?;
    // What the owner saved is not known in the other machine's domain.
    owner.backup(&source, &[])?;
    let (writer, slot) = holder(&rig, &owner, "write")?;

    settle();
    let first = writer.backup(&source, &[])?;
    ensure!(first.count("bytes_new")? >= 12 * 40_000, "{first:?}");
    let copy = rig.scratch().join("copy");
    strandline_tests::rig::copy_tree(&source, &copy)?;
    fs::write(source.join("file-0003"), "changed")?;
    let second = writer.backup(&source, &[])?;
    ensure!(second.count("files_read")? == 1 && second.count("bytes_new")? < 40_000, "{second:?}");
    let forced = writer.backup(&source, &["--force"])?;
    ensure!(forced.count("files_read")? == 12 && forced.count("bytes_new")? == 0, "{forced:?}");

    let listed = json_lines(&writer.run(&["snapshots", "--json"])?.expect_code(0)?.stdout)?;
    ensure!(listed.len() == 4 && listed.iter().all(|line| line.get("paths") == Some(&Value::Null)), "{listed:?}");
    ensure!(listed.iter().all(|line| line.get("files").and_then(Value::as_u64) == Some(12)));
    let shown = writer.run(&["snapshots"])?.expect_code(0)?.stdout;
    ensure!(shown.contains("paths are not shown"), "{shown}");
    let target = rig.scratch().join("stolen");
    ensure_refused(writer.run(&["restore", "latest", "--target", text(&target)?])?, 12, "may only write")?;
    ensure_refused(writer.run(&["ls", "latest"])?, 12, "may only write")?;
    ensure_refused(writer.run(&["key", "add", "--new-recovery"])?, 12, "full capability")?;
    ensure_refused(writer.run(&["key", "remove", &slot, "--force"])?, 12, "full capability")?;
    let own = slots(&writer, &[])?;
    ensure!(own.iter().any(|slot| slot.get("capability").and_then(Value::as_str) == Some("write")), "{own:?}");

    owner.restore_and_compare(&first.snapshot()?, &source, &copy, &rig.scratch().join("first"))?;
    owner.restore_and_compare(&second.snapshot()?, &source, &source, &rig.scratch().join("second"))?;
    ensure!(owner.run(&["ls", &first.snapshot()?])?.expect_code(0)?.stdout.contains("file-0003"));
    nothing_opens(&repository_home(&rig.data().join("storage/acme"))?, &owner, &writer)?;

    owner.run(&["key", "remove", &slot])?.expect_code(0)?;
    ensure_refused(writer.run(&["backup", text(&source)?])?, 12, "wrong key")?;
    ensure!(owner.snapshots()?.len() == 4);
    rig.ensure_no_panic()
}

fn only_key(agent: &Agent) -> Result<[u8; 32]> {
    let path = fs::read_dir(agent.config().join("keys"))?.next().context("no key file")??.path();
    Ok(*load_key_file(&path)?.context("no key file")?)
}

/// Every run of 32 bytes in the files below `directory`, as they are and as hexadecimal digits say.
fn candidates(directory: &Path, found: &mut Vec<[u8; 32]>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            candidates(&path, found)?;
            continue;
        }
        let bytes = fs::read(&path)?;
        found.extend(bytes.windows(32).filter_map(|window| <[u8; 32]>::try_from(window).ok()));
        let digits = bytes.windows(64).filter_map(|window| HEXLOWER_PERMISSIVE.decode(window).ok());
        found.extend(digits.filter_map(|bytes| <[u8; 32]>::try_from(bytes).ok()));
    }
    Ok(())
}

/// Tries everything that `writer` has on its disk, and what its key file opens, as a secret of every slot, as the private key
/// of the data keys, and as the data key of every block in the repository. The owner's key is the control.
fn nothing_opens(home: &Path, owner: &Agent, writer: &Agent) -> Result<()> {
    let file = RepositoryV1::decode(&fs::read(home.join("REPOSITORY"))?)?;
    let read_slot = |entry: std::io::Result<fs::DirEntry>| Ok(fs::read(entry?.path())?);
    let slots = fs::read_dir(home.join("keys"))?.map(read_slot).collect::<Result<Vec<_>>>()?;
    let open =
        |agent| -> Result<Keyset> { Ok(unlock(&slots, &[SlotSecret::KeyFile(only_key(agent)?)], &file)?.keyset) };
    let (full, narrow) = (open(owner)?, open(writer)?);
    ensure!(narrow.capability() == Capability::Write);
    let mut tried = vec![*narrow.id_key(), *narrow.chunker_secret()];
    candidates(writer.home(), &mut tried)?;
    ensure!(tried.len() > 1000 && tried.contains(&only_key(writer)?), "{} candidates", tried.len());

    let decoded = slots.iter().map(|slot| Ok(KeySlotV1::decode(slot)?)).collect::<Result<Vec<_>>>()?;
    for secret in &tried {
        for slot in &decoded {
            for secret in [SlotSecret::KeyFile(*secret), SlotSecret::Recovery(*secret)] {
                let opened = open_slot(slot, &secret);
                ensure!(opened.is_err() || opened.is_ok_and(|opened| opened.capability() == Capability::Write));
            }
        }
        let private = <X25519HkdfSha256 as Kem>::PrivateKey::from_bytes(secret);
        let public = private.map(|private| X25519HkdfSha256::sk_to_pk(&private).to_bytes().to_vec());
        ensure!(public.is_ok_and(|public| public != file.kem_public), "the private key of the data keys");
    }
    let mut blocks = 0;
    for pack in fs::read_dir(home.join("packs"))? {
        let bytes = fs::read(pack?.path())?;
        let starts = bytes.windows(8).enumerate().filter(|(_, window)| *window == BLOCK_MAGIC);
        for (start, _) in starts {
            let rest = bytes.get(start..).unwrap_or_default();
            let Ok(header) = BlockHeaderV1::decode(rest) else { continue };
            let block = rest.get(..header.block_bytes()).context("a cut block")?;
            Opener::new(&full).open(block)?.verify_ids()?;
            ensure!(matches!(Opener::new(&narrow).open(block), Err(OpenError::NoReadCapability)));
            for secret in &tried {
                let mut hasher = blake3::Hasher::new_derive_key("strandline 2026 block key v1");
                hasher.update(secret).update(file.id.as_bytes()).update(&header.salt);
                let mut derived = [0; 64];
                hasher.finalize_xof().fill(&mut derived);
                ensure!(derived[32..] != header.commitment, "the data key of a block");
            }
            blocks += 1;
        }
    }
    ensure!(blocks > 2, "{blocks} blocks");
    Ok(())
}

#[test]
fn s45_a_read_only_machine_lists_and_restores_and_changes_nothing() -> Result<()> {
    let rig = Rig::direct()?;
    let owner = rig.owner("owner")?;
    let source = rig.scratch().join("source");
    random_files(&source, 45, 5, 30_000)?;
    let snapshot = owner.backup(&source, &[])?.snapshot()?;
    let (reader, slot) = holder(&rig, &owner, "read")?;
    let (writer, _) = holder(&rig, &owner, "write")?;
    let theirs = writer.backup(&source, &[])?.snapshot()?;

    ensure!(reader.snapshots()?.len() == 2);
    ensure!(reader.run(&["ls", "latest"])?.expect_code(0)?.stdout.contains("file-0000"));
    reader.restore_and_compare(&snapshot, &source, &source, &rig.scratch().join("restored"))?;
    reader.restore_and_compare(&theirs, &source, &source, &rig.scratch().join("theirs"))?;
    ensure_refused(reader.run(&["backup", text(&source)?])?, 12, "may only read")?;
    ensure_refused(reader.run(&["key", "add", "--new-recovery"])?, 12, "full capability")?;
    ensure_refused(reader.run(&["key", "remove", &slot, "--force"])?, 12, "full capability")?;
    let out = rig.scratch().join("more.key");
    let export = ["key", "export", "--capability", "read", "--out", text(&out)?];
    ensure_refused(reader.run(&export)?, 12, "full capability")?;
    ensure!(!out.exists() && owner.snapshots()?.len() == 2 && slots(&owner, &[])?.len() == 4);
    rig.ensure_no_panic()
}

#[test]
fn a_machine_that_has_nothing_gets_a_key_file_of_its_own_by_the_recovery_key() -> Result<()> {
    let local = Local::new()?;
    let source = local.path("source");
    random_files(&source, 3, 3, 10_000)?;
    local.agent.backup(&source, &[])?;
    let recovery = local.file("recovery", &local.recovery)?;
    let machine = local.empty_machine("new")?;
    machine.run(&["snapshots"])?.expect_code(12)?;
    machine.run(&["key", "add", "--new-key-file", "--recovery-key-file", &recovery])?.expect_code(0)?;
    machine.restore_and_compare("latest", &source, &source, &local.path("restored"))?;
    let old = slots(&machine, &[])?;
    let lost = old.iter().find(|slot| !in_use(slot) && slot.get("kind").and_then(Value::as_str) == Some("key file"));
    machine.run(&["key", "remove", id_of(lost.context("no other key file")?)?])?.expect_code(0)?;
    local.agent.run(&["snapshots"])?.expect_code(12)?;
    Ok(())
}

#[test]
fn no_key_shows_in_any_output_however_much_is_logged() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let agent = Agent::local(&scratch.path().join("home"), &scratch.path().join("repository"))?;
    let source = scratch.path().join("source");
    random_files(&source, 4, 3, 10_000)?;
    let file = |name: &str, content: &str| -> Result<String> {
        fs::write(scratch.path().join(name), content)?;
        Ok(text(&scratch.path().join(name))?.to_owned())
    };
    let (password, changed) = ("correct-horse-battery", "staple-and-stapler");
    let (password_file, changed_file) = (file("password", password)?, file("changed", changed)?);
    let wrong_file = file("wrong", "wrong-horse-wrong-battery")?;
    let loud = |arguments: &[&str]| -> Result<Finished> {
        let mut command = agent.command(&[arguments, &["-vv"]].concat())?;
        process::run(command.env("STRAND_LOG", "trace").env("RUST_BACKTRACE", "full"), PATIENCE)
    };
    let made = loud(&["init", "--json"])?.expect_code(0)?;
    let recovery = field(&made.stdout, "repository_created", "recovery_key")?;
    let recovery_file = file("recovery", &recovery)?;
    let out = scratch.path().join("write.key");
    let (target, stolen) = (scratch.path().join("target"), scratch.path().join("stolen"));
    let runs: [&[&str]; 12] = [
        &["backup", text(&source)?],
        &["snapshots"],
        &["ls", "latest"],
        &["restore", "latest", "--target", text(&target)?],
        &["key", "add", "--new-password-file", &password_file],
        &["key", "passwd", "--password-file", &password_file, "--new-password-file", &changed_file],
        &["key", "export", "--capability", "write", "--out", text(&out)?],
        &["key", "list", "--recovery-key-file", &recovery_file],
        &["snapshots", "--password-file", &wrong_file],
        &["restore", "latest", "--key-file", text(&out)?, "--target", text(&stolen)?],
        &["backup", text(&source)?, "--key-file", text(&out)?],
        &["status"],
    ];
    let mut said = made.stderr;
    for arguments in runs {
        let finished = loud(arguments)?;
        ensure!(finished.status.code() != Some(101), "{arguments:?}: {finished:?}");
        said += &finished.stdout;
        said += &finished.stderr;
    }
    ensure!(said.contains("DEBUG") && said.len() > 10_000, "the log is not there: {said}");

    let home = repository_home(&scratch.path().join("repository/storage/local"))?;
    let repository = RepositoryV1::decode(&fs::read(home.join("REPOSITORY"))?)?;
    let read_slot = |entry: std::io::Result<fs::DirEntry>| Ok(fs::read(entry?.path())?);
    let slots = fs::read_dir(home.join("keys"))?.map(read_slot).collect::<Result<Vec<_>>>()?;
    let key = only_key(&agent)?;
    let keyset = unlock(&slots, &[SlotSecret::KeyFile(key)], &repository)?.keyset;
    let exported = *load_key_file(&out)?.context("nothing was exported")?;
    let recovery_bytes = *strandline_agent::keys::parse_recovery_key(&recovery)?;
    let lower = said.to_lowercase();
    for (name, secret) in [
        ("key file", key),
        ("exported key file", exported),
        ("recovery key", recovery_bytes),
        ("id key", *keyset.id_key()),
        ("chunker secret", *keyset.chunker_secret()),
    ] {
        ensure!(!lower.contains(&HEXLOWER.encode(&secret)), "{name} in hexadecimal");
        ensure!(!lower.contains(&HEXLOWER.encode(&secret[..8])), "a part of {name} in hexadecimal");
        ensure!(!lower.contains(&BASE32_NOPAD.encode(&secret[..10]).to_lowercase()), "{name} in base 32");
        let listed = secret.iter().take(8).map(u8::to_string).collect::<Vec<_>>().join(", ");
        ensure!(!said.contains(&listed), "{name} as a list");
    }
    let groups = recovery.replace('-', "").to_lowercase();
    for words in [&recovery.to_lowercase(), &groups, &recovery.to_lowercase()[..17], password, changed] {
        ensure!(!lower.contains(words), "{words} was said");
    }
    ensure!(!lower.contains("wrong-horse"), "a wrong passphrase was said");
    Ok(())
}

#[test]
fn a_running_backup_leaves_no_core_dump() -> Result<()> {
    let local = Local::new()?;
    let source = local.path("source");
    random_files(&source, 5, 20, 100_000)?;
    let mut backup = local.agent.start_backup(&source, &["--limit-upload", "64K"])?;
    let limits = PathBuf::from(format!("/proc/{}/limits", backup.id()));
    let is_zero = |limits: &str| {
        let line = limits.lines().find(|line| line.starts_with("Max core file size"));
        line.is_some_and(|line| line.split_whitespace().filter(|word| *word == "0").count() == 2)
    };
    // The program has to reach its first line.
    backup.wait_until(PATIENCE, || Ok(fs::read_to_string(&limits).is_ok_and(|text| is_zero(&text))))?;
    backup.kill();
    Ok(())
}
