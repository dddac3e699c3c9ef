//! Scenario 44: what the server knows of one repository it does not tell to another.

use std::sync::Arc;

use anyhow::{Result, bail, ensure};
use strandline_agent::keys::Keyset;
use strandline_messages::format::keys::Capability;
use strandline_messages::wire::{
    CreateRepository, FetchChunks, Message, Purpose, QueryChunks, SessionKind, Tag, join_ids, unpack_bitmap,
};
use strandline_messages::{RepositoryName, SnapshotId};
use strandline_tests::raw::{Heard, Raw, keys_of, papers_of, repository_on_disk};
use strandline_tests::rig::{Agent, Rig, TENANT};

use crate::victim::{Target, Victim, join, open};

/// Whether the server says in a session that it knows the target's chunks.
fn known(rig: &Rig, agent: &Agent, name: &RepositoryName, keys: &Keyset, target: &Target) -> Result<Vec<bool>> {
    let mut control = Raw::greeted(rig.address(), &papers_of(agent, rig.address())?, Purpose::Control)?;
    open(&mut control, SessionKind::Backup, name, keys)?;
    let query = Message::QueryChunks(QueryChunks { ids: join_ids(&target.chunks) });
    match control.ask(Tag(2), &query)? {
        Heard::Message(_, Message::ChunksKnown(known)) => {
            Ok(unpack_bitmap(&known.bitmap, target.chunks.len()).unwrap_or_default())
        }
        other => bail!("no answer: {other:?}"),
    }
}

/// What a restore session is told of the target's chunks: blocks that came, ids without a copy.
fn fetched(rig: &Rig, agent: &Agent, name: &RepositoryName, keys: &Keyset, target: &Target) -> Result<(u32, usize)> {
    let papers = papers_of(agent, rig.address())?;
    let mut control = Raw::greeted(rig.address(), &papers, Purpose::Control)?;
    let opened = open(&mut control, SessionKind::Restore, name, keys)?;
    let mut stream = Raw::greeted(rig.address(), &papers, Purpose::Data)?;
    join(&mut stream, &opened)?;
    let (snapshot, ids) = (SnapshotId([0; 32]), join_ids(&target.chunks));
    match control.ask(Tag(2), &Message::FetchChunks(FetchChunks { request: 1, snapshot, ids }))? {
        Heard::Message(_, Message::FetchDone(done)) => Ok((done.blocks, done.unknown.len() / 32)),
        other => bail!("no answer: {other:?}"),
    }
}

#[test]
fn s44_chunks_are_known_to_their_own_repository_and_to_no_other_of_any_tenant() -> Result<()> {
    let rig = Rig::direct()?;
    let victim = Victim::settle(&rig)?;
    let (target, name) = (&victim.target, &victim.target.repository);
    // The control: whoever may know is told.
    ensure!(known(&rig, &victim.agent, name, &victim.keys, target)? == [true, true]);
    ensure!(fetched(&rig, &victim.agent, name, &victim.keys, target)?.1 == 0);

    rig.administer(&["tenant", "add", "other"])?;
    let token = rig.administer(&["token", "create", "other"])?;
    let stranger = rig.machine("stranger")?.at(&format!("strand://{}/main", rig.address()));
    stranger.run(&["enroll", token.trim()])?.expect_code(0)?;
    stranger.run(&["init"])?.expect_code(0)?;
    let second = rig.enrolled("second")?.at(&format!("strand://{}/second", rig.address()));
    second.run(&["init"])?.expect_code(0)?;
    for (agent, tenant, name) in [(&stranger, "other", "main"), (&second, TENANT, "second")] {
        let (file, slots) = repository_on_disk(rig.data(), tenant, name)?;
        let keys = keys_of(agent, &file, &slots)?;
        ensure!(known(&rig, agent, &file.name, &keys, target)? == [false, false], "{tenant}/{name}");
        ensure!(fetched(&rig, agent, &file.name, &keys, target)? == (0, 2), "{tenant}/{name}");
    }
    // Not even the same keys in another tenant make the other's chunks known.
    let mut control = Raw::greeted(rig.address(), &papers_of(&stranger, rig.address())?, Purpose::Control)?;
    let keys = Arc::clone(&victim.keys);
    let renamed = keys.public_file("copy".parse()?, target.file.chunking, 0);
    let slots = target.slots.iter().map(|slot| slot.clone().into()).collect();
    let create = CreateRepository { file: renamed.encode().into(), slots };
    match control.ask(Tag(1), &Message::CreateRepository(create))? {
        Heard::Message(_, Message::RepositoryCreated) => {
            ensure!(known(&rig, &stranger, &renamed.name, &keys, target)? == [false, false]);
        }
        other => bail!("a tenant cannot make a repository of an id that another tenant has: {other:?}"),
    }
    // In the same repository, writers that need not trust one another.
    let narrow = rig.enrolled("narrow")?;
    let write = victim.keys.narrowed(Capability::Write)?;
    ensure!(known(&rig, &narrow, name, &write, target)? == [false, false]);
    ensure!(known(&rig, &victim.agent, name, &victim.keys, target)? == [true, true]);
    rig.ensure_no_panic()
}
