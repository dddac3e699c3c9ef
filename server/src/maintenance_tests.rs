//! The actor with a real engine in a temporary directory.

use strandline_messages::{DomainId, Sequence};

use super::*;
use crate::engine::fixture::{REPOSITORY, data_block, id, open, repository, session, tenant};
use crate::storage::layout::DataPaths;

/// Waits until the catalog says that `job` ended; fails after ten seconds.
async fn ended(repository: &Repository, job: &str) -> crate::catalog::verified::MaintenanceRow {
    for _ in 0..500 {
        let notes = repository.maintenance().await.unwrap();
        if let Some(note) = notes.into_iter().find(|note| note.job == job) {
            return note;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    panic!("{job} did not run");
}

async fn settings(repository: &Repository, gc_every: Duration, scrub_every: Duration) {
    let mut settings = repository.settings().await.unwrap();
    (settings.gc_every, settings.scrub_every) = (gc_every, scrub_every);
    repository.set_settings(settings).await.unwrap();
}

#[actix_rt::test]
async fn jobs_run_in_their_intervals_take_new_settings_at_once_and_stop_with_the_server() {
    let dir = tempfile::tempdir().unwrap();
    let engine = Arc::new(open(dir.path()).await);
    let repository = repository(&engine).await;
    settings(&repository, Duration::from_millis(100), Duration::ZERO).await;
    let maintenance = Maintenance::new(Arc::clone(&engine)).start();
    let first = ended(&repository, GC_JOB).await;
    assert!(!first.failed && first.report.contains("\"purged\":0"), "{first:?}");
    while ended(&repository, GC_JOB).await.finished_ns == first.finished_ns {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let jobs: Vec<String> = repository.maintenance().await.unwrap().into_iter().map(|note| note.job).collect();
    assert_eq!(jobs, [GC_JOB], "never scrubbed: the interval is zero");
    settings(&repository, Duration::ZERO, Duration::from_millis(100)).await;
    maintenance.send(LookAgain).await.unwrap();
    assert!(ended(&repository, SCRUB_JOB).await.report.contains("\"blocks\":0"));
    maintenance.send(StopMaintenance).await.unwrap();
    drop(repository);
    tokio::time::timeout(Duration::from_secs(5), engine.close()).await.unwrap().unwrap();
}

#[actix_rt::test]
async fn a_job_that_fails_is_noted_with_its_reason() {
    let dir = tempfile::tempdir().unwrap();
    {
        let engine = open(dir.path()).await;
        let repository = repository(&engine).await;
        let lease = session(&repository, 1, DomainId::FULL).await;
        repository.store(&lease, Sequence(0), data_block(REPOSITORY, &[id(1)]).into()).await.unwrap();
        engine.close().await.unwrap();
    }
    let engine = Arc::new(open(dir.path()).await);
    let repository = repository(&engine).await;
    std::fs::remove_file(DataPaths::new(dir.path()).repository(&tenant(), &REPOSITORY).pack(1)).unwrap();
    settings(&repository, Duration::ZERO, Duration::from_secs(1)).await;
    Maintenance::new(Arc::clone(&engine)).start();
    let note = ended(&repository, SCRUB_JOB).await;
    assert!(note.failed && note.report.contains("cannot open"), "{note:?}");
}
