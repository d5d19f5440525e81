//! Connections are taken from listening sockets, up to as many as allowed.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};

use super::Server;
use super::connection::connection;
use super::peer::spelled;

const ACCEPT_PAUSE: Duration = Duration::from_millis(50); // when there is no descriptor for another connection

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
