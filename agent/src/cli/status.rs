//! `strand status`: the server as this agent may see it.

use std::time::Duration;

use serde::Serialize;
use strandline_messages::wire::StatusReported;

use super::Fate;
use super::args::Global;
use super::output;
use super::repository::{Connected, Location};
use super::settings::Place;

#[derive(Serialize)]
struct Report {
    server: String,
    tenant: String,
    agent: String,
    uptime_seconds: u64,
    free_bytes: u64,
    repositories: Vec<Repository>,
    sessions: Vec<Session>,
}

#[derive(Serialize)]
struct Repository {
    name: String,
    snapshots: u64,
    stored_bytes: u64,
}

#[derive(Serialize)]
struct Session {
    id: String,
    repository: String,
    agent: String,
    state: String,
    streams: u16,
    blocks: u64,
}

/// Runs the command.
pub async fn run(global: &Global, place: &Place) -> anyhow::Result<Fate> {
    let location = Location::find(global, place)?;
    let server = Connected::open(&location, false, global, place).await?;
    let asked = server.client.status().await;
    let local = server.directory.is_some();
    server.close().await?;
    let report = report(asked?);
    if global.json {
        output::json_line(&report)?;
    } else {
        output::print(text(&report, local).as_bytes())?;
    }
    Ok(Fate::Done)
}

fn report(status: StatusReported) -> Report {
    Report {
        server: status.software,
        tenant: status.tenant.to_string(),
        agent: status.agent.to_string(),
        uptime_seconds: status.uptime_seconds,
        free_bytes: status.free_bytes,
        repositories: status
            .repositories
            .into_iter()
            .map(|repository| Repository {
                name: repository.name.to_string(),
                snapshots: repository.snapshots,
                stored_bytes: repository.stored_bytes,
            })
            .collect(),
        sessions: status
            .sessions
            .into_iter()
            .map(|session| Session {
                id: session.session.to_string(),
                repository: session.repository.to_string(),
                agent: session.agent.to_string(),
                state: session.state,
                streams: session.streams,
                blocks: session.watermark,
            })
            .collect(),
    }
}

fn text(report: &Report, local: bool) -> String {
    let mut text = String::new();
    if !local {
        text.push_str(&format!(
            "server    {}, up {}\ntenant    {}\nagent     {}\n",
            report.server,
            output::span(Duration::from_secs(report.uptime_seconds)),
            report.tenant,
            report.agent
        ));
    }
    text += &format!("free      {}\n", output::size(report.free_bytes));
    let rows: Vec<_> = report
        .repositories
        .iter()
        .map(|row| vec![row.name.clone(), row.snapshots.to_string(), output::size(row.stored_bytes)])
        .collect();
    text.push('\n');
    text.push_str(&output::table(&["REPOSITORY", "SNAPSHOTS", "STORED"], &rows));
    if !report.sessions.is_empty() {
        let short = |id: &str| id.chars().take(8).collect::<String>();
        let row = |row: &Session| {
            let (streams, blocks) = (row.streams.to_string(), row.blocks.to_string());
            vec![short(&row.id), row.repository.clone(), short(&row.agent), row.state.clone(), streams, blocks]
        };
        let rows: Vec<_> = report.sessions.iter().map(row).collect();
        text.push('\n');
        text.push_str(&output::table(&["SESSION", "REPOSITORY", "AGENT", "STATE", "STREAMS", "BLOCKS"], &rows));
    }
    text
}
