//! One agent's connection to one server, remote or embedded: requests, sessions, and their orderly end.

use std::sync::Arc;

use actix::{Actor, Addr, Recipient};
use actix_rt::ArbiterHandle;
use governor::{Quota, RateLimiter};
use strandline_actors::control_channel::{
    AskError, AskProved, AskServer, BeginSession, CloseChannel, ControlChannel, Dispatching, ForgetSession,
    SessionOpener,
};
use strandline_actors::dispatcher::{DispatchCounters, DispatchFailed, Dispatcher};
use strandline_actors::fetcher::Fetcher;
use strandline_actors::machines::reconnect::Policy;
use strandline_actors::machines::stream::StreamLimits;
use strandline_actors::runtime::budget::ByteBudget;
use strandline_actors::runtime::clock;
use strandline_actors::runtime::transport::{Connector, UploadLimit};
use strandline_actors::stream_pool::PoolSettings;
use strandline_messages::format::FormatError;
use strandline_messages::format::receipt::ReceiptV1;
use strandline_messages::format::repository::RepositoryV1;
use strandline_messages::wire::manage::{Deletion, Manage, Operation, Outcome, SnapshotTags};
use strandline_messages::wire::{
    AbortSession, CreateRepository, DescribeRepository, FindSnapshot, KeepingRules, ListSnapshots, Message,
    OpenSession, Renew, SessionKind, SessionOpened, SnapshotFate, StatusReported,
};
use strandline_messages::{RepositoryName, SessionId, SnapshotId, limits};

use crate::keys::{KeyError, Keyset};

/// Why a request to the server came to nothing.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server refused, cannot be reached, or lost the session.
    #[error(transparent)]
    Ask(#[from] AskError),
    /// The server's answer does not fit the request.
    #[error("the server answered with {found} where {expected} was expected: its version may not fit this program")]
    Answer {
        /// What came.
        found: &'static str,
        /// What should have come.
        expected: &'static str,
    },
    /// The server's answer cannot be decoded.
    #[error("{0}; nothing was changed")]
    Format(#[from] FormatError),
    /// The request exceeds a limit of the protocol.
    #[error("{0}; nothing was asked of the server")]
    Request(String),
    /// The key cannot do what is asked.
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// A repository as its server describes it.
#[derive(Clone, Debug)]
pub struct RepositoryInfo {
    /// Its public file.
    pub file: RepositoryV1,
    /// Its key slots, encoded.
    pub slots: Vec<Vec<u8>>,
    /// How it keeps its snapshots.
    pub keeping: KeepingRules,
}

/// One snapshot of a listing.
#[derive(Clone, Debug)]
pub struct SnapshotListing {
    /// Its place in the order of commits.
    pub order: u64,
    /// The signed manifest, encoded.
    pub manifest: Vec<u8>,
    /// The server's receipt.
    pub receipt: ReceiptV1,
    /// Tags that replace those of the manifest; not verified yet.
    pub tags: Option<SnapshotTags>,
    /// Nobody can delete it.
    pub protected: bool,
    /// That it was deleted.
    pub deletion: Option<Deletion>,
}

/// How a session's data is moved.
#[derive(Clone, Debug)]
pub struct SessionSettings {
    /// Most streams.
    pub streams: u16,
    /// Most bytes of sealed blocks that are not acknowledged.
    pub window_bytes: usize,
    /// Most bytes per second sent, over all streams.
    pub limit_upload: Option<u32>,
}

/// See the module. Made on the arbiter where its actors run.
pub struct Client {
    connector: Arc<dyn Connector>,
    control: Addr<ControlChannel>,
    arbiter: ArbiterHandle,
    seed: u64,
}

impl Client {
    /// Begins to connect. Errors come with the first request.
    pub fn start(connector: Arc<dyn Connector>) -> Self {
        let seed = random_seed();
        // A person waits for the first connection; a session that has begun is worth more patience.
        let first = Policy { attempts_max: 3, ..Policy::default() };
        let control = ControlChannel::new(Arc::clone(&connector), first, Policy::default(), seed).start();
        Self { connector, control, arbiter: actix_rt::Arbiter::current(), seed }
    }

    /// Another connection to the same server: one speaks for one session.
    #[must_use]
    pub fn another(&self) -> Self {
        Self::start(Arc::clone(&self.connector))
    }

    /// Where the actors run.
    pub fn arbiter(&self) -> ArbiterHandle {
        self.arbiter.clone()
    }

    /// The control channel.
    pub fn control(&self) -> &Addr<ControlChannel> {
        &self.control
    }

    /// Asks the server.
    pub async fn ask(&self, message: Message) -> Result<Message, AskError> {
        self.control.send(AskServer(message)).await.unwrap_or(Err(AskError::Closed))
    }

    /// A repository's public file and key slots.
    pub async fn describe(&self, repository: &RepositoryName) -> Result<RepositoryInfo, ClientError> {
        let request = DescribeRepository { repository: repository.clone() };
        match self.ask(Message::DescribeRepository(request)).await? {
            Message::RepositoryDescribed(described) => Ok(RepositoryInfo {
                file: RepositoryV1::decode(&described.file)?,
                slots: described.slots.into_iter().map(serde_bytes::ByteBuf::into_vec).collect(),
                keeping: described.keeping,
            }),
            other => Err(unexpected(&other, "RepositoryDescribed")),
        }
    }

    /// Makes a repository.
    pub async fn create(&self, file: &RepositoryV1, slots: &[Vec<u8>]) -> Result<(), ClientError> {
        let slots = slots.iter().map(|slot| slot.clone().into()).collect();
        match self.ask(Message::CreateRepository(CreateRepository { file: file.encode().into(), slots })).await? {
            Message::RepositoryCreated => Ok(()),
            other => Err(unexpected(&other, "RepositoryCreated")),
        }
    }

    /// All snapshots of a repository in the order of their commits; or the deleted ones that can still be brought back.
    pub async fn snapshots(
        &self,
        repository: &RepositoryName,
        deleted: bool,
    ) -> Result<Vec<SnapshotListing>, ClientError> {
        let mut found: Vec<SnapshotListing> = Vec::new();
        loop {
            let after_order = found.last().map_or(0, |last| last.order);
            let limit = u32::try_from(limits::LIST_PAGE_MAX).unwrap_or(u32::MAX);
            let request = ListSnapshots { repository: repository.clone(), deleted, after_order, limit };
            let page = match self.ask(Message::ListSnapshots(request)).await? {
                Message::SnapshotsListed(page) => page.snapshots,
                other => return Err(unexpected(&other, "SnapshotsListed")),
            };
            if page.is_empty() {
                return Ok(found);
            }
            for listed in page {
                found.push(SnapshotListing {
                    order: listed.order,
                    manifest: listed.manifest.into_vec(),
                    receipt: ReceiptV1::decode(&listed.receipt)?,
                    tags: listed.tags,
                    protected: listed.protected,
                    deletion: listed.deletion,
                });
            }
        }
    }

    /// What became of a snapshot.
    pub async fn find_snapshot(
        &self,
        repository: &RepositoryName,
        snapshot: SnapshotId,
    ) -> Result<SnapshotFate, ClientError> {
        let request = FindSnapshot { repository: repository.clone(), snapshot };
        match self.ask(Message::FindSnapshot(request)).await? {
            Message::SnapshotFound(found) => Ok(found.fate),
            other => Err(unexpected(&other, "SnapshotFound")),
        }
    }

    /// Has an operation carried out, proved with the writer key of `keyset` on whatever connection it is asked on.
    pub async fn manage(
        &self,
        repository: &RepositoryName,
        keyset: &Arc<Keyset>,
        operation: &Operation,
    ) -> Result<Outcome, ClientError> {
        let operation = operation.encode().map_err(|error| ClientError::Request(error.to_string()))?;
        // The proof cannot fail later if it can be made now: it needs nothing but the writer key.
        keyset.sign_manage_proof(&[0; 32], &operation)?;
        let (repository, keyset) = (repository.clone(), Arc::clone(keyset));
        let prove = move |nonce: &[u8; 32]| {
            let proof = keyset.sign_manage_proof(nonce, &operation).map(|proof| proof.to_vec()).unwrap_or_default();
            Message::Manage(Manage {
                repository: repository.clone(),
                writer: keyset.encoded_certificate().into(),
                proof: proof.into(),
                operation: operation.clone().into(),
            })
        };
        match self.control.send(AskProved(Arc::new(prove))).await.unwrap_or(Err(AskError::Closed))? {
            Message::Managed(managed) => Ok(managed.outcome),
            other => Err(unexpected(&other, "Managed")),
        }
    }

    /// What the server says of itself.
    pub async fn status(&self) -> Result<StatusReported, ClientError> {
        match self.ask(Message::GetStatus).await? {
            Message::StatusReported(status) => Ok(status),
            other => Err(unexpected(&other, "StatusReported")),
        }
    }

    /// A new client certificate (DER) for the key that made this request (PKCS #10, DER).
    pub async fn renew(&self, request: Vec<u8>) -> Result<Vec<u8>, ClientError> {
        match self.ask(Message::Renew(Renew { request: request.into() })).await? {
            Message::Enrolled(enrolled) => Ok(enrolled.certificate.into_vec()),
            other => Err(unexpected(&other, "Enrolled")),
        }
    }

    /// A dispatcher for a backup session; its blocks take from `budget`.
    pub fn dispatcher(
        &self,
        settings: &SessionSettings,
        budget: ByteBudget,
        counters: Arc<DispatchCounters>,
        job: Recipient<DispatchFailed>,
    ) -> Addr<Dispatcher> {
        Dispatcher::new(self.pool(settings), budget, counters, job).start()
    }

    /// A fetcher for a restore session.
    pub fn fetcher(&self, settings: &SessionSettings) -> Addr<Fetcher> {
        Fetcher::new(self.pool(settings), self.control.clone()).start()
    }

    fn pool(&self, settings: &SessionSettings) -> PoolSettings {
        PoolSettings {
            connector: Arc::clone(&self.connector),
            streams: settings.streams,
            limits: StreamLimits::default(),
            upload: upload_limit(settings.limit_upload),
            arbiters: Vec::new(),
            policy: Policy::default(),
            seed: self.seed,
        }
    }

    /// Opens a session whose news go to `news`.
    pub async fn begin(
        &self,
        kind: SessionKind,
        repository: &RepositoryName,
        keyset: &Arc<Keyset>,
        news: Option<Dispatching>,
    ) -> Result<SessionOpened, ClientError> {
        match kind {
            SessionKind::Backup => keyset.may_write("save snapshots")?,
            SessionKind::Restore => keyset.may_read("open what was saved")?,
            SessionKind::Repack => keyset.may_manage("store blocks again")?,
        }
        // The proof cannot fail later if it can be made now: it needs nothing but the writer key.
        keyset.sign_session_proof(&[0; 32])?;
        let begin = BeginSession { opener: opener(kind, repository.clone(), Arc::clone(keyset)), dispatcher: news };
        Ok(self.control.send(begin).await.unwrap_or(Err(AskError::Closed))?)
    }

    /// Ends the session without a snapshot; an empty reason ends a finished restore in good order.
    pub async fn end_session(&self, reason: &str) {
        // If the server cannot be told, the session expires there.
        let _ = self.ask(Message::AbortSession(AbortSession { reason: reason.to_owned() })).await;
        self.forget_session();
    }

    /// The session is over; its connection need not be kept.
    pub fn forget_session(&self) {
        self.control.do_send(ForgetSession);
    }

    /// Closes the control connection in good order.
    pub async fn close(&self) {
        // A channel that is gone is closed.
        let _ = self.control.send(CloseChannel).await;
    }
}

fn opener(kind: SessionKind, repository: RepositoryName, keyset: Arc<Keyset>) -> SessionOpener {
    Arc::new(move |nonce: &[u8; 32], resume_of: Option<SessionId>| {
        let writer = keyset.encoded_certificate();
        let proof = keyset.sign_session_proof(nonce).map(|proof| proof.to_vec()).unwrap_or_default();
        OpenSession { kind, repository: repository.clone(), resume_of, writer: writer.into(), proof: proof.into() }
    })
}

fn upload_limit(bytes_per_second: Option<u32>) -> UploadLimit {
    let rate = std::num::NonZeroU32::new(bytes_per_second?)?;
    // The burst must hold the largest piece that a stream asks for at once.
    let burst = rate.max(std::num::NonZeroU32::new(64 << 10)?);
    Some(Arc::new(RateLimiter::direct(Quota::per_second(rate).allow_burst(burst))))
}

fn random_seed() -> u64 {
    let mut bytes = [0; 8];
    match getrandom::fill(&mut bytes) {
        Ok(()) => u64::from_le_bytes(bytes),
        // Only jitter depends on it.
        Err(_) => clock::wall().subsec_nanos().into(),
    }
}

fn unexpected(message: &Message, expected: &'static str) -> ClientError {
    ClientError::Answer { found: message.name(), expected }
}
