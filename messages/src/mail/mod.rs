//! Messages that actors send to one another inside a process.
//!
//! Commands are imperative, facts are in the past tense. Bulk bytes are `Bytes`: a message never copies a block.

use actix::Message;
use bytes::Bytes;

use crate::durable::Durable;
use crate::ids::{AgentId, Incarnation, Sequence, StreamIndex, TenantName};
use crate::wire::{self, Ack, BlockFrame, Retransmit, SequenceRange};

/// Who is at the other end of a connection: from its certificate alone (G12).
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Peer {
    /// The isolation unit.
    pub tenant: TenantName,
    /// The machine.
    pub agent: AgentId,
}

/// To a stream: send this block. At most a few per stream are under way: the owner waits for [`StreamFact::Written`].
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
pub struct SendBlock(pub BlockFrame);

/// To a stream: tell the peer what is durable. Only the newest is sent if several wait.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
pub struct SendAck(pub Ack);

/// To a stream: send what is queued, then drain and close.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct DrainStream;

/// From a stream to its owner.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
pub struct StreamEvent {
    /// The stream's number in the session.
    pub index: StreamIndex,
    /// Which connection of that number; events of older ones are ignored.
    pub incarnation: Incarnation,
    /// What happened.
    pub fact: StreamFact,
}

/// What happened on a stream.
#[derive(Clone, Debug)]
pub enum StreamFact {
    /// It has joined; blocks may be sent.
    Joined,
    /// A block has been written to the socket (not more than that: see `Acknowledged`).
    Written(Sequence),
    /// The peer says what is durable.
    Acknowledged(Ack),
    /// A block came in (restore).
    Arrived(BlockFrame),
    /// It is lost; its unacknowledged blocks may be sent by others. `Ended` follows.
    Lost {
        /// Why, for people.
        reason: String,
        /// The server's refusal, if that was the reason.
        refusal: Option<wire::Refused>,
    },
    /// Its socket is closed and the actor has stopped.
    Ended {
        /// Whether it had drained.
        clean: bool,
    },
}

/// From a stream to the gap tracker: this block is durable.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct BlockStored(pub Durable<Sequence>);

/// From a stream to its session: storage could not take a block.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
pub struct StoreFailed {
    /// Whether space or quota is exhausted.
    pub full: bool,
    /// Why, for people.
    pub reason: String,
}

/// From the gap tracker to its session: every sequence number below this is durable.
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "()")]
pub struct WatermarkMoved(pub u64);

/// From the gap tracker to its session: these have been missing for longer than the progress deadline.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
pub struct HolesFound(pub Retransmit);

/// To the gap tracker: what is durable?
#[derive(Clone, Copy, Debug, Message)]
#[rtype(result = "DurableState")]
pub struct ReportDurable;

/// Answer to [`ReportDurable`].
#[derive(Clone, Debug, actix::MessageResponse)]
pub struct DurableState {
    /// Every sequence number below it is durable.
    pub watermark: u64,
    /// Durable ranges above it.
    pub ranges: Vec<SequenceRange>,
}

/// From the pipeline to the dispatcher: a sealed block. Their number is bounded by the window's byte budget.
#[derive(Clone, Debug, Message)]
#[rtype(result = "()")]
pub struct DispatchBlock(pub Bytes);
