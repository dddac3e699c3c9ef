//! Inode numbers and what they stand for, as long as the kernel knows them.
//!
//! A number is a hash of what the inode is (its parent and name, or the hard link's device and inode within its
//! snapshot), with a key of this mount. So it is the same when the kernel forgets an inode and asks for it again, without
//! anything being remembered; and where two hash to one number, the later one takes the next that is free: no two inodes
//! that the kernel knows share a number.
//!
//! Memory: one record for each inode that the kernel holds. `forget` removes what it no longer holds.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::hash::{BuildHasher, RandomState};

use parking_lot::Mutex;
use strandline_messages::SnapshotId;

use super::node::Node;

/// The root of the mount.
pub(super) const ROOT: u64 = 1;
/// Names shown of a path; deeper ones are cut at the front.
const PATH_NAMES_MAX: usize = 256;

/// What makes an inode the same inode.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Identity {
    /// A name in a directory.
    Name { parent: u64, name: Box<[u8]> },
    /// A snapshot's root under a name that may stand for another snapshot later.
    Snapshot { parent: u64, snapshot: SnapshotId },
    /// A file with several names in the snapshot whose root is inode `root`.
    Link { root: u64, device: u64, inode: u64 },
}

struct Inode {
    identity: Identity,
    /// Where it was found first, for messages.
    parent: u64,
    name: Box<[u8]>,
    node: Node,
    lookups: u64,
}

/// See the module.
pub(super) struct Inodes {
    keys: RandomState,
    known: Mutex<HashMap<u64, Inode>>,
}

impl Inodes {
    /// Knows the root alone.
    pub(super) fn new(root: Node) -> Self {
        let identity = Identity::Name { parent: ROOT, name: Box::default() };
        let root = Inode { identity, parent: ROOT, name: Box::default(), node: root, lookups: 1 };
        Self { keys: RandomState::new(), known: Mutex::new(HashMap::from([(ROOT, root)])) }
    }

    /// The number that `identity` has or would have now.
    pub(super) fn number(&self, identity: &Identity) -> u64 {
        self.place(&self.known.lock(), identity)
    }

    fn place(&self, known: &HashMap<u64, Inode>, identity: &Identity) -> u64 {
        let mut number = self.keys.hash_one(identity);
        // 0 is no inode, 1 the root; all ones, in 32 bits, is what the kernel says for "unknown".
        while number <= ROOT
            || number == u64::from(u32::MAX)
            || known.get(&number).is_some_and(|other| other.identity != *identity)
        {
            number = number.wrapping_add(1);
        }
        number
    }

    /// The kernel is told of an inode once more: its number, and what it stands for (the kernel may know it already).
    pub(super) fn remember(&self, identity: Identity, parent: u64, name: &[u8], node: Node) -> (u64, Node) {
        let mut known = self.known.lock();
        let number = self.place(&known, &identity);
        let inode = match known.entry(number) {
            Entry::Occupied(inode) => inode.into_mut(),
            Entry::Vacant(vacant) => vacant.insert(Inode { identity, parent, name: name.into(), node, lookups: 0 }),
        };
        inode.lookups += 1;
        (number, inode.node.clone())
    }

    pub(super) fn get(&self, number: u64) -> Option<Node> {
        self.known.lock().get(&number).map(|inode| inode.node.clone())
    }

    /// The parent directory's number, as far as known.
    pub(super) fn parent(&self, number: u64) -> u64 {
        self.known.lock().get(&number).map_or(ROOT, |inode| inode.parent)
    }

    /// The kernel has forgotten `lookups` times that it was told of the inode.
    pub(super) fn forget(&self, number: u64, lookups: u64) {
        let mut known = self.known.lock();
        if let Entry::Occupied(mut inode) = known.entry(number)
            && number != ROOT
        {
            inode.get_mut().lookups = inode.get().lookups.saturating_sub(lookups);
            if inode.get().lookups == 0 {
                inode.remove();
            }
        }
    }

    /// The path below the mount point, for messages.
    pub(super) fn path(&self, number: u64) -> Vec<u8> {
        let known = self.known.lock();
        let mut names: Vec<&[u8]> = Vec::new();
        let mut at = number;
        while at != ROOT && names.len() < PATH_NAMES_MAX {
            let Some(inode) = known.get(&at) else {
                names.push(b"...");
                break;
            };
            names.push(&inode.name);
            at = inode.parent;
        }
        names.iter().rev().flat_map(|name| [b"/".as_slice(), name]).collect::<Vec<_>>().concat()
    }

    /// Inodes that the kernel holds.
    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.known.lock().len()
    }
}

#[cfg(test)]
mod tests {
    use super::super::layout::Place;
    use super::*;

    fn node() -> Node {
        Node::Place(Place::Ids)
    }

    fn named(parent: u64, name: &[u8]) -> Identity {
        Identity::Name { parent, name: name.into() }
    }

    #[test]
    fn a_number_survives_being_forgotten_and_the_table_holds_what_the_kernel_holds() {
        let inodes = Inodes::new(node());
        let (first, _) = inodes.remember(named(ROOT, b"a"), ROOT, b"a", node());
        let (again, _) = inodes.remember(named(ROOT, b"a"), ROOT, b"a", node());
        let (below, _) = inodes.remember(named(first, b"b"), first, b"b", node());
        assert_eq!(first, again);
        assert_ne!(first, below);
        assert_eq!(inodes.path(below), b"/a/b");
        assert_eq!(inodes.len(), 3);
        inodes.forget(first, 1);
        assert!(inodes.get(first).is_some());
        inodes.forget(first, 1);
        assert!(inodes.get(first).is_none());
        assert_eq!(inodes.path(below), b"/.../b");
        inodes.forget(below, 1);
        inodes.forget(ROOT, 1);
        assert_eq!(inodes.len(), 1);
        assert_eq!(inodes.remember(named(ROOT, b"a"), ROOT, b"a", node()).0, first);
    }

    #[test]
    fn inodes_that_hash_to_one_number_get_two() {
        let inodes = Inodes::new(node());
        let (first, _) = inodes.remember(named(ROOT, b"a"), ROOT, b"a", node());
        // As if another identity had taken the number before.
        inodes.known.lock().get_mut(&first).unwrap().identity = named(ROOT, b"other");
        let (second, _) = inodes.remember(named(ROOT, b"a"), ROOT, b"a", node());
        assert_eq!(second, first.wrapping_add(1));
        assert_eq!(inodes.remember(named(ROOT, b"a"), ROOT, b"a", node()).0, second);
    }

    #[test]
    fn hard_links_of_one_snapshot_share_a_number() {
        let inodes = Inodes::new(node());
        let link = |root| Identity::Link { root, device: 1, inode: 77 };
        let (one, _) = inodes.remember(link(5), 8, b"one", node());
        let (two, _) = inodes.remember(link(5), 9, b"two", node());
        let (elsewhere, _) = inodes.remember(link(6), 9, b"two", node());
        assert_eq!(one, two);
        assert_ne!(one, elsewhere);
    }
}
