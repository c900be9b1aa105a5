//! Packets with descriptors over Unix sockets.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use rustix::net::sockopt::Timeout;
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType,
};

/// Longest path that fits a socket address, bytes.
const PATH_MAX: usize = 107;

/// Connect to a listening `SOCK_SEQPACKET` socket; waits no longer than `limit` for room in its backlog.
///
/// A path too long for a socket address is reached through its directory.
pub fn connect(path: &Path, limit: Option<Duration>) -> io::Result<OwnedFd> {
    if path.as_os_str().len() > PATH_MAX {
        if let (Some(parent), Some(name)) = (path.parent(), path.file_name()) {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            let directory = rustix::fs::open(parent, flags, Mode::empty())?;
            let short = Path::new("/proc/self/fd").join(directory.as_raw_fd().to_string()).join(name);
            if short.as_os_str().len() <= PATH_MAX {
                return connect(&short, limit);
            }
        }
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::net::sockopt::set_socket_timeout(&socket, Timeout::Send, limit)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::sockopt::set_socket_timeout(&socket, Timeout::Send, None)?;
    Ok(socket)
}

/// The same for a short path, without waiting for whoever listens there; the socket does not block either.
///
/// # Errors
/// `WouldBlock` while too many wait there already.
pub fn connect_now(path: &Path) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

/// What a Unix socket's bytes are to its user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    Stream,
    Packets,
}

/// Connect to a listening Unix socket by its file, whatever became of its name, without waiting for who listens.
///
/// # Errors
/// `WouldBlock` while too many wait there already; `ConnectionRefused` if nobody listens any more.
pub fn connect_to(file: BorrowedFd<'_>, shape: Shape) -> io::Result<OwnedFd> {
    let kind = if shape == Shape::Stream { SocketType::STREAM } else { SocketType::SEQPACKET };
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None)?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)?;
    let flags = rustix::fs::fcntl_getfl(&socket)?;
    rustix::fs::fcntl_setfl(&socket, flags - OFlags::NONBLOCK)?;
    Ok(socket)
}

/// Two connected stream sockets, non-blocking.
pub fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )?)
}

/// Take no descriptors from the other end: whoever closes what came unasked may wait for it. Linux 6.16; before that
/// nothing changes.
pub fn refuse_descriptors(socket: BorrowedFd<'_>) {
    const SO_PASSRIGHTS: libc::c_int = 83;
    let no: libc::c_int = 0;
    // SAFETY: the value is an int, and its length says so.
    let _ = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_PASSRIGHTS,
            (&raw const no).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
}

/// Send one packet with descriptors; blocks while the receiver's queue is full.
pub fn send(socket: BorrowedFd<'_>, packet: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    send_with(socket, packet, descriptors, SendFlags::NOSIGNAL)
}

/// The same, without waiting.
///
/// # Errors
/// `WouldBlock` while the receiver's queue is full.
pub fn send_now(socket: BorrowedFd<'_>, packet: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
    send_with(socket, packet, descriptors, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
}

fn send_with(
    socket: BorrowedFd<'_>,
    packet: &[u8],
    descriptors: &[BorrowedFd<'_>],
    flags: SendFlags,
) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    rustix::net::sendmsg(socket, &[IoSlice::new(packet)], &mut control, flags)?;
    Ok(())
}

/// Receive one packet into `buffer`; returns its length and its descriptors. Length 0: the other
/// side is gone.
///
/// # Errors
/// `InvalidData` if the packet or its descriptors were cut; the descriptors are closed.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received =
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(io::ErrorKind::InvalidData.into());
    }
    Ok((received.bytes, descriptors))
}

/// Put bytes into a non-blocking stream without waiting.
pub fn push(socket: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    Ok(rustix::net::send(socket, bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)?)
}

/// Take bytes from a stream without waiting. 0: the other side is gone.
pub fn pull(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    let (n, _) = rustix::net::recv(socket, buffer, RecvFlags::DONTWAIT)?;
    Ok(n)
}

/// Put pieces of memory into a stream, one behind the other, without waiting. Returns how many bytes it took.
///
/// # Safety
/// Each piece, start and length, can be read. Somebody else may write there meanwhile: then that is what is sent.
pub unsafe fn push_pieces(socket: BorrowedFd<'_>, pieces: &[(*const u8, usize)]) -> io::Result<usize> {
    // SAFETY: as the caller promises; the slices go nowhere but to the kernel.
    let slices = pieces.iter().map(|(start, len)| unsafe { std::slice::from_raw_parts(*start, *len) });
    let slices: Vec<_> = slices.map(IoSlice::new).collect();
    let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
    Ok(rustix::net::sendmsg(socket, &slices, &mut SendAncillaryBuffer::default(), flags)?)
}

/// Append to `buffer` what a stream holds, without waiting and without making the buffer larger. 0: the other side
/// sends no more.
pub fn pull_into(socket: BorrowedFd<'_>, buffer: &mut Vec<u8>) -> io::Result<usize> {
    let (n, _) = rustix::net::recv(socket, rustix::buffer::spare_capacity(buffer), RecvFlags::DONTWAIT)?;
    Ok(n)
}

/// Take no more: who writes at the other end is told so.
pub fn shut_receive(socket: BorrowedFd<'_>) {
    let _ = rustix::net::shutdown(socket, Shutdown::Read);
}

/// Let [`pull_waiting`] wait, for at most `limit`.
pub fn allow_waiting(socket: BorrowedFd<'_>, limit: Duration) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(socket)?;
    rustix::fs::fcntl_setfl(socket, flags - OFlags::NONBLOCK)?;
    Ok(rustix::net::sockopt::set_socket_timeout(socket, Timeout::Recv, Some(limit))?)
}

/// Take bytes from a stream, waiting for them as [`allow_waiting`] said.
pub fn pull_waiting(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    let (n, _) = rustix::net::recv(socket, buffer, RecvFlags::empty())?;
    Ok(n)
}

/// Send no more: the other end reads what there is and then the end.
pub fn shut_send(socket: BorrowedFd<'_>) {
    let _ = rustix::net::shutdown(socket, Shutdown::Write);
}

/// End both directions, for every holder of the socket.
pub fn shut(socket: BorrowedFd<'_>) {
    let _ = rustix::net::shutdown(socket, Shutdown::Both);
}

/// Make the send buffer as small as the kernel allows.
pub fn smallest_send_buffer(socket: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::net::sockopt::set_socket_send_buffer_size(socket.as_fd(), 1)?)
}
