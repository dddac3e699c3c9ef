//! Operations on a repository: who may have them carried out, and by whom they are.
//!
//! The certificate of the connection says which tenant asks. What may be done with a repository the writer key says: its
//! certificate comes with the request, and a proof over exactly these operation bytes and this connection's nonce.

use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use strandline_messages::format::keys::{Capability, WriterCertificateV1, manage_proof};
use strandline_messages::format::repository::RepositoryV1;
use strandline_messages::mail::Peer;
use strandline_messages::wire::manage::{
    KeptSnapshot, Manage, Managed, Operation, Outcome, PartlyDeadBlock, split_snapshots,
};
use strandline_messages::wire::{Message, RefusalCode, Refused, join_ids};
use strandline_messages::{AgentId, BlockDigest, ChunkId, limits};

use crate::engine::gc::{GcOptions, PartlyDead};
use crate::engine::keeping::{Deleter, LeftAlone};
use crate::engine::{Engine, EngineError, Repository};
use crate::host::{certified_writer, refusal};

/// Answers the request `Manage`.
pub(crate) async fn manage(
    engine: &Engine,
    peer: &Peer,
    request: &Manage,
    nonce: &[u8; 32],
) -> Result<Message, Refused> {
    let repository = engine.repository(&peer.tenant, &request.repository).await.map_err(|error| refusal(&error))?;
    let manager = verified_manager(repository.file(), request, nonce)?;
    let operation =
        Operation::decode(&request.operation).map_err(|error| Refused::new(RefusalCode::Invalid, error.to_string()))?;
    permitted(&operation, manager.capability)?;
    let outcome = carry_out(&repository, peer, operation).await?;
    Ok(Message::Managed(Managed { outcome }))
}

/// The root key certified the writer, and whoever asks holds the writer's key and means these bytes.
fn verified_manager(
    repository: &RepositoryV1,
    request: &Manage,
    nonce: &[u8; 32],
) -> Result<WriterCertificateV1, Refused> {
    let writer = certified_writer(repository, &request.writer)?;
    UnparsedPublicKey::new(&ED25519, writer.public_key)
        .verify(&manage_proof(nonce, &repository.id, &request.operation), &request.proof)
        .map_err(|_| Refused::new(RefusalCode::NotPermitted, "the proof of the writer key does not verify"))?;
    Ok(writer)
}

/// Refuses what the capability does not include. Who can read may say what is damaged and have blocks verified; all else
/// changes what is kept, and that is for holders of the full capability.
fn permitted(operation: &Operation, capability: Capability) -> Result<(), Refused> {
    let allowed = match operation {
        Operation::Scrub { .. } => capability != Capability::Write,
        Operation::AddSlot { .. }
        | Operation::RemoveSlot { .. }
        | Operation::DeleteSnapshots { .. }
        | Operation::UndeleteSnapshots { .. }
        | Operation::ProtectSnapshots { .. }
        | Operation::TagSnapshot(_)
        | Operation::ReportDamage { .. }
        | Operation::CollectGarbage { .. }
        | Operation::ListPartlyDead { .. }
        | Operation::Supersede { .. } => capability == Capability::Full,
    };
    if allowed {
        Ok(())
    } else {
        Err(Refused::new(RefusalCode::NotPermitted, "the key's capability does not include this; nothing was changed"))
    }
}

async fn carry_out(repository: &Repository, peer: &Peer, operation: Operation) -> Result<Outcome, Refused> {
    let name = repository.file().name.clone();
    let log = |what: &str| tracing::info!(agent = %peer.agent.short(), repository = %name, "{what}");
    match operation {
        Operation::AddSlot { slot } => {
            done(repository.add_slot(slot.into_vec()).await).inspect(|_| log("a key slot was added"))
        }
        Operation::RemoveSlot { slot } => {
            done(repository.remove_slot(slot).await).inspect(|_| log("a key slot was removed"))
        }
        Operation::DeleteSnapshots { snapshots, reason } => {
            let snapshots = split_snapshots(&snapshots);
            log(&format!("asked to delete {} snapshots", snapshots.len()));
            kept(repository.delete_snapshots(&snapshots, Deleter::Agent(peer.agent), &reason).await)
        }
        Operation::UndeleteSnapshots { snapshots } => {
            let snapshots = split_snapshots(&snapshots);
            log(&format!("asked to bring {} snapshots back", snapshots.len()));
            kept(repository.undelete_snapshots(&snapshots).await)
        }
        Operation::ProtectSnapshots { snapshots, protected } => {
            kept(repository.protect_snapshots(&split_snapshots(&snapshots), protected).await)
        }
        Operation::TagSnapshot(tags) => kept(repository.tag_snapshot(&tags).await),
        Operation::ReportDamage { snapshot, blocks } => {
            let domain = repository.domain_of(snapshot).await.map_err(|error| refusal(&error))?;
            log("damage was reported");
            done(repository.report_damage(domain, split_pairs(&blocks)).await)
        }
        Operation::CollectGarbage { purge: true, .. } if !is_embedded(peer) => Err(Refused::new(
            RefusalCode::NotPermitted,
            "only the server's administrator purges what was deleted before its time (`strand-server gc --purge`)",
        )),
        Operation::CollectGarbage { dry_run, purge } => {
            let report = repository.collect_garbage(GcOptions { dry_run, purge }).await;
            report.map(Outcome::Collected).map_err(|error| refusal(&error))
        }
        Operation::Scrub { subset } => {
            let settings = repository.settings().await.map_err(|error| refusal(&error))?;
            // In its own process the whole disk is the caller's.
            let rate = if is_embedded(peer) { 0 } else { settings.scrub_bytes_per_second };
            repository.scrub(subset, rate).await.map(Outcome::Scrubbed).map_err(|error| refusal(&error))
        }
        Operation::ListPartlyDead { skip, limit } => {
            let blocks =
                repository.partly_dead(skip as usize, limit as usize).await.map_err(|error| refusal(&error))?;
            Ok(Outcome::PartlyDead { blocks: within_a_frame(blocks) })
        }
        Operation::Supersede { blocks } => {
            let (pairs, _) = blocks.as_chunks::<8>();
            let place = |pair: &[u8; 8]| {
                let [pack, offset] = [0, 32].map(|shift| u64::from_le_bytes(*pair) >> shift & u64::from(u32::MAX));
                (u32::try_from(pack).unwrap_or_default(), u32::try_from(offset).unwrap_or_default())
            };
            done(repository.supersede(pairs.iter().map(place)).await)
        }
    }
}

/// Whether the caller is the process that the repository's directory belongs to: only an in-process pipe has agent id zero.
fn is_embedded(peer: &Peer) -> bool {
    peer.agent == AgentId([0; 16])
}

fn done<T>(result: Result<T, EngineError>) -> Result<Outcome, Refused> {
    result.map(|_| Outcome::Done).map_err(|error| refusal(&error))
}

fn kept(result: Result<Vec<LeftAlone>, EngineError>) -> Result<Outcome, Refused> {
    let left = result.map_err(|error| refusal(&error))?;
    let kept: Vec<_> = left.into_iter().map(|(snapshot, reason)| KeptSnapshot { snapshot, reason }).collect();
    Ok(if kept.is_empty() { Outcome::Done } else { Outcome::Kept { kept } })
}

fn split_pairs(blocks: &[u8]) -> Vec<(ChunkId, BlockDigest)> {
    let (pairs, _) = blocks.as_chunks::<64>();
    let pair = |pair: &[u8; 64]| {
        let (chunk, digest) = pair.split_at(32);
        Some((ChunkId::from_slice(chunk)?, BlockDigest::from_slice(digest)?))
    };
    pairs.iter().filter_map(pair).collect()
}

/// As many blocks as one answer can hold.
fn within_a_frame(blocks: Vec<(PartlyDead, Vec<ChunkId>)>) -> Vec<PartlyDeadBlock> {
    let mut room = limits::CONTROL_BYTES_MAX - 1024;
    let mut page = Vec::new();
    for (block, needed) in blocks {
        let Some(left) = room.checked_sub(64 + 32 * needed.len()) else { break };
        room = left;
        page.push(PartlyDeadBlock {
            pack: block.pack,
            offset: block.offset,
            bytes: block.bytes,
            chunks: block.chunks.into(),
            domain: block.domain,
            needed: join_ids(&needed),
        });
    }
    page
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::signature::Ed25519KeyPair;

    use super::*;
    use crate::engine::fixture::{REPOSITORY, Writer, open, repository, tenant};

    const NONCE: [u8; 32] = [4; 32];

    /// The operation, signed by the writer whose key is made from `seed`.
    fn request(seed: u8, writer: &Writer, operation: &Operation) -> Manage {
        let operation = operation.encode().unwrap();
        let key = Ed25519KeyPair::from_seed_unchecked(&[seed; 32]).unwrap();
        let proof = key.sign(&manage_proof(&NONCE, &REPOSITORY, &operation)).as_ref().to_vec();
        let mut certificate = Vec::new();
        writer.certificate.encode(&mut certificate);
        Manage {
            repository: "main".parse().unwrap(),
            writer: certificate.into(),
            proof: proof.into(),
            operation: operation.into(),
        }
    }

    async fn asked(engine: &Engine, request: &Manage, nonce: &[u8; 32]) -> RefusalCode {
        let peer = Peer { tenant: tenant(), agent: AgentId([1; 16]) };
        manage(engine, &peer, request, nonce).await.unwrap_err().code
    }

    #[actix_rt::test]
    async fn s41_only_a_full_key_that_proves_itself_for_these_bytes_and_this_connection_manages() {
        let dir = tempfile::tempdir().unwrap();
        let engine = open(dir.path()).await;
        repository(&engine).await;
        let operation = Operation::RemoveSlot { slot: [1; 16] };
        let good = request(2, &Writer::full(), &operation);
        // The slot does not exist, which only those learn who may ask.
        assert_eq!(asked(&engine, &good, &NONCE).await, RefusalCode::Invalid);
        for (seed, capability) in [(5, Capability::Write), (6, Capability::Read)] {
            let narrow = request(seed, &Writer::new(seed, capability), &operation);
            assert_eq!(asked(&engine, &narrow, &NONCE).await, RefusalCode::NotPermitted, "{capability:?}");
            let borrowed = request(seed, &Writer::full(), &operation);
            assert_eq!(asked(&engine, &borrowed, &NONCE).await, RefusalCode::NotPermitted, "another's certificate");
        }
        assert_eq!(asked(&engine, &good, &[5; 32]).await, RefusalCode::NotPermitted, "another connection");
        let other = Operation::RemoveSlot { slot: [2; 16] }.encode().unwrap();
        let swapped = Manage { operation: other.into(), ..good.clone() };
        assert_eq!(asked(&engine, &swapped, &NONCE).await, RefusalCode::NotPermitted, "other bytes");
        let forged = Manage { writer: vec![1; 97].into(), ..good };
        assert_eq!(asked(&engine, &forged, &NONCE).await, RefusalCode::NotPermitted, "no certificate of this root");
    }
}
