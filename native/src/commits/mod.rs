//! Commits as Python sees them: one call packs and sends the rows of a commit, another takes what Redis says of them.

mod link;
mod records;
mod replies;
mod stream;
mod tls;
mod trust;

use parking_lot::Mutex;
use pyo3::buffer::{Element, PyBuffer};
use pyo3::exceptions::{PyConnectionError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use link::{Link, Rows};
use records::{HEADER, Place, Shared};
use stream::{Socket, Stream};
pub use tls::TlsStream;

/// A column of rows in Python's memory, which its owner leaves as it is while it is used here.
struct Column<T: Element> {
    buffer: PyBuffer<T>,
    rows: usize,
    width: usize,  // values of a row, whatever its shape
    stride: isize, // bytes from a row to the next
}

// The buffer belongs to Python's object until it is dropped, and is only read.
unsafe impl<T: Element> Send for Column<T> {}

impl<T: Element> Column<T> {
    /// Rows may lie apart, values of a row may not.
    fn new(array: &Bound<PyAny>, name: &str) -> PyResult<Self> {
        let wrong = |why: &str| PyValueError::new_err(format!("{name} {why}"));
        let buffer =
            PyBuffer::<T>::get(array).map_err(|error| wrong(&format!("is no column: {error}")))?;
        let (Some(&rows), Some(&stride)) = (buffer.shape().first(), buffer.strides().first())
        else {
            return Err(wrong("is one number"));
        };
        let width = buffer.shape()[1..].iter().product();
        let mut expected = size_of::<T>() as isize;
        for (&size, &stride) in buffer.shape()[1..].iter().zip(&buffer.strides()[1..]).rev() {
            if size > 1 && width > 0 && stride != expected {
                return Err(wrong("has rows whose values do not lie side by side"));
            }
            expected *= size as isize;
        }
        Ok(Column {
            buffer,
            rows,
            width,
            stride,
        })
    }

    fn of(array: &Bound<PyAny>, name: &str, rows: usize, width: Option<usize>) -> PyResult<Self> {
        let column = Self::new(array, name)?;
        if column.rows != rows || width.is_some_and(|width| width != column.width) {
            let (had, wide) = (column.rows, column.width);
            return Err(PyValueError::new_err(format!(
                "{name} has {had} rows of {wide}"
            )));
        }
        Ok(column)
    }

    fn row(&self, row: usize) -> &[T] {
        if row >= self.rows || self.width == 0 {
            return &[]; // whose pointer may be null
        }
        // Inside the buffer, for its shape and strides say so; `new` has seen to it that the row's values lie side by side.
        unsafe {
            let start = self
                .buffer
                .buf_ptr()
                .cast::<u8>()
                .offset(row as isize * self.stride);
            std::slice::from_raw_parts(start.cast(), self.width)
        }
    }
}

/// Rows to write: `SET key record XX PX ttl`.
struct Sets {
    tags: Column<u8>,
    tokens: Column<u8>,
    records: Column<u8>,
    ttls: Column<u64>,
    head: Vec<u8>,   // until the tag
    middle: Vec<u8>, // between token and record
    ttl: Option<u64>,
    tail: Vec<u8>, // behind the record, with that ttl
}

impl Rows for Sets {
    fn len(&self) -> usize {
        self.records.rows
    }

    fn put(&mut self, row: usize, out: &mut Vec<u8>) {
        let ttl = self.ttls.row(row)[0];
        if self.ttl != Some(ttl) {
            let digits = ttl.to_string();
            self.tail = format!(
                "\r\n$2\r\nXX\r\n$2\r\nPX\r\n${}\r\n{digits}\r\n",
                digits.len()
            )
            .into_bytes();
            self.ttl = Some(ttl);
        }
        out.extend_from_slice(&self.head);
        out.extend_from_slice(self.tags.row(row));
        out.extend_from_slice(b"}:");
        out.extend_from_slice(self.tokens.row(row));
        out.extend_from_slice(&self.middle);
        out.extend_from_slice(self.records.row(row));
        out.extend_from_slice(&self.tail);
    }
}

type Verdicts<'py> = (
    Option<Bound<'py, PyBytes>>,
    Vec<(usize, Bound<'py, PyBytes>)>,
    Option<i64>,
    Vec<i64>,
);

/// One connection for commits, of one thread.
///
/// A commit is one `send`, or several of which the last one counts or waits; then `progress` until it is True; then `verdicts`.
/// Whatever raises an OSError ends the link: nobody knows what of the commit arrives, where `in_doubt` says that some may.
#[pyclass]
pub struct CommitLink {
    link: Option<Link<Sets>>,
    failed: String,
    in_doubt: bool,
}

#[pymethods]
impl CommitLink {
    /// Takes a descriptor of a connected socket as its own. What Python's socket had to read is read, and nothing is under way.
    #[new]
    fn new(descriptor: RawFd) -> PyResult<Self> {
        let socket = Socket::new(descriptor)?;
        Ok(Self::over(Stream::Plain(socket)))
    }

    /// Takes a stream over: Python cannot use it any more.
    #[staticmethod]
    fn over_tls(stream: &mut TlsStream) -> PyResult<Self> {
        Ok(Self::over(Stream::Tls(stream.taken()?)))
    }

    /// Sends `SET <prefix><tag>}:<token> <record> XX PX <ttl>` for every row, then `INCR <counting_key>` where there is one, then
    /// `wait`, a whole command. What the kernel does not take at once, `progress` sends; until all is sent, the arrays must stay
    /// as they are. With `more`, all of it may wait for the next `send`.
    #[pyo3(signature = (tags, tokens, records, ttl_ms, prefix, counting_key=&b""[..], wait=&b""[..], more=false))]
    #[expect(clippy::too_many_arguments)]
    fn send(
        &mut self,
        python: Python,
        tags: &Bound<PyAny>,
        tokens: &Bound<PyAny>,
        records: &Bound<PyAny>,
        ttl_ms: &Bound<PyAny>,
        prefix: &[u8],
        counting_key: &[u8],
        wait: &[u8],
        more: bool,
    ) -> PyResult<()> {
        let records = Column::new(records, "records")?;
        let tags = Column::of(tags, "tags", records.rows, None)?;
        let tokens = Column::of(tokens, "tokens", records.rows, None)?;
        let ttls = Column::of(ttl_ms, "ttl_ms", records.rows, Some(1))?;
        let key = prefix.len() + tags.width + 2 + tokens.width;
        let mut head = format!("*6\r\n$3\r\nSET\r\n${key}\r\n").into_bytes();
        head.extend_from_slice(prefix);
        let middle = format!("\r\n${}\r\n", records.width).into_bytes();
        let sets = Sets {
            tags,
            tokens,
            records,
            ttls,
            head,
            middle,
            ttl: None,
            tail: Vec::new(),
        };
        let mut counting = Vec::new();
        if !counting_key.is_empty() {
            counting = format!("*2\r\n$4\r\nINCR\r\n${}\r\n", counting_key.len()).into_bytes();
            counting.extend_from_slice(counting_key);
            counting.extend_from_slice(b"\r\n");
        }
        let link = self.open()?;
        if link.replies.sealed() {
            return Err(PyValueError::new_err(
                "the commit before is not over: ask for its verdicts",
            ));
        }
        link.add(sets, &counting, wait);
        if more {
            return Ok(());
        }
        self.working(|link| python.detach(|| link.write()))
    }

    /// Sends what is left and takes replies, for at most so long; whether all replies are there.
    #[pyo3(signature = (timeout_s=0.0))]
    fn progress(&mut self, python: Python, timeout_s: f64) -> PyResult<bool> {
        let time = Duration::from_secs_f64(if timeout_s > 0.0 {
            timeout_s.min(86400.0)
        } else {
            0.0
        });
        let done = self.working(|link| python.detach(|| link.progress(time)))?;
        if !done {
            python.check_signals()?;
        }
        Ok(done)
    }

    /// What Redis says of a commit whose replies are all there, and the next commit may begin: a byte for each row in the order
    /// sent, `+` written, `0` the key is not there, `-` an error, or None where all are written; the errors' rows and texts; the
    /// counter, None where nothing counted or that was refused; the numbers that answer `wait`.
    fn verdicts<'py>(&mut self, python: Python<'py>) -> PyResult<Verdicts<'py>> {
        let link = self.open()?;
        if link.wants_write() || link.replies.left() > 0 {
            return Err(PyValueError::new_err("not all replies are there"));
        }
        let verdicts = link.verdicts();
        let errors = verdicts.errors.into_iter();
        Ok((
            verdicts.kinds.map(|kinds| PyBytes::new(python, &kinds)),
            errors
                .map(|(row, text)| (row, PyBytes::new(python, &text)))
                .collect(),
            verdicts.counter,
            verdicts.waited,
        ))
    }

    /// -1 after an error or `close`.
    #[getter]
    fn descriptor(&self) -> RawFd {
        self.link.as_ref().map_or(-1, Link::descriptor)
    }

    /// Whether something is left to send.
    #[getter]
    fn wants_write(&self) -> bool {
        self.link.as_ref().is_some_and(Link::wants_write)
    }

    /// Whether commands were sent, or parts of them, whose replies have not come: also after an error.
    #[getter]
    fn in_doubt(&self) -> bool {
        self.link.as_ref().map_or(self.in_doubt, Link::in_doubt)
    }

    /// Lets go of the descriptor. The connection itself stays, if Python has another descriptor of it.
    fn close(&mut self) {
        self.end("the link is closed");
    }
}

impl CommitLink {
    fn over(stream: Stream) -> Self {
        CommitLink {
            link: Some(Link::new(stream)),
            failed: String::new(),
            in_doubt: false,
        }
    }

    fn open(&mut self) -> PyResult<&mut Link<Sets>> {
        let failed = &self.failed;
        self.link
            .as_mut()
            .ok_or_else(|| PyConnectionError::new_err(failed.clone()))
    }

    fn end(&mut self, why: &str) {
        if let Some(link) = self.link.take() {
            self.in_doubt = link.in_doubt();
            self.failed = why.to_owned();
        }
    }

    fn working<T>(&mut self, work: impl FnOnce(&mut Link<Sets>) -> io::Result<T>) -> PyResult<T> {
        let link = self.open()?;
        let outcome = work(link);
        link.release();
        if let Err(error) = &outcome {
            self.end(&error.to_string());
        }
        Ok(outcome?)
    }
}

/// Factors of the longest record so far: any other's are its first ones.
static FACTORS: Mutex<Option<Arc<Vec<u64>>>> = Mutex::new(None);

fn factors(count: usize) -> Arc<Vec<u64>> {
    let mut kept = FACTORS.lock();
    match &*kept {
        Some(factors) if factors.len() >= count => factors.clone(),
        _ => kept
            .insert(Arc::new(records::factors(count.next_power_of_two())))
            .clone(),
    }
}

/// Packs records into `out`, uint8 [n, record bytes], as RecordLayout.pack of record.py does: state tensors in their order, then
/// the outputs that are kept, oldest first. Columns that are views may have rows that lie apart.
#[pyfunction]
#[expect(clippy::too_many_arguments)]
pub fn pack_records(
    python: Python,
    out: &Bound<PyAny>,
    fingerprint: u64,
    runtime: u8,
    seq: &Bound<PyAny>,
    acked: &Bound<PyAny>,
    epoch: &Bound<PyAny>,
    counts: &Bound<PyAny>,
    states: Vec<Bound<PyAny>>,
    outputs: &Bound<PyAny>,
    now_ms: u64,
) -> PyResult<()> {
    let out = Column::<u8>::new(out, "out")?;
    let (rows, width) = (out.rows, out.width);
    let seq = Column::<u64>::of(seq, "seq", rows, Some(1))?;
    let acked = Column::<u64>::of(acked, "acked", rows, Some(1))?;
    let epoch = Column::<u64>::of(epoch, "epoch", rows, Some(1))?;
    let counts = Column::<u32>::of(counts, "counts", rows, Some(1))?;
    let states = states
        .iter()
        .map(|state| Column::<u8>::of(state, "a state", rows, None))
        .collect::<PyResult<Vec<_>>>()?;
    let outputs = Column::<u8>::of(outputs, "outputs", rows, None)?;
    let state_nbytes: usize = states.iter().map(|state| state.width).sum();
    let needed = HEADER + state_nbytes + outputs.width;
    if out.buffer.readonly() || !out.buffer.is_c_contiguous() || width != needed.next_multiple_of(8)
    {
        return Err(PyValueError::new_err(format!(
            "out is no writable array of records of {needed} bytes"
        )));
    }
    let shared = Shared {
        fingerprint,
        runtime,
        state_nbytes: u32::try_from(state_nbytes)
            .map_err(|_| PyValueError::new_err("a state of more than 4 GiB"))?,
        commit_ms: now_ms,
    };
    python.detach(|| {
        let (out, seq, acked, epoch) = (&out, &seq, &acked, &epoch);
        let (counts, states, outputs) = (&counts, &states, &outputs);
        let factors = factors(width / 8);
        for row in 0..rows {
            let place = Place {
                seq: seq.row(row)[0],
                acked: acked.row(row)[0],
                epoch: epoch.row(row)[0],
                count: counts.row(row)[0],
            };
            let parts = states
                .iter()
                .map(|state| state.row(row))
                .chain([outputs.row(row)]);
            // Inside the buffer, which is writable and contiguous; its owner leaves it alone meanwhile.
            let record = unsafe {
                let start = out.buffer.buf_ptr().cast::<u8>().add(row * width);
                std::slice::from_raw_parts_mut(start, width)
            };
            records::pack(record, &shared, &place, parts, &factors);
        }
    });
    Ok(())
}
