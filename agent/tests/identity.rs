//! The agent's identity against the real server's authority: enrolment, sessions, and everything that is refused.
#![expect(clippy::unwrap_used, reason = "helpers of tests, outside `#[test]` functions")]

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;
use std::time::Duration;

use rustls::{ClientConfig, ServerConfig};
use strandline_actors::runtime::clock;
use strandline_agent::identity::{
    Credentials, EnrolmentKey, IdentityError, Store, authority_sent, client_config, enroll_client_config, explain,
    server_name, servers,
};
use strandline_messages::{AuthorityHash, ServerAddress};
use strandline_server::catalog::Catalog;
use strandline_server::pki::{Authority, ServerIdentity};
use strandline_server::tenancy::{Enrolled, TOKEN_VALIDITY_MAX, Tenancy, enrol, renew};
use strandline_server::tls::{Accepted, AgentPeer, Refusal, ServerCertificate, accepted_peer, server_config};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio_rustls::{TlsAcceptor, TlsConnector};

const DAY: Duration = Duration::from_hours(24);

struct Site {
    _data: TempDir,
    authority: Authority,
    tenancy: Tenancy,
    config: Arc<ServerConfig>,
    agent: TempDir,
}

impl Site {
    async fn new() -> Self {
        let data = tempfile::tempdir().unwrap();
        let authority = Authority::create(data.path()).unwrap();
        let tenancy = Tenancy::open(
            Catalog::open(&data.path().join("catalog.sqlite")).await.unwrap().pool().clone(),
            data.path(),
        )
        .await
        .unwrap();
        tenancy.add_tenant(&"acme".parse().unwrap()).await.unwrap();
        let identity = authority.server(&["localhost".to_owned(), "127.0.0.1".to_owned()]).unwrap();
        let config = serving(&authority, identity);
        Self { _data: data, authority, tenancy, config, agent: tempfile::tempdir().unwrap() }
    }

    fn store(&self) -> Store {
        Store::new(self.agent.path(), address())
    }

    async fn answer(&self, key: &EnrolmentKey, validity: Duration) -> Enrolled {
        let (secret, _) = self.tenancy.create_token(&"acme".parse().unwrap(), TOKEN_VALIDITY_MAX).await.unwrap();
        let request = key.request().unwrap();
        enrol(&self.tenancy, &self.authority, &secret, "host", &request, validity).await.unwrap()
    }

    async fn enrolled(&self, validity: Duration) -> Credentials {
        let key = EnrolmentKey::generate().unwrap();
        let answer = self.answer(&key, validity).await;
        self.store().save(&key, &answer.certificate, &answer.authority, self.authority.hash()).unwrap()
    }
}

fn address() -> ServerAddress {
    "localhost:9847".parse().unwrap()
}

fn serving(authority: &Authority, identity: ServerIdentity) -> Arc<ServerConfig> {
    server_config(authority, Arc::new(ServerCertificate::new(identity).unwrap())).unwrap()
}

struct Met {
    server: io::Result<Result<Accepted, Refusal>>,
    /// What the client read, or its error; and the authority that it was shown.
    client: io::Result<String>,
    shown: Result<Vec<u8>, IdentityError>,
}

/// One handshake at the address `to`, and five bytes from the server.
async fn meet(server: &Arc<ServerConfig>, client: Arc<ClientConfig>, to: &str, expected: AuthorityHash) -> Met {
    let (near, far) = tokio::io::duplex(64 << 10);
    let serving = async {
        let mut stream = TlsAcceptor::from(Arc::clone(server)).accept(near).await?;
        let decision = accepted_peer(stream.get_ref().1);
        stream.write_all(b"hello").await?;
        stream.shutdown().await?;
        Ok(decision)
    };
    let calling = async {
        let name = server_name(&to.parse().unwrap()).unwrap();
        match TlsConnector::from(client).connect(name, far).await {
            Err(error) => (Err(error), Err(IdentityError::ServerUnknown)),
            Ok(mut stream) => {
                let shown = authority_sent(stream.get_ref().1, expected).map(|authority| authority.to_vec());
                let mut text = String::new();
                let read = stream.read_to_string(&mut text).await;
                (read.map(|_| text), shown)
            }
        }
    };
    let (server, (client, shown)) = tokio::join!(serving, calling);
    Met { server, client, shown }
}

#[tokio::test]
async fn a_machine_enrols_with_a_token_and_is_an_agent_from_then_on() {
    let site = Site::new().await;
    assert!(matches!(site.store().load(), Err(IdentityError::NotEnrolled { .. })));
    let hash = site.authority.hash();
    let met = meet(&site.config, enroll_client_config(hash).unwrap(), "localhost", hash).await;
    assert_eq!(met.server.unwrap(), Ok(Accepted::Enrolling));
    assert_eq!(met.shown.unwrap(), site.authority.certificate().to_vec());
    let credentials = site.enrolled(DAY).await;
    for to in ["localhost", "127.0.0.1"] {
        let met = meet(&site.config, client_config(&credentials).unwrap(), to, hash).await;
        let Ok(Ok(Accepted::Agent(peer))) = met.server else { panic!("{:?}", met.server) };
        assert_eq!(&peer.identity, credentials.identity());
        let AgentPeer { identity, key_hash } = peer;
        assert!(site.tenancy.is_enrolled(identity.agent, &identity.tenant, &key_hash).await.unwrap());
        assert_eq!(met.client.unwrap(), "hello");
    }
    assert_eq!(servers(site.agent.path()).unwrap(), [address()]);
}

#[tokio::test]
async fn the_key_is_private_and_an_exposed_one_is_not_used() {
    let site = Site::new().await;
    site.enrolled(DAY).await;
    let directory = site.store().directory();
    assert_eq!(fs::metadata(&directory).unwrap().permissions().mode() & 0o777, 0o700);
    for entry in fs::read_dir(&directory).unwrap() {
        assert_eq!(entry.unwrap().metadata().unwrap().permissions().mode() & 0o777, 0o600);
    }
    let key = directory.join("client.key");
    fs::set_permissions(&key, fs::Permissions::from_mode(0o640)).unwrap();
    assert!(matches!(site.store().load(), Err(IdentityError::KeyExposed { .. })));
}

#[tokio::test]
async fn enrolling_again_exchanges_the_identity_as_a_whole() {
    let site = Site::new().await;
    let first = site.enrolled(DAY).await;
    let second = site.enrolled(DAY).await;
    assert_ne!(first.identity().agent, second.identity().agent);
    assert_eq!(site.store().load().unwrap().identity(), second.identity());
    let left = fs::read_dir(site.agent.path().join("servers")).unwrap().count();
    assert_eq!(left, 1, "nothing of the first identity stays behind");
}

#[tokio::test]
async fn an_answer_that_does_not_fit_is_not_stored() {
    let (site, other) = (Site::new().await, Site::new().await);
    let (key, stranger) = (EnrolmentKey::generate().unwrap(), EnrolmentKey::generate().unwrap());
    let answer = site.answer(&key, DAY).await;
    let foreign = other.answer(&key, DAY).await;
    let hash = site.authority.hash();
    let store = site.store();
    let save = |key, certificate, authority| store.save(key, certificate, authority, hash).map(|_| ());
    assert!(matches!(save(&stranger, &answer.certificate, &answer.authority), Err(IdentityError::Answer(_))));
    assert!(matches!(save(&key, &foreign.certificate, &answer.authority), Err(IdentityError::Answer(_))));
    assert!(matches!(save(&key, &foreign.certificate, &foreign.authority), Err(IdentityError::ServerUnknown)));
    assert!(matches!(save(&key, &answer.authority, &answer.authority), Err(IdentityError::Answer(_))));
    assert!(matches!(store.load(), Err(IdentityError::NotEnrolled { .. })));
    save(&key, &answer.certificate, &answer.authority).unwrap();
}

#[tokio::test]
async fn s41_an_expired_certificate_is_told_before_anything_is_sent() {
    let site = Site::new().await;
    let credentials = site.enrolled(Duration::ZERO).await;
    // Validity has a resolution of a second.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let refused = client_config(&credentials).unwrap_err();
    assert!(matches!(refused, IdentityError::CertificateExpired { since_s, .. } if since_s == credentials.expires_s()));
}

#[tokio::test]
async fn an_expired_server_certificate_is_explained() {
    let site = Site::new().await;
    let credentials = site.enrolled(DAY).await;
    let identity = site.authority.issue_server(&["localhost".to_owned()], Duration::ZERO).unwrap();
    let expired = serving(&site.authority, identity);
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let hash = site.authority.hash();
    for client in [client_config(&credentials).unwrap(), enroll_client_config(hash).unwrap()] {
        let error = meet(&expired, client, "localhost", hash).await.client.unwrap_err();
        let explained = explain(&error);
        assert!(matches!(explained, Some(IdentityError::ServerCertificateExpired { since_s: Some(_) })), "{error}");
    }
}

#[tokio::test]
async fn s47_a_server_of_another_authority_is_refused_by_enrolled_and_enrolling_machines() {
    let (site, other) = (Site::new().await, Site::new().await);
    let credentials = site.enrolled(DAY).await;
    let hash = site.authority.hash();
    for client in [client_config(&credentials).unwrap(), enroll_client_config(hash).unwrap()] {
        let error = meet(&other.config, client, "localhost", hash).await.client.unwrap_err();
        assert!(matches!(explain(&error), Some(IdentityError::ServerUnknown)), "{error}");
    }
}

#[tokio::test]
async fn s47_a_foreign_server_that_appends_the_right_authority_is_refused() {
    let (site, other) = (Site::new().await, Site::new().await);
    let mut forged = other.authority.server(&["localhost".to_owned()]).unwrap();
    forged.chain[1] = site.authority.certificate().clone();
    let config = serving(&site.authority, forged);
    let hash = site.authority.hash();
    let error = meet(&config, enroll_client_config(hash).unwrap(), "localhost", hash).await.client.unwrap_err();
    assert!(matches!(explain(&error), Some(IdentityError::ServerUnknown)), "{error}");
}

#[tokio::test]
async fn s41_an_enrolled_agent_cannot_pose_as_the_server_to_a_new_machine() {
    let site = Site::new().await;
    let agent = site.enrolled(DAY).await;
    let directory = site.store().directory();
    let key = rustls::pki_types::pem::PemObject::from_pem_file(directory.join("client.key")).unwrap();
    let leaf = rustls::pki_types::pem::PemObject::from_pem_file(directory.join("client.crt")).unwrap();
    let chain = vec![leaf, agent.authority().clone()];
    let config = serving(&site.authority, ServerIdentity { chain, key, expires_s: 0 });
    let hash = site.authority.hash();
    let met = meet(&config, enroll_client_config(hash).unwrap(), "localhost", hash).await;
    assert!(met.client.is_err());
}

#[tokio::test]
async fn a_server_under_another_name_is_explained() {
    let site = Site::new().await;
    let credentials = site.enrolled(DAY).await;
    let hash = site.authority.hash();
    for client in [client_config(&credentials).unwrap(), enroll_client_config(hash).unwrap()] {
        let error = meet(&site.config, client, "elsewhere.example", hash).await.client.unwrap_err();
        let explained = explain(&error);
        assert!(
            matches!(&explained, Some(IdentityError::ServerName { expected }) if expected == "elsewhere.example"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn s41_the_servers_refusal_of_a_foreign_agent_is_explained() {
    let (site, other) = (Site::new().await, Site::new().await);
    // An agent that trusts `site` but whose certificate is of `other`: as after a server was made anew.
    let credentials = other.enrolled(DAY).await;
    let config = serving(&site.authority, other.authority.server(&["localhost".to_owned()]).unwrap());
    let met = meet(&config, client_config(&credentials).unwrap(), "localhost", other.authority.hash()).await;
    assert!(met.server.is_err());
    let error = met.client.unwrap_err();
    assert!(matches!(explain(&error), Some(IdentityError::Refused { .. })), "{error}");
}

#[tokio::test]
async fn a_certificate_is_renewed_in_time_for_the_same_key() {
    let site = Site::new().await;
    let credentials = site.enrolled(DAY).await;
    let now = clock::wall();
    assert!(!credentials.renewal_due(now));
    assert!(credentials.renewal_due(now + DAY * 3 / 4));
    let hash = site.authority.hash();
    let met = meet(&site.config, client_config(&credentials).unwrap(), "localhost", hash).await;
    let Ok(Ok(Accepted::Agent(peer))) = met.server else { panic!("{:?}", met.server) };
    let request = credentials.renewal_request().unwrap();
    let renewed = renew(&site.tenancy, &site.authority, peer.identity.clone(), &request, 3 * DAY).await.unwrap();
    let renewed = site.store().renew(&renewed.certificate).unwrap();
    assert!(renewed.expires_s() > credentials.expires_s());
    let met = meet(&site.config, client_config(&renewed).unwrap(), "localhost", hash).await;
    assert_eq!(met.server.unwrap(), Ok(Accepted::Agent(peer)));
    let stranger = site.answer(&EnrolmentKey::generate().unwrap(), DAY).await;
    assert!(matches!(site.store().renew(&stranger.certificate), Err(IdentityError::Answer(_))));
}
