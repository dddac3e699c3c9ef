//! The catalog's part in a session: the transactions that open and end one, and the list that `status` shows.
//!
//! `cargo bench -p strandline-server --bench catalog`

#![expect(clippy::unwrap_used, reason = "a bench that meets an error has nothing to measure")]

use std::sync::Arc;

use divan::Bencher;
use strandline_messages::format::repository::{ChunkingV1, RepositoryV1};
use strandline_messages::{AgentId, DomainId, RepositoryId, SessionId};
use strandline_server::engine::{Engine, EngineOptions, Opened, Repository, SessionEnd};
use tempfile::TempDir;

fn main() {
    divan::main();
}

/// An engine of its own, and what makes its futures run.
struct Bench {
    system: actix_rt::SystemRunner,
    repository: Arc<Repository>,
    sessions: u128,
    _engine: Engine,
    _directory: TempDir,
}

impl Bench {
    fn start() -> Self {
        let (system, directory) = (actix_rt::System::new(), tempfile::tempdir().unwrap());
        let (engine, repository) = system.block_on(async {
            let engine = Engine::open(directory.path(), EngineOptions::default()).await.unwrap();
            let chunking =
                ChunkingV1 { minimum: 16 << 10, average: 64 << 10, maximum: 256 << 10, block_plaintext: 1 << 20 };
            let file = RepositoryV1 {
                id: RepositoryId([7; 16]),
                name: "main".parse().unwrap(),
                created_ns: 1,
                root_public: [1; 32],
                wrap_algorithm: 1,
                kem_public: [3; 32],
                chunking,
            };
            let repository = engine.create_repository(&"bench".parse().unwrap(), file, Vec::new()).await.unwrap();
            (engine, repository)
        });
        Self { system, repository, sessions: 0, _engine: engine, _directory: directory }
    }

    fn one_session(&mut self) {
        self.sessions += 1;
        let id = SessionId(self.sessions.to_le_bytes());
        self.system.block_on(async {
            let opened = self.repository.open_session(id, AgentId([2; 16]), DomainId::FULL, None).await.unwrap();
            let Opened::Fresh(lease) = opened else { return };
            self.repository.end_session(&lease, SessionEnd::Aborted, "a bench").await.unwrap();
        });
    }
}

#[divan::bench(args = [0, 10_000], sample_count = 50)]
fn session_after_so_many(bencher: Bencher<'_, '_>, earlier: u32) {
    let mut bench = Bench::start();
    (0..earlier).for_each(|_| bench.one_session());
    bencher.bench_local(|| bench.one_session());
}

#[divan::bench]
fn list_of_1024_sessions(bencher: Bencher<'_, '_>) {
    let mut bench = Bench::start();
    (0..2048).for_each(|_| bench.one_session());
    bencher.bench_local(|| bench.system.block_on(bench.repository.sessions(1024)).unwrap().len());
}
