//! From bytes.

use super::*;
use crate::reader::{DecodeError, Problem, Reader};

struct Fields<'a>(Reader<'a>);

impl<'a> Fields<'a> {
    fn u8(&mut self, field: &'static str) -> Result<u8, DecodeError> {
        self.0.u8(field)
    }

    fn u16(&mut self, field: &'static str) -> Result<u16, DecodeError> {
        Ok(u16::from_be_bytes(self.0.array(field)?))
    }

    fn u32(&mut self, field: &'static str) -> Result<u32, DecodeError> {
        Ok(u32::from_be_bytes(self.0.array(field)?))
    }

    fn u64(&mut self, field: &'static str) -> Result<u64, DecodeError> {
        Ok(u64::from_be_bytes(self.0.array(field)?))
    }

    /// Reserved: whatever the sender's memory held.
    fn skip(&mut self, len: usize) -> Result<(), DecodeError> {
        self.0.take("reserved", len).map(drop)
    }

    fn ends(&mut self) -> Result<Ends, DecodeError> {
        Ok(Ends { to: self.u8("to")?, from: self.u8("from")?, generation: self.u8("generation")? })
    }

    fn cookie(&mut self) -> Result<Cookie, DecodeError> {
        Ok(Cookie { handle: self.u32("handle")?, magic: self.u32("magic")? })
    }

    /// A length that came earlier, and so many bytes.
    fn data(&mut self, len: u16, limit: usize) -> Result<&'a [u8], DecodeError> {
        if usize::from(len) > limit {
            let problem = Problem::TooBig { value: len.into(), limit: limit as u64 };
            return Err(self.0.error("length", 0, problem));
        }
        self.0.take("data", len.into())
    }

    fn expect(&mut self, field: &'static str, value: u64, expected: u64) -> Result<(), DecodeError> {
        if value == expected {
            return Ok(());
        }
        Err(self.0.error(field, 0, Problem::NotExpected { value, expected }))
    }

    /// From the endpoints to the session; with the length, or the two halves of a long one.
    fn message(&mut self) -> Result<(Message, [u16; 2]), DecodeError> {
        let ends = self.ends()?;
        let lengths = [self.u16("length")?, self.u16("checksum")?];
        let message = Message {
            ends,
            checksum: lengths[1],
            sequence: self.u16("sequence")?,
            piggyack: self.u16("piggyack")?,
            matching: self.u64("matching")?,
            session: self.u32("session")?,
        };
        Ok((message, lengths))
    }
}

/// Decode a frame, padding and all.
///
/// # Errors
/// Says which field is wrong and where. Such a frame is dropped, and nobody is told.
pub fn decode<'a>(bytes: &'a [u8], profile: &Profile) -> Result<(Head, Frame<'a>), DecodeError> {
    let mut f = Fields(Reader::new("mxoe", bytes));
    let (destination, source) = (f.0.array("destination")?, f.0.array("source")?);
    let head = Head { destination, source, ethertype: f.u16("ethertype")?, peer_index: f.u16("peer_index")? };
    f.expect("ethertype", head.ethertype.into(), profile.ethertype.into())?;
    let kind = f.u8("type")?;
    let frame = match kind {
        DISCOVERY => {
            f.skip(15)?;
            Frame::Discovery { nic: f.u64("nic")?, serial: f.u32("serial")? }
        }
        HOST_QUERY => {
            f.skip(1)?;
            let index = f.u16("index")?;
            f.skip(4)?;
            Frame::HostQuery { index, magic: f.u32("magic")? }
        }
        HOST_REPLY => host_reply(&mut f)?,
        TRUC => ack(&mut f)?,
        CONNECT => connect(&mut f)?,
        TINY => {
            let (message, [len, _]) = f.message()?;
            Frame::Tiny { message, data: f.data(len, TINY_MAX)? }
        }
        SMALL => {
            let (message, [len, _]) = f.message()?;
            Frame::Small { message, data: f.data(len, SMALL_MAX)? }
        }
        MEDIUM => medium(&mut f, profile)?,
        RENDEZVOUS => {
            let (message, _) = f.message()?;
            let length = f.u32("length")?;
            let (id, sequence) = (f.u8("window")?, f.u8("window_sequence")?);
            let window = Window { id, sequence, offset: f.u16("window_offset")?.into() };
            Frame::Rendezvous { message, length, window }
        }
        PULL => pull(&mut f, profile)?,
        PULL_REPLY => {
            let frame = f.u8("frame")?;
            let len = f.u16("length")?;
            let (offset, cookie) = (f.u32("offset")?, f.cookie()?);
            Frame::PullReply { frame, offset, cookie, data: f.data(len, profile.reply.into())? }
        }
        NOTIFY => notify(&mut f)?,
        NACK_LIB => {
            let (to, generation, why) = (f.u8("to")?, f.u8("generation")?, f.u8("why")?);
            f.skip(5)?;
            let (from, index) = (f.u8("from")?, f.u16("index")?);
            Frame::NackLib { to, from, generation, why, index, sequence: f.u16("sequence")? }
        }
        NACK_PULL => {
            let (from, generation, why) = (f.u8("from")?, f.u8("generation")?, f.u8("why")?);
            f.skip(4)?;
            Frame::NackPull { from, generation, why, cookie: f.cookie()? }
        }
        other => return Err(f.0.error("type", 1, Problem::Unknown(other.into()))),
    };
    Ok((head, frame))
}

fn host_reply<'a>(f: &mut Fields<'a>) -> Result<Frame<'a>, DecodeError> {
    let len = f.u8("length")?;
    let index = f.u16("index")?;
    f.skip(4)?;
    let magic = f.u32("magic")?;
    f.skip(4)?;
    Ok(Frame::HostReply { index, magic, name: f.data(len.into(), NAME_MAX)? })
}

fn ack<'a>(f: &mut Fields<'a>) -> Result<Frame<'a>, DecodeError> {
    let ends = f.ends()?;
    let len = f.u8("length")?;
    f.skip(3)?;
    let session = f.u32("session")?;
    let what = f.u8("what")?;
    f.expect("what", what.into(), ACK.into())?;
    f.expect("length", len.into(), LIBRARY_LEN.into())?;
    f.skip(1)?;
    let next = f.u16("next")?;
    let again = f.u32("session_again")?;
    f.expect("session_again", again.into(), session.into())?;
    let number = f.u32("number")?;
    Ok(Frame::Ack { ends, session, next, number, sent: f.u16("sent")?, resent: f.u8("resent")? })
}

fn connect<'a>(f: &mut Fields<'a>) -> Result<Frame<'a>, DecodeError> {
    let ends = f.ends()?;
    let len = f.u8("length")?;
    if len < LIBRARY_LEN {
        let problem = Problem::Short { needs: LIBRARY_LEN.into(), left: len.into() };
        return Err(f.0.error("length", 1, problem));
    }
    f.skip(5)?;
    let index = f.u16("index")?;
    f.skip(4)?;
    let (session, second) = (f.u32("session")?, f.u32("key")?);
    let (expects, is_reply, number) = (f.u16("expects")?, f.u8("is_reply")?, f.u8("number")?);
    if is_reply == 0 {
        return Ok(Frame::Connect { ends, index, session, key: second, expects, number });
    }
    let status = f.u8("status")?;
    Ok(Frame::Connected { ends, index, session, own_session: second, expects, number, status })
}

fn medium<'a>(f: &mut Fields<'a>, profile: &Profile) -> Result<Frame<'a>, DecodeError> {
    let (mut message, [high, low]) = f.message()?;
    let (len, fragment, pipeline) = (f.u16("length")?, f.u8("fragment")?, f.u8("pipeline")?);
    message.checksum = f.u16("checksum")?;
    f.skip(2)?;
    let (total, offset) = match profile.dialect {
        Dialect::Wire if pipeline > PIPELINE_MAX => {
            let problem = Problem::TooBig { value: pipeline.into(), limit: PIPELINE_MAX.into() };
            return Err(f.0.error("pipeline", 5, problem));
        }
        // The unit that was sent: others use another one than we do.
        Dialect::Wire => (u32::from(high), u32::from(fragment) << pipeline),
        Dialect::Own => {
            (u32::from(high) << 16 | u32::from(low), u32::from(fragment) * u32::from(profile.fragment))
        }
    };
    let limit = match profile.dialect {
        Dialect::Wire => 1 << PIPELINE_MAX,
        Dialect::Own => profile.fragment.into(),
    };
    Ok(Frame::Medium { message, total, fragment, offset, data: f.data(len, limit)? })
}

fn pull<'a>(f: &mut Fields<'a>, profile: &Profile) -> Result<Frame<'a>, DecodeError> {
    let ends = f.ends()?;
    let (session, length) = (f.u32("session")?, f.u32("length")?);
    if profile.dialect == Dialect::Wire {
        let (id, sequence) = (f.u8("window")?, f.u8("window_sequence")?);
        let window = Window { id, sequence, offset: f.u16("window_offset")?.into() };
        let (cookie, skip, block) = (f.cookie()?, f.u16("skip")?.into(), f.u16("block")?.into());
        return Ok(Frame::Pull {
            ends,
            session,
            length,
            window,
            cookie,
            skip,
            block,
            first: f.u32("first")?,
        });
    }
    let id = f.u32("window")?;
    let id = u8::try_from(id).map_err(|_| {
        let problem = Problem::TooBig { value: id.into(), limit: u8::MAX.into() };
        f.0.error("window", 4, problem)
    })?;
    let sequence = f.u8("window_sequence")?;
    f.skip(3)?;
    let window = Window { id, sequence, offset: f.u32("window_offset")? };
    let (cookie, skip, block) = (f.cookie()?, f.u32("skip")?, f.u32("block")?);
    Ok(Frame::Pull { ends, session, length, window, cookie, skip, block, first: f.u32("first")? })
}

fn notify<'a>(f: &mut Fields<'a>) -> Result<Frame<'a>, DecodeError> {
    let ends = f.ends()?;
    let (session, length) = (f.u32("session")?, f.u32("length")?);
    let (id, sequence) = (f.u8("window")?, f.u8("window_sequence")?);
    f.skip(4)?;
    let window = Window { id, sequence, offset: 0 };
    Ok(Frame::Notify {
        ends,
        session,
        length,
        window,
        sequence: f.u16("sequence")?,
        piggyack: f.u16("piggyack")?,
    })
}
