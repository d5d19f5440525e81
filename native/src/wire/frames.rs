//! The frames of the stream that are about steps, read in place and written in one allocation. All other frames are Python's.
//!
//! proto/engram/v1/stream.proto says what the fields are.

use bytes::{BufMut, Bytes, BytesMut};

const STEPS: u64 = 3; // field of StreamRequest
const OUTPUTS: u8 = 2; // field of StreamResponse
const FLAGS_KNOWN: u8 = 3; // prefill, feedback

/// The columns of a StepsFrame that is like most: at least one row, columns of one length, no repeats, no dtype.
#[derive(Debug, Default, PartialEq)]
pub struct Steps<'a> {
    pub handles: &'a [u8], // u32
    pub seqs: &'a [u8],    // u64
    pub inputs: &'a [u8],
    pub flags: &'a [u8],        // u8, or empty
    pub acknowledged: &'a [u8], // u64, or empty
    pub timeout_ms: u32,
}

impl Steps<'_> {
    pub fn rows(&self) -> usize {
        self.handles.len() / 4
    }

    fn usual(&self) -> bool {
        let rows = self.rows();
        rows > 0
            && self.handles.len().is_multiple_of(4)
            && self.seqs.len() == 8 * rows
            && !self.inputs.is_empty()
            && self.inputs.len().is_multiple_of(rows)
            && (self.flags.is_empty() || self.flags.len() == rows)
            && self.flags.iter().all(|&flags| flags <= FLAGS_KNOWN)
            && (self.acknowledged.is_empty() || self.acknowledged.len() == 8 * rows)
    }
}

/// The steps that a StreamRequest holds. None where it holds anything else, or where anything about them is unusual or wrong:
/// Python, which has the schema, then says what.
pub fn steps(mut message: &[u8]) -> Option<Steps<'_>> {
    let (STEPS, Value::Bytes(mut frame)) = field(&mut message)? else {
        return None;
    };
    if !message.is_empty() {
        return None; // fields that stand twice are merged
    }
    let mut found = Steps::default();
    while !frame.is_empty() {
        match field(&mut frame)? {
            (1, Value::Bytes(column)) => found.handles = column,
            (2, Value::Bytes(column)) => found.seqs = column,
            (3, Value::Bytes(column)) => found.inputs = column,
            (4, Value::Bytes(column)) => found.flags = column,
            (6, Value::Bytes(column)) => found.acknowledged = column,
            (7, Value::Number(timeout)) => found.timeout_ms = timeout as u32,
            _ => return None,
        }
    }
    found.usual().then_some(found)
}

pub enum Value<'a> {
    Number(u64),
    Bytes(&'a [u8]),
}

fn varint(data: &mut &[u8]) -> Option<u64> {
    let mut value = 0u64;
    for shift in (0..64).step_by(7) {
        let (&byte, rest) = data.split_first()?;
        *data = rest;
        value |= u64::from(byte & 127) << shift;
        if byte < 128 {
            return Some(value);
        }
    }
    None
}

pub fn field<'a>(data: &mut &'a [u8]) -> Option<(u64, Value<'a>)> {
    let key = varint(data)?;
    let value = match key & 7 {
        0 => Value::Number(varint(data)?),
        2 => {
            let length = usize::try_from(varint(data)?).ok()?;
            let (bytes, rest) = data.split_at_checked(length)?;
            *data = rest;
            Value::Bytes(bytes)
        }
        _ => return None,
    };
    Some((key >> 3, value))
}

/// A gRPC message with the OutputsFrame of some rows of one stream. Columns are little-endian; an empty one is left out.
pub fn outputs(handles: &[u8], seqs: &[u8], outputs: &[u8], durable: &[u8]) -> Bytes {
    let columns = [handles, seqs, outputs, durable];
    let frame: usize = columns
        .iter()
        .filter(|column| !column.is_empty())
        .map(|column| sized(column.len()))
        .sum();
    let message = sized(frame);
    let mut data = BytesMut::with_capacity(PREFIX + message);
    put_prefix(&mut data, message);
    put_head(&mut data, OUTPUTS, frame);
    for (tag, column) in (1..).zip(columns) {
        if !column.is_empty() {
            put_head(&mut data, tag, column.len());
            data.put_slice(column);
        }
    }
    data.freeze()
}

pub const PREFIX: usize = 5; // of a gRPC message: whether it is compressed, and its length

/// A message as gRPC sends it.
pub fn prefixed(message: &[u8]) -> Bytes {
    let mut data = BytesMut::with_capacity(PREFIX + message.len());
    put_prefix(&mut data, message.len());
    data.put_slice(message);
    data.freeze()
}

/// Bytes of a field with a number below 16 and so many bytes.
pub fn sized(length: usize) -> usize {
    let digits = (usize::BITS - (length | 1).leading_zeros()) as usize;
    1 + digits.div_ceil(7) + length
}

/// What is before a message of so many bytes.
pub fn put_prefix(data: &mut BytesMut, length: usize) {
    data.put_u8(0);
    data.put_u32(length as u32);
}

pub fn put_head(data: &mut BytesMut, tag: u8, length: usize) {
    data.put_u8(tag << 3 | 2);
    put_number(data, length as u64);
}

pub fn put_number(data: &mut BytesMut, mut left: u64) {
    while left >= 128 {
        data.put_u8(left as u8 | 128);
        left >>= 7;
    }
    data.put_u8(left as u8);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(columns: &[(u8, &[u8])], timeout_ms: u8) -> Vec<u8> {
        let mut frame = BytesMut::new();
        for (tag, column) in columns {
            put_head(&mut frame, *tag, column.len());
            frame.put_slice(column);
        }
        if timeout_ms > 0 {
            frame.put_slice(&[7 << 3, timeout_ms]);
        }
        let mut message = BytesMut::new();
        put_head(&mut message, 3, frame.len());
        message.put_slice(&frame);
        message.to_vec()
    }

    #[test]
    fn columns_of_a_usual_frame_are_read_in_place() {
        let message = request(
            &[(1, &[1, 0, 0, 0]), (2, &[9; 8]), (3, &[5; 12]), (4, &[1])],
            40,
        );
        let found = steps(&message).unwrap();
        assert_eq!((found.rows(), found.timeout_ms), (1, 40));
        assert_eq!(
            (found.seqs, found.inputs, found.flags),
            (&[9u8; 8][..], &[5u8; 12][..], &[1u8][..])
        );
    }

    #[test]
    fn what_is_unusual_is_left_to_python() {
        let (handle, seq, input) = ((1, &[0u8; 4][..]), (2, &[0u8; 8][..]), (3, &[0u8; 4][..]));
        let usual = request(&[handle, seq, input], 0);
        assert!(steps(&usual).is_some());
        for columns in [
            &[][..],
            &[handle, seq],                            // no inputs
            &[handle, input],                          // no seqs
            &[(1, &[0u8; 3][..]), seq, input],         // half a handle
            &[(1, &[0u8; 8][..]), seq, input],         // a handle too many
            &[handle, seq, input, (4, &[0u8; 2][..])], // a flag too many
            &[handle, seq, input, (5, &[0u8; 4][..])], // repeats
            &[handle, seq, input, (6, &[0u8; 7][..])],
            &[handle, seq, input, (8, &b"float32"[..])],
        ] {
            assert_eq!(steps(&request(columns, 0)), None, "{columns:?}");
        }
        assert_eq!(
            steps(&[usual.clone(), usual.clone()].concat()),
            None,
            "two frames are merged"
        );
        for length in 0..usual.len() {
            assert_eq!(steps(&usual[..length]), None, "cut at {length}");
        }
        assert_eq!(steps(&[0xff; 40]), None);
    }

    #[test]
    fn sizes_of_fields_are_exact() {
        for length in [0, 1, 127, 128, 129, 16_383, 16_384, 2_097_151, 2_097_152] {
            let mut data = BytesMut::new();
            put_head(&mut data, 1, length);
            assert_eq!(data.len() + length, sized(length), "{length}");
        }
    }

    #[test]
    fn a_message_of_outputs_has_its_prefix_and_its_columns() {
        let data = outputs(&[1; 4], &[2; 8], &[3; 300], &[]);
        assert_eq!(data[0], 0);
        assert_eq!(
            u32::from_be_bytes(data[1..5].try_into().unwrap()) as usize,
            data.len() - 5
        );
        let mut message = &data[5..];
        let (2, Value::Bytes(mut frame)) = field(&mut message).unwrap() else {
            panic!()
        };
        for (tag, wanted) in [(1, &[1u8; 4][..]), (2, &[2; 8]), (3, &[3; 300])] {
            let (found, Value::Bytes(column)) = field(&mut frame).unwrap() else {
                panic!()
            };
            assert_eq!((found, column), (tag, wanted));
        }
        assert!(frame.is_empty() && message.is_empty());
    }
}
