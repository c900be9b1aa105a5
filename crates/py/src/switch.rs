//! The switch's process.

use std::os::fd::{FromRawFd, OwnedFd};

use isthmus_switch::{Switch, sandbox};
use pyo3::exceptions::PyOSError;
use pyo3::prelude::*;

fn failed(error: std::io::Error) -> PyErr {
    PyOSError::new_err((error.raw_os_error(), error.to_string()))
}

/// Be the switch: serve the broker that connects to `listener`, a listening SOCK_SEQPACKET socket whose descriptor is
/// the switch's from now on, and the guests it names. Ends when `stop()` is true, which is asked twice a second and
/// after each signal; and, unless `stay`, when there has been neither a broker nor a guest for a while.
/// `poll_s`: seconds for which lanes are looked at after something was moved; infinite for ever.
/// With `confined` this process can do little else from then on. OSError if the kernel gives no descriptors or does
/// not confine us.
#[pyfunction]
pub fn run_switch(
    py: Python<'_>,
    listener: i32,
    stay: bool,
    confined: bool,
    poll_s: f64,
    stop: Py<PyAny>,
) -> PyResult<()> {
    // SAFETY: the caller gives the descriptor away.
    let listener = unsafe { OwnedFd::from_raw_fd(listener) };
    let mut error = None;
    let mut asked = std::time::Instant::now();
    py.detach(|| {
        // Too long for a duration is for ever.
        let poll = std::time::Duration::try_from_secs_f64(poll_s).unwrap_or(std::time::Duration::MAX);
        let mut switch = Switch::new(listener)?.with_poll(poll);
        if confined {
            sandbox::enter()?;
        }
        switch.run(stay, |interrupted| {
            if !interrupted && asked.elapsed().as_millis() < 500 {
                return false;
            }
            asked = std::time::Instant::now();
            Python::attach(|py| {
                let answer = py.check_signals().and_then(|()| stop.bind(py).call0()?.is_truthy());
                answer.unwrap_or_else(|raised| {
                    error = Some(raised);
                    true
                })
            })
        })
    })
    .map_err(failed)?;
    error.map_or(Ok(()), Err)
}
