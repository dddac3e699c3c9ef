//! The same commands, directly and through the socket.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;

use strandline_messages::identity::EnrolmentToken;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::catalog::Catalog;
use crate::config::Config;
use crate::pki::Authority;
use crate::tenancy::Tenancy;

async fn administrator(data: &Path) -> Administrator<Idle> {
    let authority = Arc::new(Authority::create(data).unwrap());
    let catalog = Catalog::open(&data.join("catalog.sqlite")).await.unwrap();
    let tenancy = Tenancy::open(catalog.pool().clone(), data).await.unwrap();
    Administrator::new(data.to_owned(), Config::default(), tenancy, authority, Idle)
}

/// Runs `client` against a server on `data`.
async fn with_server<T>(data: &Path, client: impl Future<Output = T>) -> T {
    let administrator = administrator(data).await;
    let socket = AdminSocket::bind(data).unwrap();
    tokio::select! {
        never = socket.serve(&administrator) => match never {},
        result = client => result,
    }
}

fn acme() -> TenantName {
    "acme".parse().unwrap()
}

#[tokio::test]
async fn every_request_is_answered_through_the_socket() {
    let data = tempfile::tempdir().unwrap();
    let path = data.path();
    with_server(path, async {
        let ask = async |request| ask(path, &request).await.unwrap();
        let added = ask(AdminRequest::TenantAdd { name: acme() }).await;
        assert!(matches!(&added, AdminReply::Tenant(tenant) if tenant.name == acme()), "{added:?}");
        let twice = ask(AdminRequest::TenantAdd { name: acme() }).await;
        assert!(matches!(&twice, AdminReply::Failed { exit_code: 1, message } if message.contains("exists already")));
        let token = ask(AdminRequest::TokenCreate { tenant: acme(), valid_for: Duration::from_mins(5) }).await;
        let AdminReply::Token(token) = token else { panic!("{token:?}") };
        let parsed: EnrolmentToken = token.token.parse().unwrap();
        assert_eq!(parsed.authority, Authority::load(path).unwrap().hash());
        assert_eq!(parsed.addresses[0].to_string(), token.addresses[0]);
        let agents = ask(AdminRequest::AgentList { tenant: Some(acme()) }).await;
        assert_eq!(agents, AdminReply::Agents { agents: vec![] });
        let revoked = ask(AdminRequest::AgentRevoke { agent: AgentId([1; 16]) }).await;
        assert!(matches!(revoked, AdminReply::Failed { exit_code: 1, .. }), "{revoked:?}");
        let tenants = ask(AdminRequest::TenantList {}).await;
        assert!(matches!(&tenants, AdminReply::Tenants { tenants } if tenants.len() == 1));
        let AdminReply::Status(status) = ask(AdminRequest::Status {}).await else { panic!() };
        assert!(status.free_bytes > 0 && status.total_bytes >= status.free_bytes && !status.running);
    })
    .await;
    assert!(matches!(ask(path, &AdminRequest::Status {}).await, Err(AdminError::NotRunning { .. })));
}

#[tokio::test]
async fn s43_a_request_that_is_none_is_answered_and_the_socket_goes_on() {
    let data = tempfile::tempdir().unwrap();
    let path = data.path();
    with_server(path, async {
        for bytes in [b"rubbish\n".to_vec(), b"{\"request\":\"status\",\"x\":1}\n".to_vec(), b"\n".to_vec()] {
            let mut stream = tokio::net::UnixStream::connect(path.join(SOCKET_NAME)).await.unwrap();
            stream.write_all(&bytes).await.unwrap();
            let mut reply = String::new();
            stream.read_to_string(&mut reply).await.unwrap();
            assert!(reply.contains("cannot be understood"), "{reply}");
        }
        let mut endless = tokio::net::UnixStream::connect(path.join(SOCKET_NAME)).await.unwrap();
        let megabyte = vec![b'x'; 1 << 20];
        assert!(endless.write_all(&megabyte).await.is_err() || endless.read(&mut [0]).await.unwrap_or(0) == 0);
        assert!(ask(path, &AdminRequest::TenantList {}).await.is_ok());
    })
    .await;
}

#[tokio::test]
async fn the_socket_is_private_replaces_a_stale_one_and_may_lie_deep() {
    let root = tempfile::tempdir().unwrap();
    let deep = root.path().join("d".repeat(100)).join("e".repeat(100));
    std::fs::create_dir_all(&deep).unwrap();
    std::fs::write(deep.join(SOCKET_NAME), "stale").unwrap();
    with_server(&deep, async {
        let mode = std::fs::metadata(deep.join(SOCKET_NAME)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        ask(&deep, &AdminRequest::TenantList {}).await.unwrap();
    })
    .await;
    assert!(!deep.join(SOCKET_NAME).exists());
}

#[test]
fn requests_and_replies_read_back() {
    let requests = [
        AdminRequest::TenantAdd { name: acme() },
        AdminRequest::TokenCreate { tenant: acme(), valid_for: Duration::from_millis(1500) },
        AdminRequest::AgentList { tenant: None },
        AdminRequest::AgentRevoke { agent: AgentId([2; 16]) },
        AdminRequest::Repository(RepositoryRequest::List {}),
        AdminRequest::Repository(RepositoryRequest::Scrub {
            repository: Some("acme/main".parse().unwrap()),
            subset: strandline_messages::wire::manage::ScrubSubset::Part { part: 1, of: 7 },
            bytes_per_second: None,
        }),
        AdminRequest::Repository(RepositoryRequest::Set {
            repository: None,
            settings: BTreeMap::from([("undelete".to_owned(), "3days".to_owned())]),
        }),
    ];
    for request in requests {
        let text = serde_json::to_string(&request).unwrap();
        assert_eq!(serde_json::from_str::<AdminRequest>(&text).unwrap(), request, "{text}");
    }
    let reply = AdminReply::Status(Box::default());
    let text = serde_json::to_string(&reply).unwrap();
    assert_eq!(serde_json::from_str::<AdminReply>(&text).unwrap(), reply);
}

/// Takes longer than a client waits for a byte.
struct Slow;

impl AdminHandler for Slow {
    async fn handle(&self, _: AdminRequest) -> AdminReply {
        tokio::time::sleep(Duration::from_secs(3)).await;
        AdminReply::Tenants { tenants: vec![] }
    }
}

#[tokio::test]
async fn a_client_waits_for_as_long_as_the_server_says_that_it_is_at_work() {
    let data = tempfile::tempdir().unwrap();
    let socket = AdminSocket::bind(data.path()).unwrap();
    let list = AdminRequest::TenantList {};
    let reply = tokio::select! {
        never = socket.serve(&Slow) => match never {},
        reply = ask(data.path(), &list) => reply,
    };
    assert_eq!(reply.unwrap(), AdminReply::Tenants { tenants: vec![] });
}
