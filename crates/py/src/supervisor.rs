//! Running unmodified programs: behind a filter, and the supervisor that answers their calls.

use std::ffi::{OsStr, OsString};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;

use isthmus_engine::packet;
use isthmus_supervisor::ledger::Ledger;
use isthmus_supervisor::{Options, Supervisor, filter, pass_all};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::errors::os_error;

/// Start a program behind the filter, with signals that come to it although they do not come to us. Returns its process and the descriptor at which its calls wait.
///
/// Raises OSError: it cannot be executed, or the kernel has no such filters.
#[pyfunction]
pub fn spawn_supervised(py: Python<'_>, words: Vec<OsString>, unblocked: Vec<i32>) -> PyResult<(u32, RawFd)> {
    let (name, arguments) = words.split_first().ok_or_else(|| PyValueError::new_err("no program"))?;
    let program = filter::FILTER.program();
    let (ours, theirs) = packet::pair().map_err(os_error)?;
    let mut command = Command::new::<&OsStr>(name.as_ref());
    command.args(arguments);
    let theirs_fd = theirs.as_raw_fd();
    // SAFETY: what runs between fork and exec allocates nothing, and uses descriptors that are open in the child.
    unsafe {
        command.pre_exec(move || {
            let calls = filter::enter(&program, &unblocked)?;
            packet::send(BorrowedFd::borrow_raw(theirs_fd), &[0], &[std::os::fd::AsFd::as_fd(&calls)])
        });
    }
    let child = py.detach(|| command.spawn()).map_err(os_error)?;
    drop(theirs);
    let mut byte = [0];
    let (_, descriptors) = packet::receive(std::os::fd::AsFd::as_fd(&ours), &mut byte).map_err(os_error)?;
    let calls = descriptors.into_iter().next().ok_or_else(|| PyValueError::new_err("no descriptor came"))?;
    Ok((child.id(), calls.into_raw_fd()))
}

/// Answer the calls that wait at a descriptor until nobody is behind it any more, and keep those that are not answered
/// yet in a file. Both descriptors become this function's.
#[pyfunction]
#[pyo3(signature = (calls, ledger, door, program, *, require=false, verbose=false, rings=false))]
#[allow(clippy::too_many_arguments, reason = "one call, all by keyword in Python")]
pub fn supervise(
    py: Python<'_>,
    calls: RawFd,
    ledger: RawFd,
    door: PathBuf,
    program: &str,
    require: bool,
    verbose: bool,
    rings: bool,
) -> PyResult<()> {
    let (calls, ledger) = (taken(calls)?, Ledger::new(taken(ledger)?.into()));
    let options = Options { require, verbose, rings };
    py.detach(|| Supervisor::new(calls, ledger, &door, program, options)?.run()).map_err(os_error)
}

/// Let every call that waits at a descriptor go on, also those that the file names, until nobody is behind it any more.
#[pyfunction]
pub fn pass_calls(py: Python<'_>, calls: RawFd, ledger: RawFd) -> PyResult<()> {
    let (calls, ledger) = (taken(calls)?, taken(ledger)?.into());
    py.detach(|| pass_all(std::os::fd::AsFd::as_fd(&calls), &ledger)).map_err(os_error)
}

fn taken(fd: RawFd) -> PyResult<OwnedFd> {
    if fd < 0 {
        return Err(PyValueError::new_err("a closed descriptor"));
    }
    // SAFETY: the caller gave it away.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
