//! `Listener`: accepts TCP connections, asks [`Admission`] about each, times its handshake, and hands it to a worker arbiter.
//!
//! It owns the listening sockets and nothing after the hand-over: TLS, greeting and everything behind run on the worker.
//! It ends when the server stops, before anything else is closed.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, AsyncContext, Context, Handler};
use actix_rt::ArbiterHandle;
use strandline_actors::runtime::clock;
use strandline_actors::runtime::transport::{Connection, LinkError, read_message, write_message};
use strandline_messages::identity::EnrolmentSecret;
use strandline_messages::mail::Peer;
use strandline_messages::wire::{Enroll, Enrolled, Message, RefusalCode, Refused};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use crate::admission::{Admission, Counted, GiveWay, Visit};
use crate::core::ServerCore;
use crate::pki::Authority;
use crate::tenancy::{Tenancy, enrol};
use crate::tls::{Accepted, AgentPeer, accepted_peer};

/// After accepting failed (descriptors exhausted): wait before trying again.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// What a connection needs until it has an owner.
pub struct Door {
    /// TLS.
    pub tls: TlsAcceptor,
    /// Who is enrolled.
    pub tenancy: Tenancy,
    /// Issues certificates.
    pub authority: Arc<Authority>,
    /// How long an agent's certificate lasts.
    pub agent_validity: Duration,
    /// Serves greeted connections.
    pub core: ServerCore,
    /// Says how many there may be.
    pub admission: Arc<Admission>,
}

/// Stop accepting. Sockets that were accepted go on.
#[derive(actix::Message)]
#[rtype(result = "()")]
pub struct StopListening;

/// See the module.
pub struct Listener {
    door: Arc<Door>,
    sockets: Vec<std::net::TcpListener>,
    workers: Vec<ArbiterHandle>,
    accepting: Vec<actix::SpawnHandle>,
}

impl Listener {
    /// Binds every address.
    pub fn bind(addresses: &[SocketAddr], door: Arc<Door>, workers: Vec<ArbiterHandle>) -> io::Result<Self> {
        let mut sockets = Vec::with_capacity(addresses.len());
        for address in addresses {
            let socket = std::net::TcpListener::bind(address)
                .map_err(|error| io::Error::new(error.kind(), format!("cannot listen on {address}: {error}")))?;
            socket.set_nonblocking(true)?;
            sockets.push(socket);
        }
        Ok(Self { door, sockets, workers, accepting: Vec::new() })
    }

    /// The addresses bound, with the ports that the system chose.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        self.sockets.iter().filter_map(|socket| socket.local_addr().ok()).collect()
    }
}

impl Actor for Listener {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        for socket in self.sockets.drain(..) {
            let Ok(socket) = TcpListener::from_std(socket) else { continue };
            let serving = accept_for_ever(socket, Arc::clone(&self.door), self.workers.clone());
            self.accepting.push(ctx.spawn(actix::fut::wrap_future(serving)));
        }
    }
}

impl Handler<StopListening> for Listener {
    type Result = ();

    fn handle(&mut self, _: StopListening, ctx: &mut Context<Self>) {
        for accepting in self.accepting.drain(..) {
            ctx.cancel_future(accepting);
        }
    }
}

async fn accept_for_ever(socket: TcpListener, door: Arc<Door>, workers: Vec<ArbiterHandle>) {
    let mut next = 0usize;
    loop {
        let (connection, address) = match socket.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "accepting a connection failed");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (visit, give_way) = match door.admission.enter(address.ip()) {
            Ok(entered) => entered,
            Err(reason) => {
                tracing::warn!(peer = %address, %reason, "connection refused");
                continue;
            }
        };
        // Small acknowledgements would otherwise wait 40 ms for company.
        let prepared = connection.set_nodelay(true).and_then(|()| connection.into_std());
        let Ok(connection) = prepared else { continue };
        let door = Arc::clone(&door);
        let entering = async move {
            if let Err(reason) = enter(&door, connection, visit, give_way).await {
                tracing::warn!(peer = %address, reason, "connection refused");
            }
        };
        next = next.wrapping_add(1);
        match workers.get(next % workers.len().max(1)) {
            Some(worker) => drop(worker.spawn(entering)),
            None => drop(actix_rt::spawn(entering)),
        }
    }
}

async fn enter(
    door: &Door,
    connection: std::net::TcpStream,
    mut visit: Visit,
    give_way: GiveWay,
) -> Result<(), String> {
    let connection = tokio::net::TcpStream::from_std(connection).map_err(|error| error.to_string())?;
    let handshake = tokio::select! {
        // Admission's log tells of it.
        _ = give_way => return Ok(()),
        handshake = shake_hands(door, connection, &mut visit) => handshake?,
    };
    let Some((connection, peer)) = handshake else { return Ok(()) };
    let connection: Connection = Box::new(Counted::new(connection, visit));
    door.core.serve(connection, peer).await.map_err(|error| error.to_string())
}

/// Everything before it is settled who is there; `None` if that was all that the peer came for.
async fn shake_hands(
    door: &Door,
    connection: tokio::net::TcpStream,
    visit: &mut Visit,
) -> Result<Option<(TlsStream<tokio::net::TcpStream>, Peer)>, String> {
    let limit = door.admission.handshake_timeout();
    let handshake = tokio::time::timeout(limit, door.tls.accept(connection));
    let connection = handshake.await.map_err(|_| "no handshake in time")?.map_err(|error| format!("TLS: {error}"))?;
    match accepted_peer(connection.get_ref().1).map_err(|refusal| refusal.to_string())? {
        Accepted::Enrolling => {
            let enrolling = tokio::time::timeout(limit, enrol_machine(door, connection));
            enrolling.await.map_err(|_| "enrolment took too long".to_owned())?.map(|()| None)
        }
        Accepted::Agent(agent) => {
            let (refusal, reason) = match admit(door, &agent).await {
                Ok(peer) => match visit.identify(peer.agent) {
                    Ok(()) => return Ok(Some((connection, peer))),
                    Err(reason) => (Refused::new(RefusalCode::Full, reason.to_string()), reason.to_string()),
                },
                Err(reason) => {
                    let text = "the server does not admit this machine: it is not enrolled (any more); enrol it again";
                    (Refused::new(RefusalCode::NotPermitted, text), reason)
                }
            };
            // A peer that is slow to hear it has nothing that is worth waiting for.
            let _ = tokio::time::timeout(limit, turn_away(connection, refusal)).await;
            Err(format!("agent {} of tenant {}: {reason}", agent.identity.agent, agent.identity.tenant))
        }
    }
}

async fn turn_away(mut connection: TlsStream<tokio::net::TcpStream>, refusal: Refused) -> Result<(), LinkError> {
    // Closing a socket with bytes unread would reset it, and the peer might not hear why.
    read_message(&mut connection).await?;
    write_message(&mut connection, &Message::Refused(refusal)).await?;
    Ok(connection.shutdown().await?)
}

async fn admit(door: &Door, agent: &AgentPeer) -> Result<Peer, String> {
    let identity = &agent.identity;
    let enrolled = door.tenancy.is_enrolled(identity.agent, &identity.tenant, &agent.key_hash).await;
    if !enrolled.map_err(|error| error.to_string())? {
        return Err("not enrolled (any more)".into());
    }
    if let Err(error) = door.tenancy.seen(identity.agent, clock::wall_ns()).await {
        tracing::warn!(%error, "when the agent was seen could not be noted");
    }
    Ok(Peer { tenant: identity.tenant.clone(), agent: identity.agent })
}

async fn enrol_machine(door: &Door, mut connection: TlsStream<tokio::net::TcpStream>) -> Result<(), String> {
    let message = read_message(&mut connection).await.map_err(|error| error.to_string())?;
    let Message::Enroll(request) = message else { return Err("expected Enroll".into()) };
    let answer = issue(door, &request).await;
    let outcome = match &answer {
        Message::Refused(refusal) => Err(refusal.message.clone()),
        _ => Ok(()),
    };
    write_message(&mut connection, &answer).await.map_err(|error| error.to_string())?;
    connection.shutdown().await.map_err(|error| error.to_string())?;
    outcome
}

async fn issue(door: &Door, request: &Enroll) -> Message {
    let refused = |text: String| Message::Refused(Refused::new(RefusalCode::NotPermitted, text));
    let Ok(secret) = <[u8; 32]>::try_from(request.secret.as_slice()) else {
        return refused("the enrolment token is malformed".into());
    };
    let secret = EnrolmentSecret(secret);
    let enrolled =
        enrol(&door.tenancy, &door.authority, &secret, &request.label, &request.request, door.agent_validity).await;
    match enrolled {
        Ok(enrolled) => Message::Enrolled(Enrolled {
            tenant: enrolled.identity.tenant,
            agent: enrolled.identity.agent,
            certificate: enrolled.certificate.to_vec().into(),
            authority: enrolled.authority.to_vec().into(),
        }),
        Err(error) => refused(error.to_string()),
    }
}
