//! The wire as Python sees it: `take` what has come, `answer` rows, `send` and `finish` calls. No object for a row or a frame.

mod allowance;
mod answers;
mod call;
mod certificates;
mod counted;
mod event;
mod frames;
#[cfg(feature = "fuzzing")]
pub mod fuzzing;
mod inbox;
mod messages;
mod numbers;
mod preface;
mod refusals;
mod relay;
mod requests;
mod server;
mod status;
mod steps;
mod strangers;
mod timeout;
mod times;

use parking_lot::Mutex;
use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyOSError, PyValueError};
use pyo3::prelude::*;
use std::collections::HashMap;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::runtime::{Builder, Runtime};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

use crate::columns::bytes_of;
use answers::Answers;
use certificates::tls_config;
pub use event::Event;
use inbox::Columns;
use refusals::Refusals;
use relay::Relay;
pub use requests::StepModel;
use server::{Limits, Listener, Server, header_map};
use status::Status;
use times::{Answer, Written};

/// Connections of gRPC clients, ended in threads of their own.
///
/// One Python thread calls it, which need not wait for anything: the descriptor says when there is something to take.
#[pyclass(frozen)]
pub struct Wire {
    server: Arc<Server>,
    runtime: Mutex<Option<Runtime>>,
    columns: Mutex<Columns>,
}

#[pymethods]
impl Wire {
    /// `head`: metadata of every stream's response. `relay`: a unix socket where another gRPC server answers what is no Stream, up to
    /// `relayed` calls at a time. `refusals`: a status (code, words, google.rpc.Status as bytes) for TOKEN_MISSING, TOKEN_UNKNOWN,
    /// TOKEN_REVOKED (of a call under way), QUEUE_FULL (of calls that are relayed) and RELAY_UNAVAILABLE, in place of the wire's own.
    /// `edges`: upper ones of the buckets of `written`, in seconds.
    /// `step_s`: how long a unary step may take that is a row.
    /// Raises OSError, ValueError.
    #[new]
    #[pyo3(signature = (*, connections=65536, calls=1024, header_nbytes=16384, message_nbytes=4194304, rows=16384,
                        inbox_nbytes=268435456, handshake_s=10.0, idle_s=300.0, keepalive_s=30.0, resets=200, frame_rows=16384,
                        frame_nbytes=4194304, threads=1, head=vec![],
                        relay=None, relayed=256, refusals=HashMap::new(), edges=vec![], step_s=30.0))]
    #[allow(clippy::too_many_arguments)]
    fn new(
        connections: usize,
        calls: u32,
        header_nbytes: u32,
        message_nbytes: usize,
        rows: usize,
        inbox_nbytes: usize,
        handshake_s: f64,
        idle_s: f64,
        keepalive_s: f64,
        resets: usize,
        frame_rows: usize,
        frame_nbytes: usize,
        threads: usize,
        head: Vec<(String, String)>,
        relay: Option<PathBuf>,
        relayed: usize,
        refusals: HashMap<String, (u16, String, Vec<u8>)>,
        edges: Vec<f64>,
        step_s: f64,
    ) -> PyResult<Self> {
        let limits = Limits {
            connections,
            calls,
            header_nbytes,
            message_nbytes,
            rows,
            inbox_nbytes,
            handshake_s,
            idle_s,
            step_s,
            keepalive_s,
            resets,
            frame_rows,
            frame_nbytes,
        };
        if !limits.possible()
            || edges.iter().any(|edge| !(0.0..=1e9).contains(edge))
            || !edges.is_sorted()
            || threads == 0
            || !(1..=Semaphore::MAX_PERMITS).contains(&relayed)
        {
            return Err(PyValueError::new_err("a limit is out of range"));
        }
        let refusals = refusals
            .into_iter()
            .map(|(name, (code, message, details))| {
                let status = Status {
                    code,
                    message,
                    details,
                };
                (name, status)
            })
            .collect();
        let refusals = Refusals::new(refusals).map_err(PyValueError::new_err)?;
        let relay = relay.map(|path| Relay::new(path, relayed));
        let written = Written::new(&edges);
        let server = Server::new(
            limits,
            header_map(head).map_err(|error| PyValueError::new_err(error.to_string()))?,
            refusals,
            relay,
            written,
        )?;
        let runtime = Builder::new_multi_thread()
            .worker_threads(threads)
            .enable_all()
            .thread_name("wire")
            .build()?;
        Ok(Wire {
            server: Arc::new(server),
            runtime: Mutex::new(Some(runtime)),
            columns: Mutex::new(Columns::default()),
        })
    }

    /// Readable as soon as there is something to take, after a `take` that found nothing.
    #[getter]
    fn descriptor(&self) -> RawFd {
        self.server.inbox.descriptor()
    }

    /// Takes connections from a listening socket from now on. The descriptor becomes the wire's own. Raises OSError.
    fn listen(&self, descriptor: RawFd) -> PyResult<()> {
        // Given to us as a number; whose it was has let go of it (socket.detach).
        let owned = unsafe { OwnedFd::from_raw_fd(descriptor) };
        let runtime = self.runtime.lock();
        let runtime = runtime
            .as_ref()
            .ok_or_else(|| PyOSError::new_err("the wire is closed"))?;
        let _entered = runtime.enter();
        let listener = Listener::new(owned)?;
        runtime.spawn(server::listen(self.server.clone(), listener));
        Ok(())
    }

    /// Certificate and key as PEM, for connections from now on, and the authority of clients' certificates, if they need some.
    /// Raises ValueError where they cannot be used; then those before stay.
    #[pyo3(signature = (certificate, key, clients=None))]
    fn set_tls(&self, certificate: &[u8], key: &[u8], clients: Option<&[u8]>) -> PyResult<()> {
        let config = tls_config(certificate, key, clients).map_err(PyValueError::new_err)?;
        self.server
            .set_tls(Some(TlsAcceptor::from(Arc::new(config))));
        Ok(())
    }

    /// Replaces the table of tokens: a number for the SHA-256 of each. None: calls need no token. Streams of tokens that are in it
    /// no more end.
    #[pyo3(signature = (identities))]
    fn set_tokens(&self, identities: Option<HashMap<[u8; 32], u32>>) {
        self.server.set_identities(identities);
    }

    /// Replaces the table of those whose unary steps may be rows: by identity, tenant and when the token expires (in seconds since
    /// 1970). None: everybody's may, and their tenant is "".
    #[pyo3(signature = (callers))]
    fn set_steppers(&self, callers: Option<HashMap<u32, (String, f64)>>) {
        self.server.known.set_callers(callers);
    }

    /// Unary steps of this session are rows from now on, with this handle and, in place of a stream, 2**31 + the number of the call:
    /// `answer` and `finish` take it so. Their seq is 0 where the caller has given none.
    fn know(&self, tenant: &str, session: &str, handle: u32, model: &StepModel) {
        let (tenant, session) = (tenant.as_bytes(), session.as_bytes());
        let model = model.0.clone();
        self.server.known.insert(tenant, session, handle, model);
    }

    /// The handle is void: steps of its session are events.
    fn forget(&self, handle: u32) {
        self.server.known.remove(handle);
    }

    /// Brings a unary step that was a row as an event after all, where its caller has given the seq and `given`, or has given none
    /// and `numbered`. False: it is to be refused.
    fn again(&self, call: u32, given: bool, numbered: bool) -> bool {
        let call = self.server.call(call);
        call.is_none_or(|call| call.again(&self.server, given, numbered))
    }

    /// How many rows have come since the last `take`, the number of the first of them (all rows ever come are numbered from 0), and
    /// the events. `column` gives the rows.
    fn take(&self, python: Python) -> (usize, u64, Vec<Event>) {
        python.detach(|| {
            let mut columns = self.columns.lock();
            if columns.len() > 1 {
                self.server.inbox.gather(); // rows come in numbers: others may be on their way
            }
            let (first, noted) = self.server.inbox.take(&mut columns);
            (
                columns.len(),
                first,
                noted.into_iter().map(Event::from).collect(),
            )
        })
    }

    /// Bytes of the inputs of the rows that were taken last.
    #[getter]
    fn input_nbytes(&self) -> usize {
        self.columns.lock().inputs.len()
    }

    /// Copies the rows that were taken last into arrays of as many rows: calls and handles (uint32), seqs and acknowledged
    /// (uint64; 2**64 - 1: none), flags (uint8), timeouts_ms and input_nbytes (uint32), inputs (uint8, one row's behind the other's);
    /// times (float64 [rows, 4]): when the row's frame was read, when all of it was here, when it was taken, and 0, in seconds of
    /// time.monotonic.
    #[allow(clippy::too_many_arguments)]
    fn columns(
        &self,
        python: Python,
        calls: PyBuffer<u32>,
        handles: PyBuffer<u32>,
        seqs: PyBuffer<u64>,
        acknowledged: PyBuffer<u64>,
        flags: PyBuffer<u8>,
        timeouts_ms: PyBuffer<u32>,
        input_nbytes: PyBuffer<u32>,
        inputs: PyBuffer<u8>,
        times: PyBuffer<f64>,
    ) -> PyResult<()> {
        let columns = self.columns.lock();
        calls.copy_from_slice(python, &columns.calls)?;
        handles.copy_from_slice(python, &columns.handles)?;
        seqs.copy_from_slice(python, &columns.seqs)?;
        acknowledged.copy_from_slice(python, &columns.acknowledged)?;
        flags.copy_from_slice(python, &columns.flags)?;
        timeouts_ms.copy_from_slice(python, &columns.timeouts_ms)?;
        input_nbytes.copy_from_slice(python, &columns.input_nbytes)?;
        inputs.copy_from_slice(python, &columns.inputs)?;
        times.copy_from_slice(python, columns.times.as_flattened())
    }

    /// Answers rows of streams: calls and handles (uint32), seqs (uint64), outputs (uint8 [rows, nbytes], or empty for rows that
    /// want none), durable seqs (uint64, or empty). Rows of one stream go in one frame, in their order. Raises ValueError.
    fn answer(
        &self,
        python: Python,
        calls: PyBuffer<u32>,
        handles: PyBuffer<u32>,
        seqs: PyBuffer<u64>,
        outputs: PyBuffer<u8>,
        durable: PyBuffer<u64>,
    ) -> PyResult<()> {
        let rows = calls.item_count();
        let fits = handles.item_count() == rows
            && seqs.item_count() == rows
            && (rows == 0 || outputs.item_count().is_multiple_of(rows))
            && (durable.item_count() == 0 || durable.item_count() == rows);
        if !fits {
            return Err(PyValueError::new_err("the columns differ in length"));
        }
        let ids = calls.to_vec(python)?;
        let (handles, seqs) = (bytes_of(&handles)?, bytes_of(&seqs)?);
        let (outputs, durable) = (bytes_of(&outputs)?, bytes_of(&durable)?);
        let answers = Answers {
            ids: &ids,
            handles,
            seqs,
            outputs,
            durable,
        };
        python.detach(|| answers.send(&self.server));
        Ok(())
    }

    /// Sends a message to a call's caller; it answers so many rows.
    #[pyo3(signature = (call, message, rows=0))]
    fn send(&self, call: u32, message: &[u8], rows: usize) {
        if let Some(call) = self.server.call(call) {
            self.server.counters.answers.fetch_add(rows as u64, Relaxed);
            let answer = Answer { rows, since: None };
            call.send(frames::prefixed(message), answer);
        }
    }

    /// Answers a unary call: head, message and the status OK in one go.
    fn respond(&self, call: u32, message: &[u8]) {
        if let Some(call) = self.server.call(call)
            && call.respond(frames::prefixed(message))
        {
            self.server.counters.answers.fetch_add(1, Relaxed);
        }
    }

    /// So many more rows of a call are under way than it has brought; a negative number: so many less.
    fn expect(&self, call: u32, rows: i64) {
        if let Some(call) = self.server.call(call) {
            call.expect(rows);
        }
    }

    /// Ends a call behind what was sent to it: a canonical status code, words, and a google.rpc.Status as bytes, if any.
    #[pyo3(signature = (call, code=0, message=String::new(), details=None))]
    fn finish(&self, call: u32, code: u16, message: String, details: Option<&[u8]>) {
        if let Some(call) = self.server.call(call) {
            call.finish(Status {
                code,
                message,
                details: details.unwrap_or_default().to_vec(),
            });
        }
    }

    /// Takes no more connections, and tells the peers of those that are there to make none of their next calls on them.
    fn drain(&self) {
        self.server.draining.send_replace(true);
    }

    /// What is counted. Now: connections, calls (of Python), streams (calls that are Stream), relayed, inbox_rows, inbox_events and
    /// inbox_nbytes (that have come and are not taken), inbox_age_ms (of the oldest of them). Ever: accepted (connections),
    /// turned_away (for there were too many), failed (before HTTP/2 was agreed upon), bytes_in and bytes_out (of HTTP/2, without
    /// TLS), tls_1_2, tls_1_3 and tls_failed (handshakes), unauthenticated (calls), rows, steps (unary; of which step_rows
    /// became rows and step_events events, some one after the other), answers (to both),
    /// relayed_ever, and what was refused: refused_no_token, refused_unknown_token, refused_token_revoked (calls under way),
    /// refused_too_many_calls (to be relayed), refused_no_relay (nobody was there), refused_head (of calls that make no sense),
    /// refused_message (too large, or not gRPC) and refused_resets (connections with more resets or small frames than allowed).
    fn counters(&self) -> HashMap<&'static str, u64> {
        let counters = &self.server.counters;
        let depth = self.server.inbox.depth();
        let (relayed, relayed_ever) = match &self.server.relay {
            Some(relay) => (relay.now() as u64, relay.ever.load(Relaxed)),
            None => (0, 0),
        };
        let mut all = HashMap::from(counters.ever());
        all.extend([
            ("connections", counters.connections.load(Relaxed) as u64),
            ("streams", counters.streams.load(Relaxed) as u64),
            ("calls", self.server.calls.read().len() as u64),
            ("relayed", relayed),
            ("relayed_ever", relayed_ever),
            ("rows", depth.rows_ever),
            ("inbox_rows", depth.rows as u64),
            ("inbox_events", depth.events as u64),
            ("inbox_nbytes", depth.nbytes as u64),
            ("inbox_age_ms", depth.age.as_millis() as u64),
        ]);
        all
    }

    /// How long answers of rows, and those to unary calls, took from `answer` or `respond` until they were given to the kernel: how many
    /// by bucket, one more than there are `edges`, and seconds in all.
    fn written(&self) -> (Vec<u64>, f64) {
        self.server.written.read()
    }

    /// Lets go of every connection, and of what was not sent within the grace.
    #[pyo3(signature = (grace_s=0.0))]
    fn close(&self, python: Python, grace_s: f64) {
        if let Some(runtime) = self.runtime.lock().take() {
            python.detach(|| {
                runtime.shutdown_timeout(Duration::from_secs_f64(grace_s.clamp(0.0, 3600.0)))
            });
        }
    }
}
