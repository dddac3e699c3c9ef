//! `GapTracker`: the durable sequence numbers of one session.
//!
//! Owns the machine (watermark and intervals, never history) and says what is durable to every stream of the session.
//! Its session starts and stops it. It must not see a block, and it counts only `Durable` sequence numbers (G1).

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use actix::{Actor, ActorContext, AsyncContext, Context, Handler, Message, Recipient};
use strandline_messages::mail::{BlockStored, DurableState, HolesFound, ReportDurable, SendAck, WatermarkMoved};
use strandline_messages::wire::{Ack, Retransmit, SequenceRange};
use strandline_messages::{StreamIndex, limits};
use tracing::warn;

use crate::machines::gap_tracker as machine;
use crate::planted::{self, Bug};
use crate::runtime::clock;

/// How long a hole may stand without progress before the agent is asked to send it again.
const HOLE_PATIENCE: Duration = Duration::from_mins(1);
/// How often holes are looked for.
const HOLE_TICK: Duration = Duration::from_secs(5);

/// From the session: acknowledgements go to this stream, too.
#[derive(Message)]
#[rtype(result = "()")]
pub struct AddListener(pub StreamIndex, pub Recipient<SendAck>);

/// From the session: this stream is gone.
#[derive(Message)]
#[rtype(result = "()")]
pub struct RemoveListener(pub StreamIndex);

/// From the session: it has ended.
#[derive(Message)]
#[rtype(result = "()")]
pub struct StopTracking;

/// To itself: acknowledge what has become durable since the last time. One is under way at most.
#[derive(Message)]
#[rtype(result = "()")]
struct AnnounceTick;

/// See the module.
pub struct GapTracker {
    durable: machine::GapTracker,
    watermark: Arc<AtomicU64>,
    session: Recipient<WatermarkMoved>,
    holes: Recipient<HolesFound>,
    listeners: Vec<(StreamIndex, Recipient<SendAck>)>,
    announcing: bool,
    told: u64,
}

impl GapTracker {
    /// An empty tracker. `watermark` is published for the streams, which refuse blocks beyond the window.
    pub fn new(watermark: Arc<AtomicU64>, session: Recipient<WatermarkMoved>, holes: Recipient<HolesFound>) -> Self {
        Self {
            durable: machine::GapTracker::new(limits::SEQUENCE_WINDOW),
            watermark,
            session,
            holes,
            listeners: Vec::new(),
            announcing: false,
            told: 0,
        }
    }

    fn state(&self) -> DurableState {
        if planted::here(Bug::AcknowledgesOneTooMany) {
            return DurableState { watermark: self.durable.watermark() + 1, ranges: Vec::new() };
        }
        if planted::here(Bug::AcknowledgesGaps) {
            return DurableState { watermark: self.durable.end(), ranges: Vec::new() };
        }
        let range = |range: std::ops::Range<u64>| SequenceRange { start: range.start, end: range.end };
        let ranges = self.durable.intervals().take(limits::RANGES_MAX).map(range).collect();
        DurableState { watermark: self.durable.watermark(), ranges }
    }
}

impl Actor for GapTracker {
    type Context = Context<Self>;

    fn started(&mut self, ctx: &mut Context<Self>) {
        ctx.run_interval(HOLE_TICK, |tracker, _| {
            let holes = tracker.durable.holes_older_than(clock::now(), HOLE_PATIENCE, limits::RANGES_MAX);
            if !holes.is_empty() {
                let ranges = holes.into_iter().map(|hole| SequenceRange { start: hole.start, end: hole.end }).collect();
                tracker.holes.do_send(HolesFound(Retransmit { ranges }));
            }
        });
    }
}

impl Handler<BlockStored> for GapTracker {
    type Result = ();

    fn handle(&mut self, BlockStored(durable): BlockStored, ctx: &mut Context<Self>) {
        if self.durable.insert(clock::now(), durable.get().0) == machine::Inserted::BeyondWindow {
            warn!(sequence = durable.get().0, "a stored block lies beyond the window and is not acknowledged");
        }
        self.watermark.store(self.durable.watermark(), Ordering::Release);
        // Everything that a group commit made durable is in the mailbox before this.
        if !std::mem::replace(&mut self.announcing, true) {
            ctx.notify(AnnounceTick);
        }
    }
}

impl Handler<AnnounceTick> for GapTracker {
    type Result = ();

    fn handle(&mut self, _: AnnounceTick, _: &mut Context<Self>) {
        self.announcing = false;
        let DurableState { watermark, ranges } = self.state();
        for (_, stream) in &self.listeners {
            // At most one acknowledgement waits in a stream: the newest.
            stream.do_send(SendAck(Ack { watermark, ranges: ranges.clone() }));
        }
        if watermark > self.told {
            self.told = watermark;
            self.session.do_send(WatermarkMoved(watermark));
        }
    }
}

impl Handler<AddListener> for GapTracker {
    type Result = ();

    fn handle(&mut self, AddListener(index, stream): AddListener, _: &mut Context<Self>) {
        self.listeners.retain(|(known, _)| *known != index);
        self.listeners.push((index, stream));
    }
}

impl Handler<RemoveListener> for GapTracker {
    type Result = ();

    fn handle(&mut self, RemoveListener(index): RemoveListener, _: &mut Context<Self>) {
        self.listeners.retain(|(known, _)| *known != index);
    }
}

impl Handler<ReportDurable> for GapTracker {
    type Result = DurableState;

    fn handle(&mut self, _: ReportDurable, _: &mut Context<Self>) -> DurableState {
        self.state()
    }
}

impl Handler<StopTracking> for GapTracker {
    type Result = ();

    fn handle(&mut self, _: StopTracking, ctx: &mut Context<Self>) {
        ctx.stop();
    }
}
