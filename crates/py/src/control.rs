//! Control messages and addresses, for the broker and for tests.

use std::os::fd::IntoRawFd;

use isthmus_wire::address::{self, Host};
use isthmus_wire::control::{self, Carrier, MESSAGE_MAX, Message, Refusal, SocketKind, Value};
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyFrozenSet, PyString, PyTuple};

/// Decode one packet of the control protocol into (kind, request, fields).
#[pyfunction]
pub fn control_decode<'py>(
    py: Python<'py>,
    packet: &[u8],
) -> PyResult<(&'static str, u32, Bound<'py, PyDict>)> {
    let (request, message) = control::decode(packet).map_err(|e| PyValueError::new_err(e.to_string()))?;
    let fields = PyDict::new(py);
    let mut result = Ok(());
    message.fields(|name, value| {
        let set = match value {
            Value::Number(n) => fields.set_item(name, n),
            Value::Text(text) => fields.set_item(name, text),
            Value::Bytes(bytes) => fields.set_item(name, PyBytes::new(py, bytes)),
        };
        if set.is_err() {
            result = set;
        }
    });
    result?;
    Ok((message.name(), request, fields))
}

/// Encode one packet of the control protocol.
#[pyfunction]
#[pyo3(signature = (kind, request, /, **fields))]
pub fn control_encode<'py>(
    py: Python<'py>,
    kind: &str,
    request: u32,
    fields: Option<&Bound<'py, PyDict>>,
) -> PyResult<Bound<'py, PyBytes>> {
    let fields = fields.cloned().unwrap_or_else(|| PyDict::new(py));
    // The values are kept alive here while the message borrows them.
    let mut numbers = Vec::new();
    let mut texts = Vec::new();
    let mut blobs = Vec::new();
    for (name, value) in fields.iter() {
        let name: String = name.extract()?;
        if let Ok(text) = value.cast::<PyString>() {
            texts.push((name, text.to_cow()?.into_owned()));
        } else if let Ok(bytes) = value.cast::<PyBytes>() {
            blobs.push((name, bytes.as_bytes().to_vec()));
        } else {
            numbers.push((name, value.extract::<u64>()?));
        }
    }
    let mut known = 0;
    let message = Message::build(kind, |wanted| {
        known += 1;
        let number = numbers.iter().find(|(n, _)| n == wanted).map(|(_, v)| Value::Number(*v));
        let text = || texts.iter().find(|(n, _)| n == wanted).map(|(_, v)| Value::Text(v.as_str()));
        let blob = || blobs.iter().find(|(n, _)| n == wanted).map(|(_, v)| Value::Bytes(v.as_slice()));
        number.or_else(text).or_else(blob)
    })
    .map_err(|e| PyValueError::new_err(format!("{kind}.{e}")))?;
    if known != fields.len() {
        return Err(PyValueError::new_err(format!(
            "{kind}: it has {known} fields, {} were given",
            fields.len()
        )));
    }
    let mut out = [0; MESSAGE_MAX];
    let len = control::encode(request, &message, &mut out)
        .map_err(|e| PyValueError::new_err(format!("{kind}.{e}")))?;
    Ok(PyBytes::new(py, &out[..len]))
}

/// Split `domain:port` into the domain (its name, or its number) and the port.
#[pyfunction]
pub fn parse_address<'py>(py: Python<'py>, text: &str) -> PyResult<Bound<'py, PyTuple>> {
    let (host, port) =
        address::parse_address(text).map_err(|e| PyValueError::new_err(format!("address {text:?}: {e}")))?;
    match host {
        Host::Name(name) => (name, port).into_pyobject(py),
        Host::Number(number) => (number, port).into_pyobject(py),
    }
}

/// Raise ValueError unless `name` is a good name for a domain or group.
#[pyfunction]
pub fn check_name(name: &str) -> PyResult<()> {
    address::check_name(name).map_err(|e| PyValueError::new_err(format!("name {name:?}: {e}")))
}

/// The two ends of a new connection's bell: descriptors of the caller's. OSError if there are none.
#[pyfunction]
pub fn bell_pair() -> PyResult<(i32, i32)> {
    let (ours, theirs) = isthmus_engine::bell::pair()
        .map_err(|error| PyOSError::new_err((error.raw_os_error(), error.to_string())))?;
    Ok((ours.into_raw_fd(), theirs.into_raw_fd()))
}

/// The closed lists of the format, as frozensets of their words, and the refusals in wire order.
pub fn add_lists(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let py = module.py();
    let kinds: Vec<_> = SocketKind::ALL.iter().map(|v| v.name()).collect();
    let carriers: Vec<_> = Carrier::ALL.iter().map(|v| v.name()).collect();
    let refusals: Vec<_> = Refusal::ALL.iter().map(|v| v.name()).collect();
    module.add("SOCKET_KINDS", PyFrozenSet::new(py, kinds)?)?;
    module.add("CARRIERS", PyFrozenSet::new(py, carriers)?)?;
    module.add("REFUSALS", PyTuple::new(py, refusals)?)?;
    Ok(())
}
