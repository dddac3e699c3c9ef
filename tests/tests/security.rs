//! Who is let in, and who is not.

use std::fs;
use std::io::Write;
use std::net::SocketAddr;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use strandline_tests::process::Finished;
use strandline_tests::proxy::Direction;
use strandline_tests::rig::{Agent, PATIENCE, Rig, not_run, random_files};

/// A refusal: code 1, and `words` on standard error.
fn ensure_refused(finished: Finished, words: &str) -> Result<()> {
    let finished = finished.expect_code(1)?;
    ensure!(finished.stderr.contains(words), "`{words}` is not in: {}", finished.stderr);
    Ok(())
}

fn agent_id(rig: &Rig, label: &str) -> Result<String> {
    let agents: Value = serde_json::from_str(&rig.administer(&["agent", "list", "--json"])?)?;
    let agents = agents.as_array().context("no list of agents")?;
    let ours = agents.iter().find(|agent| agent.get("label").and_then(Value::as_str) == Some(label));
    Ok(ours.and_then(|agent| agent.get("id")?.as_str()).context("no such agent")?.to_owned())
}

/// The directory below an agent's configuration where the identity for `address` is.
fn identity_directory(agent: &Agent, address: SocketAddr) -> std::path::PathBuf {
    agent.config().join("servers").join(format!("127.0.0.1_{}", address.port()))
}

#[test]
fn s41_machines_without_identity_with_another_servers_identity_and_of_other_tenants_get_nothing() -> Result<()> {
    let (rig, other) = (Rig::direct()?, Rig::direct()?);
    let owner = rig.owner("owner")?;
    let source = rig.scratch().join("source");
    random_files(&source, 41, 3, 1000)?;
    owner.backup(&source, &[])?;

    let nobody = rig.machine("nobody")?;
    nobody.take_keys_of(&owner)?;
    ensure_refused(nobody.run(&["snapshots"])?, "enroll")?;

    // A certificate of another authority, and that authority's word that the server is right.
    let stranger = other.enrolled("stranger")?;
    let here = identity_directory(&stranger, rig.address());
    let there = identity_directory(&stranger, other.address());
    ensure!(there.is_dir(), "{there:?}");
    fs::rename(&there, &here)?;
    let finished = stranger.at(&format!("strand://{}/main", rig.address())).run(&["snapshots"])?.expect_code(1)?;
    ensure!(!finished.stderr.contains("panicked"), "{}", finished.stderr);
    // The same with the right authority, so that only the agent's certificate is wrong.
    for entry in fs::read_dir(identity_directory(&owner, rig.address()))? {
        let entry = entry?;
        let name = entry.file_name();
        if !["agent", "key", "cert"].iter().any(|word| name.to_string_lossy().contains(word)) {
            fs::copy(entry.path(), here.join(&name))?;
        }
    }
    stranger.at(&format!("strand://{}/main", rig.address())).run(&["snapshots"])?.expect_code(1)?;

    // Another tenant of the same server asks for a repository of the same name.
    rig.administer(&["tenant", "add", "other"])?;
    let token = rig.administer(&["token", "create", "other"])?;
    let neighbour = rig.machine("neighbour")?;
    neighbour.take_keys_of(&owner)?;
    neighbour.run(&["enroll", token.trim()])?.expect_code(0)?;
    neighbour.run(&["snapshots"])?.expect_code(10)?;
    neighbour.backup_with_code(&source, &[], 10).err().context("a backup into a neighbour's repository")?;

    ensure!(owner.snapshots()?.len() == 1);
    rig.ensure_no_panic()
}

#[test]
fn s41_a_revoked_agent_is_cut_off_at_once_and_for_ever() -> Result<()> {
    let rig = Rig::proxied()?;
    let owner = rig.owner("owner")?;
    let thief = rig.second("thief", &owner)?;
    let source = rig.scratch().join("source");
    random_files(&source, 42, 60, 256 << 10)?;
    let start = rig.proxy()?.carried_bytes(Direction::ToServer);
    let mut backup = thief.start_backup(&source, &["--limit-upload", "1M"])?;
    rig.proxy()?.wait_for_bytes(Direction::ToServer, start + (1 << 20), PATIENCE)?;
    rig.administer(&["agent", "revoke", &agent_id(&rig, "thief")?])?;
    let status = backup.wait(Duration::from_secs(30))?.context("a revoked agent goes on")?;
    ensure!(status.code() == Some(1), "{status}: {}", backup.output());
    ensure_refused(thief.run(&["snapshots"])?, "enrol")?;
    ensure!(owner.snapshots()?.is_empty());
    owner.backup(&source, &[])?;
    rig.ensure_no_panic()
}

#[test]
fn s46_an_enrolment_token_is_good_once_for_a_short_time_and_only_as_it_was_printed() -> Result<()> {
    let rig = Rig::direct()?;
    let token = rig.token()?;
    let machine = rig.machine("first")?;
    machine.run(&["enroll", &token])?.expect_code(0)?;
    ensure_refused(rig.machine("second")?.run(&["enroll", &token])?, "token")?;

    let late = rig.administer(&["token", "create", "acme", "--valid-for", "1s"])?;
    std::thread::sleep(Duration::from_millis(1_200));
    ensure_refused(rig.machine("late")?.run(&["enroll", late.trim()])?, "token")?;

    let damaged = rig.machine("damaged")?;
    let fresh = rig.token()?;
    for at in [8, fresh.len() / 2, fresh.len() - 1] {
        let mut letters: Vec<char> = fresh.chars().collect();
        let letter = letters.get_mut(at).context("a short token")?;
        *letter = if *letter == 'q' { 'r' } else { 'q' };
        damaged.run(&["enroll", &letters.into_iter().collect::<String>()])?.expect_code(1)?;
    }
    damaged.run(&["enroll", ""])?.expect_code(1)?;
    // The damaged ones have not used it up.
    damaged.run(&["enroll", &fresh])?.expect_code(0)?;
    ensure_refused(process_refusal(&rig, &["token", "create", "acme", "--valid-for", "2h"])?, "1h")?;
    rig.ensure_no_panic()
}

fn process_refusal(rig: &Rig, arguments: &[&str]) -> Result<Finished> {
    strandline_tests::process::run(&mut rig.server_command(arguments)?, PATIENCE)
}

/// What `openssl s_client` says, with its input closed at once.
fn openssl(address: SocketAddr, options: &[&str]) -> Result<String> {
    let mut child = Command::new("openssl")
        .args(["s_client", "-connect", &address.to_string()])
        .args(options)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    if let Some(mut input) = child.stdin.take() {
        // It may have ended already.
        let _ = input.write_all(b"hello\n");
        std::thread::sleep(Duration::from_millis(500));
    }
    let output = child.wait_with_output()?;
    Ok(format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr)))
}

#[test]
fn s41_s47_old_tls_no_protocol_name_and_no_certificate_are_refused() -> Result<()> {
    if Command::new("openssl").arg("version").output().is_err() {
        not_run("there is no openssl");
        return Ok(());
    }
    let mut rig = Rig::direct()?;
    let address = rig.address();
    let attempts: [&[&str]; 4] = [
        &["-tls1_2", "-alpn", "strandline/1"],
        &["-tls1_3"],
        &["-tls1_3", "-alpn", "h2"],
        &["-tls1_3", "-alpn", "strandline/1"],
    ];
    for (n, options) in attempts.into_iter().enumerate() {
        let said = openssl(address, options)?;
        let log = rig.server()?.output();
        ensure!(log.matches("connection refused").count() == n + 1, "{options:?}: {said}\nserver:\n{log}");
    }
    rig.ensure_no_panic()
}
