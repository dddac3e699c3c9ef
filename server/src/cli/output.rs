//! What people and programs are shown.

use std::io::Write;

use jiff::Timestamp;
use serde::Serialize;
use serde_json::json;
use strandline_actors::runtime::clock;

use super::init::Initialised;
use super::{EXIT_DONE, report};
use crate::admin::{AdminReply, StatusReport, TokenCreated};
use crate::tenancy::{AgentRecord, AgentState};

/// An error, for people or as `{"error": …, "exit_code": …}`. What cannot be written is lost: there is nowhere else.
pub(super) fn error(err: &mut dyn Write, json: bool, exit_code: u8, error: &anyhow::Error) {
    let _ = if json {
        print_json(err, &json!({ "error": format!("{error:#}"), "exit_code": exit_code }))
    } else {
        writeln!(err, "strand-server: {error:#}").map_err(Into::into)
    };
}

/// The result of `init`, and what to do next.
pub(super) fn initialised(
    out: &mut dyn Write,
    err: &mut dyn Write,
    json: bool,
    made: &Initialised,
) -> anyhow::Result<()> {
    let addresses: Vec<_> = made.config.advertised().iter().map(ToString::to_string).collect();
    if json {
        let config = made.data.join(crate::config::CONFIG_NAME);
        return print_json(
            out,
            &json!({ "data": made.data, "config": config, "addresses": addresses, "names": made.config.names }),
        );
    }
    let data = made.data.display();
    writeln!(out, "made a server in {data}; agents will look for it at {}", addresses.join(", "))?;
    writeln!(err, "next:\n  strand-server --data {data} tenant add NAME")?;
    writeln!(err, "  strand-server --data {data} serve")?;
    writeln!(
        err,
        "  strand-server --data {data} token create NAME\nkeep a copy of {data}/pki: without it every agent must enrol again"
    )?;
    Ok(())
}

/// The answer to an administration command; returns the exit code.
pub(super) fn reply(out: &mut dyn Write, err: &mut dyn Write, json: bool, reply: AdminReply) -> anyhow::Result<u8> {
    match reply {
        AdminReply::Repository(reply) => report::reply(out, err, json, reply),
        reply => identities(out, err, json, reply).map(|()| EXIT_DONE),
    }
}

fn identities(out: &mut dyn Write, err: &mut dyn Write, json: bool, reply: AdminReply) -> anyhow::Result<()> {
    let now_ns = clock::wall_ns();
    match reply {
        AdminReply::Tenant(tenant) if json => print_json(out, &tenant),
        AdminReply::Tenant(tenant) => Ok(writeln!(out, "added tenant {}", tenant.name)?),
        AdminReply::Tenants { tenants } if json => print_json(out, &tenants),
        AdminReply::Tenants { tenants } => {
            let rows = tenants
                .iter()
                .map(|tenant| vec![tenant.name.to_string(), tenant.agents.to_string(), date(tenant.created_ns)]);
            table(out, &["TENANT", "AGENTS", "ADDED"], rows.collect())
        }
        AdminReply::Token(token) => show_token(out, err, json, &token),
        AdminReply::Agents { agents } if json => {
            let with_state = |agent: &AgentRecord| -> serde_json::Result<serde_json::Value> {
                let mut value = serde_json::to_value(agent)?;
                if let Some(object) = value.as_object_mut() {
                    object.insert("state".to_owned(), serde_json::to_value(agent.state(now_ns))?);
                }
                Ok(value)
            };
            print_json(out, &agents.iter().map(with_state).collect::<serde_json::Result<Vec<_>>>()?)
        }
        AdminReply::Agents { agents } => {
            let rows = agents.iter().map(|agent| agent_row(agent, now_ns)).collect();
            table(out, &["AGENT", "TENANT", "HOST", "STATE", "LAST SEEN", "CERTIFICATE UNTIL"], rows)
        }
        AdminReply::Agent(agent) if json => print_json(out, &agent),
        AdminReply::Agent(agent) => {
            Ok(writeln!(out, "revoked agent {} ({}); its backups are kept", agent.id, agent.label)?)
        }
        AdminReply::Status(status) if json => print_json(out, &status),
        AdminReply::Status(status) => show_status(out, &status),
        AdminReply::Failed { message, .. } => anyhow::bail!(message),
        AdminReply::Repository(_) => Ok(()),
    }
}

fn show_token(out: &mut dyn Write, err: &mut dyn Write, json: bool, token: &TokenCreated) -> anyhow::Result<()> {
    if json {
        return print_json(out, token);
    }
    writeln!(out, "{}", token.token)?;
    writeln!(
        err,
        "good once, until {}, for one machine of tenant {}; on that machine: strand enroll TOKEN",
        date(token.expires_ns),
        token.tenant
    )?;
    Ok(())
}

fn agent_row(agent: &AgentRecord, now_ns: i64) -> Vec<String> {
    let state = match agent.state(now_ns) {
        AgentState::Enrolled => "enrolled",
        AgentState::Expired => "expired",
        AgentState::Revoked => "revoked",
    };
    vec![
        agent.id.to_string(),
        agent.tenant.to_string(),
        agent.label.clone(),
        state.to_owned(),
        agent.last_seen_ns.map_or_else(|| "never".to_owned(), date),
        date(agent.expires_ns),
    ]
}

fn show_status(out: &mut dyn Write, status: &StatusReport) -> anyhow::Result<()> {
    let state = match status.uptime_s {
        Some(uptime_s) => {
            let uptime = humantime::format_duration(std::time::Duration::from_secs(uptime_s));
            format!("running for {uptime}, listening on {}", status.listen.join(", "))
        }
        None => "no server is running on this directory".to_owned(),
    };
    writeln!(out, "strand-server {}: {state}", status.version)?;
    writeln!(out, "free space     {} of {}", size(status.free_bytes), size(status.total_bytes))?;
    let seconds = |seconds: i64| date(seconds.saturating_mul(1_000_000_000));
    if let Some(expires_s) = status.certificate_expires_s {
        writeln!(out, "certificate    until {}", seconds(expires_s))?;
    }
    writeln!(out, "authority      until {}", seconds(status.authority_expires_s))?;
    let tenants = status.tenants.iter().map(|tenant| format!("{} ({} agents)", tenant.name, tenant.agents));
    writeln!(out, "tenants        {}", none_or(&tenants.collect::<Vec<_>>()))?;
    let states = status.sessions_by_state.iter().map(|(state, count)| format!("{count} {state}"));
    writeln!(out, "sessions       {}; {} streams", none_or(&states.collect::<Vec<_>>()), status.streams)?;
    if !status.sessions.is_empty() {
        writeln!(out)?;
        let rows = status.sessions.iter().map(|session| {
            vec![
                session.id.clone(),
                session.kind.clone(),
                format!("{}/{}", session.tenant, session.repository),
                session.agent.chars().take(8).collect(),
                session.state.clone(),
                session.streams.to_string(),
                session.watermark.to_string(),
                date(session.opened_ns),
            ]
        });
        let head = ["SESSION", "KIND", "REPOSITORY", "AGENT", "STATE", "STREAMS", "BLOCKS", "SINCE"];
        table(out, &head, rows.collect())?;
    }
    if !status.repositories.is_empty() {
        writeln!(out)?;
        let rows = status.repositories.iter().map(|repository| {
            vec![
                format!("{}/{}", repository.tenant, repository.name),
                repository.snapshots.to_string(),
                size(repository.stored_bytes),
            ]
        });
        table(out, &["REPOSITORY", "SNAPSHOTS", "STORED"], rows.collect())?;
    }
    Ok(())
}

fn none_or(items: &[String]) -> String {
    if items.is_empty() { "none".to_owned() } else { items.join(", ") }
}

pub(super) fn print_json(target: &mut dyn Write, value: &impl Serialize) -> anyhow::Result<()> {
    writeln!(target, "{}", serde_json::to_string(value)?)?;
    Ok(())
}

/// Columns as wide as their widest cell, two spaces apart. Control characters never reach the terminal.
pub(super) fn table(out: &mut dyn Write, head: &[&str], rows: Vec<Vec<String>>) -> anyhow::Result<()> {
    let head: Vec<String> = head.iter().map(|&title| title.to_owned()).collect();
    let lines: Vec<Vec<String>> = std::iter::once(head)
        .chain(rows)
        .map(|row| row.iter().map(|cell| cell.chars().filter(|c| !c.is_control()).collect()).collect())
        .collect();
    let columns = lines.first().map_or(0, Vec::len);
    let width = |column: usize| {
        lines.iter().filter_map(|line| line.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for line in &lines {
        let padded: Vec<String> = line.iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
        writeln!(out, "{}", padded.join("  ").trim_end())?;
    }
    Ok(())
}

/// Nanoseconds since 1970 as UTC, to the second.
pub(super) fn date(ns: i64) -> String {
    Timestamp::from_second(ns.div_euclid(1_000_000_000)).map_or_else(|_| "?".to_owned(), |time| time.to_string())
}

/// Bytes with a binary unit.
#[expect(clippy::cast_precision_loss, reason = "for people, to one decimal")]
pub(super) fn size(bytes: u64) -> String {
    let mut value = bytes as f64;
    for unit in ["B", "KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            return if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") };
        }
        value /= 1024.0;
    }
    format!("{value:.1} PiB")
}
