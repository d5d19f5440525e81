//! Rows of steps that are like most: all of them are let in at once, or none, and then Python looks at each.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::columns::Column;

const NUMBER: u32 = (1 << 20) - 1; // of a stream's id, as sessions/streams.py says
const PLACE: u32 = (1 << 20) - 1; // of a handle, as sessions/handles.py says
const FIRST_OF_FRAME: u8 = 0x80; // in the flags, as wire/base.py says
const NOT_ACKNOWLEDGED: u64 = u64::MAX;

/// What rows are checked against: columns of the streams (ids and rows in flight by number, starts and counts of their places), of
/// all places (rows of the session table, handles) and of the session table. Python's, which has one thread that changes them.
#[pyclass(frozen)]
pub struct Usual {
    ids: Column<u32>,
    in_flight: Column<i64>,
    starts: Column<i64>,
    counts: Column<u32>,
    rows: Column<i32>,
    handles: Column<u32>,
    model: Column<i16>,
    slot: Column<i32>,
    opening: Column<u8>,
    admitted: Column<u64>,
    applied: Column<u64>,
    acked: Column<u64>,
}

/// Rows that have come.
struct Came {
    calls: Column<u32>,
    handles: Column<u32>,
    seqs: Column<u64>,
    acknowledged: Column<u64>,
    flags: Column<u8>,
    input_nbytes: Column<u32>,
}

/// What they are to be.
struct Wanted {
    model: i16,
    window: u64,
    width: u32,
}

#[pymethods]
impl Usual {
    #[new]
    #[expect(clippy::too_many_arguments)]
    fn new(
        ids: &Bound<PyAny>,
        in_flight: &Bound<PyAny>,
        starts: &Bound<PyAny>,
        counts: &Bound<PyAny>,
        rows: &Bound<PyAny>,
        handles: &Bound<PyAny>,
        model: &Bound<PyAny>,
        slot: &Bound<PyAny>,
        opening: &Bound<PyAny>,
        admitted: &Bound<PyAny>,
        applied: &Bound<PyAny>,
        acked: &Bound<PyAny>,
    ) -> PyResult<Self> {
        let ids = Column::numbers(ids, "ids", None)?;
        let streams = Some(ids.rows);
        let rows = Column::numbers(rows, "rows", None)?;
        let handles = Column::numbers(handles, "handles", Some(rows.rows))?;
        let model = Column::numbers(model, "model", None)?;
        let sessions = Some(model.rows);
        let starts = Column::numbers(starts, "starts", None)?;
        Ok(Usual {
            in_flight: Column::numbers(in_flight, "in_flight", streams)?.writable()?,
            counts: Column::numbers(counts, "counts", Some(starts.rows))?,
            slot: Column::numbers(slot, "slot", sessions)?,
            opening: Column::numbers(opening, "opening", sessions)?,
            admitted: Column::numbers(admitted, "admitted", sessions)?.writable()?,
            applied: Column::numbers(applied, "applied", sessions)?,
            acked: Column::numbers(acked, "acked", sessions)?.writable()?,
            ids,
            starts,
            rows,
            handles,
            model,
        })
    }

    /// Lets these rows in, if all are of the model and the next steps of their sessions, which have slots and room for outputs, with
    /// inputs of this width, finite where they are floats of so many bytes (0: they are not looked at), and no flags; `found` gets
    /// their sessions' rows. What they acknowledge is noted in any case. False: nothing else was done.
    #[expect(clippy::too_many_arguments)]
    fn admit(
        &self,
        calls: &Bound<PyAny>,
        handles: &Bound<PyAny>,
        seqs: &Bound<PyAny>,
        acknowledged: &Bound<PyAny>,
        flags: &Bound<PyAny>,
        input_nbytes: &Bound<PyAny>,
        inputs: &Bound<PyAny>,
        found: &Bound<PyAny>,
        model: i16,
        window: u64,
        width: u32,
        floats: usize,
    ) -> PyResult<bool> {
        let calls = Column::numbers(calls, "calls", None)?;
        let count = Some(calls.rows);
        let came = Came {
            handles: Column::numbers(handles, "handles", count)?,
            seqs: Column::numbers(seqs, "seqs", count)?,
            acknowledged: Column::numbers(acknowledged, "acknowledged", count)?,
            flags: Column::numbers(flags, "flags", count)?,
            input_nbytes: Column::numbers(input_nbytes, "input_nbytes", count)?,
            calls,
        };
        let found = Column::<i32>::numbers(found, "found", count)?.writable()?;
        if !finite(&Column::<u8>::new(inputs, "inputs")?, floats)? {
            return Ok(false);
        }
        let wanted = Wanted {
            model,
            window,
            width,
        };
        for place in 0..came.calls.rows {
            if let Some((number, row)) = self.next(&came, place, &wanted) {
                self.admitted.set(row, came.seqs.at(place));
                self.in_flight.set(number, self.in_flight.at(number) + 1);
                found.set(place, row as i32);
            } else {
                for place in 0..place {
                    let row = found.at(place) as usize;
                    let number = (came.calls.at(place) & NUMBER) as usize;
                    self.admitted.set(row, self.admitted.at(row) - 1);
                    self.in_flight.set(number, self.in_flight.at(number) - 1);
                }
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// Whether all of these bytes, as floats of so many bytes each, are finite: no exponent has all of its bits set.
fn finite(bytes: &Column<u8>, nbytes: usize) -> PyResult<bool> {
    let rows = 0..bytes.rows;
    match nbytes {
        0 => Ok(true),
        2 => Ok(rows.into_iter().all(|row| {
            let halves = bytes.row(row).chunks_exact(2);
            all(halves.map(|half| u16::from_le_bytes([half[0], half[1]]) & 0x7C00 != 0x7C00))
        })),
        4 => Ok(rows.into_iter().all(|row| {
            let words = bytes.row(row).chunks_exact(4);
            all(words.map(|word| {
                let bits = u32::from_le_bytes(word.try_into().expect("four bytes"));
                bits & 0x7F80_0000 != 0x7F80_0000
            }))
        })),
        8 => Ok(rows.into_iter().all(|row| {
            let words = bytes.row(row).chunks_exact(8);
            all(words
                .map(|word| f64::from_le_bytes(word.try_into().expect("eight bytes")).is_finite()))
        })),
        _ => Err(PyValueError::new_err(format!(
            "there are no floats of {nbytes} bytes"
        ))),
    }
}

/// Without an end before the last one, so that many are looked at at once.
fn all(good: impl Iterator<Item = bool>) -> bool {
    good.fold(true, |all, one| all & one)
}

impl Usual {
    /// The number of its stream and the session of a row, if it is the session's next step and may go on.
    fn next(&self, came: &Came, place: usize, wanted: &Wanted) -> Option<(usize, usize)> {
        let call = came.calls.at(place);
        let number = (call & NUMBER) as usize;
        if self.ids.get(number)? != call {
            return None;
        }
        let handle = came.handles.at(place);
        if handle & PLACE >= self.counts.get(number)? {
            return None;
        }
        let at = usize::try_from(self.starts.at(number)).ok()? + (handle & PLACE) as usize;
        if self.handles.get(at)? != handle {
            return None;
        }
        let row = usize::try_from(self.rows.at(at)).ok()?;
        let fits = self.model.get(row)? == wanted.model
            && self.slot.at(row) >= 0
            && self.opening.at(row) == 0
            && came.flags.at(place) & !FIRST_OF_FRAME == 0
            && came.input_nbytes.at(place) == wanted.width;
        if !fits {
            return None;
        }
        let mut acked = self.acked.at(row);
        let told = came.acknowledged.at(place);
        if told != NOT_ACKNOWLEDGED && told.min(self.applied.at(row)) > acked {
            acked = told.min(self.applied.at(row));
            self.acked.set(row, acked);
        }
        let seq = came.seqs.at(place);
        let next = self.admitted.at(row).checked_add(1)? == seq;
        (next && seq <= acked.saturating_add(wanted.window)).then_some((number, row))
    }
}
