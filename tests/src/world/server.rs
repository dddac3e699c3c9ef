//! A server process: the shipped actors on an imitated host.

use std::sync::Arc;

use actix::{Actor, Addr};
use strandline_actors::control_host::ControlHost;
use strandline_actors::machines::session::SessionLimits;
use strandline_actors::machines::stream::StreamLimits;
use strandline_actors::ports::Host;
use strandline_actors::runtime::transport::{Connection, accept};
use strandline_actors::session::SessionView;
use strandline_actors::session_registry::{ObserveSessions, SessionRegistry, SessionSettings};
use strandline_actors::stream::{Origin, Stream};
use strandline_messages::mail::Peer;
use strandline_messages::wire::Purpose;
use tokio::sync::Semaphore;

use super::storage::{Disk, SimHost, SimHostRef};

/// Receive budget, bytes: small enough that it is felt.
const RECEIVE_BYTES: usize = 256 << 10;
/// First credit of a restore, bytes: a few blocks, each of which costs 16 KiB at least.
const CREDIT_BYTES: u64 = 80 << 10;

/// One server process.
#[derive(Clone)]
pub struct ServerProcess {
    /// Counted over all that were started.
    pub number: u64,
    host: Arc<SimHost>,
    registry: Addr<SessionRegistry>,
    budget: Arc<Semaphore>,
}

impl ServerProcess {
    /// Starts one.
    pub fn start(number: u64, disk: &Disk, streams_max: u16) -> Self {
        let host = SimHost::new(disk);
        let settings = SessionSettings {
            limits: SessionLimits::default(),
            window_bytes: 64 << 20,
            credit_bytes: CREDIT_BYTES,
            max_streams: streams_max,
            agent_sessions_max: usize::MAX,
            data_addresses: Vec::new(),
        };
        let ports: Arc<dyn Host> = Arc::new(SimHostRef(Arc::clone(&host)));
        let registry = SessionRegistry::new(ports, settings).start();
        Self { number, host, registry, budget: Arc::new(Semaphore::new(RECEIVE_BYTES)) }
    }

    /// Kills it. Whoever kills it resets its connections, too.
    pub fn kill(&self) {
        self.host.kill();
    }

    /// Takes a connection.
    pub async fn serve(self, mut connection: Connection, peer: Peer) {
        let ports: Arc<dyn Host> = Arc::new(SimHostRef(Arc::clone(&self.host)));
        let nonce = ports.random();
        let Ok(hello) = accept(&mut connection, nonce).await else { return };
        match hello.purpose {
            Purpose::Control => {
                ControlHost::start_with(connection, peer, nonce, ports, self.registry);
            }
            Purpose::Data => {
                let registry = self.registry.recipient();
                let origin = Origin::Accepted { connection, peer, registry, budget: self.budget };
                Stream::start_on(None, origin, StreamLimits::default());
            }
        }
    }

    /// The sessions that it has.
    pub async fn sessions(&self) -> Vec<SessionView> {
        self.registry.send(ObserveSessions).await.unwrap_or_default()
    }
}
