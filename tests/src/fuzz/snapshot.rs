//! A snapshot whose tree is whatever somebody wrote: nodes of any bytes, genuinely sealed, as a thief of a writer's key can.

use std::collections::HashMap;
use std::sync::{Arc, LazyLock};

use crossbeam_channel::bounded;
use parking_lot::Mutex;
use strandline_agent::keys::Keyset;
use strandline_agent::seal::{Body, OpenedBlock, Opener, Sealer};
use strandline_agent::trees::{ChunkSource, FetchError, Fetched};
use strandline_messages::format::block::ChunkRow;
use strandline_messages::format::chunk::Reference;
use strandline_messages::{ChunkId, ChunkKind, RepositoryId};

/// Most nodes of one snapshot.
const NODES_MAX: usize = 12;
/// What every node may refer to as content, at positions 0 and 1.
pub(super) const CONTENT: [&[u8]; 2] = [b"data", &[0x5a; 4096]];

struct Vault {
    keyset: Keyset,
    sealer: Sealer,
    opener: Opener,
    content: Vec<(ChunkId, Vec<u8>)>,
}

static VAULT: LazyLock<Vault> = LazyLock::new(|| {
    let fail = |why: &dyn std::fmt::Display| -> ! { panic!("{why}") };
    let keyset = Keyset::create(RepositoryId([3; 16])).unwrap_or_else(|error| fail(&error));
    let mut sealer = Sealer::new(&keyset, 1).unwrap_or_else(|error| fail(&error));
    let content =
        CONTENT.iter().filter_map(|bytes| seal(&mut sealer, &keyset, ChunkKind::Data, bytes, Vec::new())).collect();
    Vault { opener: Opener::new(&keyset), keyset, sealer, content }
});

fn seal(
    sealer: &mut Sealer,
    keyset: &Keyset,
    kind: ChunkKind,
    bytes: &[u8],
    references: Vec<Reference>,
) -> Option<(ChunkId, Vec<u8>)> {
    let id = keyset.chunk_id(kind, bytes, &references);
    let mut body = Body::default();
    body.push(bytes);
    let block = sealer.seal(kind, &[ChunkRow { id, references }], &mut body).ok()?;
    Some((id, block.bytes.to_vec()))
}

/// A snapshot that can be read.
pub(super) struct Snapshot {
    pub(super) root: ChunkId,
    pub(super) source: Arc<Sealed>,
}

/// Its blocks.
pub(super) struct Sealed {
    blocks: HashMap<ChunkId, Vec<u8>>,
    opened: Mutex<HashMap<ChunkId, Arc<OpenedBlock>>>,
}

/// The keys of all these snapshots.
pub(super) fn keyset() -> &'static Keyset {
    &VAULT.keyset
}

impl Snapshot {
    /// From nodes, each `length u16` and so many bytes, at most [`NODES_MAX`]. Every node refers to the two pieces of
    /// [`CONTENT`], then to the nodes before it, the last first. The last node is the root; `None` if there is none.
    pub(super) fn of(mut bytes: &[u8]) -> Option<Self> {
        let vault = &*VAULT;
        let mut sealer = vault.sealer.clone();
        let mut blocks: HashMap<ChunkId, Vec<u8>> = vault.content.iter().cloned().collect();
        let mut nodes: Vec<ChunkId> = Vec::new();
        while let Some((length, rest)) = bytes.split_first_chunk()
            && nodes.len() < NODES_MAX
        {
            let (node, rest) = rest.split_at(usize::from(u16::from_le_bytes(*length)).min(rest.len()));
            let data = vault.content.iter().map(|(id, _)| Reference::data(*id));
            let references = data.chain(nodes.iter().rev().map(|id| Reference::tree(*id))).collect();
            let (id, block) = seal(&mut sealer, &vault.keyset, ChunkKind::Tree, node, references)?;
            blocks.insert(id, block);
            nodes.push(id);
            bytes = rest;
        }
        let source = Sealed { blocks, opened: Mutex::default() };
        Some(Self { root: *nodes.last()?, source: Arc::new(source) })
    }
}

impl ChunkSource for Sealed {
    fn fetch(&self, wanted: Vec<ChunkId>) -> Result<Fetched, FetchError> {
        let (sender, receiver) = bounded(wanted.len() + 1);
        let mut missing = Vec::new();
        let mut opened = self.opened.lock();
        for id in wanted {
            let Some(block) = self.blocks.get(&id) else {
                missing.push(id);
                continue;
            };
            let answer = match opened.get(&id) {
                Some(block) => Ok(Arc::clone(block)),
                None => VAULT.opener.open(block).map(Arc::new).map_err(|reason| FetchError::Damaged {
                    block: id.to_string(),
                    chunks: vec![id],
                    reason,
                }),
            };
            if let Ok(block) = &answer {
                opened.insert(id, Arc::clone(block));
            }
            // There is room for an answer to each.
            let _ = sender.try_send(answer);
        }
        if !missing.is_empty() {
            let _ = sender.try_send(Err(FetchError::Missing { chunks: missing }));
        }
        Ok(receiver)
    }
}
