//! The files that make this machine an agent of a server.

use std::fmt;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rcgen::{CertificateParams, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use strandline_messages::identity::certificate_pem;
use strandline_messages::{AuthorityHash, Identity, ServerAddress};
use zeroize::Zeroizing;

use super::IdentityError;
use super::certificate::{Parsed, parse};

const KEY: &str = "client.key";
const CERTIFICATE: &str = "client.crt";
const AUTHORITY: &str = "ca.crt";
const ADDRESS: &str = "server";
/// Longest file that is read, bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// A key made for enrolment, which has not left this process.
pub struct EnrolmentKey {
    key: KeyPair,
}

impl fmt::Debug for EnrolmentKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("EnrolmentKey(…)")
    }
}

impl EnrolmentKey {
    /// A new ECDSA key on P-256.
    pub fn generate() -> Result<Self, IdentityError> {
        Ok(Self { key: KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)? })
    }

    /// The certificate request (PKCS #10, DER) that proves possession of the key. It asks for nothing.
    pub fn request(&self) -> Result<Vec<u8>, IdentityError> {
        request_for(&self.key)
    }
}

fn request_for(key: &KeyPair) -> Result<Vec<u8>, IdentityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    Ok(params.serialize_request(key)?.der().to_vec())
}

/// Who this machine is at one server.
pub struct Credentials {
    server: ServerAddress,
    parsed: Parsed,
    certificate: CertificateDer<'static>,
    authority: CertificateDer<'static>,
    key: KeyPair,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("identity", &self.parsed.identity).finish_non_exhaustive()
    }
}

impl Credentials {
    /// The server.
    pub fn server(&self) -> &ServerAddress {
        &self.server
    }

    /// Tenant and agent id.
    pub fn identity(&self) -> &Identity {
        &self.parsed.identity
    }

    /// The only authority believed for this server.
    pub fn authority(&self) -> &CertificateDer<'static> {
        &self.authority
    }

    /// End of the certificate's validity, seconds since 1970.
    pub fn expires_s(&self) -> i64 {
        self.parsed.not_after_s
    }

    /// Whether at `now` (since 1970) less than a third of the certificate's life is left.
    pub fn renewal_due(&self, now: Duration) -> bool {
        let now_s = i64::try_from(now.as_secs()).unwrap_or(i64::MAX);
        let life_s = self.parsed.not_after_s.saturating_sub(self.parsed.not_before_s);
        self.parsed.not_after_s.saturating_sub(now_s) < life_s / 3
    }

    /// A certificate request (PKCS #10, DER) for the key in use: a renewal keeps the key.
    pub fn renewal_request(&self) -> Result<Vec<u8>, IdentityError> {
        request_for(&self.key)
    }

    /// Certificate chain and key for TLS.
    pub(super) fn for_tls(&self) -> (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>) {
        (vec![self.certificate.clone()], PrivateKeyDer::Pkcs8(self.key.serialize_der().into()))
    }
}

/// Where this machine's identity at one server is kept.
#[derive(Debug, Clone)]
pub struct Store {
    servers: PathBuf,
    server: ServerAddress,
}

impl Store {
    /// The store of `server` below the configuration directory `config`. Touches no file.
    pub fn new(config: &Path, server: ServerAddress) -> Self {
        Self { servers: config.join("servers"), server }
    }

    /// Its directory.
    pub fn directory(&self) -> PathBuf {
        self.servers.join(self.server.directory_name())
    }

    /// Reads who this machine is. An expired certificate is no error here, but is in [`super::client_config`].
    pub fn load(&self) -> Result<Credentials, IdentityError> {
        let directory = self.directory();
        if !directory.join(CERTIFICATE).exists() {
            return Err(IdentityError::NotEnrolled { server: self.server.clone() });
        }
        let authority = read_certificate(&directory.join(AUTHORITY))?;
        let path = directory.join(CERTIFICATE);
        let certificate = read_certificate(&path)?;
        let damaged = |why: &str| IdentityError::Damaged { path: path.clone(), why: why.to_owned() };
        let parsed = parse(&certificate, &authority).map_err(damaged)?;
        let key = read_key(&directory.join(KEY))?;
        if parsed.public_key != key.public_key_raw() {
            return Err(damaged("it does not belong to client.key"));
        }
        Ok(Credentials { server: self.server.clone(), parsed, certificate, authority, key })
    }

    /// Keeps what the server answered to an enrolment, in place of any earlier identity there: all or nothing. Refuses
    /// an answer that does not fit the key or the authority that the token named.
    pub fn save(
        &self,
        key: &EnrolmentKey,
        certificate: &CertificateDer<'_>,
        authority: &CertificateDer<'_>,
        expected: AuthorityHash,
    ) -> Result<Credentials, IdentityError> {
        if AuthorityHash::of(authority) != expected {
            return Err(IdentityError::ServerUnknown);
        }
        let parsed = parse(certificate, authority).map_err(IdentityError::Answer)?;
        if parsed.public_key != key.key.public_key_raw() {
            return Err(IdentityError::Answer("the certificate is for another key"));
        }
        let create = |path: &Path, source| IdentityError::File { action: "create", path: path.to_owned(), source };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&self.servers)
            .map_err(|source| create(&self.servers, source))?;
        let stage = tempfile::Builder::new()
            .prefix(".new-")
            .permissions(fs::Permissions::from_mode(0o700))
            .tempdir_in(&self.servers)
            .map_err(|source| create(&self.servers, source))?;
        write_file(&stage.path().join(KEY), Zeroizing::new(key.key.serialize_pem()).as_bytes())?;
        write_file(&stage.path().join(CERTIFICATE), certificate_pem(certificate).as_bytes())?;
        write_file(&stage.path().join(AUTHORITY), certificate_pem(authority).as_bytes())?;
        write_file(&stage.path().join(ADDRESS), format!("{}\n", self.server).as_bytes())?;
        self.put_in_place(stage).map_err(|source| create(&self.directory(), source))?;
        self.load()
    }

    /// Keeps a renewed certificate for the key in use. Refuses one that does not fit.
    pub fn renew(&self, certificate: &CertificateDer<'_>) -> Result<Credentials, IdentityError> {
        let current = self.load()?;
        let parsed = parse(certificate, &current.authority).map_err(IdentityError::Answer)?;
        if parsed.public_key != current.key.public_key_raw() || parsed.identity != current.parsed.identity {
            return Err(IdentityError::Answer("the certificate is for somebody else"));
        }
        let directory = self.directory();
        let path = directory.join(CERTIFICATE);
        let failed = |source| IdentityError::File { action: "write", path: path.clone(), source };
        let mut file = tempfile::Builder::new().prefix(".new-").tempfile_in(&directory).map_err(failed)?;
        file.write_all(certificate_pem(certificate).as_bytes()).map_err(failed)?;
        file.as_file().sync_all().map_err(failed)?;
        file.persist(&path).map_err(|error| failed(error.error))?;
        sync_directory(&directory).map_err(failed)?;
        self.load()
    }

    fn put_in_place(&self, stage: tempfile::TempDir) -> io::Result<()> {
        let directory = self.directory();
        sync_directory(stage.path())?;
        if directory.exists() {
            // The old identity ends up in the stage and is removed with it.
            if renameat_with(CWD, stage.path(), CWD, &directory, RenameFlags::EXCHANGE).is_err() {
                // A file system that cannot exchange (NFS): the old one steps aside first, and back if need be.
                let aside = tempfile::Builder::new().prefix(".old-").tempdir_in(&self.servers)?;
                let old = aside.path().join("old");
                fs::rename(&directory, &old)?;
                if let Err(error) = fs::rename(stage.path(), &directory) {
                    fs::rename(&old, &directory)?;
                    return Err(error);
                }
            }
        } else {
            fs::rename(stage.keep(), &directory)?;
        }
        sync_directory(&self.servers)
    }
}

/// The servers at which this machine is enrolled, by address.
pub fn servers(config: &Path) -> Result<Vec<ServerAddress>, IdentityError> {
    let directory = config.join("servers");
    let failed = |source| IdentityError::File { action: "read", path: directory.clone(), source };
    let entries = match fs::read_dir(&directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut found: Vec<ServerAddress> = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed)?;
        if entry.file_name().as_encoded_bytes().starts_with(b".") {
            continue;
        }
        let text = fs::read_to_string(entry.path().join(ADDRESS)).unwrap_or_default();
        found.extend(text.trim().parse::<ServerAddress>());
    }
    found.sort();
    Ok(found)
}

fn write_file(path: &Path, bytes: &[u8]) -> Result<(), IdentityError> {
    let write = || {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        file.write_all(bytes)?;
        file.sync_all()
    };
    write().map_err(|source| IdentityError::File { action: "write", path: path.to_owned(), source })
}

fn sync_directory(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

fn read_file(path: &Path) -> Result<Vec<u8>, IdentityError> {
    let failed = |source| IdentityError::File { action: "read", path: path.to_owned(), source };
    if fs::metadata(path).map_err(failed)?.len() > FILE_BYTES_MAX {
        return Err(IdentityError::Damaged { path: path.to_owned(), why: "too long".to_owned() });
    }
    fs::read(path).map_err(failed)
}

fn read_certificate(path: &Path) -> Result<CertificateDer<'static>, IdentityError> {
    CertificateDer::from_pem_slice(&read_file(path)?)
        .map_err(|error| IdentityError::Damaged { path: path.to_owned(), why: error.to_string() })
}

fn read_key(path: &Path) -> Result<KeyPair, IdentityError> {
    let damaged = |why: String| IdentityError::Damaged { path: path.to_owned(), why };
    let text = Zeroizing::new(read_file(path)?);
    let mode = fs::metadata(path)
        .map_err(|source| IdentityError::File { action: "read", path: path.to_owned(), source })?
        .permissions()
        .mode();
    if mode & 0o077 != 0 {
        return Err(IdentityError::KeyExposed { path: path.to_owned() });
    }
    let text = std::str::from_utf8(&text).map_err(|_| damaged("not text".to_owned()))?;
    KeyPair::from_pem(text).map_err(|error| damaged(error.to_string()))
}
