//! A tenant with something to lose: a repository with a snapshot, and a session that is open while others attack.

use std::sync::Arc;

use anyhow::{Context, Result, bail, ensure};
use rustls::ClientConfig;
use strandline_agent::chunk::default_chunking;
use strandline_agent::keys::{Keyset, SlotSecret, seal_slot};
use strandline_agent::seal::{Body, DataKey, ManifestFields, Sealer, sign_manifest};
use strandline_messages::format::block::ChunkRow;
use strandline_messages::format::chunk::Reference;
use strandline_messages::format::manifest::{DetailsV1, Totals};
use strandline_messages::format::repository::RepositoryV1;
use strandline_messages::wire::{
    Attach, Join, JoinReason, Message, Purpose, QueryChunks, SessionKind, SessionOpened, Tag, join_ids, unpack_bitmap,
};
use strandline_messages::{
    ChunkId, ChunkKind, Incarnation, RepositoryId, RepositoryName, SessionId, SessionToken, SnapshotId, StreamIndex,
};
use strandline_tests::raw::{Heard, Raw, keys_of, papers_of, repository_on_disk};
use strandline_tests::rig::{Agent, Rig, TENANT, random_files};

/// Everything of somebody else's that a message can name.
#[derive(Clone)]
pub struct Target {
    /// The repository's name.
    pub repository: RepositoryName,
    /// Its public file.
    pub file: RepositoryV1,
    /// Its key slots.
    pub slots: Vec<Vec<u8>>,
    /// A session that is open.
    pub session: SessionId,
    /// Its token.
    pub token: SessionToken,
    /// A snapshot.
    pub snapshot: SnapshotId,
    /// Chunks that the server has.
    pub chunks: Vec<ChunkId>,
    /// The snapshot's manifest.
    pub manifest: Vec<u8>,
    /// A good block of the repository.
    pub block: Vec<u8>,
}

impl Target {
    /// The same shape of things, of which nothing exists.
    pub fn made_up() -> Result<Self> {
        let keys = Keyset::create(RepositoryId([0xe1; 16]))?;
        let (block, chunk) = block(&keys)?;
        let repository: RepositoryName = "nain".parse()?;
        let file = keys.public_file(repository.clone(), default_chunking(), 0);
        let slot = seal_slot(&keys, &SlotSecret::KeyFile([0xe6; 32]), "label", 0)?;
        Ok(Self {
            repository,
            slots: vec![slot.encode()],
            session: SessionId([0xe2; 16]),
            token: SessionToken([0xe3; 32]),
            snapshot: SnapshotId([0xe4; 32]),
            chunks: vec![chunk, ChunkId([0xe5; 32])],
            manifest: manifest(&keys, chunk)?,
            block,
            file,
        })
    }

    /// `text` with the names of this target taken out, so that answers about different targets can be compared.
    pub fn anonymous(&self, text: &str) -> String {
        text.replace(&self.snapshot.to_string(), "SNAPSHOT")
            .replace(&self.snapshot.short(), "SNAPSHOT")
            .replace(&self.session.to_string(), "SESSION")
            .replace(&self.file.id.to_string(), "REPOSITORY-ID")
            .replace(&format!("`{}`", self.repository), "`REPOSITORY`")
            .replace(&format!(" {} ", self.repository), " REPOSITORY ")
    }
}

/// See the module.
pub struct Victim {
    /// The machine that owns the repository.
    pub agent: Agent,
    /// Its keys: the attackers that have stolen something have stolen these.
    pub keys: Arc<Keyset>,
    /// What attacks aim at.
    pub target: Target,
    papers: Arc<ClientConfig>,
    incarnation: Incarnation,
}

impl Victim {
    /// A repository with one snapshot, and an open session with one stream.
    pub fn settle(rig: &Rig) -> Result<Self> {
        let agent = rig.owner("victim")?;
        let source = rig.scratch().join("victims-files");
        random_files(&source, 41, 3, 1000)?;
        agent.backup(&source, &[])?;
        let (file, slots) = repository_on_disk(rig.data(), TENANT, "main")?;
        let keys = Arc::new(keys_of(&agent, &file, &slots)?);
        let papers = papers_of(&agent, rig.address())?;
        let mut control = Raw::greeted(rig.address(), &papers, Purpose::Control)?;
        let (snapshot, manifest) = newest_snapshot(&mut control, &file.name)?;
        let opened = open(&mut control, SessionKind::Backup, &file.name, &keys)?;
        let (block, chunk) = block(&keys)?;
        let mut stream = Raw::greeted(rig.address(), &papers, Purpose::Data)?;
        join(&mut stream, &opened)?;
        store(&mut stream, &block)?;
        let root = strandline_messages::format::manifest::ManifestV1::decode(&manifest)?.root;
        let target = Target {
            repository: file.name.clone(),
            slots,
            session: opened.session,
            token: opened.token,
            snapshot,
            chunks: vec![chunk, root],
            manifest,
            block,
            file,
        };
        stream.close();
        control.close();
        Ok(Self { agent, keys, target, papers, incarnation: opened.incarnation })
    }

    /// Its session is there, and lets it in again, and what it stored is known to it.
    pub fn ensure_unharmed(&mut self, rig: &Rig) -> Result<()> {
        let mut control = Raw::greeted(rig.address(), &self.papers, Purpose::Control)?;
        let (session, token) = (self.target.session, self.target.token);
        let attach = Attach { session, token, incarnation: self.incarnation };
        match control.ask(Tag(1), &Message::Attach(attach))? {
            Heard::Message(_, Message::Attached(attached)) if attached.watermark == 1 => {
                self.incarnation = attached.incarnation;
            }
            other => bail!("the victim's session does not let it in: {other:?}"),
        }
        let ids = join_ids(&self.target.chunks);
        match control.ask(Tag(2), &Message::QueryChunks(QueryChunks { ids }))? {
            Heard::Message(_, Message::ChunksKnown(known)) => {
                ensure!(unpack_bitmap(&known.bitmap, 2) == Some(vec![true, true]), "the victim's chunks: {known:?}");
            }
            other => bail!("the victim's session does not answer: {other:?}"),
        }
        control.close();
        ensure!(self.agent.snapshots()? == [self.target.snapshot.to_string()], "the victim's snapshots have changed");
        Ok(())
    }
}

fn newest_snapshot(control: &mut Raw, repository: &RepositoryName) -> Result<(SnapshotId, Vec<u8>)> {
    let request = strandline_messages::wire::ListSnapshots {
        repository: repository.clone(),
        deleted: false,
        after_order: 0,
        limit: 10,
    };
    match control.ask(Tag(50), &Message::ListSnapshots(request))? {
        Heard::Message(_, Message::SnapshotsListed(listed)) => {
            let manifest = listed.snapshots.last().context("no snapshot")?.manifest.to_vec();
            Ok((strandline_messages::format::manifest::snapshot_id(&manifest), manifest))
        }
        other => bail!("no list: {other:?}"),
    }
}

/// Opens a session that must be granted.
pub fn open(control: &mut Raw, kind: SessionKind, repository: &RepositoryName, keys: &Keyset) -> Result<SessionOpened> {
    match control.open(kind, repository, keys)? {
        Message::SessionOpened(opened) => Ok(opened),
        other => bail!("no session: {other:?}"),
    }
}

/// Joins a session with a first stream.
pub fn join(stream: &mut Raw, opened: &SessionOpened) -> Result<()> {
    let join = join_message(opened.session, opened.token);
    match stream.ask(Tag(0), &join)? {
        Heard::Message(_, Message::Joined) => Ok(()),
        other => bail!("not joined: {other:?}"),
    }
}

/// A `Join` with the first stream of a session.
pub fn join_message(session: SessionId, token: SessionToken) -> Message {
    Message::Join(Join {
        session,
        token,
        index: StreamIndex(0),
        incarnation: Incarnation(2),
        reason: JoinReason::First,
    })
}

/// Sends block 0 and waits until it is durable.
pub fn store(stream: &mut Raw, block: &[u8]) -> Result<()> {
    stream.send(&block_frame(0, block))?;
    loop {
        match stream.hear()? {
            Heard::Message(_, Message::Ack(ack)) if ack.watermark == 1 => return Ok(()),
            Heard::Message(_, Message::Ack(_)) => {}
            other => bail!("no acknowledgement: {other:?}"),
        }
    }
}

/// A frame with a block.
pub fn block_frame(sequence: u64, block: &[u8]) -> strandline_messages::wire::Frame {
    let body = [&sequence.to_le_bytes(), block].concat();
    let kind = strandline_messages::wire::message::kinds::BLOCK;
    strandline_messages::wire::Frame { kind, flags: 1, body: body.into() }
}

/// A block with one chunk, sealed by `keys`, and the chunk's id.
pub fn block(keys: &Keyset) -> Result<(Vec<u8>, ChunkId)> {
    let content = b"what a block holds".repeat(10);
    let (references, kind): (Vec<Reference>, _) = (Vec::new(), ChunkKind::Data);
    let id = keys.chunk_id(kind, &content, &references);
    let mut body = Body::default();
    body.push(&content);
    let block = Sealer::new(keys, 3)?.seal(kind, &[ChunkRow { id, references }], &mut body)?;
    Ok((block.bytes.to_vec(), id))
}

/// A manifest of a snapshot whose root is `root`.
pub fn manifest(keys: &Keyset, root: ChunkId) -> Result<Vec<u8>> {
    let fields = ManifestFields {
        root,
        errors: None,
        parent: None,
        started_ns: 1,
        finished_ns: 2,
        job: String::new(),
        host: "host".into(),
        tags: Vec::new(),
        totals: Totals::default(),
    };
    Ok(sign_manifest(keys, &DataKey::generate(keys)?, fields, &DetailsV1::default())?)
}
