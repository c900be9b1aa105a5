//! Connections per second: connect, one byte across, close at both ends.
//!
//! The byte proves that the connection worked, and tells the server when the last one has come: 0, then 1 at the end.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::{
        fd::RawFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use rustix::net::{AddressFamily, getsockname};

use crate::{
    clock::{Clock, cpu_seconds},
    error::BenchError,
    fd::duplicate,
};

/// Where to connect to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl FromStr for Address {
    type Err = BenchError;

    fn from_str(word: &str) -> Result<Self, BenchError> {
        if word.starts_with('/') {
            return Ok(Self::Unix(Path::new(word).to_owned()));
        }
        word.parse().map(Self::Tcp).map_err(|_| BenchError::BadAddress { address: word.to_owned() })
    }
}

/// How many connections were made, in how long.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Connects {
    pub connections: u64,
    pub seconds: f64,
    pub cpu_s: f64,
}

/// Connect, send one byte, wait for the server to close, close; again and again for `warmup`, then for `duration`.
///
/// # Errors
///
/// [`BenchError::Transport`] when a connection cannot be made or used.
pub fn connect_client(
    address: &Address,
    warmup: Duration,
    duration: Duration,
) -> Result<Connects, BenchError> {
    let once = |byte: u8| match address {
        Address::Tcp(address) => TcpStream::connect(address).and_then(|stream| visit(stream, byte)),
        Address::Unix(path) => UnixStream::connect(path).and_then(|stream| visit(stream, byte)),
    };
    let clock = Clock::start();
    let mut found = Connects { connections: 0, seconds: 0.0, cpu_s: 0.0 };
    for duration in [warmup, duration] {
        let cpu = cpu_seconds();
        let started = clock.ticks();
        let until = started + clock.ticks_in(duration);
        let mut now = started;
        found.connections = 0;
        while found.connections == 0 || now < until {
            once(0).map_err(BenchError::transport("making a connection"))?;
            found.connections += 1;
            now = clock.ticks();
        }
        found.seconds = clock.seconds(now - started);
        found.cpu_s = cpu_seconds() - cpu;
    }
    once(1).map_err(BenchError::transport("making the last connection"))?;
    Ok(found)
}

fn visit<S: Read + Write>(mut stream: S, byte: u8) -> io::Result<()> {
    stream.write_all(&[byte])?;
    match stream.read(&mut [0])? {
        0 => Ok(()),
        _ => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// Accept on a listening socket, TCP or AF_UNIX, until the client says that it is done.
///
/// # Errors
///
/// [`BenchError::Transport`] when `listener` does not accept, or a client leaves without its byte.
pub fn connect_server(listener: RawFd) -> Result<Connects, BenchError> {
    let listener = duplicate(listener)?;
    let name = getsockname(&listener)
        .map_err(io::Error::from)
        .map_err(BenchError::transport("asking the listener"))?;
    if name.address_family() == AddressFamily::UNIX {
        let listener = UnixListener::from(listener);
        serve(|| Ok(listener.accept()?.0))
    } else {
        let listener = TcpListener::from(listener);
        serve(|| Ok(listener.accept()?.0))
    }
}

fn serve<S: Read>(mut accept: impl FnMut() -> io::Result<S>) -> Result<Connects, BenchError> {
    let clock = Clock::start();
    let mut begun = None;
    let mut connections = 0;
    loop {
        let mut byte = [0];
        accept()
            .and_then(|mut stream| stream.read_exact(&mut byte))
            .map_err(BenchError::transport("accepting a connection"))?;
        connections += 1;
        let (started, cpu) = *begun.get_or_insert_with(|| (clock.ticks(), cpu_seconds()));
        if byte != [0] {
            let seconds = clock.seconds(clock.ticks() - started);
            return Ok(Connects { connections, seconds, cpu_s: cpu_seconds() - cpu });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{os::fd::AsRawFd, thread::spawn};

    use super::*;

    #[test]
    fn an_address_is_a_socket_address_or_a_path() {
        assert_eq!("/tmp/door".parse::<Address>().expect("path"), Address::Unix("/tmp/door".into()));
        assert!(matches!("10.0.0.1:80".parse(), Ok(Address::Tcp(_))));
        assert!(matches!("worker-7".parse::<Address>(), Err(BenchError::BadAddress { .. })));
    }

    #[test]
    fn connections_are_counted_at_both_ends() {
        let listener = TcpListener::bind("127.0.0.1:0").expect("listener");
        let address = Address::Tcp(listener.local_addr().expect("address"));
        let server = spawn(move || connect_server(listener.as_raw_fd()));
        let found = connect_client(&address, Duration::ZERO, Duration::from_millis(5)).expect("client");
        let served = server.join().expect("thread").expect("server");
        assert!(found.connections >= 1);
        assert_eq!(served.connections, found.connections + 2, "one to warm up, one to end");
    }
}
