//! The streams of one session as the agent keeps them: which are live, which connect, which wait before trying again.
//!
//! Not an actor: the dispatcher and the fetcher each own one. Events of superseded connections are ignored by their
//! incarnation (s08); every stream has a budget per incident (s12); nothing reconnects unless its owner has work for it.

use std::sync::Arc;
use std::time::{Duration, Instant};

use actix::{Addr, Recipient};
use actix_rt::ArbiterHandle;
use strandline_messages::mail::{DrainStream, SendBlock, StreamEvent, StreamFact};
use strandline_messages::wire::{Join, JoinReason, RefusalCode, Refused, SessionOpened};
use strandline_messages::{Incarnation, SessionId, SessionToken, StreamIndex};

use crate::machines::reconnect::{Next, Policy, Reconnect};
use crate::machines::stream::StreamLimits;
use crate::planted::{self, Bug};
use crate::runtime::transport::{Connector, UploadLimit};
use crate::stream::{Origin, Stream};

/// Blocks given to a stream and not yet written: one on the wire, one behind it.
const BLOCKS_AHEAD: usize = 2;

/// What streams join with. Can only be made from `SessionOpened` (G3).
#[derive(Clone, Debug)]
pub struct SessionGrant {
    session: SessionId,
    token: SessionToken,
    addresses: Vec<String>,
    max_streams: u16,
}

impl From<&SessionOpened> for SessionGrant {
    fn from(opened: &SessionOpened) -> Self {
        Self {
            session: opened.session,
            token: opened.token,
            addresses: opened.data_addresses.clone(),
            max_streams: opened.max_streams,
        }
    }
}

/// How a pool makes its streams.
#[derive(Clone)]
pub struct PoolSettings {
    /// Makes the connections.
    pub connector: Arc<dyn Connector>,
    /// How many streams (the session may allow fewer).
    pub streams: u16,
    /// Time limits of a stream.
    pub limits: StreamLimits,
    /// Upload limit shared by all streams.
    pub upload: UploadLimit,
    /// Where stream actors run, in turn; empty: on the owner's arbiter.
    pub arbiters: Vec<ArbiterHandle>,
    /// When to try again.
    pub policy: Policy,
    /// Decides the jitter.
    pub seed: u64,
}

enum Place {
    /// Nothing there, and nothing planned.
    Empty,
    /// A connection is being made, or the join is under way.
    Joining(Addr<Stream>),
    /// Blocks may be sent.
    Live(Addr<Stream>),
    /// Lost or drained; its actor is closing the socket.
    Ending,
    /// Tries again at this moment.
    Waiting(Instant),
}

struct Slot {
    place: Place,
    incarnation: Incarnation,
    ahead: usize,
    reconnect: Reconnect,
    retry_at: Option<Instant>,
}

/// What an event means for the owner.
#[derive(Debug, PartialEq, Eq)]
pub enum Reaction {
    /// An old connection's event, or nothing to do.
    Nothing,
    /// The stream can take blocks.
    Ready(StreamIndex),
    /// What the stream carried is free for others.
    Lost(StreamIndex, String),
    /// The stream's budget for this incident is used up.
    GaveUp(String),
    /// Its socket is closed.
    Closed,
}

/// See the module.
pub struct StreamPool {
    settings: PoolSettings,
    grant: Option<SessionGrant>,
    slots: Vec<Slot>,
    draining: bool,
    joined_ever: u64,
    reconnects: u64,
}

impl StreamPool {
    /// No session yet.
    pub fn new(settings: PoolSettings) -> Self {
        Self { settings, grant: None, slots: Vec::new(), draining: false, joined_ever: 0, reconnects: 0 }
    }

    /// The streams belong to this session from now on; those of an older one drain. Nothing connects yet.
    pub fn adopt(&mut self, grant: SessionGrant) {
        self.drain_actors();
        let wanted = usize::from(self.settings.streams.min(grant.max_streams).max(1));
        for index in self.slots.len()..wanted {
            let seed = self.settings.seed.wrapping_add(index as u64);
            self.slots.push(Slot {
                place: Place::Empty,
                incarnation: Incarnation(0),
                ahead: 0,
                reconnect: Reconnect::new(self.settings.policy, seed),
                retry_at: None,
            });
        }
        for slot in &mut self.slots {
            // Events of the old session's streams are ignored from here on.
            slot.incarnation.0 += 1;
            slot.place = Place::Empty;
            slot.ahead = 0;
            slot.retry_at = None;
        }
        self.grant = Some(grant);
    }

    /// Connects every stream that is neither connected nor waiting. Called when there is work.
    pub fn wake(&mut self, owner: &Recipient<StreamEvent>, now: Instant) {
        if self.draining {
            return;
        }
        for index in 0..self.slots.len() {
            let due = self.slots.get(index).is_some_and(|slot| match slot.place {
                Place::Empty => slot.retry_at.is_none_or(|at| at <= now),
                Place::Waiting(at) => at <= now && !planted::here(Bug::NeverReplacesStreams),
                _ => false,
            });
            if due {
                self.start(index, owner, now);
            }
        }
    }

    fn start(&mut self, index: usize, owner: &Recipient<StreamEvent>, now: Instant) {
        let (Some(grant), Some(slot)) = (&self.grant, self.slots.get_mut(index)) else { return };
        slot.reconnect.attempts(now);
        let first = slot.incarnation.0 <= 1;
        slot.incarnation.0 += 1;
        self.reconnects += u64::from(!first);
        let join = Join {
            session: grant.session,
            token: grant.token,
            index: StreamIndex(u16::try_from(index).unwrap_or(u16::MAX)),
            incarnation: slot.incarnation,
            reason: if first { JoinReason::First } else { JoinReason::Replacement },
        };
        let address = grant.addresses.get(index % grant.addresses.len().max(1)).cloned();
        let origin = Origin::Connect {
            connector: Arc::clone(&self.settings.connector),
            address,
            join,
            owner: owner.clone(),
            limit: self.settings.upload.clone(),
        };
        let arbiters = &self.settings.arbiters;
        let arbiter = arbiters.get(index % arbiters.len().max(1));
        slot.place = Place::Joining(Stream::start_on(arbiter, origin, self.settings.limits));
        slot.ahead = 0;
    }

    /// The earliest moment at which [`Self::wake`] would connect a waiting stream.
    pub fn next_retry(&self) -> Option<Instant> {
        let waits = |slot: &Slot| match slot.place {
            Place::Waiting(at) => Some(at),
            Place::Empty => slot.retry_at,
            _ => None,
        };
        self.slots.iter().filter_map(waits).min()
    }

    /// Takes an event in.
    pub fn handle(&mut self, event: &StreamEvent, now: Instant) -> Reaction {
        let index = event.index;
        let Some(slot) = self.slots.get_mut(usize::from(index.0)) else { return Reaction::Nothing };
        if slot.incarnation != event.incarnation {
            return Reaction::Nothing;
        }
        match &event.fact {
            StreamFact::Joined => {
                if let Place::Joining(stream) = std::mem::replace(&mut slot.place, Place::Empty) {
                    slot.place = Place::Live(stream);
                    slot.reconnect.connected(now);
                    slot.retry_at = None;
                    self.joined_ever += 1;
                }
                Reaction::Ready(index)
            }
            StreamFact::Written(_) => {
                let written = usize::from(!planted::here(Bug::ForgetsWhatWasWritten));
                slot.ahead = slot.ahead.saturating_sub(written);
                Reaction::Ready(index)
            }
            StreamFact::Acknowledged(_) | StreamFact::Arrived(_) => {
                slot.reconnect.progressed(now);
                Reaction::Nothing
            }
            StreamFact::Lost { reason, refusal } => {
                slot.place = Place::Ending;
                if let Some(refusal) = refusal
                    && session_is_gone(refusal)
                {
                    // The control channel finds out as well and opens another session, or ends the job.
                    slot.retry_at = Some(now + Duration::from_secs(5));
                    return Reaction::Lost(index, refusal.message.clone());
                }
                match slot.reconnect.failed(now) {
                    Next::RetryAt(at) => {
                        slot.retry_at = Some(at);
                        Reaction::Lost(index, reason.clone())
                    }
                    Next::GiveUp => Reaction::GaveUp(reason.clone()),
                }
            }
            StreamFact::Ended { clean } => {
                let asked_by_server = *clean && !self.draining && slot.retry_at.is_none();
                if asked_by_server && let Next::RetryAt(at) = slot.reconnect.failed(now) {
                    slot.retry_at = Some(at);
                }
                slot.place = slot.retry_at.map_or(Place::Empty, Place::Waiting);
                if asked_by_server {
                    return Reaction::Lost(index, "the server asked the stream to drain".into());
                }
                Reaction::Closed
            }
        }
    }

    /// Whether the event comes from the newest connection of its stream.
    pub fn is_current(&self, event: &StreamEvent) -> bool {
        self.slots.get(usize::from(event.index.0)).is_some_and(|slot| slot.incarnation == event.incarnation)
    }

    /// All its streams.
    pub fn indexes(&self) -> impl Iterator<Item = StreamIndex> + use<> {
        let count = u16::try_from(self.slots.len()).unwrap_or(u16::MAX);
        (0..count).map(StreamIndex)
    }

    /// The first connection of a stream that is not over: whatever came before it sends nothing more.
    pub fn over_before(&self, index: StreamIndex) -> Incarnation {
        let Some(slot) = self.slots.get(usize::from(index.0)) else { return Incarnation(0) };
        let over = !matches!(slot.place, Place::Joining(_) | Place::Live(_));
        Incarnation(slot.incarnation.0.saturating_add(over.into()))
    }

    /// A live stream with room for another block.
    pub fn has_room(&self, index: StreamIndex) -> bool {
        self.slots
            .get(usize::from(index.0))
            .is_some_and(|slot| matches!(slot.place, Place::Live(_)) && slot.ahead < BLOCKS_AHEAD)
    }

    /// Indexes of live streams.
    pub fn live(&self) -> impl Iterator<Item = StreamIndex> {
        let is_live = |(index, slot): (StreamIndex, &Slot)| matches!(slot.place, Place::Live(_)).then_some(index);
        self.indexes().zip(&self.slots).filter_map(is_live)
    }

    /// Gives a block to a stream that has room.
    pub fn send(&mut self, index: StreamIndex, block: SendBlock) {
        if let Some(Slot { place: Place::Live(stream), ahead, .. }) = self.slots.get_mut(usize::from(index.0)) {
            *ahead += 1;
            // At most `BLOCKS_AHEAD` of these wait in a stream.
            stream.do_send(block);
        }
    }

    /// No more connections; live streams drain and close.
    pub fn drain(&mut self) {
        self.draining = true;
        self.drain_actors();
        for slot in &mut self.slots {
            slot.retry_at = None;
            if matches!(slot.place, Place::Waiting(_)) {
                slot.place = Place::Empty;
            }
        }
    }

    fn drain_actors(&self) {
        for slot in &self.slots {
            if let Place::Joining(stream) | Place::Live(stream) = &slot.place {
                stream.do_send(DrainStream);
            }
        }
    }

    /// Whether no stream is there any more.
    pub fn is_closed(&self) -> bool {
        self.slots.iter().all(|slot| matches!(slot.place, Place::Empty | Place::Waiting(_)))
    }

    /// Connections made after the first of each stream.
    pub fn reconnects(&self) -> u64 {
        self.reconnects
    }
}

fn session_is_gone(refusal: &Refused) -> bool {
    matches!(refusal.code, RefusalCode::NoSuchSession | RefusalCode::Ended | RefusalCode::Superseded)
}
