//! What opens a repository, read from where the command line says: key files, passphrases, recovery keys.
//!
//! Whatever holds a secret is wiped when it is dropped and is given its whole size before it is filled, because a buffer that
//! grows leaves copies behind. Out of reach are the environment (`STRAND_PASSWORD`), what a password command keeps, and
//! values that the compiler moves on the stack.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, anyhow, bail};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};
use strandline_messages::RepositoryId;
use zeroize::Zeroizing;

use super::args::Global;
use super::settings::Place;
use crate::keys::{KeyError, SlotSecret, key_file_path, load_key_file, parse_recovery_key};

/// Most bytes that are read to find the first line of a file or of a command's output.
const SECRET_BYTES_MAX: usize = 64 << 10;
const PASSWORD_COMMAND: &str = "--password-command";

/// From now on this process leaves no core dump, and other processes of the same user can neither trace it nor read its
/// memory.
pub fn keep_out_of_dumps() {
    // A system that refuses one of them leaves the other: there is nothing else to do, and backups must go on.
    let _ = setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) });
    let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
}

/// Everything that may open the repository, what was asked for first. Never empty.
pub fn all(global: &Global, place: &Place, repository: &RepositoryId) -> anyhow::Result<Vec<SlotSecret>> {
    let mut secrets = Vec::with_capacity(3);
    if let Some(path) = global.key_file.as_ref().or(place.settings.key_file.as_ref()) {
        let key = load_key_file(path)?.ok_or_else(|| anyhow!("there is no key file {}", path.display()))?;
        secrets.push(SlotSecret::KeyFile(*key));
    }
    if let Some(path) = &global.recovery_key_file {
        let text = from_file(path).with_context(|| format!("cannot read {}", path.display()))?;
        secrets.push(SlotSecret::Recovery(*parse_recovery_key(&text)?));
    }
    secrets.extend(passphrase(global, place)?);
    // Whoever names a key wants to know whether that one opens the repository.
    if secrets.is_empty() {
        let path = key_file_path(&place.config_dir, repository);
        let missing =
            || format!("there is no key file {} and neither a passphrase nor a recovery key was given", path.display());
        let key = load_key_file(&path)?.ok_or_else(|| KeyError::WrongKey { tried: missing() })?;
        secrets.push(SlotSecret::KeyFile(*key));
    }
    Ok(secrets)
}

/// The passphrase, if one was given: by a file, a command or a variable.
pub fn passphrase(global: &Global, place: &Place) -> anyhow::Result<Option<SlotSecret>> {
    let file = global.password_file.as_ref().or(place.settings.password_file.as_ref());
    let command = global.password_command.as_ref().or(place.settings.password_command.as_ref());
    if let Some(given) = passphrase_from(file.map(AsRef::as_ref), command.map(AsRef::as_ref))? {
        return Ok(Some(given));
    }
    Ok(std::env::var("STRAND_PASSWORD").ok().filter(|text| !text.is_empty()).map(SlotSecret::Passphrase))
}

/// The passphrase in the first line of a file or else of a command's output.
pub fn passphrase_from(file: Option<&Path>, command: Option<&str>) -> anyhow::Result<Option<SlotSecret>> {
    let mut line = match (file, command) {
        (Some(path), _) => {
            from_file(path).with_context(|| format!("cannot read the password file {}", path.display()))?
        }
        (None, Some(command)) => from_command(command)?,
        (None, None) => return Ok(None),
    };
    Ok(Some(SlotSecret::Passphrase(std::mem::take(&mut *line))))
}

/// A command line as a snapshot keeps it: without password commands, which may hold a passphrase and are nobody's business who
/// may only read the snapshot.
pub fn without_commands(words: impl Iterator<Item = String>) -> String {
    let mut kept: Vec<String> = Vec::new();
    for word in words {
        let hidden = kept.last().is_some_and(|last| last == PASSWORD_COMMAND);
        let joined = word.strip_prefix(PASSWORD_COMMAND).is_some_and(|rest| rest.starts_with('='));
        kept.push(match (hidden, joined) {
            (true, _) => "…".to_owned(),
            (false, true) => format!("{PASSWORD_COMMAND}=…"),
            (false, false) => word,
        });
    }
    kept.join(" ")
}

fn from_file(path: &Path) -> anyhow::Result<Zeroizing<String>> {
    first_line(&read(File::open(path)?)?)
}

fn from_command(command: &str) -> anyhow::Result<Zeroizing<String>> {
    let mut shell = Command::new("/bin/sh").arg("-c").arg(command).stdout(Stdio::piped()).spawn()?;
    let output = match shell.stdout.take() {
        Some(mut output) => {
            let said = read(&mut output)?;
            // A command that says more than that is not interrupted.
            std::io::copy(&mut output, &mut std::io::sink())?;
            said
        }
        None => Zeroizing::default(),
    };
    let status = shell.wait()?;
    if !status.success() {
        bail!("the password command failed ({status}); nothing was changed");
    }
    first_line(&output)
}

fn read(source: impl Read) -> std::io::Result<Zeroizing<Vec<u8>>> {
    // A little more than is taken, so that the end is found without growing.
    let mut bytes = Zeroizing::new(Vec::with_capacity(SECRET_BYTES_MAX + 64));
    source.take(SECRET_BYTES_MAX as u64).read_to_end(&mut bytes)?;
    Ok(bytes)
}

fn first_line(bytes: &[u8]) -> anyhow::Result<Zeroizing<String>> {
    let line = bytes.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let text = std::str::from_utf8(line).context("the passphrase or key is not UTF-8 text")?.trim_end_matches('\r');
    if text.is_empty() { Err(anyhow!("the passphrase or key is empty")) } else { Ok(Zeroizing::new(text.to_owned())) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_line_counts_without_its_end() {
        for (bytes, line) in [(&b"one"[..], "one"), (b"one\ntwo\n", "one"), (b"one \r\n\r\n", "one ")] {
            assert_eq!(*first_line(bytes).unwrap(), line);
        }
        for bad in [&b""[..], b"\n", b"\r\nx", b"\xff\n"] {
            assert!(first_line(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_secret_is_read_into_a_buffer_that_never_grows() {
        let read = read(std::io::repeat(b'x')).unwrap();
        assert_eq!(read.len(), SECRET_BYTES_MAX);
        assert_eq!(read.capacity(), SECRET_BYTES_MAX + 64);
    }

    #[test]
    fn a_password_command_is_left_out_of_the_command_line() {
        let shown = |words: &[&str]| without_commands(words.iter().map(|word| (*word).to_owned()));
        assert_eq!(
            shown(&["strand", "--password-command", "echo x", "backup", "/"]),
            "strand --password-command … backup /"
        );
        assert_eq!(shown(&["strand", "--password-command=echo x", "a=b"]), "strand --password-command=… a=b");
    }

    #[test]
    fn a_process_that_keeps_out_of_dumps_is_not_dumpable() {
        keep_out_of_dumps();
        assert_eq!(rustix::process::dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable);
        let cores = rustix::process::getrlimit(Resource::Core);
        assert_eq!((cores.current, cores.maximum), (Some(0), Some(0)));
    }

    #[test]
    fn a_commands_first_line_is_the_passphrase_and_its_failure_is_told() {
        assert_eq!(*from_command("echo one; seq 1 100000").unwrap(), "one");
        assert!(from_command("echo one; exit 3").unwrap_err().to_string().contains("failed"));
    }
}
