//! `strand`: back up, list and restore.

use std::process::ExitCode;

fn main() -> ExitCode {
    strandline_agent::cli::main()
}
