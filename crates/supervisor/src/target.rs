//! What the process behind a call has: its descriptors, its memory.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{OwnedFd, RawFd};
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
    let text = std::fs::read_to_string(format!("/proc/{thread}/fdinfo/{fd}"))?;
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

/// The address that a program passed. None: of another family, or not readable.
#[must_use]
pub fn read_address(thread: i32, at: u64, len: u64) -> Option<SocketAddr> {
    let mut bytes = [0; ADDRESS_MAX];
    let len = usize::try_from(len).ok()?.min(ADDRESS_MAX);
    seccomp::read_memory(thread, at, &mut bytes[..len]).ok()?;
    address::decode(&bytes[..len])
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
