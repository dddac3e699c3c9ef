//! Bugs planted on purpose, so that tests can show that the simulated world finds them.
//!
//! A place that could have one asks [`here`]. Unless the feature `planted-bugs` is on, which only test programs turn on,
//! the answer is no when the compiler asks, and nothing of it is left in the program.

macro_rules! bugs {
    ($($(#[$meaning:meta])* $name:ident,)*) => {
        /// A mistake that somebody could make, or has made.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Bug {
            $($(#[$meaning])* $name,)*
        }

        /// Every one of them.
        pub const ALL: &[Bug] = &[$(Bug::$name,)*];
    };
}

bugs! {
    /// Credit that was lost with the control connection is not told again.
    LosesCreditWithConnections,
    /// What a dead stream carried is not sent by others (s04).
    ForgetsWhatADeadStreamCarried,
    /// What a lost session had in flight is not sent to the next one.
    ForgetsWhatTheOldSessionCarried,
    /// The commit declares one block less than there are (s09).
    DeclaresOneBlockLess,
    /// The commit does not wait for the watermark (s09, s16).
    CommitsBeforeTheWatermark,
    /// The watermark is one too high (s10).
    AcknowledgesOneTooMany,
    /// Everything up to the highest durable block is acknowledged (s05).
    AcknowledgesGaps,
    /// Who asks for a commit's outcome after the end gets no answer (s06).
    ForgetsTheOutcome,
    /// The grace timer goes on after the agent is back (s07).
    KeepsTheGraceTimer,
    /// Sessions that everybody has left stay for ever.
    NeverExpires,
    /// An agent that never heard the answer to its attachment is refused.
    CountsUnheardIncarnations,
    /// A copy of a durable block that cannot be stored ends the session that commits.
    DiesOfALateCopy,
    /// A connection that ends before it belongs to the session counts for ever.
    OverlooksDeadConnections,
    /// A stalled stream is never given up (s22).
    WaitsForStalledStreams,
    /// A stalled control connection is never given up (s22).
    WaitsForAStalledServer,
    /// Idle streams are taken for dead (s14).
    NeverPings,
    /// A stream that failed never lets go of its socket (s02).
    LeavesSocketsBehind,
    /// A stream closes before its drain was answered (s02).
    ClosesBeforeItIsDrained,
    /// A lost stream stays lost.
    NeverReplacesStreams,
    /// A stream never has room again.
    ForgetsWhatWasWritten,
    /// Requests whose connection was lost are not asked again (s06).
    ForgetsUnansweredRequests,
    /// A commit is asked of the next session with the count of the last one.
    CommitsWithTheOldCount,
    /// The next session does not say which one it carries on for.
    ForgetsTheOldSession,
    /// Failures hours apart are added up (s12).
    NeverEndsAnIncident,
    /// The agent is told of a session that streams cannot join yet (s01).
    AnswersBeforeItRegisters,
    /// Blocks that were lost on the way to a restore are not asked for again.
    NeverFetchesAgain,
    /// A fetch that is asked again over another connection is served again, and its blocks are counted twice.
    ServesTheSameFetchTwice,
    /// What was lost with a stream keeps its credit.
    LosesCreditWithStreams,
    /// Storage confirms before it syncs (s05, s26).
    ConfirmsBeforeItSyncs,
    /// Storage confirms although the disk reported an error (s29).
    ConfirmsInSpiteOfErrors,
    /// Chunks count as known as soon as they are written.
    KnowsWhatIsNotDurable,
}

/// Whether this bug is planted.
#[cfg(not(feature = "planted-bugs"))]
#[inline]
pub const fn here(_: Bug) -> bool {
    false
}

#[cfg(feature = "planted-bugs")]
thread_local! {
    static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Whether this bug is planted on this thread.
#[cfg(feature = "planted-bugs")]
pub fn here(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Plants a bug on this thread instead of the one before; `None`: none.
#[cfg(feature = "planted-bugs")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}
