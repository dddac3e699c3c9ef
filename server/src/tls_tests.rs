//! Real handshakes over an in-memory pipe: who gets in, and who does not.

use std::time::Duration;

use rcgen::{CertificateParams, ExtendedKeyUsagePurpose, KeyPair, PKCS_ECDSA_P256_SHA256};
use rustls::client::Resumption;
use rustls::pki_types::{PrivateKeyDer, ServerName};
use rustls::{AlertDescription, CertificateError, ClientConfig};
use strandline_messages::AgentId;
use strandline_messages::identity::Role;
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::pki::ProvenKey;

const DAY: Duration = Duration::from_hours(24);

struct Site {
    _data: TempDir,
    authority: Authority,
    config: Arc<ServerConfig>,
}

type Credentials = (Vec<CertificateDer<'static>>, PrivateKeyDer<'static>);

impl Site {
    fn new() -> Self {
        let data = tempfile::tempdir().unwrap();
        let authority = Authority::create(data.path()).unwrap();
        let identity = authority.server(&["localhost".to_owned()]).unwrap();
        let certificate = Arc::new(ServerCertificate::new(identity).unwrap());
        let config = server_config(&authority, certificate).unwrap();
        Self { _data: data, authority, config }
    }

    fn agent(&self, validity: Duration) -> Credentials {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let request = CertificateParams::default().serialize_request(&key).unwrap();
        let proven = ProvenKey::from_request(request.der()).unwrap();
        let certificate = self.authority.issue_agent(&proven, &identity(), validity).unwrap();
        (vec![certificate], PrivateKeyDer::Pkcs8(key.serialize_der().into()))
    }
}

fn identity() -> Identity {
    Identity { tenant: "acme".parse().unwrap(), agent: AgentId([7; 16]), role: Role::Agent }
}

fn client(trusted: &Authority, credentials: Option<Credentials>, protocols: &[&[u8]]) -> ClientConfig {
    let mut roots = RootCertStore::empty();
    roots.add(trusted.certificate().clone()).unwrap();
    let builder = ClientConfig::builder_with_provider(Arc::new(provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match credentials {
        Some((chain, key)) => builder.with_client_auth_cert(chain, key).unwrap(),
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    config
}

/// What each side saw: the server's decision or its handshake error, and what the client read afterwards.
async fn meet(
    server: &Arc<ServerConfig>,
    client: ClientConfig,
) -> (Result<Result<Accepted, Refusal>, rustls::Error>, Result<String, rustls::Error>) {
    let (near, far) = tokio::io::duplex(64 << 10);
    let serving = async {
        let mut stream = TlsAcceptor::from(Arc::clone(server)).accept(near).await.map_err(|error| tls_error(&error))?;
        let decision = accepted_peer(stream.get_ref().1);
        stream.write_all(b"hello").await.unwrap();
        stream.shutdown().await.unwrap();
        Ok(decision)
    };
    let calling = async {
        let name = ServerName::try_from("localhost").unwrap();
        let mut stream =
            TlsConnector::from(Arc::new(client)).connect(name, far).await.map_err(|error| tls_error(&error))?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await.map_err(|error| tls_error(&error))?;
        Ok(text)
    };
    tokio::join!(serving, calling)
}

fn tls_error(error: &std::io::Error) -> rustls::Error {
    match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
        Some(inner) => inner.clone(),
        None => rustls::Error::General(error.to_string()),
    }
}

fn is_certificate_alert(result: &Result<String, rustls::Error>) -> bool {
    matches!(result, Err(rustls::Error::AlertReceived(_)))
}

#[tokio::test]
async fn an_agent_is_who_its_certificate_says() {
    let site = Site::new();
    let (server, client) = meet(&site.config, client(&site.authority, Some(site.agent(DAY)), &[ALPN_SESSION])).await;
    let Ok(Ok(Accepted::Agent(peer))) = server else { panic!("{server:?}") };
    assert_eq!(peer.identity, identity());
    assert_eq!(client.unwrap(), "hello");
}

#[tokio::test]
async fn s41_without_a_certificate_only_enrolment_is_open() {
    let site = Site::new();
    let (server, _) = meet(&site.config, client(&site.authority, None, &[ALPN_SESSION])).await;
    assert_eq!(server.unwrap(), Err(Refusal::NoCertificate));
    let (server, _) = meet(&site.config, client(&site.authority, None, &[ALPN_ENROLMENT])).await;
    assert_eq!(server.unwrap(), Ok(Accepted::Enrolling));
}

#[tokio::test]
async fn s41_an_agent_of_another_authority_is_refused() {
    let (site, other) = (Site::new(), Site::new());
    let (server, client) = meet(&site.config, client(&site.authority, Some(other.agent(DAY)), &[ALPN_SESSION])).await;
    assert!(matches!(server, Err(rustls::Error::InvalidCertificate(_))), "{server:?}");
    assert!(is_certificate_alert(&client), "{client:?}");
}

#[tokio::test]
async fn s41_an_expired_agent_is_refused() {
    let site = Site::new();
    let expired = site.agent(Duration::ZERO);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let (server, client) = meet(&site.config, client(&site.authority, Some(expired), &[ALPN_SESSION])).await;
    assert!(
        matches!(server, Err(rustls::Error::InvalidCertificate(CertificateError::ExpiredContext { .. }))),
        "{server:?}"
    );
    assert!(matches!(client, Err(rustls::Error::AlertReceived(AlertDescription::CertificateExpired))), "{client:?}");
}

#[tokio::test]
async fn s41_the_servers_own_certificate_does_not_make_an_agent() {
    let site = Site::new();
    let identity = site.authority.issue_server(&["localhost".to_owned()], DAY).unwrap();
    let stolen = Some((identity.chain, identity.key));
    let (server, _) = meet(&site.config, client(&site.authority, stolen, &[ALPN_SESSION])).await;
    assert!(
        matches!(server, Err(rustls::Error::InvalidCertificate(CertificateError::InvalidPurposeContext { .. }))),
        "{server:?}"
    );
}

#[tokio::test]
async fn s41_an_agents_certificate_does_not_make_a_server() {
    let site = Site::new();
    let (chain, key) = site.agent(DAY);
    let identity = ServerIdentity { chain, key, expires_s: 0 };
    let config = server_config(&site.authority, Arc::new(ServerCertificate::new(identity).unwrap())).unwrap();
    let (_, client) = meet(&config, client(&site.authority, Some(site.agent(DAY)), &[ALPN_SESSION])).await;
    assert!(matches!(client, Err(rustls::Error::InvalidCertificate(_))), "{client:?}");
}

#[tokio::test]
async fn s41_a_self_signed_certificate_with_an_agents_name_is_refused() {
    let site = Site::new();
    let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![rcgen::SanType::URI(identity().uri().try_into().unwrap())];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
    let forged = vec![params.self_signed(&key).unwrap().into()];
    let forged = Some((forged, PrivateKeyDer::Pkcs8(key.serialize_der().into())));
    let (server, _) = meet(&site.config, client(&site.authority, forged, &[ALPN_SESSION])).await;
    assert!(matches!(server, Err(rustls::Error::InvalidCertificate(_))), "{server:?}");
}

#[tokio::test]
async fn s47_no_application_protocol_is_refused() {
    let site = Site::new();
    let (server, _) = meet(&site.config, client(&site.authority, Some(site.agent(DAY)), &[])).await;
    assert_eq!(server.unwrap(), Err(Refusal::NoProtocol));
}

#[tokio::test]
async fn s47_a_foreign_application_protocol_is_refused() {
    let site = Site::new();
    let (server, client) = meet(&site.config, client(&site.authority, Some(site.agent(DAY)), &[b"h2"])).await;
    assert_eq!(server, Err(rustls::Error::NoApplicationProtocol));
    assert_eq!(client, Err(rustls::Error::AlertReceived(AlertDescription::NoApplicationProtocol)));
}

#[tokio::test]
async fn s47_an_agent_refuses_a_server_of_another_authority() {
    let (site, other) = (Site::new(), Site::new());
    let (_, client) = meet(&site.config, client(&other.authority, Some(other.agent(DAY)), &[ALPN_SESSION])).await;
    assert!(matches!(client, Err(rustls::Error::InvalidCertificate(_))), "{client:?}");
}

/// Sends raw bytes and returns the handshake error and what came back.
async fn speak(bytes: &[u8]) -> (rustls::Error, Vec<u8>) {
    let site = Site::new();
    let (near, mut far) = tokio::io::duplex(64 << 10);
    let serving =
        async { TlsAcceptor::from(site.config).accept(near).await.map(|_| ()).map_err(|error| tls_error(&error)) };
    let calling = async {
        far.write_all(bytes).await.unwrap();
        let mut reply = Vec::new();
        far.read_to_end(&mut reply).await.unwrap();
        reply
    };
    let (server, reply) = tokio::join!(serving, calling);
    (server.unwrap_err(), reply)
}

#[tokio::test]
async fn s47_plaintext_is_refused() {
    let (error, _) = speak(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(matches!(error, rustls::Error::InvalidMessage(_)), "{error:?}");
}

#[tokio::test]
async fn s47_tls_1_2_is_refused() {
    // ClientHello of RFC 5246 without supported_versions: TLS 1.2 with ECDHE-ECDSA-AES128-GCM and the usual extensions.
    let extensions: &[u8] = &[
        0x00, 0x0a, 0x00, 0x06, 0x00, 0x04, 0x00, 0x1d, 0x00, 0x17, // groups: x25519, secp256r1
        0x00, 0x0b, 0x00, 0x02, 0x01, 0x00, // point formats: uncompressed
        0x00, 0x0d, 0x00, 0x06, 0x00, 0x04, 0x04, 0x03, 0x08, 0x04, // signatures: ecdsa p256, rsa-pss
    ];
    let mut body = vec![0x03, 0x03];
    body.extend([7; 32]);
    body.extend([0x00, 0x00, 0x02, 0xc0, 0x2b, 0x01, 0x00]);
    body.extend(u16::try_from(extensions.len()).unwrap().to_be_bytes());
    body.extend(extensions);
    let mut message = vec![0x01, 0x00];
    message.extend(u16::try_from(body.len()).unwrap().to_be_bytes());
    message.extend(body);
    let mut record = vec![0x16, 0x03, 0x01];
    record.extend(u16::try_from(message.len()).unwrap().to_be_bytes());
    record.extend(message);
    let (error, reply) = speak(&record).await;
    assert!(matches!(error, rustls::Error::PeerIncompatible(_)), "{error:?}");
    // A fatal alert, protocol_version (70).
    assert_eq!(reply[..1], [0x15]);
    assert_eq!(reply[reply.len() - 2..], [0x02, 0x46]);
}

#[tokio::test]
async fn s41_a_second_connection_never_resumes_past_the_verifier() {
    let site = Site::new();
    let mut config = client(&site.authority, Some(site.agent(DAY)), &[ALPN_SESSION]);
    config.resumption = Resumption::in_memory_sessions(8);
    for _ in 0..3 {
        let (near, far) = tokio::io::duplex(64 << 10);
        let acceptor = TlsAcceptor::from(Arc::clone(&site.config));
        let connector = TlsConnector::from(Arc::new(config.clone()));
        let name = ServerName::try_from("localhost").unwrap();
        let (server, client) = tokio::join!(acceptor.accept(near), connector.connect(name, far));
        let (mut server, mut client) = (server.unwrap(), client.unwrap());
        server.write_all(b"x").await.unwrap();
        server.shutdown().await.unwrap();
        client.read_to_end(&mut Vec::new()).await.unwrap();
        assert_eq!(client.get_ref().1.handshake_kind(), Some(rustls::HandshakeKind::Full));
        assert!(accepted_peer(server.get_ref().1).is_ok());
    }
}

#[tokio::test]
async fn a_replaced_server_certificate_is_used_from_the_next_handshake() {
    let data = tempfile::tempdir().unwrap();
    let authority = Authority::create(data.path()).unwrap();
    let names = ["localhost".to_owned()];
    let certificate = Arc::new(ServerCertificate::new(authority.issue_server(&names, DAY).unwrap()).unwrap());
    let config = server_config(&authority, Arc::clone(&certificate)).unwrap();
    let before = certificate.expires_s();
    assert!(certificate.replace(authority.server(&names).unwrap()).unwrap());
    assert!(!certificate.replace(authority.server(&names).unwrap()).unwrap());
    assert!(certificate.expires_s() > before);
    let (server, client) = meet(&config, client(&authority, None, &[ALPN_ENROLMENT])).await;
    assert_eq!(server.unwrap(), Ok(Accepted::Enrolling));
    assert_eq!(client.unwrap(), "hello");
}
