//! The actor that looks after repositories by itself: their own retention policy, garbage collection (which purges deleted
//! snapshots whose time is over) and scrubbing, each in its own interval, one job at a time on a server.
//!
//! Owns the decision what runs next (`machines::maintenance`) and the job that runs. Started with the server, ended by
//! [`StopMaintenance`]: no job starts from then on, and the one that runs is ended by the engine when it closes. It must not
//! block: the engine's work runs on threads of its own.

use std::sync::Arc;
use std::time::Duration;

use actix::{Actor, ActorFutureExt, AsyncContext, Context, Handler, Message, SpawnHandle, WrapFuture};
use strandline_actors::machines::maintenance::{LastRun, MaintenanceMachine, Wanted, pieces};
use strandline_actors::runtime::clock;
use strandline_messages::wire::manage::ScrubSubset;
use strandline_messages::{RepositoryName, TenantName};

use crate::engine::gc::GcOptions;
use crate::engine::upkeep::{GC_JOB, RETENTION_JOB, RetentionSummary, SCRUB_JOB};
use crate::engine::{Engine, EngineError, Repository};

/// Settings, repositories and results are looked at at least so often.
const LOOK_EVERY: Duration = Duration::from_mins(1);
/// And after this, if that failed or something is due at this very moment.
const LOOK_SOON: Duration = Duration::from_millis(50);

/// One job of one repository.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct JobKey {
    tenant: TenantName,
    name: RepositoryName,
    /// [`RETENTION_JOB`], [`GC_JOB`] or [`SCRUB_JOB`].
    job: &'static str,
}

/// See the module.
#[derive(Debug)]
pub struct Maintenance {
    engine: Arc<Engine>,
    machine: MaintenanceMachine<JobKey>,
    /// A look at the catalog is under way.
    looking: bool,
    /// Something changed during that look: another one follows.
    look_again: bool,
    stopping: bool,
    timer: Option<SpawnHandle>,
}

impl Maintenance {
    /// For the repositories of `engine`.
    pub fn new(engine: Arc<Engine>) -> Self {
        Self {
            engine,
            machine: MaintenanceMachine::default(),
            looking: false,
            look_again: false,
            stopping: false,
            timer: None,
        }
    }

    /// Reads what there is to be done, and goes on from there.
    fn look(&mut self, context: &mut Context<Self>) {
        if self.looking || self.stopping {
            self.look_again = true;
            return;
        }
        self.looking = true;
        self.look_again = false;
        let looked = wanted(Arc::clone(&self.engine)).into_actor(self).map(|wanted, actor, context| {
            actor.looking = false;
            match wanted {
                Ok(wanted) => actor.machine.know(clock::now(), clock::wall_ns(), wanted),
                Err(error) => tracing::warn!(%error, "what maintenance is due cannot be read; it is tried again"),
            }
            actor.go_on(context);
        });
        context.spawn(looked);
    }

    fn go_on(&mut self, context: &mut Context<Self>) {
        if self.stopping {
            return;
        }
        let now = clock::now();
        if let Some(key) = self.machine.start(now) {
            let ran = run(Arc::clone(&self.engine), key.clone()).into_actor(self).map(move |failed, actor, context| {
                // What was written down about it is what the next look finds.
                actor.machine.noted(&key, LastRun { finished_ns: failed.finished_ns, failed: failed.failed });
                actor.machine.ended(clock::now(), failed.failed);
                actor.look(context);
            });
            context.spawn(ran);
        }
        let due = self.machine.timeout().map(|due| due.saturating_duration_since(now));
        let wait = if self.look_again { LOOK_SOON } else { due.unwrap_or(LOOK_EVERY).clamp(LOOK_SOON, LOOK_EVERY) };
        if let Some(timer) = self.timer.take() {
            context.cancel_future(timer);
        }
        self.timer = Some(context.run_later(wait, Self::look));
    }
}

impl Actor for Maintenance {
    type Context = Context<Self>;

    fn started(&mut self, context: &mut Self::Context) {
        self.look(context);
    }
}

/// Settings or results have changed: look at them now.
#[derive(Debug, Clone, Copy, Message)]
#[rtype(result = "()")]
pub struct LookAgain;

impl Handler<LookAgain> for Maintenance {
    type Result = ();

    fn handle(&mut self, _: LookAgain, context: &mut Self::Context) {
        self.look(context);
    }
}

/// No further job is started.
#[derive(Debug, Clone, Copy, Message)]
#[rtype(result = "()")]
pub struct StopMaintenance;

impl Handler<StopMaintenance> for Maintenance {
    type Result = ();

    fn handle(&mut self, _: StopMaintenance, context: &mut Self::Context) {
        self.stopping = true;
        if let Some(timer) = self.timer.take() {
            context.cancel_future(timer);
        }
    }
}

/// The jobs of all usable repositories.
async fn wanted(engine: Arc<Engine>) -> Result<Vec<(JobKey, Wanted)>, EngineError> {
    let mut jobs = Vec::new();
    for listed in engine.census() {
        let Ok(repository) = listed.repository else { continue };
        let settings = repository.settings().await?;
        let notes = repository.maintenance().await?;
        let retention_every = settings.retention.as_ref().map_or(Duration::ZERO, |_| settings.retention_every);
        let intervals = [
            (RETENTION_JOB, retention_every),
            (GC_JOB, settings.gc_every),
            (SCRUB_JOB, pieces(settings.scrub_every).0),
        ];
        for (job, every) in intervals {
            let note = notes.iter().find(|note| note.job == job);
            let last = note.map(|note| LastRun { finished_ns: note.finished_ns, failed: note.failed });
            let key = JobKey { tenant: listed.tenant.clone(), name: listed.name.clone(), job };
            jobs.push((key, Wanted { every, place: place(&repository, job), last }));
        }
    }
    Ok(jobs)
}

/// A number that is the same for one job of one repository at every start.
fn place(repository: &Repository, job: &str) -> u16 {
    let hash = blake3::hash(&[repository.file().id.as_bytes().as_slice(), job.as_bytes()].concat());
    let [low, high, ..] = *hash.as_bytes();
    u16::from_le_bytes([low, high])
}

/// How a job ended.
struct Ended {
    finished_ns: i64,
    failed: bool,
}

async fn run(engine: Arc<Engine>, key: JobKey) -> Ended {
    tracing::debug!(tenant = %key.tenant, repository = %key.name, job = key.job, "maintenance begins");
    let failed = match engine.repository(&key.tenant, &key.name).await {
        Ok(repository) if key.job == GC_JOB => collect(&repository, &key).await,
        Ok(repository) if key.job == RETENTION_JOB => retain(&repository, &key).await,
        Ok(repository) => scrub(&repository, &key).await,
        Err(error) => Err(error),
    };
    let failed = match failed {
        Ok(()) => false,
        // The server stops: there is nothing to be said.
        Err(EngineError::Stopping) => true,
        Err(error) => {
            let JobKey { tenant, name, job } = &key;
            tracing::error!(%tenant, repository = %name, job, %error, "maintenance failed; it is tried again later");
            true
        }
    };
    let noted = async {
        let repository = engine.repository(&key.tenant, &key.name).await.ok()?;
        let notes = repository.maintenance().await.ok()?;
        notes.into_iter().find(|note| note.job == key.job).map(|note| note.finished_ns)
    };
    Ended { finished_ns: noted.await.unwrap_or_default(), failed }
}

async fn collect(repository: &Repository, key: &JobKey) -> Result<(), EngineError> {
    let report = repository.collect_garbage_noted(GcOptions::default()).await?;
    tracing::info!(
        tenant = %key.tenant,
        repository = %key.name,
        purged = report.purged,
        freed_bytes = report.bytes_freed,
        freed_blocks = report.blocks_freed,
        waiting_blocks = report.blocks_waiting,
        live_bytes = report.bytes_live,
        "garbage collected"
    );
    Ok(())
}

async fn retain(repository: &Repository, key: &JobKey) -> Result<(), EngineError> {
    let RetentionSummary { snapshots, deleted, left } = repository.retain_noted().await?;
    let JobKey { tenant, name, .. } = key;
    tracing::info!(%tenant, repository = %name, snapshots, deleted, left, "retention policy applied");
    Ok(())
}

async fn scrub(repository: &Repository, key: &JobKey) -> Result<(), EngineError> {
    let settings = repository.settings().await?;
    let (_, permille) = pieces(settings.scrub_every);
    let report = repository.scrub_noted(ScrubSubset::Share { permille }, settings.scrub_bytes_per_second).await?;
    let (tenant, name) = (&key.tenant, &key.name);
    let (blocks, bytes) = (report.blocks, report.bytes);
    if report.damaged_blocks + report.damaged_packs == 0 {
        tracing::info!(%tenant, repository = %name, blocks, bytes, "scrubbed");
    } else {
        let (damaged, packs, affected) = (report.damaged_blocks, report.damaged_packs, report.affected.len());
        tracing::error!(%tenant, repository = %name, blocks, bytes, damaged, packs, affected, "scrubbed: damage was found and withdrawn; `strand-server repository show` names it, the next backups heal it");
    }
    Ok(())
}

#[cfg(test)]
#[path = "maintenance_tests.rs"]
mod tests;
