//! Connections: taken from listening sockets, limited, kept alive, and let go. Each call of theirs is served in call.rs.

use bytes::Bytes;
use h2::server::{Builder, Connection, SendResponse};
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use parking_lot::RwLock;
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, watch};
use tokio::time::{Instant, timeout};
use tokio_rustls::TlsAcceptor;

use super::call::{Call, Status};
use super::inbox::{Happening, Inbox};
use super::messages::Messages;

const STREAM_PATH: &str = "/engram.v1.EngramService/Stream";
const WINDOW_BEFORE: u32 = 64 << 10; // of a connection whose caller is not known yet
const WINDOW_STREAM: u32 = 1 << 20; // afterwards
const WINDOW_CONNECTION: u32 = 4 << 20;
const SMALL_FRAMES: usize = 2 * WINDOW_CONNECTION as usize; // an honest client's small DATA frames may fill the window
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
    pub keepalive_s: f64, // between questions whether the peer is still there, and until it has answered
    pub resets: usize,    // of calls that the server has not looked at
}

/// What is counted, ever, and what there is now.
#[derive(Default)]
pub struct Counters {
    pub connections: AtomicUsize,
    pub accepted: AtomicU64,
    pub turned_away: AtomicU64, // for there were too many
    pub failed: AtomicU64,      // before HTTP/2 was agreed upon
    pub unauthenticated: AtomicU64,
}

/// A token is known by its SHA-256. None: no call needs one.
pub type Identities = Option<HashMap<[u8; 32], u32>>;

pub struct Server {
    pub inbox: Inbox,
    pub counters: Counters,
    pub limits: Limits,
    pub calls: RwLock<HashMap<u32, Arc<Call>>>,
    head: HeaderMap, // of every stream's response
    identities: RwLock<Identities>,
    tls: RwLock<Option<TlsAcceptor>>,
    numbers: AtomicU32,
    places: Arc<Semaphore>,
    pub draining: watch::Sender<bool>,
}

impl Server {
    pub fn new(limits: Limits, head: HeaderMap) -> io::Result<Self> {
        Ok(Server {
            inbox: Inbox::new(limits.inbox_nbytes)?,
            counters: Counters::default(),
            calls: RwLock::new(HashMap::new()),
            head,
            identities: RwLock::new(None),
            tls: RwLock::new(None),
            numbers: AtomicU32::new(0),
            places: Arc::new(Semaphore::new(limits.connections)),
            draining: watch::Sender::new(false),
            limits,
        })
    }

    pub fn call(&self, id: u32) -> Option<Arc<Call>> {
        self.calls.read().get(&id).cloned()
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
        *self.identities.write() = identities;
        for call in self.calls.read().values() {
            if !open
                && !call
                    .identity
                    .is_some_and(|identity| known.contains(&identity))
            {
                call.finish(Status::new(16, "the call's token is not valid any more"));
            }
        }
    }

    /// Who calls, by this table.
    fn identity(
        &self,
        identities: &Identities,
        headers: &HeaderMap,
    ) -> Result<Option<u32>, Status> {
        let Some(table) = identities else {
            return Ok(None);
        };
        let token = headers
            .get("authorization")
            .and_then(|value| value.to_str().ok())
            .and_then(|value| {
                let (scheme, token) = value.split_once(' ')?;
                scheme
                    .eq_ignore_ascii_case("bearer")
                    .then_some(token.trim())
            });
        let found =
            token.and_then(|token| table.get(&<[u8; 32]>::from(Sha256::digest(token))).copied());
        found.map(Some).ok_or_else(|| {
            self.counters.unauthenticated.fetch_add(1, Relaxed);
            Status::new(
                16,
                "this server asks for a token: send `authorization: Bearer TOKEN` with the call",
            )
        })
    }
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

trait Socket: AsyncRead + AsyncWrite + Unpin + Send {}
impl<T: AsyncRead + AsyncWrite + Unpin + Send> Socket for T {}

async fn accept(listener: &Listener) -> io::Result<Box<dyn Socket>> {
    Ok(match listener {
        Listener::Tcp(listener) => {
            let (socket, _) = listener.accept().await?;
            socket.set_nodelay(true)?;
            Box::new(socket)
        }
        Listener::Unix(listener) => Box::new(listener.accept().await?.0),
    })
}

async fn connection(server: Arc<Server>, socket: Box<dyn Socket>, _place: OwnedSemaphorePermit) {
    server.counters.accepted.fetch_add(1, Relaxed);
    server.counters.connections.fetch_add(1, Relaxed);
    let time = Duration::from_secs_f64(server.limits.handshake_s);
    match timeout(time, handshake(&server, socket)).await {
        Ok(Some(connection)) => serve(&server, connection).await,
        _ => drop(server.counters.failed.fetch_add(1, Relaxed)),
    }
    server.counters.connections.fetch_sub(1, Relaxed);
}

type Http = Connection<Box<dyn Socket>, Bytes>;

async fn handshake(server: &Server, socket: Box<dyn Socket>) -> Option<Http> {
    let tls = server.tls.read().clone();
    let socket = match tls {
        Some(acceptor) => Box::new(acceptor.accept(socket).await.ok()?),
        None => socket,
    };
    Builder::new()
        .initial_window_size(WINDOW_BEFORE)
        .initial_connection_window_size(WINDOW_BEFORE)
        .data_frame_budget(SMALL_FRAMES)
        .max_concurrent_streams(server.limits.calls)
        .max_header_list_size(server.limits.header_nbytes)
        .max_pending_accept_reset_streams(server.limits.resets)
        .max_local_error_reset_streams(Some(server.limits.resets))
        .handshake(socket)
        .await
        .ok()
}

async fn serve(server: &Arc<Server>, mut connection: Http) {
    let limits = &server.limits;
    let mut draining = server.draining.subscribe();
    let mut pings = connection.ping_pong();
    let (keepalive, idle) = (
        Duration::from_secs_f64(limits.keepalive_s),
        Duration::from_secs_f64(limits.idle_s),
    );
    let mut look = tokio::time::interval_at(Instant::now() + keepalive, keepalive);
    let under_way = Arc::new(AtomicUsize::new(0));
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
                if under_way.load(Relaxed) > 0 { used = Instant::now() }
                if !going && used.elapsed() >= idle { going = true; connection.graceful_shutdown() }
                continue;
            }
            _ = draining.wait_for(|draining| *draining), if !going => {
                going = true;
                connection.graceful_shutdown();
                continue;
            }
        };
        let Some(Ok((request, respond))) = accepted else {
            return;
        };
        used = Instant::now();
        if begin(server, request, respond, &under_way) && !known {
            known = true;
            connection.set_target_window_size(WINDOW_CONNECTION);
            let _ = connection.set_initial_window_size(WINDOW_STREAM);
        }
    }
}

/// Begins a call; false: it was refused at once.
fn begin(
    server: &Arc<Server>,
    request: Request<h2::RecvStream>,
    mut respond: SendResponse<Bytes>,
    under_way: &Arc<AtomicUsize>,
) -> bool {
    let identities = server.identities.read(); // until the call is among those that a new table ends
    let read = match read_head(server, &identities, request.method(), request.headers()) {
        Ok(read) => read,
        Err(status) => {
            let mut response = response(&HeaderMap::new());
            response.headers_mut().extend(status.headers());
            if status.code == 12 {
                response
                    .headers_mut()
                    .insert("grpc-accept-encoding", HeaderValue::from_static("gzip"));
            }
            let _ = respond.send_response(response, true);
            return false;
        }
    };
    let path = request.uri().path().to_owned();
    let stream = path == STREAM_PATH;
    let metadata = metadata(request.headers());
    let head = if stream {
        response(&server.head)
    } else {
        response(&HeaderMap::new())
    };
    let id = server.numbers.fetch_add(1, Relaxed);
    let call = Call::new(id, read.identity, respond, head, server.limits.rows);
    server.calls.write().insert(id, call.clone());
    drop(identities);
    let timeout_ms = read.time.map(|time| time.as_millis() as u64);
    server.inbox.push(
        id,
        Happening::Begin {
            path,
            identity: read.identity,
            metadata,
            timeout_ms,
        },
    );
    if stream {
        call.begin();
    }
    let messages = Messages::new(read.gzip, server.limits.message_nbytes);
    let (server, under_way) = (server.clone(), under_way.clone());
    under_way.fetch_add(1, Relaxed);
    tokio::spawn(async move {
        let _over = Over {
            server: &server,
            under_way: &under_way,
            id,
        };
        call.serve(
            &server.inbox,
            request.into_body(),
            messages,
            stream,
            read.time,
        )
        .await;
    });
    true
}

/// What is to be done when a call is over, in whichever way.
struct Over<'a> {
    server: &'a Server,
    under_way: &'a AtomicUsize,
    id: u32,
}

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.server.calls.write().remove(&self.id);
        self.under_way.fetch_sub(1, Relaxed);
        self.server.inbox.push(self.id, Happening::End);
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
    method: &http::Method,
    headers: &HeaderMap,
) -> Result<Head, Status> {
    let content = headers
        .get("content-type")
        .and_then(|value| value.to_str().ok())
        .unwrap_or("");
    if method != http::Method::POST || !content.starts_with("application/grpc") {
        return Err(Status::new(
            12,
            "this port speaks gRPC: POST with content-type application/grpc",
        ));
    }
    let identity = server.identity(identities, headers)?;
    let gzip = match headers.get("grpc-encoding").map(HeaderValue::as_bytes) {
        None | Some(b"identity") => false,
        Some(b"gzip") => true,
        Some(_) => {
            return Err(Status::new(
                12,
                "of encodings, gzip and identity are understood",
            ));
        }
    };
    let time = match headers.get("grpc-timeout") {
        None => None,
        Some(value) => Some(
            grpc_timeout(value.as_bytes())
                .ok_or_else(|| Status::new(3, "grpc-timeout makes no sense"))?,
        ),
    };
    if time == Some(Duration::ZERO) {
        return Err(Status::new(4, "the call's time was up when it arrived"));
    }
    Ok(Head {
        identity,
        gzip,
        time,
    })
}

fn response(head: &HeaderMap) -> Response<()> {
    let mut response = Response::new(());
    *response.headers_mut() = head.clone();
    response
        .headers_mut()
        .insert("content-type", HeaderValue::from_static("application/grpc"));
    response
}

/// At most eight digits and a unit.
fn grpc_timeout(value: &[u8]) -> Option<Duration> {
    let (unit, digits) = value.split_last()?;
    if digits.is_empty() || digits.len() > 8 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let count: u64 = std::str::from_utf8(digits).ok()?.parse().ok()?;
    Some(match unit {
        b'H' => Duration::from_secs(count * 3600),
        b'M' => Duration::from_secs(count * 60),
        b'S' => Duration::from_secs(count),
        b'm' => Duration::from_millis(count),
        b'u' => Duration::from_micros(count),
        b'n' => Duration::from_nanos(count),
        _ => return None,
    })
}

/// What the caller sent beside what HTTP and gRPC need, its token left out.
fn metadata(headers: &HeaderMap) -> Vec<(String, String)> {
    let own = |name: &HeaderName| {
        let name = name.as_str();
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
    fn timeouts_are_read_as_grpc_writes_them() {
        assert_eq!(grpc_timeout(b"15S"), Some(Duration::from_secs(15)));
        assert_eq!(grpc_timeout(b"250m"), Some(Duration::from_millis(250)));
        assert_eq!(
            grpc_timeout(b"99999999H"),
            Some(Duration::from_secs(99_999_999 * 3600))
        );
        for bad in [
            &b""[..],
            b"S",
            b"15",
            b"-1S",
            b"1.5S",
            b"999999999S",
            b"1s",
            b"1 S",
        ] {
            assert_eq!(grpc_timeout(bad), None, "{bad:?}");
        }
    }
}
