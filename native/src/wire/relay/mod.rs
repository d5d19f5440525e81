//! Calls that another server answers: passed on at HTTP/2 level, over a unix socket, to a gRPC server that listens there.
//!
//! Nothing of a message is read but its length. What has come from one side and not gone to the other is bounded by the windows.

mod lanes;
mod lengths;
mod passing;
mod request;

use bytes::Bytes;
use h2::server::SendResponse;
use h2::{Reason, RecvStream};
use http::Request;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;
use tokio::sync::{Notify, Semaphore};

use super::refusals::Refusal;
use super::server::{Peer, Server};
use super::status::Status;
use lanes::Lanes;
use lengths::Lengths;
use passing::{Answer, End, send_down, send_up};
use request::rewritten;

/// Health is open to all, for a load balancer has no token.
pub const HEALTH: &str = "/grpc.health.v1.Health/";

/// The server behind, and the calls that it answers.
pub struct Relay {
    lanes: Lanes,
    most: usize, // of calls at a time
    pub places: Arc<Semaphore>,
    pub health_places: Arc<Semaphore>, // others: who has no token takes none of those who have one
    pub ever: AtomicU64,
    under_way: Mutex<HashMap<u32, Held>>,
}

/// A call that ends with its token.
struct Held {
    identity: Option<u32>,
    revoked: Arc<Notify>,
}

/// A call that is to be relayed.
pub struct Relayed {
    pub head: http::request::Parts,
    pub body: RecvStream,
    pub respond: SendResponse<Bytes>,
    pub identity: Option<u32>,
    pub peer: Arc<Peer>,
    pub time: Option<Duration>,
    pub message_nbytes: usize,
}

impl Relay {
    pub fn new(path: PathBuf, places: usize) -> Self {
        Relay {
            lanes: Lanes::new(path),
            most: places,
            places: Arc::new(Semaphore::new(places)),
            health_places: Arc::new(Semaphore::new(places)),
            ever: AtomicU64::new(0),
            under_way: Mutex::default(),
        }
    }

    /// How many calls are relayed.
    pub fn now(&self) -> usize {
        2 * self.most - self.places.available_permits() - self.health_places.available_permits()
    }

    /// From now on `end` ends the call too.
    pub fn begin(&self, id: u32, identity: Option<u32>) -> Arc<Notify> {
        let revoked = Arc::new(Notify::new());
        let held = Held {
            identity,
            revoked: revoked.clone(),
        };
        self.under_way.lock().insert(id, held);
        revoked
    }

    pub fn over(&self, id: u32) {
        self.under_way.lock().remove(&id);
    }

    /// Ends the calls of which `ends` says so.
    pub fn end(&self, ends: impl Fn(Option<u32>) -> bool) {
        for held in self.under_way.lock().values() {
            if ends(held.identity) {
                held.revoked.notify_one();
            }
        }
    }

    /// Relays a call until it is over. `revoked`: its token is in the table no more.
    /// Returns whether the call was answered; false: its caller has gone.
    pub async fn serve(&self, call: Relayed, revoked: &Notify, server: &Server) -> bool {
        let mut answer = Answer::new(call.respond);
        let request = match rewritten(call.head, call.identity, &call.peer) {
            Ok(request) => request,
            Err(status) => {
                answer.finish(status);
                return true;
            }
        };
        let late = async {
            match call.time {
                Some(time) => tokio::time::sleep(time).await,
                None => std::future::pending().await,
            }
        };
        let lengths = Lengths::new(call.message_nbytes);
        let end = tokio::select! {
            biased;
            () = revoked.notified() => Err(End::Status(server.refused(Refusal::TokenRevoked))),
            end = self.exchange(request, call.body, lengths, &mut answer, server) => end,
            () = late => Err(End::Status(Status::new(4, "the time of the call is up"))),
        };
        // The server behind has been told to stop where it had not come to its end: what it was called with is dropped by now.
        let whole = !matches!(end, Err(End::Gone));
        match end {
            Ok(()) => {}
            Err(End::Gone) => answer.reset(Reason::CANCEL),
            Err(End::Reset(reason)) => answer.reset(reason),
            Err(End::TooLarge(status)) => {
                server.counters.bad_message.fetch_add(1, Relaxed);
                answer.finish(status);
            }
            Err(End::Status(status)) => answer.finish(status),
        }
        whole
    }

    async fn exchange(
        &self,
        request: Request<()>,
        body: RecvStream,
        lengths: Lengths,
        answer: &mut Answer,
        server: &Server,
    ) -> Result<(), End> {
        let unavailable = || End::Status(server.refused(Refusal::RelayUnavailable));
        let (mut sender, _place) = self.lanes.place().await.ok_or_else(unavailable)?;
        let all = body.is_end_stream();
        let (response, upload) = sender
            .send_request(request, all)
            .map_err(|_| unavailable())?;
        let uploading = async {
            if all {
                Ok(())
            } else {
                send_up(body, upload, lengths).await
            }
        };
        let downloading = send_down(response, answer, unavailable);
        let (mut uploading, mut downloading) =
            (std::pin::pin!(uploading), std::pin::pin!(downloading));
        let mut sent = false;
        loop {
            tokio::select! {
                end = &mut uploading, if !sent => { end?; sent = true }
                end = &mut downloading => return end,
            }
        }
    }
}
