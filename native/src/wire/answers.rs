//! Answers of rows, as columns: those of a stream that stand together go back in one frame, those of unary steps each to its call.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use super::call::Call;
use super::frames;
use super::server::Server;
use super::steps::CALL;
use super::times::{self, Answer};

/// Rows, column by column, as bytes.
pub struct Answers<'a> {
    pub ids: &'a [u32], // of their calls
    pub handles: &'a [u8],
    pub seqs: &'a [u8],
    pub outputs: &'a [u8], // all of one width; empty: they want none
    pub durable: &'a [u8], // seqs; or empty
}

impl Answers<'_> {
    /// Gives each to its call, where that is not over.
    pub fn send(&self, server: &Server) {
        let Answers {
            ids,
            handles,
            seqs,
            outputs,
            durable,
        } = *self;
        let width = outputs.len().checked_div(ids.len()).unwrap_or(0);
        let since = Some(times::now());
        let calls = server.calls.read();
        let (mut start, mut answers) = (0, 0);
        for run in ids.chunk_by(|one, next| one == next) {
            let end = start + run.len();
            if run[0] & CALL != 0 {
                // Each of them has a call, and each call has one.
                for (row, id) in (start..end).zip(run) {
                    let seq = seqs[8 * row..].first_chunk().copied().unwrap_or_default();
                    let output = &outputs[width * row..width * (row + 1)];
                    let call = calls.get(&(id & !CALL));
                    let heard = |call: &Arc<Call>| call.stepped(u64::from_le_bytes(seq), output);
                    answers += u64::from(call.is_some_and(heard));
                }
            } else if let Some(call) = calls.get(&run[0]) {
                let durable = if durable.is_empty() {
                    durable
                } else {
                    &durable[8 * start..8 * end]
                };
                let message = frames::outputs(
                    &handles[4 * start..4 * end],
                    &seqs[8 * start..8 * end],
                    &outputs[width * start..width * end],
                    durable,
                );
                let rows = run.len();
                call.send(message, Answer { rows, since });
                answers += run.len() as u64;
            }
            start = end;
        }
        server.counters.answers.fetch_add(answers, Relaxed);
    }
}
