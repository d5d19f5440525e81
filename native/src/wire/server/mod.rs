//! The server of the wire: what all of its connections and calls share.

mod connection;
mod counters;
mod dispatch;
mod guard;
mod head;
mod limits;
mod listener;
mod peer;
mod response;
mod tokens;

use http::HeaderMap;
use parking_lot::{Mutex, RwLock};
use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use tokio::sync::{Semaphore, watch};
use tokio::time::Instant;
use tokio_rustls::TlsAcceptor;

#[cfg(feature = "fuzzing")]
pub use connection::connection;
pub use counters::Counters;
pub use limits::Limits;
pub use listener::{Listener, Socket, listen};
pub use peer::Peer;
pub use response::{header_map, refused};

use super::call::Call;
use super::inbox::{Begun, Happening, Inbox};
use super::numbers::Numbers;
use super::refusals::{Refusal, Refusals};
use super::relay::Relay;
use super::status::Status;
use super::steps::{CALL, Known};
use super::times::Written;
use tokens::Identities;

const TOLD_MS: u64 = 200;

pub struct Server {
    pub inbox: Inbox,
    pub counters: Counters,
    pub written: Arc<Written>,
    pub limits: Limits,
    pub calls: RwLock<HashMap<u32, Arc<Call>>>,
    refusals: Refusals,
    pub relay: Option<Relay>, // for calls that are not steps; None: all are Python's
    head: HeaderMap,          // of every stream's response
    identities: RwLock<Identities>,
    pub known: Known, // of unary steps that become rows
    tls: RwLock<Option<TlsAcceptor>>,
    numbers: Mutex<Numbers>,
    begun: Instant,
    told: AtomicU64, // when Python may next be told of a refused caller, in ms
    places: Arc<Semaphore>,
    pub draining: watch::Sender<bool>,
}

impl Server {
    pub fn new(
        limits: Limits,
        head: HeaderMap,
        refusals: Refusals,
        relay: Option<Relay>,
        written: Written,
    ) -> io::Result<Self> {
        Ok(Server {
            inbox: Inbox::new(limits.inbox_nbytes)?,
            counters: Counters::default(),
            written: Arc::new(written),
            calls: RwLock::new(HashMap::new()),
            head,
            refusals,
            relay,
            identities: RwLock::new(None),
            known: Known::new(limits.step_s),
            tls: RwLock::new(None),
            numbers: Mutex::default(),
            begun: Instant::now(),
            told: AtomicU64::new(0),
            places: Arc::new(Semaphore::new(limits.connections)),
            draining: watch::Sender::new(false),
            limits,
        })
    }

    pub fn call(&self, id: u32) -> Option<Arc<Call>> {
        self.calls.read().get(&(id & !CALL)).cloned()
    }

    /// From now on; connections that are there keep what they have.
    pub fn set_tls(&self, tls: Option<TlsAcceptor>) {
        *self.tls.write() = tls;
    }

    /// Replaces the table of tokens; calls of those that are not in it any more end.
    pub fn set_identities(&self, identities: Identities) {
        let known: HashSet<u32> = identities
            .iter()
            .flat_map(|table| table.values().copied())
            .collect();
        let open = identities.is_none();
        let ends = |identity: Option<u32>| {
            !open && !identity.is_some_and(|identity| known.contains(&identity))
        };
        *self.identities.write() = identities;
        for call in self.calls.read().values() {
            if ends(call.identity) {
                call.finish(self.refused(Refusal::TokenRevoked));
            }
        }
        if let Some(relay) = &self.relay {
            relay.end(ends);
        }
    }

    /// Counts what is refused, and says how.
    pub fn refused(&self, refusal: Refusal) -> Status {
        self.counters.refused(refusal);
        self.refusals.status(refusal)
    }

    /// Tells Python of a caller without a token that is known, of one in a while: all of them are counted.
    fn tell_refused(&self, path: &str, peer: &Arc<Peer>, named: bool) {
        let reason = if named {
            "TOKEN_UNKNOWN"
        } else {
            "TOKEN_MISSING"
        };
        let now = self.begun.elapsed().as_millis() as u64;
        let before = self.told.load(Relaxed);
        if now >= before
            && self
                .told
                .compare_exchange(before, now + TOLD_MS, Relaxed, Relaxed)
                .is_ok()
        {
            self.inbox.push(
                0,
                Happening::Refused(Box::new(Begun {
                    path: path.to_owned(),
                    identity: None,
                    metadata: vec![("reason".to_owned(), reason.to_owned())],
                    timeout_ms: None,
                    peer: peer.clone(),
                })),
            );
        }
    }
}
