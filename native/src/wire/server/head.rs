//! The head of a request: what is called, by whom, in which encoding, for how long, and with what metadata.

use http::{HeaderMap, HeaderName, HeaderValue, Request};
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use super::Server;
use super::tokens::{Identities, identity};
use crate::wire::relay::HEALTH;
use crate::wire::status::Status;
use crate::wire::timeout::grpc_timeout;

const STREAM_PATH: &str = "/engram.v1.EngramService/Stream";
const STEP_PATH: &str = "/engram.v1.EngramService/Step";

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Its frames of steps are rows, all else is events.
    Stream,
    /// It is a row, or one event.
    Step,
    /// It is events.
    Other,
    Relayed,
    /// Relayed too, and no token is asked for.
    Health,
}

impl Kind {
    /// `relays`: there is a server behind, for what is no step.
    pub fn of(path: &str, relays: bool) -> Self {
        match path {
            STREAM_PATH => Kind::Stream,
            STEP_PATH => Kind::Step,
            _ if !relays => Kind::Other,
            _ if path.starts_with(HEALTH) => Kind::Health,
            _ => Kind::Relayed,
        }
    }
}

/// What is called; a query, if there is one, belongs to it, so that it names no method.
pub fn path_of<B>(request: &Request<B>) -> &str {
    request
        .uri()
        .path_and_query()
        .map_or("", |path| path.as_str())
}

/// What it says of a call that makes sense.
pub struct Head {
    pub kind: Kind,
    pub identity: Option<u32>, // None: no token is asked for
    pub gzip: bool,            // its messages may be compressed
    pub time: Option<Duration>,
}

/// What the head of a request says, or why the call is refused.
pub fn read_head(
    server: &Server,
    identities: &Identities,
    kind: Kind,
    headers: &HeaderMap,
) -> Result<Head, Status> {
    let bad_head = |code, words| {
        server.counters.bad_head.fetch_add(1, Relaxed);
        Status::new(code, words)
    };
    let identity = match identity(identities, headers) {
        Err(_) if kind == Kind::Health => None,
        Err(refusal) => return Err(server.refused(refusal)),
        Ok(identity) => identity,
    };
    let relayed = matches!(kind, Kind::Relayed | Kind::Health); // whose messages others unpack
    let gzip = match headers.get("grpc-encoding").map(HeaderValue::as_bytes) {
        None | Some(b"identity") => false,
        Some(_) if relayed => {
            return Err(bad_head(
                12,
                "Compression is for Stream and Step: of other calls it is not understood",
            ));
        }
        Some(b"gzip") => true,
        Some(_) => {
            return Err(bad_head(
                12,
                "of encodings, gzip and identity are understood",
            ));
        }
    };
    let time = match headers.get("grpc-timeout") {
        None => None,
        Some(value) => Some(
            grpc_timeout(value.as_bytes())
                .ok_or_else(|| bad_head(3, "grpc-timeout makes no sense"))?,
        ),
    };
    if time == Some(Duration::ZERO) {
        return Err(bad_head(4, "the call's time was up when it arrived"));
    }
    Ok(Head {
        kind,
        identity,
        gzip,
        time,
    })
}

/// What the caller sent beside what HTTP and gRPC need, its token left out; of a step, where it is traced from.
pub fn metadata(headers: &HeaderMap, kind: Kind) -> Vec<(String, String)> {
    let own = |name: &HeaderName| {
        let name = name.as_str();
        if kind == Kind::Step {
            return name == "traceparent";
        }
        !matches!(name, "te" | "content-type" | "authorization" | "user-agent")
            && !name.starts_with("grpc-")
    };
    let text = |value: &HeaderValue| value.to_str().map(str::to_owned).ok();
    headers
        .iter()
        .filter(|(name, _)| own(name))
        .filter_map(|(name, value)| Some((name.to_string(), text(value)?)))
        .collect()
}
