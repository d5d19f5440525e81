//! The socket of a connection: how many bytes pass, and when they do.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::server::{Server, Socket};
use super::times::{self, Times};

/// Of bytes of HTTP/2; TLS is beneath.
pub struct Counted {
    pub socket: Box<dyn Socket>,
    pub server: Arc<Server>,
    pub times: Arc<Times>,
}

impl Counted {
    fn wrote(&self, wrote: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let Poll::Ready(Ok(count)) = wrote {
            let counters = &self.server.counters;
            counters.bytes_out.fetch_add(count as u64, Relaxed);
        }
        wrote
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context,
        buffer: &mut ReadBuf,
    ) -> Poll<io::Result<()>> {
        let (before, began) = (buffer.filled().len(), times::now());
        let ready = Pin::new(&mut self.socket).poll_read(context, buffer);
        let count = buffer.filled().len() - before;
        if count > 0 {
            self.times.note_read(began);
            let counters = &self.server.counters;
            counters.bytes_in.fetch_add(count as u64, Relaxed);
        }
        ready
    }
}

impl AsyncWrite for Counted {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context,
        data: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.times.writes();
        let wrote = Pin::new(&mut self.socket).poll_write(context, data);
        self.wrote(wrote)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context,
        data: &[io::IoSlice],
    ) -> Poll<io::Result<usize>> {
        self.times.writes();
        let wrote = Pin::new(&mut self.socket).poll_write_vectored(context, data);
        self.wrote(wrote)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<io::Result<()>> {
        let ready = Pin::new(&mut self.socket).poll_flush(context);
        if matches!(ready, Poll::Ready(Ok(()))) {
            self.times.wrote();
        }
        ready
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}
