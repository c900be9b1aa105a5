//! What programs ask of a socket that was exchanged, and only a TCP socket can answer.

use std::os::fd::{AsFd, RawFd};

use isthmus_sys::inet;
use isthmus_sys::seccomp::{self, Answer, Call};

use crate::address;
use crate::supervisor::{Exchanged, State, Supervisor, Verdict};
use crate::target;

/// `struct tcp_info` begins with the state of the connection.
const ESTABLISHED: u8 = 1;
/// Longest option that is kept, bytes, and how many of one socket.
const OPTION_MAX: usize = 256;
const OPTIONS_MAX: usize = 32;

impl Supervisor {
    /// `getsockname` and `getpeername`.
    pub(crate) fn name(&self, call: Call, of_peer: bool) -> Verdict {
        let [fd, at, len_at, ..] = call.arguments;
        let mut state = self.state();
        let Some(entry) = find(&mut state, call, fd) else { return Verdict::Untouched };
        let address = address::encode(if of_peer { entry.peer } else { entry.local }, entry.v6);
        match target::write_address(call.thread, at, len_at, &address) {
            Ok(()) => Verdict::Is(Answer::Value(0)),
            Err(number) => Verdict::Is(Answer::Errno(number)),
        }
    }

    /// `getsockopt` at the levels that the filter names.
    pub(crate) fn option(&self, call: Call) -> Verdict {
        let [fd, level, name, at, len_at, _] = call.arguments;
        let (level, name) = (level as i32, name as i32);
        let mut state = self.state();
        let Some(entry) = find(&mut state, call, fd) else { return Verdict::Untouched };
        let value = match value_of(entry, level, name) {
            Ok(value) => value,
            Err(error) => {
                return Verdict::Is(Answer::Errno(error.raw_os_error().unwrap_or(libc::ENOPROTOOPT)));
            }
        };
        drop(state);
        let mut room = [0; 4];
        if seccomp::read_memory(call.thread, len_at, &mut room).is_err() {
            return Verdict::Is(Answer::Errno(libc::EFAULT));
        }
        let Ok(room) = usize::try_from(i32::from_ne_bytes(room)) else {
            return Verdict::Is(Answer::Errno(libc::EINVAL));
        };
        let value = &value[..value.len().min(room)];
        let written = seccomp::write_memory(call.thread, at, value)
            .and_then(|()| seccomp::write_memory(call.thread, len_at, &(value.len() as u32).to_ne_bytes()));
        Verdict::Is(written.map_or(Answer::Errno(libc::EFAULT), |()| Answer::Value(0)))
    }

    /// `setsockopt` at the levels that the filter names: kept, if a TCP socket would take it.
    pub(crate) fn set_option(&self, call: Call) -> Verdict {
        let [fd, level, name, at, len, _] = call.arguments;
        let (level, name) = (level as i32, name as i32);
        let mut state = self.state();
        let Some(entry) = find(&mut state, call, fd) else { return Verdict::Untouched };
        let len = usize::try_from(len as i32).unwrap_or(0).min(OPTION_MAX);
        let mut value = vec![0; len];
        if seccomp::read_memory(call.thread, at, &mut value).is_err() {
            return Verdict::Is(Answer::Errno(libc::EFAULT));
        }
        let taken = inet::tcp(entry.v6).and_then(|tcp| inet::set_option(tcp.as_fd(), level, name, &value));
        if let Err(error) = taken {
            return Verdict::Is(Answer::Errno(error.raw_os_error().unwrap_or(libc::ENOPROTOOPT)));
        }
        if entry.set.len() < OPTIONS_MAX || entry.set.contains_key(&(level, name)) {
            entry.set.insert((level, name), value);
        }
        Verdict::Is(Answer::Value(0))
    }
}

fn find(state: &mut State, call: Call, fd: u64) -> Option<&mut Exchanged> {
    if state.exchanged.is_empty() {
        return None;
    }
    let descriptor = target::look(call.thread, fd as RawFd).ok()?;
    state.exchanged.get_mut(&descriptor.inode)
}

fn value_of(entry: &Exchanged, level: i32, name: i32) -> std::io::Result<Vec<u8>> {
    let number = |value: i32| Ok(value.to_ne_bytes().to_vec());
    match (level, name) {
        (libc::SOL_SOCKET, libc::SO_DOMAIN) => number(if entry.v6 { libc::AF_INET6 } else { libc::AF_INET }),
        (libc::SOL_SOCKET, _) => number(libc::IPPROTO_TCP),
        _ => {
            if let Some(value) = entry.set.get(&(level, name)) {
                return Ok(value.clone());
            }
            let mut value = vec![0; OPTION_MAX];
            let len = inet::option(inet::tcp(entry.v6)?.as_fd(), level, name, &mut value)?;
            value.truncate(len);
            if (level, name) == (libc::IPPROTO_TCP, libc::TCP_INFO) {
                if let Some(state) = value.first_mut() {
                    *state = ESTABLISHED;
                }
            }
            Ok(value)
        }
    }
}
