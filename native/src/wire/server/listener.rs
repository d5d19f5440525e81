//! Connections are taken from listening sockets, up to as many as allowed.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
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

impl Listener {
    /// Within a runtime, which waits for its connections.
    pub fn new(descriptor: OwnedFd) -> io::Result<Self> {
        Ok(if is_unix(descriptor.as_raw_fd())? {
            let listener = std::os::unix::net::UnixListener::from(descriptor);
            listener.set_nonblocking(true)?;
            Listener::Unix(UnixListener::from_std(listener)?)
        } else {
            let listener = std::net::TcpListener::from(descriptor);
            listener.set_nonblocking(true)?;
            Listener::Tcp(TcpListener::from_std(listener)?)
        })
    }
}

fn is_unix(descriptor: RawFd) -> io::Result<bool> {
    let mut address: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    let mut length = std::mem::size_of_val(&address) as libc::socklen_t;
    if unsafe { libc::getsockname(descriptor, (&raw mut address).cast(), &raw mut length) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(i32::from(address.ss_family) == libc::AF_UNIX)
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
