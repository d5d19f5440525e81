//! One connection: its handshakes, its calls as they come, whether its peer is still there, and its end.

use bytes::Bytes;
use h2::Reason;
use h2::server::{Builder, Connection};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, timeout};
use tokio_rustls::rustls::ProtocolVersion;

use super::dispatch::begin;
use super::guard::Calls;
use super::listener::Socket;
use super::{Peer, Server};
use crate::wire::allowance::Allowance;
use crate::wire::counted::Counted;
use crate::wire::preface::{self, Prefaced};
use crate::wire::times::Times;

const WINDOW_BEFORE: u32 = 64 << 10; // of a connection whose caller is not known yet
const WINDOW_STREAM: u32 = 1 << 20; // afterwards
const WINDOW_CONNECTION: u32 = 4 << 20;
const SMALL_FRAMES: usize = 2 * WINDOW_CONNECTION as usize; // an honest client's small DATA frames may fill the window

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
