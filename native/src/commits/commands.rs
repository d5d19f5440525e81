//! The commands of a commit.

use super::link::Rows;
use crate::columns::Column;

/// Rows to write: `SET key record XX PX ttl`.
pub struct Sets {
    pub tags: Column<u8>,
    pub tokens: Column<u8>,
    pub records: Column<u8>,
    pub ttls: Column<u64>,
    pub head: Vec<u8>,   // until the tag
    pub middle: Vec<u8>, // between token and record
    pub tail: Tail,
}

impl Rows for Sets {
    fn len(&self) -> usize {
        self.records.rows
    }

    fn put(&mut self, row: usize, out: &mut Vec<u8>) {
        self.tail.of(self.ttls.row(row)[0]);
        out.extend_from_slice(&self.head);
        out.extend_from_slice(self.tags.row(row));
        out.extend_from_slice(b"}:");
        out.extend_from_slice(self.tokens.row(row));
        out.extend_from_slice(&self.middle);
        out.extend_from_slice(self.records.row(row));
        out.extend_from_slice(&self.tail.bytes);
    }
}

/// What stands behind a record: its time to live, which is mostly that of the row before.
#[derive(Default)]
pub struct Tail {
    ttl: Option<u64>,
    pub bytes: Vec<u8>,
}

impl Tail {
    pub fn of(&mut self, ttl: u64) {
        if self.ttl != Some(ttl) {
            let digits = ttl.to_string();
            let length = digits.len();
            let tail = format!("\r\n$2\r\nXX\r\n$2\r\nPX\r\n${length}\r\n{digits}\r\n");
            *self = Tail {
                ttl: Some(ttl),
                bytes: tail.into_bytes(),
            };
        }
    }
}

/// `SET` and the key's length, until the tag.
pub fn head(prefix: &[u8], tag: usize, token: usize) -> Vec<u8> {
    let key = prefix.len() + tag + 2 + token;
    let mut head = format!("*6\r\n$3\r\nSET\r\n${key}\r\n").into_bytes();
    head.extend_from_slice(prefix);
    head
}

/// The command that adds one to a counter, where there is a key.
pub fn counting(key: &[u8]) -> Vec<u8> {
    if key.is_empty() {
        return Vec::new();
    }
    let mut command = format!("*2\r\n$4\r\nINCR\r\n${}\r\n", key.len()).into_bytes();
    command.extend_from_slice(key);
    command.extend_from_slice(b"\r\n");
    command
}
