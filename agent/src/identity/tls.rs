//! The agent's side of TLS 1.3.

use std::io;
use std::sync::Arc;

use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, WantsClientCert};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, IpAddr, ServerName, UnixTime};
use rustls::time_provider::TimeProvider;
use rustls::{
    CertificateError, ClientConfig, CommonState, ConfigBuilder, DigitallySignedStruct, RootCertStore, SignatureScheme,
    WantsVerifier,
};
use strandline_actors::runtime::clock;
use strandline_messages::identity::{ALPN_ENROLMENT, ALPN_SESSION};
use strandline_messages::{AuthorityHash, ServerAddress, limits};

use super::IdentityError;
use super::store::Credentials;

/// TLS for sessions: believes only the enrolled server's authority, shows this machine's certificate. A certificate that
/// has expired is an error here, before anything is sent.
pub fn client_config(credentials: &Credentials) -> Result<Arc<ClientConfig>, IdentityError> {
    let now_s = i64::try_from(clock::wall().as_secs()).unwrap_or(i64::MAX);
    if credentials.expires_s() < now_s {
        let server = credentials.server().clone();
        return Err(IdentityError::CertificateExpired { server, since_s: credentials.expires_s() });
    }
    let (chain, key) = credentials.for_tls();
    let builder = builder()?.with_root_certificates(roots(credentials.authority())?);
    finished(builder, |builder| builder.with_client_auth_cert(chain, key), ALPN_SESSION)
}

/// TLS for enrolment: shows nothing, and believes a server whose chain ends in the authority that `expected` is the hash
/// of.
pub fn enroll_client_config(expected: AuthorityHash) -> Result<Arc<ClientConfig>, IdentityError> {
    let verifier = EnrolmentVerifier { expected, provider: Arc::new(provider()) };
    let builder = builder()?.dangerous().with_custom_certificate_verifier(Arc::new(verifier));
    finished(builder, |builder| Ok(builder.with_no_client_auth()), ALPN_ENROLMENT)
}

/// The authority's certificate as the server sent it in an enrolment handshake: what [`super::Store::save`] keeps.
pub fn authority_sent(
    connection: &CommonState,
    expected: AuthorityHash,
) -> Result<CertificateDer<'static>, IdentityError> {
    let last = connection.peer_certificates().and_then(<[_]>::last).ok_or(IdentityError::ServerUnknown)?;
    if AuthorityHash::of(last) == expected { Ok(last.clone().into_owned()) } else { Err(IdentityError::ServerUnknown) }
}

/// The name that the server's certificate must carry.
pub fn server_name(address: &ServerAddress) -> Result<ServerName<'static>, IdentityError> {
    match address.host().parse::<std::net::IpAddr>() {
        Ok(ip) => Ok(ServerName::IpAddress(IpAddr::from(ip))),
        Err(_) => ServerName::try_from(address.host().to_owned())
            .map_err(|_| IdentityError::ServerName { expected: address.host().to_owned() }),
    }
}

/// What an I/O error of a TLS connection means, if it is about who is who. The server's refusal of this machine's
/// certificate comes with the first read after the handshake, not with the handshake.
pub fn explain(error: &io::Error) -> Option<IdentityError> {
    let error = error.get_ref()?.downcast_ref::<rustls::Error>()?;
    match error {
        rustls::Error::InvalidCertificate(certificate) => Some(match certificate {
            CertificateError::Expired => IdentityError::ServerCertificateExpired { since_s: None },
            CertificateError::ExpiredContext { not_after, .. } => {
                IdentityError::ServerCertificateExpired { since_s: i64::try_from(not_after.as_secs()).ok() }
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                IdentityError::ServerCertificateNotYetValid
            }
            CertificateError::NotValidForName => {
                IdentityError::ServerName { expected: "that was asked for".to_owned() }
            }
            CertificateError::NotValidForNameContext { expected, .. } => {
                IdentityError::ServerName { expected: expected.to_str().into_owned() }
            }
            _ => IdentityError::ServerUnknown,
        }),
        rustls::Error::AlertReceived(alert) => {
            let about_certificate = matches!(
                alert,
                rustls::AlertDescription::CertificateExpired
                    | rustls::AlertDescription::CertificateRevoked
                    | rustls::AlertDescription::CertificateUnknown
                    | rustls::AlertDescription::CertificateRequired
                    | rustls::AlertDescription::BadCertificate
                    | rustls::AlertDescription::UnsupportedCertificate
                    | rustls::AlertDescription::UnknownCA
                    | rustls::AlertDescription::AccessDenied
                    | rustls::AlertDescription::DecryptError
            );
            about_certificate.then(|| IdentityError::Refused { alert: format!("{alert:?}") })
        }
        _ => None,
    }
}

fn provider() -> CryptoProvider {
    rustls::crypto::aws_lc_rs::default_provider()
}

fn builder() -> Result<ConfigBuilder<ClientConfig, WantsVerifier>, IdentityError> {
    Ok(ClientConfig::builder_with_details(Arc::new(provider()), Arc::new(WallClock))
        .with_protocol_versions(&[&rustls::version::TLS13])?)
}

fn finished(
    builder: ConfigBuilder<ClientConfig, WantsClientCert>,
    finish: impl FnOnce(ConfigBuilder<ClientConfig, WantsClientCert>) -> Result<ClientConfig, rustls::Error>,
    protocol: &[u8],
) -> Result<Arc<ClientConfig>, IdentityError> {
    let mut config = finish(builder)?;
    config.alpn_protocols = vec![protocol.to_vec()];
    config.resumption = Resumption::disabled();
    config.enable_early_data = false;
    Ok(Arc::new(config))
}

fn roots(authority: &CertificateDer<'static>) -> Result<RootCertStore, rustls::Error> {
    let mut roots = RootCertStore::empty();
    roots.add(authority.clone())?;
    Ok(roots)
}

/// The wall clock of this process for the validity of certificates.
#[derive(Debug)]
struct WallClock;

impl TimeProvider for WallClock {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(clock::wall()))
    }
}

/// Believes an authority by its hash, then verifies the server under it as usual: validity, purpose, name.
#[derive(Debug)]
struct EnrolmentVerifier {
    expected: AuthorityHash,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for EnrolmentVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let unknown = || rustls::Error::InvalidCertificate(CertificateError::UnknownIssuer);
        let (authority, between) = intermediates.split_last().ok_or_else(unknown)?;
        if authority.len() > limits::CERTIFICATE_BYTES_MAX || AuthorityHash::of(authority) != self.expected {
            return Err(unknown());
        }
        let roots = Arc::new(roots(&authority.clone().into_owned())?);
        WebPkiServerVerifier::builder_with_provider(roots, Arc::clone(&self.provider))
            .build()
            .map_err(|_| unknown())?
            .verify_server_cert(leaf, between, name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("only TLS 1.3 is spoken".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}
