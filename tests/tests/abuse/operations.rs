//! Scenarios 41 and 45: every operation on a repository, asked for by those who may not.

use anyhow::{Context, Result, bail, ensure};
use strandline_messages::wire::manage::{Manage, Operation, ScrubSubset, SnapshotTags};
use strandline_messages::wire::{Message, Purpose, RefusalCode, Tag};
use strandline_tests::raw::{Heard, Raw};
use strandline_tests::rig::Rig;

use crate::attackers::{self, Fault};
use crate::victim::{Target, Victim};

/// The operation after this one, from the first to the last: one that is new does not compile until it has its place.
fn next(operation: &Operation, target: &Target) -> Option<Operation> {
    let snapshots = || target.snapshot.as_bytes().to_vec().into();
    Some(match operation {
        Operation::DeleteSnapshots { .. } => Operation::UndeleteSnapshots { snapshots: snapshots() },
        Operation::UndeleteSnapshots { .. } => Operation::ProtectSnapshots { snapshots: snapshots(), protected: false },
        Operation::ProtectSnapshots { .. } => Operation::TagSnapshot(SnapshotTags {
            snapshot: target.snapshot,
            tags: vec!["stolen".into()],
            at_ns: 1,
            writer: vec![0; 97].into(),
            signature: vec![0; 64].into(),
        }),
        Operation::TagSnapshot(_) => Operation::AddSlot { slot: target.slots.first()?.clone().into() },
        Operation::AddSlot { .. } => Operation::RemoveSlot { slot: [1; 16] },
        Operation::RemoveSlot { .. } => {
            let blocks = [target.chunks.first()?.as_bytes().as_slice(), &[0; 32]].concat().into();
            Operation::ReportDamage { snapshot: target.snapshot, blocks }
        }
        Operation::ReportDamage { .. } => Operation::CollectGarbage { dry_run: false, purge: true },
        Operation::CollectGarbage { .. } => Operation::Scrub { subset: ScrubSubset::All },
        Operation::Scrub { .. } => Operation::ListPartlyDead { skip: 0, limit: 10 },
        Operation::ListPartlyDead { .. } => Operation::Supersede { blocks: vec![0; 8].into() },
        Operation::Supersede { .. } => return None,
    })
}

#[test]
fn s41_s45_no_operation_is_carried_out_for_whoever_has_not_the_capability() -> Result<()> {
    let (rig, other) = (Rig::direct()?, Rig::direct()?);
    let mut victim = Victim::settle(&rig)?;
    let target = victim.target.clone();
    let snapshots = target.snapshot.as_bytes().to_vec().into();
    let first = Operation::DeleteSnapshots { snapshots, reason: "because".into() };
    let mut asked = 0;
    for attacker in attackers::all(&rig, &other, &victim)? {
        if !attacker.is_greeted() || attacker.fault == Fault::Colleague {
            continue;
        }
        let mut operation = Some(first.clone());
        while let Some(now) = operation {
            let mut raw = Raw::greeted(rig.address(), &attacker.papers, Purpose::Control)?;
            let encoded = now.encode()?;
            let proof = attacker.keys.sign_manage_proof(&raw.nonce, &encoded)?.to_vec().into();
            let (repository, writer) = (target.repository.clone(), attacker.keys.encoded_certificate().into());
            let manage = Manage { repository, writer, proof, operation: encoded.into() };
            let may = attacker.fault == Fault::ReadOnly && matches!(now, Operation::Scrub { .. });
            match raw.ask(Tag(1), &Message::Manage(manage)).with_context(|| format!("{:?}", attacker.fault))? {
                Heard::Message(_, Message::Refused(refusal)) if !may => {
                    let expected = [RefusalCode::NotPermitted, RefusalCode::NoSuchRepository];
                    ensure!(expected.contains(&refusal.code), "{:?}, {now:?}: {refusal:?}", attacker.fault);
                }
                Heard::Message(_, Message::Managed(_)) if may => {}
                heard => bail!("{:?}, {now:?}: {heard:?}", attacker.fault),
            }
            asked += 1;
            operation = next(&now, &target);
        }
        victim.ensure_unharmed(&rig).with_context(|| format!("after {:?}", attacker.fault))?;
    }
    ensure!(asked >= 6 * 11, "only {asked}");
    rig.ensure_no_panic()
}
