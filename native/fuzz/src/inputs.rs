//! Inputs that get deep: mostly valid ones, made at random.

use crate::random::Random;
use flate2::{Compression, write::GzEncoder};
use std::io::Write;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const END_HEADERS: u8 = 4; // a flag
const STREAM: &str = "/engram.v1.EngramService/Stream";

/// A StepRequest, most of the time for a model of four float32.
fn step(random: &mut Random) -> Vec<u8> {
    let mut message = vec![];
    for (tag, text) in [(1, "session"), (2, "m"), (3, "1")] {
        if !random.one_in(3) {
            field(&mut message, tag, text.as_bytes());
        }
    }
    let length = if random.one_in(8) {
        random.below(40)
    } else {
        16
    };
    field(
        &mut message,
        4 + u8::from(random.one_in(2)),
        &random.bytes(length),
    );
    for tag in [6u8, 7, 8, 9] {
        if random.one_in(if tag == 8 { 20 } else { 2 }) {
            message.push(tag << 3);
            let number = random.next() >> random.below(64);
            varint(&mut message, number);
        }
    }
    message
}

/// A StreamRequest with a frame of steps, whose columns fit together most of the time; or a StepRequest.
pub fn steps(random: &mut Random) -> Vec<u8> {
    if random.one_in(4) {
        return step(random);
    }
    let rows = 1 + random.below(4);
    let width = 1 + random.below(8);
    let mut frame = vec![];
    for (tag, bytes) in [(1, 4), (2, 8), (3, width), (4, 1), (5, 4), (6, 8)] {
        let wanted = match tag {
            1..=3 => !random.one_in(40),
            5 => random.one_in(20),
            _ => !random.one_in(3),
        };
        if wanted {
            let length = if random.one_in(40) {
                random.below(40)
            } else {
                rows * bytes
            };
            let mut column = random.bytes(length);
            if tag == 4 && !random.one_in(20) {
                column.iter_mut().for_each(|flags| *flags &= 3); // others are Python's to refuse
            }
            field(&mut frame, tag, &column);
        }
    }
    if random.one_in(2) {
        frame.push(7 << 3);
        let timeout = random.next() >> random.below(64);
        varint(&mut frame, timeout);
    }
    let mut message = vec![];
    let tag = if random.one_in(20) {
        random.below(32) as u8
    } else {
        3
    };
    field(&mut message, tag, &frame);
    message
}

/// Two bytes that say how, and the messages of a call.
pub fn messages(random: &mut Random) -> Vec<u8> {
    let gzip = random.one_in(2);
    let mut data = vec![u8::from(gzip), random.next() as u8];
    for _ in 0..random.below(4) {
        let message = if random.one_in(2) {
            steps(random)
        } else {
            let length = 1 << random.below(15);
            vec![random.next() as u8; length]
        };
        data.extend(prefixed(&message, gzip && !random.one_in(4)));
    }
    data
}

/// A byte that says how, and what a peer sends on a connection. What ends a connection at once is seldom among it.
pub fn connection(random: &mut Random) -> Vec<u8> {
    let mut data = vec![random.next() as u8];
    data.extend(PREFACE);
    put_frame(&mut data, SETTINGS, 0, 0, &[]);
    let (mut next, mut opened) = (1, vec![]);
    for _ in 0..1 + random.below(24) {
        let stream = if opened.is_empty() || random.one_in(60) {
            1 + 2 * random.below(8) as u32
        } else {
            *random.of(&opened)
        };
        match random.below(if opened.is_empty() { 2 } else { 16 }) {
            0 | 1 => {
                let end = u8::from(random.one_in(8));
                let block = head(random);
                if random.one_in(8) {
                    let (first, rest) = block.split_at(random.below(block.len()));
                    put_frame(&mut data, HEADERS, end, next, first);
                    put_frame(&mut data, CONTINUATION, END_HEADERS, next, rest);
                } else {
                    put_frame(&mut data, HEADERS, END_HEADERS | end, next, &block);
                }
                if end == 0 {
                    opened.push(next);
                }
                next += 2;
            }
            2..=9 => {
                let gzip = random.one_in(8);
                let mut body = prefixed(&steps(random), gzip);
                if random.one_in(8) {
                    body.truncate(random.below(body.len()));
                }
                let end = random.one_in(8);
                put_frame(&mut data, DATA, u8::from(end), stream, &body);
                if end {
                    opened.retain(|other| *other != stream);
                }
            }
            10 if random.one_in(4) => {
                put_frame(&mut data, RST_STREAM, 0, stream, &random.bytes(4));
                opened.retain(|other| *other != stream);
            }
            11 => {
                let more = 1 + ((random.next() as u32) >> (2 + random.below(30)));
                let of = *random.of(&[0, stream]);
                put_frame(&mut data, WINDOW_UPDATE, 0, of, &more.to_be_bytes());
            }
            12 => {
                let answer = u8::from(random.one_in(2));
                put_frame(&mut data, PING, answer, 0, &random.bytes(8));
            }
            13 => {
                let (kind, value) =
                    *random.of(&[(1, 0), (3, 1), (4, 0), (4, 9), (5, 16_384), (6, 10), (9, 9)]);
                let setting = [&[0, kind][..], &u32::to_be_bytes(value)].concat();
                put_frame(&mut data, SETTINGS, 0, 0, &setting);
            }
            14 if random.one_in(8) => put_frame(&mut data, GOAWAY, 0, 0, &[0; 8]),
            15 if random.one_in(8) => {
                let (kind, flags) = (random.next() as u8, random.next() as u8);
                let length = random.below(32);
                put_frame(&mut data, kind, flags, stream, &random.bytes(length));
            }
            _ => {}
        }
    }
    data
}

/// The head of a call, as HPACK without its table.
fn head(random: &mut Random) -> Vec<u8> {
    let mut block = vec![0x83, 0x86]; // POST, http
    let path = match random.below(12) {
        0 => "",
        1 | 2 => "/engram.v1.EngramService/Step",
        _ => STREAM,
    };
    header(&mut block, ":path", path);
    header(&mut block, "content-type", "application/grpc+proto");
    let some = [
        ("grpc-timeout", "1m"),
        ("grpc-timeout", "0S"),
        ("grpc-timeout", "99999999H"),
        ("grpc-timeout", "x"),
        ("grpc-encoding", "gzip"),
        ("grpc-encoding", "br"),
        ("authorization", "Bearer x"),
        ("te", "trailers"),
        ("k-bin", "AAEC"),
        ("content-type", "text/html"),
        ("content-length", "3"),
        (":authority", "x"),
    ];
    for _ in 0..random.below(4) / 2 {
        let (name, value) = *random.of(&some);
        header(&mut block, name, value);
    }
    if random.one_in(40) {
        header(&mut block, "x", &"y".repeat(random.below(8000)));
    }
    block
}

fn header(block: &mut Vec<u8>, name: &str, value: &str) {
    block.push(0); // literal, not indexed, the name is new
    for text in [name, value] {
        hpack_length(block, text.len());
        block.extend(text.as_bytes());
    }
}

fn hpack_length(block: &mut Vec<u8>, length: usize) {
    if length < 127 {
        block.push(length as u8);
    } else {
        block.push(127);
        varint(block, (length - 127) as u64);
    }
}

fn put_frame(data: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    data.extend(&(payload.len() as u32).to_be_bytes()[1..]);
    data.extend([kind, flags]);
    data.extend(stream.to_be_bytes());
    data.extend(payload);
}

fn prefixed(message: &[u8], gzip: bool) -> Vec<u8> {
    let body = if gzip {
        let mut writer = GzEncoder::new(vec![], Compression::fast());
        writer.write_all(message).expect("memory takes it");
        writer.finish().expect("memory takes it")
    } else {
        message.to_vec()
    };
    let mut data = vec![u8::from(gzip)];
    data.extend((body.len() as u32).to_be_bytes());
    data.extend(body);
    data
}

fn field(data: &mut Vec<u8>, tag: u8, value: &[u8]) {
    varint(data, u64::from(tag) << 3 | 2);
    varint(data, value.len() as u64);
    data.extend(value);
}

fn varint(data: &mut Vec<u8>, mut value: u64) {
    while value >= 128 {
        data.push(value as u8 | 128);
        value >>= 7;
    }
    data.push(value as u8);
}
