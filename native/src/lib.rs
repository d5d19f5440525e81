//! What Engram does for each message: HTTP/2 connections in, columns of rows out. What it does for each batch is Python.

pub mod wire;

use pyo3::prelude::*;

#[pymodule]
fn engram_native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<wire::Wire>()?;
    module.add_class::<wire::Event>()?;
    Ok(())
}
