//! One seed from its beginning to its end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::join_all;
use parking_lot::Mutex;
use strandline_messages::ChunkId;
use tokio::sync::Notify;

use super::World;
use super::agent::{AgentProcess, Job, ServerSlot, back_up};
use super::alarm::Alarm;
use super::net::Net;
use super::oracle::Oracle;
use super::plan::{Blow, Plan};
use super::restorer::restore;
use super::server::ServerProcess;
use super::storage::{Disk, Row, block_of};
use crate::random::Random;

/// After the storm everything must have come to its end within this.
const PATIENCE: Duration = Duration::from_hours(2);
/// Sockets of a backup that has ended are closed after this: a side that hears nothing of the other's end waits for a minute.
const CLOSING: Duration = Duration::from_secs(70);
/// A session without connections is over after its grace and a tick.
const GRACE: Duration = Duration::from_mins(13);
/// Most vain attempts at one thing.
const ATTEMPTS_MAX: u64 = 300;

/// What became of a seed.
#[derive(Clone, Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// What it meant.
    pub plan: Plan,
    /// The whole trace in one number, the number of its events, and, if asked for, its words.
    pub trace: (u64, u64, Vec<String>),
    /// Promises that were broken. None: all is well.
    pub broken: Vec<String>,
    /// Snapshots that were promised.
    pub snapshots: usize,
    /// Snapshots that were restored.
    pub restores: u64,
    /// Connections that were made.
    pub connections: u64,
    /// Connections that were cut at the byte of their plan.
    pub cuts: u64,
    /// Simulated time.
    pub age: Duration,
}

/// The process of an agent that runs, and how its runner hears of its death.
type Current = Mutex<Option<(AgentProcess, Arc<Notify>)>>;

struct Agents {
    current: Vec<Current>,
    next_process: AtomicU64,
}

struct Stage {
    world: World,
    plan: Plan,
    net: Net,
    disk: Disk,
    oracle: Oracle,
    server: ServerSlot,
    servers: AtomicU64,
    restores: AtomicU64,
    agents: Agents,
}

/// What an agent's process is started for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Errand {
    Backup,
    Restore,
}

impl Stage {
    fn start_server(&self) {
        let number = self.servers.fetch_add(1, Ordering::Relaxed);
        self.world.tell(|| format!("server {number} starts"));
        *self.server.lock() = Some(ServerProcess::start(number, &self.disk, self.plan.streams));
    }

    /// Deals a blow.
    async fn deal(&self, blow: Blow) {
        self.world.tell(|| format!("{blow:?}"));
        match blow {
            Blow::KillServer(away) => {
                let Some(server) = self.server.lock().take() else { return };
                server.kill();
                self.net.reset(|processes| processes.server == server.number);
                self.oracle.check("a kill of the server");
                drop(server);
                tokio::time::sleep(away).await;
                self.start_server();
            }
            Blow::KillAgent(agent, _) => {
                let current = self.agents.current.get(agent).and_then(|current| current.lock().take());
                if let Some((process, killed)) = current {
                    process.alive.store(false, Ordering::SeqCst);
                    self.net.reset(|processes| processes.agent == process.number);
                    killed.notify_one();
                }
            }
            Blow::CutEverything => self.net.reset(|_| true),
            Blow::FailDisk(how_long, full) => self.disk.fail(how_long, full),
        }
    }

    /// All blows in their order.
    async fn rage(&self) {
        let blows = self.plan.blows.iter().map(|(at, blow)| async move {
            tokio::time::sleep(*at).await;
            self.deal(*blow).await;
        });
        join_all(blows).await;
    }

    /// How long a killed agent stays away.
    fn absence(&self, agent: usize) -> Duration {
        let of_agent = self.plan.blows.iter().find_map(|(_, blow)| match blow {
            Blow::KillAgent(killed, away) if *killed == agent => Some(*away),
            _ => None,
        });
        of_agent.unwrap_or(Duration::from_millis(100))
    }

    /// Whether a backup may end without a snapshot although nobody killed its process.
    fn excuses_failures(&self) -> bool {
        self.plan.blows.iter().any(|(_, blow)| matches!(blow, Blow::FailDisk(..)))
    }

    /// All backups of one agent, some of them restored afterwards.
    async fn live(&self, agent: usize) {
        let mut random = self.world.fork();
        for backup in 0..self.plan.backups {
            let ids = choose(&mut random, &self.plan);
            if !self.until_it_ends_well(agent, Errand::Backup, &ids, &mut random).await {
                return self.oracle.broke(&format!("backup {backup} of agent {agent} never ends well"));
            }
            if random.percent(self.plan.restore_percent) {
                if !self.until_it_ends_well(agent, Errand::Restore, &ids, &mut random).await {
                    return self.oracle.broke(&format!("backup {backup} of agent {agent} can never be restored"));
                }
                self.restores.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    async fn until_it_ends_well(&self, agent: usize, errand: Errand, ids: &[ChunkId], random: &mut Random) -> bool {
        for _ in 0..ATTEMPTS_MAX {
            if self.attempt(agent, errand, ids, Random::new(random.number())).await {
                return true;
            }
        }
        false
    }

    /// Whether it ended well.
    async fn attempt(&self, agent: usize, errand: Errand, ids: &[ChunkId], random: Random) -> bool {
        let number = self.agents.next_process.fetch_add(1, Ordering::Relaxed);
        let process = AgentProcess {
            number,
            agent,
            alive: Arc::new(AtomicBool::new(true)),
            server: Arc::clone(&self.server),
            net: self.net.clone(),
            streams: self.plan.streams,
        };
        let killed = Arc::new(Notify::new());
        if let Some(current) = self.agents.current.get(agent) {
            *current.lock() = Some((process.clone(), Arc::clone(&killed)));
        }
        self.world.tell(|| format!("agent {agent} starts process {number}: {errand:?} of {} chunks", ids.len()));
        let result = tokio::select! {
            biased;
            () = killed.notified() => None,
            result = self.carry_out(&process, errand, ids, random) => Some(result),
        };
        self.world.tell(|| format!("process {number} ends: {result:?}"));
        match result {
            None => {
                tokio::time::sleep(self.absence(agent)).await;
                false
            }
            Some(Ok(())) => true,
            Some(Err(reason)) => {
                if errand == Errand::Restore || !self.excuses_failures() {
                    self.oracle.broke(&format!("a {errand:?} failed although no disk did: {reason}"));
                }
                // Nothing of it may reach the network any more.
                process.alive.store(false, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_secs(5)).await;
                false
            }
        }
    }

    async fn carry_out(
        &self,
        process: &AgentProcess,
        errand: Errand,
        ids: &[ChunkId],
        random: Random,
    ) -> Result<(), String> {
        match errand {
            Errand::Backup => {
                // The process number makes it unlike any other.
                let bytes = 4 + 32 * ids.len() + 1 + usize::try_from(process.number).unwrap_or(0);
                let job = Job {
                    ids: ids.to_vec(),
                    manifest: block_of(ids, bytes),
                    block_bytes: self.plan.block_bytes,
                    pause: self.plan.pause,
                };
                back_up(process.clone(), &job, &self.oracle, random).await
            }
            Errand::Restore => {
                let missing = restore(process, ids, random).await?;
                if !missing.is_empty() {
                    self.oracle.broke(&format!("{} chunks of a promised snapshot did not come back", missing.len()));
                }
                Ok(())
            }
        }
    }

    /// What must be true when everybody has gone.
    async fn check_the_end(&self, alarm: &Alarm) {
        self.oracle.check("the end");
        tokio::time::sleep(CLOSING).await;
        // What a dead process held is nobody's any more; the living have closed theirs.
        let nobody_died =
            !self.plan.blows.iter().any(|(_, blow)| matches!(blow, Blow::KillAgent(..) | Blow::KillServer(_)));
        if nobody_died && self.net.open_ends() > 0 {
            self.oracle.broke(&format!("{} ends of connections are still open", self.net.open_ends()));
        }
        tokio::time::sleep(GRACE).await;
        let server = self.server.lock().clone();
        let left = match server {
            Some(server) => server.sessions().await.len(),
            None => 0,
        };
        if left > 0 {
            self.oracle.broke(&format!("{left} sessions are still there, long after everybody is gone"));
        }
        let leases = self.disk.look(|disk| disk.sessions.values().filter(|(_, row)| *row == Row::Open).count());
        if nobody_died && leases > 0 {
            self.oracle.broke(&format!("{leases} leases are held for ever"));
        }
        if self.plan.is_calm() {
            self.check_that_it_was_calm(alarm);
        }
    }

    /// Where nothing goes wrong nobody connects twice and nobody complains.
    fn check_that_it_was_calm(&self, alarm: &Alarm) {
        let processes = self.agents.next_process.load(Ordering::Relaxed);
        let needed = processes * (1 + u64::from(self.plan.streams));
        if self.net.made() > needed {
            self.oracle.broke(&format!("{} connections where {needed} are enough", self.net.made()));
        }
        if let Some(complaint) = alarm.heard().first() {
            self.oracle.broke(&format!("nothing went wrong, and yet: {complaint}"));
        }
    }
}

/// Chunks of one backup: many are those of others, too.
fn choose(random: &mut Random, plan: &Plan) -> Vec<ChunkId> {
    let count = 1 + random.index(plan.chunks);
    let mut ids: Vec<ChunkId> = (0..count)
        .map(|_| {
            let mut id = [0; 32];
            let number = random.below(plan.universe as u64);
            id.iter_mut().zip(number.to_le_bytes()).for_each(|(to, from)| *to = from);
            ChunkId(id)
        })
        .collect();
    ids.sort_unstable();
    ids.dedup();
    ids
}

/// Runs the seed. The runtime must hold its time.
pub async fn run(seed: u64, tells: bool) -> Report {
    run_plan(seed, Plan::of(seed), tells).await
}

/// Runs this plan; the seed decides what the plan leaves open.
pub async fn run_plan(seed: u64, plan: Plan, tells: bool) -> Report {
    let alarm = Alarm::listen();
    let world = World::new(seed, tells);
    let (disk, net) = (Disk::new(&world, plan.clone()), Net::new(&world, plan.clone()));
    let stage = Stage {
        oracle: Oracle::new(&world, &disk),
        agents: Agents {
            current: (0..plan.agents).map(|_| Mutex::new(None)).collect(),
            next_process: AtomicU64::new(0),
        },
        server: Arc::default(),
        servers: AtomicU64::new(0),
        restores: AtomicU64::new(0),
        world,
        plan,
        net,
        disk,
    };
    stage.start_server();
    let everybody = async {
        let agents = join_all((0..stage.plan.agents).map(|agent| stage.live(agent)));
        tokio::join!(agents, stage.rage());
    };
    let pauses = u32::try_from(stage.plan.backups + stage.plan.blows.len()).unwrap_or(u32::MAX);
    let patience = stage.plan.storm + PATIENCE + stage.plan.pause * pauses;
    if tokio::time::timeout(patience, everybody).await.is_err() {
        stage.oracle.broke("not everything came to its end");
    }
    stage.check_the_end(&alarm).await;
    let (snapshots, broken) = stage.oracle.verdict();
    Report {
        seed,
        trace: stage.world.trace(),
        broken,
        snapshots,
        restores: stage.restores.load(Ordering::Relaxed),
        connections: stage.net.made(),
        cuts: stage.net.cuts(),
        age: stage.world.age(),
        plan: stage.plan.clone(),
    }
}
