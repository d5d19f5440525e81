//! One TCP connection, with TLS or without.

use std::io::{ErrorKind, Read, Result, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;

use rustls::pki_types::{CertificateDer, ServerName, pem::PemObject};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};

use crate::Failure;

pub enum Link {
    Plain(TcpStream),
    Tls(Box<StreamOwned<ClientConnection, TcpStream>>),
}

/// What a client that trusts this PEM file's certificate alone needs.
pub fn trust(path: &str) -> std::result::Result<Arc<ClientConfig>, Failure> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(path)?)?;
    let mut config = ClientConfig::builder()
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(Arc::new(config))
}

impl Link {
    /// Connected, and with TLS after the handshake; from here on it never blocks.
    pub fn connect(
        address: SocketAddr,
        tls: Option<&Arc<ClientConfig>>,
    ) -> std::result::Result<Self, Failure> {
        let mut socket = TcpStream::connect(address)?;
        socket.set_nodelay(true)?;
        let Some(config) = tls else {
            socket.set_nonblocking(true)?;
            return Ok(Link::Plain(socket));
        };
        let mut secure = ClientConnection::new(config.clone(), ServerName::try_from("localhost")?)?;
        while secure.is_handshaking() {
            secure.complete_io(&mut socket)?;
        }
        socket.set_nonblocking(true)?;
        Ok(Link::Tls(Box::new(StreamOwned::new(secure, socket))))
    }

    pub fn socket(&self) -> &TcpStream {
        match self {
            Link::Plain(socket) => socket,
            Link::Tls(secure) => &secure.sock,
        }
    }

    /// Appends what is there. Ok(false): the other side has closed.
    pub fn read(&mut self, buffer: &mut [u8], mut found: impl FnMut(&[u8])) -> Result<bool> {
        loop {
            let (length, once) = match self {
                Link::Plain(socket) => (socket.read(buffer), true),
                Link::Tls(secure) => (secure.read(buffer), false), // the poller does not see what is decrypted already
            };
            match length {
                Ok(0) => return Ok(false),
                Ok(length) => found(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(true),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            if once {
                return Ok(true);
            }
        }
    }

    /// Writes all of it, however long the other side takes.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let mut sent = 0;
        while sent < bytes.len() {
            let length = match self {
                Link::Plain(socket) => socket.write(&bytes[sent..]),
                Link::Tls(secure) => secure.write(&bytes[sent..]),
            };
            sent += patiently(length)?.unwrap_or(0);
        }
        if let Link::Tls(secure) = self {
            while patiently(secure.flush())?.is_none() {}
        }
        Ok(())
    }
}

fn patiently<T>(done: Result<T>) -> Result<Option<T>> {
    match done {
        Ok(value) => Ok(Some(value)),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
            std::thread::yield_now();
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
