//! The `strand-server` command line: arguments, and what is printed.
//!
//! Results go to standard output, errors and remarks to standard error; with `--json` both as JSON. Exit codes: 0 done,
//! 1 failed or damage was found, 10 no such repository, 11 locked or busy.

mod administer;
mod init;
mod inspect;
mod output;
mod report;
mod repositories;
mod rescue;

use std::ffi::OsString;
use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand};
use strandline_messages::identity::ServerAddress;
use strandline_messages::{AgentId, TenantName};
use tracing_subscriber::EnvFilter;

use crate::config::{CONFIG_NAME, Config, LogFormat};
use crate::engine::EngineError;
use crate::rescue::{rebuild, repair};
use crate::serve::{ServeOptions, serve};
use crate::storage::StorageError;
pub(crate) use administer::Refused;
use inspect::InspectArguments;
use repositories::{GcArguments, RepositoryCommand, ScrubArguments, SnapshotCommand};
use rescue::{CatalogCommand, RepairArguments};

/// Done.
pub const EXIT_DONE: u8 = 0;
/// Failed.
pub const EXIT_FAILED: u8 = 1;
/// No such repository.
pub const EXIT_NO_REPOSITORY: u8 = 10;
/// Locked or busy.
pub const EXIT_LOCKED: u8 = 11;

/// The Strandline backup server.
#[derive(Debug, Parser)]
#[command(name = "strand-server", version, about, max_term_width = 100)]
struct Arguments {
    /// The data directory.
    #[arg(long, global = true, value_name = "DIR", env = "STRAND_SERVER_DATA", default_value = "/var/lib/strandline")]
    data: PathBuf,
    /// The configuration file; DIR/strand-server.toml if not given.
    #[arg(long, global = true, value_name = "FILE", env = "STRAND_SERVER_CONFIG")]
    config: Option<PathBuf>,
    /// Print JSON.
    #[arg(long, global = true)]
    json: bool,
    /// How long to wait while another process uses the data directory.
    #[arg(long, global = true, value_name = "TIME", default_value = "5s", value_parser = humantime::parse_duration)]
    lock_wait: Duration,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make a new server in a data directory.
    Init(InitArguments),
    /// Run the server.
    Serve,
    /// Tenants: isolated from one another.
    #[command(subcommand)]
    Tenant(TenantCommand),
    /// Enrolment tokens: each lets one machine in, once.
    #[command(subcommand)]
    Token(TokenCommand),
    /// Enrolled machines.
    #[command(subcommand)]
    Agent(AgentCommand),
    /// Repositories and their settings.
    #[command(subcommand)]
    Repository(RepositoryCommand),
    /// Snapshots of a repository.
    #[command(subcommand)]
    Snapshot(SnapshotCommand),
    /// Free what no snapshot needs any more.
    Gc(GcArguments),
    /// Read stored blocks again and compare their digests.
    Scrub(ScrubArguments),
    /// The catalog: derived from the storage.
    #[command(subcommand)]
    Catalog(CatalogCommand),
    /// Repair packs, make the index anew, read everything. The server must not be running.
    Repair(RepairArguments),
    /// Show what is in a file of the storage, field by field. Needs no key and no lock.
    Inspect(InspectArguments),
    /// Show what the server is doing.
    Status,
    /// Print a completion script for a shell.
    Completions {
        /// The shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, Args)]
struct InitArguments {
    /// The data directory to make; --data if not given.
    dir: Option<PathBuf>,
    /// A host name or IP address of this server, as agents write it; may be repeated. This machine's name if not given.
    #[arg(long = "name", value_name = "HOST")]
    names: Vec<String>,
    /// An address to listen on; may be repeated.
    #[arg(long, value_name = "ADDR")]
    listen: Vec<SocketAddr>,
    /// Where agents reach the server, if not under its names and port; may be repeated.
    #[arg(long, value_name = "HOST:PORT")]
    advertise: Vec<ServerAddress>,
}

#[derive(Debug, Subcommand)]
enum TenantCommand {
    /// Add a tenant.
    Add {
        /// Its name.
        name: TenantName,
    },
    /// List the tenants.
    List,
}

#[derive(Debug, Subcommand)]
enum TokenCommand {
    /// Make a token and print it: hand it to the machine, for `strand enroll`.
    Create {
        /// The tenant that the machine will belong to.
        tenant: TenantName,
        /// How long the token is good, at most 1h.
        #[arg(long, value_name = "TIME", default_value = "1h", value_parser = humantime::parse_duration)]
        valid_for: Duration,
    },
}

#[derive(Debug, Subcommand)]
enum AgentCommand {
    /// List the agents.
    List {
        /// Only those of this tenant.
        tenant: Option<TenantName>,
    },
    /// Bar an agent for ever. Its backups are kept.
    Revoke {
        /// The agent's id, as `agent list` shows it.
        agent: AgentId,
    },
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let code = run(std::env::args_os(), &mut std::io::stdout(), &mut std::io::stderr());
    ExitCode::from(code)
}

/// Runs one command line; `out` gets results, `err` errors and remarks. Returns the exit code.
pub fn run(
    arguments: impl IntoIterator<Item = impl Into<OsString> + Clone>,
    out: &mut dyn Write,
    err: &mut dyn Write,
) -> u8 {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => return usage(&error, out, err),
    };
    let json = arguments.json;
    match execute(arguments, out, err) {
        Ok(code) => code,
        Err(error) => {
            let code = exit_code(&error);
            output::error(err, json, code, &error);
            code
        }
    }
}

/// Help and version are results; a wrong command line is a failure, with exit code 1.
fn usage(error: &clap::Error, out: &mut dyn Write, err: &mut dyn Write) -> u8 {
    let wanted = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
    let text = error.render();
    let written = if wanted { write!(out, "{text}") } else { write!(err, "{text}") };
    if wanted && written.is_ok() { EXIT_DONE } else { EXIT_FAILED }
}

fn execute(arguments: Arguments, out: &mut dyn Write, err: &mut dyn Write) -> anyhow::Result<u8> {
    let Arguments { data, config, json, lock_wait, command } = arguments;
    let config_path = config.unwrap_or_else(|| data.join(CONFIG_NAME));
    match command {
        Command::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Arguments::command(), "strand-server", &mut script);
            out.write_all(&script)?;
        }
        Command::Init(init) => {
            let data = init.dir.clone().unwrap_or(data);
            let made = in_runtime(init::init(&data, &init, lock_wait))?;
            output::initialised(out, err, json, &made)?;
        }
        Command::Serve => {
            let config = Config::load(&config_path)?;
            start_log(&config)?;
            in_runtime(serve(ServeOptions { data, config_path, config, lock_wait }))?;
        }
        Command::Catalog(CatalogCommand::Rebuild) => {
            administer::ensure_repositories(&data)?;
            let rebuilt = in_runtime(rebuild::rebuild(&data, lock_wait))?;
            return rescue::rebuilt(out, err, json, &rebuilt);
        }
        Command::Repair(RepairArguments { repository, dry_run }) => {
            administer::ensure_repositories(&data)?;
            let repaired = in_runtime(async { repair::repair(&data, repository.as_ref(), dry_run, lock_wait).await })?;
            return rescue::repaired(out, json, &repaired);
        }
        Command::Inspect(arguments) => return inspect::inspect(out, json, &arguments),
        command => {
            let Some(request) = administer::request(command)? else { return Ok(EXIT_DONE) };
            let reply = in_runtime(administer::administer(&data, &config_path, lock_wait, request))?;
            return output::reply(out, err, json, reply);
        }
    }
    Ok(EXIT_DONE)
}

fn in_runtime<T>(future: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    actix_rt::System::new().block_on(future)
}

/// The log goes to standard error. A filter that cannot be understood is an error, not silence.
fn start_log(config: &Config) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&config.log.filter)
        .map_err(|error| anyhow::anyhow!("configuration: `log.filter` cannot be understood: {error}"))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let started = match config.log.format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
    started.map_err(|error| anyhow::anyhow!("the log cannot be started: {error}"))
}

fn exit_code(error: &anyhow::Error) -> u8 {
    if let Some(Refused { exit_code, .. }) = error.downcast_ref() {
        return *exit_code;
    }
    let locked = matches!(error.downcast_ref(), Some(StorageError::Locked { .. }))
        || matches!(error.downcast_ref(), Some(EngineError::Locked { .. }));
    if locked { EXIT_LOCKED } else { EXIT_FAILED }
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;

#[cfg(test)]
mod repository_tests;
