//! `strand-server`: the Strandline backup server.

use std::process::ExitCode;

fn main() -> ExitCode {
    strandline_server::cli::main()
}
