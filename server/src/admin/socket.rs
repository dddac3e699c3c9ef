//! The socket `DATA/admin.sock`: one JSON line in, one JSON line out, then the connection closes. An answer that takes long is
//! preceded by spaces, one every 15 s, so that the client knows that the server is at work.
//!
//! Only the user that runs the server, and root, are answered: by the socket's mode and again by the peer's credentials.

use std::convert::Infallible;
use std::fs::{self, File, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;

use super::{AdminHandler, AdminReply, AdminRequest};

/// The socket's name inside the data directory.
pub const SOCKET_NAME: &str = "admin.sock";
/// Longest request, bytes.
const REQUEST_BYTES_MAX: u64 = 64 << 10;
/// Longest reply that a client reads, bytes: some 200,000 agents.
const REPLY_BYTES_MAX: u64 = 64 << 20;
/// Connections served at once; more wait in the kernel's queue.
const CONNECTIONS_MAX: usize = 16;
/// A connection on which nothing arrives, or nothing is taken, for this long is given up.
const PROGRESS_TIMEOUT: Duration = Duration::from_secs(10);
/// A client waits this long for the next byte of an answer.
const ANSWER_TIMEOUT: Duration = if cfg!(test) { Duration::from_secs(2) } else { Duration::from_mins(2) };
/// While the server is at work it says so this often, by a space in front of the answer.
const ALIVE_EVERY: Duration = if cfg!(test) { Duration::from_millis(100) } else { Duration::from_secs(15) };
/// Longest path that a socket address holds, bytes, with room for the terminator.
const SOCKET_PATH_BYTES_MAX: usize = 107;

/// Why the socket did not work.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// No server listens there.
    #[error("no server is running on {}", path.display())]
    NotRunning {
        /// The data directory.
        path: PathBuf,
    },
    /// The socket could not be used.
    #[error("the server's administration socket in {} cannot be used: {source}", path.display())]
    Io {
        /// The data directory.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The answer is not one.
    #[error("the server's answer cannot be understood ({0}): are program and server of the same version?")]
    Reply(String),
}

/// The listening socket; its file is removed when this is dropped.
#[derive(Debug)]
pub struct AdminSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl AdminSocket {
    /// Listens in `data`, whose lock the caller holds: a socket left there is nobody's.
    pub fn bind(data: &Path) -> Result<Self, AdminError> {
        let failed = |source| AdminError::Io { path: data.to_owned(), source };
        let path = data.join(SOCKET_NAME);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(failed(error)),
            _ => {}
        }
        let address = Address::of(data).map_err(failed)?;
        let listener = UnixListener::bind(&address.path).map_err(failed)?;
        fs::set_permissions(&path, Permissions::from_mode(0o600)).map_err(failed)?;
        Ok(Self { listener, path })
    }

    /// Answers until dropped. At most 16 connections at a time.
    pub async fn serve<H: AdminHandler>(&self, handler: &H) -> Infallible {
        let mut connections = FuturesUnordered::new();
        loop {
            tokio::select! {
                accepted = self.listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                    Ok((stream, _)) => connections.push(answer(stream, handler)),
                    Err(error) => {
                        tracing::warn!(%error, "administration socket: cannot accept");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                    }
                },
                Some(result) = connections.next(), if !connections.is_empty() => {
                    if let Err(error) = result {
                        tracing::debug!(%error, "administration connection ended early");
                    }
                }
            }
        }
    }
}

impl Drop for AdminSocket {
    fn drop(&mut self) {
        // Left behind it does no harm: the next server removes it.
        let _ = fs::remove_file(&self.path);
    }
}

async fn answer<H: AdminHandler>(mut stream: UnixStream, handler: &H) -> io::Result<()> {
    let peer = stream.peer_cred()?.uid();
    if peer != 0 && peer != rustix::process::geteuid().as_raw() {
        return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("user {peer} is not the server's")));
    }
    let line = read_line(&mut stream, REQUEST_BYTES_MAX, PROGRESS_TIMEOUT).await?;
    let reply = match serde_json::from_slice::<AdminRequest>(&line) {
        Ok(request) => at_work(&mut stream, handler.handle(request)).await,
        Err(error) => AdminReply::Failed {
            exit_code: 1,
            message: format!("the request cannot be understood ({error}): are program and server of the same version?"),
        },
    };
    write_line(&mut stream, &serde_json::to_vec(&reply)?).await
}

/// Waits for the answer and tells the client so. A client that has gone away does not stop what it asked for.
async fn at_work<T>(stream: &mut UnixStream, answer: impl Future<Output = T>) -> T {
    let mut answer = std::pin::pin!(answer);
    loop {
        match timeout(ALIVE_EVERY, &mut answer).await {
            Ok(answer) => return answer,
            // Non-blocking: a space that finds no room was preceded by many.
            Err(_) => drop(stream.try_write(b" ")),
        }
    }
}

/// Asks the server that runs on `data`.
pub async fn ask(data: &Path, request: &AdminRequest) -> Result<AdminReply, AdminError> {
    let failed = |source: io::Error| match source.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => AdminError::NotRunning { path: data.to_owned() },
        _ => AdminError::Io { path: data.to_owned(), source },
    };
    let address = Address::of(data).map_err(failed)?;
    let mut stream = UnixStream::connect(&address.path).await.map_err(failed)?;
    let request = serde_json::to_vec(request).map_err(|error| AdminError::Reply(error.to_string()))?;
    write_line(&mut stream, &request).await.map_err(failed)?;
    let line = read_line(&mut stream, REPLY_BYTES_MAX, ANSWER_TIMEOUT).await.map_err(failed)?;
    serde_json::from_slice(&line).map_err(|error| AdminError::Reply(error.to_string()))
}

/// Reads up to the end of a line or of the stream, at most `max` bytes, giving up after `patience` without a byte.
async fn read_line(stream: &mut UnixStream, max: u64, patience: Duration) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    loop {
        let read = timeout(patience, stream.read_buf(&mut line)).await?;
        if read? == 0 || line.last() == Some(&b'\n') {
            return Ok(line);
        }
        if line.len() as u64 > max {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "the line is too long"));
        }
    }
}

async fn write_line(stream: &mut UnixStream, line: &[u8]) -> io::Result<()> {
    for piece in line.chunks(64 << 10).chain([b"\n".as_slice()]) {
        timeout(PROGRESS_TIMEOUT, stream.write_all(piece)).await??;
    }
    stream.shutdown().await
}

/// The socket's path as a socket address holds it. A longer one goes through an open descriptor of its directory.
struct Address {
    path: PathBuf,
    _directory: Option<File>,
}

impl Address {
    fn of(data: &Path) -> io::Result<Self> {
        let path = data.join(SOCKET_NAME);
        if path.as_os_str().len() <= SOCKET_PATH_BYTES_MAX {
            return Ok(Self { path, _directory: None });
        }
        let directory = File::open(data)?;
        let path = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(SOCKET_NAME);
        Ok(Self { path, _directory: Some(directory) })
    }
}
