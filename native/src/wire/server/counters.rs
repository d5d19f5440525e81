//! What is counted of connections and calls.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};

use crate::wire::refusals::Refusal;

/// What is counted, ever, and what there is now.
#[derive(Default)]
pub struct Counters {
    pub connections: AtomicUsize,
    pub accepted: AtomicU64,
    pub turned_away: AtomicU64, // for there were too many
    pub failed: AtomicU64,      // before HTTP/2 was agreed upon
    pub unauthenticated: AtomicU64,
    pub streams: AtomicUsize,
    pub bytes_in: AtomicU64, // of HTTP/2
    pub bytes_out: AtomicU64,
    pub tls_1_2: AtomicU64,
    pub tls_1_3: AtomicU64,
    pub tls_failed: AtomicU64,
    pub steps: AtomicU64, // unary
    pub step_rows: AtomicU64,
    pub step_events: AtomicU64,
    pub answers: AtomicU64,
    pub no_token: AtomicU64,
    pub unknown_token: AtomicU64,
    pub token_revoked: AtomicU64,
    pub too_many_calls: AtomicU64,
    pub no_relay: AtomicU64,
    pub bad_head: AtomicU64,
    pub bad_message: AtomicU64,
    pub resets: AtomicU64,
}

impl Counters {
    pub fn refused(&self, refusal: Refusal) {
        let count = match refusal {
            Refusal::TokenMissing => &self.no_token,
            Refusal::TokenUnknown => &self.unknown_token,
            Refusal::TokenRevoked => &self.token_revoked,
            Refusal::QueueFull => &self.too_many_calls,
            Refusal::RelayUnavailable => &self.no_relay,
        };
        count.fetch_add(1, Relaxed);
        if matches!(refusal, Refusal::TokenMissing | Refusal::TokenUnknown) {
            self.unauthenticated.fetch_add(1, Relaxed);
        }
    }
}
