//! The real actors of both sides over in-process pipes: nothing but storage, TLS and the network is imitated.

#![expect(
    clippy::unwrap_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "tests; helpers are not `#[test]` functions"
)]

mod deferral;
mod support;

use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::future::join_all;
use strandline_actors::control_channel::{AskError, AskServer};
use strandline_actors::machines::session::Terminal;
use strandline_messages::wire::{Message, QueryChunks, RefusalCode, join_ids};
use support::{Agent, Break, Cut, POISON, Pipes, Server};

/// Bounds a whole test: a hang is a failure, not a wait.
async fn within<T>(seconds: u64, work: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(seconds), work).await.unwrap_or_else(|_| panic!("the test hangs"))
}

#[actix_rt::test]
async fn s01_a_thousand_sessions_of_twelve_streams_at_once_see_no_refused_join() {
    let server = Server::start(12);
    let backups = (0..1000).map(|_| {
        let pipes = Pipes::new(server.clone(), 4096, Vec::new());
        async move {
            let agent = Agent::begin(pipes.clone(), 12).await.unwrap();
            let counters = agent.counters.clone();
            agent.back_up(24, 64).await.unwrap();
            assert_eq!(counters.reconnects.load(Ordering::Relaxed), 0, "a join was refused or a stream was lost");
            assert_eq!(pipes.made(), 13, "twelve streams and one control connection, each made once");
        }
    });
    within(300, join_all(backups)).await;
    let kept = server.host.kept.lock();
    assert_eq!(kept.snapshots.len(), 1000);
    assert!(kept.blocks.values().all(|blocks| blocks.len() == 24));
    assert!(kept.ended.is_empty(), "a committed session has no other end");
}

#[actix_rt::test]
async fn s02_after_the_last_acknowledgement_nothing_reconnects() {
    let server = Server::start(8);
    let pipes = Pipes::new(server, 64 << 10, Vec::new());
    let agent = Agent::begin(pipes.clone(), 8).await.unwrap();
    within(60, agent.back_up(500, 4000)).await.unwrap();
    assert_eq!(pipes.made(), 9);
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(pipes.made(), 9, "a stream came back after everything was acknowledged");
}

#[actix_rt::test]
async fn s04_streams_that_die_one_after_another_lose_nothing() {
    let server = Server::start(6);
    let cut = |connection: u32| Cut {
        connection,
        writing: connection.is_multiple_of(2),
        after: 200 + 977 * connection as usize % 6000,
        how: if connection.is_multiple_of(3) { Break::Finish } else { Break::Reset },
    };
    let pipes = Pipes::new(server.clone(), 16 << 10, (1..60).map(cut).collect());
    let agent = Agent::begin(pipes.clone(), 6).await.unwrap();
    within(120, agent.back_up(400, 2000)).await.unwrap();
    let kept = server.host.kept.lock();
    let blocks = kept.blocks.values().next().unwrap();
    assert_eq!(blocks.len(), 400);
    assert!(blocks.iter().all(|(sequence, block)| block[..8] == sequence.to_le_bytes()), "a number, another block");
    assert_eq!(kept.snapshots.len(), 1);
}

/// One short session with one cut; gives whether the cut was reached at all.
async fn short_session(cut: Cut) -> bool {
    let server = Server::start(2);
    let pipes = Pipes::new(server.clone(), 1024, vec![cut]);
    let whole = async {
        let agent = Agent::begin(pipes.clone(), 2).await.unwrap();
        agent.back_up(6, 100).await.unwrap();
    };
    tokio::time::timeout(Duration::from_secs(30), whole).await.unwrap_or_else(|_| panic!("{cut:?} hangs"));
    let kept = server.host.kept.lock();
    assert!(kept.snapshots.len() <= 2, "{cut:?}: one commit, or the same one settled again");
    let committed = kept.blocks.values().filter(|blocks| blocks.len() == 6).count();
    assert!(
        committed >= 1,
        "{cut:?}: {:?}",
        kept.blocks.values().map(std::collections::BTreeMap::len).collect::<Vec<_>>()
    );
    pipes.made() > 3
}

#[actix_rt::test]
async fn s21_a_connection_cut_at_any_byte_in_any_direction_converges() {
    // Connection 0 is the control connection, 1 and 2 are streams.
    let mut reached = 0;
    for connection in 0..3 {
        for writing in [true, false] {
            for how in [Break::Finish, Break::Reset] {
                let mut after = 0;
                loop {
                    let hit = short_session(Cut { connection, writing, after, how }).await;
                    reached += u32::from(hit);
                    // Beyond the last byte nothing is cut any more.
                    if !hit && after > 64 {
                        break;
                    }
                    after += 1;
                }
            }
        }
    }
    assert!(reached > 1000, "only {reached} cuts took effect");
}

#[actix_rt::test]
async fn s22_a_panic_in_one_session_ends_that_session_alone() {
    let server = Server::start(4);
    let pipes = || Pipes::new(server.clone(), 4096, Vec::new());
    let healthy = Agent::begin(pipes(), 4).await.unwrap();
    let broken = Agent::begin(pipes(), 4).await.unwrap();
    assert_eq!(server.sessions().await, 2);
    let query = Message::QueryChunks(QueryChunks { ids: join_ids([&POISON]) });
    let answer = within(60, broken.control.send(AskServer(query))).await.unwrap();
    let refused = matches!(&answer, Err(AskError::Refused(refusal)) if refusal.code == RefusalCode::NoSuchSession);
    assert!(refused, "{answer:?}");
    // Its lease would hold collections back for ever: its end is recorded although it cannot say so any more.
    let recorded = async {
        while server.host.kept.lock().ended.is_empty() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    within(60, recorded).await;
    assert!(matches!(server.host.kept.lock().ended[..], [(_, Terminal::Failed)]));
    assert_eq!(server.sessions().await, 1);
    within(60, healthy.back_up(200, 1000)).await.unwrap();
    within(60, Agent::begin(pipes(), 4).await.unwrap().back_up(20, 100)).await.unwrap();
    assert_eq!(server.host.kept.lock().snapshots.len(), 2);
}
