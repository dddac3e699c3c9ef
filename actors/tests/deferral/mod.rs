//! Scenario 18 on a connection: a server that asks to wait is asked again, whatever it was asked. No server of this version
//! defers; agents of this version obey those of later ones.

use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, Addr};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use strandline_actors::control_channel::{AskServer, CloseChannel, ControlChannel, ForgetSession};
use strandline_actors::machines::reconnect::Policy;
use strandline_actors::runtime::transport::{ConnectFault, Connection, Connector, hello};
use strandline_messages::wire::{
    Attached, Defer, Frame, FrameDecoder, Message, OpenSession, Pong, Purpose, RefusalCode, Refused, SessionOpened, Tag,
};
use strandline_messages::{Incarnation, SessionId, SessionToken};
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::support::begin;

/// Longer than silence is borne, so that the connection must be kept alive meanwhile.
const ASKED_TO_WAIT: Duration = Duration::from_mins(5);

/// Gives the other end of each connection to whoever plays the server.
struct Pipes(mpsc::Sender<DuplexStream>);

impl Connector for Pipes {
    fn connect(&self, _: Option<String>) -> BoxFuture<'static, Result<Connection, ConnectFault>> {
        let (ours, theirs) = tokio::io::duplex(64 << 10);
        self.0.try_send(theirs).unwrap();
        async { Ok(Box::new(ours) as Connection) }.boxed()
    }

    fn target(&self) -> String {
        "a server that defers".into()
    }
}

/// One connection as a test that plays the server sees it.
struct Seat {
    pipe: DuplexStream,
    decoder: FrameDecoder,
    buffer: bytes::BytesMut,
}

impl Seat {
    /// The next connection, greeted.
    async fn take(connections: &mut mpsc::Receiver<DuplexStream>) -> Self {
        let pipe = connections.recv().await.unwrap();
        let mut seat = Self { pipe, decoder: FrameDecoder::default(), buffer: bytes::BytesMut::new() };
        let (tag, greeting) = seat.hear().await;
        assert!(matches!(greeting, Message::Hello(_)), "{greeting:?}");
        seat.say(tag, &Message::Hello(hello(Purpose::Control, [9; 32]))).await;
        seat
    }

    async fn say(&mut self, tag: Tag, message: &Message) {
        self.pipe.write_all(&message.to_frame(tag).unwrap().encode()).await.unwrap();
    }

    async fn frame(&mut self) -> Frame {
        loop {
            if let Some(frame) = self.decoder.next(&mut self.buffer).unwrap() {
                return frame;
            }
            assert!(self.pipe.read_buf(&mut self.buffer).await.unwrap() > 0, "the agent has closed");
        }
    }

    /// What the agent asks; pings are answered.
    async fn hear(&mut self) -> (Tag, Message) {
        loop {
            match Message::decode(&self.frame().await).unwrap() {
                (tag, Message::Ping(ping)) => self.say(tag, &Message::Pong(Pong { stamp: ping.stamp })).await,
                heard => return heard,
            }
        }
    }

    /// Asks whoever asks to wait, expects the same again not before, and then answers.
    async fn defer_then_answer(&mut self, answer: Message) -> Message {
        let (tag, asked) = self.hear().await;
        let since = Instant::now();
        let milliseconds = u64::try_from(ASKED_TO_WAIT.as_millis()).unwrap();
        self.say(tag, &Message::Defer(Defer { milliseconds })).await;
        assert_eq!(self.hear().await, (tag, asked.clone()), "something else is asked");
        let waited = since.elapsed();
        assert!(waited >= ASKED_TO_WAIT && waited < 2 * ASKED_TO_WAIT, "{waited:?}");
        self.say(tag, &answer).await;
        asked
    }
}

fn opened() -> SessionOpened {
    SessionOpened {
        session: SessionId([1; 16]),
        token: SessionToken([2; 32]),
        incarnation: Incarnation(0),
        window_bytes: 1 << 20,
        max_streams: 4,
        data_addresses: Vec::new(),
    }
}

/// Runs a test on a clock that stands still while anybody works; some hours on it are a hang.
fn held(test: impl Future<Output = ()>) {
    let runtime = || tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    let bounded = async { tokio::time::timeout(Duration::from_hours(4), test).await };
    actix_rt::System::with_tokio_rt(runtime).block_on(bounded).unwrap();
}

#[test]
fn s18_whatever_is_deferred_is_asked_again_later_on_the_same_connection() {
    held(async {
        let (pipes, mut connections) = mpsc::channel(4);
        // One failure would be one too many: waiting is none.
        let patience = Policy { attempts_max: 1, ..Policy::default() };
        let channel: Addr<ControlChannel> = ControlChannel::new(Arc::new(Pipes(pipes)), patience, patience, 7).start();

        let opening = actix_rt::spawn(channel.send(begin(None)));
        let mut seat = Seat::take(&mut connections).await;
        let asked = seat.defer_then_answer(Message::SessionOpened(opened())).await;
        assert!(matches!(asked, Message::OpenSession(OpenSession { resume_of: None, .. })), "{asked:?}");
        assert_eq!(opening.await.unwrap().unwrap().unwrap(), opened());

        let asking = actix_rt::spawn(channel.send(AskServer(Message::GetStatus)));
        seat.defer_then_answer(Message::RepositoryCreated).await;
        assert_eq!(asking.await.unwrap().unwrap().unwrap(), Message::RepositoryCreated);

        // The connection is cut: what comes after it begins with an attachment.
        drop(seat);
        let asking = actix_rt::spawn(channel.send(AskServer(Message::GetStatus)));
        let mut seat = Seat::take(&mut connections).await;
        let attached = Attached { incarnation: Incarnation(1), watermark: 0, ranges: Vec::new() };
        let asked = seat.defer_then_answer(Message::Attached(attached)).await;
        assert!(matches!(asked, Message::Attach(_)), "{asked:?}");
        let (tag, asked) = seat.hear().await;
        assert_eq!(asked, Message::GetStatus);
        seat.say(tag, &Message::RepositoryCreated).await;
        assert_eq!(asking.await.unwrap().unwrap().unwrap(), Message::RepositoryCreated);

        channel.do_send(CloseChannel);
    });
}

#[test]
fn s18_a_session_that_is_forgotten_while_its_attachment_waits_holds_nothing_up() {
    held(async {
        let (pipes, mut connections) = mpsc::channel(4);
        let channel: Addr<ControlChannel> =
            ControlChannel::new(Arc::new(Pipes(pipes)), Policy::default(), Policy::default(), 7).start();
        // The attachment is asked to wait, or answered after the session was forgotten.
        for answer in [
            Message::Defer(Defer { milliseconds: 300_000 }),
            Message::Refused(Refused::new(RefusalCode::NoSuchSession, "forgotten here, too")),
        ] {
            let opening = actix_rt::spawn(channel.send(begin(None)));
            let mut seat = Seat::take(&mut connections).await;
            let (tag, _) = seat.hear().await;
            seat.say(tag, &Message::SessionOpened(opened())).await;
            opening.await.unwrap().unwrap().unwrap();
            drop(seat);
            let mut seat = Seat::take(&mut connections).await;
            let (tag, asked) = seat.hear().await;
            assert!(matches!(asked, Message::Attach(_)), "{asked:?}");
            channel.do_send(ForgetSession);
            let asking = actix_rt::spawn(channel.send(AskServer(Message::GetStatus)));
            seat.say(tag, &answer).await;
            let (tag, asked) = seat.hear().await;
            assert_eq!(asked, Message::GetStatus, "after {answer:?}");
            seat.say(tag, &Message::RepositoryCreated).await;
            assert_eq!(asking.await.unwrap().unwrap().unwrap(), Message::RepositoryCreated);
            // The next round begins on a connection of its own.
            drop(seat);
        }
    });
}
