//! How a command ended: exit codes.

use strandline_actors::control_channel::AskError;
use strandline_messages::wire::RefusalCode;

use crate::embedded::EmbeddedError;
use crate::job::JobError;
use crate::keys::KeyError;
use crate::net::ClientError;
use crate::restore::RestoreError;

/// Nothing, or nothing useful, was done.
pub const FATAL: u8 = 1;
const PARTIAL: u8 = 3;
const NO_REPOSITORY: u8 = 10;
const BUSY: u8 = 11;
const WRONG_KEY: u8 = 12;
const INTERRUPTED: u8 = 130;

/// How a command that did its work ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// Everything was done.
    Done,
    /// Some source data could not be read, or some files could not be restored.
    Partial,
}

impl Fate {
    /// The exit code.
    pub fn code(self) -> u8 {
        match self {
            Self::Done => 0,
            Self::Partial => PARTIAL,
        }
    }
}

/// The user stopped the command.
#[derive(Debug, thiserror::Error)]
#[error("interrupted; {0}")]
pub struct Interrupted(pub &'static str);

/// The exit code that an error stands for.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    error.chain().find_map(of_cause).unwrap_or(FATAL)
}

fn of_cause(cause: &(dyn std::error::Error + 'static)) -> Option<u8> {
    if let Some(job) = cause.downcast_ref::<JobError>() {
        return match job {
            JobError::Interrupted => Some(INTERRUPTED),
            JobError::Client(client) => of_client(client),
            _ => None,
        };
    }
    if cause.is::<Interrupted>() {
        return Some(INTERRUPTED);
    }
    if let Some(client) = cause.downcast_ref::<ClientError>() {
        return of_client(client);
    }
    if let Some(ask) = cause.downcast_ref::<AskError>() {
        return of_ask(ask);
    }
    if let Some(key) = cause.downcast_ref::<KeyError>() {
        return key.is_wrong_key().then_some(WRONG_KEY);
    }
    if let Some(RestoreError::Busy { .. }) = cause.downcast_ref::<RestoreError>() {
        return Some(BUSY);
    }
    match cause.downcast_ref::<EmbeddedError>() {
        Some(EmbeddedError::Missing { .. }) => Some(NO_REPOSITORY),
        Some(error) if error.is_busy() => Some(BUSY),
        _ => None,
    }
}

fn of_client(error: &ClientError) -> Option<u8> {
    match error {
        ClientError::Ask(ask) => of_ask(ask),
        ClientError::Key(key) => key.is_wrong_key().then_some(WRONG_KEY),
        _ => None,
    }
}

fn of_ask(error: &AskError) -> Option<u8> {
    match error {
        AskError::Refused(refusal) => match refusal.code {
            RefusalCode::NoSuchRepository => Some(NO_REPOSITORY),
            RefusalCode::Superseded => Some(BUSY),
            _ => None,
        },
        _ => None,
    }
}
