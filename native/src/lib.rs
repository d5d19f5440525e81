//! What Engram does for each message: HTTP/2 connections in, columns of rows out. What it does for each batch is Python, but for
//! loops over the batch's rows.

mod batches;
mod columns;
pub mod commits;
mod usual;
pub mod wire;

use pyo3::prelude::*;

#[pymodule]
fn engram_native(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add("__version__", env!("CARGO_PKG_VERSION"))?;
    module.add_class::<wire::Wire>()?;
    module.add_class::<wire::Event>()?;
    module.add_class::<wire::StepModel>()?;
    module.add_class::<commits::CommitLink>()?;
    module.add_class::<commits::TlsStream>()?;
    module.add_class::<commits::RecordSource>()?;
    module.add_class::<usual::Usual>()?;
    module.add_function(wrap_pyfunction!(commits::pack_records, module)?)?;
    module.add_function(wrap_pyfunction!(batches::seize, module)?)?;
    module.add_function(wrap_pyfunction!(batches::keep, module)?)?;
    module.add_function(wrap_pyfunction!(batches::leave, module)?)?;
    Ok(())
}
