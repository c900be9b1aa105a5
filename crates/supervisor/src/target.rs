//! What the process behind a call has: its descriptors, its memory.

use std::fs::File;
use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd, RawFd};
use std::path::Path;

use isthmus_sys::{inet, seccomp};

use crate::address::{self, ADDRESS_MAX};

/// A descriptor as the process has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Of the file behind it; another one after the number was used again.
    pub inode: u64,
    pub nonblocking: bool,
    pub close_on_exec: bool,
}

/// Look at a descriptor of the process that a thread belongs to.
///
/// # Errors
/// There is none of this number, or we may not look.
pub fn look(thread: i32, fd: RawFd) -> io::Result<Descriptor> {
    let text = read_short(format!("/proc/{thread}/fdinfo/{fd}"))?;
    let field = |name| text.lines().find_map(|line| line.strip_prefix(name)).map(str::trim);
    let flags = field("flags:").and_then(|text| i32::from_str_radix(text, 8).ok());
    let flags = flags.ok_or(io::ErrorKind::InvalidData)?;
    let inode = match field("ino:").and_then(|text| text.parse().ok()) {
        Some(inode) => inode,
        // Linux before 5.14.
        None => std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(format!("/proc/{thread}/fd/{fd}"))?),
    };
    Ok(Descriptor {
        inode,
        nonblocking: flags & libc::O_NONBLOCK != 0,
        close_on_exec: flags & libc::O_CLOEXEC != 0,
    })
}

/// What Linux says in a few lines: in one read, which is all that is needed of a file that is made for it.
fn read_short(path: String) -> io::Result<String> {
    let mut bytes = [0; 1024];
    let len = File::open(path)?.read(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes[..len]).into_owned())
}

/// A socket of the process that a thread belongs to, before it is exchanged.
pub struct Held {
    pub socket: OwnedFd,
    pub inode: u64,
    pub nonblocking: bool,
}

/// Take a copy of a descriptor.
///
/// # Errors
/// There is none of this number, or we may not.
pub fn hold(thread: i32, fd: RawFd) -> io::Result<Held> {
    let socket = seccomp::descriptor_of(thread, fd)?;
    let inode = inet::inode_of(socket.as_fd())?;
    let nonblocking = inet::is_nonblocking(socket.as_fd())?;
    Ok(Held { socket, inode, nonblocking })
}

/// May we not look into a process? It has changed its user, most likely, and we may not trace.
#[must_use]
pub fn is_hidden(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPERM | libc::EACCES))
}

/// The address that a program passed. None: of another family, or not readable for the program either.
///
/// # Errors
/// We may not look into the process.
pub fn read_address(thread: i32, at: u64, len: u64) -> io::Result<Option<SocketAddr>> {
    let mut bytes = [0; ADDRESS_MAX];
    let len = usize::try_from(len).unwrap_or(usize::MAX).min(ADDRESS_MAX);
    match seccomp::read_memory(thread, at, &mut bytes[..len]) {
        Ok(()) => Ok(address::decode(&bytes[..len])),
        Err(error) if is_hidden(&error) => Err(error),
        Err(_) => Ok(None),
    }
}

/// Would a call that changes users or groups change one of this process? `None`: it cannot be said.
#[must_use]
pub fn changes_user(thread: i32, wanted: &[u32], field: &str) -> Option<bool> {
    let text = std::fs::read_to_string(format!("/proc/{thread}/status")).ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    let now: Vec<u32> = line.split_whitespace().filter_map(|word| word.parse().ok()).collect();
    // All ones mean: as it is.
    Some(wanted.iter().any(|id| *id != u32::MAX && now.iter().any(|known| known != id)))
}

/// Write an address, or as much of it as the program has room for, and how long it is, as `accept` and `getpeername` do.
///
/// # Errors
/// The error number that the program gets.
pub fn write_address(thread: i32, at: u64, len_at: u64, address: &[u8]) -> Result<(), i32> {
    let fault = |_| libc::EFAULT;
    let mut room = [0; 4];
    seccomp::read_memory(thread, len_at, &mut room).map_err(fault)?;
    let room = i32::from_ne_bytes(room);
    let room = usize::try_from(room).map_err(|_| libc::EINVAL)?.min(address.len());
    seccomp::write_memory(thread, at, &address[..room]).map_err(fault)?;
    seccomp::write_memory(thread, len_at, &(address.len() as u32).to_ne_bytes()).map_err(fault)
}

/// Copies of sockets that any process has which we may look at, by their inodes.
#[must_use]
pub fn find_sockets(wanted: &dyn Fn(u64) -> bool) -> Vec<(u64, OwnedFd)> {
    let mut found: Vec<(u64, OwnedFd)> = Vec::new();
    for process in numbers_in(Path::new("/proc")) {
        for fd in numbers_in(&Path::new("/proc").join(process.to_string()).join("fd")) {
            let Ok(link) = std::fs::read_link(format!("/proc/{process}/fd/{fd}")) else { continue };
            let inode =
                link.to_str().and_then(|text| text.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok());
            let Some(inode) = inode.filter(|inode| wanted(*inode)) else { continue };
            if found.iter().any(|(known, _)| *known == inode) {
                continue;
            }
            let Ok(copy) = seccomp::descriptor_of(process, fd) else { continue };
            if inet::inode_of(std::os::fd::AsFd::as_fd(&copy)).is_ok_and(|seen| seen == inode) {
                found.push((inode, copy));
            }
        }
    }
    found
}

/// The inodes of the sockets that a process has.
#[must_use]
pub fn socket_inodes(thread: i32) -> Vec<u64> {
    let directory = Path::new("/proc").join(thread.to_string()).join("fd");
    let links =
        numbers_in(&directory).into_iter().map(|fd| std::fs::read_link(directory.join(fd.to_string())));
    links
        .flatten()
        .filter_map(|link| link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok())
        .collect()
}

/// Descriptors of a process by kind: those that are event polls.
#[must_use]
pub fn epolls_of(thread: i32) -> Vec<RawFd> {
    let directory = Path::new("/proc").join(thread.to_string()).join("fd");
    let is_epoll = |fd: &i32| {
        std::fs::read_link(directory.join(fd.to_string()))
            .is_ok_and(|l| l.as_os_str() == "anon_inode:[eventpoll]")
    };
    numbers_in(&directory).into_iter().filter(is_epoll).collect()
}

fn numbers_in(directory: &Path) -> Vec<i32> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
}
