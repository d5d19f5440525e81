//! Requests of unary steps, and what must be known of a model to read them.

use bytes::{BufMut, Bytes, BytesMut};
use pyo3::prelude::*;
use std::sync::Arc;

use super::frames::{Value, field, put_head, put_number};

/// A StepRequest that is like most: one row, and nothing to generate.
#[derive(Debug, Default, PartialEq)]
pub struct Request<'a> {
    pub session: &'a [u8],
    model: &'a [u8],
    version: &'a [u8],
    floats: &'a [u8], // the input as repeated float, or empty
    input: &'a [u8],  // in the model's own dtypes, or empty
    pub seq: u64,     // 0: the next one
    pub prefill: bool,
    pub raw: bool,
}

/// None where anything about it is unusual or wrong: Python then says what.
pub fn request(mut message: &[u8]) -> Option<Request<'_>> {
    let mut found = Request::default();
    while !message.is_empty() {
        match field(&mut message)? {
            (1, Value::Bytes(id)) => found.session = id,
            (2, Value::Bytes(name)) => found.model = name,
            (3, Value::Bytes(version)) => found.version = version,
            (4, Value::Bytes(floats)) if found.floats.is_empty() => found.floats = floats,
            (5, Value::Bytes(input)) => found.input = input,
            (6, Value::Number(seq)) => found.seq = seq,
            (7, Value::Number(prefill)) => found.prefill = prefill != 0,
            (9, Value::Number(raw)) => found.raw = raw != 0,
            _ => return None,
        }
    }
    (found.floats.is_empty() != found.input.is_empty()).then_some(found)
}

/// What the wire must know of a model to read and answer its steps.
pub struct Model {
    pub name: String,
    pub version: String,
    pub input_nbytes: usize,
    pub output_nbytes: usize,
    pub takes_floats: bool, // float32 and nothing else
    pub gives_floats: bool,
    pub shape: Bytes, // of one output row, as the field of a StepResponse
}

impl Model {
    pub fn new(
        (name, version): (String, String),
        (input_nbytes, takes_floats): (usize, bool),
        (output_nbytes, gives_floats): (usize, bool),
        shape: &[u64],
    ) -> Self {
        let mut sizes = BytesMut::new();
        for size in shape {
            put_number(&mut sizes, *size);
        }
        let mut field = BytesMut::new();
        put_head(&mut field, 4, sizes.len());
        field.put_slice(&sizes);
        Model {
            name,
            version,
            input_nbytes,
            output_nbytes,
            takes_floats,
            gives_floats,
            shape: field.freeze(),
        }
    }

    /// The request's input row, where it is one of this model and its output can be told as it is.
    pub fn input<'a>(&self, request: &Request<'a>) -> Option<&'a [u8]> {
        let named = match (request.model, request.version) {
            ([], version) => version.is_empty(), // the session's own, which is known
            (model, version) => {
                let same = version.is_empty() || version == self.version.as_bytes();
                same && model == self.name.as_bytes()
            }
        };
        let (input, usual) = match request.floats {
            [] => (request.input, true),
            floats => (floats, self.takes_floats),
        };
        let answerable = request.prefill || request.raw || self.gives_floats;
        (named && usual && answerable && input.len() == self.input_nbytes).then_some(input)
    }
}

/// A model as Python tells of it.
#[pyclass(frozen)]
pub struct StepModel(pub Arc<Model>);

#[pymethods]
impl StepModel {
    /// Of its input row and of its output row: bytes, and whether they are float32 and nothing else. `shape`: of one output row, as
    /// a StepResponse has it.
    #[new]
    #[pyo3(signature = (name, version, *, takes, gives, shape))]
    fn new(
        name: String,
        version: String,
        takes: (usize, bool),
        gives: (usize, bool),
        shape: Vec<u64>,
    ) -> Self {
        StepModel(Arc::new(Model::new((name, version), takes, gives, &shape)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> Arc<Model> {
        let name = ("m".to_owned(), "2".to_owned());
        Arc::new(Model::new(name, (8, true), (4, true), &[1, 300]))
    }

    fn message(fields: &[(u8, &[u8])], numbers: &[(u8, u64)]) -> Vec<u8> {
        let mut data = BytesMut::new();
        for (tag, bytes) in fields {
            put_head(&mut data, *tag, bytes.len());
            data.put_slice(bytes);
        }
        for (tag, number) in numbers {
            data.put_u8(tag << 3);
            put_number(&mut data, *number);
        }
        data.to_vec()
    }

    #[test]
    fn a_usual_request_is_read_in_place() {
        let data = message(
            &[(1, b"id"), (2, b"m"), (3, b"2"), (5, &[7; 8])],
            &[(6, 300), (9, 1)],
        );
        let found = request(&data).unwrap();
        assert_eq!((found.session, found.seq), (&b"id"[..], 300));
        assert_eq!((found.raw, found.prefill), (true, false));
        assert_eq!(model().input(&found), Some(&[7; 8][..]));
        let floats = message(&[(1, b"id"), (4, &[7; 8])], &[(7, 1)]);
        let found = request(&floats).unwrap();
        assert_eq!(
            (found.prefill, model().input(&found)),
            (true, Some(&[7; 8][..]))
        );
    }

    #[test]
    fn what_is_unusual_is_left_to_python() {
        let (id, input) = ((1, &b"id"[..]), (5, &[7u8; 8][..]));
        for (fields, numbers) in [
            (&[id, input][..], &[(8, 3)][..]),        // generates
            (&[id, input, (10, b"")], &[]),           // constants
            (&[id, input, (11, b"")], &[]),           // a field that is not known
            (&[id, input, (4, &[7; 8])], &[]),        // both inputs
            (&[id, (4, &[7; 4]), (4, &[7; 4])], &[]), // in parts
            (&[id], &[]),
            (&[id, (5, b"")], &[]),
        ] {
            assert_eq!(request(&message(fields, numbers)), None, "{fields:?}");
        }
        assert_eq!(request(&[0xff; 40]), None);
        let whole = message(&[id, input], &[(6, 9)]);
        for length in 0..whole.len() {
            let cut = request(&whole[..length]);
            assert!(
                cut.is_none_or(|cut| cut != request(&whole).unwrap()),
                "cut at {length}"
            );
        }
    }

    #[test]
    fn a_step_of_another_model_or_width_is_no_row() {
        for (fields, usual) in [
            (&[(2, &b"m"[..]), (5, &[7; 8][..])][..], true),
            (&[(5, &[7; 8])], true),
            (&[(2, b"n"), (5, &[7; 8])], false),
            (&[(2, b"m"), (3, b"1"), (5, &[7; 8])], false),
            (&[(3, b"2"), (5, &[7; 8])], false),
            (&[(5, &[7; 16])], false),
            (&[(4, &[7; 4])], false),
        ] {
            let data = message(fields, &[]);
            let found = model().input(&request(&data).unwrap()).is_some();
            assert_eq!(found, usual, "{fields:?}");
        }
        let name = ("m".to_owned(), "2".to_owned());
        let other = Model::new(name, (8, false), (4, false), &[1, 2]); // whose numbers are not float32
        for (tag, raw, usual) in [(5, 1, true), (5, 0, false), (4, 1, false)] {
            let data = message(&[(tag, &[7; 8])], &[(9, raw)]);
            let found = other.input(&request(&data).unwrap()).is_some();
            assert_eq!(found, usual, "{tag} {raw}");
        }
    }
}
