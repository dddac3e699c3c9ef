//! The protocol's decisions, as pure machines.
//!
//! A machine is a plain value. It is told what happened and when (`handle`-like methods with `now` as an argument), it
//! returns what to do, and it does nothing itself: no I/O, no clock, no randomness but a seed that it is given. So the
//! actors stay thin, and every decision can be tested by the million without sockets or waiting.
//!
//! | machine | decides | whose |
//! |---|---|---|
//! | [`gap_tracker::GapTracker`] | what of a session is durable, what is missing, whether it is complete | server's session |
//! | [`send_window::SendWindow`] | which block goes next on which stream, and when a block may be forgotten | agent's dispatcher |
//! | [`stream::StreamMachine`] | the life of one data connection, to its orderly close | both sides |
//! | [`session::SessionMachine`] | the life of one session, to its one terminal state | server's session |
//! | [`fetch::FetchQueue`] | which block a restore is sent next, within the agent's credit | server's session |
//! | [`maintenance::MaintenanceMachine`] | which job of maintenance runs next, and when | server's maintenance |
//! | [`retention::Policy`] | which snapshots are kept, and why | agent's `forget`, server's own policy |
//! | [`reconnect::Reconnect`] | when to try again after a failure, and when to give up | everyone who connects |

pub mod fetch;
pub mod gap_tracker;
pub mod maintenance;
pub mod reconnect;
pub mod retention;
pub mod send_window;
pub mod session;
pub mod stream;
pub mod stream_ledger;
