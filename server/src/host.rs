//! The engine as the actors see it: [`Host`] for control connections, [`SessionStore`] for sessions.

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::Addr;
use arc_swap::ArcSwapOption;
use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use bytes::Bytes;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use strandline_actors::machines::session::Terminal;
use strandline_actors::ports::{BlockPlace, CommitOutcome, Host, Opening, SessionStore, StoreFault};
use strandline_actors::runtime::clock;
use strandline_actors::session_registry::{ObserveSessions, SessionRegistry};
use strandline_messages::format::cursor::Decoder;
use strandline_messages::format::keys::{Capability, WriterCertificateV1, open_session_proof};
use strandline_messages::format::manifest::snapshot_id;
use strandline_messages::format::receipt::ReceiptV1;
use strandline_messages::format::repository::RepositoryV1;
use strandline_messages::identity::{Identity, Role};
use strandline_messages::mail::Peer;
use strandline_messages::wire::codec;
use strandline_messages::wire::manage::Deletion;
use strandline_messages::wire::{
    CreateRepository, DescribeRepository, Enrolled, FindSnapshot, KeepingRules, ListSnapshots, ListedSnapshot, Message,
    OpenSession, RefusalCode, Refused, Renew, RepositoryDescribed, RepositoryStatus, SessionKind, SnapshotFate,
    SnapshotFound, SnapshotsListed, StatusReported,
};
use strandline_messages::{ChunkId, Durable, Sequence, SessionId, SnapshotId, limits};

use crate::catalog::snapshots::SnapshotRow;
use crate::engine::{self, BlockAddress, Engine, EngineError, Lease, Opened, Repository, SessionEnd, StoreError};
use crate::manage::manage;
use crate::pki::Authority;
use crate::tenancy::{Tenancy, renew};

/// See the module.
pub struct EngineHost {
    engine: Arc<Engine>,
    renewer: ArcSwapOption<Renewer>,
    started: Instant,
    registry: ArcSwapOption<Addr<SessionRegistry>>,
}

impl EngineHost {
    /// In front of an open engine.
    pub fn new(engine: Arc<Engine>) -> Self {
        Self { engine, renewer: ArcSwapOption::empty(), started: clock::now(), registry: ArcSwapOption::empty() }
    }

    /// The registry whose sessions a status report lists.
    pub fn observe(&self, registry: Addr<SessionRegistry>) {
        self.registry.store(Some(Arc::new(registry)));
    }

    /// From now on agents may renew their certificates.
    pub fn renew_with(&self, renewer: Renewer) {
        self.renewer.store(Some(Arc::new(renewer)));
    }

    /// When the server was started.
    pub fn started(&self) -> Instant {
        self.started
    }
}

impl Host for EngineHost {
    fn open(
        &self,
        peer: Peer,
        session: SessionId,
        request: OpenSession,
        nonce: [u8; 32],
    ) -> BoxFuture<'static, Result<Opening, Refused>> {
        let engine = Arc::clone(&self.engine);
        async move {
            let repository =
                engine.repository(&peer.tenant, &request.repository).await.map_err(|error| refusal(&error))?;
            let writer = verified_writer(repository.file(), &request, &nonce)?;
            let (domain, resume_of) = (writer.domain(), request.resume_of);
            let opened = match request.kind {
                SessionKind::Restore => repository.open_reading_session(session, peer.agent, domain, resume_of).await,
                SessionKind::Backup | SessionKind::Repack => {
                    repository.open_session(session, peer.agent, domain, resume_of).await
                }
            };
            let opened = opened.map_err(|error| refusal(&error))?;
            match opened {
                Opened::Fresh(lease) => {
                    Ok(Opening::Granted { store: Arc::new(LeasedRepository { repository, lease, kind: request.kind }) })
                }
                Opened::AlreadyCommitted { receipt } => {
                    let snapshot = ReceiptV1::decode(&receipt)
                        .map_err(|error| Refused::new(RefusalCode::Internal, error.to_string()))?
                        .snapshot;
                    Ok(Opening::AlreadyCommitted { snapshot, receipt })
                }
            }
        }
        .boxed()
    }

    fn answer(&self, peer: Peer, request: Message, nonce: [u8; 32]) -> BoxFuture<'static, Result<Message, Refused>> {
        let engine = Arc::clone(&self.engine);
        let renewer = self.renewer.load_full();
        let status = StatusQuestion { started: self.started, registry: self.registry.load_full() };
        async move {
            match request {
                Message::DescribeRepository(request) => describe(&engine, &peer, &request).await,
                Message::CreateRepository(request) => create(&engine, &peer, request).await,
                Message::ListSnapshots(request) => list(&engine, &peer, &request).await,
                Message::FindSnapshot(request) => find(&engine, &peer, &request).await,
                Message::Manage(request) => manage(&engine, &peer, &request, &nonce).await,
                Message::GetStatus => status.answer(&engine, &peer).await,
                Message::Renew(request) => match renewer {
                    Some(renewer) => renewer.renew(peer, &request).await,
                    None => Err(Refused::new(RefusalCode::Invalid, "there are no certificates here")),
                },
                other => Err(Refused::new(
                    RefusalCode::Invalid,
                    format!("{} is not a request on a control connection", other.name()),
                )),
            }
        }
        .boxed()
    }

    fn random(&self) -> [u8; 32] {
        let mut bytes = [0; 32];
        // A system without random numbers cannot make TLS connections either; a zero token would never be unique, so the
        // second session with it is refused by the catalog.
        let _ = getrandom::fill(&mut bytes);
        bytes
    }
}

/// Renews agents' certificates.
pub struct Renewer {
    /// Who is enrolled.
    pub tenancy: Tenancy,
    /// Issues certificates.
    pub authority: Arc<Authority>,
    /// How long an agent's certificate lasts.
    pub validity: Duration,
}

impl Renewer {
    async fn renew(&self, peer: Peer, request: &Renew) -> Result<Message, Refused> {
        let identity = Identity { tenant: peer.tenant, agent: peer.agent, role: Role::Agent };
        let renewed = renew(&self.tenancy, &self.authority, identity, &request.request, self.validity).await;
        let renewed = renewed.map_err(|error| Refused::new(RefusalCode::NotPermitted, error.to_string()))?;
        Ok(Message::Enrolled(Enrolled {
            tenant: renewed.identity.tenant,
            agent: renewed.identity.agent,
            certificate: renewed.certificate.to_vec().into(),
            authority: renewed.authority.to_vec().into(),
        }))
    }
}

async fn describe(engine: &Engine, peer: &Peer, request: &DescribeRepository) -> Result<Message, Refused> {
    let repository = engine.repository(&peer.tenant, &request.repository).await.map_err(|error| refusal(&error))?;
    let slots = repository.slots().await.map_err(|error| refusal(&error))?;
    let settings = repository.settings().await.map_err(|error| refusal(&error))?;
    Ok(Message::RepositoryDescribed(RepositoryDescribed {
        file: repository.file().encode().into(),
        slots: slots.into_iter().map(Into::into).collect(),
        keeping: KeepingRules {
            undelete_s: settings.undelete.as_secs(),
            min_retention_s: settings.min_retention.as_secs(),
            agents_may_delete: settings.agents_may_delete,
        },
    }))
}

async fn create(engine: &Engine, peer: &Peer, request: CreateRepository) -> Result<Message, Refused> {
    let file =
        RepositoryV1::decode(&request.file).map_err(|error| Refused::new(RefusalCode::Invalid, error.to_string()))?;
    if request.slots.is_empty() {
        return Err(Refused::new(RefusalCode::Invalid, "a repository needs a key slot: nobody could read it"));
    }
    let slots = request.slots.into_iter().map(serde_bytes::ByteBuf::into_vec).collect();
    engine.create_repository(&peer.tenant, file, slots).await.map_err(|error| refusal(&error))?;
    Ok(Message::RepositoryCreated)
}

async fn list(engine: &Engine, peer: &Peer, request: &ListSnapshots) -> Result<Message, Refused> {
    let repository = engine.repository(&peer.tenant, &request.repository).await.map_err(|error| refusal(&error))?;
    let limit = (request.limit as usize).clamp(1, limits::LIST_PAGE_MAX);
    let found = if request.deleted {
        repository.deleted_snapshots(request.after_order, limit).await
    } else {
        repository.snapshots(request.after_order, limit).await
    };
    let found = found.map_err(|error| refusal(&error))?;
    let mut room = limits::CONTROL_BYTES_MAX - 1024;
    let mut snapshots = Vec::with_capacity(found.len());
    for row in found {
        // A page is cut where its frame is full; the next request begins after its last.
        let texts = row.tags.as_ref().map_or(0, Vec::len) + row.deletion.as_ref().map_or(0, |row| row.reason.len());
        let size = row.manifest.len() + row.receipt.len() + texts + 256;
        let Some(left) = room.checked_sub(size) else { break };
        room = left;
        snapshots.push(listed(row));
    }
    Ok(Message::SnapshotsListed(SnapshotsListed { snapshots }))
}

async fn find(engine: &Engine, peer: &Peer, request: &FindSnapshot) -> Result<Message, Refused> {
    let repository = engine.repository(&peer.tenant, &request.repository).await.map_err(|error| refusal(&error))?;
    let fate = repository.fate_of(&request.snapshot).await.map_err(|error| refusal(&error))?;
    if fate == SnapshotFate::Unknown {
        let (tenant, agent, snapshot) = (&peer.tenant, peer.agent.short(), request.snapshot.short());
        tracing::warn!(%tenant, %agent, snapshot, "an agent looks for a snapshot that never was here: an older state of the server?");
    }
    Ok(Message::SnapshotFound(SnapshotFound { fate }))
}

fn listed(row: SnapshotRow) -> ListedSnapshot {
    let deletion = row.deletion.map(|deletion| Deletion {
        deleted_ns: deletion.deleted_ns,
        final_ns: deletion.final_ns,
        agent: deletion.agent,
        reason: deletion.reason,
    });
    ListedSnapshot {
        order: row.place,
        manifest: row.manifest.into(),
        receipt: row.receipt.into(),
        // They were encoded here; what cannot be decoded is as good as none: the manifest's tags count.
        tags: row.tags.and_then(|tags| codec::decode("tags", &tags).ok()),
        protected: row.protected,
        deletion,
    }
}

struct StatusQuestion {
    started: Instant,
    registry: Option<Arc<Addr<SessionRegistry>>>,
}

impl StatusQuestion {
    async fn answer(&self, engine: &Engine, peer: &Peer) -> Result<Message, Refused> {
        let mut repositories = Vec::new();
        let files = engine.repositories(&peer.tenant).await.map_err(|error| refusal(&error))?;
        for file in files.into_iter().take(limits::STATUS_ROWS_MAX) {
            let repository = engine.repository(&peer.tenant, &file.name).await.map_err(|error| refusal(&error))?;
            let totals = repository.totals().await.map_err(|error| refusal(&error))?;
            repositories.push(RepositoryStatus {
                name: file.name,
                snapshots: totals.snapshots,
                deleted: totals.deleted,
                stored_bytes: totals.stored_bytes,
                condemned_blocks: totals.condemned,
                blocks: totals.blocks,
                chunks: totals.chunks,
                damaged_blocks: totals.damaged,
            });
        }
        let seen = match &self.registry {
            Some(registry) => registry.send(ObserveSessions).await.unwrap_or_default(),
            None => Vec::new(),
        };
        let sessions = seen.into_iter().filter(|view| view.peer.tenant == peer.tenant).map(|view| view.status);
        Ok(Message::StatusReported(StatusReported {
            software: concat!("strandline ", env!("CARGO_PKG_VERSION")).to_owned(),
            tenant: peer.tenant.clone(),
            agent: peer.agent,
            uptime_seconds: clock::now().saturating_duration_since(self.started).as_secs(),
            free_bytes: engine.free_bytes().await,
            repositories,
            sessions: sessions.take(limits::STATUS_ROWS_MAX).collect(),
        }))
    }
}

/// The root key certified the writer, and whoever asks holds the writer's key.
fn verified_writer(
    repository: &RepositoryV1,
    request: &OpenSession,
    nonce: &[u8; 32],
) -> Result<WriterCertificateV1, Refused> {
    let denied = |why: &str| Refused::new(RefusalCode::NotPermitted, why);
    let writer = certified_writer(repository, &request.writer)?;
    UnparsedPublicKey::new(&ED25519, writer.public_key)
        .verify(&open_session_proof(nonce, &repository.id), &request.proof)
        .map_err(|_| denied("the proof of the writer key does not verify"))?;
    let allowed = match request.kind {
        SessionKind::Backup => writer.capability != Capability::Read,
        SessionKind::Restore => writer.capability != Capability::Write,
        SessionKind::Repack => writer.capability == Capability::Full,
    };
    if allowed { Ok(writer) } else { Err(denied("the key's capability does not include this")) }
}

/// A writer that the repository's root key certified. Whoever shows the certificate need not hold its key: see the callers.
pub(crate) fn certified_writer(repository: &RepositoryV1, certificate: &[u8]) -> Result<WriterCertificateV1, Refused> {
    let denied = |why: &str| Refused::new(RefusalCode::NotPermitted, why);
    let mut decoder = Decoder::new(certificate, "writer certificate");
    let writer = WriterCertificateV1::decode(&mut decoder)
        .and_then(|writer| decoder.finish().map(|()| writer))
        .map_err(|error| denied(&error.to_string()))?;
    let signed = WriterCertificateV1::signed_part(&repository.id, writer.capability, &writer.public_key);
    UnparsedPublicKey::new(&ED25519, repository.root_public).verify(&signed, &writer.signature).map_err(|_| {
        denied("the key belongs to another repository: its certificate is not signed by this one's root")
    })?;
    Ok(writer)
}

pub(crate) fn refusal(error: &EngineError) -> Refused {
    let code = match error {
        EngineError::NoSuchRepository { .. } => RefusalCode::NoSuchRepository,
        EngineError::AlreadyExists { .. } => RefusalCode::RepositoryExists,
        EngineError::Fenced { .. } => RefusalCode::Superseded,
        EngineError::AgentsMayNotDelete => RefusalCode::NotPermitted,
        EngineError::Stopping => RefusalCode::Stopping,
        EngineError::NoSuchSnapshot { .. }
        | EngineError::BadTags
        | EngineError::BadSlot { .. }
        | EngineError::SlotNotAdded { .. }
        | EngineError::NoSuchSlot { .. }
        | EngineError::LastSlot { .. }
        | EngineError::SessionExists { .. } => RefusalCode::Invalid,
        _ => RefusalCode::Internal,
    };
    if code == RefusalCode::Internal {
        tracing::error!(%error, "a request failed");
    }
    Refused::new(code, error.to_string())
}

/// A repository behind one session's lease.
struct LeasedRepository {
    repository: Arc<Repository>,
    lease: Lease,
    kind: SessionKind,
}

fn fault(error: &EngineError) -> StoreFault {
    if error.is_full() { StoreFault::Full(error.to_string()) } else { StoreFault::Failed(error.to_string()) }
}

impl SessionStore for LeasedRepository {
    fn known(&self, ids: Vec<ChunkId>) -> BoxFuture<'static, Result<Vec<bool>, StoreFault>> {
        let (repository, lease) = (Arc::clone(&self.repository), self.lease.clone());
        async move { repository.known(&lease, ids).await.map_err(|error| fault(&error)) }.boxed()
    }

    fn store(&self, sequence: Sequence, block: Bytes) -> BoxFuture<'static, Result<Durable<Sequence>, StoreFault>> {
        let (repository, lease) = (Arc::clone(&self.repository), self.lease.clone());
        let again = self.kind == SessionKind::Repack;
        async move {
            let stored = if again {
                repository.store_again(&lease, sequence, block).await
            } else {
                repository.store(&lease, sequence, block).await
            };
            stored.map_err(|error| match error {
                StoreError::Refused(_) | StoreError::Foreign { .. } => StoreFault::BadBlock(error.to_string()),
                StoreError::Full { .. } => StoreFault::Full(error.to_string()),
                other => StoreFault::Failed(other.to_string()),
            })
        }
        .boxed()
    }

    fn commit(&self, manifest: Bytes) -> BoxFuture<'static, Result<CommitOutcome, StoreFault>> {
        let (repository, lease) = (Arc::clone(&self.repository), self.lease.clone());
        async move {
            match repository.commit(&lease, manifest.clone()).await {
                Ok(engine::CommitOutcome::Committed { snapshot, receipt }) => {
                    debug_assert_eq!(snapshot, snapshot_id(&manifest));
                    Ok(CommitOutcome::Committed { snapshot, receipt })
                }
                Ok(engine::CommitOutcome::Missing { ids, more }) => Ok(CommitOutcome::Missing { ids, more }),
                Ok(engine::CommitOutcome::Refused { reason }) => Ok(CommitOutcome::Refused { reason }),
                Err(error) => Err(fault(&error)),
            }
        }
        .boxed()
    }

    fn end(&self, terminal: Terminal, reason: String) -> BoxFuture<'static, Result<(), StoreFault>> {
        let (repository, lease) = (Arc::clone(&self.repository), self.lease.clone());
        let end = match terminal {
            Terminal::Committed => SessionEnd::Finished,
            Terminal::Failed => SessionEnd::Failed,
            Terminal::Aborted => SessionEnd::Aborted,
            Terminal::Expired => SessionEnd::Expired,
        };
        async move { repository.end_session(&lease, end, &reason).await.map_err(|error| fault(&error)) }.boxed()
    }

    fn locate(
        &self,
        snapshot: Option<SnapshotId>,
        ids: Vec<ChunkId>,
    ) -> BoxFuture<'static, Result<Vec<Option<BlockPlace>>, StoreFault>> {
        let (repository, lease) = (Arc::clone(&self.repository), self.lease.clone());
        async move {
            let domain = match snapshot {
                None => lease.domain,
                Some(snapshot) => repository.pin(&lease, snapshot).await.map_err(|error| fault(&error))?,
            };
            let found = repository.locate(domain, &ids).await.map_err(|error| fault(&error))?;
            let place =
                |address: BlockAddress| BlockPlace { pack: address.pack, offset: address.offset, bytes: address.bytes };
            Ok(found.into_iter().map(|address| address.map(place)).collect())
        }
        .boxed()
    }

    fn read(&self, place: BlockPlace) -> BoxFuture<'static, Result<Bytes, StoreFault>> {
        let repository = Arc::clone(&self.repository);
        let address = BlockAddress { pack: place.pack, offset: place.offset, bytes: place.bytes, position: 0 };
        async move { repository.read_block(address).await.map_err(|error| fault(&error)) }.boxed()
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::signature::Ed25519KeyPair;

    use super::*;
    use crate::engine::fixture::{REPOSITORY, Writer, repository_file};

    #[test]
    fn s45_a_session_is_opened_for_what_the_certificate_says_and_for_the_holder_of_its_key() {
        let file = repository_file("main");
        let open = |kind, writer: &Writer, seed: u8, nonce: u8| {
            let key = Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap();
            let proof = key.sign(&open_session_proof(&[nonce; 32], &REPOSITORY)).as_ref().to_vec();
            let mut certificate = Vec::new();
            writer.certificate.encode(&mut certificate);
            let (writer, proof) = (certificate.into(), proof.into());
            let request = OpenSession { kind, repository: file.name.clone(), resume_of: None, writer, proof };
            verified_writer(&file, &request, &[4; 32])
        };
        let table = [
            (Capability::Full, [true, true, true]),
            (Capability::Write, [true, false, false]),
            (Capability::Read, [false, true, false]),
        ];
        for (seed, (capability, allowed)) in (10..).zip(table) {
            let writer = Writer::new(seed, capability);
            for (kind, allowed) in
                [SessionKind::Backup, SessionKind::Restore, SessionKind::Repack].into_iter().zip(allowed)
            {
                let opened = open(kind, &writer, seed, 4);
                assert_eq!(opened.is_ok(), allowed, "{capability:?} {kind:?}");
                if let Err(refused) = opened {
                    assert_eq!(refused.code, RefusalCode::NotPermitted);
                }
                assert!(open(kind, &writer, seed + 1, 4).is_err(), "another's key");
                assert!(open(kind, &writer, seed, 5).is_err(), "another connection");
            }
        }
    }
}
