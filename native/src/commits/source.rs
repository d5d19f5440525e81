//! Records that are put together as they are sent, from the columns of the session table and of a model's arena.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use std::sync::Arc;

use super::commands::{Tail, head};
use super::factors;
use super::link::Rows;
use super::records::{self, HEADER, Place, Shared};
use crate::columns::Column;

/// Where the records of a model's sessions are made of. The columns are Python's: they stay where they are, and their values do
/// while a commit is put together.
pub struct Source {
    tags: Column<u8>,
    tokens: Column<u8>,
    ttls: Column<u64>,
    acked: Column<u64>,
    epochs: Column<u64>,
    slots: Column<i32>,
    states: Vec<Column<u8>>, // by slot; none: they come with each commit
    outputs: Column<u8>, // by slot: the last outputs, each at the place that its seq has modulo their number
    window: usize,
    output_nbytes: usize,
    state_nbytes: usize,
    fingerprint: u64,
    runtime: u8,
    head: Vec<u8>,
}

/// Columns of the session table (tags, tokens, ttl_ms, acked, epoch, slot) and of an arena: state tensors as bytes, uint8 [slots,
/// nbytes] each, or none where they are elsewhere, and the last outputs, uint8 [slots, window, output_nbytes].
#[pyclass(frozen)]
pub struct RecordSource(pub Arc<Source>);

#[pymethods]
impl RecordSource {
    #[new]
    #[expect(clippy::too_many_arguments)]
    fn new(
        tags: &Bound<PyAny>,
        tokens: &Bound<PyAny>,
        ttl_ms: &Bound<PyAny>,
        acked: &Bound<PyAny>,
        epoch: &Bound<PyAny>,
        slot: &Bound<PyAny>,
        states: Vec<Bound<PyAny>>,
        outputs: &Bound<PyAny>,
        window: usize,
        state_nbytes: usize,
        fingerprint: u64,
        runtime: u8,
        prefix: &[u8],
    ) -> PyResult<Self> {
        let tags = Column::<u8>::new(tags, "tags")?;
        let rows = tags.rows;
        let tokens = Column::<u8>::of(tokens, "tokens", rows, None)?;
        let outputs = Column::<u8>::new(outputs, "outputs")?;
        let states = states
            .iter()
            .map(|state| Column::<u8>::of(state, "a state", outputs.rows, None))
            .collect::<PyResult<Vec<_>>>()?;
        let held: usize = states.iter().map(|state| state.width).sum();
        let fits = window > 0
            && outputs.width.is_multiple_of(window)
            && (states.is_empty() || held == state_nbytes)
            && u32::try_from(state_nbytes).is_ok();
        if !fits {
            return Err(PyValueError::new_err(
                "the arena's columns do not fit together",
            ));
        }
        Ok(RecordSource(Arc::new(Source {
            head: head(prefix, tags.width, tokens.width),
            ttls: Column::of(ttl_ms, "ttl_ms", rows, Some(1))?,
            acked: Column::of(acked, "acked", rows, Some(1))?,
            epochs: Column::of(epoch, "epoch", rows, Some(1))?,
            slots: Column::of(slot, "slot", rows, Some(1))?,
            output_nbytes: outputs.width / window,
            tags,
            tokens,
            states,
            outputs,
            window,
            state_nbytes,
            fingerprint,
            runtime,
        })))
    }
}

/// Some of a source's sessions.
pub struct Records {
    source: Arc<Source>,
    rows: Column<i32>,
    seqs: Column<u64>,
    states: Vec<Column<u8>>, // by place, where the source has none
    shared: Shared,
    factors: Arc<Vec<u64>>,
    tail: Tail,
    pub nbytes: usize, // of all records
}

impl Records {
    /// Raises ValueError: then nothing of it is read later.
    pub fn new(
        source: &Arc<Source>,
        rows: &Bound<PyAny>,
        seqs: &Bound<PyAny>,
        states: &[Bound<PyAny>],
        now_ms: u64,
    ) -> PyResult<Self> {
        let rows = Column::<i32>::new(rows, "rows")?;
        let count = rows.rows;
        let seqs = Column::<u64>::of(seqs, "seqs", count, Some(1))?;
        let states = states
            .iter()
            .map(|state| Column::<u8>::of(state, "a state", count, None))
            .collect::<PyResult<Vec<_>>>()?;
        let width: usize = states.iter().map(|state| state.width).sum();
        if source.states.is_empty() && width != source.state_nbytes {
            return Err(PyValueError::new_err(format!(
                "states of {width} bytes, not {}",
                source.state_nbytes
            )));
        }
        let inside = |value: i32, end: usize| usize::try_from(value).is_ok_and(|at| at < end);
        let known = rows.width == 1
            && (0..count).all(|place| {
                let row = rows.row(place)[0];
                inside(row, source.slots.rows)
                    && inside(source.slots.row(row as usize)[0], source.outputs.rows)
            });
        if !known {
            return Err(PyValueError::new_err("a row has no slot"));
        }
        let shared = Shared {
            fingerprint: source.fingerprint,
            runtime: source.runtime,
            state_nbytes: source.state_nbytes as u32, // which fits
            commit_ms: now_ms,
        };
        let factors = factors(source.width(1) / 8);
        let nbytes = (0..count)
            .map(|place| {
                let acked = source.acked.row(rows.row(place)[0] as usize)[0];
                let kept = source.kept(seqs.row(place)[0], acked);
                source.width(kept.next_power_of_two())
            })
            .sum();
        Ok(Records {
            source: source.clone(),
            rows,
            seqs,
            states,
            shared,
            factors,
            tail: Tail::default(),
            nbytes,
        })
    }
}

impl Source {
    /// Bytes of a record with room for so many outputs.
    fn width(&self, capacity: usize) -> usize {
        (HEADER + self.state_nbytes + capacity * self.output_nbytes).next_multiple_of(8)
    }

    /// How many outputs a record keeps: those that are not acknowledged, and the newest, which a session that runs on its own
    /// output needs.
    fn kept(&self, seq: u64, acked: u64) -> usize {
        let behind = seq.wrapping_sub(acked).clamp(1, self.window as u64);
        behind.min(seq) as usize // no more than the window
    }
}

impl Rows for Records {
    fn len(&self) -> usize {
        self.rows.rows
    }

    fn put(&mut self, place: usize, out: &mut Vec<u8>) {
        let source = &*self.source;
        let row = self.rows.row(place)[0] as usize;
        let slot = source.slots.row(row)[0] as usize;
        let (seq, acked) = (self.seqs.row(place)[0], source.acked.row(row)[0]);
        let count = source.kept(seq, acked);
        // A power of two, so that records of many sessions have few lengths.
        let width = source.width(count.next_power_of_two());
        if self.factors.len() < width / 8 {
            self.factors = factors(width / 8);
        }
        out.extend_from_slice(&source.head);
        out.extend_from_slice(source.tags.row(row));
        out.extend_from_slice(b"}:");
        out.extend_from_slice(source.tokens.row(row));
        let mut length = [b'0'; 24];
        out.extend_from_slice(b"\r\n$");
        out.extend_from_slice(digits(width, &mut length));
        out.extend_from_slice(b"\r\n");
        let start = out.len();
        out.resize(start + width, 0);
        let header = Place {
            seq,
            acked,
            epoch: source.epochs.row(row)[0],
            count: count as u32, // no more than the window
        };
        let ring = source.outputs.row(slot);
        let size = source.output_nbytes;
        let outputs = (0..count as u64).map(|k| {
            let at = ((seq - count as u64 + 1 + k) % source.window as u64) as usize * size;
            &ring[at..at + size]
        });
        let own = self.states.iter().map(|state| state.row(place));
        let states = source.states.iter().map(|state| state.row(slot));
        let elsewhere = source.states.is_empty();
        let parts = states
            .chain(own.take(if elsewhere { usize::MAX } else { 0 }))
            .chain(outputs);
        records::pack(
            &mut out[start..],
            &self.shared,
            &header,
            parts,
            &self.factors,
        );
        self.tail.of(source.ttls.row(row)[0]);
        out.extend_from_slice(&self.tail.bytes);
    }
}

fn digits(mut number: usize, room: &mut [u8; 24]) -> &[u8] {
    let mut at = room.len();
    loop {
        at -= 1;
        room[at] = b'0' + (number % 10) as u8;
        number /= 10;
        if number == 0 {
            return &room[at..];
        }
    }
}
