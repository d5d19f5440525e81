//! Commits as Python sees them: one call packs and sends the rows of a commit, another takes what Redis says of them.

mod commands;
mod link;
mod records;
mod replies;
mod source;
mod stream;
mod tls;
mod trust;

use parking_lot::Mutex;
use pyo3::exceptions::{PyConnectionError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::time::Duration;

use crate::columns::Column;
use commands::{Sets, Tail, counting, head};
use link::{Link, Rows};
use records::{HEADER, Place, Shared};
use replies::Verdicts as Replied;
pub use source::RecordSource;
use source::Records;
use stream::{Socket, Stream};
pub use tls::TlsStream;

/// What a link sends: commands of rows that were packed before, or of records that are put together as they are sent.
enum Block {
    Sets(Sets),
    Records(Records),
}

impl Rows for Block {
    fn len(&self) -> usize {
        match self {
            Block::Sets(sets) => sets.len(),
            Block::Records(records) => records.len(),
        }
    }

    fn put(&mut self, row: usize, out: &mut Vec<u8>) {
        match self {
            Block::Sets(sets) => sets.put(row, out),
            Block::Records(records) => records.put(row, out),
        }
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
    link: Option<Link<Block>>,
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
        let head = head(prefix, tags.width, tokens.width);
        let middle = format!("\r\n${}\r\n", records.width).into_bytes();
        let sets = Sets {
            tags,
            tokens,
            records,
            ttls,
            head,
            middle,
            tail: Tail::default(),
        };
        let link = self.fresh()?;
        link.add(Block::Sets(sets), &counting(counting_key), wait);
        if more {
            return Ok(());
        }
        self.working(|link| python.detach(|| link.write()))
    }

    /// The records of these rows of the session table, at these seqs, sent as `send` does, and waited for so long: their bytes, the
    /// counter and the numbers that answer `wait`, where all of it is written; else None, and `progress` goes on with it. `states` of the rows,
    /// where the source has none. What the source's columns have is read before this returns.
    #[pyo3(signature = (source, rows, seqs, states, now_ms, counting_key=&b""[..], wait=&b""[..], timeout_s=0.0))]
    #[expect(clippy::too_many_arguments)]
    fn commit(
        &mut self,
        python: Python,
        source: &Bound<RecordSource>,
        rows: &Bound<PyAny>,
        seqs: &Bound<PyAny>,
        states: Vec<Bound<PyAny>>,
        now_ms: u64,
        counting_key: &[u8],
        wait: &[u8],
        timeout_s: f64,
    ) -> PyResult<Option<Written>> {
        let records = Records::new(&source.get().0, rows, seqs, &states, now_ms)?;
        let (time, nbytes) = (duration(timeout_s), records.nbytes);
        let link = self.fresh()?;
        link.add(Block::Records(records), &counting(counting_key), wait);
        let done = self.working(|link| {
            python.detach(|| {
                let done = link.progress(time)?;
                link.pack_rest();
                Ok(done)
            })
        })?;
        let link = self.open()?;
        if !done || !link.replies.all_written() {
            return Ok(None);
        }
        let Replied {
            counter, waited, ..
        } = link.verdicts();
        Ok(Some((nbytes, counter, waited)))
    }

    /// Sends what is left and takes replies, for at most so long; whether all replies are there.
    #[pyo3(signature = (timeout_s=0.0))]
    fn progress(&mut self, python: Python, timeout_s: f64) -> PyResult<bool> {
        let time = duration(timeout_s);
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

    fn open(&mut self) -> PyResult<&mut Link<Block>> {
        let failed = &self.failed;
        self.link
            .as_mut()
            .ok_or_else(|| PyConnectionError::new_err(failed.clone()))
    }

    /// The link, at the beginning of a commit.
    fn fresh(&mut self) -> PyResult<&mut Link<Block>> {
        let link = self.open()?;
        if link.replies.sealed() {
            return Err(PyValueError::new_err(
                "the commit before is not over: ask for its verdicts",
            ));
        }
        Ok(link)
    }

    fn end(&mut self, why: &str) {
        if let Some(link) = self.link.take() {
            self.in_doubt = link.in_doubt();
            self.failed = why.to_owned();
        }
    }

    fn working<T>(&mut self, work: impl FnOnce(&mut Link<Block>) -> io::Result<T>) -> PyResult<T> {
        let link = self.open()?;
        let outcome = work(link);
        link.release();
        if let Err(error) = &outcome {
            self.end(&error.to_string());
        }
        Ok(outcome?)
    }
}

/// Bytes of records, the counter, where it counted, and the numbers that answer the wait.
type Written = (usize, Option<i64>, Vec<i64>);

fn duration(seconds: f64) -> Duration {
    Duration::from_secs_f64(if seconds > 0.0 {
        seconds.min(86400.0)
    } else {
        0.0
    })
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
    if !out.is_written_in_place() || width != needed.next_multiple_of(8) {
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
                let start = out.start().cast::<u8>().add(row * width);
                std::slice::from_raw_parts_mut(start, width)
            };
            records::pack(record, &shared, &place, parts, &factors);
        }
    });
    Ok(())
}
