//! The loops of `isthmus bench` over endpoints of MX.

use std::collections::VecDeque;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use std::{io, thread};

use isthmus_bench::{self as bench, BenchError, Data, Part, Plan, Report, Transport};
use isthmus_mx::{Address, Endpoint, Fault, How, Parts, Pattern, RequestId, Status};
use pyo3::prelude::*;

use crate::bench::{PlanDict, ReportDict, fault, how_of, play};
use crate::mx::MxEndpoint;

/// What every message of the loops is called.
const MATCH: u64 = 0x15_7401;

/// One message at a time: sent and waited for, posted and waited for.
struct OneByOne<'e> {
    endpoint: &'e Endpoint,
    peer: Address,
    how: How<'e>,
}

fn failed(fault: Fault) -> io::Error {
    io::Error::other(fault)
}

impl<'e> OneByOne<'e> {
    fn new(endpoint: &'e Endpoint, peer: (u64, u64), wait: &str) -> Self {
        Self { endpoint, peer: Address::from_words([peer.0, peer.1]), how: how_of(wait) }
    }

    fn end(&self, id: RequestId) -> io::Result<()> {
        match self.endpoint.wait(id, &self.how).map_err(failed)? {
            Some(report) if report.status == Status::Success => Ok(()),
            Some(report) => Err(io::Error::other(format!("a request ended with {:?}", report.status))),
            None => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    fn ahead(self, depth: usize, plan: &Plan) -> Ahead<'e> {
        let copies = plan.data == Data::Cold;
        Ahead { one: self, depth, copies, requests: VecDeque::new(), current: Box::default() }
    }

    fn post(&self, message: &mut [u8]) -> io::Result<RequestId> {
        let parts = Parts::new(&[(message.as_mut_ptr(), message.len())]);
        let pattern = Pattern { value: MATCH, mask: u64::MAX };
        // SAFETY: each caller waits for the end before the bytes are used or go.
        unsafe { self.endpoint.irecv(pattern, parts, 0) }.map_err(failed)
    }

    fn begin(&self, message: &[u8]) -> io::Result<RequestId> {
        // SAFETY: as above.
        unsafe { self.endpoint.isend(self.peer, Parts::of(message), MATCH, false, 0) }.map_err(failed)
    }
}

impl Transport for OneByOne<'_> {
    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        let id = self.begin(message)?;
        self.end(id)
    }

    fn recv_exact(&mut self, message: &mut [u8]) -> io::Result<()> {
        let id = self.post(message)?;
        self.end(id)
    }
}

/// A few messages of a stream at a time, each in a buffer of its own, as programs have them.
struct Ahead<'e> {
    one: OneByOne<'e>,
    depth: usize,
    /// Each message is copied from and to the loop's own memory, which is cold then.
    copies: bool,
    requests: VecDeque<(RequestId, Box<[u8]>)>,
    /// What came last.
    current: Box<[u8]>,
}

impl Ahead<'_> {
    /// After the last message the loops say nothing any more of those under way.
    fn is_last(message: &[u8]) -> bool {
        message.first() == Some(&(isthmus_bench::Mark::Last as u8))
    }

    /// What the oldest send has left, or a copy of the message.
    fn buffer(&mut self, message: &[u8]) -> io::Result<Box<[u8]>> {
        if self.requests.len() < self.depth {
            return Ok(message.into());
        }
        let Some((id, mut buffer)) = self.requests.pop_front() else { return Ok(message.into()) };
        self.one.end(id)?;
        if self.copies || buffer.len() != message.len() {
            buffer = message.into();
        }
        Ok(buffer)
    }

    fn post(&mut self, mut buffer: Box<[u8]>) -> io::Result<()> {
        let id = self.one.post(&mut buffer)?;
        self.requests.push_back((id, buffer));
        Ok(())
    }
}

impl Transport for Ahead<'_> {
    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        self.one.send(message)
    }

    fn recv_exact(&mut self, message: &mut [u8]) -> io::Result<()> {
        self.one.recv_exact(message)
    }

    fn send_next(&mut self, message: &mut [u8], mark: u8) -> io::Result<()> {
        let mut buffer = self.buffer(message)?;
        buffer[0] = mark;
        let id = self.one.begin(&buffer)?;
        self.requests.push_back((id, buffer));
        if Self::is_last(&[mark]) {
            for (id, _buffer) in self.requests.drain(..) {
                self.one.end(id)?;
            }
        }
        Ok(())
    }

    fn recv_next<'a>(&'a mut self, message: &'a mut [u8]) -> io::Result<&'a [u8]> {
        let used = std::mem::take(&mut self.current);
        if used.len() == message.len() {
            self.post(used)?;
        }
        while self.requests.len() < self.depth {
            self.post(vec![0; message.len()].into())?;
        }
        let Some((id, buffer)) = self.requests.pop_front() else { return Ok(message) };
        self.one.end(id)?;
        if Self::is_last(&buffer) {
            for (id, _buffer) in self.requests.drain(..) {
                // What nothing will meet.
                self.one.endpoint.cancel(id).map_err(failed)?;
            }
        }
        self.current = buffer;
        if self.copies {
            message.copy_from_slice(&self.current);
            return Ok(message);
        }
        Ok(&self.current)
    }
}

/// Play `part` with a peer; `ahead` messages of a stream are under way at a time, 0: one, without a copy.
#[pyfunction]
pub fn bench_mx(
    py: Python<'_>,
    endpoint: &MxEndpoint,
    peer: (u64, u64),
    wait: &str,
    part: &str,
    plan: PlanDict,
    ahead: usize,
) -> PyResult<ReportDict> {
    let one = OneByOne::new(endpoint.inner(), peer, wait);
    if ahead == 0 {
        return play(py, Ok(one), part, &plan);
    }
    let one = one.ahead(ahead, &plan.plan()?);
    play(py, Ok(one), part, &plan)
}

/// What endpoints moved, bytes, and the seconds, from when all are at work until the first is through. `moved` counts
/// what each has moved in messages of `size` bytes.
fn while_all_work(moved: &[AtomicU64], size: u64, is_over: impl Fn() -> bool) -> (Vec<u64>, f64) {
    let now = || -> Vec<u64> { moved.iter().map(|bytes| bytes.load(Ordering::Relaxed)).collect() };
    let mut before = (now(), Instant::now());
    while before.0.iter().any(|bytes| *bytes < AT_WORK * size) && !is_over() {
        thread::sleep(LOOK);
        before = (now(), Instant::now());
    }
    while !is_over() {
        thread::sleep(LOOK);
    }
    let (after, seconds) = (now(), before.1.elapsed().as_secs_f64());
    (after.iter().zip(before.0).map(|(after, before)| after - before).collect(), seconds)
}

/// Messages that an endpoint moves while it finds its speed.
const AT_WORK: u64 = 4;
/// How often a bench looks at what its endpoints do.
const LOOK: Duration = Duration::from_millis(1);

/// A transport that says how much it has moved.
struct Counted<'p, T> {
    transport: T,
    bytes: &'p AtomicU64,
}

impl<T: Transport> Transport for Counted<'_, T> {
    fn send(&mut self, message: &[u8]) -> io::Result<()> {
        self.transport.send(message)?;
        self.bytes.fetch_add(message.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn recv_exact(&mut self, message: &mut [u8]) -> io::Result<()> {
        self.transport.recv_exact(message)?;
        self.bytes.fetch_add(message.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn send_next(&mut self, message: &mut [u8], mark: u8) -> io::Result<()> {
        self.transport.send_next(message, mark)?;
        self.bytes.fetch_add(message.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn recv_next<'a>(&'a mut self, message: &'a mut [u8]) -> io::Result<&'a [u8]> {
        let message = self.transport.recv_next(message)?;
        self.bytes.fetch_add(message.len() as u64, Ordering::Relaxed);
        Ok(message)
    }
}

/// Play `part` at many endpoints at once, each in a thread of its own with its own peer. A report for each; what they
/// say of processor time is the whole process's. Then the bytes that each moved, and the seconds, while all of them were
/// at work.
#[pyfunction]
pub fn bench_mx_many(
    py: Python<'_>,
    endpoints: Vec<Py<MxEndpoint>>,
    peers: Vec<(u64, u64)>,
    wait: &str,
    part: &str,
    plan: PlanDict,
    ahead: usize,
) -> PyResult<(Vec<ReportDict>, Vec<u64>, f64)> {
    let part: Part = part.parse().map_err(fault)?;
    let plan: Plan = plan.plan()?;
    let counts: Vec<AtomicU64> = endpoints.iter().map(|_| AtomicU64::default()).collect();
    let ends = endpoints.iter().zip(peers).zip(&counts).map(|((endpoint, peer), bytes)| Counted {
        transport: OneByOne::new(endpoint.get().inner(), peer, wait).ahead(ahead.max(1), &plan),
        bytes,
    });
    let ends: Vec<_> = ends.collect();
    let (reports, moved): (Result<Vec<Report>, BenchError>, _) = py.detach(|| {
        thread::scope(|scope| {
            let play = |mut end| scope.spawn(move || bench::play(&mut end, part, &plan));
            let threads: Vec<_> = ends.into_iter().map(play).collect();
            let is_over = || threads.iter().any(thread::ScopedJoinHandle::is_finished);
            let moved = while_all_work(&counts, plan.size as u64, is_over);
            let join = |thread: thread::ScopedJoinHandle<'_, _>| {
                thread.join().unwrap_or_else(|panic| resume_unwind(panic))
            };
            (threads.into_iter().map(join).collect(), moved)
        })
    });
    let reports = reports.map_err(fault)?.into_iter().map(ReportDict::from).collect();
    Ok((reports, moved.0, moved.1))
}
