//! Just enough of HTTP/2 and gRPC for one bidirectional call a connection, which a server may cut in any way.

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const ACK: u8 = 1;
const END_HEADERS: u8 = 4;
const STREAM: u32 = 1;
const HEAD: usize = 9; // of a frame
const PREFIX: usize = 5; // of a gRPC message
const RETURNED: usize = 20_000; // bytes that were read before the server's window is opened again

fn put_frame(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    out.extend_from_slice(&(payload.len() as u32).to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

/// The preface, and the head of a call of this path.
pub fn hello(out: &mut Vec<u8>, path: &str, token: Option<&str>) {
    out.extend_from_slice(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n");
    put_frame(out, SETTINGS, 0, 0, &[]);
    let mut block = vec![0x83, 0x86]; // :method POST, :scheme http
    let bearer = token.map(|token| format!("Bearer {token}"));
    let mut fields = vec![
        (":path", path),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    fields.extend(bearer.as_deref().map(|bearer| ("authorization", bearer)));
    for (name, value) in fields {
        block.push(0); // a literal that is not to be remembered
        for text in [name, value] {
            put_length(&mut block, text.len());
            block.extend_from_slice(text.as_bytes());
        }
    }
    put_frame(out, HEADERS, END_HEADERS, STREAM, &block);
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

/// A message as gRPC sends it, in DATA frames of a size that every server takes.
pub fn put_message(out: &mut Vec<u8>, message: &[u8]) {
    let mut data = vec![0];
    data.extend_from_slice(&(message.len() as u32).to_be_bytes());
    data.extend_from_slice(message);
    for part in data.chunks(16_384) {
        put_frame(out, DATA, 0, STREAM, part);
    }
}

/// What a server has sent on a connection.
#[derive(Default)]
pub struct Reader {
    bytes: Vec<u8>,
    data: Vec<u8>,
    read: usize, // of DATA, since the window was opened
}

impl Reader {
    pub fn feed(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// The messages that are whole by now; what HTTP/2 wants answered goes to `out`. Err: why the call is over.
    pub fn messages(&mut self, out: &mut Vec<u8>) -> Result<Vec<Vec<u8>>, String> {
        let mut at = 0;
        while let Some(head) = self.bytes.get(at..at + HEAD) {
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize;
            let (kind, flags) = (head[3], head[4]);
            let Some(payload) = self.bytes.get(at + HEAD..at + HEAD + length) else {
                break;
            };
            match kind {
                DATA => {
                    self.data.extend_from_slice(payload);
                    self.read += length;
                }
                SETTINGS if flags & ACK == 0 => put_frame(out, SETTINGS, ACK, 0, &[]),
                PING if flags & ACK == 0 => put_frame(out, PING, ACK, 0, payload),
                RST_STREAM => return Err("the server reset the call".into()),
                GOAWAY => return Err("the server sent the connection away".into()),
                HEADERS if flags & 1 != 0 => return Err("the server ended the call".into()),
                _ => {}
            }
            at += HEAD + length;
        }
        self.bytes.drain(..at);
        if self.read >= RETURNED {
            for stream in [0, STREAM] {
                put_frame(
                    out,
                    WINDOW_UPDATE,
                    0,
                    stream,
                    &(self.read as u32).to_be_bytes(),
                );
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
        Ok(found)
    }
}
