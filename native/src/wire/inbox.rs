//! What all calls have brought and Python has not taken: rows of steps as columns, and events.

use parking_lot::{Mutex, MutexGuard};
use std::collections::VecDeque;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

use super::frames::Steps;
use super::server::Peer;
use super::times;

/// A row without an acknowledged seq.
const NOT_ACKNOWLEDGED: u64 = u64::MAX;
const FIRST: u8 = 0x80; // in the flags of a row that begins a frame
const TURNS: usize = 4; // that others may have before rows are taken

/// A call that begins.
pub struct Begun {
    pub path: String,
    pub identity: Option<u32>, // the number of its token in the table; None: there is no table
    pub metadata: Vec<(String, String)>,
    pub timeout_ms: Option<u64>, // how long its caller waits
    pub peer: Arc<Peer>,
}

/// What happens to a call that is no row.
pub enum Happening {
    Begin(Box<Begun>),
    /// A call that begins, has its one message and sends no more, all in one.
    Step(Box<Begun>, Vec<u8>),
    /// A call of somebody without a token that is known: some of these are told. Its number is nobody's.
    Refused(Box<Begun>),
    /// A message of it, unless it is a frame of usual steps.
    Message(Vec<u8>),
    /// Its caller sends no more.
    HalfClose,
    /// It is over, for its caller has gone, its time is up, or its bytes made no sense. Nothing reaches it any more.
    End,
}

pub struct Noted {
    pub call: u32,
    pub rows_before: u64, // of all rows ever taken or waiting: what came before it on any call
    pub what: Happening,
}

/// Rows of steps, column by column. A row's input is `input_nbytes` long and begins at the end of the one before.
#[derive(Default)]
pub struct Columns {
    pub calls: Vec<u32>,
    pub handles: Vec<u32>,
    pub seqs: Vec<u64>,
    pub acknowledged: Vec<u64>, // u64::MAX: none
    pub flags: Vec<u8>,
    pub timeouts_ms: Vec<u32>, // 0: none
    pub input_nbytes: Vec<u32>,
    pub inputs: Vec<u8>,
    pub times: Vec<[f64; 4]>, // when its frame was read, was in the inbox, and was taken, in seconds; and 0
}

impl Columns {
    pub fn len(&self) -> usize {
        self.calls.len()
    }

    fn push(&mut self, call: u32, steps: &Steps, read: u64, came: u64) {
        let (start, rows) = (self.len(), steps.rows());
        let end = start + rows;
        self.calls.resize(end, call);
        self.handles.extend(
            steps
                .handles
                .as_chunks()
                .0
                .iter()
                .map(|bytes| u32::from_le_bytes(*bytes)),
        );
        self.seqs.extend(
            steps
                .seqs
                .as_chunks()
                .0
                .iter()
                .map(|bytes| u64::from_le_bytes(*bytes)),
        );
        self.acknowledged.extend(
            steps
                .acknowledged
                .as_chunks()
                .0
                .iter()
                .map(|bytes| u64::from_le_bytes(*bytes)),
        );
        self.acknowledged.resize(end, NOT_ACKNOWLEDGED);
        self.flags.extend_from_slice(steps.flags);
        self.flags.resize(end, 0);
        self.flags[start] |= FIRST;
        self.timeouts_ms.resize(end, steps.timeout_ms);
        self.input_nbytes
            .resize(end, (steps.inputs.len() / rows) as u32);
        self.inputs.extend_from_slice(steps.inputs);
        let times = [times::seconds(read), times::seconds(came), 0.0, 0.0];
        self.times.resize(end, times);
    }

    fn clear(&mut self) {
        self.calls.clear();
        self.handles.clear();
        self.seqs.clear();
        self.acknowledged.clear();
        self.flags.clear();
        self.timeouts_ms.clear();
        self.input_nbytes.clear();
        self.inputs.clear();
        self.times.clear();
    }
}

#[derive(Default)]
struct Waiting {
    columns: Columns,
    noted: VecDeque<Noted>,
    noted_nbytes: usize,
    rows: u64,              // ever
    since: Option<Instant>, // when the oldest thing came
    asleep: bool,           // Python waits for the descriptor
}

/// What waits to be taken.
#[derive(Debug, Default)]
pub struct Depth {
    pub rows: usize,
    pub events: usize,
    pub nbytes: usize,
    pub age: Duration, // of the oldest thing
    pub rows_ever: u64,
}

pub struct Inbox {
    waiting: Mutex<Waiting>,
    nbytes_max: usize,
    nbytes: AtomicUsize,
    freed: Notify,
    reader: PipeReader,
    writer: PipeWriter,
    descriptor: RawFd,
}

impl Inbox {
    /// `nbytes_max`: of inputs and messages; who brings more waits, and with it the connection's peer.
    pub fn new(nbytes_max: usize) -> std::io::Result<Self> {
        let (reader, writer) = std::io::pipe()?;
        let descriptor = reader.as_raw_fd();
        unblocked(descriptor)?;
        Ok(Inbox {
            waiting: Mutex::new(Waiting {
                asleep: true,
                ..Waiting::default()
            }),
            nbytes_max,
            nbytes: AtomicUsize::new(0),
            freed: Notify::new(),
            reader,
            writer,
            descriptor,
        })
    }

    /// Readable while there may be something to take.
    pub fn descriptor(&self) -> RawFd {
        self.descriptor
    }

    /// `read`: when the frame's first bytes were.
    pub fn push_steps(&self, call: u32, steps: &Steps, read: u64) {
        let came = times::now();
        let mut waiting = self.waiting.lock();
        waiting.columns.push(call, steps, read, came);
        waiting.rows += steps.rows() as u64;
        self.nbytes.fetch_add(steps.inputs.len(), Ordering::Relaxed);
        self.wake(waiting);
    }

    pub fn push(&self, call: u32, what: Happening) {
        let nbytes = match &what {
            Happening::Message(message) | Happening::Step(_, message) => message.len(),
            _ => 0,
        };
        let mut waiting = self.waiting.lock();
        let rows_before = waiting.rows;
        waiting.noted.push_back(Noted {
            call,
            rows_before,
            what,
        });
        waiting.noted_nbytes += nbytes;
        self.nbytes.fetch_add(nbytes, Ordering::Relaxed);
        self.wake(waiting);
    }

    pub fn depth(&self) -> Depth {
        let waiting = self.waiting.lock();
        Depth {
            rows: waiting.columns.len(),
            events: waiting.noted.len(),
            nbytes: self.nbytes.load(Ordering::Relaxed),
            age: waiting
                .since
                .map_or(Duration::ZERO, |since| since.elapsed()),
            rows_ever: waiting.rows,
        }
    }

    fn wake(&self, mut waiting: MutexGuard<Waiting>) {
        if waiting.since.is_none() {
            waiting.since = Some(Instant::now());
        }
        if std::mem::take(&mut waiting.asleep) {
            drop(waiting); // or whom it wakes would have to wait for it
            let _ = (&self.writer).write(&[1]); // a few bytes at most are in the pipe
        }
    }

    /// Returns when there is room for more.
    pub async fn room(&self) {
        loop {
            let freed = self.freed.notified();
            if self.nbytes.load(Ordering::Relaxed) < self.nbytes_max {
                return;
            }
            freed.await;
        }
    }

    /// Lets threads that are ready to run go first, as long as that brings rows. A batch costs much the same for any few of them: where
    /// all processors are busy, this thread would else take few, often. Where one is free for each thread, this is one short call.
    pub fn gather(&self) {
        let mut before = self.waiting.lock().rows;
        for _ in 0..TURNS {
            std::thread::yield_now();
            let rows = self.waiting.lock().rows;
            if rows == before {
                return;
            }
            before = rows;
        }
    }

    /// All that has come, in place of `columns`, whose memory is used again. The descriptor says when there is more.
    pub fn take(&self, columns: &mut Columns) -> (u64, VecDeque<Noted>) {
        columns.clear();
        let (first, noted, nbytes) = {
            let mut waiting = self.waiting.lock();
            std::mem::swap(&mut waiting.columns, columns);
            let noted = std::mem::take(&mut waiting.noted);
            waiting.since = None;
            let nbytes = std::mem::take(&mut waiting.noted_nbytes) + columns.inputs.len();
            if !std::mem::replace(&mut waiting.asleep, true) {
                let _ = (&self.reader).read(&mut [0; 8]); // the byte of the wake; one that is still to come makes an empty turn
            }
            (waiting.rows - columns.len() as u64, noted, nbytes)
        };
        if self.nbytes.fetch_sub(nbytes, Ordering::Relaxed) >= self.nbytes_max {
            self.freed.notify_waiters();
        }
        if columns.len() > 0 {
            let taken = times::seconds(times::now());
            columns.times.iter_mut().for_each(|times| times[2] = taken);
        }
        (first, noted)
    }
}

fn unblocked(descriptor: RawFd) -> std::io::Result<()> {
    let flags = unsafe { libc::fcntl(descriptor, libc::F_GETFL) };
    let set = unsafe { libc::fcntl(descriptor, libc::F_SETFL, flags | libc::O_NONBLOCK) };
    if flags < 0 || set < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn steps<'a>(handles: &'a [u8], seqs: &'a [u8], inputs: &'a [u8]) -> Steps<'a> {
        Steps {
            handles,
            seqs,
            inputs,
            timeout_ms: 7,
            ..Steps::default()
        }
    }

    fn readable(inbox: &Inbox) -> bool {
        let mut poll = libc::pollfd {
            fd: inbox.descriptor(),
            events: libc::POLLIN,
            revents: 0,
        };
        unsafe { libc::poll(&mut poll, 1, 0) > 0 }
    }

    #[test]
    fn what_came_is_taken_in_its_order() {
        let inbox = Inbox::new(1000).unwrap();
        inbox.push_steps(3, &steps(&[1, 0, 0, 0, 2, 0, 0, 0], &[5; 16], &[9; 6]), 5);
        inbox.push(4, Happening::HalfClose);
        inbox.push_steps(5, &steps(&[8, 0, 0, 0], &[6; 8], &[7; 2]), 6);
        let mut columns = Columns::default();
        let (first, noted) = inbox.take(&mut columns);
        assert_eq!(
            (first, noted.len(), noted[0].call, noted[0].rows_before),
            (0, 1, 4, 2)
        );
        assert_eq!(
            (columns.calls.as_slice(), columns.handles.as_slice()),
            (&[3, 3, 5][..], &[1, 2, 8][..])
        );
        assert_eq!(
            (columns.input_nbytes.as_slice(), columns.inputs.len()),
            (&[3, 3, 2][..], 8)
        );
        assert_eq!(
            (
                columns.acknowledged[0],
                columns.flags[2],
                columns.timeouts_ms[1]
            ),
            (NOT_ACKNOWLEDGED, FIRST, 7)
        );
        let reads: Vec<f64> = columns.times.iter().map(|times| times[0]).collect();
        assert_eq!(reads, [5e-9, 5e-9, 6e-9]);
        assert!(
            columns
                .times
                .iter()
                .all(|times| times[..3].is_sorted() && times[3] == 0.0)
        );
        assert_eq!(inbox.take(&mut columns).0, 3);
        assert_eq!(columns.len(), 0);
    }

    #[test]
    fn the_descriptor_is_written_once_until_what_came_is_taken() {
        let inbox = Inbox::new(1000).unwrap();
        let mut columns = Columns::default();
        assert!(!readable(&inbox));
        for _ in 0..3 {
            inbox.push(1, Happening::HalfClose);
            assert!(readable(&inbox));
        }
        assert_eq!(inbox.take(&mut columns).1.len(), 3);
        assert!(
            !readable(&inbox),
            "all of it was taken, so the next one wakes"
        );
        inbox.push(1, Happening::End);
        assert!(readable(&inbox));
        assert_eq!(inbox.take(&mut columns).1.len(), 1);
        assert!(inbox.take(&mut columns).1.is_empty());
        assert!(!readable(&inbox));
    }

    #[test]
    fn the_oldest_thing_has_an_age_until_it_is_taken() {
        let inbox = Inbox::new(1000).unwrap();
        assert_eq!(inbox.depth().age, Duration::ZERO);
        inbox.push(1, Happening::Message(vec![0; 11]));
        std::thread::sleep(Duration::from_millis(20));
        inbox.push_steps(3, &steps(&[1, 0, 0, 0], &[5; 8], &[9; 6]), 0);
        let depth = inbox.depth();
        assert!(depth.age >= Duration::from_millis(20));
        assert_eq!((depth.rows, depth.events, depth.nbytes), (1, 1, 17));
        inbox.take(&mut Columns::default());
        let depth = inbox.depth();
        assert_eq!((depth.rows, depth.age), (0, Duration::ZERO));
        assert_eq!((depth.nbytes, depth.rows_ever), (0, 1));
    }

    #[tokio::test]
    async fn who_brings_more_than_fits_waits() {
        let inbox = Inbox::new(10).unwrap();
        inbox.room().await;
        inbox.push(1, Happening::Message(vec![0; 11]));
        tokio::select! {
            biased;
            () = inbox.room() => panic!("there is no room"),
            () = tokio::task::yield_now() => {}
        }
        inbox.take(&mut Columns::default());
        inbox.room().await;
    }
}
