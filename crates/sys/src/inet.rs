//! TCP sockets of this and other processes.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

/// What kind of socket a descriptor is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Tcp4,
    Tcp6,
    Other,
}

/// Multipath TCP counts as TCP: Go's listeners are that by default.
pub fn kind_of(socket: BorrowedFd<'_>) -> io::Result<Kind> {
    let protocol = sockopt::socket_protocol(socket)?.map(|protocol| protocol.as_raw().get() as i32);
    let is_tcp = matches!(protocol, Some(libc::IPPROTO_TCP | libc::IPPROTO_MPTCP));
    if !is_tcp {
        return Ok(Kind::Other);
    }
    Ok(match sockopt::socket_domain(socket)? {
        AddressFamily::INET => Kind::Tcp4,
        AddressFamily::INET6 => Kind::Tcp6,
        _ => Kind::Other,
    })
}

/// Has the TCP socket never been connected, nor begun to be?
#[must_use]
pub fn is_fresh(socket: BorrowedFd<'_>) -> bool {
    const CLOSED: u8 = 7;
    // `struct tcp_info` begins with the state, a byte.
    let mut info = [0; 8];
    option(socket, libc::IPPROTO_TCP, libc::TCP_INFO, &mut info).is_ok() && info[0] == CLOSED
}

pub fn local_address(socket: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    let address = rustix::net::getsockname(socket)?;
    SocketAddr::try_from(address).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// The address from which this machine would send to that one.
pub fn source_towards(destination: SocketAddr) -> io::Result<IpAddr> {
    let any: IpAddr =
        if destination.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let probe = UdpSocket::bind((any, 0))?;
    probe.connect(destination)?;
    Ok(probe.local_addr()?.ip())
}

/// A TCP socket with an address of this network, to connect to one of the same family. It does not block.
///
/// # Errors
/// `AddrNotAvailable`: this network does not have the address.
pub fn bound(from: IpAddr) -> io::Result<OwnedFd> {
    let family = if from.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None)?;
    rustix::net::bind(&socket, &SocketAddr::new(from, 0))?;
    Ok(socket)
}

/// Begin to connect.
///
/// # Errors
/// `ConnectionRefused`: nobody listens there.
pub fn begin(socket: BorrowedFd<'_>, to: SocketAddr) -> io::Result<()> {
    match rustix::net::connect(socket, &to) {
        Ok(()) | Err(rustix::io::Errno::INPROGRESS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// How a connection that was begun stands after waiting a little: `true` if it is there.
///
/// # Errors
/// It failed.
pub fn completed(socket: BorrowedFd<'_>, limit: Duration) -> io::Result<bool> {
    use rustix::event::{PollFd, PollFlags, Timespec};
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::OUT)];
    if rustix::event::poll(&mut fds, Some(&limit))? == 0 {
        return Ok(false);
    }
    match sockopt::socket_error(socket)? {
        Ok(()) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// Whether a listener takes only IPv6, not also IPv4 wrapped in it.
#[must_use]
pub fn is_v6_only(socket: BorrowedFd<'_>) -> bool {
    sockopt::ipv6_v6only(socket).unwrap_or(false)
}

/// Send one byte, without waiting.
pub fn send_byte(socket: BorrowedFd<'_>) -> io::Result<()> {
    use rustix::net::SendFlags;
    rustix::net::send(socket, &[0], SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?;
    Ok(())
}

/// Is this a connected Unix socket, and of which shape? Asks nothing that another file system would have to answer.
#[must_use]
pub fn unix_shape(fd: BorrowedFd<'_>) -> Option<super::packet::Shape> {
    use super::packet::Shape;
    if sockopt::socket_domain(fd).ok()? != AddressFamily::UNIX || rustix::net::getpeername(fd).is_err() {
        return None;
    }
    match sockopt::socket_type(fd).ok()? {
        SocketType::STREAM => Some(Shape::Stream),
        SocketType::SEQPACKET => Some(Shape::Packets),
        _ => None,
    }
}

/// Has the other side of a connection ended it, or does it within a little time? Whatever it sent stays unread.
#[must_use]
pub fn hangs_up(socket: BorrowedFd<'_>, limit: Duration) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec};
    let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
    // The other flags of an end come unasked.
    let mut fds = [PollFd::from_borrowed_fd(socket, PollFlags::RDHUP)];
    rustix::event::poll(&mut fds, Some(&limit)).is_ok_and(|count| count > 0)
}

/// Take a connection that waits, blocking, with where it comes from.
pub fn accept(socket: BorrowedFd<'_>) -> io::Result<(OwnedFd, SocketAddr)> {
    let (accepted, address) = rustix::net::acceptfrom_with(socket, SocketFlags::CLOEXEC)?;
    let address = address.and_then(|address| SocketAddr::try_from(address).ok());
    Ok((accepted, address.ok_or(io::ErrorKind::InvalidData)?))
}

pub fn listen(socket: BorrowedFd<'_>, backlog: i32) -> io::Result<()> {
    Ok(rustix::net::listen(socket, backlog)?)
}

/// How long `accept` waits at most, if the program set a limit.
#[must_use]
pub fn receive_limit(socket: BorrowedFd<'_>) -> Option<Duration> {
    sockopt::socket_timeout(socket, sockopt::Timeout::Recv).ok().flatten()
}

/// Give a socket what a program had set on the one before it: limits of time and sizes of buffers.
pub fn copy_options(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    for which in [sockopt::Timeout::Recv, sockopt::Timeout::Send] {
        if let Some(limit) = sockopt::socket_timeout(from, which)? {
            sockopt::set_socket_timeout(to, which, Some(limit))?;
        }
    }
    if sockopt::socket_keepalive(from)? {
        sockopt::set_socket_keepalive(to, true)?;
    }
    Ok(())
}

/// What an option of a socket is, as bytes; returns how many.
pub fn option(socket: BorrowedFd<'_>, level: i32, name: i32, value: &mut [u8]) -> io::Result<usize> {
    let mut len = value.len() as libc::socklen_t;
    // SAFETY: `len` says how large the buffer is.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len) };
    if result != 0 { Err(io::Error::last_os_error()) } else { Ok((len as usize).min(value.len())) }
}

pub fn set_option(socket: BorrowedFd<'_>, level: i32, name: i32, value: &[u8]) -> io::Result<()> {
    let len = value.len() as libc::socklen_t;
    // SAFETY: `len` says how large the buffer is.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value.as_ptr().cast(), len) };
    if result != 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A TCP socket that is not connected.
pub fn tcp(v6: bool) -> io::Result<OwnedFd> {
    let family = if v6 { AddressFamily::INET6 } else { AddressFamily::INET };
    Ok(rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?)
}

pub fn nodelay(socket: BorrowedFd<'_>) -> bool {
    sockopt::tcp_nodelay(socket).unwrap_or(false)
}

pub fn is_nonblocking(socket: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(rustix::fs::fcntl_getfl(socket)?.contains(rustix::fs::OFlags::NONBLOCK))
}

pub fn set_nonblocking(socket: BorrowedFd<'_>, wanted: bool) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(socket)?;
    let bit = rustix::fs::OFlags::NONBLOCK;
    if flags.contains(bit) == wanted {
        return Ok(());
    }
    Ok(rustix::fs::fcntl_setfl(socket, if wanted { flags | bit } else { flags - bit })?)
}

/// The number of the file behind a descriptor.
pub fn inode_of(fd: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(rustix::fs::fstat(fd)?.st_ino)
}

/// The IP addresses of this network.
pub fn own_addresses() -> io::Result<Vec<IpAddr>> {
    let mut first = std::ptr::null_mut();
    // SAFETY: fills in the head of a list, which is freed below.
    if unsafe { libc::getifaddrs(&raw mut first) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let mut found = Vec::new();
    let mut next = first;
    while !next.is_null() {
        // SAFETY: the list is ours until it is freed; an address is as long as its family says.
        unsafe {
            let entry = &*next;
            if !entry.ifa_addr.is_null() {
                match i32::from((*entry.ifa_addr).sa_family) {
                    libc::AF_INET => {
                        let address = &*entry.ifa_addr.cast::<libc::sockaddr_in>();
                        found.push(Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr)).into());
                    }
                    libc::AF_INET6 => {
                        let address = &*entry.ifa_addr.cast::<libc::sockaddr_in6>();
                        found.push(Ipv6Addr::from(address.sin6_addr.s6_addr).into());
                    }
                    _ => {}
                }
            }
            next = entry.ifa_next;
        }
    }
    // SAFETY: allocated by `getifaddrs` above, and not used any more.
    unsafe { libc::freeifaddrs(first) };
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    use super::*;

    #[test]
    fn the_end_of_a_connection_is_seen_behind_what_was_sent() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a listener");
        let mut client = TcpStream::connect(listener.local_addr().expect("bound")).expect("connected");
        client.write_all(&[0]).expect("sent");
        let (accepted, _) = accept(listener.as_fd()).expect("accepted");
        assert!(!hangs_up(accepted.as_fd(), Duration::from_millis(1)));
        drop(client);
        assert!(hangs_up(accepted.as_fd(), Duration::from_secs(10)));
    }
}
