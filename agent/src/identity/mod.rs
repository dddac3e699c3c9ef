//! Who this machine is at each server, and how it recognises them.
//!
//! Per server a directory `CONFIG/servers/<host>_<port>/` (mode 700, files 600): `client.key` and `client.crt`, `ca.crt`
//! (the only authority believed for this server) and `server` (its address as text). The directory is exchanged as a
//! whole when the machine enrols, so that key and certificate always belong together.

mod certificate;
mod store;
mod tls;

use std::io;
use std::path::PathBuf;

use jiff::Timestamp;
use strandline_messages::ServerAddress;

pub use store::{Credentials, EnrolmentKey, Store, servers};
pub use tls::{authority_sent, client_config, enroll_client_config, explain, server_name};

/// Why this machine cannot show who it is, or cannot tell whom it is talking to.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// This machine is not enrolled there.
    #[error(
        "this machine is not enrolled at {server}: make a token there with `strand-server token create` and run \
         `strand enroll TOKEN`"
    )]
    NotEnrolled {
        /// The server.
        server: ServerAddress,
    },
    /// This machine's certificate has ended.
    #[error(
        "this machine's certificate for {server} expired at {}: enrol it again with a new token. Its backups are intact",
        time(*since_s)
    )]
    CertificateExpired {
        /// The server.
        server: ServerAddress,
        /// End of its validity, seconds since 1970.
        since_s: i64,
    },
    /// The private key can be read by others.
    #[error("{} can be read by other users: anybody could pose as this machine. Run `chmod 600` on it", path.display())]
    KeyExposed {
        /// The key file.
        path: PathBuf,
    },
    /// A file does not hold what it should.
    #[error("{} is damaged ({why}): enrol this machine again with a new token. Its backups are intact", path.display())]
    Damaged {
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        why: String,
    },
    /// A file could not be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// `read`, `write` or `create`.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The server's certificate has ended.
    #[error("the server's certificate expired{}: restart the server, it makes a new one; or correct this machine's clock", since(*since_s))]
    ServerCertificateExpired {
        /// End of its validity, seconds since 1970, if known.
        since_s: Option<i64>,
    },
    /// The server's certificate is not valid yet.
    #[error("the server's certificate is not valid yet: correct the clock of this machine or of the server")]
    ServerCertificateNotYetValid,
    /// The server has another name.
    #[error("the server does not go by the name {expected}: add it to `names` in its configuration")]
    ServerName {
        /// The name that was expected.
        expected: String,
    },
    /// The server proves itself by another authority.
    #[error(
        "this is not the server that this machine knows, or that the token was made on: its certificate comes from another authority. Nothing was sent"
    )]
    ServerUnknown,
    /// The server closed the door in the handshake.
    #[error(
        "the server refuses this machine's certificate ({alert}): it was revoked, has expired or belongs to another server; enrol again with a new token"
    )]
    Refused {
        /// The TLS alert.
        alert: String,
    },
    /// What the server sent at enrolment is not usable.
    #[error("the server's answer to the enrolment is not usable ({0}); nothing was stored")]
    Answer(&'static str),
    /// TLS could not be set up.
    #[error("TLS cannot be set up: {0}")]
    Setup(#[from] rustls::Error),
    /// A key or request could not be made.
    #[error("cannot make a key: {0}")]
    Key(#[from] rcgen::Error),
}

fn time(seconds: i64) -> String {
    Timestamp::from_second(seconds).map_or_else(|_| "an unknown time".to_owned(), |time| time.to_string())
}

fn since(seconds: Option<i64>) -> String {
    seconds.map_or_else(String::new, |seconds| format!(" at {}", time(seconds)))
}
