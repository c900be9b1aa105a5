//! One door for callers that pick a loop at run time: a [`Part`] goes in, a [`Report`] comes out.

use std::str::FromStr;

use crate::{
    connect::Connects,
    error::BenchError,
    loops::{
        Latency, Plan, Served, Throughput, Transport, pingpong_client, pingpong_server, stream_receiver,
        stream_sender,
    },
};

/// Which loop, and which end of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    PingpongClient,
    PingpongServer,
    StreamSender,
    StreamReceiver,
}

impl FromStr for Part {
    type Err = BenchError;

    fn from_str(word: &str) -> Result<Self, BenchError> {
        match word {
            "pingpong-client" => Ok(Self::PingpongClient),
            "pingpong-server" => Ok(Self::PingpongServer),
            "stream-client" => Ok(Self::StreamSender),
            "stream-server" => Ok(Self::StreamReceiver),
            _ => Err(BenchError::UnknownWord {
                what: "part",
                word: word.to_owned(),
                choices: "pingpong-client, pingpong-server, stream-client, stream-server",
            }),
        }
    }
}

/// What one end found; `None` where this end cannot know.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Report {
    /// One way, in microseconds.
    pub p50_us: Option<f64>,
    pub p99_us: Option<f64>,
    /// Messages, round trips or connections measured, and the payload bytes and seconds of exactly those.
    pub count: u64,
    pub bytes: u64,
    pub seconds: Option<f64>,
    /// CPU seconds of this process, and the payload bytes moved in the time they were counted over.
    pub cpu_s: f64,
    pub total_bytes: u64,
}

impl From<Latency> for Report {
    fn from(found: Latency) -> Self {
        Self {
            p50_us: Some(found.p50_us),
            p99_us: Some(found.p99_us),
            count: found.round_trips,
            seconds: Some(found.seconds),
            cpu_s: found.cpu_s,
            ..Self::default()
        }
    }
}

impl From<Throughput> for Report {
    fn from(found: Throughput) -> Self {
        Self {
            count: found.messages,
            bytes: found.bytes,
            seconds: Some(found.seconds),
            cpu_s: found.cpu_s,
            total_bytes: found.total_bytes,
            ..Self::default()
        }
    }
}

impl From<Served> for Report {
    fn from(found: Served) -> Self {
        Self {
            count: found.messages,
            bytes: found.bytes,
            cpu_s: found.cpu_s,
            total_bytes: found.bytes,
            ..Self::default()
        }
    }
}

impl From<Connects> for Report {
    fn from(found: Connects) -> Self {
        Self { count: found.connections, seconds: Some(found.seconds), cpu_s: found.cpu_s, ..Self::default() }
    }
}

/// Play `part` over `transport`. Each loop is compiled for `T`; the choice is made once, outside of it.
///
/// # Errors
///
/// As the loop's own.
pub fn play<T: Transport>(transport: &mut T, part: Part, plan: &Plan) -> Result<Report, BenchError> {
    match part {
        Part::PingpongClient => pingpong_client(transport, plan).map(Report::from),
        Part::PingpongServer => pingpong_server(transport, plan).map(Report::from),
        Part::StreamSender => stream_sender(transport, plan).map(Report::from),
        Part::StreamReceiver => stream_receiver(transport, plan).map(Report::from),
    }
}

#[cfg(test)]
mod tests {
    use std::{os::unix::net::UnixStream, time::Duration};

    use super::*;
    use crate::{FdStream, Wait};

    #[test]
    fn each_end_reports_what_it_can_know() {
        let plan = Plan::new(100, Duration::ZERO, Duration::from_millis(2));
        let parts =
            [(Part::PingpongClient, Part::PingpongServer), (Part::StreamSender, Part::StreamReceiver)];
        for (here, there) in parts {
            let (left, right) = UnixStream::pair().expect("socketpair");
            let other =
                std::thread::spawn(move || play(&mut FdStream::new(right.into(), Wait::Block), there, &plan));
            let client = play(&mut FdStream::new(left.into(), Wait::Block), here, &plan).expect("client");
            let server = other.join().expect("thread").expect("server");
            assert_eq!(client.p50_us.is_some(), here == Part::PingpongClient);
            assert_eq!(server.seconds.is_some(), there == Part::StreamReceiver);
            assert!(client.count > 0 && server.total_bytes > 0);
        }
    }

    #[test]
    fn words_name_parts() {
        assert_eq!("stream-server".parse::<Part>().expect("a part"), Part::StreamReceiver);
        assert!("stream".parse::<Part>().is_err());
    }
}
