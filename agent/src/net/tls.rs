//! Connections to a server over TCP and TLS 1.3, and enrolment there.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use rustls::ClientConfig;
use rustls::pki_types::CertificateDer;
use strandline_actors::runtime::transport::{ConnectFault, Connection, Connector, read_message, write_message};
use strandline_messages::identity::{AuthorityHash, EnrolmentToken, Identity, ServerAddress};
use strandline_messages::wire::{Enroll, Enrolled, Message};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector as RustlsConnector;
use tokio_rustls::client::TlsStream;

use crate::identity::{
    Credentials, EnrolmentKey, IdentityError, authority_sent, client_config, enroll_client_config, explain, server_name,
};

/// How long connecting and the handshake may take together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(15);

/// Connects to one server as an enrolled machine.
pub struct TlsConnector {
    address: ServerAddress,
    authority: AuthorityHash,
    config: Arc<ClientConfig>,
}

impl TlsConnector {
    /// With this machine's credentials. Fails if they have expired.
    pub fn new(credentials: &Credentials) -> Result<Self, IdentityError> {
        let (address, authority) = (credentials.server().clone(), AuthorityHash::of(credentials.authority()));
        Ok(Self { address, authority, config: client_config(credentials)? })
    }
}

impl Connector for TlsConnector {
    fn connect(&self, address: Option<String>) -> BoxFuture<'static, Result<Connection, ConnectFault>> {
        let (home, config) = (self.address.clone(), Arc::clone(&self.config));
        async move {
            let target = match address {
                None => home,
                Some(text) => text.parse().map_err(|error| ConnectFault::lasting(format!("{error}")))?,
            };
            let connecting = tokio::time::timeout(CONNECT_TIMEOUT, dial(&target, config)).await;
            let connection = connecting
                .map_err(|_| ConnectFault::passing(format!("{target} does not answer")))?
                .map_err(|error| fault(&target, &error))?;
            Ok(Box::new(connection) as Connection)
        }
        .boxed()
    }

    fn target(&self) -> String {
        self.address.to_string()
    }

    fn authority(&self) -> Option<AuthorityHash> {
        Some(self.authority)
    }

    fn explain(&self, error: &io::Error) -> Option<ConnectFault> {
        explain(error).map(|reason| ConnectFault::lasting(format!("{}: {reason}", self.address)))
    }
}

fn fault(target: &ServerAddress, error: &io::Error) -> ConnectFault {
    match explain(error) {
        Some(reason) => ConnectFault::lasting(format!("{target}: {reason}")),
        None => ConnectFault::passing(format!("cannot reach the server at {target}: {error}")),
    }
}

async fn dial(target: &ServerAddress, config: Arc<ClientConfig>) -> io::Result<TlsStream<TcpStream>> {
    let name = server_name(target).map_err(io::Error::other)?;
    let connection = TcpStream::connect((target.host(), target.port())).await?;
    connection.set_nodelay(true)?;
    RustlsConnector::from(config).connect(name, connection).await
}

/// Why enrolment failed.
#[derive(Debug, thiserror::Error)]
pub enum EnrollError {
    /// None of the token's addresses can be reached.
    #[error("{0}; the token is still good")]
    Unreachable(String),
    /// The server refused.
    #[error("{0}")]
    Refused(String),
    /// Keys or certificates.
    #[error(transparent)]
    Identity(#[from] IdentityError),
}

/// A machine that has just been enrolled: everything that its store keeps.
pub struct NewAgent {
    /// Where the server was reached.
    pub server: ServerAddress,
    /// Its key.
    pub key: EnrolmentKey,
    /// Who it is now.
    pub identity: Identity,
    /// Its certificate.
    pub certificate: CertificateDer<'static>,
    /// The authority's certificate, matching the token's hash.
    pub authority: CertificateDer<'static>,
}

/// Spends a token: makes a key, has it certified by the first server of the token that answers.
pub async fn enroll(token: &EnrolmentToken, label: &str) -> Result<NewAgent, EnrollError> {
    let config = enroll_client_config(token.authority)?;
    let mut last = "the token names no server".to_owned();
    for server in &token.addresses {
        let dialled = tokio::time::timeout(CONNECT_TIMEOUT, dial(server, Arc::clone(&config))).await;
        match dialled {
            Ok(Ok(connection)) => return request(connection, server, token, label).await,
            Ok(Err(error)) => match explain(&error) {
                Some(reason) => return Err(reason.into()),
                None => last = format!("cannot reach the server at {server}: {error}"),
            },
            Err(_) => last = format!("{server} does not answer"),
        }
    }
    Err(EnrollError::Unreachable(last))
}

async fn request(
    mut connection: TlsStream<TcpStream>,
    server: &ServerAddress,
    token: &EnrolmentToken,
    label: &str,
) -> Result<NewAgent, EnrollError> {
    let authority = authority_sent(connection.get_ref().1, token.authority)?;
    let key = EnrolmentKey::generate()?;
    let enroll = Enroll {
        secret: token.secret.0.to_vec().into(),
        request: key.request()?.into(),
        label: label.chars().take(60).collect(),
    };
    let answer = async {
        write_message(&mut connection, &Message::Enroll(enroll)).await?;
        read_message(&mut connection).await
    };
    let answer = tokio::time::timeout(CONNECT_TIMEOUT, answer)
        .await
        .map_err(|_| EnrollError::Unreachable(format!("{server} does not answer")))?
        .map_err(|error| EnrollError::Unreachable(format!("{server}: {error}")))?;
    // The server closes as well; what it sent is here.
    let _ = connection.shutdown().await;
    match answer {
        Message::Enrolled(Enrolled { tenant, agent, certificate, .. }) => Ok(NewAgent {
            server: server.clone(),
            key,
            identity: Identity { tenant, agent, role: strandline_messages::identity::Role::Agent },
            certificate: CertificateDer::from(certificate.into_vec()),
            authority,
        }),
        Message::Refused(refusal) => Err(EnrollError::Refused(refusal.message)),
        other => Err(EnrollError::Refused(format!("the server answered with {}", other.name()))),
    }
}
