//! Another date for the real programs: `libfaketime`, which `tests/run` installs, answers their questions for the wall clock.
//! The monotonic clock, and so every time limit, stays as it is.

use std::path::{Path, PathBuf};
use std::process::Command;

/// Where Debian puts the library, for each architecture that it has.
const DIRECTORIES: [&str; 3] = ["/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib"];

/// The library, if it is installed.
pub fn library() -> Option<PathBuf> {
    let candidates = DIRECTORIES.iter().map(|directory| Path::new(directory).join("faketime/libfaketime.so.1"));
    candidates.into_iter().find(|path| path.is_file())
}

/// Has `command` live `hours` from now.
pub fn later<'a>(command: &'a mut Command, library: &Path, hours: u64) -> &'a mut Command {
    command
        .env("LD_PRELOAD", library)
        .env("FAKETIME", format!("+{hours}h"))
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        // Files' times are not read through it: a backup compares them with the file system's own clock.
        .env("NO_FAKE_STAT", "1")
}
