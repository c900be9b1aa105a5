//! To bytes.

use super::*;
use crate::writer::{EncodeError, Writer};

/// Encode a frame with its padding; returns its length, bytes.
///
/// # Errors
/// It does not fit the buffer or the profile's sizes, or a number does not fit its field in this dialect. What the buffer
/// holds then means nothing.
pub fn encode(
    head: &Head,
    frame: &Frame<'_>,
    profile: &Profile,
    out: &mut [u8],
) -> Result<usize, EncodeError> {
    let mut w = Out(Writer::new(out));
    w.put("destination", &head.destination)?;
    w.put("source", &head.source)?;
    w.u16(head.ethertype)?;
    w.u16(head.peer_index)?;
    match *frame {
        Frame::Discovery { nic, serial } => {
            w.put("type", &[DISCOVERY])?;
            w.zeros(15)?;
            w.put("nic", &nic.to_be_bytes())?;
            w.u32(serial)?;
            w.zeros(20)?;
        }
        Frame::HostQuery { index, magic } => {
            w.put("type", &[HOST_QUERY, 0])?;
            w.u16(index)?;
            w.u32(0)?;
            w.u32(magic)?;
        }
        Frame::HostReply { index, magic, name } => {
            w.put("type", &[HOST_REPLY, fit("name", name.len(), NAME_MAX)? as u8])?;
            w.u16(index)?;
            w.u32(0)?;
            w.u32(magic)?;
            w.u32(0)?;
            w.put("name", name)?;
        }
        Frame::Ack { ends, session, next, number, sent, resent } => {
            w.ends(TRUC, ends)?;
            w.put("length", &[LIBRARY_LEN, 0, 0, 0])?;
            w.u32(session)?;
            w.put("what", &[ACK, 0])?;
            w.u16(next)?;
            w.u32(session)?;
            w.u32(number)?;
            w.u16(sent)?;
            w.put("resent", &[resent])?;
        }
        Frame::Connect { ends, index, session, key, expects, number } => {
            w.connect(ends, index, [session, key], expects, [0, number, 0])?;
        }
        Frame::Connected { ends, index, session, own_session, expects, number, status } => {
            w.connect(ends, index, [session, own_session], expects, [1, number, status])?;
        }
        Frame::Tiny { message, data } => w.eager(TINY, &message, data, TINY_MAX)?,
        Frame::Small { message, data } => w.eager(SMALL, &message, data, SMALL_MAX)?,
        Frame::Medium { message, total, fragment, offset, data } => {
            w.medium(&message, total, (fragment, offset), data, profile)?;
        }
        Frame::Rendezvous { message, length, window } => {
            w.message(RENDEZVOUS, &message, [8, message.checksum])?;
            w.u32(length)?;
            w.put("window", &[window.id, window.sequence])?;
            w.u16(fit("window_offset", window.offset as usize, u16::MAX.into())? as u16)?;
        }
        Frame::Pull { ends, session, length, window, cookie, skip, block, first } => {
            w.ends(PULL, ends)?;
            w.u32(session)?;
            w.u32(length)?;
            w.pull(window, cookie, skip, block, profile.dialect)?;
            w.u32(first)?;
        }
        Frame::PullReply { frame, offset, cookie, data } => {
            w.put("type", &[PULL_REPLY, frame])?;
            w.u16(fit("data", data.len(), profile.reply.into())? as u16)?;
            w.u32(offset)?;
            w.u32(cookie.handle)?;
            w.u32(cookie.magic)?;
            w.put("data", data)?;
        }
        Frame::Notify { ends, session, length, window, sequence, piggyack } => {
            w.ends(NOTIFY, ends)?;
            w.u32(session)?;
            w.u32(length)?;
            w.put("window", &[window.id, window.sequence])?;
            w.u32(0)?;
            w.u16(sequence)?;
            w.u16(piggyack)?;
        }
        Frame::NackLib { to, from, generation, why, index, sequence } => {
            w.put("type", &[NACK_LIB, to, generation, why, 0, 0, 0, 0, 0, from])?;
            w.u16(index)?;
            w.u16(sequence)?;
        }
        Frame::NackPull { from, generation, why, cookie } => {
            w.put("type", &[NACK_PULL, from, generation, why, 0, 0, 0, 0])?;
            w.u32(cookie.handle)?;
            w.u32(cookie.magic)?;
        }
    }
    w.zeros(FRAME_MIN.saturating_sub(w.0.len()))?;
    Ok(w.0.len())
}

/// Put a station's own words into a frame that somebody else made: who sends it, of which type, the sender's index in the
/// receiver's table, and in a connect the receiver's in the sender's.
///
/// # Errors
/// The frame is too short to hold them.
pub fn stamp(
    frame: &mut [u8],
    source: [u8; 6],
    ethertype: u16,
    peer_index: u16,
    index: u16,
) -> Result<(), EncodeError> {
    let mut put = |field, at: usize, bytes: &[u8]| {
        let room = frame.get_mut(at..at + bytes.len());
        let room = room.ok_or(EncodeError { field, reason: "the frame is too short" })?;
        room.copy_from_slice(bytes);
        Ok(())
    };
    put("source", 6, &source)?;
    put("ethertype", 12, &ethertype.to_be_bytes())?;
    put("peer_index", 14, &peer_index.to_be_bytes())?;
    if type_of(frame) != Some(CONNECT) {
        return Ok(());
    }
    let room = frame.get_mut(CONNECT_INDEX_AT..CONNECT_INDEX_AT + 2);
    let room = room.ok_or(EncodeError { field: "index", reason: "the frame is too short" })?;
    room.copy_from_slice(&index.to_be_bytes());
    Ok(())
}

fn fit(field: &'static str, value: usize, limit: usize) -> Result<usize, EncodeError> {
    if value > limit { Err(EncodeError { field, reason: "is too long for this profile" }) } else { Ok(value) }
}

struct Out<'b>(Writer<'b>);

impl Out<'_> {
    fn put(&mut self, field: &'static str, bytes: &[u8]) -> Result<(), EncodeError> {
        self.0.bytes(field, bytes)
    }

    fn u16(&mut self, value: u16) -> Result<(), EncodeError> {
        self.put("frame", &value.to_be_bytes())
    }

    fn u32(&mut self, value: u32) -> Result<(), EncodeError> {
        self.put("frame", &value.to_be_bytes())
    }

    fn zeros(&mut self, len: usize) -> Result<(), EncodeError> {
        self.put("padding", [0; FRAME_MIN].get(..len).unwrap_or_default())
    }

    fn ends(&mut self, kind: u8, ends: Ends) -> Result<(), EncodeError> {
        self.put("ends", &[kind, ends.to, ends.from, ends.generation])
    }

    fn message(&mut self, kind: u8, message: &Message, lengths: [u16; 2]) -> Result<(), EncodeError> {
        self.ends(kind, message.ends)?;
        self.u16(lengths[0])?;
        self.u16(lengths[1])?;
        self.u16(message.sequence)?;
        self.u16(message.piggyack)?;
        self.put("matching", &message.matching.to_be_bytes())?;
        self.u32(message.session)
    }

    fn eager(&mut self, kind: u8, message: &Message, data: &[u8], limit: usize) -> Result<(), EncodeError> {
        let len = fit("data", data.len(), limit)? as u16;
        self.message(kind, message, [len, message.checksum])?;
        self.put("data", data)
    }

    fn medium(
        &mut self,
        message: &Message,
        total: u32,
        (fragment, offset): (u8, u32),
        data: &[u8],
        profile: &Profile,
    ) -> Result<(), EncodeError> {
        let wrong = EncodeError { field: "offset", reason: "is not where this fragment lies" };
        let unit = u32::from(profile.fragment);
        if offset != u32::from(fragment) * unit {
            return Err(wrong);
        }
        let (lengths, pipeline) = match profile.dialect {
            Dialect::Wire if unit.is_power_of_two() => {
                ([fit("total", total as usize, u16::MAX.into())? as u16, 0], unit.trailing_zeros() as u8)
            }
            Dialect::Wire => return Err(wrong),
            Dialect::Own => ([(total >> 16) as u16, total as u16], 0),
        };
        self.message(MEDIUM, message, lengths)?;
        self.u16(fit("data", data.len(), profile.fragment.into())? as u16)?;
        self.put("fragment", &[fragment, pipeline])?;
        self.u16(message.checksum)?;
        self.u16(0)?;
        self.put("data", data)
    }

    fn connect(
        &mut self,
        ends: Ends,
        index: u16,
        sessions: [u32; 2],
        expects: u16,
        last: [u8; 3],
    ) -> Result<(), EncodeError> {
        self.ends(CONNECT, ends)?;
        self.put("length", &[LIBRARY_LEN, 0, 0, 0, 0, 0])?;
        self.u16(index)?;
        self.u32(0)?;
        self.u32(sessions[0])?;
        self.u32(sessions[1])?;
        self.u16(expects)?;
        self.put("status", &last)
    }

    fn pull(
        &mut self,
        window: Window,
        cookie: Cookie,
        skip: u32,
        block: u32,
        dialect: Dialect,
    ) -> Result<(), EncodeError> {
        let short = |field, value: u32| fit(field, value as usize, u16::MAX.into()).map(|value| value as u16);
        if dialect == Dialect::Wire {
            self.put("window", &[window.id, window.sequence])?;
            self.u16(short("window_offset", window.offset)?)?;
        } else {
            self.u32(window.id.into())?;
            self.put("window", &[window.sequence, 0, 0, 0])?;
            self.u32(window.offset)?;
        }
        self.u32(cookie.handle)?;
        self.u32(cookie.magic)?;
        if dialect == Dialect::Wire {
            self.u16(short("skip", skip)?)?;
            self.u16(short("block", block)?)
        } else {
            self.u32(skip)?;
            self.u32(block)
        }
    }
}
