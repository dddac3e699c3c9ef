//! `strand enroll`.

use serde::Serialize;
use strandline_messages::identity::EnrolmentToken;

use super::Fate;
use super::args::Global;
use super::output;
use super::repository::host_name;
use super::settings::Place;
use crate::identity::Store;
use crate::net::tls::enroll;

#[derive(Serialize)]
struct Report {
    message_type: &'static str,
    server: String,
    tenant: String,
    agent: String,
}

/// Runs the command.
pub async fn run(global: &Global, place: &Place, token: &str, label: Option<String>) -> anyhow::Result<Fate> {
    let token: EnrolmentToken = token.trim().parse()?;
    let agent = enroll(&token, &label.unwrap_or_else(host_name)).await?;
    let store = Store::new(&place.config_dir, agent.server.clone());
    store.save(&agent.key, &agent.certificate, &agent.authority, token.authority)?;
    let identity = agent.identity;
    if global.json {
        output::json_line(&Report {
            message_type: "enrolled",
            server: agent.server.to_string(),
            tenant: identity.tenant.to_string(),
            agent: identity.agent.to_string(),
        })?;
    } else if !global.quiet {
        let text = format!(
            "enrolled at {} as agent {} of tenant {}\nback up with `strand init -r strand://{}/NAME`, then `strand backup -r strand://{}/NAME PATH`\n",
            agent.server,
            identity.agent.short(),
            identity.tenant,
            agent.server,
            agent.server
        );
        output::print(text.as_bytes())?;
    }
    Ok(Fate::Done)
}
