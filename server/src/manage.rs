//! Operations on a repository: who may have them carried out, and by whom they are.
//!
//! The certificate of the connection says which tenant asks. What may be done with a repository the writer key says: its
//! certificate comes with the request, and a proof over exactly these operation bytes and this connection's nonce.

use aws_lc_rs::signature::{ED25519, UnparsedPublicKey};
use strandline_messages::format::keys::{Capability, WriterCertificateV1, manage_proof};
use strandline_messages::format::repository::RepositoryV1;
use strandline_messages::mail::Peer;
use strandline_messages::wire::manage::{Manage, Managed, Operation, Outcome};
use strandline_messages::wire::{Message, RefusalCode, Refused};

use crate::engine::{Engine, Repository};
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

/// Refuses what the capability does not include.
fn permitted(operation: &Operation, capability: Capability) -> Result<(), Refused> {
    let allowed = match operation {
        Operation::AddSlot { .. } | Operation::RemoveSlot { .. } => capability == Capability::Full,
        _ => false,
    };
    if allowed {
        Ok(())
    } else {
        Err(Refused::new(RefusalCode::NotPermitted, "the key's capability does not include this; nothing was changed"))
    }
}

async fn carry_out(repository: &Repository, peer: &Peer, operation: Operation) -> Result<Outcome, Refused> {
    match operation {
        Operation::AddSlot { slot } => {
            repository.add_slot(slot.into_vec()).await.map_err(|error| refusal(&error))?;
            tracing::info!(agent = %peer.agent.short(), repository = %repository.file().name, "a key slot was added");
            Ok(Outcome::Done)
        }
        Operation::RemoveSlot { slot } => {
            repository.remove_slot(slot).await.map_err(|error| refusal(&error))?;
            tracing::info!(agent = %peer.agent.short(), repository = %repository.file().name, "a key slot was removed");
            Ok(Outcome::Done)
        }
        _ => Err(Refused::new(RefusalCode::Invalid, "this server does not carry out such operations")),
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::signature::Ed25519KeyPair;
    use strandline_messages::AgentId;

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
