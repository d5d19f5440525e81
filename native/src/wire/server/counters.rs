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

    /// What is counted ever, by the names that Python has for it.
    pub fn ever(&self) -> [(&'static str, u64); 21] {
        let counts = [
            ("accepted", &self.accepted),
            ("turned_away", &self.turned_away),
            ("failed", &self.failed),
            ("unauthenticated", &self.unauthenticated),
            ("bytes_in", &self.bytes_in),
            ("bytes_out", &self.bytes_out),
            ("tls_1_2", &self.tls_1_2),
            ("tls_1_3", &self.tls_1_3),
            ("tls_failed", &self.tls_failed),
            ("steps", &self.steps),
            ("step_rows", &self.step_rows),
            ("step_events", &self.step_events),
            ("answers", &self.answers),
            ("refused_no_token", &self.no_token),
            ("refused_unknown_token", &self.unknown_token),
            ("refused_token_revoked", &self.token_revoked),
            ("refused_too_many_calls", &self.too_many_calls),
            ("refused_no_relay", &self.no_relay),
            ("refused_head", &self.bad_head),
            ("refused_message", &self.bad_message),
            ("refused_resets", &self.resets),
        ];
        counts.map(|(name, count)| (name, count.load(Relaxed)))
    }
}
