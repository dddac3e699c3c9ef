//! What this machine reads out of its own certificate.

use rustls::pki_types::CertificateDer;
use strandline_messages::{Identity, limits};
use x509_parser::extensions::GeneralName;

/// The parts of an agent's certificate that the agent itself needs.
pub(super) struct Parsed {
    pub(super) identity: Identity,
    /// Begin and end of the validity, seconds since 1970.
    pub(super) not_before_s: i64,
    pub(super) not_after_s: i64,
    /// The public key's bits.
    pub(super) public_key: Vec<u8>,
}

/// Reads an agent's certificate; its issuer's signature must verify under `authority`.
pub(super) fn parse(certificate: &CertificateDer<'_>, authority: &CertificateDer<'_>) -> Result<Parsed, &'static str> {
    if certificate.len() > limits::CERTIFICATE_BYTES_MAX || authority.len() > limits::CERTIFICATE_BYTES_MAX {
        return Err("a certificate is too long");
    }
    let (_, authority) =
        x509_parser::parse_x509_certificate(authority).map_err(|_| "not an authority's certificate")?;
    let (rest, parsed) = x509_parser::parse_x509_certificate(certificate).map_err(|_| "not a certificate")?;
    if !rest.is_empty() {
        return Err("bytes follow the certificate");
    }
    parsed
        .verify_signature(Some(authority.public_key()))
        .map_err(|_| "the certificate does not come from the server's authority")?;
    let names = parsed.subject_alternative_name().ok().flatten().ok_or("the certificate names nobody")?;
    let [GeneralName::URI(uri)] = names.value.general_names.as_slice() else {
        return Err("the certificate names no agent");
    };
    Ok(Parsed {
        identity: Identity::from_uri(uri).ok_or("the certificate names no agent")?,
        not_before_s: parsed.validity().not_before.timestamp(),
        not_after_s: parsed.validity().not_after.timestamp(),
        public_key: parsed.public_key().subject_public_key.data.to_vec(),
    })
}
