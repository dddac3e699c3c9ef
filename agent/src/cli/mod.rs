//! The command `strand`.

mod args;
mod backup;
mod changes;
mod check;
mod choice;
mod diff;
mod dump;
mod enroll;
mod fate;
mod filter;
mod find;
mod forget;
mod key;
mod key_add;
mod listing;
mod lists;
mod ls;
mod mount;
mod output;
mod pipe;
mod progress;
mod protect;
mod prune;
mod repository;
mod restore;
mod secrets;
mod selection;
mod selector;
mod session;
mod settings;
mod snapshots;
mod stats;
mod status;
mod tag;
mod undelete;

use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{CommandFactory, Parser};
use tracing_subscriber::EnvFilter;

use args::{Arguments, Command};
use settings::Place;

pub use fate::Fate;
pub use settings::Settings;

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    secrets::keep_out_of_dumps();
    let arguments = match Arguments::try_parse() {
        Ok(arguments) => arguments,
        Err(error) => {
            let wanted = matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion);
            // Nothing is left to be told to if this fails.
            let _ = error.print();
            return if wanted { ExitCode::SUCCESS } else { ExitCode::from(fate::FATAL) };
        }
    };
    start_log(arguments.global.verbose);
    let json = arguments.global.json;
    match actix_rt::System::new().block_on(run(arguments)) {
        Ok(fate) => ExitCode::from(fate.code()),
        Err(error) => {
            let code = fate::exit_code(&error);
            output::error(json, code, &told(&error));
            ExitCode::from(code)
        }
    }
}

/// An error with its causes; what a text says already is not said again.
fn told(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            text += &format!(": {cause}");
        }
    }
    text
}

async fn run(arguments: Arguments) -> anyhow::Result<Fate> {
    let Arguments { global, command } = arguments;
    if let Command::Completions { shell } = command {
        let mut script = Vec::new();
        clap_complete::generate(shell, &mut Arguments::command(), "strand", &mut script);
        output::print(&script)?;
        return Ok(Fate::Done);
    }
    let place = Place::find(&global)?;
    match command {
        Command::Init => repository::init(&global, &place).await,
        Command::Backup(backup) => backup::run(&global, &place, *backup).await,
        Command::Snapshots(snapshots) => snapshots::run(&global, &place, &snapshots).await,
        Command::Forget(forget) => forget::run(&global, &place, &forget).await,
        Command::Undelete(undelete) => undelete::run(&global, &place, &undelete).await,
        Command::Tag(tag) => tag::run(&global, &place, &tag).await,
        Command::Protect(protect) => protect::run(&global, &place, &protect, true).await,
        Command::Unprotect(protect) => protect::run(&global, &place, &protect, false).await,
        Command::Ls(ls) => ls::run(&global, &place, &ls).await,
        Command::Find(find) => find::run(&global, &place, find).await,
        Command::Diff(diff) => diff::run(&global, &place, diff).await,
        Command::Dump(dump) => dump::run(&global, &place, dump).await,
        Command::Stats(stats) => stats::run(&global, &place, stats).await,
        Command::Mount(mount) => mount::run(&global, &place, &mount).await,
        Command::Restore(restore) => restore::run(&global, &place, restore).await,
        Command::Prune(prune) => prune::run(&global, &place, &prune).await,
        Command::Check(check) => check::run(&global, &place, &check).await,
        Command::Status => status::run(&global, &place).await,
        Command::Key(key) => key::run(&global, &place, key).await,
        Command::Enroll { token, label } => enroll::run(&global, &place, &token, label).await,
        Command::Completions { .. } => Ok(Fate::Done),
    }
}

/// The log goes to standard error: warnings, or more with `-v`; `STRAND_LOG` decides if it is set.
fn start_log(verbose: u8) {
    let usual = match verbose {
        0 => "warn,sqlx=error",
        1 => "info,sqlx=error",
        _ => "debug,sqlx=warn",
    };
    let filter = EnvFilter::try_from_env("STRAND_LOG").unwrap_or_else(|_| EnvFilter::new(usual));
    let log = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false);
    // Only a second subscriber could make this fail.
    let _ = log.try_init();
}
