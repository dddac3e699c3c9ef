//! Connections as actors see them: boxed byte streams with a greeting. TCP, TLS and pipes are made elsewhere.

use std::time::Duration;

use bytes::{BufMut, BytesMut};
use futures_util::future::BoxFuture;
use strandline_messages::identity::AuthorityHash;
use strandline_messages::limits;
use strandline_messages::wire::frame::{FLAG_CRITICAL, HEADER_BYTES};
use strandline_messages::wire::message::is_known_kind;
use strandline_messages::wire::{
    Frame, FrameHeader, Hello, Message, PROTOCOL_VERSION, PROTOCOL_VERSION_MIN, Purpose, RefusalCode, Refused, Tag,
    WireError,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// How long a greeting may take before the connection is given up.
pub const GREETING_TIMEOUT: Duration = Duration::from_secs(20);

/// Room that is made at a time while one message is read, bytes.
const READ_BYTES: usize = 16 << 10;

/// A bidirectional byte stream: a TLS connection or an in-process pipe.
pub trait Transport: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Transport for T {}

/// A connection that some actor owns.
pub type Connection = Box<dyn Transport>;

/// Limits an agent's upload, shared by all of its streams. `None`: as fast as it goes.
pub type UploadLimit = Option<std::sync::Arc<governor::DefaultDirectRateLimiter>>;

/// Why a connection could not be made.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{message}")]
pub struct ConnectFault {
    /// For people: what was tried and what happened.
    pub message: String,
    /// Whether trying again may help. A wrong certificate stays wrong.
    pub retry: bool,
    /// The server's refusal, if it refused.
    pub refusal: Option<Refused>,
}

impl ConnectFault {
    /// A fault that may pass.
    pub fn passing(message: impl Into<String>) -> Self {
        Self { message: message.into(), retry: true, refusal: None }
    }

    /// A fault that stays.
    pub fn lasting(message: impl Into<String>) -> Self {
        Self { message: message.into(), retry: false, refusal: None }
    }
}

/// Makes connections to one server.
pub trait Connector: Send + Sync + 'static {
    /// A connection that has not been greeted. `address`: a data address from `SessionOpened`, else the server's own.
    fn connect(&self, address: Option<String>) -> BoxFuture<'static, Result<Connection, ConnectFault>>;

    /// What is connected to, for people.
    fn target(&self) -> String;

    /// Who vouches for the server; nobody does within one process. Proofs are bound to it.
    fn authority(&self) -> Option<AuthorityHash> {
        None
    }

    /// What an error on a connection of this connector means, where it knows better than the error itself.
    fn explain(&self, _error: &std::io::Error) -> Option<ConnectFault> {
        None
    }
}

/// A `Hello` of this program.
pub fn hello(purpose: Purpose, nonce: [u8; 32]) -> Hello {
    Hello {
        version_min: PROTOCOL_VERSION_MIN,
        version_max: PROTOCOL_VERSION,
        capabilities: 0,
        software: concat!("strandline ", env!("CARGO_PKG_VERSION")).to_owned(),
        nonce,
        purpose,
    }
}

/// Connects and greets. Gives the connection and the server's `Hello`.
pub async fn open(
    connector: &dyn Connector,
    address: Option<String>,
    purpose: Purpose,
) -> Result<(Connection, Hello), ConnectFault> {
    let mut connection = connector.connect(address).await?;
    let greeting = async {
        write_message(&mut connection, &Message::Hello(hello(purpose, [0; 32]))).await?;
        read_message(&mut connection).await
    };
    let greeted = tokio::time::timeout(GREETING_TIMEOUT, greeting).await;
    let target = connector.target();
    match greeted {
        Err(_) => Err(ConnectFault::passing(format!("{target} does not answer"))),
        Ok(Err(error)) => {
            let explained = if let LinkError::Io(error) = &error { connector.explain(error) } else { None };
            Err(explained.unwrap_or_else(|| ConnectFault::passing(format!("{target}: {error}"))))
        }
        Ok(Ok(Message::Hello(peer))) => match check_versions(&peer) {
            Ok(()) => Ok((connection, peer)),
            Err(error) => Err(ConnectFault::lasting(format!("{target}: {error}"))),
        },
        Ok(Ok(Message::Refused(refusal))) => Err(ConnectFault {
            message: format!("{target} refused the connection: {refusal}"),
            // The machine's other connections end some time.
            retry: matches!(refusal.code, RefusalCode::Stopping | RefusalCode::Full),
            refusal: Some(refusal),
        }),
        Ok(Ok(other)) => Err(ConnectFault::lasting(format!("{target} greeted with {}", other.name()))),
    }
}

/// Answers a greeting. Gives the client's `Hello`.
pub async fn accept(connection: &mut Connection, nonce: [u8; 32]) -> Result<Hello, LinkError> {
    let greeting = async {
        let Message::Hello(peer) = read_message(connection).await? else {
            return Err(WireError::Unexpected { what: "message", why: "a connection begins with Hello" }.into());
        };
        if let Err(error) = check_versions(&peer) {
            let refusal = Refused::new(RefusalCode::Version, error.to_string());
            write_message(connection, &Message::Refused(refusal)).await?;
            return Err(error.into());
        }
        write_message(connection, &Message::Hello(hello(peer.purpose, nonce))).await?;
        Ok(peer)
    };
    tokio::time::timeout(GREETING_TIMEOUT, greeting).await.map_err(|_| LinkError::Silent)?
}

fn check_versions(peer: &Hello) -> Result<(), WireError> {
    if peer.version_min <= PROTOCOL_VERSION && PROTOCOL_VERSION_MIN <= peer.version_max {
        Ok(())
    } else {
        Err(WireError::NoCommonVersion { min: peer.version_min, max: peer.version_max })
    }
}

/// Why reading or writing ended.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The operating system or TLS says so.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The peer does not speak the protocol.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The peer said nothing for too long.
    #[error("the peer said nothing for {} s", GREETING_TIMEOUT.as_secs())]
    Silent,
}

/// Writes one message and flushes.
pub async fn write_message<W: AsyncWrite + Unpin>(writer: &mut W, message: &Message) -> Result<(), LinkError> {
    let frame = message.to_frame(Tag::default())?;
    writer.write_all(&frame.encode()).await?;
    writer.flush().await?;
    Ok(())
}

/// Reads exactly one message, not a byte more. For greetings and enrolments: the peer may be anybody, so their length has a
/// limit of its own, and memory grows with what comes, not with what the header claims.
pub async fn read_message<R: AsyncRead + Unpin>(reader: &mut R) -> Result<Message, LinkError> {
    loop {
        let mut header = [0; HEADER_BYTES];
        reader.read_exact(&mut header).await?;
        let header = FrameHeader::decode(header)?;
        if header.len as usize > limits::GREETING_BYTES_MAX {
            let (found, max) = (header.len.into(), limits::GREETING_BYTES_MAX as u64);
            return Err(WireError::FrameTooLong { kind: header.kind, found, max }.into());
        }
        let body = read_body(reader, header.len as usize).await?;
        // A kind that this version does not know is skipped unless it is critical, as on every connection.
        if is_known_kind(header.kind) || header.flags & FLAG_CRITICAL != 0 {
            let frame = Frame { kind: header.kind, flags: header.flags, body: body.freeze() };
            return Ok(Message::decode(&frame)?.1);
        }
    }
}

/// The next `len` bytes.
async fn read_body<R: AsyncRead + Unpin>(reader: &mut R, len: usize) -> Result<BytesMut, LinkError> {
    let mut body = BytesMut::new();
    while body.len() < len {
        let room = (len - body.len()).min(READ_BYTES);
        body.reserve(room);
        if reader.read_buf(&mut (&mut body).limit(room)).await? == 0 {
            return Err(std::io::Error::from(std::io::ErrorKind::UnexpectedEof).into());
        }
    }
    Ok(body)
}
