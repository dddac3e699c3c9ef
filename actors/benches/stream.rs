//! Two stream actors and a pipe between them: blocks from the agent's side, acknowledgements from the server's.
//!
//! `cargo bench -p strandline-actors --bench stream`. Storage confirms at once, so this is what the actors, the frame
//! codec and one pipe in memory cost, all on one thread. Each iteration is the life of a connection, from greeting to
//! orderly close.

#![expect(clippy::unwrap_used, reason = "a bench that meets an error has nothing to measure")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use actix::{Actor, Addr, AsyncContext, Context, Handler};
use bytes::Bytes;
use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use parking_lot::Mutex;
use strandline_actors::machines::session::Terminal;
use strandline_actors::machines::stream::StreamLimits;
use strandline_actors::ports::{BlockPlace, CommitOutcome, SessionStore, StoreFault};
use strandline_actors::runtime::transport::{ConnectFault, Connection, Connector, accept};
use strandline_actors::stream::{Intake, JoinGranted, JoinSession, Origin, Stream};
use strandline_messages::mail::{
    BlockStored, DrainStream, Peer, SendAck, SendBlock, StoreFailed, StreamEvent, StreamFact,
};
use strandline_messages::wire::{Ack, BlockFrame, Join, JoinReason, Refused};
use strandline_messages::{
    AgentId, ChunkId, Durable, DurableWriter, Incarnation, Sequence, SessionId, SessionToken, SnapshotId, StreamIndex,
};
use tokio::io::DuplexStream;
use tokio::sync::{Semaphore, oneshot};

/// Room in the pipe, bytes: about what a socket holds.
const PIPE_BYTES: usize = 256 << 10;
/// Blocks given to the stream and not yet written, as the dispatcher does it.
const AHEAD: u64 = 2;

fn main() {
    divan::main();
}

/// 64 MiB in blocks of so many bytes.
#[divan::bench(args = [64 << 10, 1 << 20, 4 << 20])]
fn blocks_through_a_stream(bencher: Bencher<'_, '_>, block_bytes: usize) {
    let blocks = (64 << 20) / block_bytes;
    let system = actix::System::new();
    let block = Bytes::from(vec![7; block_bytes]);
    bencher
        .counter(BytesCount::new(blocks * block_bytes))
        .counter(ItemsCount::new(blocks))
        .bench_local(|| system.block_on(send(block.clone(), blocks as u64)));
}

async fn send(block: Bytes, blocks: u64) {
    let (near, far) = tokio::io::duplex(PIPE_BYTES);
    let (done, finished) = oneshot::channel();
    let join = Join {
        session: SessionId([1; 16]),
        token: SessionToken([2; 32]),
        index: StreamIndex(0),
        incarnation: Incarnation(1),
        reason: JoinReason::First,
    };
    let agent = Agent { block, blocks, next: 0, stream: None, done: Some(done) }.start();
    let connector = Arc::new(Pipe(Mutex::new(Some(near))));
    let origin = Origin::Connect { connector, address: None, join, owner: agent.clone().recipient(), limit: None };
    agent.do_send(Use(Stream::start_on(None, origin, StreamLimits::default())));

    let mut connection: Connection = Box::new(far);
    accept(&mut connection, [3; 32]).await.unwrap();
    let peer = Peer { tenant: "bench".parse().unwrap(), agent: AgentId([4; 16]) };
    let registry = Server { watermark: Arc::default(), stream: None }.start().recipient();
    let budget = Arc::new(Semaphore::new(16 << 20));
    Stream::start_on(None, Origin::Accepted { connection, peer, registry, budget }, StreamLimits::default());
    finished.await.unwrap();
}

/// The agent's end of the pipe.
struct Pipe(Mutex<Option<DuplexStream>>);

impl Connector for Pipe {
    fn connect(&self, _: Option<String>) -> BoxFuture<'static, Result<Connection, ConnectFault>> {
        let end = self.0.lock().take().ok_or_else(|| ConnectFault::lasting("the pipe is in use"));
        async { Ok(Box::new(end?) as Connection) }.boxed()
    }

    fn target(&self) -> String {
        "a pipe".to_owned()
    }
}

/// Owns the agent's stream: gives it blocks, drains it when all are acknowledged.
struct Agent {
    block: Bytes,
    blocks: u64,
    next: u64,
    stream: Option<Addr<Stream>>,
    done: Option<oneshot::Sender<()>>,
}

#[derive(actix::Message)]
#[rtype(result = "()")]
struct Use(Addr<Stream>);

impl Actor for Agent {
    type Context = Context<Self>;
}

impl Agent {
    fn send_next(&mut self) {
        if let Some(stream) = self.stream.as_ref().filter(|_| self.next < self.blocks) {
            // At most `AHEAD` of these wait in the stream.
            stream.do_send(SendBlock(BlockFrame { sequence: Sequence(self.next), block: self.block.clone() }));
            self.next += 1;
        }
    }
}

impl Handler<Use> for Agent {
    type Result = ();

    fn handle(&mut self, Use(stream): Use, _: &mut Context<Self>) {
        self.stream = Some(stream);
    }
}

impl Handler<StreamEvent> for Agent {
    type Result = ();

    fn handle(&mut self, event: StreamEvent, _: &mut Context<Self>) {
        match event.fact {
            StreamFact::Joined => (0..AHEAD).for_each(|_| self.send_next()),
            StreamFact::Written(_) => self.send_next(),
            StreamFact::Acknowledged(ack) if ack.watermark == self.blocks => {
                // Once.
                self.stream.take().unwrap().do_send(DrainStream);
            }
            StreamFact::Ended { clean } => {
                assert!(clean, "the stream did not drain");
                self.done.take().unwrap().send(()).unwrap();
            }
            _ => {}
        }
    }
}

/// Registry, session and gap tracker of the server's stream in one: blocks come in order.
struct Server {
    watermark: Arc<AtomicU64>,
    stream: Option<Addr<Stream>>,
}

impl Actor for Server {
    type Context = Context<Self>;
}

impl Handler<JoinSession> for Server {
    type Result = Result<JoinGranted, Refused>;

    fn handle(&mut self, join: JoinSession, ctx: &mut Context<Self>) -> Self::Result {
        self.stream = Some(join.stream);
        let me = ctx.address();
        let intake = Intake {
            store: Arc::new(Store),
            tracker: me.clone().recipient(),
            session: me.clone().recipient(),
            watermark: Arc::clone(&self.watermark),
        };
        Ok(JoinGranted { owner: me.recipient(), intake: Some(intake) })
    }
}

impl Handler<BlockStored> for Server {
    type Result = ();

    fn handle(&mut self, BlockStored(durable): BlockStored, _: &mut Context<Self>) {
        let watermark = durable.get().0 + 1;
        assert_eq!(self.watermark.swap(watermark, Ordering::AcqRel) + 1, watermark, "blocks came out of order");
        // One for each block at most.
        self.stream.as_ref().unwrap().do_send(SendAck(Ack { watermark, ranges: Vec::new() }));
    }
}

impl Handler<StreamEvent> for Server {
    type Result = ();

    fn handle(&mut self, event: StreamEvent, _: &mut Context<Self>) {
        if let StreamFact::Ended { .. } = event.fact {
            self.stream = None;
        }
    }
}

impl Handler<StoreFailed> for Server {
    type Result = ();

    fn handle(&mut self, _: StoreFailed, _: &mut Context<Self>) {}
}

/// Confirms every block and forgets it.
struct Store;

impl DurableWriter for Store {}

impl SessionStore for Store {
    fn known(&self, ids: Vec<ChunkId>) -> BoxFuture<'static, Result<Vec<bool>, StoreFault>> {
        async move { Ok(vec![false; ids.len()]) }.boxed()
    }

    fn store(&self, sequence: Sequence, _block: Bytes) -> BoxFuture<'static, Result<Durable<Sequence>, StoreFault>> {
        let durable = Durable::confirmed_by(self, sequence);
        async move { Ok(durable) }.boxed()
    }

    fn commit(&self, _: Bytes) -> BoxFuture<'static, Result<CommitOutcome, StoreFault>> {
        async { Ok(CommitOutcome::Refused { reason: String::new() }) }.boxed()
    }

    fn end(&self, _: Terminal, _: String) -> BoxFuture<'static, Result<(), StoreFault>> {
        async { Ok(()) }.boxed()
    }

    fn locate(
        &self,
        _: Option<SnapshotId>,
        ids: Vec<ChunkId>,
    ) -> BoxFuture<'static, Result<Vec<Option<BlockPlace>>, StoreFault>> {
        async move { Ok(vec![None; ids.len()]) }.boxed()
    }

    fn read(&self, _: BlockPlace) -> BoxFuture<'static, Result<Bytes, StoreFault>> {
        async { Err(StoreFault::Failed("nothing is kept".to_owned())) }.boxed()
    }
}
