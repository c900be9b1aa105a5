//! Sockets that somebody else holds: which of them still exist?
//!
//! A descriptor in an epoll set does not keep its file open, and leaves the set when the last holder anywhere closes
//! it. Linux shows what a set contains in `/proc/self/fdinfo` (proc(5)), so a set is a list of weak references. Nobody
//! ever waits on it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};

/// A set of weak references to open files, each with a token.
pub struct Living(OwnedFd);

impl Living {
    pub fn new() -> io::Result<Self> {
        Ok(Self(epoll::create(CreateFlags::CLOEXEC)?))
    }

    /// Remember a file until it is closed everywhere. The caller's descriptor may be closed at once, and its number
    /// used again.
    ///
    /// # Errors
    /// It is a file that cannot be polled, or the same file was added under the same number.
    pub fn add(&self, fd: BorrowedFd<'_>, token: u64) -> io::Result<()> {
        Ok(epoll::add(&self.0, fd, EventData::new_u64(token), EventFlags::ET)?)
    }

    /// The tokens of all files that somebody still holds open.
    pub fn tokens(&self) -> io::Result<Vec<u64>> {
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.0.as_raw_fd()))?;
        Ok(text.lines().filter_map(token_of).collect())
    }
}

/// `tfd:        5 events: 80000018 data:               2a pos:0 ino:1f sdev:9`
fn token_of(line: &str) -> Option<u64> {
    let (_, rest) = line.strip_prefix("tfd:")?.split_once("data:")?;
    u64::from_str_radix(rest.split_whitespace().next()?, 16).ok()
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use crate::packet;

    #[test]
    fn a_file_is_there_until_its_last_holder_closes_it() {
        let living = Living::new().expect("works");
        let (one, other) = packet::pair().expect("works");
        living.add(one.as_fd(), 1).expect("works");
        living.add(other.as_fd(), u64::MAX).expect("works");
        let copy = one.try_clone().expect("works");
        drop(one);
        let mut tokens = living.tokens().expect("works");
        tokens.sort_unstable();
        assert_eq!(tokens, [1, u64::MAX]);
        drop(copy);
        assert_eq!(living.tokens().expect("works"), [u64::MAX]);
        drop(other);
        assert_eq!(living.tokens().expect("works"), [0; 0]);
    }

    #[test]
    fn a_number_may_be_used_again() {
        let living = Living::new().expect("works");
        let mut held = Vec::new();
        for token in 0..100 {
            let (one, other) = packet::pair().expect("works");
            living.add(one.as_fd(), token).expect("works");
            // Closed here, and open elsewhere.
            held.push(other.try_clone().expect("works"));
            let elsewhere = one.try_clone().expect("works");
            drop(one);
            held.push(elsewhere);
        }
        assert_eq!(living.tokens().expect("works").len(), 100);
    }
}
