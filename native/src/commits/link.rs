//! One connection to Redis for commits: packs commands as the kernel takes them, and reads their replies. Python has connected it,
//! and may use it between two commits where it is in clear.

use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use super::replies::{Replies, Verdicts};
use super::stream::Stream;

const CHUNK: usize = 128 << 10; // of commands, packed at once: stays in a cache, and the kernel takes about as much
const KEPT: usize = 4 << 20; // a buffer that had to be longer is given back
const INPUT: usize = 64 << 10;
const LOOK: Duration = Duration::from_millis(10); // while it writes, it looks so often for replies

/// Rows of one width to write, packed one by one.
pub trait Rows {
    fn len(&self) -> usize;
    /// Appends the command of a row.
    fn put(&mut self, row: usize, out: &mut Vec<u8>);
}

pub struct Link<R> {
    stream: Stream,
    blocks: Vec<R>,
    at: (usize, usize), // block, and row of it, that is packed next
    end: Vec<u8>,       // the commands behind the rows
    out: Vec<u8>,
    written: usize, // of `out`
    begun: bool,    // something of the commit under way was written
    input: Box<[u8]>,
    filled: usize, // of `input`: a reply that is not whole
    pub replies: Replies,
}

impl<R: Rows> Link<R> {
    pub fn new(stream: Stream) -> Self {
        Link {
            stream,
            blocks: Vec::new(),
            at: (0, 0),
            end: Vec::new(),
            out: Vec::with_capacity(CHUNK + (16 << 10)),
            written: 0,
            begun: false,
            input: vec![0; INPUT + 1].into_boxed_slice(),
            filled: 0,
            replies: Replies::default(),
        }
    }

    pub fn descriptor(&self) -> RawFd {
        self.stream.descriptor()
    }

    /// Adds rows to the commit, and what comes behind the last of them.
    pub fn add(&mut self, rows: R, counting: &[u8], wait: &[u8]) {
        let count = rows.len();
        self.replies
            .expect(count, !counting.is_empty(), !wait.is_empty());
        self.blocks.push(rows);
        self.end.extend_from_slice(counting);
        self.end.extend_from_slice(wait);
    }

    pub fn wants_write(&self) -> bool {
        self.written < self.out.len()
            || self.at.0 < self.blocks.len()
            || !self.end.is_empty()
            || self.stream.holds()
    }

    /// Whether something was written of a commit whose replies have not all come.
    pub fn in_doubt(&self) -> bool {
        self.begun && self.replies.left() > 0
    }

    /// Writes what the kernel takes now.
    pub fn write(&mut self) -> io::Result<()> {
        loop {
            if self.written == self.out.len() {
                self.pack();
            }
            let rest = &self.out[self.written..];
            let sent = if rest.is_empty() {
                self.stream.flush().map(|()| 0)
            } else {
                self.stream.send(rest)
            };
            match sent {
                Ok(0) => return Ok(()), // that was all
                Ok(count) => {
                    self.begun = true;
                    self.written += count;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(lost(&error)),
            }
        }
    }

    /// A chunk, once the one before is written.
    fn pack(&mut self) {
        if self.out.capacity() > KEPT {
            self.out = Vec::with_capacity(CHUNK + (16 << 10));
        }
        self.out.clear();
        self.written = 0;
        self.pack_until(CHUNK);
    }

    fn pack_until(&mut self, size: usize) {
        while let Some(rows) = self.blocks.get_mut(self.at.0) {
            for row in self.at.1..rows.len() {
                if self.out.len() >= size {
                    self.at.1 = row;
                    return;
                }
                rows.put(row, &mut self.out);
            }
            self.at = (self.at.0 + 1, 0);
        }
        self.out.append(&mut self.end);
    }

    /// Packs what is left, whose columns may change from now on.
    pub fn pack_rest(&mut self) {
        if self.at.0 < self.blocks.len() {
            self.out.drain(..self.written);
            self.written = 0;
            self.pack_until(usize::MAX);
        }
    }

    /// Lets go of rows that are packed. Apart from `write`, for a column is given back to Python with the interpreter's lock.
    pub fn release(&mut self) {
        if self.at.0 == self.blocks.len() {
            self.blocks.clear();
            self.at = (0, 0);
        }
    }

    /// Takes the replies that are there.
    pub fn read(&mut self) -> io::Result<()> {
        loop {
            let (count, all) = match self.stream.receive(&mut self.input[self.filled..]) {
                Ok((0, _)) => return Err(aborted("the store closed the connection")),
                Ok(got) => got,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(lost(&error)),
            };
            let whole = self.filled + count;
            let used = self
                .replies
                .take(&self.input[..whole])
                .map_err(|why| aborted(&format!("the store's answer makes no sense: {why}")))?;
            self.input.copy_within(used..whole, 0);
            self.filled = whole - used;
            if all {
                return Ok(());
            }
        }
    }

    /// Writes and reads until all replies are there or the time is up; whether they are there. A signal ends it early.
    pub fn progress(&mut self, time: Duration) -> io::Result<bool> {
        let mut deadline = None; // the clock is asked only where it must wait
        loop {
            let wrote = self.wants_write();
            if wrote {
                self.write()?;
            }
            // Right behind its last byte a commit's replies are not there yet: to look for them would cost a call.
            let soon = wrote && !self.wants_write() && !time.is_zero();
            if self.replies.left() > 0 && (self.begun || self.wants_write()) && !soon {
                self.read()?;
            }
            let writing = self.wants_write(); // also what TLS wants to say, having read
            if self.replies.left() == 0 && !writing {
                return Ok(true);
            }
            let now = Instant::now();
            let end = *deadline.get_or_insert(now + time);
            if now >= end || !self.wait(end - now, writing)? {
                return Ok(false);
            }
        }
    }

    /// Waits for the socket; false: a signal came. While there is more to write, replies alone do not wake it: there are many of
    /// them, and it reads them with each part that it has written.
    fn wait(&self, time: Duration, writing: bool) -> io::Result<bool> {
        let (events, time) = if writing {
            (libc::POLLOUT, time.min(LOOK))
        } else {
            (libc::POLLIN, time)
        };
        match self.stream.wait(events, Some(time)) {
            Ok(()) => Ok(true),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(false),
            Err(error) => Err(lost(&error)),
        }
    }

    /// What became of the commit, whose replies are all there.
    pub fn verdicts(&mut self) -> Verdicts {
        self.begun = false;
        self.replies.verdicts()
    }
}

fn lost(error: &io::Error) -> io::Error {
    io::Error::new(
        error.kind(),
        format!("the store's connection failed: {error}"),
    )
}

pub fn aborted(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionAborted, why)
}
