//! The messages that a loop of steps needs; proto/engram/v1/stream.proto and session.proto say what the fields are.

fn put_varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 128 {
        out.push(value as u8 | 128);
        value >>= 7;
    }
    out.push(value as u8);
}

fn put_bytes(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    out.push(field << 3 | 2);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}

fn put_number(out: &mut Vec<u8>, field: u8, value: u64) {
    out.push(field << 3);
    put_varint(out, value);
}

pub fn open(model: &str, names: &[String], client_id: u64, interval: bool) -> Vec<u8> {
    let mut frame = vec![];
    put_number(&mut frame, 1, 1);
    put_bytes(&mut frame, 2, model.as_bytes());
    for name in names {
        put_bytes(&mut frame, 4, name.as_bytes());
    }
    put_number(&mut frame, 5, if interval { 2 } else { 1 });
    put_number(&mut frame, 6, client_id);
    let mut message = vec![];
    put_bytes(&mut message, 1, &frame);
    message
}

/// A unary step.
pub fn step_request(name: &str, model: &str, seq: u64, input: &[u8]) -> Vec<u8> {
    let mut message = vec![];
    put_bytes(&mut message, 1, name.as_bytes());
    put_bytes(&mut message, 2, model.as_bytes());
    put_bytes(&mut message, 5, input);
    put_number(&mut message, 6, seq);
    put_number(&mut message, 9, 1);
    message
}

/// The output of a unary step.
pub fn step_output(message: &[u8]) -> Vec<u8> {
    column(message, 3).to_vec()
}

/// Columns of a frame of steps.
#[derive(Default)]
pub struct Steps {
    pub handles: Vec<u8>,
    pub seqs: Vec<u8>,
    pub inputs: Vec<u8>,
    pub acknowledged: Vec<u8>,
}

impl Steps {
    pub fn push(&mut self, handle: u32, seq: u64, input: &[u8]) {
        self.handles.extend_from_slice(&handle.to_le_bytes());
        self.seqs.extend_from_slice(&seq.to_le_bytes());
        self.inputs.extend_from_slice(input);
        self.acknowledged
            .extend_from_slice(&(seq - 1).to_le_bytes());
    }

    pub fn message(&self) -> Vec<u8> {
        let mut frame = vec![];
        for (field, column) in [
            (1, &self.handles),
            (2, &self.seqs),
            (3, &self.inputs),
            (6, &self.acknowledged),
        ] {
            put_bytes(&mut frame, field, column);
        }
        let mut message = vec![];
        put_bytes(&mut message, 3, &frame);
        message
    }
}

/// What a server says on a stream.
pub enum Said {
    Opened(Vec<u32>),
    Outputs {
        handles: Vec<u32>,
        seqs: Vec<u64>,
        outputs: Vec<u8>,
    },
    Refused(String),
    Else,
}

pub fn said(message: &[u8]) -> Said {
    let mut rest = message;
    let Some((field, frame)) = next(&mut rest) else {
        return Said::Else;
    };
    let numbers = |bytes: &[u8]| {
        bytes
            .as_chunks()
            .0
            .iter()
            .map(|four| u32::from_le_bytes(*four))
            .collect()
    };
    match field {
        1 => match column(frame, 10) {
            [] => Said::Opened(numbers(column(frame, 2))),
            error => Said::Refused(format!(
                "the server refused to open a session: {}",
                detail(column(error, 2))
            )),
        },
        2 => Said::Outputs {
            handles: numbers(column(frame, 1)),
            seqs: column(frame, 2)
                .as_chunks()
                .0
                .iter()
                .map(|eight| u64::from_le_bytes(*eight))
                .collect(),
            outputs: column(frame, 3).to_vec(),
        },
        3 => Said::Refused(format!(
            "the server refused a step: {}",
            detail(column(frame, 4))
        )),
        _ => Said::Else,
    }
}

/// Reason and message of an ErrorDetail.
fn detail(error: &[u8]) -> String {
    let text = |field| String::from_utf8_lossy(column(error, field)).into_owned();
    format!("{} {}", text(2), text(3))
}

/// The last field of that number.
fn column(frame: &[u8], wanted: u64) -> &[u8] {
    let (mut rest, mut found) = (frame, &[][..]);
    while let Some((field, bytes)) = next(&mut rest) {
        if field == wanted {
            found = bytes;
        }
    }
    found
}

/// The next field: its number, and its bytes, if it has some.
fn next<'a>(data: &mut &'a [u8]) -> Option<(u64, &'a [u8])> {
    let key = varint(data)?;
    let length = match key & 7 {
        0 => {
            varint(data)?;
            0
        }
        1 => 8,
        5 => 4,
        _ => varint(data)? as usize,
    };
    let (bytes, rest) = data.split_at_checked(length)?;
    *data = rest;
    Some((key >> 3, bytes))
}

fn varint(data: &mut &[u8]) -> Option<u64> {
    let mut value = 0;
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
