//! A server, its tenant, enrolled agents and repositories in temporary directories: what a whole-system test starts from.
//!
//! Ports are free ones of 127.0.0.1. Behind a proxy the server may come back on another port, as after a restart: agents
//! know only the proxy. Everything is killed and removed when dropped.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;
use strandline_actors::runtime::clock;
use tempfile::TempDir;

use crate::process::{self, Finished, Process};
use crate::proxy::{Direction, Plan, Proxy};
use crate::random::Random;

/// Longest that any single command of a test may take.
pub const PATIENCE: Duration = Duration::from_secs(150);
/// The tenant that every rig has.
pub const TENANT: &str = "acme";
/// The repository that agents use.
pub const REPOSITORY: &str = "main";
/// Ports for servers that agents reach directly: below the range from which the system takes ports by itself.
const FIRST_PORT: u16 = 20_000;
const PORTS: u16 = 10_000;

/// A server with one tenant.
#[derive(Debug)]
pub struct Rig {
    scratch: TempDir,
    data: PathBuf,
    address: SocketAddr,
    proxy: Option<Proxy>,
    server: Option<Process>,
    /// What servers that have ended said.
    past: String,
    variables: Vec<(&'static str, String)>,
    /// The server's program.
    program: &'static str,
}

impl Rig {
    /// A running server that agents reach directly.
    pub fn direct() -> Result<Self> {
        Self::with(&[])
    }

    /// The same with `STRAND_SERVER_…` variables.
    pub fn with(variables: &[(&'static str, &str)]) -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let data = scratch.path().join("server");
        Self::build(scratch, data, None, variables)
    }

    /// A running server whose data is in `data`.
    pub fn in_directory(data: &Path) -> Result<Self> {
        Self::build(tempfile::tempdir()?, data.to_owned(), None, &[])
    }

    /// A running server behind a proxy that does no harm yet.
    pub fn proxied() -> Result<Self> {
        Self::proxied_with(&[])
    }

    /// The same with `STRAND_SERVER_…` variables.
    pub fn proxied_with(variables: &[(&'static str, &str)]) -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let data = scratch.path().join("server");
        // Nothing listens there; the address is replaced as soon as the server is up.
        let proxy = Proxy::start(SocketAddr::from((Ipv4Addr::LOCALHOST, 1)))?;
        Self::build(scratch, data, Some(proxy), variables)
    }

    /// A server behind a proxy, of another program, that does not run yet, its data in `data` if that is given.
    pub fn initialised(data: Option<&Path>, program: &'static str) -> Result<Self> {
        let scratch = tempfile::tempdir()?;
        let data = data.map_or_else(|| scratch.path().join("server"), Path::to_owned);
        let proxy = Proxy::start(SocketAddr::from((Ipv4Addr::LOCALHOST, 1)))?;
        Self::initialise(scratch, data, Some(proxy), &[], program)
    }

    fn build(
        scratch: TempDir,
        data: PathBuf,
        proxy: Option<Proxy>,
        variables: &[(&'static str, &str)],
    ) -> Result<Self> {
        let mut rig = Self::initialise(scratch, data, proxy, variables, "strand-server")?;
        rig.start_server()?;
        Ok(rig)
    }

    fn initialise(
        scratch: TempDir,
        data: PathBuf,
        proxy: Option<Proxy>,
        variables: &[(&'static str, &str)],
        program: &'static str,
    ) -> Result<Self> {
        let (address, listen) = if let Some(proxy) = &proxy {
            (proxy.address(), SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
        } else {
            let address = free_address()?;
            (address, address)
        };
        let variables = variables.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        let rig = Self { scratch, data, address, proxy, server: None, past: String::new(), variables, program };
        let (listen, advertise) = (listen.to_string(), address.to_string());
        rig.administer(&["init", "--name", "127.0.0.1", "--listen", &listen, "--advertise", &advertise])?;
        rig.administer(&["tenant", "add", TENANT])?;
        Ok(rig)
    }

    /// A directory for the test's own files, removed at the end.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// The server's data directory.
    pub fn data(&self) -> &Path {
        &self.data
    }

    /// Where agents connect: the proxy, or the server itself.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The proxy of [`Self::proxied`].
    pub fn proxy(&self) -> Result<&Proxy> {
        self.proxy.as_ref().context("this rig has no proxy")
    }

    /// The running server.
    pub fn server(&mut self) -> Result<&mut Process> {
        self.server.as_mut().context("the server does not run")
    }

    /// Sets a plan for connections made from now on; connections are counted from the next one.
    pub fn plan(&self, mut plan: Plan) -> Result<()> {
        let proxy = self.proxy()?;
        let accepted = proxy.connections();
        for cut in &mut plan.cuts {
            cut.connection = cut.connection.map(|number| number + accepted);
        }
        proxy.set_plan(plan);
        Ok(())
    }

    /// `strand-server --data … ARGUMENTS`, not started.
    pub fn server_command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = process::command(self.program, self.scratch.path())?;
        command.arg("--data").arg(&self.data).args(arguments);
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        Ok(command)
    }

    /// Runs an administration command that must succeed; returns its standard output.
    pub fn administer(&self, arguments: &[&str]) -> Result<String> {
        Ok(process::run(&mut self.server_command(arguments)?, PATIENCE)?.expect_code(0)?.stdout)
    }

    /// Starts the server and waits until it listens.
    pub fn start_server(&mut self) -> Result<()> {
        self.start_server_as(|command| command)
    }

    /// The same by a command that `wrap` makes of the server's.
    pub fn start_server_as(&mut self, wrap: impl FnOnce(Command) -> Command) -> Result<()> {
        let server = Process::spawn(&mut wrap(self.server_command(&["serve"])?))?;
        let listening = server.wait_until_listening(Duration::from_mins(1))?;
        if let Some(proxy) = &self.proxy {
            proxy.set_upstream(listening);
        }
        self.server = Some(server);
        Ok(())
    }

    /// SIGKILL.
    pub fn kill_server(&mut self) {
        if let Some(mut server) = self.server.take() {
            server.kill();
            // Its pipes are closed now, so this only reads what is left in them.
            let _ = server.wait(Duration::from_secs(5));
            self.past += &server.output();
        }
    }

    /// SIGTERM; fails unless the server ends with code 0 within `patience`.
    pub fn stop_server(&mut self, patience: Duration) -> Result<()> {
        let Some(mut server) = self.server.take() else { return Ok(()) };
        server.terminate()?;
        let status = server.wait(patience)?;
        self.past += &server.output();
        let code = status.context("the server does not stop in time")?.code();
        anyhow::ensure!(code == Some(0), "the server stopped with {code:?}:\n{}", server.output());
        Ok(())
    }

    /// Waits until so many more bytes have passed the proxy to the server, or `backup`, which sends them, has ended.
    pub fn wait_until_sent(&self, backup: &mut Process, bytes: u64) -> Result<()> {
        let proxy = self.proxy()?;
        let until = proxy.carried_bytes(Direction::ToServer) + bytes;
        let end = clock::now() + PATIENCE;
        while proxy.carried_bytes(Direction::ToServer) < until && backup.is_running() {
            let said = || format!("a backup is stuck:\n{}\nthe servers:\n{}", backup.output(), self.log());
            anyhow::ensure!(clock::now() < end, said());
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Gives servers started, and administration commands run, from now on this variable, or takes it from them.
    pub fn set_variable(&mut self, name: &'static str, value: Option<&str>) {
        self.variables.retain(|(known, _)| *known != name);
        self.variables.extend(value.map(|value| (name, value.to_owned())));
    }

    /// Restores `snapshot` with `reader`, fails unless it is what `expected` is, and removes what was restored.
    pub fn ensure_restores(&self, reader: &Agent, snapshot: &str, source: &Path, expected: &Path) -> Result<()> {
        let target = self.scratch().join(format!("restored-{}", snapshot.get(..12).unwrap_or(snapshot)));
        reader.restore_and_compare(snapshot, source, expected, &target)?;
        Ok(fs::remove_dir_all(target)?)
    }

    /// Everything that every server of this rig has said.
    pub fn log(&self) -> String {
        let now = self.server.as_ref().map(Process::output).unwrap_or_default();
        format!("{}{now}", self.past)
    }

    /// Waits until the log says `words` at least `times` times: a server that has closed a connection says so a moment later.
    pub fn ensure_logged(&self, words: &str, times: usize) -> Result<()> {
        let end = clock::now() + PATIENCE;
        loop {
            let found = self.log().matches(words).count();
            if found >= times {
                return Ok(());
            }
            anyhow::ensure!(
                clock::now() < end,
                "`{words}` stands {found} times in the log, not {times}:\n{}",
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The end of [`Self::log`]: what a failing test tells of it.
    pub fn last_words(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        lines.get(lines.len().saturating_sub(30)..).unwrap_or_default().join("\n")
    }

    /// Fails if a server panicked.
    pub fn ensure_no_panic(&self) -> Result<()> {
        let log = self.log();
        anyhow::ensure!(!log.contains("panicked at"), "the server panicked:\n{log}");
        Ok(())
    }

    /// A new enrolment token.
    pub fn token(&self) -> Result<String> {
        Ok(self.administer(&["token", "create", TENANT])?.trim().to_owned())
    }

    /// A machine that is not enrolled, with an empty home.
    pub fn machine(&self, name: &str) -> Result<Agent> {
        let home = self.scratch.path().join(name);
        fs::create_dir(&home)?;
        Ok(Agent { home, repository: format!("strand://{}/{REPOSITORY}", self.address) })
    }

    /// An enrolled machine.
    pub fn enrolled(&self, name: &str) -> Result<Agent> {
        let agent = self.machine(name)?;
        agent.run(&["enroll", &self.token()?, "--label", name])?.expect_code(0)?;
        Ok(agent)
    }

    /// An enrolled machine that has made the repository, so that it holds the key file.
    pub fn owner(&self, name: &str) -> Result<Agent> {
        let agent = self.enrolled(name)?;
        agent.run(&["init"])?.expect_code(0)?;
        Ok(agent)
    }

    /// Another enrolled machine that holds nothing but the key file of `owner`.
    pub fn second(&self, name: &str, owner: &Agent) -> Result<Agent> {
        let agent = self.enrolled(name)?;
        agent.take_keys_of(owner)?;
        Ok(agent)
    }
}

/// A machine that runs `strand`: a home directory and a repository.
#[derive(Clone, Debug)]
pub struct Agent {
    home: PathBuf,
    repository: String,
}

impl Agent {
    /// A machine with its home in `home` (made if missing) and a directory as its repository.
    pub fn local(home: &Path, repository: &Path) -> Result<Self> {
        fs::create_dir_all(home)?;
        Ok(Self { home: home.to_owned(), repository: repository.display().to_string() })
    }

    /// Its home.
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// Its configuration: keys and identities.
    pub fn config(&self) -> PathBuf {
        self.home.join(".config/strandline")
    }

    /// Its caches.
    pub fn state(&self) -> PathBuf {
        self.home.join(".cache/strandline")
    }

    /// The same machine with another repository.
    #[must_use]
    pub fn at(&self, repository: &str) -> Self {
        Self { home: self.home.clone(), repository: repository.to_owned() }
    }

    /// `strand ARGUMENTS -r REPOSITORY`, not started.
    pub fn command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = process::strand(&self.home)?;
        command.args(arguments).args(["-r", &self.repository]);
        Ok(command)
    }

    /// Runs it to its end.
    pub fn run(&self, arguments: &[&str]) -> Result<Finished> {
        process::run(&mut self.command(arguments)?, PATIENCE)
    }

    /// `strand backup --json PATH ARGUMENTS`, not started.
    pub fn backup_command(&self, path: &Path, arguments: &[&str]) -> Result<Command> {
        let mut command = self.command(&["backup", "--json"])?;
        command.arg(path).args(arguments);
        Ok(command)
    }

    /// Starts a backup.
    pub fn start_backup(&self, path: &Path, arguments: &[&str]) -> Result<Process> {
        Process::spawn(&mut self.backup_command(path, arguments)?)
    }

    /// A backup that must end with `code` and a summary.
    pub fn backup_with_code(&self, path: &Path, arguments: &[&str], code: i32) -> Result<Summary> {
        let finished = process::run(&mut self.backup_command(path, arguments)?, PATIENCE)?.expect_code(code)?;
        Summary::of(&finished.stdout, finished.stderr)
    }

    /// A backup that must end with code 0.
    pub fn backup(&self, path: &Path, arguments: &[&str]) -> Result<Summary> {
        self.backup_with_code(path, arguments, 0)
    }

    /// Restores `what` (a snapshot, or snapshot:path) into `target`; must end with code 0.
    pub fn restore(&self, what: &str, target: &Path) -> Result<Finished> {
        let target = target.to_str().context("the target's name is not text")?;
        self.run(&["restore", "--json", what, "--target", target])?.expect_code(0)
    }

    /// Restores the part of a snapshot that was saved from `source`, and compares it with `expected`.
    pub fn restore_and_compare(&self, snapshot: &str, source: &Path, expected: &Path, target: &Path) -> Result<()> {
        self.restore(snapshot, target)?;
        let restored = target.join(source.strip_prefix("/").unwrap_or(source));
        crate::compare::ensure_same(expected, &restored)
            .with_context(|| format!("snapshot {snapshot} restored to {}", target.display()))
    }

    /// The ids of all snapshots, oldest first.
    pub fn snapshots(&self) -> Result<Vec<String>> {
        let finished = self.run(&["snapshots", "--json"])?.expect_code(0)?;
        let id = |line: &Value| Ok(line.get("id").and_then(Value::as_str).context("a snapshot without id")?.to_owned());
        json_lines(&finished.stdout)?.iter().map(id).collect()
    }

    /// Copies the key files of `other`.
    pub fn take_keys_of(&self, other: &Self) -> Result<()> {
        let (from, to) = (other.config().join("keys"), self.config().join("keys"));
        fs::create_dir_all(&to)?;
        for entry in fs::read_dir(&from).with_context(|| format!("no keys in {}", from.display()))? {
            let entry = entry?;
            fs::copy(entry.path(), to.join(entry.file_name()))?;
        }
        Ok(())
    }

    /// The same machine twice: a second home with a copy of everything of this one.
    pub fn clone_to(&self, home: &Path) -> Result<Self> {
        copy_tree(&self.home, home)?;
        Ok(Self { home: home.to_owned(), repository: self.repository.clone() })
    }
}

/// The last line of `strand backup --json`.
#[derive(Clone, Debug)]
pub struct Summary {
    value: Value,
    /// What was said on standard error.
    pub stderr: String,
}

impl Summary {
    /// From standard output and standard error.
    pub fn of(stdout: &str, stderr: String) -> Result<Self> {
        let lines = json_lines(stdout)?;
        let is_summary = |line: &Value| line.get("message_type").and_then(Value::as_str) == Some("summary");
        let value = lines.into_iter().rfind(is_summary).with_context(|| format!("no summary in:\n{stdout}"))?;
        Ok(Self { value, stderr })
    }

    /// Of a backup that must end well.
    pub fn at_end_of(mut backup: Process) -> Result<Self> {
        let status = backup.wait(PATIENCE)?.with_context(|| format!("no end of:\n{}", backup.output()))?;
        anyhow::ensure!(status.success(), "{status}:\n{}", backup.output());
        backup.ensure_no_panic()?;
        Self::of(&backup.stdout_text(), backup.output())
    }

    /// A count by its name.
    pub fn count(&self, name: &str) -> Result<u64> {
        self.value.get(name).and_then(Value::as_u64).with_context(|| format!("no `{name}` in {}", self.value))
    }

    /// The id of the snapshot by which the file cache was made that was used.
    pub fn parent(&self) -> Option<&str> {
        self.value.get("parent").and_then(Value::as_str)
    }

    /// The snapshot's id.
    pub fn snapshot(&self) -> Result<String> {
        Ok(self.value.get("snapshot_id").and_then(Value::as_str).context("no snapshot was made")?.to_owned())
    }
}

/// Every line as JSON; an error names the line that is none.
pub fn json_lines(text: &str) -> Result<Vec<Value>> {
    text.lines().map(|line| serde_json::from_str(line).with_context(|| format!("not JSON: {line}"))).collect()
}

/// `count` files of `bytes` bytes each, that neither compress nor repeat, in the new directory `root`.
pub fn random_files(root: &Path, seed: u64, count: usize, bytes: usize) -> Result<()> {
    let mut random = Random::new(seed);
    fs::create_dir(root)?;
    for n in 0..count {
        fs::write(root.join(format!("file-{n:04}")), random.bytes(bytes))?;
    }
    Ok(())
}

/// Waits until every file changed so far is old enough for the file cache: entries whose ctime is within 2 s of a backup's
/// start are not trusted by the next one, because a later change could carry the same timestamp.
pub fn settle() {
    std::thread::sleep(Duration::from_millis(2_100));
}

/// `cp -a`: a copy with everything that belongs to files.
pub fn copy_tree(from: &Path, to: &Path) -> Result<()> {
    let status = Command::new("cp").arg("-a").arg(from).arg(to).status().context("cannot run cp")?;
    anyhow::ensure!(status.success(), "cp -a {} {} ended with {status}", from.display(), to.display());
    Ok(())
}

/// An address of 127.0.0.1 on which nothing listens and which no other test process is given.
pub fn free_address() -> Result<SocketAddr> {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let start = u16::try_from(std::process::id() % u32::from(PORTS))?;
    for _ in 0..PORTS {
        let offset = start.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed)) % PORTS;
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, FIRST_PORT + offset));
        if TcpListener::bind(address).is_ok() {
            return Ok(address);
        }
    }
    anyhow::bail!("no free port from {FIRST_PORT} on")
}

/// Says that a test could not be run here, and why. Not `println!`, which the test runner hides when a test passes.
pub fn not_run(reason: &str) {
    // There is nowhere else to say it.
    let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("NOT RUN: {reason}\n").as_bytes());
}

/// The command, not started, as a user without privileges: user 65534 if this one is root. `None`, with a line that says
/// so, where that is not possible.
pub fn unprivileged(command: Command) -> Result<Option<Command>> {
    if !rustix::process::geteuid().is_root() {
        return Ok(Some(command));
    }
    let reachable = process::binary("strand")?
        .ancestors()
        .all(|directory| directory.metadata().is_ok_and(|metadata| metadata.permissions().mode() & 0o001 != 0));
    if Command::new("setpriv").arg("--version").output().is_err() || !reachable {
        not_run("no setpriv, or another user cannot reach the program");
        return Ok(None);
    }
    let mut lowered = Command::new("setpriv");
    lowered.args(["--reuid", "65534", "--regid", "65534", "--clear-groups", "--"]);
    lowered.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => lowered.env(name, value),
            None => lowered.env_remove(name),
        };
    }
    Ok(Some(lowered))
}

/// A number that a variable gives, such as how long a campaign is.
pub fn number(variable: &str, default: u64) -> u64 {
    std::env::var(variable).ok().and_then(|value| value.parse().ok()).unwrap_or(default)
}

/// Whether the long campaigns are wanted (`STRAND_LONG=1`, set by `tests/run --long`).
pub fn is_long() -> bool {
    std::env::var_os("STRAND_LONG").is_some_and(|value| value == "1")
}
