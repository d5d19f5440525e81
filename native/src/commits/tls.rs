//! TLS to Redis. Python connects the socket, a `TlsStream` makes the handshake and is the socket that Python greets Redis on, and a
//! `CommitLink` takes it over.

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyConnectionError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyBytes;
use std::io::{self, Read, Write};
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_rustls::rustls::pki_types::ServerName;
use tokio_rustls::rustls::{CertificateError, ClientConnection, Error};

use super::stream::Socket;
use super::trust;

const INPUT: usize = 64 << 10;
const HELD: usize = 256 << 10; // enciphered at most before the kernel has taken it: then nothing more is taken
const DAY_S: f64 = 86400.0;

/// One end of TLS over a socket. No call waits.
pub struct Tls {
    pub socket: Socket,
    session: ClientConnection,
    input: Box<[u8]>,
    from: usize, // of `input`: what is not deciphered
    to: usize,
    dry: bool, // the last reading left nothing in the socket
}

impl Tls {
    fn new(socket: Socket, mut session: ClientConnection) -> Self {
        session.set_buffer_limit(Some(HELD));
        Tls {
            socket,
            session,
            input: vec![0; INPUT].into_boxed_slice(),
            from: 0,
            to: 0,
            dry: false,
        }
    }

    fn handshake(&mut self) -> io::Result<()> {
        loop {
            self.flush()?;
            if !self.session.is_handshaking() {
                return Ok(());
            }
            if !self.take()? {
                return Err(io::Error::new(
                    io::ErrorKind::ConnectionAborted,
                    "the connection was closed during the TLS handshake",
                ));
            }
        }
    }

    pub fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.flush()?;
        let taken = self.session.writer().write(bytes)?;
        match self.flush() {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
            _ => Ok(taken),
        }
    }

    pub fn holds(&self) -> bool {
        self.session.wants_write()
    }

    /// Sends all that it holds, or fails with WouldBlock.
    pub fn flush(&mut self) -> io::Result<()> {
        while self.session.wants_write() {
            match self.session.write_tls(&mut self.socket) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                outcome => drop(outcome?),
            }
        }
        Ok(())
    }

    pub fn receive(&mut self, room: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.session.reader().read(room) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                outcome => return outcome,
            }
            if !self.take()? {
                return Ok(0);
            }
        }
    }

    /// Deciphers something more; false: the other end has closed. The socket is read in large parts, and not again where it has
    /// given less than there was room for.
    fn take(&mut self) -> io::Result<bool> {
        if self.from == self.to {
            if std::mem::take(&mut self.dry) {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            self.from = 0;
            self.to = 0;
            self.to = self.socket.receive(&mut self.input)?;
            self.dry = self.to < self.input.len();
        }
        let mut rest = &self.input[self.from..self.to];
        if self.session.read_tls(&mut rest)? == 0 {
            return Ok(false);
        }
        self.from = self.to - rest.len();
        if let Err(error) = self.session.process_new_packets() {
            let _ = self.flush(); // the alert that says why, where there is room for it
            return Err(io::Error::new(
                io::ErrorKind::ConnectionAborted,
                told(&error),
            ));
        }
        Ok(true)
    }

    /// Waits until `work` can go on.
    fn wait(&self, deadline: Option<Instant>) -> io::Result<()> {
        let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        if left == Some(Duration::ZERO) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let events = if self.holds() {
            libc::POLLIN | libc::POLLOUT
        } else {
            libc::POLLIN
        };
        self.socket.wait(events, left)
    }
}

/// In the words of operators.
fn told(error: &Error) -> String {
    let why = match error {
        Error::AlertReceived(alert) => {
            return format!("the other end of TLS refuses the connection: {alert:?}");
        }
        Error::InvalidCertificate(why) => why,
        error => return format!("TLS failed: {error}"),
    };
    let why = match why {
        CertificateError::UnknownIssuer => "it is signed by no CA that is trusted here".into(),
        CertificateError::Expired => "certificate expired".into(),
        CertificateError::NotValidYet => "certificate not valid yet".into(),
        CertificateError::Other(why) if format!("{why:?}").contains("CaUsedAsEndEntity") => {
            "it is a CA's own (CA:TRUE), and not among those that are trusted here".into()
        }
        why => why.to_string(),
    };
    format!("certificate verify failed: {why}")
}

/// A socket under TLS as redis-py uses one, until a CommitLink takes it over. Not shared between threads.
#[pyclass]
pub struct TlsStream {
    tls: Option<Box<Tls>>,
    timeout: Option<Duration>,
}

#[pymethods]
impl TlsStream {
    /// Takes a descriptor of a connected socket as its own, and makes the handshake with the server of that name, in so much time.
    /// `ca` are PEM certificates to trust, `system` files and directories with others; `certificate` and `key`, PEM, are shown to
    /// a server that asks.
    #[new]
    #[pyo3(signature = (descriptor, name, timeout_s=None, ca=None, system=vec![], certificate=None, key=None))]
    #[expect(clippy::too_many_arguments)]
    fn new(
        python: Python,
        descriptor: RawFd,
        name: &str,
        timeout_s: Option<f64>,
        ca: Option<&[u8]>,
        system: Vec<PathBuf>,
        certificate: Option<&[u8]>,
        key: Option<&[u8]>,
    ) -> PyResult<Self> {
        let socket = Socket::new(descriptor)?;
        let name = ServerName::try_from(name.to_owned())
            .map_err(|_| PyValueError::new_err(format!("{name:?} is no name of a server")))?;
        let config = trust::client_config(ca, system, certificate.zip(key))
            .map_err(PyConnectionError::new_err)?;
        let session = ClientConnection::new(Arc::new(config), name)
            .map_err(|error| PyConnectionError::new_err(told(&error)))?;
        let mut stream = TlsStream {
            tls: Some(Box::new(Tls::new(socket, session))),
            timeout: time_of(timeout_s)?,
        };
        stream.working(python, Tls::handshake)?;
        Ok(stream)
    }

    /// For how long each call that follows may wait; None: for ever.
    #[pyo3(signature = (timeout_s=None))]
    fn settimeout(&mut self, timeout_s: Option<f64>) -> PyResult<()> {
        self.timeout = time_of(timeout_s)?;
        Ok(())
    }

    fn sendall(&mut self, python: Python, data: &Bound<PyAny>) -> PyResult<()> {
        let data = PyBuffer::<u8>::get(data)?.to_vec(python)?;
        let mut sent = 0;
        self.working(python, |tls| {
            while sent < data.len() {
                sent += tls.send(&data[sent..])?;
            }
            tls.flush()
        })
    }

    /// At most so much; nothing: the other end has closed.
    fn recv<'py>(&mut self, python: Python<'py>, size: usize) -> PyResult<Bound<'py, PyBytes>> {
        let mut room = vec![0; size.min(INPUT)];
        let count = self.working(python, |tls| tls.receive(&mut room))?;
        Ok(PyBytes::new(python, &room[..count]))
    }

    /// "TLSv1_2" or "TLSv1_3"; of a stream that is not taken over or closed.
    #[getter]
    fn version(&self) -> Option<String> {
        let version = self.tls.as_ref()?.session.protocol_version()?;
        version.as_str().map(str::to_owned)
    }

    /// Lets go of the descriptor, where it has one still.
    fn close(&mut self) {
        self.tls = None;
    }
}

impl TlsStream {
    pub fn taken(&mut self) -> PyResult<Box<Tls>> {
        self.tls
            .take()
            .ok_or_else(|| PyConnectionError::new_err("the stream is closed, or taken over"))
    }

    fn working<T: Send>(
        &mut self,
        python: Python,
        mut work: impl FnMut(&mut Tls) -> io::Result<T> + Send,
    ) -> PyResult<T> {
        let deadline = self.timeout.map(|time| Instant::now() + time);
        let Some(tls) = self.tls.as_mut() else {
            return Err(PyConnectionError::new_err("the stream is closed"));
        };
        loop {
            let outcome = python.detach(|| {
                loop {
                    match work(tls) {
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                            tls.wait(deadline)?;
                        }
                        outcome => return outcome,
                    }
                }
            });
            match outcome {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {
                    python.check_signals()?;
                }
                outcome => return Ok(outcome?),
            }
        }
    }
}

fn time_of(timeout_s: Option<f64>) -> PyResult<Option<Duration>> {
    match timeout_s {
        None => Ok(None),
        Some(time) if time >= 0.0 => Ok(Some(Duration::from_secs_f64(time.min(DAY_S)))),
        Some(_) => Err(PyValueError::new_err("a negative time")),
    }
}
