//! The switch's attachments to the broker: through each guest's door, on that guest's behalf.
//!
//! To the broker a guest is a program like any other that came through its domain's door, so rules, limits, leases,
//! cuts and accounts are what they are for containers. This is the small part of an engine's node that a process
//! with one thread and many domains needs: nothing here waits.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::time::Instant;

use isthmus_sys::packet;
use isthmus_wire::control::Message;

use crate::flow::FlowId;
use crate::line::Line;

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
    pub line: Option<Line>,
    /// The broker has answered the greeting.
    pub ready: bool,
    /// When to try again, while there is no broker.
    pub again: Option<Instant>,
    asked: HashMap<u32, Asked>,
    last: u32,
}

impl Attachment {
    #[must_use]
    pub fn new(cid: u32, app: Option<FlowId>) -> Self {
        Self { cid, app, seat: None, line: None, ready: false, again: None, asked: HashMap::new(), last: 0 }
    }

    /// Connect to the broker behind a door, given as an open directory.
    ///
    /// # Errors
    /// Nobody answers there now.
    pub fn connect(&mut self, door: BorrowedFd<'_>) -> io::Result<()> {
        let path = PathBuf::from(format!("/proc/self/fd/{}/door", door.as_raw_fd()));
        self.line = Some(Line::new(packet::connect_now(&path)?));
        self.again = None;
        Ok(())
    }

    /// The broker is gone: whatever was asked will not be answered.
    pub fn lose(&mut self) -> Vec<Asked> {
        self.line = None;
        self.ready = false;
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
        if let Some(line) = &mut self.line {
            line.send(request, message, descriptors);
        }
    }
}
