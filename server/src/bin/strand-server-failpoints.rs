//! `strand-server` with failpoints: for tests of crashes alone (see `failpoint`).

use std::process::ExitCode;

fn main() -> ExitCode {
    strandline_server::cli::main()
}
