//! A call begins: it is refused, passed on to the server behind, or served.

use bytes::Bytes;
use h2::RecvStream;
use h2::server::SendResponse;
use http::{HeaderMap, Request};
use parking_lot::RwLockReadGuard;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;

use super::guard::{CallGuard, Calls};
use super::head::{Head, Kind, metadata, path_of, read_head};
use super::response::{refused, response};
use super::tokens::Identities;
use super::{Peer, Server};
use crate::wire::call::{Call, Reading};
use crate::wire::inbox::{Begun, Happening};
use crate::wire::messages::Messages;
use crate::wire::refusals::Refusal;
use crate::wire::relay::{Relay, Relayed};
use crate::wire::status::Status;
use crate::wire::strangers;

const UNAUTHENTICATED: u16 = 16;

/// Begins a call; false: its caller is not known.
pub fn begin(
    server: &Arc<Server>,
    request: Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
    peer: &Arc<Peer>,
    calls: &Arc<Calls>,
) -> bool {
    if !strangers::is_grpc(&request) {
        server.counters.bad_head.fetch_add(1, Relaxed);
        let time = Duration::from_secs_f64(server.limits.handshake_s);
        tokio::spawn(strangers::answer(request.into_body(), respond, time));
        return false;
    }
    let identities = server.identities.read();
    let path = path_of(&request);
    let kind = Kind::of(path, server.relay.is_some());
    let begun = read_head(server, &identities, kind, request.headers()).and_then(|head| {
        let place = place(server, kind)?;
        Ok((head, place))
    });
    let (head, place) = match begun {
        Ok(begun) => begun,
        Err(status) => {
            if status.code == UNAUTHENTICATED {
                let named = request.headers().contains_key("authorization");
                server.tell_refused(path, peer, named);
            }
            let _ = respond.send_response(refused(&status), true);
            return false;
        }
    };
    let known = identities.is_none() || head.identity.is_some();
    let admitted = Admitted {
        guard: CallGuard::new(server, calls),
        head,
        request,
        respond,
        server,
        peer,
        identities,
    };
    match (&server.relay, place) {
        (Some(relay), Some(place)) => admitted.pass_on(relay, place),
        _ => admitted.serve(),
    }
    known
}

/// A place among the calls that are relayed. None: it needs none.
fn place(server: &Server, kind: Kind) -> Result<Option<OwnedSemaphorePermit>, Status> {
    let places = match (&server.relay, kind) {
        (Some(relay), Kind::Relayed) => &relay.places,
        (Some(relay), Kind::Health) => &relay.health_places,
        _ => return Ok(None),
    };
    let place = places.clone().try_acquire_owned();
    place
        .map(Some)
        .map_err(|_| server.refused(Refusal::QueueFull))
}

/// A call that is let in.
struct Admitted<'a> {
    guard: CallGuard,
    head: Head,
    request: Request<RecvStream>,
    respond: SendResponse<Bytes>,
    server: &'a Arc<Server>,
    peer: &'a Arc<Peer>,
    identities: RwLockReadGuard<'a, Identities>, // until the call is among those that a new table ends
}

impl Admitted<'_> {
    fn pass_on(self, relay: &Relay, place: OwnedSemaphorePermit) {
        relay.ever.fetch_add(1, Relaxed);
        let revoked = match self.head.kind {
            Kind::Health => Arc::default(),
            _ => relay.begin(self.guard.id, self.head.identity),
        };
        drop(self.identities);
        let (head, body) = self.request.into_parts();
        let call = Relayed {
            head,
            body,
            respond: self.respond,
            identity: self.head.identity,
            peer: self.peer.clone(),
            time: self.head.time,
            message_nbytes: self.server.limits.message_nbytes,
        };
        let (server, guard) = (self.server.clone(), self.guard);
        tokio::spawn(async move {
            let (mut guard, _place) = (guard, place);
            if let Some(relay) = &server.relay {
                guard.let_go = !relay.serve(call, &revoked, &server).await;
            }
        });
    }

    fn serve(self) {
        let (server, mut guard) = (self.server, self.guard);
        let Head {
            kind,
            identity,
            gzip,
            time,
        } = self.head;
        let none = HeaderMap::new();
        let head = response(match kind {
            Kind::Stream => &server.head,
            _ => &none,
        });
        let call = Call::new(
            guard.id,
            identity,
            self.respond,
            head,
            &server.limits,
            self.peer.times.clone(),
        );
        server.calls.write().insert(guard.id, call.clone());
        drop(self.identities);
        guard.call = Some((call.clone(), kind));
        let messages = Messages::new(gzip, server.limits.message_nbytes);
        let begun = Box::new(Begun {
            path: path_of(&self.request).to_owned(),
            identity,
            metadata: metadata(self.request.headers(), kind),
            timeout_ms: time.map(|time| time.as_millis() as u64),
            peer: self.peer.clone(),
        });
        let reading = match kind {
            Kind::Step => {
                server.counters.steps.fetch_add(1, Relaxed);
                Reading::Step(begun)
            }
            Kind::Stream => {
                server.counters.streams.fetch_add(1, Relaxed);
                call.tell(&server.inbox, Happening::Begin(begun));
                call.begin();
                Reading::Stream
            }
            _ => {
                call.tell(&server.inbox, Happening::Begin(begun));
                Reading::Messages
            }
        };
        let body = self.request.into_body();
        tokio::spawn(async move {
            let mut guard = guard;
            let serving = call.serve(&guard.server, body, messages, reading, time);
            let served = serving.await;
            if served.refused.is_some() {
                guard.server.counters.bad_message.fetch_add(1, Relaxed);
            }
            // A unary step that its caller has no time for costs nothing but a row.
            guard.let_go = !served.whole && kind != Kind::Step;
        });
    }
}
