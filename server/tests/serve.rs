//! The real `strand-server` process: started, administered through its socket, told to reload and to stop.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "helpers of tests, outside `#[test]` functions"
)]

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::mpsc::{Receiver, sync_channel};
use std::thread;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use strandline_server::cli::{EXIT_DONE, EXIT_LOCKED};
use strandline_server::pki::Authority;

fn command(data: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_strand-server"));
    command.arg("--data").arg(data).args(["--lock-wait", "0s"]).args(arguments);
    command
}

fn run(data: &Path, arguments: &[&str]) -> Output {
    command(data, arguments).output().unwrap()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr)))
}

struct Server {
    child: Child,
    log: Receiver<String>,
}

impl Server {
    fn start(data: &Path) -> Self {
        let mut child = command(data, &["serve"])
            .env("STRAND_SERVER_LISTEN", "127.0.0.1:0")
            .env("STRAND_SERVER_LOG__FORMAT", "json")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let stderr = BufReader::new(child.stderr.take().unwrap());
        let (lines, log) = sync_channel(1024);
        thread::spawn(move || stderr.lines().map_while(Result::ok).try_for_each(|line| lines.send(line)));
        let server = Self { child, log };
        server.wait_for("server started");
        server
    }

    /// Reads the log until a message begins with `text`; panics when none comes for 30 s or the log ends.
    fn wait_for(&self, text: &str) {
        let mut seen = String::new();
        loop {
            let line = self
                .log
                .recv_timeout(Duration::from_secs(30))
                .unwrap_or_else(|_| panic!("`{text}` never came: {seen}"));
            let event: Value = serde_json::from_str(&line).unwrap();
            if event["fields"]["message"].as_str().is_some_and(|message| message.starts_with(text)) {
                return;
            }
            seen += &line;
        }
    }

    fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_server_is_administered_while_it_runs_reloads_and_stops() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path();
    assert!(run(data, &["init", "--name", "one.example"]).status.success());
    assert!(run(data, &["tenant", "add", "before"]).status.success());
    let mut server = Server::start(data);
    assert!(data.join("admin.sock").exists());

    assert!(run(data, &["tenant", "add", "during"]).status.success());
    let tenants = json(&run(data, &["tenant", "list", "--json"]));
    assert_eq!((&tenants[0]["name"], &tenants[1]["name"]), (&"before".into(), &"during".into()));
    let token = json(&run(data, &["token", "create", "during", "--json"]));
    let token: strandline_messages::EnrolmentToken = token["token"].as_str().unwrap().parse().unwrap();
    assert_eq!(token.authority, Authority::load(data).unwrap().hash());
    let status = json(&run(data, &["status", "--json"]));
    assert_eq!(status["running"], true);
    assert!(status["certificate_expires_s"].as_i64().unwrap() > 0);

    let second = run(data, &["serve"]);
    assert_eq!(second.status.code(), Some(EXIT_LOCKED.into()));
    let said = String::from_utf8(second.stderr).unwrap();
    assert!(said.contains(&format!("process {}", server.child.id())), "{said}");

    let path = data.join("strand-server.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("one.example", "two.example")).unwrap();
    server.signal(Signal::HUP);
    server.wait_for("new server certificate");
    std::fs::write(&path, "nonsense = 1").unwrap();
    server.signal(Signal::HUP);
    server.wait_for("the configuration was not read again");
    assert!(run(data, &["tenant", "list"]).status.success(), "a bad reload leaves the server running");

    server.signal(Signal::TERM);
    server.wait_for("server stopped");
    assert_eq!(server.child.wait().unwrap().code(), Some(EXIT_DONE.into()));
    assert!(!data.join("admin.sock").exists());
}

#[test]
fn s23_a_killed_server_leaves_nothing_that_stops_the_next() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path();
    assert!(run(data, &["init", "--name", "one.example"]).status.success());
    let mut server = Server::start(data);
    assert!(run(data, &["tenant", "add", "acme"]).status.success());
    server.signal(Signal::KILL);
    server.child.wait().unwrap();
    assert!(data.join("admin.sock").exists(), "the dead server's socket is still there");
    let tenants = json(&run(data, &["tenant", "list", "--json"]));
    assert_eq!(tenants[0]["name"], "acme");
    drop(Server::start(data));
}
