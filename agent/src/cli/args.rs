//! The command line of `strand`, in restic's words wherever they exist.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;

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
    Backup(Backup),
    /// List snapshots
    Snapshots(Snapshots),
    /// List the files of a snapshot
    Ls(Ls),
    /// Restore a snapshot, or a part of it
    Restore(Restore),
    /// Show snapshots as a read-only file system, until it is unmounted
    Mount(super::mount::Mount),
    /// Show the repository and its server
    Status,
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

/// `strand backup`.
#[derive(Args, Debug)]
pub struct Backup {
    /// Files and directories to save
    #[arg(required = true, value_name = "PATH")]
    pub paths: Vec<PathBuf>,
    /// Leave out what matches (`*.tmp`, `/var/cache`, `**/node_modules`); may be repeated
    #[arg(short, long, value_name = "PATTERN")]
    pub exclude: Vec<String>,
    /// Tag of the snapshot; may be repeated or separated by commas
    #[arg(long, value_name = "TAG", value_delimiter = ',')]
    pub tag: Vec<String>,
    /// Host label [default: this machine's host name]
    #[arg(long)]
    pub host: Option<String>,
    /// Stay on the file systems of the given paths
    #[arg(short = 'x', long)]
    pub one_file_system: bool,
    /// Parallel data streams, 1 to 64; the server may allow fewer
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub streams: Option<u16>,
    /// Send at most so much per second, over all streams (`500K`, `10M`; bytes without a unit)
    #[arg(long, value_name = "RATE", value_parser = bytes)]
    pub limit_upload: Option<u64>,
    /// Unacknowledged data that may be under way (`64M`)
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    pub window: Option<u64>,
    /// Read every file, whatever the file cache says
    #[arg(long)]
    pub force: bool,
    /// Send and store nothing; tell what would be
    #[arg(short = 'n', long)]
    pub dry_run: bool,
}

/// `strand snapshots`.
#[derive(Args, Debug)]
pub struct Snapshots {
    /// Only snapshots of this host
    #[arg(long)]
    pub host: Option<String>,
    /// Only snapshots with this tag; repeated: with all of them
    #[arg(long, value_name = "TAG")]
    pub tag: Vec<String>,
    /// Only the newest N of each host and set of paths
    #[arg(long, value_name = "N")]
    pub latest: Option<usize>,
}

/// `strand ls`.
#[derive(Args, Debug)]
pub struct Ls {
    /// An id or its beginning, `latest` or `latest~N`; then optionally `:PATH`
    pub snapshot: String,
    /// Mode, owner, size and time, too
    #[arg(short, long)]
    pub long: bool,
}

/// `strand restore`.
#[derive(Args, Debug)]
pub struct Restore {
    /// An id or its beginning, `latest` or `latest~N`; then optionally `:PATH`
    pub snapshot: String,
    /// Directory to restore into; made if it does not exist
    #[arg(short, long, value_name = "DIR")]
    pub target: PathBuf,
    /// Restore only what matches, and what lies below; may be repeated
    #[arg(short, long, value_name = "PATTERN")]
    pub include: Vec<String>,
    /// Leave out what matches; may be repeated
    #[arg(short, long, value_name = "PATTERN")]
    pub exclude: Vec<String>,
    /// What to do with files that exist; needed if the target is not empty
    #[arg(long, value_enum, value_name = "WHEN")]
    pub overwrite: Option<Overwrite>,
    /// Read everything again afterwards and compare it with the snapshot
    #[arg(long)]
    pub verify: bool,
    /// Parallel data streams, 1 to 64; the server may allow fewer
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=64))]
    pub streams: Option<u16>,
}

/// `--overwrite`.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Overwrite {
    /// Replace files
    Always,
    /// Replace files whose size or modification time differs
    IfChanged,
    /// Leave whatever exists
    Never,
}

fn duration(text: &str) -> Result<Duration, String> {
    let parsed: jiff::SignedDuration = text.parse().map_err(|error: jiff::Error| error.to_string())?;
    Duration::try_from(parsed).map_err(|_| "a time cannot be negative".to_owned())
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
    fn sizes_have_binary_units() {
        assert_eq!(bytes("64K"), Ok(65_536));
        assert_eq!(bytes("10MiB"), Ok(10 << 20));
        assert!(bytes("10x").is_err());
        assert!(bytes("0").is_err());
        assert!(bytes("99999999999G").is_err());
    }
}
