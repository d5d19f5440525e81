"""TLS to Redis for commits by the extension: connections of redis-py, with the extension's TLS in place of Python's."""

from __future__ import annotations

import pathlib
import socket
import ssl
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from redis.connection import Connection, SSLConnection

from engram_service.places import NATIVE

if NATIVE:  # else links.py and lines.py do without it
    import engram_native

_SPOKEN = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")
_USUAL = {"ssl_cert_reqs": "required", "ssl_check_hostname": "true"}
_SEND_BUFFER = 4 << 20


def spoken(url: str) -> bool:
    """Whether the extension can do what a URL asks of TLS: redis-py takes many more options there."""
    asked = [(name, value) for name, value in parse_qsl(urlsplit(url).query) if name.startswith("ssl_")]
    return all(name in _SPOKEN or _USUAL.get(name) == value.lower() for name, value in asked)


class TlsSocket:
    """What redis-py takes for a socket; a CommitLink may then take its stream over."""

    def __init__(self, sock: socket.socket, stream: Any) -> None:
        self._sock = sock
        self._stream = stream
        self.sendall = stream.sendall
        self.recv = stream.recv
        self.settimeout = stream.settimeout
        self.fileno = sock.fileno
        self.shutdown = sock.shutdown
        self.getsockname = sock.getsockname
        self.getpeername = sock.getpeername

    def recv_into(self, buffer: Any, nbytes: int = 0) -> int:
        """hiredis reads so."""
        view = memoryview(buffer)
        data = self._stream.recv(nbytes or len(view))
        view[: len(data)] = data
        return len(data)

    def commit_link(self) -> Any:
        return engram_native.CommitLink.over_tls(self._stream)

    def close(self) -> None:
        self._stream.close()
        self._sock.close()


class TlsConnection(SSLConnection):
    """Files are read anew for each connection."""

    def _connect(self) -> Any:
        connect: Any = Connection._connect
        sock = connect(self)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
            return TlsSocket(sock, self._stream(sock))
        except BaseException:
            sock.close()
            raise

    def _stream(self, sock: socket.socket) -> Any:
        """The handshake made. Raises OSError."""
        places = ssl.get_default_verify_paths()
        system = [place for place in (places.cafile, places.capath) if place]
        files = (self.ca_certs, self.certfile, (self.keyfile or self.certfile) if self.certfile else None)
        ca, certificate, key = (path and _read(path) for path in files)
        end = sock.dup().detach()
        try:
            return engram_native.TlsStream(end, self.host, self.socket_timeout, ca, system, certificate, key)
        except (ConnectionError, ValueError) as error:
            raise OSError(1, str(error)) from error  # as Python's TLS has it


def _read(path: str) -> bytes:
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise OSError(error.errno, f"{path}: {error.strerror}") from None
