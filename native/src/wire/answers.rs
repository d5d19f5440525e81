//! Answers of rows, as columns: those of a stream go back in one frame, those of unary steps each to its call.

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
        let Some(order) = apart(self.ids) else {
            return self.send_runs(server);
        };
        let width = self.outputs.len().checked_div(self.ids.len());
        Answers {
            ids: &order.iter().map(|&row| self.ids[row]).collect::<Vec<_>>(),
            handles: &ordered(self.handles, 4, &order),
            seqs: &ordered(self.seqs, 8, &order),
            outputs: &ordered(self.outputs, width.unwrap_or(0), &order),
            durable: &ordered(self.durable, 8, &order),
        }
        .send_runs(server);
    }

    /// Where a call's rows stand together.
    fn send_runs(&self, server: &Server) {
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

/// An order in which the rows of each call stand together, as they came; None: they do already.
fn apart(ids: &[u32]) -> Option<Vec<usize>> {
    let runs = ids.chunk_by(|one, next| one == next);
    let mut heads: Vec<u32> = runs.map(|run| run[0]).collect();
    if heads.is_sorted() {
        return None; // and no two are equal, for runs are as long as can be
    }
    heads.sort_unstable();
    if heads.windows(2).all(|two| two[0] != two[1]) {
        return None;
    }
    let mut order: Vec<usize> = (0..ids.len()).collect();
    order.sort_by_key(|&row| ids[row]);
    Some(order)
}

/// A column's rows, of so many bytes each, in an order; of a column that is empty none.
fn ordered(column: &[u8], width: usize, order: &[usize]) -> Vec<u8> {
    if column.is_empty() {
        return vec![];
    }
    let rows = order
        .iter()
        .map(|&row| &column[width * row..width * (row + 1)]);
    rows.flatten().copied().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_put_in_order_only_where_a_call_has_some_apart() {
        for together in [&[][..], &[7], &[3, 3, 9], &[9, 3, 3, 4]] {
            assert_eq!(apart(together), None);
        }
        assert_eq!(apart(&[9, 3, 9, 4, 3]), Some(vec![1, 4, 3, 0, 2]));
        assert_eq!(
            ordered(&[1, 1, 2, 2, 3, 3], 2, &[2, 0, 1]),
            [3, 3, 1, 1, 2, 2]
        );
        assert!(ordered(&[], 8, &[0]).is_empty());
    }
}
