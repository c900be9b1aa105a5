//! Which calls of a program wait for the supervisor.

use std::io;
use std::os::fd::OwnedFd;

use isthmus_sys::seccomp::{self, Filter};
use isthmus_sys::signals;

/// Calls that are always asked about. `io_uring_setup` because what is done through a ring is not seen here; the
/// making of event polls because sockets in them have to be followed; changes of users because we may be unable to look
/// into a program afterwards.
const CALLS: &[libc::c_long] = &[
    libc::SYS_connect,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_io_uring_setup,
    libc::SYS_epoll_create,
    libc::SYS_epoll_create1,
    libc::SYS_setuid,
    libc::SYS_setgid,
    libc::SYS_setreuid,
    libc::SYS_setregid,
    libc::SYS_setresuid,
    libc::SYS_setresgid,
];

/// The filter of supervised programs.
pub const FILTER: Filter<'static> = Filter {
    calls: CALLS,
    options: &[libc::SYS_setsockopt, libc::SYS_getsockopt],
    levels: &[libc::IPPROTO_TCP, libc::IPPROTO_IP, libc::IPPROTO_IPV6],
    // Servers cork and uncork around each answer (nginx: tcp_nopush). Asking each time would cost more than all that we
    // save; a socket of this kernel has no segments to fill, and for who comes over TCP it is a matter of a few packets.
    idle: &[(libc::SYS_setsockopt, libc::IPPROTO_TCP, libc::TCP_CORK)],
    pairs: &[(libc::SOL_SOCKET, libc::SO_DOMAIN), (libc::SOL_SOCKET, libc::SO_PROTOCOL)],
};

/// Put this thread and what it executes behind the filter, and let these signals come to it. Safe between fork and exec,
/// with a program made before.
///
/// # Errors
/// As [`seccomp::install`].
pub fn enter(program: &[libc::sock_filter], unblocked: &[i32]) -> io::Result<OwnedFd> {
    signals::unblock(unblocked)?;
    seccomp::install(program)
}
