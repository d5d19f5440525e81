//! Columns of rows in Python's memory.

use pyo3::buffer::{Element, PyBuffer};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

/// A column of rows in Python's memory, which its owner leaves as it is while it is used here.
pub struct Column<T: Element> {
    buffer: PyBuffer<T>,
    pub rows: usize,
    pub width: usize, // values of a row, whatever its shape
    stride: isize,    // bytes from a row to the next
}

// The buffer belongs to Python's object until it is dropped, and is only read.
unsafe impl<T: Element> Send for Column<T> {}
unsafe impl<T: Element> Sync for Column<T> {}

impl<T: Element> Column<T> {
    /// Rows may lie apart, values of a row may not.
    pub fn new(array: &Bound<PyAny>, name: &str) -> PyResult<Self> {
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

    pub fn of(
        array: &Bound<PyAny>,
        name: &str,
        rows: usize,
        width: Option<usize>,
    ) -> PyResult<Self> {
        let column = Self::new(array, name)?;
        if column.rows != rows || width.is_some_and(|width| width != column.width) {
            let (had, wide) = (column.rows, column.width);
            return Err(PyValueError::new_err(format!(
                "{name} has {had} rows of {wide}"
            )));
        }
        Ok(column)
    }

    pub fn row(&self, row: usize) -> &[T] {
        if row >= self.rows || self.width == 0 {
            return &[]; // whose pointer may be null
        }
        // `new` has seen to it that the row's values lie side by side.
        unsafe { std::slice::from_raw_parts(self.place(row), self.width) }
    }

    /// Where a row that is there begins.
    fn place(&self, row: usize) -> *mut T {
        // Inside the buffer, for its shape and strides say so.
        unsafe {
            self.buffer
                .buf_ptr()
                .cast::<u8>()
                .offset(row as isize * self.stride)
                .cast()
        }
    }

    /// One number a row.
    pub fn numbers(array: &Bound<PyAny>, name: &str, rows: Option<usize>) -> PyResult<Self> {
        let column = Self::new(array, name)?;
        if column.width != 1 || rows.is_some_and(|rows| rows != column.rows) {
            return Err(PyValueError::new_err(format!(
                "{name} has {} rows of {}",
                column.rows, column.width
            )));
        }
        Ok(column)
    }

    /// Where `set` is to be used.
    pub fn writable(self) -> PyResult<Self> {
        if self.buffer.readonly() {
            return Err(PyValueError::new_err("a column cannot be written to"));
        }
        Ok(self)
    }

    pub fn is_written_in_place(&self) -> bool {
        !self.buffer.readonly() && self.buffer.is_c_contiguous()
    }

    pub fn start(&self) -> *mut std::ffi::c_void {
        self.buffer.buf_ptr()
    }

    pub fn get(&self, row: usize) -> Option<T> {
        self.row(row).first().copied()
    }

    /// The number of a row that is there.
    pub fn at(&self, row: usize) -> T {
        self.row(row)[0]
    }

    /// Of a column that is writable, by the one thread that uses it: these values of a row, from its value `at` on. False: the row,
    /// or so much of it, is not there.
    pub fn put(&self, row: usize, at: usize, values: &[T]) -> bool {
        let fits = row < self.rows && at + values.len() <= self.width && !self.buffer.readonly();
        if fits {
            // Values are of another column: where both are the same memory, `copy` is still defined.
            unsafe { std::ptr::copy(values.as_ptr(), self.place(row).add(at), values.len()) }
        }
        fits
    }

    /// Of a column that is writable, by the one thread that uses it; a row that is not there is left alone.
    pub fn set(&self, row: usize, value: T) {
        if row < self.rows && self.width > 0 && !self.buffer.readonly() {
            unsafe { self.place(row).write(value) }
        }
    }
}

/// The bytes of a column whose rows lie side by side; its owner leaves them as they are while they are used here.
pub fn bytes_of<T: Element>(buffer: &PyBuffer<T>) -> PyResult<&[u8]> {
    if !buffer.is_c_contiguous() {
        return Err(PyValueError::new_err("a column is not contiguous"));
    }
    if buffer.len_bytes() == 0 {
        return Ok(&[]); // whose pointer may be null
    }
    // Held by the buffer, contiguous, and of so many bytes.
    Ok(unsafe { std::slice::from_raw_parts(buffer.buf_ptr().cast(), buffer.len_bytes()) })
}
