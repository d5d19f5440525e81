//! What peers are allowed.

use tokio::sync::Semaphore;

/// What is allowed. Times are in seconds.
#[derive(Clone, Debug)]
pub struct Limits {
    pub connections: usize,
    pub calls: u32,            // of a connection at a time
    pub header_nbytes: u32,    // of a call
    pub message_nbytes: usize, // compressed and not
    pub rows: usize,           // of a stream that are under way
    pub inbox_nbytes: usize,   // that have come and are not taken
    pub handshake_s: f64,      // until TLS and HTTP/2 are agreed upon
    pub idle_s: f64,           // without a call
    pub step_s: f64,           // that a unary step may take
    pub keepalive_s: f64, // between questions whether the peer is still there, and until it has answered
    pub resets: usize, // of calls that the server has not looked at; a second of others, or 2 * calls
    pub frame_rows: usize, // of a frame of steps; one with more, or with more bytes, is Python's to refuse
    pub frame_nbytes: usize,
}

impl Limits {
    /// Whether a server can keep them.
    pub fn possible(&self) -> bool {
        let times = [self.handshake_s, self.idle_s, self.keepalive_s, self.step_s];
        times.iter().all(|time| (0.001..=1e9).contains(time))
            && self.rows > 0
            && (1..=Semaphore::MAX_PERMITS).contains(&self.connections)
    }
}
