//! The kernel's socket table: what no log can gloss over.

use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use strandline_actors::runtime::clock;

/// State of a TCP socket, by the kernel's numbers (`include/net/tcp_states.h`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Both directions open.
    Established,
    /// The peer has closed, this side has not: the process forgot its socket.
    CloseWait,
    /// Waiting out stray packets; no process has it.
    TimeWait,
    /// Closed.
    Closed,
    /// Accepting connections.
    Listen,
    /// Any other state of opening or closing, by its number.
    Other(u8),
}

/// One line of the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Socket {
    /// This end.
    pub local: SocketAddr,
    /// The other end.
    pub remote: SocketAddr,
    /// Its state.
    pub state: State,
}

/// All TCP sockets, IPv4 and IPv6, of this network namespace.
pub fn tcp() -> io::Result<Vec<Socket>> {
    let mut sockets = Vec::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        match fs::read_to_string(table) {
            Ok(text) => sockets.extend(text.lines().skip(1).filter_map(parse)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(sockets)
}

/// Both ends of the connections to `port` that are not over: neither TIME_WAIT, nor closed, nor the listener itself.
pub fn open_connections(port: u16) -> io::Result<Vec<Socket>> {
    let mut sockets = tcp()?;
    sockets.retain(|socket| {
        let ours = socket.local.port() == port || socket.remote.port() == port;
        ours && !matches!(socket.state, State::TimeWait | State::Closed | State::Listen)
    });
    Ok(sockets)
}

/// Waits until no connection to `port` is open; an error names those that still are after `patience`.
pub fn wait_until_none_open(port: u16, patience: Duration) -> Result<()> {
    let end = clock::now() + patience;
    loop {
        let open = open_connections(port)?;
        if open.is_empty() {
            return Ok(());
        }
        anyhow::ensure!(clock::now() < end, "still open after {patience:?}: {open:#?}");
        // The kernel announces no change of this table.
        thread::sleep(Duration::from_millis(20));
    }
}

fn parse(line: &str) -> Option<Socket> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let local = address(fields.next()?)?;
    let remote = address(fields.next()?)?;
    let state = match u8::from_str_radix(fields.next()?, 16).ok()? {
        1 => State::Established,
        6 => State::TimeWait,
        7 => State::Closed,
        8 => State::CloseWait,
        10 => State::Listen,
        other => State::Other(other),
    };
    Some(Socket { local, remote, state })
}

/// `0100007F:2677` is 127.0.0.1:9847: each 32-bit word of the address is printed in the machine's byte order.
fn address(text: &str) -> Option<SocketAddr> {
    let (address, port) = text.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let word = |n: usize| u32::from_str_radix(address.get(8 * n..8 * n + 8)?, 16).ok().map(u32::to_ne_bytes);
    let ip = match address.len() {
        8 => IpAddr::V4(Ipv4Addr::from(word(0)?)),
        32 => {
            let mut bytes = [0; 16];
            for (n, part) in bytes.chunks_exact_mut(4).enumerate() {
                part.copy_from_slice(&word(n)?);
            }
            IpAddr::V6(Ipv6Addr::from(bytes)).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_line_of_the_table_is_read() {
        let line = "   0: 0100007F:2677 0100007F:D431 08 00000000:00000000 00:00000000 00000000     0        0 1 1";
        let socket = parse(line).unwrap();
        assert_eq!(socket.local, "127.0.0.1:9847".parse().unwrap());
        assert_eq!(socket.remote, "127.0.0.1:54321".parse().unwrap());
        assert_eq!(socket.state, State::CloseWait);
        assert_eq!(address("00000000000000000000000001000000:0001"), Some("[::1]:1".parse().unwrap()));
        assert_eq!(address("0000000000000000FFFF00000100007F:0001"), Some("127.0.0.1:1".parse().unwrap()));
        assert_eq!(parse("nonsense"), None);
    }

    #[test]
    fn a_forgotten_socket_is_seen_and_a_closed_one_is_not() {
        for ip in ["127.0.0.1", "::1"] {
            let Ok(listener) = TcpListener::bind((ip, 0)) else { continue };
            let port = listener.local_addr().unwrap().port();
            let client = TcpStream::connect((ip, port)).unwrap();
            let (server, _) = listener.accept().unwrap();
            assert_eq!(open_connections(port).unwrap().len(), 2, "both ends");
            drop(client);
            let forgotten = wait_until_none_open(port, Duration::from_millis(50)).unwrap_err();
            assert!(forgotten.to_string().contains("CloseWait"), "{forgotten}");
            drop(server);
            wait_until_none_open(port, Duration::from_secs(5)).unwrap();
        }
    }
}
