//! The card's process.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use isthmus_card::{Card, Config, Faults};
use pyo3::prelude::*;

use crate::errors::to_python;

/// Signals are looked for this often.
const LOOK: Duration = Duration::from_millis(100);

/// Be the card: own the interface and lend it to the domains that connect through the broker behind `door`. Gives up all
/// privileges. Ends when a signal handler raises; `ready()` is called once it serves. `own_mtu`: speak Open-MX's own
/// dialect with frames for this MTU; 0: that of MX. `lost`: of a million frames so many are not sent, for
/// tests.
///
/// OSError: the interface cannot be opened.
#[pyfunction]
#[pyo3(signature = (interface, door, ready, *, poll_us=0, own_mtu=0, peers=Vec::new(), serial=0, lost=0))]
#[allow(clippy::too_many_arguments, reason = "one call, all by keyword in Python")]
pub fn run_card(
    py: Python<'_>,
    interface: String,
    door: PathBuf,
    ready: Py<PyAny>,
    poll_us: u64,
    own_mtu: u16,
    peers: Vec<(u64, String)>,
    serial: u32,
    lost: u32,
) -> PyResult<()> {
    let faults = Faults { lose_ppm: lost, seed: serial.into(), ..Faults::default() };
    let config = Config { interface, own_mtu, poll_us, peers, serial, faults, ..Config::default() };
    let card = py.detach(|| Card::open(config, &door)).map_err(|e| to_python(py, &e))?;
    ready.bind(py).call0()?;
    let stop = AtomicBool::new(false);
    let (ended, raised) = py.detach(|| {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| card.run(&stop));
            let mut raised = None;
            while !thread.is_finished() && raised.is_none() {
                std::thread::sleep(LOOK);
                raised = Python::attach(|py| py.check_signals().err());
            }
            stop.store(true, Ordering::Release);
            card.wake();
            (thread.join(), raised)
        })
    });
    if let Some(raised) = raised {
        return Err(raised);
    }
    match ended {
        Ok(ended) => ended.map_err(|e| to_python(py, &e)),
        Err(_) => Err(pyo3::exceptions::PyRuntimeError::new_err("the card's thread ended")),
    }
}
