//! What comes over a connection: frames, greetings, messages, operations.

use std::cell::RefCell;

use bytes::{Bytes, BytesMut};
use futures_util::future::BoxFuture;
use strandline_actors::runtime::transport::{ConnectFault, Connection, Connector, accept, open};
use strandline_messages::limits;
use strandline_messages::wire::frame::FLAG_CRITICAL;
use strandline_messages::wire::manage::Operation;
use strandline_messages::wire::message::{is_known_kind, kinds};
use strandline_messages::wire::{
    BlockFrame, Frame, FrameDecoder, Message, PROTOCOL_VERSION, PROTOCOL_VERSION_MIN, Purpose, WireError,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::runtime::Runtime;

use super::memory::within;

/// What a decoded message may take: serde reserves at most 1 MiB for each list whose length is only claimed, and lists lie
/// three deep; then what really came, in its decoded form.
fn message_memory(bytes: usize) -> usize {
    4 * limits::CONTROL_BYTES_MAX + 64 * bytes
}

/// First byte: how many bytes come at a time. Then a byte stream.
///
/// However it is cut, the same frames come out of it, and the same error ends it; a block frame keeps its bytes.
/// Memory: the one frame that is being received at its limit, and twice what came.
pub fn frames(data: &[u8]) {
    let Some((&step, wire)) = data.split_first() else { return };
    let bytes_max = limits::DATA_FRAME_BYTES_MAX + 8 * wire.len() + (64 << 10);
    let whole = within(bytes_max, || cut(wire, wire.len(), usize::MAX));
    let pieces = within(bytes_max, || cut(wire, usize::from(step), usize::MAX));
    assert_eq!(whole, pieces, "the same bytes in pieces of {step}");
    let elsewhere = within(bytes_max, || cut(wire, usize::from(step), usize::from(step)));
    assert_eq!(whole, elsewhere, "the same bytes in pieces of {step}, longer bodies put together elsewhere");
    for frame in whole.0 {
        assert!(is_known_kind(frame.kind), "an unknown kind came out");
        if frame.kind == kinds::BLOCK {
            let encoded = frame.encode();
            let Ok(block) = BlockFrame::from_frame(frame.clone()) else { continue };
            assert!(block.block.len() <= limits::BLOCK_BYTES_MAX);
            if frame.flags == FLAG_CRITICAL {
                assert_eq!([&block.head()[..], &block.block].concat(), encoded);
            }
        } else {
            message(&frame);
        }
    }
}

/// Bodies of `long` bytes are put together outside of the decoder's buffer, as links do.
fn cut(wire: &[u8], step: usize, long: usize) -> (Vec<Frame>, Result<bool, WireError>) {
    let (mut decoder, mut buffer, mut frames) = (FrameDecoder::default(), BytesMut::new(), Vec::new());
    let mut body = Vec::new();
    for piece in wire.chunks(step.max(1)) {
        buffer.extend_from_slice(piece);
        loop {
            let awaited = decoder.awaited_body().filter(|len| *len >= long);
            let frame = match awaited {
                Some(len) => {
                    body.extend_from_slice(&buffer.split_to(buffer.len().min(len - body.len())));
                    if body.len() < len {
                        break;
                    }
                    decoder.complete(std::mem::take(&mut body).into())
                }
                None => decoder.next(&mut buffer),
            };
            match frame {
                Ok(Some(frame)) => frames.push(frame),
                // One that is skipped, or whose body is put together from now on.
                Ok(None) if awaited.is_some() || decoder.awaited_body().is_some_and(|len| len >= long) => {}
                Ok(None) => break,
                Err(error) => return (frames, Err(error)),
            }
        }
    }
    let is_between = decoder.is_between_frames(&buffer);
    (frames, Ok(is_between))
}

/// First two bytes: the kind of the message. Then the frame's body.
///
/// What is decoded is encoded to the same bytes.
pub fn messages(data: &[u8]) {
    let Some((kind, body)) = data.split_first_chunk() else { return };
    let body = Bytes::copy_from_slice(body);
    message(&Frame { kind: u16::from_le_bytes(*kind), flags: FLAG_CRITICAL, body });
}

fn message(frame: &Frame) {
    let decoded = within(message_memory(frame.body.len()), || Message::decode(frame));
    let Ok((tag, message)) = decoded else { return };
    assert_eq!(message.kind(), frame.kind);
    let again = message.to_frame(tag);
    assert_eq!(again.as_ref().map(|frame| &frame.body), Ok(&frame.body), "{message:?}");
    if let Message::Manage(manage) = &message {
        operations(&manage.operation);
    }
}

/// An encoded operation: what is decoded is encoded to the same bytes.
pub fn operations(data: &[u8]) {
    let decoded = within(message_memory(data.len()), || Operation::decode(data));
    if let Ok(operation) = decoded {
        assert_eq!(operation.encode().as_deref(), Ok(data), "{operation:?}");
    }
}

/// First byte: even, and the rest greets a server; odd, and the rest is what a server answers to an agent.
///
/// A greeting that is accepted is one: versions overlap, and the server has answered with its own, for the same purpose.
/// Memory: what came, not what is only claimed; and what a message may take once it is there.
pub fn handshake(data: &[u8]) {
    let Some((&side, wire)) = data.split_first() else { return };
    let has_message = !cut(wire, wire.len(), usize::MAX).0.is_empty();
    let bytes_max = if has_message { message_memory(wire.len()) } else { 16 * wire.len() + (128 << 10) };
    thread_local! {
        static RUNTIME: RefCell<Option<Runtime>> = const { RefCell::new(None) };
    }
    RUNTIME.with_borrow_mut(|runtime| {
        let runtime = runtime.get_or_insert_with(|| {
            let built = tokio::runtime::Builder::new_current_thread().enable_time().build();
            built.unwrap_or_else(|error| panic!("{error}"))
        });
        within(bytes_max, || {
            runtime.block_on(async { if side % 2 == 0 { greet_server(wire).await } else { greet_agent(wire).await } });
        });
    });
}

/// Our end of a connection on which `wire` has come, and the other end.
async fn arrived(wire: &[u8]) -> (DuplexStream, DuplexStream) {
    let (ours, mut theirs) = duplex(wire.len().max(4096));
    let written = theirs.write_all(wire).await.and(theirs.shutdown().await);
    assert!(written.is_ok());
    (ours, theirs)
}

async fn greet_server(wire: &[u8]) {
    let (ours, mut theirs) = arrived(wire).await;
    let mut connection: Connection = Box::new(ours);
    let greeted = accept(&mut connection, [7; 32]).await;
    drop(connection);
    let mut answer = Vec::new();
    assert!(theirs.read_to_end(&mut answer).await.is_ok());
    let (frames, _) = cut(&answer, answer.len(), usize::MAX);
    let answer = frames.first().and_then(|frame| Message::decode(frame).ok()).map(|(_, message)| message);
    match (greeted, answer) {
        (Ok(peer), Some(Message::Hello(ours))) => {
            assert!(peer.version_min <= PROTOCOL_VERSION && PROTOCOL_VERSION_MIN <= peer.version_max);
            assert_eq!((ours.nonce, ours.purpose), ([7; 32], peer.purpose));
        }
        (Ok(_), other) => assert!(other.is_none(), "a greeting was accepted, and answered with {other:?}"),
        (Err(_), None | Some(Message::Refused(_))) => {}
        (Err(error), other) => assert!(other.is_none(), "{error}, and yet {other:?}"),
    }
}

/// Connects to somebody who has said everything already.
struct Said(std::sync::Mutex<Option<DuplexStream>>);

impl Connector for Said {
    fn connect(&self, _: Option<String>) -> BoxFuture<'static, Result<Connection, ConnectFault>> {
        let stream = self.0.lock().ok().and_then(|mut stream| stream.take());
        let connection = stream.map(|stream| Box::new(stream) as Connection);
        Box::pin(async { connection.ok_or_else(|| ConnectFault::lasting("connected already")) })
    }

    fn target(&self) -> String {
        "fuzz".into()
    }
}

async fn greet_agent(wire: &[u8]) {
    let (ours, _theirs) = arrived(wire).await;
    let opened = open(&Said(std::sync::Mutex::new(Some(ours))), None, Purpose::Control).await;
    if let Ok((_, server)) = opened {
        assert!(server.version_min <= PROTOCOL_VERSION && PROTOCOL_VERSION_MIN <= server.version_max);
    }
}
