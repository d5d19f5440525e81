//! What each batch does to columns: in one call, where NumPy would take a dozen. service/engram_service/places.py says the same.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::columns::Column;

const NUMBER: u32 = (1 << 20) - 1; // of a stream's id, as sessions/streams.py says
const CALL: u32 = 1 << 31; // in the id of a row that came in a unary call; its stream is the server's own
const LOCAL: usize = 0;

/// Marks rows in `busy`, if none of them is marked, none stands there twice, and no deadline lies before `now`. False: nothing
/// was done.
#[pyfunction]
pub fn seize(
    busy: &Bound<PyAny>,
    rows: &Bound<PyAny>,
    deadlines: &Bound<PyAny>,
    now: f64,
) -> PyResult<bool> {
    let busy = Column::<u8>::numbers(busy, "busy", None)?.writable()?;
    let rows = Column::<i32>::numbers(rows, "rows", None)?;
    let deadlines = Column::<f64>::numbers(deadlines, "deadlines", Some(rows.rows))?;
    for place in 0..rows.rows {
        let row = rows.at(place) as usize; // a negative one is none
        if deadlines.at(place) >= now && busy.get(row) == Some(0) {
            busy.set(row, 1);
        } else {
            (0..place).for_each(|place| busy.set(rows.at(place) as usize, 0));
            return Ok(false);
        }
    }
    Ok(true)
}

/// Puts outputs, uint8 [n, nbytes], into the rings of slots, uint8 [slots, window, nbytes], each where its seq belongs.
#[pyfunction]
pub fn keep(
    rings: &Bound<PyAny>,
    window: usize,
    slots: &Bound<PyAny>,
    seqs: &Bound<PyAny>,
    outputs: &Bound<PyAny>,
) -> PyResult<()> {
    let rings = Column::<u8>::new(rings, "rings")?.writable()?;
    let slots = Column::<i32>::numbers(slots, "slots", None)?;
    let seqs = Column::<u64>::numbers(seqs, "seqs", Some(slots.rows))?;
    let outputs = Column::<u8>::of(outputs, "outputs", slots.rows, None)?;
    if window == 0 || rings.width != window * outputs.width {
        return Err(PyValueError::new_err("outputs do not fit their rings"));
    }
    for place in 0..slots.rows {
        let at = (seqs.at(place) % window as u64) as usize * outputs.width;
        if !rings.put(slots.at(place) as usize, at, outputs.row(place)) {
            return Err(PyValueError::new_err("there is no such slot"));
        }
    }
    Ok(())
}

/// Takes a row off `in_flight`, by the number of its stream, for each of these ids; not of streams that have ended, whose number
/// is another's by now. How many it were.
#[pyfunction]
pub fn leave(
    ids: &Bound<PyAny>,
    in_flight: &Bound<PyAny>,
    calls: &Bound<PyAny>,
) -> PyResult<usize> {
    let ids = Column::<u32>::numbers(ids, "ids", None)?;
    let in_flight = Column::<i64>::numbers(in_flight, "in_flight", Some(ids.rows))?.writable()?;
    let calls = Column::<u32>::numbers(calls, "calls", None)?;
    let mut left = 0;
    for place in 0..calls.rows {
        let call = calls.at(place);
        let unary = call & CALL != 0;
        let number = if unary {
            LOCAL
        } else {
            (call & NUMBER) as usize
        };
        if let Some(rows) = in_flight.get(number)
            && (unary || ids.at(number) == call)
        {
            in_flight.set(number, rows - 1);
            left += 1;
        }
    }
    Ok(left)
}
