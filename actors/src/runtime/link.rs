//! The two halves of a connection as futures that live inside the actor that owns it.
//!
//! The reader hands whole frames to the actor and waits until each is taken: that is the back pressure. The writer takes
//! from a bounded queue. Both are dropped with the actor, and the socket with them (G4).

use std::cell::{Cell, RefCell};
use std::rc::Rc;
use std::sync::Arc;

use actix::{Actor, Addr, AsyncContext, Context, Handler, Message as ActixMessage, SpawnHandle};
use bytes::{Bytes, BytesMut};
use strandline_messages::wire::message::kinds;
use strandline_messages::wire::{Ack, BlockFrame, Frame, FrameDecoder, Message, Tag};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::buffer::{BlockBuffer, LONG_BYTES_MIN};
use super::transport::{Connection, LinkError, UploadLimit};

/// Room in a read buffer, bytes.
const READ_BYTES: usize = 64 << 10;
/// What is written between two looks at the upload limit and the progress mark, bytes.
const SLICE_BYTES: usize = 16 << 10;
/// Frames that may wait for the writer. Their number is bounded by their senders: a few blocks per stream, one
/// acknowledgement, one ping, a handful of state changes, and on control connections the requests' credit.
const QUEUE_FRAMES: usize = 64;

/// A frame came in. Block frames carry the permit that bounds how many of them are in memory.
#[derive(ActixMessage)]
#[rtype(result = "()")]
pub struct FrameArrived {
    /// The frame.
    pub frame: Frame,
    /// Released when the block has been dealt with.
    pub permit: Option<OwnedSemaphorePermit>,
}

/// The reading half has ended.
#[derive(ActixMessage)]
#[rtype(result = "()")]
pub enum ReadEnded {
    /// In good order, between two frames.
    InOrder,
    /// The connection broke.
    Broken(String),
    /// What came in is not a frame that may come in.
    Malformed(String),
}

/// The writing half says.
#[derive(ActixMessage)]
#[rtype(result = "()")]
pub enum Wrote {
    /// A block is written out.
    Block(BlockFrame),
    /// The queue is empty and flushed.
    Idle,
    /// close_notify and FIN are written.
    Closed,
    /// Writing failed.
    Failed(String),
}

/// Something for the writer.
enum Outgoing {
    Frame(Bytes),
    Ping(Bytes),
    Block(BlockFrame),
    Ack,
    Close,
}

/// An actor that owns a link.
pub trait LinkOwner:
    Actor<Context = Context<Self>> + Handler<FrameArrived> + Handler<ReadEnded> + Handler<Wrote>
{
}

impl<A> LinkOwner for A where
    A: Actor<Context = Context<A>> + Handler<FrameArrived> + Handler<ReadEnded> + Handler<Wrote>
{
}

/// The actor's handle of its link.
pub struct Link {
    queue: mpsc::Sender<Outgoing>,
    ack: Rc<RefCell<Option<Ack>>>,
    moved: Rc<Cell<bool>>,
    halves: [SpawnHandle; 2],
}

/// The peer takes nothing any more: the queue, which its senders bound, is full.
#[derive(Debug, thiserror::Error)]
#[error("the peer does not take its messages")]
pub struct QueueFull;

impl Link {
    /// Spawns both halves of `connection` into the actor. `budget` bounds the bytes of blocks in memory.
    pub fn spawn<A: LinkOwner>(
        connection: Connection,
        budget: Option<Arc<Semaphore>>,
        limit: UploadLimit,
        ctx: &mut Context<A>,
    ) -> Self {
        let (reader, writer) = tokio::io::split(connection);
        let (queue, outgoing) = mpsc::channel(QUEUE_FRAMES);
        let (ack, moved) = (Rc::default(), Rc::new(Cell::new(false)));
        let reading = read(Eye::new(reader, Rc::clone(&moved)), ctx.address(), budget);
        let pen = Pen { writer, limit, moved: Rc::clone(&moved), ack: Rc::clone(&ack) };
        let writing = write(pen, outgoing, ctx.address());
        let halves = [ctx.spawn(actix::fut::wrap_future(reading)), ctx.spawn(actix::fut::wrap_future(writing))];
        Self { queue, ack, moved, halves }
    }

    /// Queues a message.
    pub fn send(&self, tag: Tag, message: &Message) -> Result<(), LinkError> {
        let frame = message.to_frame(tag)?.encode();
        let outgoing = if matches!(message, Message::Ping(_)) { Outgoing::Ping(frame) } else { Outgoing::Frame(frame) };
        self.push(outgoing)
    }

    /// Queues a block.
    pub fn send_block(&self, block: BlockFrame) -> Result<(), LinkError> {
        self.push(Outgoing::Block(block))
    }

    /// Queues an acknowledgement; one that still waits is replaced.
    pub fn send_ack(&self, ack: Ack) -> Result<(), LinkError> {
        if self.ack.replace(Some(ack)).is_none() { self.push(Outgoing::Ack) } else { Ok(()) }
    }

    /// Queues the end: close_notify and FIN after everything before it.
    pub fn close(&self) -> Result<(), LinkError> {
        self.push(Outgoing::Close)
    }

    /// Drops both halves, and the socket with them: for a connection that is broken already.
    pub fn cut<A: LinkOwner>(self, ctx: &mut Context<A>) {
        for half in self.halves {
            ctx.cancel_future(half);
        }
    }

    /// Whether bytes have moved since the last call (pings do not count).
    pub fn take_progress(&self) -> bool {
        self.moved.replace(false)
    }

    fn push(&self, outgoing: Outgoing) -> Result<(), LinkError> {
        self.queue.try_send(outgoing).map_err(|_| std::io::Error::other(QueueFull).into())
    }
}

async fn read<A: LinkOwner>(mut eye: Eye, actor: Addr<A>, budget: Option<Arc<Semaphore>>) {
    let ended = read_frames(&mut eye, &actor, budget).await;
    actor.do_send(match ended {
        Ok(()) => ReadEnded::InOrder,
        Err(LinkError::Wire(error)) => ReadEnded::Malformed(error.to_string()),
        Err(error) => ReadEnded::Broken(error.to_string()),
    });
}

async fn read_frames<A: LinkOwner>(
    eye: &mut Eye,
    actor: &Addr<A>,
    budget: Option<Arc<Semaphore>>,
) -> Result<(), LinkError> {
    while let Some(frame) = eye.read().await? {
        let permit = match &budget {
            Some(budget) if frame.kind == kinds::BLOCK => {
                let bytes = u32::try_from(frame.body.len()).unwrap_or(u32::MAX);
                Some(Arc::clone(budget).acquire_many_owned(bytes).await.map_err(std::io::Error::other)?)
            }
            _ => None,
        };
        if actor.send(FrameArrived { frame, permit }).await.is_err() {
            return Ok(());
        }
    }
    Ok(())
}

/// The reading half with what has come and is not a whole frame.
struct Eye {
    reader: ReadHalf<Connection>,
    moved: Rc<Cell<bool>>,
    buffer: BytesMut,
    decoder: FrameDecoder,
}

impl Eye {
    fn new(reader: ReadHalf<Connection>, moved: Rc<Cell<bool>>) -> Self {
        Self { reader, moved, buffer: BytesMut::with_capacity(READ_BYTES), decoder: FrameDecoder::default() }
    }

    /// The next frame; `None` after the last one.
    async fn read(&mut self) -> Result<Option<Frame>, LinkError> {
        loop {
            if let Some(frame) = self.decoder.next(&mut self.buffer)? {
                return Ok(Some(frame));
            }
            match self.decoder.awaited_body() {
                Some(len) if len >= LONG_BYTES_MIN => {
                    let body = self.read_long_body(len).await?;
                    if let Some(frame) = self.decoder.complete(body)? {
                        return Ok(Some(frame));
                    }
                    continue;
                }
                Some(len) => self.buffer.reserve(len - self.buffer.len()),
                None if self.buffer.capacity() - self.buffer.len() < READ_BYTES / 4 => self.buffer.reserve(READ_BYTES),
                None => {}
            }
            if self.reader.read_buf(&mut self.buffer).await? == 0 {
                let is_in_order = self.decoder.is_between_frames(&self.buffer);
                return if is_in_order { Ok(None) } else { Err(ends_in_a_frame()) };
            }
            self.moved.set(true);
        }
    }

    /// The rest of the body goes where it stays.
    async fn read_long_body(&mut self, len: usize) -> Result<Bytes, LinkError> {
        let mut body = BlockBuffer::with_len(len);
        let (front, mut rest) = body.split_at_mut(self.buffer.len().min(len));
        front.copy_from_slice(&self.buffer.split_to(front.len()));
        while !rest.is_empty() {
            let read = self.reader.read(rest).await?;
            if read == 0 {
                return Err(ends_in_a_frame());
            }
            self.moved.set(true);
            rest = rest.get_mut(read..).unwrap_or_default();
        }
        Ok(Bytes::from_owner(body))
    }
}

fn ends_in_a_frame() -> LinkError {
    std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the connection ends in the middle of a frame").into()
}

/// The writing half with what it looks at.
struct Pen {
    writer: WriteHalf<Connection>,
    limit: UploadLimit,
    moved: Rc<Cell<bool>>,
    ack: Rc<RefCell<Option<Ack>>>,
}

async fn write<A: LinkOwner>(mut pen: Pen, mut queue: mpsc::Receiver<Outgoing>, actor: Addr<A>) {
    while let Some(outgoing) = queue.recv().await {
        let closing = matches!(outgoing, Outgoing::Close);
        match pen.write(outgoing).await {
            Ok(Some(block)) => actor.do_send(Wrote::Block(block)),
            Ok(None) => {}
            Err(error) => return actor.do_send(Wrote::Failed(error.to_string())),
        }
        if closing {
            return actor.do_send(Wrote::Closed);
        }
        if queue.is_empty() {
            match pen.writer.flush().await {
                Ok(()) => actor.do_send(Wrote::Idle),
                Err(error) => return actor.do_send(Wrote::Failed(error.to_string())),
            }
        }
    }
}

impl Pen {
    async fn write(&mut self, outgoing: Outgoing) -> std::io::Result<Option<BlockFrame>> {
        match outgoing {
            Outgoing::Frame(bytes) => self.slices(&bytes).await?,
            Outgoing::Ping(bytes) => self.writer.write_all(&bytes).await?,
            Outgoing::Block(block) => {
                self.slices(&block.head()).await?;
                self.slices(&block.block).await?;
                return Ok(Some(block));
            }
            Outgoing::Ack => {
                let ack = self.ack.borrow_mut().take();
                if let Some(ack) = ack {
                    let frame = Message::Ack(ack).to_frame(Tag::default()).map_err(std::io::Error::other)?;
                    self.slices(&frame.encode()).await?;
                }
            }
            Outgoing::Close => {
                self.writer.flush().await?;
                self.writer.shutdown().await?;
            }
        }
        Ok(None)
    }

    async fn slices(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        for slice in bytes.chunks(SLICE_BYTES) {
            self.pay(slice.len()).await?;
            write_all(&mut self.writer, slice, &self.moved).await?;
        }
        Ok(())
    }

    async fn pay(&self, bytes: usize) -> std::io::Result<()> {
        let (Some(limit), Some(cells)) = (&self.limit, u32::try_from(bytes).ok().and_then(std::num::NonZeroU32::new))
        else {
            return Ok(());
        };
        limit.until_n_ready(cells).await.map_err(std::io::Error::other)
    }
}

async fn write_all<W: AsyncWrite + Unpin>(writer: &mut W, mut bytes: &[u8], moved: &Cell<bool>) -> std::io::Result<()> {
    while !bytes.is_empty() {
        let written = writer.write(bytes).await?;
        if written == 0 {
            return Err(std::io::ErrorKind::WriteZero.into());
        }
        moved.set(true);
        bytes = bytes.get(written..).unwrap_or_default();
    }
    Ok(())
}
