//! What a link writes to and reads from: a connected socket, in clear or under TLS. No call waits, except `wait`. The socket's flags
//! stay as Python has set them, so every call says by itself that it does not wait.

use std::io::{self, IoSlice, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::time::Duration;

use super::tls::Tls;

pub enum Stream {
    Plain(Socket),
    Tls(Box<Tls>),
}

impl Stream {
    pub fn descriptor(&self) -> RawFd {
        match self {
            Stream::Plain(socket) => socket.descriptor(),
            Stream::Tls(tls) => tls.socket.descriptor(),
        }
    }

    /// Takes what it can of some bytes, and says how much; `holds` tells whether all of that was sent.
    pub fn send(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Stream::Plain(socket) => socket.write(bytes),
            Stream::Tls(tls) => tls.send(bytes),
        }
    }

    /// Whether some of what it has taken is not sent.
    pub fn holds(&self) -> bool {
        match self {
            Stream::Plain(_) => false,
            Stream::Tls(tls) => tls.holds(),
        }
    }

    pub fn flush(&mut self) -> io::Result<()> {
        match self {
            Stream::Plain(_) => Ok(()),
            Stream::Tls(tls) => tls.flush(),
        }
    }

    /// Reads what is there; nothing: the other end has closed. The flag says that there is no more just now.
    pub fn receive(&mut self, room: &mut [u8]) -> io::Result<(usize, bool)> {
        match self {
            Stream::Plain(socket) => {
                let count = socket.receive(room)?;
                Ok((count, count < room.len()))
            }
            // Whether there is more does not show on the descriptor: it may be deciphered already.
            Stream::Tls(tls) => Ok((tls.receive(room)?, false)),
        }
    }

    /// Waits for the socket; an error of kind Interrupted: a signal came.
    pub fn wait(&self, events: libc::c_short, time: Option<Duration>) -> io::Result<()> {
        match self {
            Stream::Plain(socket) => socket.wait(events, time),
            Stream::Tls(tls) => tls.socket.wait(events, time),
        }
    }
}

pub struct Socket(OwnedFd);

impl Socket {
    /// Takes a descriptor as its own, if it is a connection's.
    pub fn new(descriptor: RawFd) -> io::Result<Self> {
        let mut kind: libc::c_int = 0;
        let mut size = size_of_val(&kind) as libc::socklen_t;
        let asked = unsafe {
            libc::getsockopt(
                descriptor,
                libc::SOL_SOCKET,
                libc::SO_TYPE,
                (&raw mut kind).cast(),
                &raw mut size,
            )
        };
        outcome(asked as isize)?;
        if kind != libc::SOCK_STREAM {
            let why = "the socket is no stream";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        Ok(Socket(unsafe { OwnedFd::from_raw_fd(descriptor) }))
    }

    pub fn descriptor(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    pub fn receive(&self, room: &mut [u8]) -> io::Result<usize> {
        let (start, size) = (room.as_mut_ptr().cast(), room.len());
        outcome(unsafe { libc::recv(self.0.as_raw_fd(), start, size, libc::MSG_DONTWAIT) })
    }

    pub fn wait(&self, events: libc::c_short, time: Option<Duration>) -> io::Result<()> {
        let mut polled = libc::pollfd {
            fd: self.0.as_raw_fd(),
            events,
            revents: 0,
        };
        let limit = time.map(|time| libc::timespec {
            tv_sec: time.as_secs() as libc::time_t,
            tv_nsec: time.subsec_nanos().into(),
        });
        let limit = limit.as_ref().map_or(std::ptr::null(), std::ptr::from_ref);
        let ready = unsafe { libc::ppoll(&raw mut polled, 1, limit, std::ptr::null()) };
        outcome(ready as isize).map(drop)
    }
}

impl Write for Socket {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let (start, size) = (bytes.as_ptr().cast(), bytes.len());
        outcome(unsafe { libc::send(self.0.as_raw_fd(), start, size, SENDING) })
    }

    fn write_vectored(&mut self, parts: &[IoSlice]) -> io::Result<usize> {
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = parts.as_ptr().cast_mut().cast(); // an IoSlice is an iovec
        message.msg_iovlen = parts.len() as _;
        outcome(unsafe { libc::sendmsg(self.0.as_raw_fd(), &raw const message, SENDING) })
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const SENDING: libc::c_int = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;

fn outcome(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
