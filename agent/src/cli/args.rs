//! The command line of `strand`, in restic's words wherever they exist.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

use super::backup::Backup;
use super::diff::Diff;
use super::dump::Dump;
use super::find::Find;
use super::forget::Forget;
use super::key::Key;
use super::ls::Ls;
use super::protect::Protect;
use super::restore::Restore;
use super::snapshots::Snapshots;
use super::stats::Stats;
use super::tag::Tag;
use super::undelete::Undelete;

/// Fast, deduplicated, encrypted backups over parallel mutual-TLS streams.
#[derive(Parser, Debug)]
#[command(name = "strand", version, about, max_term_width = 110)]
pub struct Arguments {
    /// What is common to all commands.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// Options of every command.
#[derive(Args, Debug, Clone)]
pub struct Global {
    /// A directory, or strand://HOST[:PORT]/REPOSITORY
    #[arg(short, long, global = true, env = "STRAND_REPOSITORY", value_name = "REPOSITORY")]
    pub repository: Option<String>,
    /// File whose first line is the passphrase
    #[arg(long, global = true, env = "STRAND_PASSWORD_FILE", value_name = "FILE")]
    pub password_file: Option<PathBuf>,
    /// Command whose first line of output is the passphrase
    #[arg(long, global = true, env = "STRAND_PASSWORD_COMMAND", value_name = "COMMAND")]
    pub password_command: Option<String>,
    /// Key file (64 hexadecimal digits) instead of the one in the configuration directory
    #[arg(long, global = true, env = "STRAND_KEY_FILE", value_name = "FILE")]
    pub key_file: Option<PathBuf>,
    /// File that holds the recovery key as it was printed
    #[arg(long, global = true, env = "STRAND_RECOVERY_KEY_FILE", value_name = "FILE")]
    pub recovery_key_file: Option<PathBuf>,
    /// Print JSON, one object per line; errors, too
    #[arg(long, global = true)]
    pub json: bool,
    /// Print errors only
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Say more; twice: log connections
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
    /// Wait so long for a repository directory that is in use
    #[arg(long, global = true, default_value = "0s", value_parser = duration, value_name = "TIME")]
    pub lock_wait: Duration,
    /// Keys and identities [default: ~/.config/strandline]
    #[arg(long, global = true, env = "STRAND_CONFIG_DIR", value_name = "DIR")]
    pub config_dir: Option<PathBuf>,
    /// File caches and temporary files [default: ~/.cache/strandline]
    #[arg(long, global = true, env = "STRAND_STATE_DIR", value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
    /// Settings file [default: strand.toml in the configuration directory, if it exists]
    #[arg(long, global = true, env = "STRAND_CONFIG", value_name = "FILE")]
    pub config: Option<PathBuf>,
}

/// What to do.
#[derive(Subcommand, Debug)]
pub enum Command {
    /// Make a repository (a directory makes itself at its first backup)
    Init,
    /// Save files and directories as a new snapshot
    Backup(Box<Backup>),
    /// List snapshots
    Snapshots(Snapshots),
    /// Delete snapshots, those named or those that a policy does not keep
    Forget(Box<Forget>),
    /// Bring deleted snapshots back
    Undelete(Undelete),
    /// Change the tags of snapshots
    Tag(Tag),
    /// Keep snapshots from being deleted by anybody
    Protect(Protect),
    /// Let snapshots be deleted again
    Unprotect(Protect),
    /// List the files of a snapshot
    Ls(Ls),
    /// Find files in snapshots
    Find(Find),
    /// Show what differs between two snapshots
    Diff(Diff),
    /// Write a file, or a directory as an archive, to standard output
    Dump(Dump),
    /// Count what snapshots hold and what they cost
    Stats(Stats),
    /// Restore a snapshot, or a part of it
    Restore(Restore),
    /// Free what no snapshot needs any more
    Prune(super::prune::Prune),
    /// Verify what is stored
    Check(super::check::Check),
    /// Show snapshots as a read-only file system, until it is unmounted
    Mount(super::mount::Mount),
    /// Show the repository and its server
    Status,
    /// Manage what opens the repository: passphrases, key files, recovery keys, keys for other machines
    Key(Key),
    /// Make this machine an agent of a server, with a token from `strand-server token create`
    Enroll {
        /// The token, one line
        token: String,
        /// Name of this machine for people [default: its host name]
        #[arg(long)]
        label: Option<String>,
    },
    /// Print shell completions
    Completions {
        /// For which shell
        shell: Shell,
    },
}

fn duration(text: &str) -> Result<Duration, String> {
    let parsed: jiff::SignedDuration = text.parse().map_err(|error: jiff::Error| error.to_string())?;
    Duration::try_from(parsed).map_err(|_| "a time cannot be negative".to_owned())
}

/// A moment, ns since 1970: RFC 3339, or a date with or without a time in this machine's time zone.
pub fn moment(text: &str) -> Result<i64, String> {
    let here = |text: &str| -> Result<jiff::Timestamp, jiff::Error> {
        Ok(text.parse::<jiff::civil::DateTime>()?.to_zoned(jiff::tz::TimeZone::system())?.timestamp())
    };
    let parsed = text.parse::<jiff::Timestamp>().or_else(|_| here(text));
    let time = parsed.map_err(|_| format!("`{text}` is no time such as `2026-01-31 12:00:00`"))?;
    i64::try_from(time.as_nanosecond()).map_err(|_| format!("`{text}` is too far away"))
}

/// Bytes with an optional binary unit: `4096`, `500K`, `10M`, `2G`.
pub fn bytes(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text.get(digits.len()..).unwrap_or_default().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        unit => return Err(format!("`{unit}` is not a unit: use K, M or G")),
    };
    let number: u64 = digits.trim().parse().map_err(|_| format!("`{text}` is not a size such as 500K or 10M"))?;
    match number.checked_mul(1 << shift) {
        Some(0) => Err("must be more than nothing".to_owned()),
        Some(bytes) => Ok(bytes),
        None => Err(format!("`{text}` is too much")),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn moments_are_local_unless_they_say_where() {
        assert_eq!(moment("1970-01-01T00:00:01Z"), Ok(1_000_000_000));
        assert_eq!(moment("1970-01-02T01:00:00+01:00"), Ok(86_400_000_000_000));
        assert!(moment("2026-01-31 12:00:00").is_ok() && moment("2026-01-31").is_ok());
        assert!(moment("yesterday").is_err());
    }

    #[test]
    fn sizes_have_binary_units() {
        assert_eq!(bytes("64K"), Ok(65_536));
        assert_eq!(bytes("10MiB"), Ok(10 << 20));
        assert!(bytes("10x").is_err());
        assert!(bytes("0").is_err());
        assert!(bytes("99999999999G").is_err());
    }
}
