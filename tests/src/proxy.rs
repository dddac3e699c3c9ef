//! A TCP proxy on loopback that breaks connections on purpose, by a plan.
//!
//! It stands between agent and server and knows nothing of what it carries. Bytes before a cut are delivered exactly; a
//! reset may still make the peer lose what it has not read yet, as on a real network. Two threads serve each
//! connection; memory is bounded by [`QUEUE_BYTES_MAX`] for each direction.

use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use socket2::SockRef;
use strandline_actors::runtime::clock;

use crate::random::Random;

mod pump;

use pump::Pump;

/// Most bytes that wait in the proxy for each direction of a connection.
pub const QUEUE_BYTES_MAX: usize = 1 << 20;
/// How long a thread may take to notice a command.
const REACTION: Duration = Duration::from_millis(10);

/// Which way bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the one who connected to the one behind the proxy.
    ToServer,
    /// Back.
    ToClient,
}

/// How a connection breaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Both sides get a reset (RST).
    Reset,
    /// Both sides see the end of the stream (FIN); what they still send is swallowed.
    Finish,
    /// Nothing moves any more, and nobody is told.
    Stall,
}

/// Break a connection once it has carried so many bytes in one direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cut {
    /// Which connection, counted from 0 in the order of arrival; `None` for every one.
    pub connection: Option<u64>,
    /// In which direction bytes are counted.
    pub direction: Direction,
    /// How many bytes still get through; with 0 the connection breaks as soon as it is made.
    pub after_bytes: u64,
    /// How.
    pub fault: Fault,
}

/// What the network is like. The default changes nothing.
#[derive(Clone, Debug, Default)]
pub struct Plan {
    /// The cuts; the first one that is due breaks a connection.
    pub cuts: Vec<Cut>,
    /// Time that every byte takes in each direction.
    pub delay: Duration,
    /// Most bytes per second in each direction of each connection.
    pub bytes_per_second: Option<u64>,
}

impl Plan {
    /// Breaks each of the first `connections` connections once, anywhere below `bytes_max`, in any direction and manner.
    /// Later connections are left alone, so whoever keeps trying gets through.
    pub fn seeded(seed: u64, connections: u64, bytes_max: u64) -> Self {
        let mut random = Random::new(seed);
        let cut = |connection| Cut {
            connection: Some(connection),
            direction: if random.percent(50) { Direction::ToServer } else { Direction::ToClient },
            after_bytes: random.below(bytes_max),
            fault: match random.below(3) {
                0 => Fault::Reset,
                1 => Fault::Finish,
                _ => Fault::Stall,
            },
        };
        Self { cuts: (0..connections).map(cut).collect(), ..Self::default() }
    }

    /// The first cut of `connection` in `direction`: bytes that get through, and what happens then.
    fn cut_of(&self, connection: u64, direction: Direction) -> Option<(u64, Fault)> {
        let here = |cut: &&Cut| cut.direction == direction && cut.connection.is_none_or(|n| n == connection);
        self.cuts.iter().filter(here).min_by_key(|cut| cut.after_bytes).map(|cut| (cut.after_bytes, cut.fault))
    }
}

/// A running proxy. Dropping it resets its connections and frees its port.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
    address: SocketAddr,
    acceptor: Option<thread::JoinHandle<()>>,
}

#[derive(Debug)]
struct Shared {
    upstream: Mutex<SocketAddr>,
    plan: Mutex<Plan>,
    links: Mutex<Vec<Weak<Link>>>,
    changed: Condvar,
    accepted: AtomicU64,
    carried: [AtomicU64; 2],
    cuts: AtomicU64,
    refusing: AtomicBool,
    stopping: AtomicBool,
}

impl Proxy {
    /// Listens on a free port of 127.0.0.1 and carries every connection to `upstream`, unharmed until told otherwise.
    pub fn start(upstream: SocketAddr) -> Result<Self> {
        Self::start_with(upstream, Plan::default())
    }

    /// The same with a plan from the first connection on.
    pub fn start_with(upstream: SocketAddr, plan: Plan) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).context("cannot listen on 127.0.0.1")?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            upstream: Mutex::new(upstream),
            plan: Mutex::new(plan),
            links: Mutex::default(),
            changed: Condvar::new(),
            accepted: AtomicU64::new(0),
            carried: [AtomicU64::new(0), AtomicU64::new(0)],
            cuts: AtomicU64::new(0),
            refusing: AtomicBool::new(false),
            stopping: AtomicBool::new(false),
        });
        let acceptor = thread::spawn({
            let shared = shared.clone();
            move || shared.accept(&listener)
        });
        Ok(Self { shared, address, acceptor: Some(acceptor) })
    }

    /// Where to connect.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// New connections go to `upstream`: a server came back on another port.
    pub fn set_upstream(&self, upstream: SocketAddr) {
        *lock(&self.shared.upstream) = upstream;
    }

    /// Replaces the plan, for new connections only. Their count goes on.
    pub fn set_plan(&self, plan: Plan) {
        *lock(&self.shared.plan) = plan;
    }

    /// While `refusing`, new connections are reset at once, as if nothing listened.
    pub fn set_refusing(&self, refusing: bool) {
        self.shared.refusing.store(refusing, Ordering::SeqCst);
    }

    /// How many connections have been accepted since the start, refused ones not counted.
    pub fn connections(&self) -> u64 {
        self.shared.accepted.load(Ordering::SeqCst)
    }

    /// How many connections are alive, stalled ones among them.
    pub fn open_connections(&self) -> usize {
        lock(&self.shared.links).iter().filter(|link| link.strong_count() > 0).count()
    }

    /// How many bytes all connections have carried in `direction`.
    pub fn carried_bytes(&self, direction: Direction) -> u64 {
        self.shared.carried(direction).load(Ordering::SeqCst)
    }

    /// How many connections a plan has broken.
    pub fn planned_cuts(&self) -> u64 {
        self.shared.cuts.load(Ordering::SeqCst)
    }

    /// Breaks every connection of the moment. Returns how many there were.
    pub fn cut_all(&self, fault: Fault) -> usize {
        let links: Vec<_> = lock(&self.shared.links).iter().filter_map(Weak::upgrade).collect();
        for link in &links {
            link.break_with(fault);
        }
        links.len()
    }

    /// Waits until `count` connections have been accepted since the start.
    pub fn wait_for_connections(&self, count: u64, patience: Duration) -> Result<()> {
        let end = clock::now() + patience;
        let mut links = lock(&self.shared.links);
        while self.connections() < count {
            let left = end.saturating_duration_since(clock::now());
            anyhow::ensure!(!left.is_zero(), "{} of {count} connections after {patience:?}", self.connections());
            links = self.shared.changed.wait_timeout(links, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Waits until `bytes` bytes have been carried in `direction` since the start.
    pub fn wait_for_bytes(&self, direction: Direction, bytes: u64, patience: Duration) -> Result<()> {
        let end = clock::now() + patience;
        while self.carried_bytes(direction) < bytes {
            let carried = self.carried_bytes(direction);
            anyhow::ensure!(clock::now() < end, "{carried} of {bytes} bytes after {patience:?}");
            thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        // Wakes the acceptor.
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        self.cut_all(Fault::Reset);
    }
}

impl Shared {
    fn carried(&self, direction: Direction) -> &AtomicU64 {
        let [to_server, to_client] = &self.carried;
        if direction == Direction::ToServer { to_server } else { to_client }
    }

    fn accept(self: Arc<Self>, listener: &TcpListener) {
        loop {
            let accepted = listener.accept();
            if self.stopping.load(Ordering::SeqCst) {
                return;
            }
            let Ok((client, _)) = accepted else { continue };
            if self.refusing.load(Ordering::SeqCst) {
                reset_on_close(&client);
                continue;
            }
            // Counted only once it can be cut; this thread alone counts.
            let number = self.accepted.load(Ordering::SeqCst);
            let upstream = *lock(&self.upstream);
            match TcpStream::connect_timeout(&upstream, Duration::from_secs(5)) {
                Ok(server) => self.link(number, client, server),
                Err(_) => reset_on_close(&client),
            }
            let mut links = lock(&self.links);
            links.retain(|link| link.strong_count() > 0);
            self.accepted.store(number + 1, Ordering::SeqCst);
            self.changed.notify_all();
        }
    }

    /// Starts the two threads of a connection.
    fn link(self: &Arc<Self>, number: u64, client: TcpStream, server: TcpStream) {
        let plan = lock(&self.plan).clone();
        let link = Arc::new(Link { client, server, fault: Mutex::new(None) });
        for socket in [&link.client, &link.server] {
            let _ = socket.set_nodelay(true);
            let _ = socket.set_read_timeout(Some(REACTION));
            let _ = socket.set_write_timeout(Some(REACTION));
        }
        lock(&self.links).push(Arc::downgrade(&link));
        for direction in [Direction::ToServer, Direction::ToClient] {
            let pump = Pump::new(self.clone(), link.clone(), direction, number, &plan);
            thread::spawn(move || pump.run());
        }
    }
}

/// One connection. Its sockets close when the second of its threads lets go of it.
#[derive(Debug)]
struct Link {
    client: TcpStream,
    server: TcpStream,
    fault: Mutex<Option<Fault>>,
}

impl Link {
    fn fault(&self) -> Option<Fault> {
        *lock(&self.fault)
    }

    /// The first fault counts, but a stalled or finished connection can still be reset. Whether it was the first.
    fn break_with(&self, fault: Fault) -> bool {
        let mut state = lock(&self.fault);
        if state.is_some() && fault != Fault::Reset {
            return false;
        }
        let is_first = state.replace(fault).is_none();
        for socket in [&self.client, &self.server] {
            match fault {
                Fault::Reset => reset_on_close(socket),
                Fault::Finish => drop(socket.shutdown(Shutdown::Write)),
                Fault::Stall => {}
            }
        }
        is_first
    }
}

/// Closing `socket` sends RST in place of FIN, and throws unsent bytes away.
fn reset_on_close(socket: &TcpStream) {
    let _ = SockRef::from(socket).set_linger(Some(Duration::ZERO));
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::io::{self, Read, Write};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(10);

    /// A server that sends back what it gets, until the end of the stream.
    fn echo() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            for socket in listener.incoming().flatten() {
                thread::spawn(move || {
                    let mut reader = socket.try_clone().unwrap();
                    let mut writer = &socket;
                    let _ = io::copy(&mut reader, &mut writer);
                    let _ = socket.shutdown(Shutdown::Write);
                });
            }
        });
        address
    }

    fn connect(proxy: &Proxy) -> TcpStream {
        let socket = TcpStream::connect(proxy.address()).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    }

    /// Sends `bytes`, closes, and reads to the end: what came back, and how it ended.
    fn exchange(proxy: &Proxy, bytes: &[u8]) -> (Vec<u8>, io::Result<()>) {
        let mut socket = connect(proxy);
        let mut back = Vec::new();
        let result = thread::scope(|scope| {
            let mut writer = socket.try_clone().unwrap();
            let writing = scope.spawn(move || {
                let wrote = writer.write_all(bytes);
                let _ = writer.shutdown(Shutdown::Write);
                wrote
            });
            // The kernel tells of a reset once, to whichever of the two asks first.
            let read = socket.read_to_end(&mut back).map(drop);
            let wrote = writing.join().unwrap();
            if read.is_ok() { wrote } else { read }
        });
        (back, result)
    }

    fn plan(direction: Direction, after_bytes: u64, fault: Fault) -> Plan {
        Plan { cuts: vec![Cut { connection: Some(0), direction, after_bytes, fault }], ..Plan::default() }
    }

    #[test]
    fn without_a_plan_every_byte_arrives_in_both_directions() {
        let proxy = Proxy::start(echo()).unwrap();
        let bytes = Random::new(1).bytes(3 << 20);
        let (back, result) = exchange(&proxy, &bytes);
        result.unwrap();
        assert!(back == bytes);
        assert_eq!(proxy.connections(), 1);
        assert_eq!(proxy.carried_bytes(Direction::ToServer), 3 << 20);
        assert_eq!(proxy.carried_bytes(Direction::ToClient), 3 << 20);
    }

    #[test]
    fn a_cut_lets_exactly_its_bytes_through_and_spares_the_next_connection() {
        for after in [0, 1, 1000, 200_000] {
            let proxy = Proxy::start_with(echo(), plan(Direction::ToClient, after, Fault::Finish)).unwrap();
            let bytes = Random::new(after).bytes(300_000);
            let (back, result) = exchange(&proxy, &bytes);
            result.unwrap();
            assert_eq!(back.len() as u64, after);
            assert!(bytes.starts_with(&back));
            assert!(exchange(&proxy, &bytes).0 == bytes);
            assert_eq!(proxy.connections(), 2);
        }
    }

    #[test]
    fn a_reset_is_a_reset() {
        let proxy = Proxy::start_with(echo(), plan(Direction::ToServer, 500, Fault::Reset)).unwrap();
        let (back, result) = exchange(&proxy, &vec![7; 100_000]);
        assert_eq!(result.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert!(back.len() <= 500);
        assert_eq!(proxy.carried_bytes(Direction::ToServer), 500);
    }

    #[test]
    fn a_stall_tells_nobody_and_can_still_be_cut() {
        let proxy = Proxy::start_with(echo(), plan(Direction::ToServer, 3, Fault::Stall)).unwrap();
        let mut socket = connect(&proxy);
        socket.write_all(b"abcdef").unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
        let mut back = Vec::new();
        let error = socket.read_to_end(&mut back).unwrap_err();
        assert!(pump::is_patience(&error), "{error}");
        assert!(b"abc".starts_with(&back[..]), "{back:?}");
        assert_eq!(proxy.open_connections(), 1);
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(proxy.cut_all(Fault::Reset), 1);
        assert_eq!(socket.read(&mut [0; 9]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[test]
    fn all_connections_are_cut_at_once_and_refused_until_allowed_again() {
        let proxy = Proxy::start(echo()).unwrap();
        let mut sockets: Vec<_> = (0..5).map(|_| connect(&proxy)).collect();
        proxy.wait_for_connections(5, PATIENCE).unwrap();
        proxy.set_refusing(true);
        assert_eq!(proxy.cut_all(Fault::Reset), 5);
        for socket in &mut sockets {
            assert_eq!(socket.read(&mut [0; 9]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        }
        assert!(exchange(&proxy, b"x").1.is_err());
        proxy.set_refusing(false);
        assert_eq!(exchange(&proxy, b"x").0, b"x");
        assert_eq!(proxy.connections(), 6);
    }

    #[test]
    fn delay_and_rate_hold() {
        let slow = Plan { delay: Duration::from_millis(50), bytes_per_second: Some(200_000), ..Plan::default() };
        let proxy = Proxy::start_with(echo(), slow).unwrap();
        let start = clock::now();
        let bytes = Random::new(2).bytes(100_000);
        assert!(exchange(&proxy, &bytes).0 == bytes);
        let took = start.elapsed();
        // Half a second for the bytes, a tenth for there and back.
        assert!(took > Duration::from_millis(550) && took < Duration::from_secs(3), "{took:?}");
    }

    #[test]
    fn a_server_that_is_down_looks_like_one() {
        let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let proxy = Proxy::start(gone).unwrap();
        assert!(exchange(&proxy, b"x").1.is_err());
        proxy.set_upstream(echo());
        assert_eq!(exchange(&proxy, b"x").0, b"x");
    }

    #[test]
    fn the_same_seed_breaks_connections_the_same_way() {
        let plan = Plan::seeded(5, 40, 10_000);
        assert_eq!(plan.cuts, Plan::seeded(5, 40, 10_000).cuts);
        assert_eq!(plan.cuts.len(), 40);
        for fault in [Fault::Reset, Fault::Finish, Fault::Stall] {
            assert!(plan.cuts.iter().any(|cut| cut.fault == fault));
        }
        assert_eq!(plan.cut_of(40, Direction::ToServer), None);
    }
}
