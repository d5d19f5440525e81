//! When a connection's bytes were read, and how long answers took from `answer` until they were given to the kernel.

use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

const UNWRITTEN_KEPT: usize = 64; // entries of which a connection keeps the memory

#[cfg(target_os = "macos")]
const CLOCK: libc::clockid_t = libc::CLOCK_UPTIME_RAW;
#[cfg(not(target_os = "macos"))]
const CLOCK: libc::clockid_t = libc::CLOCK_MONOTONIC;

/// Nanoseconds of the clock that is Python's time.monotonic.
pub fn now() -> u64 {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    unsafe { libc::clock_gettime(CLOCK, &raw mut time) };
    time.tv_sec as u64 * 1_000_000_000 + time.tv_nsec as u64
}

pub fn seconds(nanoseconds: u64) -> f64 {
    nanoseconds as f64 / 1e9
}

/// How long answers of rows took from `answer` until they were given to the kernel: a histogram, over all connections.
pub struct Written {
    edges: Vec<u64>,        // upper ones, in ns, ascending
    counts: Vec<AtomicU64>, // rows, one more than there are edges
    sum: AtomicU64,         // ns
}

impl Default for Written {
    fn default() -> Self {
        Written::new(&[])
    }
}

impl Written {
    pub fn new(edges_s: &[f64]) -> Self {
        let edges: Vec<u64> = edges_s.iter().map(|edge| (edge * 1e9) as u64).collect();
        Written {
            counts: (0..=edges.len()).map(|_| AtomicU64::new(0)).collect(),
            sum: AtomicU64::new(0),
            edges,
        }
    }

    fn add(&self, took: u64, rows: u64) {
        let at = self.edges.partition_point(|edge| *edge < took);
        self.counts[at].fetch_add(rows, Relaxed);
        self.sum.fetch_add(took * rows, Relaxed);
    }

    /// Rows by edge, those above the last one behind them, and seconds in all.
    pub fn read(&self) -> (Vec<u64>, f64) {
        let counts = self.counts.iter().map(|count| count.load(Relaxed));
        (counts.collect(), seconds(self.sum.load(Relaxed)))
    }
}

/// The times of one connection.
#[derive(Default)]
pub struct Times {
    read: AtomicU64, // when bytes were read last
    unwritten: Mutex<Unwritten>,
    written: Arc<Written>,
}

#[derive(Default)]
struct Unwritten {
    answers: Vec<(u64, u64)>, // given to HTTP/2: when, and how many rows
    encoded: Option<usize>,   // so many of them are in what is being written
    began: u64,               // the write that gives the last of it to the kernel
}

impl Times {
    pub fn new(written: Arc<Written>) -> Arc<Self> {
        Arc::new(Times {
            read: AtomicU64::new(now()),
            unwritten: Mutex::default(),
            written,
        })
    }

    pub fn note_read(&self, at: u64) {
        self.read.store(at, Relaxed);
    }

    /// When the bytes that were handed out last were read, or a moment later.
    pub fn read(&self) -> u64 {
        self.read.load(Relaxed)
    }

    /// An answer is about to be given to HTTP/2.
    pub fn answered(&self, since: u64, rows: usize) {
        self.unwritten.lock().answers.push((since, rows as u64));
    }

    /// HTTP/2 writes what it has encoded. What it is given meanwhile is in a later write.
    pub fn writes(&self) {
        let mut unwritten = self.unwritten.lock();
        unwritten.began = now();
        if unwritten.encoded.is_none() {
            unwritten.encoded = Some(unwritten.answers.len());
        }
    }

    /// All of that is the kernel's. Its reader may have it before the kernel comes back from the write, so the time is that before.
    pub fn wrote(&self) {
        let mut unwritten = self.unwritten.lock();
        let Some(encoded) = unwritten.encoded.take() else {
            return;
        };
        if encoded == 0 {
            return;
        }
        let began = unwritten.began;
        for (since, rows) in unwritten.answers.drain(..encoded) {
            self.written.add(began.saturating_sub(since), rows);
        }
        if unwritten.answers.is_empty() && unwritten.answers.capacity() > UNWRITTEN_KEPT {
            unwritten.answers = Vec::new();
        }
    }
}

/// What a message answers.
#[derive(Clone, Copy, Default)]
pub struct Answer {
    pub rows: usize,
    pub since: Option<u64>, // when it was given, where that is to be known
}

impl Answer {
    /// Its message, or the end of it, is given to HTTP/2 next.
    pub fn begins(self, times: &Times) {
        if let Some(since) = self.since {
            times.answered(since, self.rows.max(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_counted_when_what_they_are_in_is_written() {
        let written = Arc::new(Written::new(&[1.0, 2.0]));
        let times = Times::new(written.clone());
        times.answered(now(), 3);
        times.wrote(); // a flush, with nothing written before it
        assert_eq!(written.read().0, [0, 0, 0]);
        times.writes();
        times.answered(now() - 1_500_000_000, 4); // comes too late for this write
        times.writes();
        times.wrote();
        assert_eq!(written.read().0, [3, 0, 0]);
        times.writes();
        times.wrote();
        let (counts, sum) = written.read();
        assert_eq!(counts, [3, 4, 0]);
        assert!((6.0..7.0).contains(&sum), "{sum}");
    }

    #[test]
    fn an_edge_belongs_to_what_is_below_it() {
        let written = Written::new(&[0.001, 0.01]);
        for took in [1_000_000, 1_000_001, 10_000_001] {
            written.add(took, 1);
        }
        assert_eq!(written.read().0, [1, 1, 1]);
    }

    #[test]
    fn the_memory_of_many_answers_is_let_go_of() {
        let times = Times::new(Arc::new(Written::new(&[])));
        for _ in 0..1000 {
            times.answered(now(), 1);
        }
        times.writes();
        times.wrote();
        assert_eq!(times.unwritten.lock().answers.capacity(), 0);
    }
}
