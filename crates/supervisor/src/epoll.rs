//! A socket that was added to an event poll before it was connected: its successor takes its place there.
//!
//! The kernel knows a member of an event poll by its file and its number in the table of whoever added it. So the
//! successor is added by a thread with a table of its own, in which it has the number that it will have in the program.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd, RawFd};
use std::time::{Duration, Instant};

use isthmus_sys::poll::add_member;
use isthmus_sys::{seccomp, table};

/// A thread that was told to go on with making an event poll has made it by then.
const MADE: Duration = Duration::from_millis(100);
/// For so long it is believed that a process has the event polls that it had, if nobody has made one.
const KNOWN: Duration = Duration::from_secs(10);
/// Threads whose event polls are remembered.
const THREADS_MAX: usize = 1024;

/// Where programs have event polls: looking for them costs a call for each of their descriptors.
#[derive(Default)]
pub struct Polls {
    made: Option<Instant>,
    known: HashMap<i32, (Instant, Vec<RawFd>)>,
}

impl Polls {
    /// Somebody makes one.
    pub fn make(&mut self) {
        self.made = Some(Instant::now());
    }

    /// Those of a thread's process, if that is known still.
    #[must_use]
    pub fn of(&self, thread: i32) -> Option<Vec<RawFd>> {
        let (at, polls) = self.known.get(&thread)?;
        let fresh = at.elapsed() < KNOWN && self.made.is_none_or(|made| *at > made + MADE);
        fresh.then(|| polls.clone())
    }

    /// What was found when somebody looked, which was begun then.
    pub fn note(&mut self, thread: i32, began: Instant, polls: Vec<RawFd>) {
        if self.known.len() >= THREADS_MAX {
            self.known.clear();
        }
        self.known.insert(thread, (began, polls));
    }
}

/// How a program waits for a socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    pub events: u32,
    pub data: u64,
}

/// The entry for a descriptor in what Linux shows of an event poll (proc(5)):
/// `tfd:        5 events:       1d data:                5  pos:0 ino:61 sdev:8`
#[must_use]
pub fn member(fdinfo: &str, fd: RawFd, inode: u64) -> Option<Member> {
    fdinfo.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        let mut value = |name: &str| {
            let word = words.find(|word| word.starts_with(name))?;
            // "pos:0" in one word, "events: 1d" in two.
            if word.len() > name.len() { Some(&word[name.len()..]) } else { words.next() }
        };
        let number: RawFd = value("tfd:")?.parse().ok()?;
        let events = u32::from_str_radix(value("events:")?, 16).ok()?;
        let data = u64::from_str_radix(value("data:")?, 16).ok()?;
        let seen = u64::from_str_radix(value("ino:")?, 16).ok()?;
        (number == fd && seen == inode).then_some(Member { events, data })
    })
}

/// Let `successor` be a member of each of these event polls of the process in which its descriptor `fd` is one. Returns
/// how many those are.
///
/// # Errors
/// It cannot be, and the connection must stay what it is.
pub fn follow(
    thread: i32,
    all: &[RawFd],
    fd: RawFd,
    inode: u64,
    successor: BorrowedFd<'_>,
) -> io::Result<usize> {
    let mut polls = Vec::new();
    for &poll in all {
        let Ok(text) = std::fs::read_to_string(format!("/proc/{thread}/fdinfo/{poll}")) else { continue };
        if let Some(member) = member(&text, fd, inode) {
            polls.push((seccomp::descriptor_of(thread, poll)?, member));
        }
    }
    if polls.is_empty() {
        return Ok(0);
    }
    // Borrowed, not given: what the thread closed, it would close in its own table alone.
    std::thread::scope(|scope| {
        let added = scope.spawn(|| add_as(fd, successor, &polls));
        added.join().unwrap_or_else(|_| Err(io::ErrorKind::Other.into()))
    })?;
    Ok(polls.len())
}

fn add_as(number: RawFd, successor: BorrowedFd<'_>, polls: &[(OwnedFd, Member)]) -> io::Result<()> {
    table::unshare()?;
    let added = add_in_own_table(number, successor, polls);
    // A thread ends a little before its table does, and the program's old socket is in that too.
    // SAFETY: this thread's table is its own, and nothing is done with it any more.
    unsafe { table::close_all() };
    added
}

fn add_in_own_table(number: RawFd, successor: BorrowedFd<'_>, polls: &[(OwnedFd, Member)]) -> io::Result<()> {
    // Copies out of the way of the number. Until the thread ends, what it shared before lies in its table too.
    let above = |fd: BorrowedFd<'_>| table::copy_above(fd, number.saturating_add(1));
    let successor = above(successor)?;
    let polls = polls
        .iter()
        .map(|(poll, member)| Ok((above(poll.as_fd())?, *member)))
        .collect::<io::Result<Vec<_>>>()?;
    // SAFETY: this thread's table is its own, and only the copies above are used in it.
    let copy = unsafe { table::copy_to(successor.as_fd(), number) }?;
    for (poll, member) in &polls {
        add_member(poll.as_fd(), copy.as_fd(), member.events, member.data)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn event_polls_are_looked_for_again_when_somebody_has_made_one() {
        let mut polls = Polls::default();
        assert_eq!(polls.of(7), None);
        polls.note(7, Instant::now(), vec![5]);
        assert_eq!((polls.of(7), polls.of(8)), (Some(vec![5]), None));
        polls.make();
        assert_eq!(polls.of(7), None);
        // Looked for so soon that it may not have been there yet.
        polls.note(7, Instant::now(), vec![5]);
        assert_eq!(polls.of(7), None);
        polls.note(7, Instant::now() + 2 * MADE, vec![5, 6]);
        assert_eq!(polls.of(7), Some(vec![5, 6]));
    }

    #[test]
    fn a_member_is_found_by_number_and_file() {
        let text = "pos:\t0\nflags:\t02\nmnt_id:\t15\nino:\t2058\n\
            tfd:        5 events: 80002019 data:               2a  pos:0 ino:61 sdev:8\n\
            tfd:        6 events:       19 data: ffffffffffffffff  pos:0 ino:62 sdev:8\n";
        assert_eq!(member(text, 5, 0x61), Some(Member { events: 0x8000_2019, data: 0x2a }));
        assert_eq!(member(text, 6, 0x62), Some(Member { events: 0x19, data: u64::MAX }));
        assert_eq!(member(text, 5, 0x62), None);
        assert_eq!(member("tfd: x\ntfd:\n", 5, 0x61), None);
    }
}
