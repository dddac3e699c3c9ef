//! What becomes of snapshots after their commit: deleted, brought back, purged, protected, tagged; and by which settings.
//!
//! Every decision is a line in the repository's journal, synced, before it is a change in the catalog; the journal is replayed
//! when the repository is opened, so the two agree after any crash and a catalog that was made anew keeps deleted snapshots
//! deleted. One decision is made at a time. Deleting frees nothing: what is deleted can be brought back until it is purged,
//! and only what is purged is garbage.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::sync::Arc;

use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use strandline_actors::runtime::clock;
use strandline_messages::format::cursor::Decoder;
use strandline_messages::format::keys::{Capability, WriterCertificateV1, snapshot_tags_signed_part};
use strandline_messages::format::repository::RepositoryV1;
use strandline_messages::wire::manage::SnapshotTags;
use strandline_messages::wire::{SnapshotFate, codec};
use strandline_messages::{AgentId, DomainId, SessionId, SnapshotId, limits};

use super::settings::{RepositorySettings, nanoseconds};
use super::state::State;
use super::{EngineError, Lease, Repository, on_own_thread};
use crate::catalog::keeping::{self, DeletionRow, KeptRow};
use crate::failpoint;
use crate::storage::journal::{Journal, Replay};
use crate::storage::{StorageError, files};

/// A decision about a repository's snapshots.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Event {
    Deleted {
        snapshot: Hex,
        at_ns: i64,
        final_ns: i64,
        agent: Hex,
        reason: String,
    },
    Undeleted {
        snapshot: Hex,
        at_ns: i64,
    },
    Purged {
        snapshot: Hex,
        place: u64,
        at_ns: i64,
    },
    Protected {
        snapshot: Hex,
        at_ns: i64,
    },
    Unprotected {
        snapshot: Hex,
        at_ns: i64,
    },
    /// `tags`: an encoded `SnapshotTags`.
    Tagged {
        snapshot: Hex,
        tags: Hex,
        at_ns: i64,
    },
    Settings {
        settings: RepositorySettings,
        at_ns: i64,
    },
}

/// Bytes as hexadecimal text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Hex(pub Vec<u8>);

impl TryFrom<String> for Hex {
    type Error = data_encoding::DecodeError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        data_encoding::HEXLOWER.decode(text.as_bytes()).map(Self)
    }
}

impl From<Hex> for String {
    fn from(bytes: Hex) -> Self {
        data_encoding::HEXLOWER.encode(&bytes.0)
    }
}

impl Hex {
    fn of(snapshot: &SnapshotId) -> Self {
        Self(snapshot.as_bytes().to_vec())
    }
}

/// Who deletes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deleter {
    /// An agent that proved the full capability.
    Agent(AgentId),
    /// The server's policy or its administrator.
    Server,
}

/// A snapshot that a request left as it was, and why, for people.
pub type LeftAlone = (SnapshotId, String);

/// The journal, and which snapshots are being read.
pub(crate) struct Keeping {
    journal: Arc<Mutex<Journal<Event>>>,
    /// One decision at a time; taken before the catalog's turn.
    deciding: tokio::sync::Mutex<()>,
    pins: Mutex<Pins>,
}

/// Which snapshots each session reads, with their writer domains. Bounded by the snapshots there are, for each session that
/// reads.
type Pins = HashMap<SessionId, BTreeMap<SnapshotId, DomainId>>;

/// What the journal says in the end.
#[derive(Debug, Default)]
pub(crate) struct Decided {
    pub snapshots: BTreeMap<SnapshotId, Fate>,
    pub purged: BTreeMap<SnapshotId, (u64, i64)>,
    pub settings: Option<RepositorySettings>,
}

/// What was decided about one snapshot that is not purged.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Fate {
    pub deletion: Option<DeletionRow>,
    pub protected: bool,
    pub tags: Option<Vec<u8>>,
}

impl Keeping {
    /// Opens the journal and reads what it says. A damaged line is an error: it may have deleted or protected something.
    pub fn open(path: &Path) -> Result<(Self, Decided), EngineError> {
        let journal = Journal::open(path).map_err(StorageError::io("open", path))?;
        let replay = journal.replay().map_err(StorageError::io("read", path))?;
        if !replay.damaged.is_empty() {
            return Err(EngineError::JournalDamaged { path: path.to_owned(), lines: replay.damaged });
        }
        let keeping = Self {
            journal: Arc::new(Mutex::new(journal)),
            deciding: tokio::sync::Mutex::default(),
            pins: Mutex::default(),
        };
        Ok((keeping, Decided::of(replay)))
    }

    async fn append(&self, events: Vec<Event>) -> Result<(), EngineError> {
        let journal = Arc::clone(&self.journal);
        on_own_thread(move || {
            let mut journal = journal.lock();
            let path = journal.path().to_owned();
            Ok(journal.append_all(&events).map_err(StorageError::io("write", &path))?)
        })
        .await
    }

    /// The session has ended: it reads nothing any more.
    pub fn unpin(&self, session: &SessionId) {
        self.pins.lock().remove(session);
    }

    fn pinned(&self) -> HashSet<SnapshotId> {
        self.pins.lock().values().flat_map(BTreeMap::keys).copied().collect()
    }
}

impl Decided {
    fn of(replay: Replay<Event>) -> Self {
        let mut decided = Self::default();
        for event in replay.events {
            decided.take(event);
        }
        decided
    }

    fn take(&mut self, event: Event) {
        let snapshot = match &event {
            Event::Deleted { snapshot, .. }
            | Event::Undeleted { snapshot, .. }
            | Event::Purged { snapshot, .. }
            | Event::Protected { snapshot, .. }
            | Event::Unprotected { snapshot, .. }
            | Event::Tagged { snapshot, .. } => SnapshotId::from_slice(&snapshot.0),
            Event::Settings { settings, .. } => {
                self.settings = Some(settings.clone());
                return;
            }
        };
        let Some(snapshot) = snapshot else { return };
        if let Event::Purged { place, at_ns, .. } = event {
            self.snapshots.remove(&snapshot);
            self.purged.insert(snapshot, (place, at_ns));
            return;
        }
        let fate = self.snapshots.entry(snapshot).or_default();
        match event {
            Event::Deleted { at_ns, final_ns, agent, reason, .. } => {
                let agent = AgentId::from_slice(&agent.0).unwrap_or(AgentId([0; 16]));
                fate.deletion = Some(DeletionRow { deleted_ns: at_ns, final_ns, agent, reason });
            }
            Event::Undeleted { .. } => fate.deletion = None,
            Event::Protected { .. } => fate.protected = true,
            Event::Unprotected { .. } => fate.protected = false,
            Event::Tagged { tags, .. } => fate.tags = Some(tags.0),
            Event::Purged { .. } | Event::Settings { .. } => {}
        }
    }
}

/// Brings the catalog in line with the journal, which came first. Purged snapshots lose what a crash left of them.
pub(crate) async fn apply(state: &Arc<State>, decided: Decided) -> Result<(), EngineError> {
    let number = state.number;
    let mut transaction = state.common.catalog.begin().await?;
    if let Some(settings) = &decided.settings {
        keeping::set_settings(&mut transaction, number, settings).await?;
    }
    for (snapshot, (place, at_ns)) in &decided.purged {
        keeping::purge(&mut transaction, number, snapshot, *place, *at_ns).await?;
    }
    for (snapshot, fate) in &decided.snapshots {
        let Some(row) = keeping::kept(&mut transaction, number, snapshot).await? else { continue };
        if row.deletion != fate.deletion {
            keeping::set_deletion(&mut transaction, number, snapshot, fate.deletion.as_ref()).await?;
        }
        if row.protected != fate.protected {
            keeping::set_protected(&mut transaction, number, snapshot, fate.protected).await?;
        }
        if let Some(tags) = &fate.tags {
            keeping::set_tags(&mut transaction, number, snapshot, tags).await?;
        }
    }
    transaction.commit().await.map_err(crate::catalog::sql("apply the journal of snapshots"))?;
    let (state, gone) = (Arc::clone(state), decided.purged.into_keys().collect::<Vec<_>>());
    on_own_thread(move || remove_files(&state, &gone)).await
}

fn remove_files(state: &State, snapshots: &[SnapshotId]) -> Result<(), EngineError> {
    let mut removed = false;
    for snapshot in snapshots {
        for path in [state.paths.manifest(snapshot), state.paths.receipt(snapshot)] {
            match std::fs::remove_file(&path) {
                Ok(()) => {
                    removed = true;
                    failpoint::reached("snapshot/removed");
                }
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => return Err(StorageError::io("remove", &path)(error).into()),
            }
        }
    }
    if removed { Ok(files::sync_directory(&state.paths.snapshots())?) } else { Ok(()) }
}

impl Repository {
    /// How the repository keeps its snapshots.
    pub async fn settings(&self) -> Result<RepositorySettings, EngineError> {
        Ok(self.state.common.catalog.settings(self.state.number).await?)
    }

    /// Replaces the settings.
    pub async fn set_settings(&self, settings: RepositorySettings) -> Result<(), EngineError> {
        let keeping = &self.state.keeping;
        let _one_at_a_time = keeping.deciding.lock().await;
        keeping.append(vec![Event::Settings { settings: settings.clone(), at_ns: clock::wall_ns() }]).await?;
        let mut transaction = self.state.common.catalog.begin().await?;
        keeping::set_settings(&mut transaction, self.state.number, &settings).await?;
        Ok(transaction.commit().await.map_err(crate::catalog::sql("change the settings"))?)
    }

    /// Deletes snapshots. Those that must be kept are returned with the reason; all others are deleted, and can be brought
    /// back for the repository's undelete time.
    pub async fn delete_snapshots(
        &self,
        snapshots: &[SnapshotId],
        by: Deleter,
        reason: &str,
    ) -> Result<Vec<LeftAlone>, EngineError> {
        let settings = self.settings().await?;
        if matches!(by, Deleter::Agent(_)) && !settings.agents_may_delete {
            return Err(EngineError::AgentsMayNotDelete);
        }
        let agent = match by {
            Deleter::Agent(agent) => agent,
            Deleter::Server => AgentId([0; 16]),
        };
        let reason = reason.get(..reason.floor_char_boundary(limits::TEXT_BYTES_MAX)).unwrap_or_default();
        let now_ns = clock::wall_ns();
        let final_ns = now_ns.saturating_add(nanoseconds(settings.undelete));
        let row = DeletionRow { deleted_ns: now_ns, final_ns, agent, reason: reason.to_owned() };
        let obstacle = |kept: &KeptRow| {
            let age_ns = now_ns.saturating_sub(kept.committed_ns);
            if kept.protected {
                Some("it is protected".to_owned())
            } else if age_ns < nanoseconds(settings.min_retention) {
                let whole = humantime::format_duration(settings.min_retention);
                Some(format!("it is younger than the repository's minimum retention of {whole}"))
            } else {
                None
            }
        };
        self.decide(snapshots, |snapshot, kept| match (obstacle(kept), &kept.deletion) {
            (Some(reason), _) => Decision::Leave(reason),
            (None, Some(_)) => Decision::Nothing,
            (None, None) => Decision::Do(
                Event::Deleted {
                    snapshot: Hex::of(snapshot),
                    at_ns: row.deleted_ns,
                    final_ns: row.final_ns,
                    agent: Hex(row.agent.as_bytes().to_vec()),
                    reason: row.reason.clone(),
                },
                Change::Deletion(Some(row.clone())),
            ),
        })
        .await
    }

    /// Brings deleted snapshots back.
    pub async fn undelete_snapshots(&self, snapshots: &[SnapshotId]) -> Result<Vec<LeftAlone>, EngineError> {
        let at_ns = clock::wall_ns();
        self.decide(snapshots, |snapshot, kept| {
            if kept.deletion.is_none() {
                return Decision::Nothing;
            }
            Decision::Do(Event::Undeleted { snapshot: Hex::of(snapshot), at_ns }, Change::Deletion(None))
        })
        .await
    }

    /// Protects snapshots from deletion, or no longer.
    pub async fn protect_snapshots(
        &self,
        snapshots: &[SnapshotId],
        protected: bool,
    ) -> Result<Vec<LeftAlone>, EngineError> {
        let at_ns = clock::wall_ns();
        self.decide(snapshots, |snapshot, kept| {
            let snapshot = Hex::of(snapshot);
            match (kept.deletion.is_some(), kept.protected == protected) {
                (true, _) => Decision::Leave("it is deleted; bring it back first".to_owned()),
                (false, true) => Decision::Nothing,
                (false, false) if protected => {
                    Decision::Do(Event::Protected { snapshot, at_ns }, Change::Protected(true))
                }
                (false, false) => Decision::Do(Event::Unprotected { snapshot, at_ns }, Change::Protected(false)),
            }
        })
        .await
    }

    /// Replaces the tags of a snapshot. They must be signed by a holder of the full capability.
    pub async fn tag_snapshot(&self, tags: &SnapshotTags) -> Result<Vec<LeftAlone>, EngineError> {
        if !genuine(self.file(), tags) {
            return Err(EngineError::BadTags);
        }
        let mut encoded = Vec::new();
        codec::encode("tags", tags, &mut encoded).map_err(|_| EngineError::BadTags)?;
        let at_ns = clock::wall_ns();
        self.decide(&[tags.snapshot], |snapshot, _| {
            let event = Event::Tagged { snapshot: Hex::of(snapshot), tags: Hex(encoded.clone()), at_ns };
            Decision::Do(event, Change::Tags(encoded.clone()))
        })
        .await
    }

    /// Forgets deleted snapshots whose time is over, or all deleted ones (`at_once`), for good; how many. One that is being
    /// read is left for the next time.
    pub(crate) async fn purge(&self, at_once: bool) -> Result<u64, EngineError> {
        let (state, keeping) = (&self.state, &self.state.keeping);
        let now_ns = clock::wall_ns();
        let _one_at_a_time = keeping.deciding.lock().await;
        let pinned = keeping.pinned();
        let mut due = state.common.catalog.purgeable(state.number, now_ns, at_once).await?;
        due.retain(|snapshot| !pinned.contains(snapshot));
        if due.is_empty() {
            return Ok(0);
        }
        let mut transaction = state.common.catalog.begin().await?;
        let mut events = Vec::new();
        for snapshot in &due {
            let Some(kept) = keeping::kept(&mut transaction, state.number, snapshot).await? else { continue };
            events.push(Event::Purged { snapshot: Hex::of(snapshot), place: kept.place, at_ns: now_ns });
            keeping::purge(&mut transaction, state.number, snapshot, kept.place, now_ns).await?;
        }
        keeping.append(events).await?;
        transaction.commit().await.map_err(crate::catalog::sql("purge snapshots"))?;
        let (state, count) = (Arc::clone(state), due.len() as u64);
        on_own_thread(move || remove_files(&state, &due)).await?;
        Ok(count)
    }

    /// The writer domain of a snapshot, in which its chunks are looked for. It is not purged as long as the session lasts.
    pub async fn pin(&self, lease: &Lease, snapshot: SnapshotId) -> Result<DomainId, EngineError> {
        let (state, keeping) = (&self.state, &self.state.keeping);
        let known = |pins: &Pins| pins.get(&lease.session)?.get(&snapshot).copied();
        if let Some(domain) = known(&keeping.pins.lock()) {
            return Ok(domain);
        }
        let _no_purge_meanwhile = keeping.deciding.lock().await;
        let domain = state.common.catalog.snapshot_domain(state.number, &snapshot).await?;
        let domain = domain.ok_or(EngineError::NoSuchSnapshot { snapshot })?;
        keeping.pins.lock().entry(lease.session).or_default().insert(snapshot, domain);
        Ok(domain)
    }

    /// The writer domain of a snapshot.
    pub async fn domain_of(&self, snapshot: SnapshotId) -> Result<DomainId, EngineError> {
        let domain = self.state.common.catalog.snapshot_domain(self.state.number, &snapshot).await?;
        domain.ok_or(EngineError::NoSuchSnapshot { snapshot })
    }

    /// What became of a snapshot.
    pub async fn fate_of(&self, snapshot: &SnapshotId) -> Result<SnapshotFate, EngineError> {
        let (catalog, number) = (&self.state.common.catalog, self.state.number);
        Ok(match catalog.is_deleted(number, snapshot).await? {
            Some(false) => SnapshotFate::Kept,
            Some(true) => SnapshotFate::Deleted,
            None if catalog.is_purged(number, snapshot).await? => SnapshotFate::Purged,
            None => SnapshotFate::Unknown,
        })
    }

    /// Decides about each snapshot, writes the decisions down, and carries them out.
    async fn decide(
        &self,
        snapshots: &[SnapshotId],
        decide: impl Fn(&SnapshotId, &KeptRow) -> Decision,
    ) -> Result<Vec<LeftAlone>, EngineError> {
        let (state, keeping) = (&self.state, &self.state.keeping);
        let _one_at_a_time = keeping.deciding.lock().await;
        let mut transaction = state.common.catalog.begin().await?;
        let (mut left, mut events) = (Vec::new(), Vec::new());
        for snapshot in snapshots {
            let Some(kept) = keeping::kept(&mut transaction, state.number, snapshot).await? else {
                left.push((*snapshot, "there is no such snapshot; it may have been purged".to_owned()));
                continue;
            };
            match decide(snapshot, &kept) {
                Decision::Nothing => {}
                Decision::Leave(reason) => left.push((*snapshot, reason)),
                Decision::Do(event, change) => {
                    events.push(event);
                    match change {
                        Change::Deletion(deletion) => {
                            keeping::set_deletion(&mut transaction, state.number, snapshot, deletion.as_ref()).await?;
                        }
                        Change::Protected(protected) => {
                            keeping::set_protected(&mut transaction, state.number, snapshot, protected).await?;
                        }
                        Change::Tags(tags) => {
                            keeping::set_tags(&mut transaction, state.number, snapshot, &tags).await?;
                        }
                    }
                }
            }
        }
        if !events.is_empty() {
            keeping.append(events).await?;
            transaction.commit().await.map_err(crate::catalog::sql("decide about snapshots"))?;
        }
        Ok(left)
    }
}

enum Decision {
    Nothing,
    Leave(String),
    Do(Event, Change),
}

enum Change {
    Deletion(Option<DeletionRow>),
    Protected(bool),
    Tags(Vec<u8>),
}

/// Whether a holder of the full capability signed these tags.
fn genuine(repository: &RepositoryV1, tags: &SnapshotTags) -> bool {
    let mut decoder = Decoder::new(&tags.writer, "writer certificate");
    let Ok(writer) = WriterCertificateV1::decode(&mut decoder) else { return false };
    let certified = WriterCertificateV1::signed_part(&repository.id, writer.capability, &writer.public_key);
    let signed = snapshot_tags_signed_part(&repository.id, &tags.snapshot, tags.at_ns, &tags.tags);
    let verify = |key: &[u8; 32], message: &[u8], signature: &[u8]| {
        UnparsedPublicKey::new(&ED25519, key).verify(message, signature).is_ok()
    };
    writer.capability == Capability::Full
        && decoder.finish().is_ok()
        && verify(&repository.root_public, &certified, &writer.signature)
        && verify(&writer.public_key, &signed, &tags.signature)
}
