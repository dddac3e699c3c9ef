//! The real programs as child processes: found where cargo built them, watched line by line, killed when dropped.

use std::collections::VecDeque;
use std::env;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal};
use strandline_actors::runtime::clock;

/// Most lines of output that are kept; older ones are forgotten.
const LINES_MAX: usize = 50_000;
/// Longest line that is kept whole, bytes.
const LINE_BYTES_MAX: u64 = 64 << 10;

/// Where cargo put the program called `name`, in the profile that this test was built with.
pub fn binary(name: &str) -> Result<PathBuf> {
    let mut directory = env::current_exe().context("cannot tell where this test runs from")?;
    directory.pop();
    if directory.file_name() == Some(OsStr::new("deps")) {
        directory.pop();
    }
    let path = directory.join(name);
    anyhow::ensure!(path.is_file(), "{} is not built: run `tests/run`, or `cargo build` as it does", path.display());
    Ok(path)
}

/// `name` with nothing of the caller's Strandline settings, and `home` as the place of all its state.
///
/// HOME and the XDG directories lead into `home`, and no `STRAND…` variable is inherited.
pub fn command(name: &str, home: &Path) -> Result<Command> {
    let mut command = Command::new(binary(name)?);
    for (variable, _) in env::vars_os() {
        if variable.as_encoded_bytes().starts_with(b"STRAND") || variable.as_encoded_bytes().starts_with(b"XDG_") {
            command.env_remove(variable);
        }
    }
    command.env("HOME", home).env("NO_COLOR", "1").env("RUST_BACKTRACE", "1");
    for (variable, directory) in [
        ("XDG_CONFIG_HOME", ".config"),
        ("XDG_CACHE_HOME", ".cache"),
        ("XDG_STATE_HOME", ".local/state"),
        ("XDG_DATA_HOME", ".local/share"),
        ("XDG_RUNTIME_DIR", ".run"),
    ] {
        command.env(variable, home.join(directory));
    }
    Ok(command)
}

/// The agent, `strand`.
pub fn strand(home: &Path) -> Result<Command> {
    command("strand", home)
}

/// The server, `strand-server`.
pub fn strand_server(home: &Path) -> Result<Command> {
    command("strand-server", home)
}

/// What a program that ran to its end left behind.
#[derive(Clone, Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: String,
    /// Its standard error.
    pub stderr: String,
}

impl Finished {
    /// Fails, with everything that the program said, unless it exited with `code`.
    pub fn expect_code(self, code: i32) -> Result<Self> {
        let Self { status, stdout, stderr } = &self;
        anyhow::ensure!(status.code() == Some(code), "{status}, not code {code}\nstdout:\n{stdout}\nstderr:\n{stderr}");
        Ok(self)
    }
}

/// Runs `command` to its end; kills it and fails when that takes longer than `patience`.
pub fn run(command: &mut Command, patience: Duration) -> Result<Finished> {
    let mut process = Process::spawn(command)?;
    let Some(status) = process.wait(patience)? else {
        anyhow::bail!("{} is not done after {patience:?}; it said:\n{}", process.name, process.output());
    };
    Ok(Finished { status, stdout: process.stdout.text(), stderr: process.stderr.text() })
}

/// A running program. Killed with SIGKILL, and waited for, when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    stdout: Arc<Log>,
    stderr: Arc<Log>,
    /// The threads that read the output; they end when the program closes it.
    readers: Vec<thread::JoinHandle<()>>,
}

impl Process {
    /// Starts `command` with its input empty and its output captured.
    pub fn spawn(command: &mut Command) -> Result<Self> {
        let name = Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start {name}"))?;
        let (stdout, stderr) = (Arc::new(Log::default()), Arc::new(Log::default()));
        let mut readers = Vec::new();
        if let Some(pipe) = child.stdout.take() {
            readers.push(stdout.clone().follow(pipe));
        }
        if let Some(pipe) = child.stderr.take() {
            readers.push(stderr.clone().follow(pipe));
        }
        Ok(Self { name, child, stdout, stderr, readers })
    }

    /// The process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Everything said so far, standard error after standard output.
    pub fn output(&self) -> String {
        format!("{}{}", self.stdout.text(), self.stderr.text())
    }

    /// Everything said so far on standard output alone.
    pub fn stdout_text(&self) -> String {
        self.stdout.text()
    }

    /// Waits for a line, on either output, that contains `text`. Lines said before count.
    pub fn wait_for_line(&self, text: &str, patience: Duration) -> Result<String> {
        let end = clock::now() + patience;
        loop {
            // Alternating short waits: the two outputs have a lock each, and a line may come on either.
            for log in [&self.stdout, &self.stderr] {
                if let Some(line) = log.wait_for(text, Duration::from_millis(20)) {
                    return Ok(line);
                }
            }
            let over = self.stdout.is_ended() && self.stderr.is_ended();
            let said = || format!("{} never said `{text}`; it said:\n{}", self.name, self.output());
            anyhow::ensure!(!over, "{} and has ended", said());
            anyhow::ensure!(clock::now() < end, "{} within {patience:?}", said());
        }
    }

    /// Waits for a line that contains "listening", and reads the first network address in it.
    pub fn wait_until_listening(&self, patience: Duration) -> Result<SocketAddr> {
        let line = self.wait_for_line("listening", patience)?;
        first_address(&line).with_context(|| format!("no address in `{line}`"))
    }

    /// Waits until `holds` says yes; an error if the program ends before that, or `patience` does.
    pub fn wait_until(&mut self, patience: Duration, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
        let end = clock::now() + patience;
        while !holds()? {
            anyhow::ensure!(
                self.is_running() && clock::now() < end,
                "what was waited for never came; it said:\n{}",
                self.output()
            );
            thread::yield_now();
        }
        Ok(())
    }

    /// Waits until the program ends and all its output is read; `None` if that takes longer than `patience`.
    pub fn wait(&mut self, patience: Duration) -> Result<Option<ExitStatus>> {
        let end = clock::now() + patience;
        loop {
            if let Some(status) = self.child.try_wait()? {
                for reader in self.readers.drain(..) {
                    let _ = reader.join();
                }
                return Ok(Some(status));
            }
            if clock::now() >= end {
                return Ok(None);
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Whether it still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Whether it has ended, and well.
    pub fn is_success(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_some_and(|status| status.success()))
    }

    /// SIGKILL: no warning, no clean-up. Returns when the process is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// SIGTERM: asks it to stop. Wait for that with [`Self::wait`].
    pub fn terminate(&self) -> Result<()> {
        self.signal(Signal::TERM)
    }

    /// SIGSTOP: freezes it until [`Self::thaw`].
    pub fn freeze(&self) -> Result<()> {
        self.signal(Signal::STOP)
    }

    /// SIGCONT.
    pub fn thaw(&self) -> Result<()> {
        self.signal(Signal::CONT)
    }

    /// Sends any signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("an impossible process id")?;
        rustix::process::kill_process(pid, signal).with_context(|| format!("cannot signal {}", self.name))
    }

    /// Fails if the program's output tells of a panic.
    pub fn ensure_no_panic(&self) -> Result<()> {
        let output = self.output();
        anyhow::ensure!(!output.contains("panicked at"), "{} panicked:\n{output}", self.name);
        Ok(())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Memory that the process `id` has in use (its resident set), bytes.
pub fn resident_bytes(id: u32) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
    Ok(kib << 10)
}

/// How many descriptors the process `id` has open.
pub fn descriptors(id: u32) -> Result<usize> {
    Ok(std::fs::read_dir(format!("/proc/{id}/fd"))?.count())
}

/// The first `address:port` in a line of log.
fn first_address(line: &str) -> Option<SocketAddr> {
    line.split(|c: char| c.is_whitespace() || "\"'`,;()=<>/".contains(c))
        .flat_map(|word| [Some(word), word.strip_prefix('[').and_then(|word| word.strip_suffix(']'))])
        .flatten()
        .find_map(|word| word.trim_end_matches(['.', ':']).parse().ok())
}

/// One output of a program.
#[derive(Debug, Default)]
struct Log {
    state: Mutex<LogState>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct LogState {
    lines: VecDeque<String>,
    ended: bool,
}

impl Log {
    /// Reads `pipe` to its end on a thread of its own.
    fn follow(self: Arc<Self>, pipe: impl Read + Send + 'static) -> thread::JoinHandle<()> {
        thread::spawn(move || {
            let mut reader = BufReader::new(pipe);
            let mut line = Vec::new();
            while let Ok(1..) = reader.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut line) {
                let text = String::from_utf8_lossy(&line).trim_end_matches('\n').to_owned();
                line.clear();
                let mut state = self.lock();
                if state.lines.len() >= LINES_MAX {
                    state.lines.pop_front();
                }
                state.lines.push_back(text);
                self.changed.notify_all();
            }
            self.lock().ended = true;
            self.changed.notify_all();
        })
    }

    fn lock(&self) -> MutexGuard<'_, LogState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_ended(&self) -> bool {
        self.lock().ended
    }

    fn text(&self) -> String {
        self.lock().lines.iter().flat_map(|line| [line.as_str(), "\n"]).collect()
    }

    fn wait_for(&self, text: &str, patience: Duration) -> Option<String> {
        let end: Instant = clock::now() + patience;
        let mut state = self.lock();
        loop {
            if let Some(line) = state.lines.iter().find(|line| line.contains(text)) {
                return Some(line.clone());
            }
            let left = end.saturating_duration_since(clock::now());
            if state.ended || left.is_zero() {
                return None;
            }
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    const LONG: Duration = Duration::from_secs(20);

    #[test]
    fn lines_are_awaited_on_both_outputs_and_the_address_is_read() {
        let script = "echo hello; echo 'INFO listening on 127.0.0.1:4567 (tls)' >&2; exec sleep 100";
        let mut process = Process::spawn(&mut shell(script)).unwrap();
        assert_eq!(process.wait_until_listening(LONG).unwrap(), "127.0.0.1:4567".parse().unwrap());
        assert_eq!(process.wait_for_line("hell", LONG).unwrap(), "hello");
        assert!(process.is_running());
        process.freeze().unwrap();
        process.thaw().unwrap();
        process.terminate().unwrap();
        assert_eq!(process.wait(LONG).unwrap().unwrap().code(), None, "ended by a signal");
        let error = process.wait_for_line("goodbye", LONG).unwrap_err().to_string();
        assert!(error.contains("never said `goodbye`") && error.contains("hello"), "{error}");
    }

    #[test]
    fn a_dropped_process_is_dead() {
        let process = Process::spawn(&mut shell("exec sleep 100")).unwrap();
        let entry = PathBuf::from(format!("/proc/{}", process.id()));
        assert!(entry.exists());
        drop(process);
        assert!(!entry.exists());
    }

    #[test]
    fn a_finished_program_tells_everything_when_its_code_is_wrong() {
        let finished = run(&mut shell("echo out; echo err >&2; exit 3"), LONG).unwrap();
        assert_eq!((finished.stdout.as_str(), finished.stderr.as_str()), ("out\n", "err\n"));
        let error = finished.clone().expect_code(0).unwrap_err().to_string();
        assert!(error.contains("out") && error.contains("err"), "{error}");
        finished.expect_code(3).unwrap();
        assert!(run(&mut shell("exec sleep 100"), Duration::from_millis(50)).is_err());
    }

    #[test]
    fn addresses_are_found_in_any_style_of_log() {
        for line in [
            "listening on [::1]:9847",
            "{\"message\":\"listening\",\"address\":\"[::1]:9847\"}",
            "listening address=[::1]:9847.",
            "started listening=[[::1]:9847]",
        ] {
            assert_eq!(first_address(line), Some("[::1]:9847".parse().unwrap()), "{line}");
        }
        assert_eq!(first_address("listening at 12:30:01"), None);
    }

    #[test]
    fn a_program_that_is_not_built_is_an_error_that_says_what_to_do() {
        let error = binary("no-such-program").unwrap_err().to_string();
        assert!(error.contains("cargo build"), "{error}");
    }
}
