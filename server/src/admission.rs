//! `Admission`: how many connections there may be, of whom, and which one gives way when there are too many.
//!
//! Nobody is known before a handshake is over, so a handshake may be broken off: the oldest one of the address that has
//! the most of them gives way to whoever comes next. Who holds mute connections displaces his own. A connection whose
//! machine has proved who it is is never broken off here; one too many is not let in.

use std::collections::{HashMap, VecDeque};
use std::convert::Infallible;
use std::io;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use strandline_actors::runtime::clock;
use strandline_actors::runtime::transport::Transport;
use strandline_messages::AgentId;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::oneshot;

use crate::config::Limits;

/// The log tells of handshakes that gave way at most so often.
const TELLING: Duration = Duration::from_secs(10);

/// Why a connection is not let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TurnedAway {
    /// `limits.connections`.
    #[error("the server has {0} connections, as many as it may (limits.connections)")]
    House(usize),
    /// `limits.connections_per_address`.
    #[error("its address has {0} connections, as many as it may (limits.connections_per_address)")]
    Address(usize),
    /// `limits.connections_per_agent`.
    #[error("this machine has {0} connections, as many as it may (limits.connections_per_agent)")]
    Agent(usize),
}

/// Whoever is counted as one: an IPv4 address, or the /64 of an IPv6 address, which one customer has for himself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Origin(IpAddr);

impl From<IpAddr> for Origin {
    fn from(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self(address.into()),
            IpAddr::V6(address) => Self(std::net::Ipv6Addr::from_bits(address.to_bits() >> 64 << 64).into()),
        }
    }
}

/// See the module.
#[derive(Debug)]
pub struct Admission {
    limits: Limits,
    desk: Mutex<Desk>,
}

#[derive(Debug, Default)]
struct Desk {
    /// All connections, handshakes among them.
    connections: usize,
    /// Handshakes under way.
    handshakes: usize,
    next: u64,
    /// Only those that have connections.
    origins: HashMap<Origin, Guests>,
    /// Only those that have connections.
    agents: HashMap<AgentId, usize>,
    /// Handshakes that gave way since the log last told of them, and when that was.
    given_way: u64,
    told: Option<Instant>,
}

/// The connections of one origin.
#[derive(Debug, Default)]
struct Guests {
    connections: usize,
    /// The handshakes among them, the oldest first. Dropping the sender breaks the handshake off.
    handshakes: VecDeque<(u64, oneshot::Sender<Infallible>)>,
}

/// Resolves when the handshake has to give way; also when it is over.
pub type GiveWay = oneshot::Receiver<Infallible>;

impl Admission {
    /// Nobody is there yet.
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits, desk: Mutex::default() })
    }

    /// How long a handshake, and an enrolment after it, may take.
    pub fn handshake_timeout(&self) -> Duration {
        self.limits.handshake_timeout
    }

    /// A connection was accepted; its handshake begins. It is counted for as long as the [`Visit`] lives.
    pub fn enter(self: &Arc<Self>, address: IpAddr) -> Result<(Visit, GiveWay), TurnedAway> {
        let origin = Origin::from(address);
        let mut desk = self.desk.lock();
        let here = desk.origins.get(&origin).map_or(0, |guests| guests.connections);
        if here >= self.limits.connections_per_address && !desk.break_off(origin) {
            return Err(TurnedAway::Address(here));
        }
        if desk.connections >= self.limits.connections && !desk.make_room() {
            return Err(TurnedAway::House(desk.connections));
        }
        if desk.handshakes >= self.limits.handshakes {
            desk.make_room();
        }
        desk.next += 1;
        desk.connections += 1;
        desk.handshakes += 1;
        let (number, (sender, give_way)) = (desk.next, oneshot::channel());
        let guests = desk.origins.entry(origin).or_default();
        guests.connections += 1;
        guests.handshakes.push_back((number, sender));
        Ok((Visit { admission: Arc::clone(self), origin, number, agent: None }, give_way))
    }
}

impl Desk {
    /// The oldest handshake of the busiest origin gives way. False if there is none.
    fn make_room(&mut self) -> bool {
        let busiest = self.origins.iter().max_by_key(|(_, guests)| guests.handshakes.len());
        busiest.map(|(origin, _)| *origin).is_some_and(|origin| self.break_off(origin))
    }

    fn break_off(&mut self, origin: Origin) -> bool {
        let oldest = self.origins.get_mut(&origin).and_then(|guests| guests.handshakes.pop_front());
        if oldest.is_none() {
            return false;
        }
        self.handshakes -= 1;
        self.given_way += 1;
        let now = clock::now();
        if self.told.is_none_or(|told| now.saturating_duration_since(told) >= TELLING) {
            let (count, pending) = (std::mem::take(&mut self.given_way), self.handshakes);
            tracing::warn!(count, pending, from = %origin.0, "too many connections: old handshakes give way to new ones");
            self.told = Some(now);
        }
        true
    }

    fn handshake_over(&mut self, origin: Origin, number: u64) {
        let Some(guests) = self.origins.get_mut(&origin) else { return };
        let before = guests.handshakes.len();
        guests.handshakes.retain(|(known, _)| *known != number);
        self.handshakes -= before - guests.handshakes.len();
    }
}

/// One connection, from its accepting to its end.
#[derive(Debug)]
pub struct Visit {
    admission: Arc<Admission>,
    origin: Origin,
    number: u64,
    agent: Option<AgentId>,
}

impl Visit {
    /// The handshake is over and has shown who is there: from now on the connection does not give way.
    pub fn identify(&mut self, agent: AgentId) -> Result<(), TurnedAway> {
        let mut desk = self.admission.desk.lock();
        let count = desk.agents.entry(agent).or_default();
        if *count >= self.admission.limits.connections_per_agent {
            return Err(TurnedAway::Agent(*count));
        }
        *count += 1;
        self.agent = Some(agent);
        desk.handshake_over(self.origin, self.number);
        Ok(())
    }
}

impl Drop for Visit {
    fn drop(&mut self) {
        let mut desk = self.admission.desk.lock();
        desk.handshake_over(self.origin, self.number);
        desk.connections -= 1;
        if let Some(guests) = desk.origins.get_mut(&self.origin) {
            guests.connections -= 1;
            if guests.connections == 0 {
                desk.origins.remove(&self.origin);
            }
        }
        if let Some(agent) = self.agent
            && let Some(count) = desk.agents.get_mut(&agent)
        {
            *count -= 1;
            if *count == 0 {
                desk.agents.remove(&agent);
            }
        }
    }
}

/// A connection that is counted until it is dropped.
pub struct Counted<S> {
    stream: S,
    _visit: Visit,
}

impl<S: Transport> Counted<S> {
    /// `stream` is what `visit` counts.
    pub fn new(stream: S, visit: Visit) -> Self {
        Self { stream, _visit: visit }
    }
}

impl<S: Transport> AsyncRead for Counted<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl<S: Transport> AsyncWrite for Counted<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
    const THERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));

    fn admission(limits: Limits) -> Arc<Admission> {
        Admission::new(limits)
    }

    fn gives_way(give_way: &mut GiveWay) -> bool {
        matches!(give_way.try_recv(), Err(oneshot::error::TryRecvError::Closed))
    }

    #[test]
    fn s22_the_oldest_handshake_of_the_busiest_address_gives_way() {
        let admission = admission(Limits { handshakes: 3, ..Limits::default() });
        let (_one, mut honest) = admission.enter(THERE).unwrap();
        let mut mute: Vec<_> = (0..5).map(|_| admission.enter(HERE).unwrap()).collect();
        assert!(!gives_way(&mut honest));
        let given: Vec<bool> = mute.iter_mut().map(|(_, give_way)| gives_way(give_way)).collect();
        assert_eq!(given, [true, true, true, false, false], "three at once: the honest one and the two newest");
        mute.clear();
        let desk = admission.desk.lock();
        assert_eq!((desk.connections, desk.handshakes, desk.origins.len()), (1, 1, 1));
    }

    #[test]
    fn s22_who_has_proved_who_he_is_stays_and_one_too_many_is_not_let_in() {
        let limits = Limits { connections_per_agent: 2, connections_per_address: 3, ..Limits::default() };
        let admission = admission(limits);
        let agent = AgentId([1; 16]);
        let mut inside = Vec::new();
        for _ in 0..2 {
            let (mut visit, _) = admission.enter(HERE).unwrap();
            visit.identify(agent).unwrap();
            inside.push(visit);
        }
        let (mut third, _) = admission.enter(HERE).unwrap();
        assert_eq!(third.identify(agent), Err(TurnedAway::Agent(2)));
        third.identify(AgentId([2; 16])).unwrap();
        assert_eq!(admission.enter(HERE).unwrap_err(), TurnedAway::Address(3));
        let (_other, _) = admission.enter(THERE).unwrap();
        inside.clear();
        let (mut again, _) = admission.enter(HERE).unwrap();
        again.identify(agent).unwrap();
        drop((third, again));
        assert!(admission.desk.lock().agents.is_empty());
    }

    #[test]
    fn a_full_house_breaks_off_handshakes_before_it_turns_anybody_away() {
        let admission = admission(Limits { connections: 2, ..Limits::default() });
        let (mut one, _) = admission.enter(HERE).unwrap();
        one.identify(AgentId([1; 16])).unwrap();
        let (mute, mut give_way) = admission.enter(THERE).unwrap();
        let (mut two, _) = admission.enter(HERE).unwrap();
        assert!(gives_way(&mut give_way));
        drop(mute);
        two.identify(AgentId([1; 16])).unwrap();
        assert_eq!(admission.enter(THERE).unwrap_err(), TurnedAway::House(2));
    }

    #[test]
    fn an_ipv6_customer_is_one_origin_and_a_mapped_address_is_its_ipv4_address() {
        let origin = |text: &str| Origin::from(text.parse::<IpAddr>().unwrap());
        assert_eq!(origin("2001:db8:0:1::1"), origin("2001:db8:0:1:ffff::2"));
        assert_ne!(origin("2001:db8:0:1::1"), origin("2001:db8:0:2::1"));
        assert_eq!(origin("::ffff:192.0.2.1"), origin("192.0.2.1"));
    }
}
