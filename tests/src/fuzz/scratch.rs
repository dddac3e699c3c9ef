//! A directory for each thread that fuzzes what is read from files: in memory where there is such a file system.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

thread_local! {
    static DIRECTORY: TempDir = make();
}

fn make() -> TempDir {
    let builder = || tempfile::Builder::new().prefix("strandline-fuzz-").to_owned();
    let made = builder().tempdir_in("/dev/shm").or_else(|_| builder().tempdir());
    made.unwrap_or_else(|error| panic!("no temporary directory: {error}"))
}

/// Calls `work` with this thread's directory. What is in it is what the thread left there.
pub fn with<T>(work: impl FnOnce(&Path) -> T) -> T {
    DIRECTORY.with(|directory| work(directory.path()))
}

/// Writes `bytes` to the file `name` of this thread's directory.
pub fn file(name: &str, bytes: &[u8]) -> PathBuf {
    with(|directory| {
        let path = directory.join(name);
        let written = std::fs::write(&path, bytes);
        assert!(written.is_ok(), "{}: {written:?}", path.display());
        path
    })
}
