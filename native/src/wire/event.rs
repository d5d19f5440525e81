//! Events as Python sees them.

use pyo3::prelude::*;

use super::inbox::{Begun, Happening, Noted};

/// What happened to a call that is no row of steps.
#[pyclass(frozen)]
pub struct Event {
    /// "begin", "message", "half_close", "end" or "step": a unary Step that has come whole.
    #[pyo3(get)]
    kind: &'static str,
    #[pyo3(get)]
    call: u32,
    /// How many rows have come before it, ever, on any call.
    #[pyo3(get)]
    rows_before: u64,
    /// Of a call that begins.
    #[pyo3(get)]
    path: String,
    /// The number that the table of tokens gives the caller's; None where there is no table.
    #[pyo3(get)]
    identity: Option<u32>,
    #[pyo3(get)]
    metadata: Vec<(String, String)>,
    #[pyo3(get)]
    timeout_ms: Option<u64>,
    /// The other end of its connection, as gRPC spells it.
    #[pyo3(get)]
    peer: String,
    data: Vec<u8>,
}

#[pymethods]
impl Event {
    /// The message, as bytes.
    #[getter]
    fn data(&self) -> &[u8] {
        &self.data
    }
}

impl Event {
    fn begin(&mut self, kind: &'static str, begun: Begun) {
        (self.kind, self.path, self.identity) = (kind, begun.path, begun.identity);
        (self.metadata, self.timeout_ms) = (begun.metadata, begun.timeout_ms);
        self.peer = begun.peer.address.clone();
    }
}

impl From<Noted> for Event {
    fn from(noted: Noted) -> Self {
        let mut event = Event {
            kind: "end",
            call: noted.call,
            rows_before: noted.rows_before,
            path: String::new(),
            identity: None,
            metadata: vec![],
            timeout_ms: None,
            peer: String::new(),
            data: vec![],
        };
        match noted.what {
            Happening::Begin(begun) => event.begin("begin", *begun),
            Happening::Refused(begun) => event.begin("refused", *begun),
            Happening::Step(begun, data) => {
                event.begin("step", *begun);
                event.data = data;
            }
            Happening::Message(data) => (event.kind, event.data) = ("message", data),
            Happening::HalfClose => event.kind = "half_close",
            Happening::End => {}
        }
        event
    }
}
