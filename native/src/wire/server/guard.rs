//! The calls of a connection, and what is to be done when one of them is over.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use tokio::time::Instant;

use super::Server;
use super::head::Kind;
use crate::wire::call::Call;

const LET_GO: Duration = Duration::from_secs(1); // a call that lived longer was worth its work

/// The calls of a connection.
#[derive(Default)]
pub struct Calls {
    pub under_way: AtomicUsize,
    pub let_go: AtomicUsize, // by their caller, within a second
}

/// What is to be done when a call is over, in whichever way.
pub struct CallGuard {
    pub server: Arc<Server>,
    calls: Arc<Calls>,
    begun: Instant,
    pub let_go: bool, // its caller has gone before it was answered
    pub id: u32,
    pub call: Option<(Arc<Call>, Kind)>, // None: it is relayed
}

impl CallGuard {
    /// A call of the connection begins, under a number of its own.
    pub fn new(server: &Arc<Server>, calls: &Arc<Calls>) -> Self {
        let id = server.numbers.lock().take();
        calls.under_way.fetch_add(1, Relaxed);
        CallGuard {
            server: server.clone(),
            calls: calls.clone(),
            begun: Instant::now(),
            let_go: false,
            id,
            call: None,
        }
    }
}

impl Drop for CallGuard {
    fn drop(&mut self) {
        self.calls.under_way.fetch_sub(1, Relaxed);
        if self.let_go && self.begun.elapsed() < LET_GO {
            self.calls.let_go.fetch_add(1, Relaxed);
        }
        match (&self.call, &self.server.relay) {
            (Some((call, kind)), _) => {
                self.server.calls.write().remove(&self.id);
                if *kind == Kind::Stream {
                    self.server.counters.streams.fetch_sub(1, Relaxed);
                }
                call.tell_end(&self.server.inbox);
            }
            (None, Some(relay)) => relay.over(self.id),
            (None, None) => {}
        }
        self.server.numbers.lock().give_back(self.id);
    }
}
