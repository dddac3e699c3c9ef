//! Reading who a peer is out of its certificate. The chain has been verified before; nothing here checks a signature.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use rcgen::SanType;
use rustls::pki_types::CertificateDer;
use strandline_messages::identity::Identity;
use strandline_messages::limits;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;

/// Why a verified certificate is not an agent's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// The bytes are not one certificate.
    #[error("the peer's certificate cannot be read")]
    Malformed,
    /// It is for something else.
    #[error("the peer's certificate is not for agents (its extended key usage must be clientAuth and nothing else)")]
    Purpose,
    /// It names no identity of ours.
    #[error("the peer's certificate names no agent")]
    Name,
}

/// The agent that a verified certificate belongs to. Strict: EKU exactly clientAuth, not an authority, exactly one
/// alternative name, a URI that is an [`Identity`]'s, and a common name that agrees with it.
pub fn identity_of(certificate: &CertificateDer<'_>) -> Result<Identity, PeerError> {
    if certificate.len() > limits::CERTIFICATE_BYTES_MAX {
        return Err(PeerError::Malformed);
    }
    let (rest, parsed) = x509_parser::parse_x509_certificate(certificate).map_err(|_| PeerError::Malformed)?;
    if !rest.is_empty() {
        return Err(PeerError::Malformed);
    }
    if parsed.is_ca() || !is_for_clients_only(&parsed) {
        return Err(PeerError::Purpose);
    }
    let names = parsed.subject_alternative_name().map_err(|_| PeerError::Malformed)?.ok_or(PeerError::Name)?;
    let [GeneralName::URI(uri)] = names.value.general_names.as_slice() else {
        return Err(PeerError::Name);
    };
    let identity = Identity::from_uri(uri).ok_or(PeerError::Name)?;
    let mut common = parsed.subject().iter_common_name();
    let agrees = common.next().and_then(|name| name.as_str().ok()) == Some(&identity.agent.to_string());
    if agrees && common.next().is_none() { Ok(identity) } else { Err(PeerError::Name) }
}

/// BLAKE3-256 of a certificate's public key (DER SubjectPublicKeyInfo).
pub fn key_hash_of(certificate: &CertificateDer<'_>) -> Result<[u8; 32], PeerError> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).map_err(|_| PeerError::Malformed)?;
    Ok(*blake3::hash(parsed.public_key().raw).as_bytes())
}

fn is_for_clients_only(certificate: &X509Certificate<'_>) -> bool {
    let Ok(Some(usage)) = certificate.extended_key_usage() else { return false };
    let usage = usage.value;
    let others = usage.any
        || usage.server_auth
        || usage.code_signing
        || usage.email_protection
        || usage.time_stamping
        || usage.ocsp_signing
        || !usage.other.is_empty();
    usage.client_auth && !others
}

/// The host names and addresses of a server certificate; `None` if it has any other name.
pub(super) fn subject_names(certificate: &X509Certificate<'_>) -> Option<Vec<SanType>> {
    let names = certificate.subject_alternative_name().ok()??;
    names
        .value
        .general_names
        .iter()
        .map(|name| match name {
            GeneralName::DNSName(name) => Some(SanType::DnsName((*name).to_owned().try_into().ok()?)),
            GeneralName::IPAddress(bytes) => {
                let four = <[u8; 4]>::try_from(*bytes).map(|bytes| IpAddr::V4(Ipv4Addr::from(bytes)));
                let address = four.or_else(|_| <[u8; 16]>::try_from(*bytes).map(|b| IpAddr::V6(Ipv6Addr::from(b))));
                address.ok().map(SanType::IpAddress)
            }
            _ => None,
        })
        .collect()
}
