//! The switch's attachments to the broker: through each guest's door, on that guest's behalf.
//!
//! To the broker a guest is a program like any other that came through its domain's door, so rules, limits, leases,
//! cuts and accounts are what they are for containers. This is the small part of an engine's node that a process
//! with one thread and many domains needs: nothing here waits.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::Instant;

use isthmus_sys::packet;
use isthmus_wire::control::{self, MESSAGE_MAX, Message};

use crate::flow::FlowId;

/// Packets that may wait for a broker that does not read.
const QUEUE_MAX: usize = 1024;

/// What a question was about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Asked {
    Hello,
    Bind,
    Connect(FlowId),
    Resume(u64),
}

/// One attachment; it comes again by itself when the broker does.
pub struct Attachment {
    pub cid: u32,
    /// The connection of the guest's agent for whose program this is; none: it is the guest's home.
    pub app: Option<FlowId>,
    /// The seat that the program's next message is about.
    pub seat: Option<u32>,
    pub socket: Option<OwnedFd>,
    /// The broker has answered the greeting.
    pub ready: bool,
    /// Its socket is watched for room as well.
    pub watched: bool,
    /// Something could not be said: the two do not know the same any more.
    pub overflowed: bool,
    /// When to try again, while there is no broker.
    pub again: Option<Instant>,
    asked: HashMap<u32, Asked>,
    last: u32,
    queue: VecDeque<(Vec<u8>, Vec<OwnedFd>)>,
}

impl Attachment {
    #[must_use]
    pub fn new(cid: u32, app: Option<FlowId>) -> Self {
        Self {
            cid,
            app,
            seat: None,
            socket: None,
            ready: false,
            watched: false,
            overflowed: false,
            again: None,
            asked: HashMap::new(),
            last: 0,
            queue: VecDeque::new(),
        }
    }

    /// Connect to the broker behind a door, given as an open directory.
    ///
    /// # Errors
    /// Nobody answers there now.
    pub fn connect(&mut self, door: BorrowedFd<'_>) -> io::Result<()> {
        let path = PathBuf::from(format!("/proc/self/fd/{}/door", door.as_raw_fd()));
        self.socket = Some(packet::connect_now(&path)?);
        self.again = None;
        Ok(())
    }

    /// The broker is gone: whatever was asked will not be answered.
    pub fn lose(&mut self) -> Vec<Asked> {
        self.socket = None;
        (self.ready, self.watched, self.overflowed) = (false, false, false);
        self.queue.clear();
        self.asked.drain().map(|(_, asked)| asked).collect()
    }

    pub fn ask(&mut self, asked: Asked, message: &Message<'_>, descriptors: &[BorrowedFd<'_>]) {
        self.last = self.last.wrapping_add(1).max(1);
        self.asked.insert(self.last, asked);
        self.send(self.last, message, descriptors);
    }

    pub fn tell(&mut self, message: &Message<'_>, descriptors: &[BorrowedFd<'_>]) {
        self.send(0, message, descriptors);
    }

    /// Pass a program's own message on.
    pub fn pass(&mut self, request: u32, message: &Message<'_>, descriptors: &[BorrowedFd<'_>]) {
        self.send(request, message, descriptors);
    }

    /// The same, and remember what its answer is about.
    pub fn pass_asked(
        &mut self,
        asked: Asked,
        request: u32,
        message: &Message<'_>,
        descriptors: &[BorrowedFd<'_>],
    ) {
        self.asked.insert(request, asked);
        self.send(request, message, descriptors);
    }

    /// Questions that were not answered.
    #[must_use]
    pub fn asking(&self) -> usize {
        self.asked.len()
    }

    /// Has a question of this number no answer yet?
    #[must_use]
    pub fn is_asking(&self, request: u32) -> bool {
        self.asked.contains_key(&request)
    }

    /// What the answer with this number is about.
    pub fn answered(&mut self, request: u32) -> Option<Asked> {
        self.asked.remove(&request)
    }

    fn send(&mut self, request: u32, message: &Message<'_>, descriptors: &[BorrowedFd<'_>]) {
        let Some(socket) = &self.socket else { return };
        let mut packet = [0; MESSAGE_MAX];
        let Ok(len) = control::encode(request, message, &mut packet) else { return };
        let packet = &packet[..len];
        if self.queue.is_empty() {
            match packet::send(socket.as_fd(), packet, descriptors) {
                Ok(()) => return,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // Its end is read as well.
                Err(_) => return,
            }
        }
        let kept: io::Result<Vec<_>> = descriptors.iter().map(|fd| fd.try_clone_to_owned()).collect();
        match kept {
            Ok(kept) if self.queue.len() < QUEUE_MAX => self.queue.push_back((packet.to_vec(), kept)),
            _ => self.overflowed = true,
        }
    }

    /// Does something wait until the broker reads?
    #[must_use]
    pub fn blocked(&self) -> bool {
        !self.queue.is_empty()
    }

    /// Send what waits.
    pub fn handle_writable(&mut self) {
        let Some(socket) = &self.socket else { return };
        while let Some((packet, descriptors)) = self.queue.front() {
            let descriptors: Vec<_> = descriptors.iter().map(AsFd::as_fd).collect();
            match packet::send(socket.as_fd(), packet, &descriptors) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                _ => drop(self.queue.pop_front()),
            }
        }
    }

    /// The next packet; `Ok(None)`: none is there now.
    ///
    /// # Errors
    /// The broker is gone.
    pub fn receive(&self) -> io::Result<Option<(Vec<u8>, Vec<OwnedFd>)>> {
        let Some(socket) = &self.socket else { return Ok(None) };
        let mut buffer = [0; MESSAGE_MAX];
        match packet::receive(socket.as_fd(), &mut buffer) {
            Ok((0, _)) => Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((len, descriptors)) => Ok(Some((buffer[..len].to_vec(), descriptors))),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}
