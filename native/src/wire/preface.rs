//! The first bytes of a connection: those of HTTP/2, or it ends, and in such a way that its peer learns it.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};

const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const DISCARDED: usize = 64 << 10; // of what comes behind something else

/// A socket whose preface was read; who reads it finds it again.
pub struct Prefaced<S> {
    socket: S,
    unread: &'static [u8],
}

/// Err: it begins with something else, and was closed.
pub async fn begun<S: AsyncRead + AsyncWrite + Unpin>(mut socket: S) -> io::Result<Prefaced<S>> {
    let (mut bytes, mut came) = ([0; PREFACE.len()], 0);
    while came < bytes.len() {
        came += match socket.read(&mut bytes[came..]).await? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            more => more,
        };
        if bytes[..came] != PREFACE[..came] {
            // A socket that is closed before all is read is reset, and the peer may lose what it was told.
            socket.shutdown().await?;
            let mut rest = socket.take(DISCARDED as u64);
            tokio::io::copy(&mut rest, &mut tokio::io::sink()).await?;
            return Err(io::ErrorKind::InvalidData.into());
        }
    }
    let unread = PREFACE.as_slice();
    Ok(Prefaced { socket, unread })
}

impl<S: AsyncRead + Unpin> AsyncRead for Prefaced<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context,
        buffer: &mut ReadBuf,
    ) -> Poll<io::Result<()>> {
        if self.unread.is_empty() {
            return Pin::new(&mut self.socket).poll_read(context, buffer);
        }
        let (now, later) = self
            .unread
            .split_at(self.unread.len().min(buffer.remaining()));
        buffer.put_slice(now);
        self.unread = later;
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Prefaced<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context,
        slices: &[io::IoSlice],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.socket).poll_write_vectored(context, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.socket.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context) -> Poll<io::Result<()>> {
        Pin::new(&mut self.socket).poll_shutdown(context)
    }
}
