//! The backup pipeline's ports on the network: queries over the control channel, blocks into the dispatcher's window.

use std::sync::Arc;

use actix::Addr;
use actix_rt::ArbiterHandle;
use bytes::Bytes;
use crossbeam_channel::{Receiver, bounded};
use strandline_actors::control_channel::{AskError, AskServer, ControlChannel};
use strandline_actors::dispatcher::Dispatcher;
use strandline_actors::runtime::budget::{ByteBudget, Reservation};
use strandline_messages::ChunkId;
use strandline_messages::mail::DispatchBlock;
use strandline_messages::wire::{ChunksKnown, Message, QueryChunks, join_ids, unpack_bitmap};

use crate::backup::BackupError;
use crate::backup::ports::{BlockSink, ChunkOracle, Permit, QueryTicket};

fn port_error(error: impl std::error::Error + Send + Sync + 'static) -> BackupError {
    BackupError::Port(Box::new(error))
}

/// Asks the server which chunks it knows.
pub struct NetworkOracle {
    control: Addr<ControlChannel>,
    arbiter: ArbiterHandle,
}

impl NetworkOracle {
    /// Over `control`, whose actor runs on `arbiter`.
    pub fn new(control: Addr<ControlChannel>, arbiter: ArbiterHandle) -> Self {
        Self { control, arbiter }
    }
}

type Answer = Result<Message, AskError>;

impl ChunkOracle for NetworkOracle {
    fn query(&mut self, ids: Vec<ChunkId>) -> Result<Box<dyn QueryTicket>, BackupError> {
        let asked = ids.len();
        let asking = self.control.send(AskServer(Message::QueryChunks(QueryChunks { ids: join_ids(&ids) })));
        let (reply, answer) = bounded::<Answer>(1);
        let waiting = async move {
            let answer = asking.await.unwrap_or(Err(AskError::Closed));
            // Whoever asked may have stopped waiting.
            let _ = reply.send(answer);
        };
        if self.arbiter.spawn(waiting) {
            Ok(Box::new(Ticket { answer, asked }))
        } else {
            Err(port_error(AskError::Closed))
        }
    }
}

struct Ticket {
    answer: Receiver<Answer>,
    asked: usize,
}

impl QueryTicket for Ticket {
    fn ready(&self) -> bool {
        !self.answer.is_empty()
    }

    fn wait(self: Box<Self>) -> Result<Vec<bool>, BackupError> {
        match self.answer.recv().unwrap_or(Err(AskError::Closed)).map_err(port_error)? {
            Message::ChunksKnown(ChunksKnown { bitmap }) => unpack_bitmap(&bitmap, self.asked)
                .ok_or(BackupError::Answer { asked: self.asked, answered: bitmap.len() * 8 }),
            _ => Err(BackupError::Answer { asked: self.asked, answered: 0 }),
        }
    }
}

/// Puts sealed blocks into the send window.
pub struct WindowSink {
    dispatcher: Addr<Dispatcher>,
    budget: ByteBudget,
}

impl WindowSink {
    /// `budget` is the one that the dispatcher gives acknowledged bytes back to.
    pub fn new(dispatcher: Addr<Dispatcher>, budget: ByteBudget) -> Arc<Self> {
        Arc::new(Self { dispatcher, budget })
    }
}

impl BlockSink for WindowSink {
    fn reserve(&self, bytes: usize) -> Result<Permit, BackupError> {
        self.budget.acquire(bytes).map(|reservation| Permit(Box::new(reservation))).map_err(port_error)
    }

    fn send(&self, permit: Permit, block: Bytes) -> Result<(), BackupError> {
        if let Ok(reservation) = permit.0.downcast::<Reservation>() {
            reservation.keep(block.len());
        }
        // Bounded by the budget: every block in the mailbox holds its bytes.
        self.dispatcher.do_send(DispatchBlock(block));
        Ok(())
    }
}
