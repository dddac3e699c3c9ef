//! A repository's secrets on this machine: the keyset, the slots that wrap it, the key file and the recovery key.
//!
//! Nothing here is ever sent to a server except sealed slots and public halves.

mod key_file;
mod keyset;
mod recovery;
mod slots;

use std::path::PathBuf;

use strandline_messages::RepositoryId;
use strandline_messages::format::FormatError;

pub use key_file::{key_file_path, load_key_file, store_key_file};
pub use keyset::Keyset;
pub(crate) use keyset::{WRAP_X25519_HPKE, verify, verify_certificate};
pub use recovery::{format_recovery_key, parse_recovery_key};
pub use slots::{SlotSecret, Unlocked, open_slot, seal_slot, unlock};

/// Why a repository's keys cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The operating system gave no random bytes.
    #[error("the operating system gives no random bytes ({0}); nothing was written; try again")]
    Random(getrandom::Error),
    /// The key file holds something else than 64 hexadecimal digits.
    #[error(
        "the key file {path} is malformed: it must hold 64 hexadecimal digits and nothing else; the repository is \
         intact; restore the file from a copy, or open the repository with its passphrase or recovery key"
    )]
    MalformedKeyFile {
        /// The file.
        path: PathBuf,
    },
    /// There is a key file already.
    #[error("the key file {path} exists already and was left as it is; move it away if it is no longer needed")]
    KeyFileExists {
        /// The file.
        path: PathBuf,
    },
    /// The key file cannot be read or written.
    #[error("{doing} {path} failed: {source}")]
    Io {
        /// What was tried, as "reading" or "writing".
        doing: &'static str,
        /// The file or directory.
        path: PathBuf,
        /// The system's answer.
        source: std::io::Error,
    },
    /// No key slot opened with what was given.
    #[error(
        "wrong key: {tried}; the repository is intact; give the right --password-file or --key-file, or the recovery \
         key that was printed when the repository was made"
    )]
    WrongKey {
        /// What was tried, for people.
        tried: String,
    },
    /// The opened keyset is not the repository's.
    #[error(
        "the keys belong to repository {found}, not to {expected}, or the repository file was replaced; nothing was \
         written; do not back up to it before you know why"
    )]
    ForeignRepository {
        /// The repository that was opened.
        expected: RepositoryId,
        /// The repository that the keys were made for.
        found: RepositoryId,
    },
    /// The keyset's parts contradict one another.
    #[error("the keyset is inconsistent: {why}; the repository's data is intact; use another key slot")]
    Inconsistent {
        /// What is wrong.
        why: &'static str,
    },
    /// A key slot or keyset cannot be decoded.
    #[error("{0}; the repository's data is intact; use another key slot")]
    Format(#[from] FormatError),
    /// A passphrase slot's parameters are impossible, or its memory cannot be had.
    #[error("the passphrase cannot be processed: {why}; the repository is intact; use another key slot")]
    Derivation {
        /// What Argon2id answered.
        why: String,
    },
    /// This keyset may not do that.
    #[error("this key may not {what}: it has no such capability; use a key with the full capability")]
    Capability {
        /// What was asked for.
        what: &'static str,
    },
    /// This keyset may only write.
    #[error("this key may only write, so it cannot {what}; use a key with the read or the full capability")]
    WriteOnly {
        /// What was asked for.
        what: &'static str,
    },
    /// This keyset may only read.
    #[error("this key may only read, so it cannot {what}; use a key with the write or the full capability")]
    ReadOnly {
        /// What was asked for.
        what: &'static str,
    },
    /// A text is not a recovery key.
    #[error("this is not a recovery key: {why}; compare it with the printed one, group by group")]
    RecoveryKey {
        /// What is wrong with it.
        why: String,
    },
}

impl KeyError {
    /// Whether the process should end with exit code 12 (wrong key) rather than 1: another key would help.
    pub fn is_wrong_key(&self) -> bool {
        matches!(
            self,
            Self::MalformedKeyFile { .. }
                | Self::WrongKey { .. }
                | Self::ForeignRepository { .. }
                | Self::RecoveryKey { .. }
                | Self::Capability { .. }
                | Self::WriteOnly { .. }
                | Self::ReadOnly { .. }
        )
    }
}

/// `N` bytes from the operating system.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], KeyError> {
    let mut bytes = [0; N];
    getrandom::fill(&mut bytes).map_err(KeyError::Random)?;
    Ok(bytes)
}
