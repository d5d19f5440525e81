//! Calls that another server answers: passed on at HTTP/2 level, over a unix socket, to a gRPC server that listens there.
//!
//! Nothing of a message is read but its length. What has come from one side and not gone to the other is bounded by the windows.

use bytes::Bytes;
use h2::client::{Builder, ResponseFuture, SendRequest};
use h2::server::SendResponse;
use h2::{Reason, RecvStream, SendStream};
use http::uri::{Authority, PathAndQuery, Scheme, Uri};
use http::{HeaderMap, HeaderValue, Request, Response, request, uri};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::future::poll_fn;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::{Notify, Semaphore};
use tokio::time::timeout;

use super::frames::PREFIX;
use super::refusals::Refusal;
use super::server::{Peer, Server};
use super::status::Status;

/// Health is open to all, for a load balancer has no token.
pub const HEALTH: &str = "/grpc.health.v1.Health/";
/// What tells the server behind who calls. Headers that a client sends under these names are dropped.
const IDENTITY: &str = "engram-identity";
const PEER: &str = "engram-peer";
const TLS: &str = "engram-tls";

const CALLS_PER_LANE: usize = 100; // what gRPC servers are used to
const WINDOW: u32 = 128 << 10; // of a call, towards us
const WINDOW_LANE: u32 = CALLS_PER_LANE as u32 * WINDOW; // so that a call whose caller does not read holds up no other one
const SMALL_FRAMES: usize = 2 * WINDOW_LANE as usize;
const HEADER_NBYTES: u32 = 256 << 10; // of an answer
const CONNECT: Duration = Duration::from_secs(5);
const TRIES: usize = 3; // to find a connection that still takes calls

/// The connections to the server behind, and the calls on them.
pub struct Relay {
    path: PathBuf,
    lanes: Mutex<Vec<Arc<Lane>>>,
    connecting: tokio::sync::Mutex<()>,
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

/// One connection.
struct Lane {
    sender: SendRequest<Bytes>,
    calls: AtomicUsize,
    broken: Arc<AtomicBool>,
}

/// A place on a lane, until the call is over.
struct Place(Arc<Lane>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Relaxed);
    }
}

/// How a call ends that is not answered whole.
enum End {
    /// Its caller has gone.
    Gone,
    /// The server behind reset it.
    Reset(Reason),
    /// A message of it is too large.
    TooLarge(Status),
    Status(Status),
}

/// A call that is to be relayed.
pub struct Relayed {
    pub head: request::Parts,
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
            path,
            lanes: Mutex::default(),
            connecting: tokio::sync::Mutex::default(),
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

    /// From now on `end` ends the call, if `ends` says so of its identity.
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
        let mut answer = Answer {
            respond: call.respond,
            stream: None,
        };
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
        let (mut sender, _place) = self.place().await.ok_or_else(unavailable)?;
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

    /// A place on a connection that takes calls; one is made where there is none. None: nobody listens.
    async fn place(&self) -> Option<(SendRequest<Bytes>, Place)> {
        for _ in 0..TRIES {
            let place = match self.free() {
                Some(place) => place,
                None => {
                    let _alone = self.connecting.lock().await;
                    match self.free() {
                        Some(place) => place, // somebody else has made it meanwhile
                        None => self.connect().await?,
                    }
                }
            };
            match place.0.sender.clone().ready().await {
                Ok(sender) => return Some((sender, place)),
                Err(_) => place.0.broken.store(true, Relaxed),
            }
        }
        None
    }

    fn free(&self) -> Option<Place> {
        let mut lanes = self.lanes.lock();
        lanes.retain(|lane| !lane.broken.load(Relaxed));
        let free = lanes.iter().find(|lane| {
            lane.calls.load(Relaxed) < lane.sender.current_max_send_streams().min(CALLS_PER_LANE)
        })?;
        free.calls.fetch_add(1, Relaxed);
        Some(Place(free.clone()))
    }

    async fn connect(&self) -> Option<Place> {
        let connected = timeout(CONNECT, async {
            let socket = UnixStream::connect(&self.path).await.ok()?;
            Builder::new()
                .initial_window_size(WINDOW)
                .initial_connection_window_size(WINDOW_LANE)
                .data_frame_budget(SMALL_FRAMES)
                .max_header_list_size(HEADER_NBYTES)
                .enable_push(false)
                .handshake::<_, Bytes>(socket)
                .await
                .ok()
        });
        let (sender, connection) = connected.await.ok().flatten()?;
        let broken = Arc::new(AtomicBool::new(false));
        let lane = Arc::new(Lane {
            sender,
            calls: AtomicUsize::new(1),
            broken: broken.clone(),
        });
        tokio::spawn(async move {
            let _ = connection.await;
            broken.store(true, Relaxed);
        });
        self.lanes.lock().push(lane.clone());
        Some(Place(lane))
    }
}

/// The request as the server behind gets it.
fn rewritten(
    mut head: request::Parts,
    identity: Option<u32>,
    peer: &Peer,
) -> Result<Request<()>, Status> {
    let path = head.uri.path_and_query().cloned();
    let path = path
        .filter(|path| path.as_str().starts_with('/'))
        .ok_or_else(|| Status::new(12, "the path names no method"))?;
    head.uri = uri_of(path).ok_or_else(|| Status::new(12, "the path names no method"))?;
    head.version = http::Version::HTTP_2;
    head.extensions = http::Extensions::new();
    let headers = &mut head.headers;
    for name in [
        "authorization",
        "host",
        "content-length",
        IDENTITY,
        PEER,
        TLS,
    ] {
        headers.remove(name);
    }
    headers.insert("te", HeaderValue::from_static("trailers"));
    if let Some(identity) = identity {
        headers.insert(IDENTITY, HeaderValue::from(identity));
    }
    if let Ok(address) = HeaderValue::from_str(&peer.address) {
        headers.insert(PEER, address);
    }
    if let Some(version) = peer.tls {
        headers.insert(TLS, HeaderValue::from_static(version));
    }
    Ok(Request::from_parts(head, ()))
}

fn uri_of(path: PathAndQuery) -> Option<Uri> {
    let mut parts = uri::Parts::default();
    parts.scheme = Some(Scheme::HTTP);
    parts.authority = Some(Authority::from_static("localhost"));
    parts.path_and_query = Some(path);
    Uri::from_parts(parts).ok()
}

/// Passes the caller's bytes on as fast as they are taken. Err: why the call ends.
async fn send_up(
    mut body: RecvStream,
    mut upload: SendStream<Bytes>,
    mut lengths: Lengths,
) -> Result<(), End> {
    while let Some(chunk) = body.data().await {
        let chunk = chunk.map_err(|_| End::Gone)?;
        lengths.feed(&chunk).map_err(End::TooLarge)?;
        let length = chunk.len();
        if !pass(&mut upload, chunk).await {
            return Ok(()); // the answer, which is then whole, says why no more is wanted
        }
        let _ = body.flow_control().release_capacity(length);
    }
    let _ = upload.send_data(Bytes::new(), true);
    Ok(())
}

/// Passes the answer on as fast as the caller reads. Err: why the call ends.
async fn send_down(
    response: ResponseFuture,
    answer: &mut Answer,
    unavailable: impl Fn() -> End,
) -> Result<(), End> {
    let broken = |error: h2::Error| match error.reason() {
        Some(reason) if error.is_reset() && error.is_remote() => End::Reset(reason),
        _ => unavailable(),
    };
    let response = tokio::select! {
        response = response => response.map_err(broken)?,
        () = answer.gone() => return Err(End::Gone),
    };
    let (head, mut body) = response.into_parts();
    let mut response = Response::from_parts(head, ());
    *response.version_mut() = http::Version::HTTP_2;
    response.extensions_mut().clear();
    let all = body.is_end_stream();
    if !answer.begin(response, all) {
        return Err(End::Gone);
    }
    if all {
        return Ok(());
    }
    loop {
        let chunk = tokio::select! {
            chunk = body.data() => chunk,
            () = answer.gone() => return Err(End::Gone),
        };
        let Some(chunk) = chunk else { break };
        let chunk = chunk.map_err(broken)?;
        let length = chunk.len();
        if !answer.pass(chunk).await {
            return Err(End::Gone);
        }
        let _ = body.flow_control().release_capacity(length);
    }
    let trailers = tokio::select! {
        trailers = body.trailers() => trailers.map_err(broken)?,
        () = answer.gone() => return Err(End::Gone),
    };
    answer.end(trailers)
}

/// Sends data in the parts for which there is a window. False: the other side takes no more of it.
async fn pass(stream: &mut SendStream<Bytes>, mut data: Bytes) -> bool {
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        let Some(Ok(part)) = poll_fn(|context| stream.poll_capacity(context)).await else {
            return false;
        };
        let part = data.split_to(part.min(data.len()));
        if !part.is_empty() && stream.send_data(part, false).is_err() {
            return false;
        }
    }
    true
}

/// What goes back to the caller.
struct Answer {
    respond: SendResponse<Bytes>,
    stream: Option<SendStream<Bytes>>, // once the head is sent
}

impl Answer {
    fn begin(&mut self, response: Response<()>, all: bool) -> bool {
        match self.respond.send_response(response, all) {
            Ok(stream) => {
                self.stream = Some(stream);
                true
            }
            Err(_) => false,
        }
    }

    async fn pass(&mut self, data: Bytes) -> bool {
        match &mut self.stream {
            Some(stream) => pass(stream, data).await,
            None => false,
        }
    }

    fn end(&mut self, trailers: Option<HeaderMap>) -> Result<(), End> {
        let stream = self.stream.as_mut().ok_or(End::Gone)?;
        match trailers {
            Some(trailers) => stream.send_trailers(trailers),
            None => stream.send_data(Bytes::new(), true),
        }
        .map_err(|_| End::Gone)
    }

    /// Returns when the caller has reset the call, or its connection is gone.
    async fn gone(&mut self) {
        poll_fn(|context| self.poll_gone(context)).await
    }

    fn poll_gone(&mut self, context: &mut Context) -> Poll<()> {
        match &mut self.stream {
            Some(stream) => stream.poll_reset(context),
            None => self.respond.poll_reset(context),
        }
        .map(drop)
    }

    fn finish(&mut self, status: Status) {
        match &mut self.stream {
            Some(stream) => drop(stream.send_trailers(status.headers())),
            None => drop(
                self.respond
                    .send_response(super::server::refused(&status), true),
            ),
        }
    }

    fn reset(&mut self, reason: Reason) {
        match &mut self.stream {
            Some(stream) => stream.send_reset(reason),
            None => self.respond.send_reset(reason),
        }
    }
}

/// Reads the prefixes of the messages that pass, and nothing else of them.
struct Lengths {
    prefix: [u8; PREFIX],
    read: usize, // of the prefix
    left: usize, // of the message
    most: usize,
}

impl Lengths {
    fn new(most: usize) -> Self {
        Lengths {
            prefix: [0; PREFIX],
            read: 0,
            left: 0,
            most,
        }
    }

    fn feed(&mut self, mut data: &[u8]) -> Result<(), Status> {
        while !data.is_empty() {
            let skipped = self.left.min(data.len());
            self.left -= skipped;
            data = &data[skipped..];
            let part = (PREFIX - self.read).min(data.len());
            self.prefix[self.read..self.read + part].copy_from_slice(&data[..part]);
            self.read += part;
            data = &data[part..];
            if self.read == PREFIX {
                let [_, length @ ..] = self.prefix;
                (self.read, self.left) = (0, u32::from_be_bytes(length) as usize);
                if self.left > self.most {
                    let (length, most) = (self.left, self.most);
                    let why = format!("a message has {length} bytes; at most {most} are taken");
                    return Err(Status::new(8, why));
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::frames::prefixed;
    use super::*;

    #[test]
    fn lengths_are_read_however_the_bytes_are_split() {
        let sizes = [0, 1, 300, 0, 1000, 5];
        let data: Vec<u8> = sizes
            .iter()
            .flat_map(|size| prefixed(&vec![255; *size]).to_vec())
            .collect();
        for piece in 1..data.len() + 1 {
            for (most, fits) in [(1000, true), (999, false)] {
                let mut lengths = Lengths::new(most);
                let fed = data
                    .chunks(piece)
                    .try_for_each(|chunk| lengths.feed(chunk))
                    .is_ok();
                assert_eq!(fed, fits, "in pieces of {piece}");
            }
        }
    }

    #[test]
    fn a_caller_says_neither_who_it_is_nor_where_the_call_goes() {
        let request = Request::post("https://elsewhere/a.B/C?d=e")
            .header("authorization", "Bearer secret")
            .header("host", "elsewhere")
            .header("engram-identity", "1")
            .header("engram-identity", "2")
            .header("engram-peer", "ipv4:6.6.6.6:6")
            .header("engram-tls", "TLSv1.3")
            .header("x", "kept")
            .body(())
            .unwrap();
        let peer = Peer {
            address: "ipv4:1.2.3.4:5".into(),
            ..Peer::default()
        };
        let relayed = rewritten(request.into_parts().0, None, &peer).unwrap();
        assert_eq!(relayed.uri(), "http://localhost/a.B/C?d=e");
        let headers = relayed.headers();
        let names: Vec<_> = headers.keys().map(|name| name.as_str()).collect();
        assert_eq!(
            (headers.len(), &headers["engram-peer"]),
            (3, &HeaderValue::from_static("ipv4:1.2.3.4:5")),
            "{names:?}"
        );
        assert!(headers.contains_key("x") && headers.contains_key("te"));
    }
}
