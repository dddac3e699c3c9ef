//! Command lines as people type them.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use super::*;
use crate::storage::layout::DataPaths;
use crate::storage::lock::DirectoryLock;

pub(super) struct Output {
    pub code: u8,
    pub out: String,
    pub err: String,
}

pub(super) fn strand_server(data: &Path, arguments: &[&str]) -> Output {
    let (mut out, mut err) = (Vec::new(), Vec::new());
    let data = data.to_str().unwrap();
    let line = ["strand-server", "--data", data, "--lock-wait", "0s"].into_iter().chain(arguments.iter().copied());
    let code = run(line, &mut out, &mut err);
    Output { code, out: String::from_utf8(out).unwrap(), err: String::from_utf8(err).unwrap() }
}

pub(super) fn made() -> tempfile::TempDir {
    let root = tempfile::tempdir().unwrap();
    let output = strand_server(root.path(), &["init", "--name", "backup.example.com"]);
    assert_eq!(output.code, EXIT_DONE, "{}", output.err);
    root
}

#[test]
fn init_makes_a_server_and_the_second_time_says_what_is_there() {
    let root = tempfile::tempdir().unwrap();
    let data = root.path().join("new/server");
    let output = strand_server(root.path(), &["init", data.to_str().unwrap(), "--name", "backup.example.com"]);
    assert_eq!(output.code, EXIT_DONE, "{}", output.err);
    assert!(output.out.contains("backup.example.com:9847"), "{}", output.out);
    assert_eq!(strand_server(&data, &["tenant", "add", "acme"]).code, EXIT_DONE);
    let before = std::fs::read(data.join("pki/ca.crt")).unwrap();
    let again = strand_server(&data, &["init", data.to_str().unwrap()]);
    assert_eq!(again.code, EXIT_FAILED);
    for part in ["nothing was changed", "an authority valid until", "1 tenants (acme)"] {
        assert!(again.err.contains(part), "{}", again.err);
    }
    assert_eq!(std::fs::read(data.join("pki/ca.crt")).unwrap(), before);
}

#[test]
fn init_finishes_what_was_interrupted_and_leaves_other_directories_alone() {
    let root = made();
    let authority = std::fs::read(root.path().join("pki/ca.crt")).unwrap();
    std::fs::remove_file(root.path().join(CONFIG_NAME)).unwrap();
    assert_eq!(strand_server(root.path(), &["init"]).code, EXIT_DONE);
    assert_eq!(std::fs::read(root.path().join("pki/ca.crt")).unwrap(), authority);
    let other = tempfile::tempdir().unwrap();
    std::fs::write(other.path().join("letter.txt"), "dear").unwrap();
    let refused = strand_server(other.path(), &["init"]);
    assert_eq!(refused.code, EXIT_FAILED);
    assert!(refused.err.contains("letter.txt"), "{}", refused.err);
    assert_eq!(std::fs::read_dir(other.path()).unwrap().count(), 1);
}

#[test]
fn tenants_tokens_and_agents_are_managed_without_a_running_server() {
    let root = made();
    assert_eq!(strand_server(root.path(), &["tenant", "add", "acme"]).out, "added tenant acme\n");
    let tenants: Value = serde_json::from_str(&strand_server(root.path(), &["tenant", "list", "--json"]).out).unwrap();
    assert_eq!(tenants[0]["name"], "acme");
    let token = strand_server(root.path(), &["token", "create", "acme"]);
    let parsed: strandline_messages::EnrolmentToken = token.out.parse().unwrap();
    assert_eq!(parsed.addresses, ["backup.example.com:9847".parse().unwrap()]);
    assert!(token.err.contains("good once"), "{}", token.err);
    let long = strand_server(root.path(), &["token", "create", "acme", "--valid-for", "2h"]);
    assert!(long.code == EXIT_FAILED && long.err.contains("at most 1h"), "{}", long.err);
    assert_eq!(strand_server(root.path(), &["agent", "list", "--json"]).out, "[]\n");
    let revoked = strand_server(root.path(), &["agent", "revoke", &"0".repeat(32), "--json"]);
    let error: Value = serde_json::from_str(&revoked.err).unwrap();
    assert_eq!(error["exit_code"], 1);
    let status: Value = serde_json::from_str(&strand_server(root.path(), &["status", "--json"]).out).unwrap();
    assert_eq!(status["running"], false);
    assert!(strand_server(root.path(), &["status"]).out.contains("no server is running"));
}

#[test]
fn a_directory_in_use_ends_with_exit_code_11() {
    let root = made();
    let held = DirectoryLock::take(root.path(), &DataPaths::new(root.path()).lock(), Duration::ZERO).unwrap();
    let output = strand_server(root.path(), &["tenant", "list", "--json"]);
    assert_eq!(output.code, EXIT_LOCKED);
    let error: Value = serde_json::from_str(&output.err).unwrap();
    assert_eq!(error["exit_code"], 11);
    drop(held);
    assert_eq!(strand_server(root.path(), &["tenant", "list"]).code, EXIT_DONE);
}

#[test]
fn a_wrong_command_line_fails_and_help_does_not() {
    let root = tempfile::tempdir().unwrap();
    let wrong = strand_server(root.path(), &["tenant", "add", "Not A Name"]);
    assert!(wrong.code == EXIT_FAILED && wrong.err.contains("not a tenant name"), "{}", wrong.err);
    assert_eq!(strand_server(root.path(), &["--help"]).code, EXIT_DONE);
    assert!(strand_server(root.path(), &["completions", "bash"]).out.contains("strand-server"));
    let nowhere = strand_server(&root.path().join("x"), &["status"]);
    assert!(nowhere.code == EXIT_FAILED && nowhere.err.contains("strand-server init"), "{}", nowhere.err);
    let empty = strand_server(root.path(), &["tenant", "list"]);
    assert!(empty.code == EXIT_FAILED && empty.err.contains("strand-server init"), "{}", empty.err);
    assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 0);
}

#[test]
fn the_command_line_is_consistent() {
    Arguments::command().debug_assert();
}
