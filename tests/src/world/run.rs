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
use super::net::Net;
use super::oracle::Oracle;
use super::plan::{Blow, Plan, STORM};
use super::server::ServerProcess;
use super::storage::{Disk, block_of};
use crate::random::Random;

/// After the storm everything must have come to its end within this.
const PATIENCE: Duration = Duration::from_hours(2);
/// Sockets of a backup that has ended are closed after this: a side that hears nothing of the other's end waits for a minute.
const CLOSING: Duration = Duration::from_secs(70);
/// A session without connections is over after its grace and a tick.
const GRACE: Duration = Duration::from_mins(13);
/// Most vain attempts of one backup.
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
    /// Connections that were made.
    pub connections: u64,
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
    agents: Agents,
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
    async fn storm(&self) {
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

    /// All backups of one agent.
    async fn live(&self, agent: usize) {
        let mut random = self.world.fork();
        for backup in 0..self.plan.backups {
            let ids = choose(&mut random, &self.plan);
            for attempt in 0..=ATTEMPTS_MAX {
                if attempt == ATTEMPTS_MAX {
                    return self.oracle.broke(&format!("backup {backup} of agent {agent} never ends well"));
                }
                if self.attempt(agent, &ids, Random::new(random.number())).await {
                    break;
                }
            }
        }
    }

    /// Whether the backup was committed.
    async fn attempt(&self, agent: usize, ids: &[ChunkId], random: Random) -> bool {
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
        self.world.tell(|| format!("agent {agent} starts process {number} for {} chunks", ids.len()));
        // The process number makes it unlike any other.
        let job = Job {
            ids: ids.to_vec(),
            manifest: block_of(ids, 4 + 32 * ids.len() + 1 + usize::try_from(number).unwrap_or(0)),
        };
        let result = tokio::select! {
            biased;
            () = killed.notified() => None,
            result = back_up(process.clone(), &job, &self.oracle, random) => Some(result),
        };
        self.world.tell(|| format!("process {number} ends: {result:?}"));
        match result {
            None => {
                tokio::time::sleep(self.absence(agent)).await;
                false
            }
            Some(Ok(())) => true,
            Some(Err(reason)) => {
                if !self.excuses_failures() {
                    self.oracle.broke(&format!("a backup failed although no disk did: {reason}"));
                }
                // Nothing of it may reach the network any more.
                process.alive.store(false, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_secs(5)).await;
                false
            }
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
    let plan = Plan::of(seed);
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
        world,
        plan,
        net,
        disk,
    };
    stage.start_server();
    let everybody = async {
        let agents = join_all((0..stage.plan.agents).map(|agent| stage.live(agent)));
        tokio::join!(agents, stage.storm());
    };
    if tokio::time::timeout(STORM + PATIENCE, everybody).await.is_err() {
        stage.oracle.broke("not everything came to its end");
    }
    stage.oracle.check("the end");
    tokio::time::sleep(CLOSING).await;
    let killed = stage.plan.blows.iter().any(|(_, blow)| matches!(blow, Blow::KillAgent(..) | Blow::KillServer(_)));
    // What a dead process held is nobody's any more; the living have closed theirs.
    if !killed && stage.net.open_ends() > 0 {
        stage.oracle.broke(&format!("{} ends of connections are still open", stage.net.open_ends()));
    }
    tokio::time::sleep(GRACE).await;
    let server = stage.server.lock().clone();
    if let Some(server) = server {
        let left = server.sessions().await.len();
        if left > 0 {
            stage.oracle.broke(&format!("{left} sessions are still there, long after everybody is gone"));
        }
    }
    let (snapshots, broken) = stage.oracle.verdict();
    Report {
        seed,
        trace: stage.world.trace(),
        broken,
        snapshots,
        connections: stage.net.made(),
        age: stage.world.age(),
        plan: stage.plan.clone(),
    }
}
