//! A state of the model: the server's catalog, index and files, what agents believe, and what the invariants remember.

use strandline_server::engine::known::{BlockState, CopyState, is_known, is_usable};

use super::{Model, Rule, has};

/// What has become of a block, catalog and files taken together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum BlockCode {
    /// There is none.
    #[default]
    Absent,
    /// Live.
    Live,
    /// Condemned in `Block::epoch`.
    Condemned,
    /// `freeing` in the catalog.
    Freeing,
    /// `freeing`, and PACK.state says so.
    Journalled,
    /// PACK.state says so, and the body is gone.
    Freed,
    /// Damaged, and withdrawn in catalog and PACK.state.
    Withdrawn,
    /// The body is gone, and PACK.state does not say so. Only without [`Rule::JournalBeforePunch`].
    Unjournalled,
    /// Live again although it is being freed. Only without [`Rule::FreeingIsFinal`].
    Doomed,
    /// Live in the catalog, and the body is gone: broken.
    Hollow,
}

impl BlockCode {
    /// Whether the catalog says live.
    pub fn is_live(self) -> bool {
        matches!(self, Self::Live | Self::Doomed | Self::Hollow)
    }

    /// Whether its bytes are there, and nothing is about to take them away.
    pub fn is_readable(self) -> bool {
        matches!(self, Self::Live | Self::Doomed | Self::Condemned)
    }
}

/// A copy of a chunk in its block.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Block {
    /// What has become of it.
    pub code: BlockCode,
    /// Condemned: when.
    pub epoch: u8,
    /// The complete flag as the server sees it.
    pub flagged: bool,
    /// The complete flag as it is on disk.
    pub flagged_on_disk: bool,
    /// For the invariants: the sessions that were open when it was condemned, and still are.
    pub waits_for: u8,
}

/// How far a session's commit has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[repr(u8)]
pub enum Stage {
    /// No commit under way.
    #[default]
    Idle,
    /// The check walks.
    Walking,
    /// The check asks for blocks to be revived.
    Reviving,
    /// The check found everything; the flags are still to be written.
    Flagging,
    /// The commit transaction comes next.
    Checked,
}

/// A session and its agent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Session {
    /// It exists.
    pub open: bool,
    /// The lease's epoch; 0: none.
    pub lease: u8,
    /// The tree that it saves.
    pub root: u8,
    /// Chunks that the agent relies on: it was told that they are known, or its copy was acknowledged. It will not send them
    /// again unless the server says that they are missing.
    pub relies_on: u16,
    /// How far the commit has come.
    pub stage: Stage,
    /// Nothing was published since the check began.
    pub fresh: bool,
    /// Walking: trees that are still to be read.
    pub to_read: u16,
    /// Walking, flagging: blocks whose trees were read.
    pub read: u16,
    /// Walking, reviving: condemned blocks that are needed.
    pub revive: u16,
}

/// How far the garbage collection has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Gc {
    /// None under way.
    #[default]
    Idle,
    /// The snapshots have been listed.
    Listed {
        /// Their roots.
        roots: u16,
    },
    /// Their trees have been walked.
    Walked {
        /// The chunks that are needed.
        needed: u16,
        /// Live blocks that are not marked.
        condemn: u16,
        /// Condemned blocks that are marked.
        revive: u16,
    },
    /// The flags that must fall have been listed; blocks are being condemned.
    Enumerated {
        /// The chunks that are needed.
        needed: u16,
        /// Live blocks that are not marked.
        condemn: u16,
        /// Condemned blocks that are marked.
        revive: u16,
        /// Blocks of unmarked trees that were flagged then.
        flagged: u16,
        /// Blocks flagged since then.
        log: u16,
    },
    /// All that was to be condemned is; blocks are freed and moved.
    Sweeping,
}

/// What of the catalog would be there after a power cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Durable<const B: usize, const S: usize> {
    /// Codes and epochs of the blocks; absent: no row, which means live if the block is in its pack.
    pub blocks: [(BlockCode, u8); B],
    /// Leases; 0: none.
    pub leases: [u8; S],
    /// The epoch.
    pub epoch: u8,
}

/// A state of the model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct State<const B: usize, const S: usize> {
    /// The blocks.
    pub blocks: [Block; B],
    /// The sessions.
    pub sessions: [Session; S],
    /// A node that froze between check and commit and has lost its lease since: 1 + the root that it would commit; 0: none.
    pub zombie: u8,
    /// The epoch that a new lease gets.
    pub epoch: u8,
    /// Roots of retained snapshots.
    pub retained: u16,
    /// Roots of deleted snapshots that can be undeleted.
    pub deleted: u16,
    /// Roots of purged snapshots; kept only without [`Rule::PurgeIsFinal`].
    pub purged: u16,
    /// Roots of snapshots that are being read.
    pub pinned: u16,
    /// For the invariants: chunks whose last copy was withdrawn as damaged, and that were not sent again.
    pub lost: u16,
    /// How often damage may still be found.
    pub damage_left: u8,
    /// The garbage collection.
    pub gc: Gc,
    /// What a power cut would leave.
    pub durable: Durable<B, S>,
}

/// What is wrong with a state or a step.
pub type Violation = &'static str;

/// How a walk sees a chunk (as in the server's completeness check).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Standing {
    /// A copy in a live block makes it known.
    Known,
    /// Only a copy in this condemned block makes it known.
    Condemned(usize),
    /// There is a usable copy of the tree, not flagged.
    Incomplete,
    /// There is no usable copy.
    Unknown,
}

impl<const B: usize, const S: usize> Model<B, S> {
    /// An empty repository.
    pub fn start(&self) -> State<B, S> {
        let durable = Durable { blocks: [(BlockCode::Absent, 0); B], leases: [0; S], epoch: 1 };
        State {
            blocks: [Block::default(); B],
            sessions: [Session::default(); S],
            zombie: 0,
            epoch: 1,
            retained: 0,
            deleted: 0,
            purged: 0,
            pinned: 0,
            lost: 0,
            damage_left: self.shape.damage,
            gc: Gc::Idle,
            durable,
        }
    }

    /// The block as the server's predicate sees it; `None` if its index entries are gone.
    fn seen(&self, block: Block, lease: Option<u64>) -> Option<BlockState> {
        Some(match block.code {
            BlockCode::Absent => return None,
            BlockCode::Live | BlockCode::Doomed | BlockCode::Hollow => BlockState::Live,
            // Without the rule, every condemned block is taken for one of this lease's time.
            BlockCode::Condemned if !self.keeps(Rule::KnownUnderLeaseOnly) && lease.is_some() => {
                BlockState::Condemned { epoch: u64::MAX }
            }
            BlockCode::Condemned => BlockState::Condemned { epoch: block.epoch.into() },
            BlockCode::Freed | BlockCode::Unjournalled if !self.keeps(Rule::FreedIsUnknown) => BlockState::Live,
            BlockCode::Freeing | BlockCode::Journalled => BlockState::Freeing,
            BlockCode::Freed | BlockCode::Unjournalled => BlockState::Freed,
            BlockCode::Withdrawn => BlockState::Withdrawn,
        })
    }

    pub(crate) fn usable(&self, block: Block, lease: Option<u64>) -> bool {
        self.seen(block, lease).is_some_and(|seen| is_usable(seen, lease))
    }

    /// Whether one copy makes its chunk known: the server's own predicate.
    pub(crate) fn known(&self, state: &State<B, S>, at: usize, lease: Option<u64>) -> bool {
        let block = state.blocks[at];
        let kind = self.shape.chunks[self.shape.chunk_of(at)].kind;
        let complete = block.flagged || !self.keeps(Rule::TreesMustBeComplete);
        self.seen(block, lease).is_some_and(|block| is_known(CopyState { kind, complete, block }, lease))
    }

    pub(crate) fn standing(&self, state: &State<B, S>, chunk: usize, lease: Option<u64>) -> Standing {
        let mut standing = Standing::Unknown;
        for at in self.shape.copies_of(chunk) {
            if self.known(state, at, None) {
                return Standing::Known;
            }
            if self.known(state, at, lease) && !matches!(standing, Standing::Condemned(_)) {
                standing = Standing::Condemned(at);
            }
            if standing == Standing::Unknown && self.usable(state.blocks[at], lease) {
                standing = Standing::Incomplete;
            }
        }
        standing
    }

    /// The chunks that have a copy that can be read.
    pub(crate) fn readable(&self, state: &State<B, S>) -> u16 {
        let readable = |at: &usize| state.blocks[*at].code.is_readable();
        (0..B).filter(readable).fold(0, |set, at| set | 1 << self.shape.chunk_of(at))
    }

    /// The chunks that have a copy in a live block.
    pub(crate) fn live(&self, state: &State<B, S>) -> u16 {
        (0..B).filter(|at| state.blocks[*at].code.is_live()).fold(0, |set, at| set | 1 << self.shape.chunk_of(at))
    }
}

impl Session {
    /// The lease as the predicate takes it.
    pub(crate) fn lease(&self) -> Option<u64> {
        (self.lease > 0).then_some(self.lease.into())
    }

    /// Ends a check.
    pub(crate) fn rest(&mut self) {
        (self.stage, self.fresh, self.to_read, self.read, self.revive) = (Stage::Idle, false, 0, 0, 0);
    }

    /// Whether the agent relies on a chunk.
    pub(crate) fn relies(&self, chunk: usize) -> bool {
        has(self.relies_on, chunk)
    }
}
