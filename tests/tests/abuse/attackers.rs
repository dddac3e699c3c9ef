//! Who attacks, and with what.

use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use rustls::ClientConfig;
use serde_json::Value;
use strandline_agent::identity::{EnrolmentKey, Store};
use strandline_agent::keys::Keyset;
use strandline_messages::format::keys::Capability;
use strandline_messages::wire::SessionKind;
use strandline_messages::{AgentId, RepositoryName};
use strandline_server::pki::{Authority, ProvenKey};
use strandline_tests::raw::{keys_of, no_papers, other_papers, papers_of, repository_on_disk};
use strandline_tests::rig::{Agent, Rig, TENANT};

use crate::victim::Victim;

/// Another tenant of the same server.
pub const NEIGHBOURS: &str = "neighbours";

/// What is wrong with one who attacks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// No certificate.
    NoCertificate,
    /// A certificate that was good until a moment ago.
    Expired,
    /// A certificate of another server's authority.
    Stranger,
    /// An agent that was revoked.
    Revoked,
    /// An agent of another tenant that has stolen every key of the victim.
    Neighbour,
    /// Another agent of the tenant, that has none of the keys.
    Keyless,
    /// Another agent of the tenant with the same keys: it may use the repository, not the victim's session.
    Colleague,
    /// Another agent of the tenant with a key that may only write.
    WriteOnly,
    /// Another agent of the tenant with a key that may only read.
    ReadOnly,
    /// Another agent of the tenant with full keys of another repository.
    OtherRepository,
}

/// One who attacks.
pub struct Attacker {
    /// What is wrong with him.
    pub fault: Fault,
    /// His TLS.
    pub papers: Arc<ClientConfig>,
    /// What he proves himself with.
    pub keys: Arc<Keyset>,
    /// The kind of session that he asks for in the victim's repository.
    pub asks_for: SessionKind,
    /// A session of his own that he may open: where, by which keys, of which kind.
    pub own: Option<(RepositoryName, Arc<Keyset>, SessionKind)>,
    /// How the server's log names him, if he gets as far as being known.
    pub id: Option<AgentId>,
}

impl Attacker {
    /// Whether the server greets him.
    pub fn is_greeted(&self) -> bool {
        !matches!(self.fault, Fault::NoCertificate | Fault::Expired | Fault::Stranger | Fault::Revoked)
    }

    /// Whether he belongs to the victim's tenant.
    pub fn is_of_the_tenant(&self) -> bool {
        self.is_greeted() && self.fault != Fault::Neighbour
    }
}

/// Every attacker; `other` is another server.
pub fn all(rig: &Rig, other: &Rig, victim: &Victim) -> Result<Vec<Attacker>> {
    let mut found = unknown(rig, other, victim)?;
    found.extend(neighbours(rig, victim)?);
    found.extend(of_the_tenant(rig, victim)?);
    Ok(found)
}

/// Those that no session connection is given to.
fn unknown(rig: &Rig, other: &Rig, victim: &Victim) -> Result<Vec<Attacker>> {
    let address = rig.address();
    let attacker = |fault, papers, id| Attacker {
        fault,
        papers,
        keys: Arc::clone(&victim.keys),
        asks_for: SessionKind::Backup,
        own: None,
        id,
    };
    let (late, revoked) = (rig.enrolled("late")?, rig.enrolled("revoked")?);
    let (_, stranger) = (other.enrolled("stranger")?, other.enrolled("stranger-2")?);
    let credentials = Store::new(&late.config(), address.to_string().parse()?).load()?;
    let key = ProvenKey::from_request(&credentials.renewal_request()?)?;
    let authority = Authority::load(rig.data())?;
    let expired = authority.issue_agent(&key, credentials.identity(), Duration::ZERO)?;
    let foreign = Authority::load(other.data())?.issue_agent(&key, credentials.identity(), Duration::from_hours(1))?;
    // Certificates end with a whole second.
    std::thread::sleep(Duration::from_millis(1_100));
    drop(stranger);
    let revoked_id = agent_id(rig, "revoked")?;
    let papers = papers_of(&revoked, address)?;
    rig.administer(&["agent", "revoke", &revoked_id.to_string()])?;
    Ok(vec![
        attacker(Fault::NoCertificate, no_papers(&victim.agent, address)?, None),
        attacker(Fault::Expired, other_papers(&late, address, expired)?, None),
        attacker(Fault::Stranger, other_papers(&late, address, foreign)?, None),
        attacker(Fault::Revoked, papers, Some(revoked_id)),
    ])
}

fn neighbours(rig: &Rig, victim: &Victim) -> Result<Vec<Attacker>> {
    rig.administer(&["tenant", "add", NEIGHBOURS])?;
    let token = rig.administer(&["token", "create", NEIGHBOURS])?;
    let neighbour = rig.machine("neighbour")?.at(&format!("strand://{}/theirs", rig.address()));
    neighbour.run(&["enroll", token.trim(), "--label", "neighbour"])?.expect_code(0)?;
    neighbour.run(&["init"])?.expect_code(0)?;
    let (file, slots) = repository_on_disk(rig.data(), NEIGHBOURS, "theirs")?;
    let own = Arc::new(keys_of(&neighbour, &file, &slots)?);
    let attacker = |kind| -> Result<Attacker> {
        Ok(Attacker {
            fault: Fault::Neighbour,
            papers: papers_of(&neighbour, rig.address())?,
            keys: Arc::clone(&victim.keys),
            asks_for: kind,
            own: Some((file.name.clone(), Arc::clone(&own), kind)),
            id: Some(agent_id(rig, "neighbour")?),
        })
    };
    Ok(vec![attacker(SessionKind::Backup)?, attacker(SessionKind::Restore)?])
}

fn of_the_tenant(rig: &Rig, victim: &Victim) -> Result<Vec<Attacker>> {
    use SessionKind::{Backup, Restore};

    let address = rig.address();
    let name = &victim.target.repository;
    let attacker = |label: &str, fault, keys: &Arc<Keyset>, asks_for, own| -> Result<Attacker> {
        let agent: Agent = rig.enrolled(label)?;
        let (papers, id) = (papers_of(&agent, address)?, Some(agent_id(rig, label)?));
        Ok(Attacker { fault, papers, keys: Arc::clone(keys), asks_for, own, id })
    };
    let narrowed = |capability| Ok::<_, anyhow::Error>(Arc::new(victim.keys.narrowed(capability)?));
    let (write, read) = (narrowed(Capability::Write)?, narrowed(Capability::Read)?);
    let forged = Arc::new(Keyset::create(victim.target.file.id)?);

    let second = rig.enrolled("second-owner")?.at(&format!("strand://{address}/second"));
    second.run(&["init"])?.expect_code(0)?;
    let (file, slots) = repository_on_disk(rig.data(), TENANT, "second")?;
    let seconds = Arc::new(keys_of(&second, &file, &slots)?);

    let own = |name: &RepositoryName, keys: &Arc<Keyset>, kind| Some((name.clone(), Arc::clone(keys), kind));
    Ok(vec![
        attacker("keyless", Fault::Keyless, &forged, Backup, None)?,
        attacker("colleague", Fault::Colleague, &victim.keys, Backup, None)?,
        attacker("write-only", Fault::WriteOnly, &write, Restore, own(name, &write, Backup))?,
        attacker("read-only", Fault::ReadOnly, &read, Backup, own(name, &read, Restore))?,
        attacker("second-1", Fault::OtherRepository, &seconds, Backup, own(&file.name, &seconds, Backup))?,
        attacker("second-2", Fault::OtherRepository, &seconds, Restore, own(&file.name, &seconds, Restore))?,
    ])
}

/// The id of the agent that was enrolled with this label.
pub fn agent_id(rig: &Rig, label: &str) -> Result<AgentId> {
    let agents: Value = serde_json::from_str(&rig.administer(&["agent", "list", "--json"])?)?;
    let agents = agents.as_array().context("no list of agents")?;
    let ours = agents.iter().find(|agent| agent.get("label").and_then(Value::as_str) == Some(label));
    Ok(ours.and_then(|agent| agent.get("id")?.as_str()).context("no such agent")?.parse()?)
}

/// A certificate request (PKCS #10, DER) for a key that nobody has enrolled.
pub fn fresh_request() -> Result<Vec<u8>> {
    Ok(EnrolmentKey::generate()?.request()?)
}
