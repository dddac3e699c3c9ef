//! The server's own certificate authority: who issues certificates, and who a certificate says its holder is.
//!
//! Files under `DATA/pki/` (directory mode 700, files 600): `ca.key` and `ca.crt` (made once), `server.key` and
//! `server.crt` (made again whenever the names change or the end comes near; agents trust only the authority, so that
//! this disturbs nobody). Losing `ca.key` means enrolling every agent again.

pub mod files;
mod peer;

use std::fmt;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber, SubjectPublicKeyInfo, date_time_ymd,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use strandline_actors::runtime::clock;
use strandline_messages::identity::{AuthorityHash, Identity};
use strandline_messages::limits;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer;

pub use peer::{PeerError, identity_of, key_hash_of};

/// How long the authority's own certificate lasts.
pub const AUTHORITY_VALIDITY: Duration = Duration::from_hours(24 * 3652);
/// How long a server certificate lasts.
pub const SERVER_VALIDITY: Duration = Duration::from_hours(24 * 730);
/// A server certificate is made anew when less than this is left of it.
pub const SERVER_RENEWAL: Duration = Duration::from_hours(24 * 90);
/// Certificates are dated back by this much, for peers whose clock is behind.
const BACKDATE: Duration = Duration::from_hours(1);
/// Longest key or certificate file that is read, bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// Why the authority could not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// There is an authority already.
    #[error("{} exists already: the authority in it is kept. Nothing was changed", path.display())]
    Exists {
        /// The certificate found.
        path: PathBuf,
    },
    /// There is none.
    #[error("no certificate authority in {}: run `strand-server init` first, or restore that directory from a copy", directory.display())]
    Missing {
        /// Where it was looked for.
        directory: PathBuf,
    },
    /// A file could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// `read`, `write` or `create`.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{} is damaged ({why}): restore it from a copy. Nothing was changed", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A name that no certificate can carry.
    #[error("`{name}` is neither a host name nor an IP address: correct `names` in the configuration")]
    Name {
        /// The name as given.
        name: String,
    },
    /// A certificate request that cannot be granted.
    #[error("the certificate request is refused: {why}")]
    Request {
        /// What is wrong with it.
        why: &'static str,
    },
    /// The certificate could not be made.
    #[error("cannot make a certificate: {0}")]
    Issue(#[from] rcgen::Error),
    /// The system gave no random bytes.
    #[error("the system gives no random bytes: {0}")]
    Random(#[from] getrandom::Error),
}

/// A certificate chain with its private key, as the TLS side wants it.
pub struct ServerIdentity {
    /// Leaf first, then the authority.
    pub chain: Vec<CertificateDer<'static>>,
    /// The leaf's key.
    pub key: PrivateKeyDer<'static>,
    /// End of the leaf's validity, seconds since 1970.
    pub expires_s: i64,
}

impl fmt::Debug for ServerIdentity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerIdentity").field("expires_s", &self.expires_s).finish_non_exhaustive()
    }
}

/// A certificate request whose sender has proved that it holds the private key. Nothing else of the request is kept.
#[derive(Debug, Clone)]
pub struct ProvenKey {
    spki: SubjectPublicKeyInfo,
    hash: [u8; 32],
}

impl ProvenKey {
    /// Checks a PKCS #10 request (DER): its signature must verify under its own key, an ECDSA key on P-256.
    pub fn from_request(csr_der: &[u8]) -> Result<Self, PkiError> {
        let refused = |why| PkiError::Request { why };
        if csr_der.len() > limits::CERTIFICATE_BYTES_MAX {
            return Err(refused("it is too long"));
        }
        let (rest, request) =
            X509CertificationRequest::from_der(csr_der).map_err(|_| refused("it is not a PKCS #10 request"))?;
        if !rest.is_empty() {
            return Err(refused("bytes follow it"));
        }
        request.verify_signature().map_err(|_| refused("its signature does not verify under its own key"))?;
        let spki_der = request.certification_request_info.subject_pki.raw;
        let spki = SubjectPublicKeyInfo::from_der(spki_der).map_err(|_| refused("its key is of an unknown kind"))?;
        if spki.algorithm() != &PKCS_ECDSA_P256_SHA256 {
            return Err(refused("its key is not an ECDSA key on P-256"));
        }
        Ok(Self { spki, hash: *blake3::hash(spki_der).as_bytes() })
    }

    /// BLAKE3-256 of the public key (DER SubjectPublicKeyInfo).
    pub fn hash(&self) -> [u8; 32] {
        self.hash
    }
}

/// The certificate authority of one data directory.
pub struct Authority {
    directory: PathBuf,
    key: KeyPair,
    certificate: CertificateDer<'static>,
    expires_s: i64,
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("directory", &self.directory).finish_non_exhaustive()
    }
}

impl Authority {
    /// Makes a new authority in `data`/pki. Refuses if there is one.
    pub fn create(data: &Path) -> Result<Self, PkiError> {
        let directory = data.join("pki");
        files::create_directory(&directory).map_err(|source| file_error("create", &directory, source))?;
        let (key_path, certificate_path) = (directory.join("ca.key"), directory.join("ca.crt"));
        if certificate_path.exists() {
            return Err(PkiError::Exists { path: certificate_path });
        }
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let serial = random_serial()?;
        let mut params = dated(clock::wall(), AUTHORITY_VALIDITY, serial.clone());
        let mut label = data_encoding::HEXLOWER.encode(&serial.to_bytes());
        label.truncate(8);
        params.distinguished_name.push(DnType::CommonName, format!("Strandline authority {label}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params.self_signed(&key)?;
        // The certificate last: a key without one is a creation that was interrupted, and is made again.
        files::write_private(&key_path, key.serialize_pem().as_bytes())
            .map_err(|source| file_error("write", &key_path, source))?;
        files::create_private(&certificate_path, certificate.pem().as_bytes())
            .map_err(|source| file_error("write", &certificate_path, source))?;
        Self::load(data)
    }

    /// Reads the authority in `data`/pki, whose lock the caller holds.
    pub fn load(data: &Path) -> Result<Self, PkiError> {
        let directory = data.join("pki");
        files::remove_unfinished(&directory).map_err(|source| file_error("clean", &directory, source))?;
        let (key_path, certificate_path) = (directory.join("ca.key"), directory.join("ca.crt"));
        if !certificate_path.exists() {
            return Err(PkiError::Missing { directory });
        }
        let certificate = read_certificate(&certificate_path)?;
        let key = read_key(&key_path)?;
        let damaged = |why: &str| PkiError::Damaged { path: certificate_path.clone(), why: why.to_owned() };
        let (_, parsed) =
            x509_parser::parse_x509_certificate(&certificate).map_err(|_| damaged("not a certificate"))?;
        if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
            return Err(damaged("it does not belong to ca.key"));
        }
        let expires_s = parsed.validity().not_after.timestamp();
        Ok(Self { directory, key, certificate, expires_s })
    }

    /// The authority's certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// What stands for it in an enrolment token.
    pub fn hash(&self) -> AuthorityHash {
        AuthorityHash::of(&self.certificate)
    }

    /// End of its validity, seconds since 1970.
    pub fn expires_s(&self) -> i64 {
        self.expires_s
    }

    /// The server's certificate: the one on disk if it is ours, for exactly these names and good for another 90 days,
    /// else a new one.
    pub fn server(&self, names: &[String]) -> Result<ServerIdentity, PkiError> {
        match self.stored_server(names) {
            Some(identity) => Ok(identity),
            None => self.issue_server(names, SERVER_VALIDITY),
        }
    }

    /// Makes a new key and certificate for the server (host names and IP addresses, EKU serverAuth) and stores them.
    pub fn issue_server(&self, names: &[String], validity: Duration) -> Result<ServerIdentity, PkiError> {
        let mut params = dated(clock::wall(), self.capped(validity), random_serial()?);
        params.subject_alt_names = names.iter().map(|name| subject_name(name)).collect::<Result<_, _>>()?;
        let common = names.first().map_or("strandline", String::as_str);
        params.distinguished_name.push(DnType::CommonName, common);
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let certificate = params.signed_by(&key, &self.issuer()?)?;
        // A crash between the two leaves a pair that does not match; `stored_server` then finds nothing and a new pair
        // is made.
        for (name, text) in [("server.key", key.serialize_pem()), ("server.crt", certificate.pem())] {
            let path = self.directory.join(name);
            files::write_private(&path, text.as_bytes()).map_err(|source| file_error("write", &path, source))?;
        }
        let expires_s = params.not_after.unix_timestamp();
        let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
        Ok(ServerIdentity { chain: vec![certificate.into(), self.certificate.clone()], key, expires_s })
    }

    /// A certificate (DER) for an agent: subject common name its id, subject alternative name its identity's URI, EKU
    /// clientAuth, a random serial. Of the request only the proven public key goes in, whatever else it asked for.
    pub fn issue_agent(
        &self,
        key: &ProvenKey,
        identity: &Identity,
        validity: Duration,
    ) -> Result<CertificateDer<'static>, PkiError> {
        let mut params = dated(clock::wall(), self.capped(validity), random_serial()?);
        params.distinguished_name.push(DnType::CommonName, identity.agent.to_string());
        params.subject_alt_names = vec![SanType::URI(identity.uri().try_into()?)];
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        Ok(params.signed_by(&key.spki, &self.issuer()?)?.into())
    }

    fn issuer(&self) -> Result<Issuer<'static, &KeyPair>, PkiError> {
        Ok(Issuer::from_ca_cert_der(&self.certificate, &self.key)?)
    }

    /// `validity`, shortened so that no certificate outlives its authority.
    pub fn capped(&self, validity: Duration) -> Duration {
        let left_s = u64::try_from(self.expires_s).unwrap_or(0).saturating_sub(clock::wall().as_secs());
        validity.min(Duration::from_secs(left_s))
    }

    fn stored_server(&self, names: &[String]) -> Option<ServerIdentity> {
        let key = read_key(&self.directory.join("server.key")).ok()?;
        let leaf = read_certificate(&self.directory.join("server.crt")).ok()?;
        let (_, authority) = x509_parser::parse_x509_certificate(&self.certificate).ok()?;
        let (_, parsed) = x509_parser::parse_x509_certificate(&leaf).ok()?;
        parsed.verify_signature(Some(authority.public_key())).ok()?;
        let expires_s = parsed.validity().not_after.timestamp();
        let renew_s = i64::try_from((clock::wall() + SERVER_RENEWAL).as_secs()).ok()?;
        let mut wanted: Vec<SanType> = names.iter().map(|name| subject_name(name).ok()).collect::<Option<_>>()?;
        let mut found = peer::subject_names(&parsed)?;
        let order = |name: &SanType| format!("{name:?}");
        wanted.sort_by_key(order);
        found.sort_by_key(order);
        let same_key = parsed.public_key().subject_public_key.data.as_ref() == key.public_key_raw();
        // An authority in its last days cannot issue anything longer: what it gave is as good as it gets.
        let lasts = expires_s > renew_s.min(self.expires_s.saturating_sub(1));
        (wanted == found && same_key && lasts).then(|| {
            let key = PrivateKeyDer::Pkcs8(key.serialize_der().into());
            ServerIdentity { chain: vec![leaf, self.certificate.clone()], key, expires_s }
        })
    }
}

fn file_error(action: &'static str, path: &Path, source: io::Error) -> PkiError {
    PkiError::File { action, path: path.to_owned(), source }
}

fn read_text(path: &Path) -> Result<Vec<u8>, PkiError> {
    files::read_at_most(path, FILE_BYTES_MAX).map_err(|source| file_error("read", path, source))
}

fn read_certificate(path: &Path) -> Result<CertificateDer<'static>, PkiError> {
    CertificateDer::from_pem_slice(&read_text(path)?)
        .map_err(|error| PkiError::Damaged { path: path.to_owned(), why: error.to_string() })
}

fn read_key(path: &Path) -> Result<KeyPair, PkiError> {
    let damaged = |why: String| PkiError::Damaged { path: path.to_owned(), why };
    let text = zeroize::Zeroizing::new(read_text(path)?);
    let text = std::str::from_utf8(&text).map_err(|_| damaged("not text".to_owned()))?;
    KeyPair::from_pem(text).map_err(|error| damaged(error.to_string()))
}

fn subject_name(name: &str) -> Result<SanType, PkiError> {
    let refused = || PkiError::Name { name: name.chars().take(80).collect() };
    if let Ok(address) = name.parse::<IpAddr>() {
        return Ok(SanType::IpAddress(address));
    }
    rustls::pki_types::DnsName::try_from(name).map_err(|_| refused())?;
    Ok(SanType::DnsName(name.to_owned().try_into().map_err(|_| refused())?))
}

/// Certificate parameters valid from an hour before `now` (since 1970) until `validity` after it.
fn dated(now: Duration, validity: Duration, serial: SerialNumber) -> CertificateParams {
    // The year 8970: beyond any certificate, and within what the date type can hold (9999).
    let latest = Duration::from_hours(24 * 365 * 7000);
    let epoch = date_time_ymd(1970, 1, 1);
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.not_before = epoch + now.saturating_sub(BACKDATE).min(latest);
    params.not_after = epoch + now.saturating_add(validity).min(latest);
    params.serial_number = Some(serial);
    params
}

fn random_serial() -> Result<SerialNumber, PkiError> {
    let mut bytes = [0u8; 16];
    getrandom::fill(&mut bytes)?;
    // A positive number whose length does not depend on chance.
    if let Some(first) = bytes.first_mut() {
        *first = *first & 0x7f | 0x40;
    }
    Ok(SerialNumber::from_slice(&bytes))
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
