//! A guest's device, from its monitor's side: the vhost-user conversation, until the monitor is gone.
//!
//! One set of features serves QEMU and user-mode Linux; which of them needs which is in docs/formats/vhost-user.md.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use isthmus_wire::vhost_user::{
    self, DESCRIPTORS_MAX, F_PROTOCOL_FEATURES, Header, Message, PAYLOAD_MAX, PROTOCOL_BACKEND_REQ,
    PROTOCOL_CONFIG,
};
use rustix::fs::OFlags;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendFlags,
};

use crate::Fault;
use crate::memory::Memory;
use crate::vring::Vring;

const F_SEQPACKET: u64 = 1 << 1;
const F_INDIRECT: u64 = 1 << 28;
const F_EVENT_IDX: u64 = 1 << 29;
const F_VERSION_1: u64 = 1 << 32;
const FEATURES: u64 = F_SEQPACKET | F_INDIRECT | F_EVENT_IDX | F_PROTOCOL_FEATURES | F_VERSION_1;
const PROTOCOL_FEATURES: u64 = PROTOCOL_BACKEND_REQ | PROTOCOL_CONFIG;

/// Queues: the guest receives, the guest transmits, events (which we never have).
pub const RX: usize = 0;
pub const TX: usize = 1;
const QUEUES: usize = 3;

/// What a message of the monitor's changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    Nothing,
    /// The guest's memory is another one.
    Memory,
    /// This queue runs.
    Started(usize),
    /// This queue stands still; the guest resets its device, or ends.
    Stopped(usize),
}

/// The monitor's connection and what it handed in.
pub struct Device {
    socket: OwnedFd,
    cid: u32,
    /// Bytes of the message that is being read, and the descriptors beside it.
    inbox: Vec<u8>,
    descriptors: Vec<OwnedFd>,
    features: u64,
    memory: Option<Arc<Memory>>,
    vrings: [Vring; QUEUES],
    /// Kick descriptors that are of no use any more; see [`Device::retired`].
    retired: Vec<OwnedFd>,
    /// Kept open: user-mode Linux ties its interrupt to it. We never ask anything.
    _backend: Option<OwnedFd>,
}

impl Device {
    /// `socket` does not block.
    #[must_use]
    pub fn new(socket: OwnedFd, cid: u32) -> Self {
        Self {
            socket,
            cid,
            inbox: Vec::new(),
            descriptors: Vec::new(),
            features: 0,
            memory: None,
            vrings: Default::default(),
            retired: Vec::new(),
            _backend: None,
        }
    }

    #[must_use]
    pub fn memory(&self) -> Option<&Arc<Memory>> {
        self.memory.as_ref()
    }

    pub fn vring(&mut self, index: usize) -> Option<(&mut Vring, &Arc<Memory>)> {
        Some((self.vrings.get_mut(index)?, self.memory.as_ref()?))
    }

    /// Both queues that carry packets run.
    #[must_use]
    pub fn running(&self) -> bool {
        self.vrings[RX].running() && self.vrings[TX].running()
    }

    /// The descriptor by which the guest kicks a queue.
    #[must_use]
    pub fn kick(&self, index: usize) -> Option<BorrowedFd<'_>> {
        self.vrings.get(index)?.kick.as_ref().map(AsFd::as_fd)
    }

    /// Kick descriptors that the monitor has replaced. Whoever waits for them must stop: the monitor holds them
    /// too, so that closing them here ends nothing.
    pub fn retired(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.retired)
    }

    /// Read what the monitor says, as far as it has come: at most one message.
    ///
    /// `None`: nothing whole is there yet.
    ///
    /// # Errors
    /// The monitor is gone, or does not speak the protocol: the device ends.
    pub fn handle_readable(&mut self) -> Result<Option<Changed>, Fault> {
        if !self.fill(Header::LEN)? {
            return Ok(None);
        }
        let header = Header::decode(&self.inbox)?;
        if !self.fill(Header::LEN + header.size)? {
            return Ok(None);
        }
        let inbox = std::mem::take(&mut self.inbox);
        let descriptors = std::mem::take(&mut self.descriptors);
        let message = Message::decode(header.request, inbox.get(Header::LEN..).unwrap_or_default())?;
        self.handle(header, message, descriptors).map(Some)
    }

    /// Read until `len` bytes of the message are here; `false`: they have not come yet.
    fn fill(&mut self, len: usize) -> Result<bool, Fault> {
        while self.inbox.len() < len {
            let mut buffer = [0; Header::LEN + PAYLOAD_MAX];
            let want = (len - self.inbox.len()).min(buffer.len());
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(DESCRIPTORS_MAX))];
            let mut control = RecvAncillaryBuffer::new(&mut space);
            let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
            let received = rustix::net::recvmsg(
                &self.socket,
                &mut [IoSliceMut::new(&mut buffer[..want])],
                &mut control,
                flags,
            );
            let received = match received {
                Ok(received) => received,
                Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(false),
                Err(error) => return Err(error.into()),
            };
            for message in control.drain() {
                if let RecvAncillaryMessage::ScmRights(rights) = message {
                    self.descriptors.extend(rights);
                }
            }
            if received.flags.contains(ReturnFlags::CTRUNC) || self.descriptors.len() > DESCRIPTORS_MAX {
                return Err(Fault::Message("too many descriptors"));
            }
            if received.bytes == 0 {
                return Err(Fault::Gone);
            }
            self.inbox.extend_from_slice(&buffer[..received.bytes]);
        }
        Ok(true)
    }

    fn handle(
        &mut self,
        header: Header,
        message: Message,
        mut descriptors: Vec<OwnedFd>,
    ) -> Result<Changed, Fault> {
        let mut changed = Changed::Nothing;
        match message {
            Message::GetFeatures => self.reply(header, &FEATURES.to_le_bytes())?,
            Message::SetFeatures(features) => self.features = features & FEATURES,
            Message::GetProtocolFeatures => self.reply(header, &PROTOCOL_FEATURES.to_le_bytes())?,
            Message::SetOwner | Message::SetVringErr { .. } | Message::SetProtocolFeatures(_) => {}
            Message::SetBackendReqFd => self._backend = descriptors.pop(),
            Message::GetConfig { offset, size } => self.config(header, offset, size)?,
            Message::SetMemTable(table) => {
                // In the old memory, while there is one.
                self.give_kept(TX as u32);
                self.memory = Some(Arc::new(Memory::new(&table, descriptors)?));
                changed = Changed::Memory;
                // The queues stay where they are in the monitor's terms; find them in the new memory.
                for vring in &mut self.vrings {
                    if vring.running() {
                        vring.stop();
                        if let Some(memory) = &self.memory {
                            vring.start(memory, self.features & F_EVENT_IDX != 0)?;
                        }
                    }
                }
            }
            Message::SetVringNum { index, num } => {
                self.queue(index)?.num = u16::try_from(num).map_err(|_| Fault::Queue("too long"))?;
            }
            Message::SetVringBase { index, base } => {
                self.queue(index)?.base =
                    u16::try_from(base).map_err(|_| Fault::Queue("an index beyond it"))?;
            }
            Message::SetVringAddr(addr) => self.queue(addr.index)?.addr = Some(addr),
            Message::GetVringBase { index } => {
                self.give_kept(index);
                let vring = self.queue(index)?;
                let base = u32::from(vring.stop());
                let kick = vring.kick.take();
                self.retired.extend(kick);
                let mut state = [0; 8];
                state[..4].copy_from_slice(&index.to_le_bytes());
                state[4..].copy_from_slice(&base.to_le_bytes());
                self.reply(header, &state)?;
                changed = Changed::Stopped(index as usize);
            }
            Message::SetVringKick { index, descriptor } => {
                let kick = if descriptor { Some(take(&mut descriptors)?) } else { None };
                let before = std::mem::replace(&mut self.queue(index)?.kick, kick);
                self.retired.extend(before);
                changed = self.start(index)?;
            }
            Message::SetVringCall { index, descriptor } => {
                let call = if descriptor { Some(take(&mut descriptors)?) } else { None };
                self.queue(index)?.call = call;
            }
            Message::SetVringEnable { index, enable } => {
                self.queue(index)?.enabled = enable;
                if enable {
                    changed = self.start(index)?;
                } else {
                    self.give_kept(index);
                    self.queue(index)?.stop();
                    changed = Changed::Stopped(index as usize);
                }
            }
        }
        Ok(changed)
    }

    fn queue(&mut self, index: u32) -> Result<&mut Vring, Fault> {
        self.vrings.get_mut(index as usize).ok_or(Fault::Queue("this device has three"))
    }

    fn give_kept(&mut self, index: u32) {
        if let Some((vring, memory)) = self.vring(index as usize) {
            let memory = Arc::clone(memory);
            vring.give_kept(&memory);
        }
    }

    fn start(&mut self, index: u32) -> Result<Changed, Fault> {
        let event_idx = self.features & F_EVENT_IDX != 0;
        let Some(memory) = self.memory.clone() else { return Ok(Changed::Nothing) };
        let started = self.queue(index)?.start(&memory, event_idx)?;
        Ok(if started { Changed::Started(index as usize) } else { Changed::Nothing })
    }

    /// The device's configuration space is the guest's CID, a u64.
    fn config(&mut self, header: Header, offset: u32, size: u32) -> Result<(), Fault> {
        let cid = u64::from(self.cid).to_le_bytes();
        let mut out = Vec::with_capacity(12 + cid.len());
        out.extend_from_slice(&offset.to_le_bytes());
        out.extend_from_slice(&size.to_le_bytes());
        out.extend_from_slice(&0u32.to_le_bytes());
        let wanted =
            (offset as usize).checked_add(size as usize).and_then(|end| cid.get(offset as usize..end));
        out.extend_from_slice(wanted.ok_or(Fault::Message("configuration behind its end"))?);
        self.reply(header, &out)
    }

    /// A monitor that does not read its replies is none.
    fn reply(&mut self, header: Header, payload: &[u8]) -> Result<(), Fault> {
        let front = vhost_user::reply_header(header.request, payload.len() as u32);
        let parts = [IoSlice::new(&front), IoSlice::new(payload)];
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        let sent = rustix::net::sendmsg(&self.socket, &parts, &mut SendAncillaryBuffer::default(), flags)?;
        if sent == front.len() + payload.len() { Ok(()) } else { Err(Fault::Message("replies are not read")) }
    }
}

impl AsFd for Device {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The descriptor beside a message, made not to block us.
fn take(descriptors: &mut Vec<OwnedFd>) -> Result<OwnedFd, Fault> {
    let descriptor = descriptors.pop().ok_or(Fault::Message("a descriptor is missing"))?;
    let flags = rustix::fs::fcntl_getfl(&descriptor)?;
    rustix::fs::fcntl_setfl(&descriptor, flags | OFlags::NONBLOCK)?;
    Ok(descriptor)
}
