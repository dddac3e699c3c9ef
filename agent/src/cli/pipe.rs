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
    let stop = Arc::new(AtomicBool::new(false));
    Pipe { content: Box::new(Buffered::new(io::stdin(), None, Arc::clone(&stop))), stop }
}

/// What the command `words` prints. It is started when its output is read for the first time; the end of the output is an
/// error if the command fails.
pub fn of_command(words: &[OsString]) -> anyhow::Result<Pipe> {
    let (program, arguments) = words.split_first().context("--stdin-from-command needs a command after `--`")?;
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
    let stop = Arc::new(AtomicBool::new(false));
    let output =
        Output { name: program.to_string_lossy().into_owned(), command, stop: Arc::clone(&stop), running: None };
    Ok(Pipe { content: Box::new(output), stop })
}

/// A command, and its output once it runs.
struct Output {
    name: String,
    command: Command,
    stop: Arc<AtomicBool>,
    running: Option<Buffered>,
}

impl Output {
    fn start(&mut self) -> io::Result<Buffered> {
        let name = self.name.clone();
        let failed = |error: io::Error| io::Error::new(error.kind(), format!("cannot run {name}: {error}"));
        let mut child = self.command.spawn().map_err(failed)?;
        let stdout = child.stdout.take().ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(Buffered::new(stdout, Some(Running { name: self.name.clone(), child }), Arc::clone(&self.stop)))
    }
}

impl Read for Output {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let running = match self.running.take() {
            Some(running) => running,
            None => self.start()?,
        };
        self.running.insert(running).read(buffer)
    }
}

/// Starts the thread that reads `source`.
fn read_ahead(mut source: impl Read + Send + 'static) -> Receiver<io::Result<Vec<u8>>> {
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
    buffers
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

impl Buffered {
    fn new(source: impl Read + Send + 'static, command: Option<Running>, stop: Arc<AtomicBool>) -> Self {
        Self { buffers: read_ahead(source), current: io::Cursor::default(), ended: false, command, stop }
    }
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
        let mut none = of_command(&["/no/such/command".into()]).unwrap();
        assert!(none.content.read(&mut [0]).unwrap_err().to_string().contains("/no/such/command"));
    }

    #[test]
    fn a_pipe_that_stays_silent_can_be_given_up() {
        let mut pipe = of_command(&["sleep".into(), "1000".into()]).unwrap();
        pipe.stop.store(true, Ordering::Relaxed);
        assert!(pipe.content.read(&mut [0]).unwrap_err().to_string().contains("interrupted"));
    }
}
