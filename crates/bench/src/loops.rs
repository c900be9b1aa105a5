//! The ping-pong and the stream, generic over what carries them.
//!
//! Both ends run a loop from here and agree on its phases through byte 0 of every message, its [`Mark`]. Every other
//! byte is a pattern; the receiver of the last message checks all of it, so a figure cannot come from a transport that
//! delivers the wrong bytes.

use std::{io, time::Duration};

use crate::{
    buffer::{Data, Pages, Walk, check},
    clock::{Clock, cpu_seconds},
    error::BenchError,
    histogram::Histogram,
};

/// A connection that carries whole messages, or a stream of bytes, between two ends.
pub trait Transport {
    /// Send all of `message`.
    fn send(&mut self, message: &[u8]) -> io::Result<()>;

    /// Fill all of `message`. It ends in the caller's private memory, whatever carried it.
    fn recv_exact(&mut self, message: &mut [u8]) -> io::Result<()>;

    /// Send the next message of a stream: `message`, whose first byte is `mark`. A transport with several of them under
    /// way may have made it before, in a buffer of its own.
    #[inline(always)]
    fn send_next(&mut self, message: &mut [u8], mark: u8) -> io::Result<()> {
        message[0] = mark;
        self.send(message)
    }

    /// Receive the next message of a stream: in `message`, or in private memory that such a transport posted before.
    #[inline(always)]
    fn recv_next<'a>(&'a mut self, message: &'a mut [u8]) -> io::Result<&'a [u8]> {
        self.recv_exact(message)?;
        Ok(message)
    }
}

/// Byte 0 of every message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Mark {
    /// Not measured: caches, windows and clocks find their speed.
    Warm = 1,
    /// Measured.
    Counted = 2,
    /// Measured, checked, and the end of the loop.
    Last = 3,
}

impl Mark {
    #[inline(always)]
    fn of(message: &[u8]) -> Result<Self, BenchError> {
        match message.first() {
            Some(1) => Ok(Self::Warm),
            Some(2) => Ok(Self::Counted),
            Some(3) => Ok(Self::Last),
            Some(&mark) => Err(BenchError::UnknownMark { mark }),
            None => Err(BenchError::EmptyMessage),
        }
    }
}

/// What one end of a loop is asked to do. Both ends are given the same.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Bytes of a message.
    pub size: usize,
    pub warmup: Duration,
    pub duration: Duration,
    /// Pause after each round trip of a ping-pong; zero for none.
    pub gap: Duration,
    pub pages: Pages,
    pub data: Data,
    /// What is sent lies in a window of `isthmus_engine`.
    pub windows: bool,
}

impl Plan {
    /// Hot data on ordinary pages, no pause.
    pub fn new(size: usize, warmup: Duration, duration: Duration) -> Self {
        Self {
            size,
            warmup,
            duration,
            gap: Duration::ZERO,
            pages: Pages::Small,
            data: Data::Hot,
            windows: false,
        }
    }

    /// Pages of what is sent.
    fn sent(&self) -> Pages {
        if self.windows { Pages::Window } else { self.pages }
    }
}

/// What a ping-pong found. One way is half a round trip.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Latency {
    pub p50_us: f64,
    pub p99_us: f64,
    /// Round trips measured, and the time they took, pauses included.
    pub round_trips: u64,
    pub seconds: f64,
    /// CPU seconds of this process over those round trips.
    pub cpu_s: f64,
}

/// What the receiver of a stream found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Throughput {
    /// Payload and time between the first and the last counted message.
    pub messages: u64,
    pub bytes: u64,
    pub seconds: f64,
    /// CPU seconds of this process, over `total_bytes`: the warm-up is in both.
    pub cpu_s: f64,
    pub total_bytes: u64,
}

/// What an end that only answers, or only sends, knows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Served {
    pub messages: u64,
    pub bytes: u64,
    pub cpu_s: f64,
}

/// A transport and the buffers it is used with.
struct End<'a, T> {
    transport: &'a mut T,
    walk: Walk,
}

impl<T: Transport> End<'_, T> {
    #[inline(always)]
    fn round_trip(&mut self, mark: Mark) -> Result<&[u8], BenchError> {
        let message = self.walk.step();
        message[0] = mark as u8;
        self.transport.send(message).map_err(BenchError::transport("sending a ping"))?;
        self.transport.recv_exact(message).map_err(BenchError::transport("receiving a pong"))?;
        Ok(message)
    }

    #[inline(always)]
    fn send(&mut self, mark: Mark) -> Result<(), BenchError> {
        let message = self.walk.step();
        self.transport.send_next(message, mark as u8).map_err(BenchError::transport("sending a message"))
    }

    #[inline(always)]
    fn receive(&mut self) -> Result<(Mark, &[u8]), BenchError> {
        let message = self.walk.step();
        let message =
            self.transport.recv_next(message).map_err(BenchError::transport("receiving a message"))?;
        Ok((Mark::of(message)?, message))
    }
}

/// Send a message, wait for its echo, and again, for `plan.duration`.
///
/// # Errors
///
/// [`BenchError`] when the transport fails or the last echo is not what was sent.
pub fn pingpong_client<T: Transport>(transport: &mut T, plan: &Plan) -> Result<Latency, BenchError> {
    let clock = Clock::start();
    let mut end = End { transport, walk: Walk::filled(plan.size, plan.sent(), plan.data)? };

    let warm_until = clock.ticks() + clock.ticks_in(plan.warmup);
    loop {
        end.round_trip(Mark::Warm)?;
        if clock.ticks() >= warm_until {
            break;
        }
    }

    let mut histogram = Histogram::new();
    let cpu = cpu_seconds();
    let started = clock.ticks();
    let until = started + clock.ticks_in(plan.duration);
    let mut before = started;
    loop {
        end.round_trip(Mark::Counted)?;
        let after = clock.ticks();
        histogram.record(after - before);
        before = after;
        if after >= until {
            break;
        }
        if !plan.gap.is_zero() {
            std::thread::sleep(plan.gap);
            before = clock.ticks();
        }
    }
    let seconds = clock.seconds(before - started);
    let cpu_s = cpu_seconds() - cpu;

    check(end.round_trip(Mark::Last)?)?;
    let one_way_us =
        |part| histogram.quantile(part).map_or(f64::NAN, |ticks| ticks * clock.nanoseconds(1) / 2e3);
    Ok(Latency {
        p50_us: one_way_us(0.5),
        p99_us: one_way_us(0.99),
        round_trips: histogram.count(),
        seconds,
        cpu_s,
    })
}

/// Echo every message until the last.
///
/// # Errors
///
/// [`BenchError`] when the transport fails or a message has no mark.
pub fn pingpong_server<T: Transport>(transport: &mut T, plan: &Plan) -> Result<Served, BenchError> {
    let mut end = End { transport, walk: Walk::new(plan.size, plan.sent(), plan.data)? };
    let mut messages = 0;
    // The wait for the first message is the client's start, not work.
    let mut cpu = 0.0;
    loop {
        let message = end.walk.step();
        end.transport.recv_exact(message).map_err(BenchError::transport("receiving a ping"))?;
        if messages == 0 {
            cpu = cpu_seconds();
        }
        messages += 1;
        let mark = Mark::of(message)?;
        end.transport.send(message).map_err(BenchError::transport("sending a pong"))?;
        if mark == Mark::Last {
            let bytes = messages * plan.size as u64;
            return Ok(Served { messages, bytes, cpu_s: cpu_seconds() - cpu });
        }
    }
}

/// The clock is read once in this many bytes, so that small messages do not pay for it.
const BYTES_BETWEEN_CLOCK_READS: usize = 32 * 1024;

/// Send messages for `plan.warmup` and then `plan.duration`, then wait for the receiver to say that it has them all.
///
/// # Errors
///
/// [`BenchError`] when the transport fails.
pub fn stream_sender<T: Transport>(transport: &mut T, plan: &Plan) -> Result<Served, BenchError> {
    let clock = Clock::start();
    let mut end = End { transport, walk: Walk::filled(plan.size, plan.sent(), plan.data)? };
    let burst = (BYTES_BETWEEN_CLOCK_READS / plan.size).clamp(1, 64);
    let cpu = cpu_seconds();
    let mut messages = 1;
    for (mark, duration) in [(Mark::Warm, plan.warmup), (Mark::Counted, plan.duration)] {
        let until = clock.ticks() + clock.ticks_in(duration);
        loop {
            for _ in 0..burst {
                end.send(mark)?;
            }
            messages += burst as u64;
            if clock.ticks() >= until {
                break;
            }
        }
    }
    end.send(Mark::Last)?;
    end.transport
        .recv_exact(&mut [0])
        .map_err(BenchError::transport("waiting for the receiver to finish"))?;
    Ok(Served { messages, bytes: messages * plan.size as u64, cpu_s: cpu_seconds() - cpu })
}

/// Receive messages until the last, into a private buffer.
///
/// # Errors
///
/// [`BenchError`] when the transport fails, a message has no mark, or the last one does not hold what was sent.
pub fn stream_receiver<T: Transport>(transport: &mut T, plan: &Plan) -> Result<Throughput, BenchError> {
    let clock = Clock::start();
    let mut end = End { transport, walk: Walk::new(plan.size, plan.pages, plan.data)? };
    let (mut mark, _) = end.receive()?;
    let cpu = cpu_seconds();
    let mut warm = 0;
    while mark == Mark::Warm {
        warm += 1;
        mark = end.receive()?.0;
    }
    // The first counted message starts the clock and is not counted itself.
    let started = clock.ticks();
    let mut messages = 0;
    let last = loop {
        let (mark, message) = end.receive()?;
        messages += 1;
        if mark == Mark::Last {
            break message;
        }
    };
    let seconds = clock.seconds(clock.ticks() - started);
    let cpu_s = cpu_seconds() - cpu;
    check(last)?;
    end.transport.send(&[0]).map_err(BenchError::transport("saying that all has arrived"))?;
    let size = plan.size as u64;
    Ok(Throughput { messages, bytes: messages * size, seconds, cpu_s, total_bytes: (warm + messages) * size })
}

#[cfg(test)]
mod tests {
    use std::{
        os::unix::net::UnixStream,
        thread::{scope, spawn},
    };

    use super::*;
    use crate::{FdStream, MappedRing, Side, Wait};

    const MOMENT: Duration = Duration::from_millis(5);

    fn sockets(wait: Wait) -> (FdStream, FdStream) {
        let (left, right) = UnixStream::pair().expect("socketpair");
        (FdStream::new(left.into(), wait), FdStream::new(right.into(), wait))
    }

    fn rings(wait: Wait) -> (MappedRing, MappedRing) {
        let memory = MappedRing::memory().expect("memfd");
        let left = MappedRing::open(&memory, Side::Left, wait).expect("left");
        let right = MappedRing::open(&memory, Side::Right, wait).expect("right");
        (left, right)
    }

    fn both_loops<T: Transport + Send>(mut left: T, mut right: T, plan: Plan) {
        scope(|scope| {
            let server = scope.spawn(|| {
                let served = pingpong_server(&mut right, &plan).expect("server");
                let received = stream_receiver(&mut right, &plan).expect("receiver");
                (served, received)
            });
            let latency = pingpong_client(&mut left, &plan).expect("client");
            let sent = stream_sender(&mut left, &plan).expect("sender");
            let (served, received) = server.join().expect("server thread");
            assert!(latency.round_trips > 0 && served.messages > latency.round_trips);
            assert!(latency.p50_us > 0.0 && latency.p99_us >= latency.p50_us);
            assert!(received.messages > 0 && received.seconds > 0.0);
            assert!(received.bytes <= received.total_bytes && received.total_bytes <= sent.bytes);
        });
    }

    #[test]
    fn both_loops_end_over_a_socketpair_however_it_waits() {
        for wait in [Wait::Spin, Wait::Adaptive { spin: MOMENT }, Wait::Block] {
            let (left, right) = sockets(wait);
            both_loops(left, right, Plan::new(1000, MOMENT, MOMENT));
        }
    }

    #[test]
    fn both_loops_end_over_the_mapped_ring_however_it_waits() {
        for wait in [Wait::Spin, Wait::Adaptive { spin: Duration::from_micros(5) }, Wait::Block] {
            for size in [1, 64, 65_536, 300_001] {
                let (left, right) = rings(wait);
                both_loops(left, right, Plan::new(size, MOMENT, MOMENT));
            }
        }
    }

    #[test]
    fn cold_messages_on_huge_pages_hold_the_right_bytes_too() {
        let (left, right) = rings(Wait::Block);
        let plan = Plan { data: Data::Cold, pages: Pages::Huge, ..Plan::new(4 << 20, MOMENT, MOMENT) };
        both_loops(left, right, plan);
    }

    #[test]
    fn a_pause_between_round_trips_is_not_part_of_them() {
        let (mut left, mut right) = sockets(Wait::Block);
        let plan = Plan {
            gap: Duration::from_millis(2),
            ..Plan::new(64, Duration::ZERO, Duration::from_millis(20))
        };
        let server = spawn(move || pingpong_server(&mut right, &plan).map(|_| ()));
        let latency = pingpong_client(&mut left, &plan).expect("client");
        server.join().expect("thread").expect("server");
        assert!(latency.round_trips <= 11, "{latency:?}");
        assert!(latency.p50_us < 2000.0, "{latency:?}");
    }

    /// Delivers what it was given with one bit flipped, and lets the sender believe anything.
    struct Flip(Vec<u8>);

    impl Transport for Flip {
        fn send(&mut self, message: &[u8]) -> io::Result<()> {
            self.0 = message.to_vec();
            Ok(())
        }

        fn recv_exact(&mut self, message: &mut [u8]) -> io::Result<()> {
            message.copy_from_slice(&self.0);
            message[message.len() / 2] ^= 1;
            Ok(())
        }
    }

    #[test]
    fn a_transport_that_damages_messages_gets_no_figure() {
        let plan = Plan::new(64, Duration::ZERO, Duration::ZERO);
        let error = pingpong_client(&mut Flip(Vec::new()), &plan).expect_err("damaged");
        assert!(matches!(error, BenchError::WrongBytes { offset: 32, .. }), "{error}");
    }

    #[test]
    fn a_message_without_a_mark_is_refused() {
        let (mut left, mut right) = sockets(Wait::Block);
        let plan = Plan::new(2, Duration::ZERO, Duration::ZERO);
        left.send(&[9, 9]).expect("send");
        assert!(matches!(pingpong_server(&mut right, &plan), Err(BenchError::UnknownMark { mark: 9 })));
        left.send(&[0, 9]).expect("send");
        assert!(matches!(stream_receiver(&mut right, &plan), Err(BenchError::UnknownMark { mark: 0 })));
    }
}
