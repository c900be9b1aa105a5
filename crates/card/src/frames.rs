//! Whose a frame is, whom it is for, and how it is refused.

use isthmus_wire::mxoe::{BAD_ENDPOINT, ENDPOINT_CLOSED, Ends, Frame, INDEX_UNKNOWN};

/// The endpoint that a frame says it comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Author {
    Endpoint(u8),
    /// The frame does not say.
    AnyEndpoint,
    /// A station, not an endpoint.
    Station,
}

fn ends(frame: &Frame<'_>) -> Option<Ends> {
    match *frame {
        Frame::Ack { ends, .. }
        | Frame::Connect { ends, .. }
        | Frame::Connected { ends, .. }
        | Frame::Pull { ends, .. }
        | Frame::Notify { ends, .. } => Some(ends),
        Frame::Tiny { message, .. }
        | Frame::Small { message, .. }
        | Frame::Medium { message, .. }
        | Frame::Rendezvous { message, .. } => Some(message.ends),
        _ => None,
    }
}

pub(crate) fn author(frame: &Frame<'_>) -> Author {
    match *frame {
        Frame::Discovery { .. } | Frame::HostQuery { .. } | Frame::HostReply { .. } => Author::Station,
        // The endpoint that the refused message was for.
        Frame::NackLib { to, .. } => Author::Endpoint(to),
        _ => ends(frame).map_or(Author::AnyEndpoint, |ends| Author::Endpoint(ends.from)),
    }
}

/// May a program send it whose connection is `endpoint`?
pub(crate) fn is_of(frame: &Frame<'_>, endpoint: u8) -> bool {
    // Replies would go to another one.
    let own_replies = !matches!(frame, Frame::Pull { cookie, .. } if cookie.endpoint() != endpoint);
    let own = match author(frame) {
        Author::Endpoint(author) => author == endpoint,
        Author::AnyEndpoint => true,
        Author::Station => false,
    };
    own && own_replies
}

/// The endpoint it is for; a frame for a station has none.
pub(crate) fn recipient(frame: &Frame<'_>) -> Option<u8> {
    match *frame {
        Frame::NackLib { from, .. } => Some(from),
        Frame::PullReply { cookie, .. } | Frame::NackPull { cookie, .. } => Some(cookie.endpoint()),
        _ => ends(frame).map(|ends| ends.to),
    }
}

/// The answer to a frame for an endpoint that nobody has open, if it gets one.
pub(crate) fn refusal(frame: &Frame<'_>, endpoints: u16, index: u16) -> Option<Frame<'static>> {
    let Ends { to, from, .. } = ends(frame)?;
    let why = if u16::from(to) >= endpoints { BAD_ENDPOINT } else { ENDPOINT_CLOSED };
    let sequence = match *frame {
        Frame::Connect { .. } => 0,
        Frame::Notify { sequence, .. } => sequence,
        Frame::Tiny { message, .. }
        | Frame::Small { message, .. }
        | Frame::Medium { message, .. }
        | Frame::Rendezvous { message, .. } => message.sequence,
        Frame::Pull { cookie, .. } => return Some(Frame::NackPull { from, generation: 0, why, cookie }),
        _ => return None,
    };
    Some(Frame::NackLib { to, from, generation: 0, why, index, sequence })
}

/// What a connect, its answer or a question about a name says: the index of whom it is for in its sender's table.
pub(crate) fn told_index(frame: &Frame<'_>) -> Option<u16> {
    match *frame {
        Frame::Connect { index, .. }
        | Frame::Connected { index, .. }
        | Frame::HostQuery { index, .. }
        | Frame::HostReply { index, .. } => Some(index).filter(|index| *index != INDEX_UNKNOWN),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use isthmus_wire::mxoe::{Cookie, Message};

    const ENDS: Ends = Ends { to: 70, from: 2, generation: 0 };
    const COOKIE: Cookie = Cookie { handle: 9, magic: 0x2107_1982 };

    fn pull() -> Frame<'static> {
        let window = Default::default();
        Frame::Pull { ends: ENDS, session: 1, length: 2, window, cookie: COOKIE, skip: 0, block: 2, first: 0 }
    }

    fn tiny() -> Frame<'static> {
        Frame::Tiny { message: Message { ends: ENDS, sequence: 5, ..Message::default() }, data: &[] }
    }

    fn ack() -> Frame<'static> {
        Frame::Ack { ends: ENDS, session: 1, next: 1, number: 1, sent: 1, resent: 0 }
    }

    #[test]
    fn a_frame_is_its_endpoint_s() {
        let nack = Frame::NackLib { to: 2, from: 70, generation: 0, why: 1, index: 0, sequence: 0 };
        for frame in [pull(), tiny(), ack(), nack] {
            assert!(is_of(&frame, 2) && !is_of(&frame, 3), "{frame:?}");
            assert_eq!(recipient(&frame), Some(70));
        }
        let reply = Frame::PullReply { frame: 0, offset: 0, cookie: COOKIE, data: &[] };
        let nack = Frame::NackPull { from: 0, generation: 0, why: 1, cookie: COOKIE };
        for frame in [reply, nack] {
            assert!(is_of(&frame, 2) && is_of(&frame, 3), "{frame:?}");
            assert_eq!(recipient(&frame), Some(2));
        }
        let query = Frame::HostQuery { index: 0, magic: 0 };
        assert!(!is_of(&query, 0));
        assert_eq!(recipient(&query), None);
    }

    #[test]
    fn a_pull_whose_replies_go_elsewhere_is_nobody_s() {
        let mut other = pull();
        if let Frame::Pull { cookie, .. } = &mut other {
            cookie.magic += 1;
        }
        assert!(!is_of(&other, 2) && !is_of(&other, 3));
    }

    #[test]
    fn messages_and_pulls_are_refused_and_the_rest_is_silence() {
        let nack =
            Frame::NackLib { to: 70, from: 2, generation: 0, why: BAD_ENDPOINT, index: 4, sequence: 5 };
        assert_eq!(refusal(&tiny(), 64, 4), Some(nack));
        let why = ENDPOINT_CLOSED;
        assert_eq!(
            refusal(&pull(), 71, 4),
            Some(Frame::NackPull { from: 2, generation: 0, why, cookie: COOKIE })
        );
        assert_eq!(refusal(&ack(), 64, 4), None);
        assert_eq!(refusal(&nack, 64, 4), None);
    }
}
