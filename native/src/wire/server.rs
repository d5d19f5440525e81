//! Connections: taken from listening sockets, limited, kept alive, and let go. Each call of theirs is served in call.rs.

use bytes::Bytes;
use h2::Reason;
use h2::server::{Builder, Connection, SendResponse};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use parking_lot::{Mutex, RwLock};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ProtocolVersion;

use super::allowance::Allowance;
use super::call::{Call, Reading};
use super::counted::Counted;
use super::inbox::{Begun, Happening, Inbox};
use super::messages::Messages;
use super::numbers::Numbers;
use super::preface::{self, Prefaced};
use super::refusals::{Refusal, Refusals};
use super::relay::{HEALTH, Relay, Relayed};
use super::status::Status;
use super::steps::{CALL, Known};
use super::strangers;
use super::timeout::grpc_timeout;
use super::times::{Times, Written};

const STREAM_PATH: &str = "/engram.v1.EngramService/Stream";
const STEP_PATH: &str = "/engram.v1.EngramService/Step";
const WINDOW_BEFORE: u32 = 64 << 10; // of a connection whose caller is not known yet
const WINDOW_STREAM: u32 = 1 << 20; // afterwards
const WINDOW_CONNECTION: u32 = 4 << 20;
const SMALL_FRAMES: usize = 2 * WINDOW_CONNECTION as usize; // an honest client's small DATA frames may fill the window
const LET_GO: Duration = Duration::from_secs(1); // a call that lived longer was worth its work
const ACCEPT_PAUSE: Duration = Duration::from_millis(50); // when there is no descriptor for another connection

/// What is allowed. Times are in seconds.
#[derive(Clone, Debug)]
pub struct Limits {
    pub connections: usize,
    pub calls: u32,            // of a connection at a time
    pub header_nbytes: u32,    // of a call
    pub message_nbytes: usize, // compressed and not
    pub rows: usize,           // of a stream that are under way
    pub inbox_nbytes: usize,   // that have come and are not taken
    pub handshake_s: f64,      // until TLS and HTTP/2 are agreed upon
    pub idle_s: f64,           // without a call
    pub step_s: f64,           // that a unary step may take
    pub keepalive_s: f64, // between questions whether the peer is still there, and until it has answered
    pub resets: usize, // of calls that the server has not looked at; a second of others, or 2 * calls
    pub frame_rows: usize, // of a frame of steps; one with more, or with more bytes, is Python's to refuse
    pub frame_nbytes: usize,
}

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

/// The other end of a connection.
#[derive(Default)]
pub struct Peer {
    pub address: String,           // as gRPC spells it
    pub tls: Option<&'static str>, // its version
    pub times: Arc<Times>,
}

/// A token is known by its SHA-256. None: no call needs one.
pub type Identities = Option<HashMap<[u8; 32], u32>>;

const UNAUTHENTICATED: u16 = 16;
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
        let known: std::collections::HashSet<u32> = identities
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

    /// Who calls, by this table.
    fn identity(
        &self,
        identities: &Identities,
        headers: &HeaderMap,
    ) -> Result<Option<u32>, Refusal> {
        let Some(table) = identities else {
            return Ok(None);
        };
        let bearer = |value: &HeaderValue| {
            let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
            let token = token.trim();
            (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty())
                .then(|| <[u8; 32]>::from(Sha256::digest(token)))
        };
        let token = headers.get_all("authorization").iter().find_map(bearer);
        let token = token.ok_or(Refusal::TokenMissing)?;
        let found = table.get(&token).copied().map(Some);
        found.ok_or(Refusal::TokenUnknown)
    }

    /// A place among the calls that are relayed. None: it needs none.
    fn place(&self, kind: Kind) -> Result<Option<OwnedSemaphorePermit>, Status> {
        let places = match (&self.relay, kind) {
            (Some(relay), Kind::Relayed) => &relay.places,
            (Some(relay), Kind::Health) => &relay.health_places,
            _ => return Ok(None),
        };
        let place = places.clone().try_acquire_owned();
        place
            .map(Some)
            .map_err(|_| self.refused(Refusal::QueueFull))
    }

    fn kind(&self, path: &str) -> Kind {
        match path {
            STREAM_PATH => Kind::Stream,
            STEP_PATH => Kind::Step,
            _ if self.relay.is_none() => Kind::Other,
            _ if path.starts_with(HEALTH) => Kind::Health,
            _ => Kind::Relayed,
        }
    }
}

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
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

/// A listening socket.
pub enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener),
}

/// Takes connections until the server drains.
pub async fn listen(server: Arc<Server>, listener: Listener) {
    let mut draining = server.draining.subscribe();
    loop {
        let accepted = tokio::select! {
            biased;
            _ = draining.wait_for(|draining| *draining) => return,
            accepted = accept(&listener) => accepted,
        };
        match accepted {
            Err(_) => tokio::time::sleep(ACCEPT_PAUSE).await,
            Ok(socket) => match server.places.clone().try_acquire_owned() {
                Err(_) => drop((socket, server.counters.turned_away.fetch_add(1, Relaxed))),
                Ok(place) => drop(tokio::spawn(connection(server.clone(), socket, place))),
            },
        }
    }
}

pub trait Socket: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Socket for T {}

async fn accept(listener: &Listener) -> io::Result<(Box<dyn Socket>, String)> {
    Ok(match listener {
        Listener::Tcp(listener) => {
            let (socket, address) = listener.accept().await?;
            socket.set_nodelay(true)?;
            (Box::new(socket), spelled(address))
        }
        Listener::Unix(listener) => (Box::new(listener.accept().await?.0), "unix:".into()),
    })
}

/// An address as gRPC has it.
fn spelled(address: SocketAddr) -> String {
    let port = address.port();
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => format!("ipv4:{ip}:{port}"),
        IpAddr::V6(ip) => format!("ipv6:%5B{ip}%5D:{port}"),
    }
}

pub async fn connection(
    server: Arc<Server>,
    (socket, address): (Box<dyn Socket>, String),
    _place: OwnedSemaphorePermit,
) {
    server.counters.accepted.fetch_add(1, Relaxed);
    server.counters.connections.fetch_add(1, Relaxed);
    let time = Duration::from_secs_f64(server.limits.handshake_s);
    let times = Times::new(server.written.clone());
    match timeout(time, handshake(&server, socket, times.clone())).await {
        Ok(Some((connection, tls))) => {
            let peer = Peer {
                address,
                tls,
                times,
            };
            serve(&server, connection, Arc::new(peer)).await
        }
        _ => drop(server.counters.failed.fetch_add(1, Relaxed)),
    }
    server.counters.connections.fetch_sub(1, Relaxed);
}

type Http = Connection<Prefaced<Counted>, Bytes>;

async fn handshake(
    server: &Arc<Server>,
    socket: Box<dyn Socket>,
    times: Arc<Times>,
) -> Option<(Http, Option<&'static str>)> {
    let acceptor = server.tls.read().clone();
    let (socket, tls): (Box<dyn Socket>, _) = match acceptor {
        Some(acceptor) => {
            let Ok(socket) = acceptor.accept(socket).await else {
                server.counters.tls_failed.fetch_add(1, Relaxed);
                return None;
            };
            let (version, count) = match socket.get_ref().1.protocol_version() {
                Some(ProtocolVersion::TLSv1_3) => ("TLSv1.3", &server.counters.tls_1_3),
                _ => ("TLSv1.2", &server.counters.tls_1_2),
            };
            count.fetch_add(1, Relaxed);
            (Box::new(socket), Some(version))
        }
        None => (socket, None),
    };
    let counted = Counted {
        socket,
        server: server.clone(),
        times,
    };
    let socket = preface::begun(counted).await.ok()?;
    let connection = Builder::new()
        .initial_window_size(WINDOW_BEFORE)
        .initial_connection_window_size(WINDOW_BEFORE)
        .data_frame_budget(SMALL_FRAMES)
        .max_concurrent_streams(server.limits.calls)
        .max_header_list_size(server.limits.header_nbytes)
        .max_pending_accept_reset_streams(server.limits.resets)
        .max_local_error_reset_streams(Some(server.limits.resets))
        .handshake(socket)
        .await
        .ok()?;
    Some((connection, tls))
}

async fn serve(server: &Arc<Server>, mut connection: Http, peer: Arc<Peer>) {
    let limits = &server.limits;
    let mut draining = server.draining.subscribe();
    let mut pings = connection.ping_pong();
    let (keepalive, idle) = (
        Duration::from_secs_f64(limits.keepalive_s),
        Duration::from_secs_f64(limits.idle_s),
    );
    let mut look = tokio::time::interval_at(Instant::now() + keepalive, keepalive);
    let calls = Arc::new(Calls::default());
    // Whoever has all of its calls under way may let go of them at once, and begin anew.
    let mut resets = Allowance::new(limits.resets.max(2 * limits.calls as usize));
    let (mut used, mut known, mut asked, mut going) = (Instant::now(), false, false, false);
    loop {
        let accepted = tokio::select! {
            accepted = connection.accept() => accepted,
            pong = async { std::future::poll_fn(|context| pings.as_mut().expect("it is taken once").poll_pong(context)).await }, if asked && pings.is_some() => {
                asked = false;
                if pong.is_err() { return }
                continue;
            }
            _ = look.tick() => {
                if asked { return } // the peer is gone, and whatever lies between has not said so
                asked = pings.as_mut().is_some_and(|pings| pings.send_ping(h2::Ping::opaque()).is_ok());
                if calls.under_way.load(Relaxed) > 0 { used = Instant::now() }
                if !going && used.elapsed() >= idle { going = true; connection.graceful_shutdown() }
                continue;
            }
            _ = draining.wait_for(|draining| *draining), if !going => {
                going = true;
                connection.graceful_shutdown();
                continue;
            }
        };
        let (request, respond) = match accepted {
            None => return,
            Some(Err(error)) => {
                if error.reason() == Some(Reason::ENHANCE_YOUR_CALM) && !error.is_remote() {
                    server.counters.resets.fetch_add(1, Relaxed);
                }
                return;
            }
            Some(Ok(accepted)) => accepted,
        };
        used = Instant::now();
        if !going && !resets.allows(calls.let_go.load(Relaxed), used) {
            server.counters.resets.fetch_add(1, Relaxed);
            going = true;
            connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
            continue;
        }
        if begin(server, request, respond, &peer, &calls) && !known {
            known = true;
            connection.set_target_window_size(WINDOW_CONNECTION);
            let _ = connection.set_initial_window_size(WINDOW_STREAM);
        }
    }
}

/// Begins a call; false: its caller is not known.
fn begin(
    server: &Arc<Server>,
    request: Request<h2::RecvStream>,
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
    let identities = server.identities.read(); // until the call is among those that a new table ends
    // With its query, if there is one, which names no method.
    let path = request
        .uri()
        .path_and_query()
        .map_or("", |path| path.as_str());
    let kind = server.kind(path);
    let begun = read_head(server, &identities, kind, request.headers()).and_then(|read| {
        let place = server.place(kind)?;
        Ok((read, place))
    });
    let (read, place) = match begun {
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
    let known = identities.is_none() || read.identity.is_some();
    let id = server.numbers.lock().take();
    calls.under_way.fetch_add(1, Relaxed);
    let mut over = Over {
        server: server.clone(),
        calls: calls.clone(),
        begun: Instant::now(),
        let_go: false,
        call: None,
        id,
    };
    if let (Some(relay), Some(place)) = (&server.relay, place) {
        relay.ever.fetch_add(1, Relaxed);
        let revoked = match kind {
            Kind::Health => Arc::default(),
            _ => relay.begin(id, read.identity),
        };
        drop(identities);
        let (head, body) = request.into_parts();
        let call = Relayed {
            head,
            body,
            respond,
            identity: read.identity,
            peer: peer.clone(),
            time: read.time,
            message_nbytes: server.limits.message_nbytes,
        };
        let server = server.clone();
        tokio::spawn(async move {
            let (mut over, _place) = (over, place);
            if let Some(relay) = &server.relay {
                over.let_go = !relay.serve(call, &revoked, &server).await;
            }
        });
        return known;
    }
    let none = HeaderMap::new();
    let head = response(match kind {
        Kind::Stream => &server.head,
        _ => &none,
    });
    let call = Call::new(
        id,
        read.identity,
        respond,
        head,
        &server.limits,
        peer.times.clone(),
    );
    server.calls.write().insert(id, call.clone());
    drop(identities);
    over.call = Some((call.clone(), kind));
    let messages = Messages::new(read.gzip, server.limits.message_nbytes);
    let begun = Box::new(Begun {
        path: path.to_owned(),
        identity: read.identity,
        metadata: metadata(request.headers(), kind),
        timeout_ms: read.time.map(|time| time.as_millis() as u64),
        peer: peer.clone(),
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
    tokio::spawn(async move {
        let mut over = over;
        let (server, body) = (&over.server, request.into_body());
        let serving = call.serve(server, body, messages, reading, read.time);
        let served = serving.await;
        if served.refused.is_some() {
            server.counters.bad_message.fetch_add(1, Relaxed);
        }
        // A unary step that its caller has no time for costs nothing but a row.
        over.let_go = !served.whole && kind != Kind::Step;
    });
    known
}

/// The calls of a connection.
#[derive(Default)]
struct Calls {
    under_way: AtomicUsize,
    let_go: AtomicUsize, // by their caller, within a second
}

/// What is to be done when a call is over, in whichever way.
struct Over {
    server: Arc<Server>,
    calls: Arc<Calls>,
    begun: Instant,
    let_go: bool, // its caller has gone before it was answered
    id: u32,
    call: Option<(Arc<Call>, Kind)>, // None: it is relayed
}

impl Drop for Over {
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

struct Head {
    identity: Option<u32>,
    gzip: bool,
    time: Option<Duration>,
}

/// What the head of a request says, or why the call is refused.
fn read_head(
    server: &Server,
    identities: &Identities,
    kind: Kind,
    headers: &HeaderMap,
) -> Result<Head, Status> {
    let bad_head = |code, words| {
        server.counters.bad_head.fetch_add(1, Relaxed);
        Status::new(code, words)
    };
    let identity = match server.identity(identities, headers) {
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
        identity,
        gzip,
        time,
    })
}

/// The response to a call that is not begun.
pub fn refused(status: &Status) -> Response<()> {
    let mut response = response(&HeaderMap::new());
    response.headers_mut().extend(status.headers());
    if status.code == 12 {
        let encodings = HeaderValue::from_static("gzip");
        response
            .headers_mut()
            .insert("grpc-accept-encoding", encodings);
    }
    response
}

fn response(head: &HeaderMap) -> Response<()> {
    let mut response = Response::new(());
    *response.headers_mut() = head.clone();
    response
        .headers_mut()
        .insert("content-type", HeaderValue::from_static("application/grpc"));
    response
}

/// What the caller sent beside what HTTP and gRPC need, its token left out; of a step, where it is traced from.
fn metadata(headers: &HeaderMap, kind: Kind) -> Vec<(String, String)> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_spelled_as_grpc_does() {
        for (address, wanted) in [
            ("1.2.3.4:567", "ipv4:1.2.3.4:567"),
            ("[::1]:567", "ipv6:%5B::1%5D:567"),
            ("[::ffff:1.2.3.4]:567", "ipv4:1.2.3.4:567"),
        ] {
            assert_eq!(spelled(address.parse().unwrap()), wanted);
        }
    }
}
