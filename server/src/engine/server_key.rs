//! The server's own key: signs receipts, and nothing else.

use std::path::Path;

use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use strandline_messages::format::receipt::ReceiptV1;
use strandline_messages::{AgentId, RepositoryId, SnapshotId};
use zeroize::Zeroizing;

use super::EngineError;
use crate::storage::files;

const SEED_BYTES: usize = 32;

/// The key pair.
#[derive(Debug)]
pub(crate) struct ServerKey {
    pair: Ed25519KeyPair,
    public: [u8; 32],
}

impl ServerKey {
    /// Reads the seed at `path`; makes one (mode 600) if there is none.
    pub fn load_or_make(path: &Path) -> Result<Self, EngineError> {
        let seed = if let Some(seed) = files::read_small(path, SEED_BYTES)? {
            Zeroizing::new(seed)
        } else {
            let mut seed = Zeroizing::new(vec![0; SEED_BYTES]);
            getrandom::fill(&mut seed).map_err(|error| EngineError::Key { reason: error.to_string() })?;
            files::write_atomically(path, &seed)?;
            seed
        };
        let pair = Ed25519KeyPair::from_seed_unchecked(&seed);
        let pair = pair.map_err(|_| EngineError::Key { reason: format!("{} is not 32 bytes long", path.display()) })?;
        let public = pair.public_key().as_ref().try_into();
        let public = public.map_err(|_| EngineError::Key { reason: "its public half has no 32 bytes".to_owned() })?;
        Ok(Self { pair, public })
    }

    pub fn public(&self) -> [u8; 32] {
        self.public
    }

    /// The server's signed statement about a commit.
    pub fn receipt(
        &self,
        repository: RepositoryId,
        snapshot: SnapshotId,
        order: u64,
        committed_ns: i64,
        agent: AgentId,
    ) -> ReceiptV1 {
        let server_key = self.public;
        let mut receipt =
            ReceiptV1 { repository, snapshot, order, committed_ns, agent, server_key, signature: [0; 64] };
        let signature = self.pair.sign(&receipt.encode_signed_part());
        receipt.signature.iter_mut().zip(signature.as_ref()).for_each(|(slot, byte)| *slot = *byte);
        receipt
    }
}
