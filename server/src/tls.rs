//! The server's side of TLS 1.3, and who is at the other end after the handshake.
//!
//! Client certificates are verified against our own authority whenever one is sent; none is needed for enrolment.
//! [`accepted_peer`] then decides by application protocol. There is no session resumption of any kind: a resumed session
//! would skip the client verifier, and a revoked agent would come back on its ticket. That an agent is still enrolled is
//! asked of the tenancy tables after every handshake; a certificate alone does not show it.

use std::sync::Arc;

use parking_lot::RwLock;
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;
use rustls::{CommonState, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme};
use strandline_actors::runtime::clock;
use strandline_messages::identity::{ALPN_ENROLMENT, ALPN_SESSION, Identity};

use crate::pki::{Authority, PeerError, ServerIdentity, identity_of, key_hash_of};

/// Why TLS could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// Key and certificate do not fit, or are of an unknown kind.
    #[error("the server's certificate cannot be used: {0}. Remove pki/server.crt: a new one is made at the next start")]
    Certificate(rustls::Error),
    /// The authority's certificate cannot serve as a trust anchor.
    #[error("the authority's certificate cannot be used: {0}. Restore pki/ from a copy")]
    Authority(String),
    /// The library refused the configuration.
    #[error("TLS cannot be set up: {0}")]
    Setup(#[from] rustls::Error),
}

/// Why a peer is not let in. Told to nobody but the log: the peer sees its connection close.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It asked for no application protocol.
    #[error("the peer names no application protocol (ALPN): not a Strandline agent")]
    NoProtocol,
    /// It asked for one that is not ours.
    #[error("the peer speaks an unknown application protocol")]
    UnknownProtocol,
    /// It wants a session but proved nothing.
    #[error("the peer presented no certificate")]
    NoCertificate,
    /// Its certificate is ours but not an agent's.
    #[error(transparent)]
    NotAnAgent(#[from] PeerError),
}

/// A machine whose certificate was verified in the handshake.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AgentPeer {
    /// Who it is.
    pub identity: Identity,
    /// BLAKE3-256 of its public key: the tenancy tables know which key was enrolled.
    pub key_hash: [u8; 32],
}

/// What a connection may be used for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Accepted {
    /// Sessions, as this agent.
    Agent(AgentPeer),
    /// Enrolment and nothing else; nobody is known yet.
    Enrolling,
}

/// Decides what a connection may be used for, from its finished handshake alone.
pub fn accepted_peer(connection: &CommonState) -> Result<Accepted, Refusal> {
    match connection.alpn_protocol() {
        Some(ALPN_SESSION) => {
            let leaf = connection.peer_certificates().and_then(<[_]>::first).ok_or(Refusal::NoCertificate)?;
            let (identity, key_hash) = (identity_of(leaf)?, key_hash_of(leaf)?);
            Ok(Accepted::Agent(AgentPeer { identity, key_hash }))
        }
        Some(ALPN_ENROLMENT) => Ok(Accepted::Enrolling),
        Some(_) => Err(Refusal::UnknownProtocol),
        None => Err(Refusal::NoProtocol),
    }
}

/// The server's certificate, replaceable while connections are being accepted.
#[derive(Debug)]
pub struct ServerCertificate {
    current: RwLock<Current>,
}

#[derive(Debug)]
struct Current {
    key: Arc<CertifiedKey>,
    expires_s: i64,
}

impl ServerCertificate {
    /// Starts with `identity`.
    pub fn new(identity: ServerIdentity) -> Result<Self, TlsError> {
        Ok(Self { current: RwLock::new(certified(identity)?) })
    }

    /// From the next handshake on, `identity`. Returns whether that is another certificate than before.
    pub fn replace(&self, identity: ServerIdentity) -> Result<bool, TlsError> {
        let new = certified(identity)?;
        let mut current = self.current.write();
        let changed = current.key.cert != new.key.cert;
        *current = new;
        Ok(changed)
    }

    /// End of its validity, seconds since 1970.
    pub fn expires_s(&self) -> i64 {
        self.current.read().expires_s
    }
}

fn certified(identity: ServerIdentity) -> Result<Current, TlsError> {
    let ServerIdentity { chain, key, expires_s } = identity;
    let key = CertifiedKey::from_der(chain, key, &provider()).map_err(TlsError::Certificate)?;
    Ok(Current { key: Arc::new(key), expires_s })
}

impl ResolvesServerCert for ServerCertificate {
    fn resolve(&self, _hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.current.read().key))
    }
}

/// TLS 1.3 for sessions and enrolment.
pub fn server_config(
    authority: &Authority,
    certificate: Arc<ServerCertificate>,
) -> Result<Arc<ServerConfig>, TlsError> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.certificate().clone()).map_err(|error| TlsError::Authority(error.to_string()))?;
    let provider = Arc::new(provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .allow_unauthenticated()
        .build()
        .map_err(|error| TlsError::Authority(error.to_string()))?;
    let mut config = ServerConfig::builder_with_details(provider, Arc::new(WallClock))
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(AgentVerifier { chain: verifier }))
        .with_cert_resolver(certificate);
    config.alpn_protocols = vec![ALPN_SESSION.to_vec(), ALPN_ENROLMENT.to_vec()];
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}

fn provider() -> CryptoProvider {
    rustls::crypto::aws_lc_rs::default_provider()
}

/// The wall clock of this process for the validity of certificates.
#[derive(Debug)]
struct WallClock;

impl TimeProvider for WallClock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(clock::wall()))
    }
}

/// The chain is verified by webpki; then the certificate must be an agent's, so that whoever holds any other certificate
/// of ours is told so by an alert in the handshake, before a byte of protocol.
#[derive(Debug)]
struct AgentVerifier {
    chain: Arc<dyn ClientCertVerifier>,
}

impl ClientCertVerifier for AgentVerifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Agents have one certificate per server: no need to tell strangers the authority's name.
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = self.chain.verify_client_cert(leaf, intermediates, now)?;
        identity_of(leaf).map_err(|_| rustls::CertificateError::ApplicationVerificationFailure)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls12_signature(message, leaf, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.chain.verify_tls13_signature(message, leaf, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.chain.supported_verify_schemes()
    }
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;
