//! Entering a list in the middle: the leaf that holds a given item, found by the weights of index nodes.
//!
//! Reads only the path to the leaf. Weights are the writer's word; what lies on the path is compared with what is found
//! there, so that a wrong weight is an error and never another item's content.

use strandline_messages::ChunkId;
use strandline_messages::ChunkKind;
use strandline_messages::format::tree::{ListKind, NodeBody};

use super::listing::DirEntry;
use super::reader::{AHEAD_MAX, Node, TreeReader};
use super::{TreeError, list_name};

/// A level-0 node and where it stands in its list. The unit is an entry (directories, errors) or a byte (content).
#[derive(Debug)]
pub struct Leaf {
    /// What stands before it in the list.
    pub start: u64,
    /// `start` and what it holds itself.
    pub end: u64,
    node: Node,
}

/// A part of a list that cannot be read.
#[derive(Debug)]
pub struct UnreadablePart {
    /// The first item of the list behind the part, as far as known.
    pub end: Option<u64>,
    /// Why.
    pub error: TreeError,
}

impl Leaf {
    /// The entries of a directory's leaf; none of any other.
    pub fn entries(self) -> Vec<DirEntry> {
        DirEntry::all_of(self.node).collect()
    }

    /// The pieces of a content leaf: chunk and length in bytes; none of any other.
    pub fn pieces(&self) -> Result<Vec<(ChunkId, u32)>, TreeError> {
        let NodeBody::Content(pieces) = &self.node.node.body else { return Ok(Vec::new()) };
        pieces.iter().map(|piece| Ok((self.node.child(piece.position, ChunkKind::Data)?, piece.bytes))).collect()
    }
}

impl TreeReader {
    /// The leaf that holds item `place` of the list under `top`; `None` behind the end of the list.
    pub fn leaf_at(&self, top: ChunkId, kind: ListKind, place: u64) -> Result<Option<Leaf>, Box<UnreadablePart>> {
        let (mut id, mut start, mut end, mut level_above) = (top, 0, None, u8::MAX);
        let mut ahead = Vec::new();
        loop {
            let unreadable = |error| Box::new(UnreadablePart { end, error });
            let contradiction = |why| unreadable(TreeError::Contradiction { node: id, why });
            let node = self.node(id, &ahead).map_err(unreadable)?;
            if node.node.kind != kind {
                return Err(contradiction(list_name(kind)));
            }
            let weight = weight(&node.node.body).and_then(|weight| weight.checked_add(start));
            let Some(below) = weight.filter(|below| end.is_none_or(|end| end == *below)) else {
                return Err(contradiction("a part of the list is not as long as its index says"));
            };
            if place >= below {
                return Ok(None);
            }
            let NodeBody::Index { level, children } = &node.node.body else {
                return Ok(Some(Leaf { start, end: below, node }));
            };
            if *level >= level_above {
                return Err(contradiction("the levels of a list do not descend"));
            }
            level_above = *level;
            let mut children = children.iter();
            let found = children.by_ref().find(|child| {
                // Cannot overflow: the sum of all weights did not.
                let after = start + child.weight;
                let found = place < after;
                if !found {
                    start = after;
                }
                found
            });
            let Some(child) = found else { return Ok(None) };
            let next = node.index_child(child).map_err(unreadable)?;
            ahead = children.take(AHEAD_MAX).filter_map(|child| node.index_child(child).ok()).collect();
            (id, end) = (next, Some(start + child.weight));
        }
    }
}

/// What a node holds, or says that the nodes below hold; `None` if that is no number.
fn weight(body: &NodeBody) -> Option<u64> {
    match body {
        NodeBody::Directory { entries, .. } => Some(entries.len() as u64),
        NodeBody::Errors(errors) => Some(errors.len() as u64),
        NodeBody::Content(pieces) => Some(pieces.iter().map(|piece| u64::from(piece.bytes)).sum()),
        NodeBody::Index { children, .. } => children.iter().try_fold(0u64, |sum, child| sum.checked_add(child.weight)),
    }
}
