//! Just enough of HTTP/2 and gRPC for one call at a time on a connection, which a server may cut in any way.

use fluke_hpack::Decoder;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1; // of DATA and HEADERS
const ACK: u8 = 1; // of SETTINGS and PING
const END_HEADERS: u8 = 4;
const PADDED: u8 = 8;
const PRIORITY: u8 = 32;
const HEAD: usize = 9; // of a frame
const PREFIX: usize = 5; // of a gRPC message
const RETURNED: usize = 20_000; // bytes that were read before the server's window is opened again
const TABLE: u8 = 62; // the first of HPACK's indexes that is no constant

fn put_frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

pub fn put_preface(out: &mut Vec<u8>) {
    out.extend_from_slice(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    put_frame(out, SETTINGS, 0, 0, &[]);
}

/// The heads of calls of one path: in full on a connection's first call, by their numbers in the table afterwards.
pub struct Heads {
    fields: Vec<(&'static str, String)>,
    scheme: u8,
}

impl Heads {
    pub fn new(path: &str, token: Option<&str>, tls: bool) -> Self {
        let mut fields = vec![
            (":path", path.to_owned()),
            (":authority", "localhost".into()),
            ("content-type", "application/grpc".into()),
            ("te", "trailers".into()),
        ];
        fields.extend(token.map(|token| ("authorization", format!("Bearer {token}"))));
        Heads {
            fields,
            scheme: if tls { 0x87 } else { 0x86 },
        }
    }

    pub fn put(&self, out: &mut Vec<u8>, stream: u32) {
        let mut block = vec![0x83, self.scheme]; // :method POST
        for (place, (name, value)) in self.fields.iter().enumerate() {
            if stream > 1 {
                block.push(128 | (TABLE + (self.fields.len() - 1 - place) as u8));
                continue;
            }
            block.push(64); // a literal that is to be remembered
            for text in [name, value.as_str()] {
                put_length(&mut block, text.len());
                block.extend_from_slice(text.as_bytes());
            }
        }
        put_frame(out, HEADERS, END_HEADERS, stream, &block);
    }
}

/// HPACK's integer with a prefix of seven bits.
fn put_length(block: &mut Vec<u8>, length: usize) {
    if length < 127 {
        block.push(length as u8);
        return;
    }
    block.push(127);
    let mut left = length - 127;
    while left >= 128 {
        block.push(left as u8 | 128);
        left >>= 7;
    }
    block.push(left as u8);
}

/// A message as gRPC sends it, in DATA frames of a size that every server takes. `last`: none follows it.
pub fn put_message(out: &mut Vec<u8>, stream: u32, message: &[u8], last: bool) {
    let mut data = vec![0];
    data.extend_from_slice(&(message.len() as u32).to_be_bytes());
    data.extend_from_slice(message);
    let mut parts = data.chunks(16_384).peekable();
    while let Some(part) = parts.next() {
        let ends = last && parts.peek().is_none();
        put_frame(out, DATA, if ends { END_STREAM } else { 0 }, stream, part);
    }
}

/// How a call ended.
pub struct Ended {
    pub status: String, // empty where it was not said
    pub why: String,
}

/// What a server has sent on a connection.
pub struct Reader {
    bytes: Vec<u8>,
    data: Vec<u8>,
    block: Vec<u8>, // of headers that have begun
    block_ends: bool,
    decoder: Decoder<'static>, // of all blocks, for each may change its table
    read: usize,               // of DATA, since the window was opened
}

impl Reader {
    pub fn new() -> Self {
        Reader {
            bytes: vec![],
            data: vec![],
            block: vec![],
            block_ends: false,
            decoder: Decoder::new(),
            read: 0,
        }
    }

    pub fn feed(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The messages of call `stream` that are whole by now, and how it ended, if it did; what HTTP/2 wants answered goes to `out`.
    /// Err: why the connection is over.
    pub fn messages(
        &mut self,
        stream: u32,
        out: &mut Vec<u8>,
    ) -> Result<(Vec<Vec<u8>>, Option<Ended>), String> {
        let (mut at, mut ended) = (0, None);
        while let Some(head) = self.bytes.get(at..at + HEAD) {
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let (kind, flags) = (head[3], head[4]);
            let Some(payload) = self.bytes.get(at + HEAD..at + HEAD + length) else {
                break;
            };
            match kind {
                DATA => {
                    self.data.extend_from_slice(inner(payload, flags)?);
                    self.read += length;
                }
                SETTINGS if flags & ACK == 0 => put_frame(out, SETTINGS, ACK, 0, &[]),
                PING if flags & ACK == 0 => put_frame(out, PING, ACK, 0, payload),
                RST_STREAM => {
                    // A server that has answered in full may tell its client to send no more.
                    let code = payload.last().copied().unwrap_or(0);
                    if code != 0 {
                        ended.get_or_insert(Ended {
                            status: String::new(),
                            why: format!("the server reset the call, HTTP/2 error {code}"),
                        });
                    }
                }
                GOAWAY => {
                    let said = payload.get(8..).unwrap_or_default();
                    let code = payload.get(7).copied().unwrap_or(0);
                    return Err(format!(
                        "the server sent the connection away, HTTP/2 error {code} {}",
                        String::from_utf8_lossy(said)
                    ));
                }
                HEADERS | CONTINUATION => {
                    if kind == HEADERS {
                        self.block_ends = flags & END_STREAM != 0;
                    }
                    let part = if kind == HEADERS {
                        inner(payload, flags)?
                    } else {
                        payload
                    };
                    self.block.extend_from_slice(part);
                    if flags & END_HEADERS != 0 {
                        let block = std::mem::take(&mut self.block);
                        let fields = self
                            .decoder
                            .decode(&block)
                            .map_err(|error| format!("headers that cannot be read: {error:?}"))?;
                        if self.block_ends {
                            ended = Some(end_of(&fields));
                        }
                    }
                }
                _ => {}
            }
            at += HEAD + length;
        }
        self.bytes.drain(..at);
        if self.read >= RETURNED {
            let read = (self.read as u32).to_be_bytes();
            put_frame(out, WINDOW_UPDATE, 0, 0, &read);
            if ended.is_none() {
                put_frame(out, WINDOW_UPDATE, 0, stream, &read);
            }
            self.read = 0;
        }
        let (mut found, mut at) = (vec![], 0);
        while let Some(prefix) = self.data.get(at..at + PREFIX) {
            let length = u32::from_be_bytes([prefix[1], prefix[2], prefix[3], prefix[4]]) as usize;
            let Some(message) = self.data.get(at + PREFIX..at + PREFIX + length) else {
                break;
            };
            found.push(message.to_vec());
            at += PREFIX + length;
        }
        self.data.drain(..at);
        Ok((found, ended))
    }
}

/// A payload without its padding and priority.
fn inner(payload: &[u8], flags: u8) -> Result<&[u8], String> {
    let (mut start, mut end) = (0, payload.len());
    if flags & PADDED != 0 {
        start = 1;
        end = end.saturating_sub(payload.first().copied().unwrap_or(0).into());
    }
    if flags & PRIORITY != 0 {
        start += 5;
    }
    payload
        .get(start..end)
        .ok_or_else(|| "a frame with more padding than bytes".into())
}

fn end_of(fields: &[(Vec<u8>, Vec<u8>)]) -> Ended {
    let value = |wanted: &[u8]| {
        let found = fields.iter().find(|(name, _)| name == wanted);
        found.map_or(String::new(), |(_, value)| {
            String::from_utf8_lossy(value).into_owned()
        })
    };
    let (status, message) = (value(b"grpc-status"), value(b"grpc-message"));
    let why = format!("the server ended the call, gRPC status {status}: {message}");
    Ended { status, why }
}
