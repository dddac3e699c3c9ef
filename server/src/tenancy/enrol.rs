//! A machine becomes an agent: it redeems a token once and gets a certificate; later it renews it.

use std::fmt;
use std::time::Duration;

use data_encoding::HEXLOWER;
use rustls::pki_types::CertificateDer;
use sqlx::{Sqlite, Transaction};
use strandline_actors::runtime::clock;
use strandline_messages::identity::{EnrolmentSecret, Identity, Role};
use strandline_messages::{AgentId, TenantName};

use super::journal::{AgentIdText, Event};
use super::{LABEL_BYTES_MAX, Tenancy, TenancyError, commit, ns, token_hash};
use crate::pki::{Authority, PkiError, ProvenKey};
use crate::tls::AgentPeer;

/// Why a machine is not enrolled, or an agent not renewed. What [`fmt::Display`] says may be told to the peer.
#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    /// Unknown, expired or used: which of them stands in the log only, so that nobody learns it by trying.
    #[error(
        "the enrolment token is refused: it is good once and for a limited time. Make a new one with `strand-server token create`"
    )]
    TokenRefused,
    /// A renewal by a machine that is not enrolled (any more), or with another key.
    #[error(
        "this machine is not enrolled here: make a token with `strand-server token create` and run `strand enroll`"
    )]
    NotEnrolled,
    /// The certificate request is no good.
    #[error(transparent)]
    Request(PkiError),
    /// The server could not do it now; the token, if any, is still good unless the reason says otherwise.
    #[error("the server could not enrol this machine now; try again")]
    Server(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl From<TenancyError> for EnrolError {
    fn from(error: TenancyError) -> Self {
        Self::Server(Box::new(error))
    }
}

impl From<sqlx::Error> for EnrolError {
    fn from(error: sqlx::Error) -> Self {
        Self::Server(Box::new(error))
    }
}

/// What a newly enrolled or renewed machine is sent.
#[derive(Debug, Clone)]
pub struct Enrolled {
    /// Who it is from now on.
    pub identity: Identity,
    /// Its certificate.
    pub certificate: CertificateDer<'static>,
    /// The authority's certificate, which it has seen in the handshake already.
    pub authority: CertificateDer<'static>,
}

/// Enrols the machine that holds `secret` and the key of the request `csr_der` (PKCS #10). The request is checked before
/// the token is spent. `label` is the machine's name for people: cut to [`LABEL_BYTES_MAX`], control characters removed.
pub async fn enrol(
    tenancy: &Tenancy,
    authority: &Authority,
    secret: &EnrolmentSecret,
    label: &str,
    csr_der: &[u8],
    validity: Duration,
) -> Result<Enrolled, EnrolError> {
    let key = ProvenKey::from_request(csr_der).map_err(EnrolError::Request)?;
    let validity = authority.capped(validity);
    let machine = Machine { label: clean_label(label), key_hash: key.hash(), validity };
    let identity = tenancy.redeem_token(secret, &machine).await?;
    tracing::info!(tenant = %identity.tenant, agent = %identity.agent, label = machine.label, "agent enrolled");
    issue(authority, &key, identity, validity)
}

/// A new certificate for an enrolled agent, for the key that it has: losing the reply costs it nothing.
pub async fn renew(
    tenancy: &Tenancy,
    authority: &Authority,
    identity: Identity,
    csr_der: &[u8],
    validity: Duration,
) -> Result<Enrolled, EnrolError> {
    let key = ProvenKey::from_request(csr_der).map_err(EnrolError::Request)?;
    let validity = authority.capped(validity);
    let peer = AgentPeer { identity, key_hash: key.hash() };
    tenancy.extend(&peer, validity).await?;
    issue(authority, &key, peer.identity, validity)
}

fn issue(
    authority: &Authority,
    key: &ProvenKey,
    identity: Identity,
    validity: Duration,
) -> Result<Enrolled, EnrolError> {
    let certificate =
        authority.issue_agent(key, &identity, validity).map_err(|error| EnrolError::Server(Box::new(error)))?;
    Ok(Enrolled { identity, certificate, authority: authority.certificate().clone() })
}

/// What is known of a machine that enrols.
#[derive(Debug, Clone)]
pub struct Machine {
    /// Its name for people.
    pub label: String,
    /// BLAKE3-256 of its public key.
    pub key_hash: [u8; 32],
    /// How long its certificate will last.
    pub validity: Duration,
}

/// Why a token was refused: for the log.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum TokenFault {
    Unknown,
    Used,
    Expired,
    NotYet,
}

impl fmt::Display for TokenFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Unknown => "no such token",
            Self::Used => "the token has been used",
            Self::Expired => "the token has expired",
            Self::NotYet => "the token is from the future: the server's clock was set back",
        })
    }
}

impl Tenancy {
    /// Spends a token and enrols `machine` in its tenant, in one transaction: of two machines with one token one is
    /// enrolled. Unknown, used and expired tokens are refused alike; the log says which it was.
    pub async fn redeem_token(&self, secret: &EnrolmentSecret, machine: &Machine) -> Result<Identity, EnrolError> {
        let now_ns = clock::wall_ns();
        let mut transaction = self.begin().await?;
        let tenant = match usable_token(&mut transaction, secret, now_ns).await? {
            Ok(tenant) => tenant,
            Err(fault) => {
                tracing::warn!(reason = %fault, label = machine.label, "enrolment refused");
                return Err(EnrolError::TokenRefused);
            }
        };
        let mut agent = AgentId([0; 16]);
        getrandom::fill(&mut agent.0).map_err(TenancyError::from)?;
        let expires_ns = now_ns.saturating_add(ns(machine.validity));
        sqlx::query("UPDATE tokens SET used_ns = ?, used_by = ? WHERE hash = ?")
            .bind(now_ns)
            .bind(agent.as_bytes().as_slice())
            .bind(token_hash(secret))
            .execute(&mut *transaction)
            .await?;
        sqlx::query(
            "INSERT INTO agents (id, tenant, label, key_hash, enrolled_ns, expires_ns) VALUES (?, ?, ?, ?, ?, ?)",
        )
        .bind(agent.as_bytes().as_slice())
        .bind(tenant.as_str())
        .bind(&machine.label)
        .bind(machine.key_hash.as_slice())
        .bind(now_ns)
        .bind(expires_ns)
        .execute(&mut *transaction)
        .await?;
        self.remember(Event::AgentEnrolled {
            agent: AgentIdText(agent),
            tenant: tenant.clone(),
            label: machine.label.clone(),
            key_hash: HEXLOWER.encode(&machine.key_hash),
            at_ns: now_ns,
            expires_ns,
        })
        .await?;
        commit(transaction).await?;
        Ok(Identity { tenant, agent, role: Role::Agent })
    }

    async fn extend(&self, peer: &AgentPeer, validity: Duration) -> Result<(), EnrolError> {
        let Identity { tenant, agent, .. } = &peer.identity;
        let now_ns = clock::wall_ns();
        let expires_ns = now_ns.saturating_add(ns(validity));
        let mut transaction = self.begin().await?;
        let extended = sqlx::query(
            "UPDATE agents SET expires_ns = ? WHERE id = ? AND tenant = ? AND key_hash = ? AND revoked_ns IS NULL",
        )
        .bind(expires_ns)
        .bind(agent.as_bytes().as_slice())
        .bind(tenant.as_str())
        .bind(peer.key_hash.as_slice())
        .execute(&mut *transaction)
        .await?;
        if extended.rows_affected() == 0 {
            return Err(EnrolError::NotEnrolled);
        }
        self.remember(Event::AgentRenewed { agent: AgentIdText(*agent), at_ns: now_ns, expires_ns }).await?;
        commit(transaction).await?;
        Ok(())
    }
}

async fn usable_token(
    transaction: &mut Transaction<'static, Sqlite>,
    secret: &EnrolmentSecret,
    now_ns: i64,
) -> Result<Result<TenantName, TokenFault>, EnrolError> {
    let row: Option<(String, i64, i64, Option<i64>)> =
        sqlx::query_as("SELECT tenant, created_ns, expires_ns, used_ns FROM tokens WHERE hash = ?")
            .bind(token_hash(secret))
            .fetch_optional(&mut **transaction)
            .await?;
    Ok(match row {
        None => Err(TokenFault::Unknown),
        Some((_, _, _, Some(_))) => Err(TokenFault::Used),
        Some((_, _, expires_ns, None)) if expires_ns <= now_ns => Err(TokenFault::Expired),
        // A clock that was set back must not lengthen a token's life.
        Some((_, created_ns, _, None)) if now_ns < created_ns => Err(TokenFault::NotYet),
        Some((tenant, ..)) => Ok(tenant
            .parse()
            .map_err(|error| EnrolError::Server(Box::<dyn std::error::Error + Send + Sync>::from(error)))?),
    })
}

fn clean_label(label: &str) -> String {
    let mut clean = String::new();
    for character in label.chars().filter(|character| !character.is_control()) {
        if clean.len() + character.len_utf8() > LABEL_BYTES_MAX {
            break;
        }
        clean.push(character);
    }
    clean
}
