//! The lock of a data directory: one process at a time. Taken before anything in the directory is opened; the kernel drops it
//! when its holder dies, however it dies.

use std::fs::File;
use std::io::{self, Read, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use strandline_actors::runtime::clock;

use super::{StorageError, files};
use crate::failpoint;

/// How long to sleep between two attempts.
const POLL: Duration = Duration::from_millis(20);
/// How much of the holder's text is shown, bytes.
const HOLDER_BYTES_MAX: u64 = 200;

/// A held lock. Released on [`DirectoryLock::release`], on drop, and when the process ends.
#[derive(Debug)]
pub struct DirectoryLock {
    file: File,
}

impl DirectoryLock {
    /// Takes the lock file `path` of `directory`, waiting at most `wait`. Blocks the calling thread.
    pub fn take(directory: &Path, path: &Path, wait: Duration) -> Result<Self, StorageError> {
        let open = files::open_or_read(File::options().read(true).write(true).create(true).truncate(false), path);
        let mut file = open.map_err(StorageError::io("open", path))?;
        let deadline = clock::now() + wait;
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => break,
                Err(error) if error == rustix::io::Errno::WOULDBLOCK => {
                    if clock::now() >= deadline {
                        return Err(StorageError::Locked { path: directory.to_path_buf(), holder: holder(&mut file) });
                    }
                    thread::sleep(POLL);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(StorageError::io("lock", path)(error.into())),
            }
        }
        let sign = |mut file: &File| -> io::Result<()> {
            file.set_len(0)?;
            file.write_all(format!("process {}\n", std::process::id()).as_bytes())
        };
        if let Err(error) = sign(&file) {
            // It holds all the same; whoever waits for it is told of another process, and not which.
            tracing::debug!(%error, path = %path.display(), "the lock could not be signed");
        }
        failpoint::reached("lock/signed");
        Ok(Self { file })
    }

    /// Gives the lock up now, while others may still hold this object.
    pub fn release(&self) {
        // Nothing can be done about a failure, and dropping the descriptor releases the lock in any case.
        let _ = flock(&self.file, FlockOperation::Unlock);
    }
}

fn holder(file: &mut File) -> String {
    let mut text = Vec::new();
    let read = file.take(HOLDER_BYTES_MAX).read_to_end(&mut text);
    match read {
        Ok(n) if n > 0 => String::from_utf8_lossy(&text).trim().to_owned(),
        _ => "another process".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_second_taker_is_told_who_holds_it_and_succeeds_after_release() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("LOCK");
        let first = DirectoryLock::take(dir.path(), &path, Duration::ZERO).unwrap();
        match DirectoryLock::take(dir.path(), &path, Duration::from_millis(30)) {
            Err(StorageError::Locked { holder, .. }) => {
                assert!(holder.contains(&std::process::id().to_string()), "{holder}");
            }
            other => panic!("{other:?}"),
        }
        first.release();
        DirectoryLock::take(dir.path(), &path, Duration::ZERO).unwrap();
    }
}
