//! A model of what DESIGN section 7 says about known chunks, commits and garbage collection, small enough to be explored
//! completely. Scenario 33.
//!
//! **What is modelled.** A few chunks (`Shape`): in the small shape one tree T that refers to one data chunk C, with room for
//! two copies of each, every copy in a block of its own. Sessions that open, query, send, check, revive, commit, are resumed or
//! expire, and may be frozen between check and commit (a *zombie*, which wakes up after its lease has gone to somebody else).
//! Snapshots that are retained, deleted, undeleted, purged; there may be any number of each, so only *whether there is
//! one* is kept. Readers that pin a snapshot. A garbage collection in interruptible steps: list the snapshots, walk their
//! trees and mark one copy of each needed chunk, enumerate the flags that must fall, condemn what is not marked (in one
//! transaction or several), and then, block by block, `freeing` (one transaction), the journal PACK.state, the punch, the removal;
//! it also moves live blocks and frees the old copies. Damage that is found and withdrawn. Crashes that lose memory
//! (and complete flags that were not synced), loss of the whole catalog, and power cuts that take back a suffix of the catalog's
//! transactions while files (packs, PACK.state, manifests, tombstones) stay.
//!
//! **What is atomic.** Exactly what one transaction or one lock makes atomic in the server: a look at the standing of one tree's
//! references, writing flags, each transaction. Between any two steps anything else may happen.
//!
//! **The rules** of the design are [`Rule`]s, each of which can be removed. With all of them, no reachable state breaks an
//! invariant (`invariants.rs`); without any one of them (but those in [`Rule::REDUNDANT`]), some reachable state does, and the
//! search returns the shortest history that leads there.
//!
//! **Why the numbers stay finite.** Counters are compared for equality with an earlier value only, so a counter is
//! kept as "has it moved since?" in whoever remembers a value: `Session::fresh` for publications, [`Gc`] for commits. Epochs are
//! only compared with each other, so they are renumbered from 1 without gaps, and epochs that nothing tells apart are made
//! one (`canonical.rs`). Copies of a chunk, and sessions, are interchangeable, so they are sorted. A check or a collection
//! that is doomed (its transaction will find that a counter has moved) has no effects any more: it is ended at once.
//!
//! **What is not modelled**: several writer domains (no rule crosses them), chunks that share a block (a block is condemned only if
//! all its chunks are unneeded; here any subset of the unneeded blocks is condemned, which covers blocks kept for the sake
//! of another chunk), and damage that nobody has found (no protocol can see it).

#![expect(clippy::indexing_slicing, reason = "indices are those of the arrays' own shape")]

mod actions;
mod apply;
mod canonical;
mod invariants;
mod search;
mod state;

pub use actions::Action;
pub use search::{Explored, History, explore, walk};
pub use state::{Block, BlockCode, Gc, Session, Stage, State};

use strandline_messages::ChunkKind;

/// A chunk of the model.
#[derive(Clone, Copy, Debug)]
pub struct Chunk {
    /// Its name in histories.
    pub name: &'static str,
    /// Data or tree.
    pub kind: ChunkKind,
    /// Bit set of the chunks that it refers to.
    pub children: u16,
}

/// What there is, and what may happen. `B` blocks, `S` sessions.
#[derive(Clone, Debug)]
pub struct Shape<const B: usize, const S: usize> {
    /// The chunks; children come after their parents.
    pub chunks: &'static [Chunk],
    /// Which chunk each block can hold a copy of; ascending.
    pub copies: [u8; B],
    /// Bit set of the trees that are the roots of snapshots.
    pub roots: u16,
    /// How often damage may be found.
    pub damage: u8,
    /// Whether snapshots are read (and pinned).
    pub readers: bool,
    /// Whether the power may be cut.
    pub power_cuts: bool,
    /// Whether a collection moves blocks, and condemns in several transactions.
    pub long_runs: bool,
    /// Whether blocks that are freed or withdrawn leave at once, as far as no rule that is removed could notice.
    pub drops_at_once: bool,
}

/// The chunks of the small shapes: T refers to C.
pub const ONE_TREE: &[Chunk] = &[
    Chunk { name: "T", kind: ChunkKind::Tree, children: 0b10 },
    Chunk { name: "C", kind: ChunkKind::Data, children: 0 },
];

/// The chunks of the large shape: two roots share a directory and, through it and beside it, data.
pub const TWO_ROOTS: &[Chunk] = &[
    Chunk { name: "R", kind: ChunkKind::Tree, children: 0b01_0100 },
    Chunk { name: "Q", kind: ChunkKind::Tree, children: 0b10_0100 },
    Chunk { name: "D", kind: ChunkKind::Tree, children: 0b01_1000 },
    Chunk { name: "x", kind: ChunkKind::Data, children: 0 },
    Chunk { name: "y", kind: ChunkKind::Data, children: 0 },
    Chunk { name: "z", kind: ChunkKind::Data, children: 0 },
];

impl<const B: usize, const S: usize> Shape<B, S> {
    /// Everything reachable from the chunks of a bit set, itself included.
    pub(crate) fn closure(&self, from: u16) -> u16 {
        let below = |set: u16, (at, chunk): (usize, &Chunk)| if has(set, at) { set | chunk.children } else { set };
        // Children come after their parents: one pass is enough.
        self.chunks.iter().enumerate().fold(from, below)
    }

    /// The trees from which any chunk of a bit set can be reached, those chunks left out.
    pub(crate) fn ancestors(&self, of: u16) -> u16 {
        let above = |set: u16, (at, chunk): (usize, &Chunk)| {
            if chunk.children & (set | of) == 0 { set } else { set | 1 << at }
        };
        self.chunks.iter().enumerate().rev().fold(0, above)
    }

    pub(crate) fn is_tree(&self, chunk: usize) -> bool {
        self.chunks[chunk].kind == ChunkKind::Tree
    }

    pub(crate) fn chunk_of(&self, block: usize) -> usize {
        self.copies[block].into()
    }

    /// The blocks that can hold a copy of a chunk.
    pub(crate) fn copies_of(&self, chunk: usize) -> impl Iterator<Item = usize> + '_ {
        (0..B).filter(move |block| self.chunk_of(*block) == chunk)
    }
}

/// Whether a bit is set.
pub(crate) fn has(set: u16, at: usize) -> bool {
    set >> at & 1 == 1
}

/// The positions of the bits that are set.
pub(crate) fn bits(set: u16) -> impl Iterator<Item = usize> {
    (0..16).filter(move |at| has(set, *at))
}

/// A rule of DESIGN 7.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rule {
    /// A session takes its lease before it is told that anything is known.
    LeaseBeforeAnswers,
    /// Of condemned blocks, only those are known that were condemned while the lease was held.
    KnownUnderLeaseOnly,
    /// A tree is known only if it is flagged complete.
    TreesMustBeComplete,
    /// What is freed is not known.
    FreedIsUnknown,
    /// The commit transaction asserts the lease's fence.
    CommitAssertsFence,
    /// The commit transaction asserts that nothing was published since its check.
    CommitSeesPublications,
    /// A withdrawal is such a publication.
    WithdrawalIsPublished,
    /// What a commit needs and is condemned is made live first.
    CommitRevives,
    /// The condemning transaction fails if a commit came after mark's list.
    CondemnSeesCommits,
    /// It fails, too, if an undelete came after it.
    CondemnSeesUndeletes,
    /// A collection condemns only blocks that were there when it marked.
    CondemnOnlyWhatWasThere,
    /// A condemnation takes the flags of all unmarked trees.
    UnmarkedAreUnflagged,
    /// Also those that were set after they were enumerated.
    LateFlagsFall,
    /// They are gone from the disk before the transaction.
    UnflaggingIsSynced,
    /// `freeing` waits for all leases that were open at the condemnation.
    FreeingWaits,
    /// What is freeing is never revived.
    FreeingIsFinal,
    /// PACK.state is durable before the punch.
    JournalBeforePunch,
    /// After a loss of catalog transactions PACK.state wins over the catalog.
    JournalWins,
    /// Mark walks deleted snapshots that can still be undeleted.
    MarkWalksDeleted,
    /// Mark gives up if it cannot read a tree that is needed.
    MarkNeedsToRead,
    /// What is purged cannot be undeleted.
    PurgeIsFinal,
    /// Mark walks what is being read, purged or not.
    ReadersPin,
    /// Nothing is withdrawn while a collection is under way.
    MaintenanceIsExclusive,
    /// Only a collection that has marked (and revived what it marked) frees what is condemned.
    FreeingFollowsMark,
    /// A live block is freed at once only if there is another live copy of its chunk then.
    ReplacedByLiveOnly,
    /// A withdrawal takes the flags of all ancestors.
    WithdrawalUnflags,
    /// A resumed session keeps the epoch.
    ResumeKeepsEpoch,
    /// Each condemnation moves the epoch on.
    EpochMovesOn,
    /// A walk's flags are written only if nothing was published since it began.
    FlagsNeedNoPublication,
    /// At a start after which catalog transactions may be missing, whatever is merely condemned is live again.
    StartRevives,
}

impl Rule {
    /// Every rule.
    pub const ALL: [Self; 30] = [
        Self::LeaseBeforeAnswers,
        Self::KnownUnderLeaseOnly,
        Self::TreesMustBeComplete,
        Self::FreedIsUnknown,
        Self::CommitAssertsFence,
        Self::CommitSeesPublications,
        Self::WithdrawalIsPublished,
        Self::CommitRevives,
        Self::CondemnSeesCommits,
        Self::CondemnSeesUndeletes,
        Self::CondemnOnlyWhatWasThere,
        Self::UnmarkedAreUnflagged,
        Self::LateFlagsFall,
        Self::UnflaggingIsSynced,
        Self::FreeingWaits,
        Self::FreeingIsFinal,
        Self::JournalBeforePunch,
        Self::JournalWins,
        Self::MarkWalksDeleted,
        Self::MarkNeedsToRead,
        Self::PurgeIsFinal,
        Self::ReadersPin,
        Self::MaintenanceIsExclusive,
        Self::FreeingFollowsMark,
        Self::ReplacedByLiveOnly,
        Self::WithdrawalUnflags,
        Self::ResumeKeepsEpoch,
        Self::EpochMovesOn,
        Self::FlagsNeedNoPublication,
        Self::StartRevives,
    ];

    /// Rules that the others make unnecessary: the model holds without them.
    ///
    /// `CondemnSeesUndeletes`: mark walks a deleted snapshot like a retained one, so an undelete needs nothing that mark has
    /// not marked; and a purged one does not come back. The rule would be needed again the moment mark skipped deleted snapshots.
    pub const REDUNDANT: [Self; 1] = [Self::CondemnSeesUndeletes];
}

/// A shape and the rules that hold in it.
#[derive(Clone, Debug)]
pub struct Model<const B: usize, const S: usize> {
    /// What there is.
    pub shape: Shape<B, S>,
    /// The rule that is removed.
    pub without: Option<Rule>,
}

impl<const B: usize, const S: usize> Model<B, S> {
    pub(crate) fn keeps(&self, rule: Rule) -> bool {
        self.without != Some(rule)
    }
}

/// One tree, one chunk, two copies of each, two sessions.
pub fn small(without: Option<Rule>) -> Model<4, 2> {
    let shape = Shape {
        chunks: ONE_TREE,
        copies: [0, 0, 1, 1],
        roots: 1,
        damage: 1,
        readers: false,
        power_cuts: false,
        long_runs: false,
        drops_at_once: true,
    };
    Model { shape, without }
}

/// One tree, one chunk, one copy of each, one session: with power cuts and readers.
pub fn narrow(without: Option<Rule>) -> Model<2, 1> {
    let shape = Shape {
        chunks: ONE_TREE,
        copies: [0, 1],
        roots: 1,
        damage: 2,
        readers: true,
        power_cuts: true,
        long_runs: true,
        drops_at_once: false,
    };
    Model { shape, without }
}

/// One tree, one chunk, two copies of each, one session: collections that move blocks.
pub fn moving(without: Option<Rule>) -> Model<4, 1> {
    let shape = Shape {
        chunks: ONE_TREE,
        copies: [0, 0, 1, 1],
        roots: 1,
        damage: 1,
        readers: false,
        power_cuts: false,
        long_runs: true,
        drops_at_once: false,
    };
    Model { shape, without }
}

/// Three trees and three chunks, shared, two copies of each, three sessions: for random walks.
pub fn large(without: Option<Rule>) -> Model<12, 3> {
    let shape = Shape {
        chunks: TWO_ROOTS,
        copies: [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5],
        roots: 0b11,
        damage: u8::MAX,
        readers: true,
        power_cuts: true,
        long_runs: true,
        drops_at_once: false,
    };
    Model { shape, without }
}
