//! Content that comes through a pipe: standard input, or the output of a command that must succeed.
//!
//! A thread of its own reads the pipe, so that a backup that is interrupted need not wait for whoever writes into it. It is at
//! most two buffers ahead, and ends with the pipe, with its reader, or with the process.

use std::ffi::OsString;
use std::io::{self, Read};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::Context;
use crossbeam_channel::{Receiver, RecvTimeoutError, bounded};

use crate::backup::Pipe;

/// Bytes read at once.
const BUFFER_BYTES: usize = 256 << 10;
/// How often it is looked whether the backup was interrupted.
const LOOK_UP: Duration = Duration::from_millis(200);

/// Standard input.
pub fn standard_input() -> Pipe {
    pipe(io::stdin(), None)
}

/// Starts `words` and gives what it prints. The end of it is an error if the command fails.
pub fn of_command(words: &[OsString]) -> anyhow::Result<Pipe> {
    let (program, arguments) = words.split_first().context("--stdin-from-command needs a command after `--`")?;
    let name = program.to_string_lossy().into_owned();
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("cannot run {name}; nothing was saved"))?;
    let stdout = child.stdout.take().context("the command has no output")?;
    Ok(pipe(stdout, Some(Running { name, child })))
}

fn pipe(mut source: impl Read + Send + 'static, command: Option<Running>) -> Pipe {
    let (sender, buffers) = bounded(1);
    std::thread::spawn(move || {
        loop {
            let mut buffer = vec![0; BUFFER_BYTES];
            let read = source.read(&mut buffer).map(|length| {
                buffer.truncate(length);
                buffer
            });
            let goes_on = match &read {
                Ok(buffer) => !buffer.is_empty(),
                Err(error) => error.kind() == io::ErrorKind::Interrupted,
            };
            if sender.send(read).is_err() || !goes_on {
                return;
            }
        }
    });
    let stop = Arc::new(AtomicBool::new(false));
    let content = Buffered { buffers, current: io::Cursor::default(), ended: false, command, stop: Arc::clone(&stop) };
    Pipe { content: Box::new(content), stop }
}

/// A command, killed if nobody waits for its end.
struct Running {
    name: String,
    child: Child,
}

impl Running {
    fn end(&mut self) -> io::Result<()> {
        let status = self.child.wait()?;
        if status.success() {
            return Ok(());
        }
        Err(io::Error::other(format!("{} failed ({status}): its output is not complete", self.name)))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

struct Buffered {
    buffers: Receiver<io::Result<Vec<u8>>>,
    current: io::Cursor<Vec<u8>>,
    ended: bool,
    command: Option<Running>,
    stop: Arc<AtomicBool>,
}

impl Read for Buffered {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            let read = self.current.read(buffer)?;
            if read > 0 || self.ended || buffer.is_empty() {
                return Ok(read);
            }
            match self.buffers.recv_timeout(LOOK_UP) {
                Ok(next) => {
                    let next = next?;
                    if next.is_empty() {
                        self.command.as_mut().map_or(Ok(()), Running::end)?;
                        self.ended = true;
                    }
                    self.current = io::Cursor::new(next);
                }
                Err(RecvTimeoutError::Timeout) if self.stop.load(Ordering::Relaxed) => {
                    return Err(io::Error::other("interrupted"));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(io::ErrorKind::BrokenPipe.into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(script: &str) -> io::Result<Vec<u8>> {
        let mut pipe = of_command(&["sh".into(), "-c".into(), script.into()]).unwrap();
        let mut all = Vec::new();
        pipe.content.read_to_end(&mut all).map(|_| all)
    }

    #[test]
    fn what_a_command_prints_counts_only_if_it_succeeds() {
        assert_eq!(run("echo all").unwrap(), b"all\n");
        assert_eq!(run("head -c 3000000 /dev/zero").unwrap().len(), 3_000_000);
        assert!(run("echo some; exit 3").unwrap_err().to_string().contains("exit status: 3"));
        assert!(run("echo some; kill -9 $$").is_err());
        assert!(of_command(&[]).is_err());
        assert!(of_command(&["/no/such/command".into()]).is_err());
    }

    #[test]
    fn a_pipe_that_stays_silent_can_be_given_up() {
        let mut pipe = of_command(&["sleep".into(), "1000".into()]).unwrap();
        pipe.stop.store(true, Ordering::Relaxed);
        assert!(pipe.content.read(&mut [0]).unwrap_err().to_string().contains("interrupted"));
    }
}
