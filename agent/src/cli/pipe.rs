//! Content that comes through a pipe: standard input, or the output of a command that must succeed.

use std::ffi::OsString;
use std::io::{self, Read};
use std::process::{Child, Command, Stdio};

use anyhow::Context;

use crate::backup::Pipe;

/// Standard input.
pub fn standard_input() -> Pipe {
    Pipe(Box::new(io::stdin()))
}

/// Starts `words` and gives what it prints. The end of it is an error if the command fails.
pub fn of_command(words: &[OsString]) -> anyhow::Result<Pipe> {
    let (program, arguments) = words.split_first().context("--stdin-from-command needs a command after `--`")?;
    let name = program.to_string_lossy().into_owned();
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped());
    let child = command.spawn().with_context(|| format!("cannot run {name}; nothing was saved"))?;
    Ok(Pipe(Box::new(Output { name, child, ended: false })))
}

/// The output of a running command, which is killed if nobody wants it any more.
struct Output {
    name: String,
    child: Child,
    ended: bool,
}

impl Read for Output {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = match &mut self.child.stdout {
            Some(stdout) if !self.ended => stdout.read(buffer)?,
            _ => return Ok(0),
        };
        if read == 0 && !buffer.is_empty() {
            self.ended = true;
            let status = self.child.wait()?;
            if !status.success() {
                return Err(io::Error::other(format!("{} failed ({status}): its output is not complete", self.name)));
            }
        }
        Ok(read)
    }
}

impl Drop for Output {
    fn drop(&mut self) {
        if !self.ended {
            // It may have ended by itself.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(script: &str) -> io::Result<Vec<u8>> {
        let mut pipe = of_command(&["sh".into(), "-c".into(), script.into()]).unwrap();
        let mut all = Vec::new();
        pipe.0.read_to_end(&mut all).map(|_| all)
    }

    #[test]
    fn what_a_command_prints_counts_only_if_it_succeeds() {
        assert_eq!(run("echo all").unwrap(), b"all\n");
        assert!(run("echo some; exit 3").unwrap_err().to_string().contains("exit status: 3"));
        assert!(run("echo some; kill -9 $$").is_err());
        assert!(of_command(&[]).is_err());
        assert!(of_command(&["/no/such/command".into()]).is_err());
    }
}
