"""Connections for commits: one to each node, of one thread. A connection whose fate is unknown is killed at the server before its
commands are sent again on another one: what it had still buffered must not come after later commits.
"""

from __future__ import annotations

import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import redis
from redis.connection import SSLConnection

from engram_service.store.nodes import Node
from engram_service.store.packing import read_replies
from engram_service.store.tls import TlsConnection, TlsSocket
from engram_service.store.types import UNACKNOWLEDGED, StoreSettings

TIMEOUT_S = 5.0  # without a reply for so long, a connection is given up
INLINE_TIMEOUT_S = 1.0  # the same for the event loop: the committers then go on with it
_SEND_BUFFER = 4 << 20  # a batch's commands at once, if the kernel allows so much
_JOINED_MAX = 64 << 10
_UNACKNOWLEDGED = UNACKNOWLEDGED.encode()


class Link:
    """One connection for commits; not shared between threads, but that another one may open it."""

    def __init__(self, node: Node, settings: StoreSettings, timeout_s: float, native: bool = False) -> None:
        self._node = node
        self._settings = settings
        self._timeout_s = timeout_s
        self._native = native  # TLS, if any, is the extension's
        self._connection: Any = None
        self._id = 0
        self._opening = threading.Lock()

    def send(self, buffers: list[memoryview | bytes], doubtful: list[int]) -> None:
        """Sends commands, whose replies `receive` then takes in the same order. Raises RedisError or OSError.

        `doubtful` has the ids of connections on which the same commands may still be buffered; they are killed first, and
        if this connection fails as well, it is added.
        """
        with self._giving_up(doubtful):
            connection = self._ready()
            self._kill(doubtful)
            connection.send_packed_command(_joined(buffers), check_health=False)

    def opened(self, doubtful: list[int]) -> Any:
        """The connection of redis-py, for who writes to it by itself. Raises RedisError or OSError."""
        with self._giving_up(doubtful):
            connection = self._ready()
            self._kill(doubtful)
            return connection

    @property
    def is_open(self) -> bool:
        return self._connection is not None

    def open(self) -> None:
        """From any thread, of a link that its own thread leaves alone until it is open. Raises RedisError or OSError."""
        with self._opening:
            self.opened([])

    def receive(self, count: int, doubtful: list[int], counted: bool = False) -> tuple[list[bytes] | None, bytes]:
        """The replies to all the `count` commands that were sent, or None if all are OK; and that to the one that counts, which
        was the last, where there was one. Raises RedisError or OSError."""
        with self._giving_up(doubtful):
            if self._connection is None:
                raise redis.exceptions.ConnectionError("the connection was given up")
            replies, counter = read_replies(self._connection._sock, count, counted)
            if self._acknowledged(self._connection):
                return replies, counter
            return [b"-" + _UNACKNOWLEDGED] * count, counter

    @contextmanager
    def _giving_up(self, doubtful: list[int]) -> Iterator[None]:
        """Drops the connection when something fails, for who knows what of it arrived."""
        try:
            yield
        except BaseException:
            if self._connection is not None:
                doubtful.append(self._id)
            self.drop()
            raise

    def _acknowledged(self, connection: Any) -> bool:
        """Whether what was sent is as safe as was asked for."""
        wait = self._settings.wait
        if wait is None:
            return True
        connection.send_command(*wait)
        return self._settings.waited(connection.read_response())

    def waits_on(self) -> int | None:
        """The descriptor that becomes readable with the first reply; None: there is one, or nothing is waited for."""
        sock = None if self._connection is None else self._connection._sock
        if sock is None or (isinstance(sock, ssl.SSLSocket) and sock.pending()):
            return None
        return int(sock.fileno())

    def abandon(self, doubtful: list[int]) -> None:
        """Drops the connection, on which commands may still be buffered."""
        if self._connection is not None:
            doubtful.append(self._id)
        self.drop()

    def drop(self) -> None:
        if self._connection is not None:
            self._connection.disconnect()
            self._connection = None

    def _ready(self) -> Any:
        if self._connection is None:
            # Not from the pool, which counts what it ever made and stops at a limit; and without its greeting, for a commit
            # finds out by itself that Redis has lost the record.
            pool = self._node.client.connection_pool
            kind = pool.connection_class
            if self._native and issubclass(kind, SSLConnection):
                kind = TlsConnection
            connection: Any = kind(**{**pool.connection_kwargs, "redis_connect_func": None})
            connection.socket_timeout = connection.socket_connect_timeout = self._timeout_s
            connection.connect()
            _block_in_kernel(connection._sock, self._timeout_s)
            connection.send_command("CLIENT", "ID")
            self._id = int(connection.read_response())
            self._connection = connection
        return self._connection

    def _kill(self, doubtful: list[int]) -> None:
        for number in doubtful:
            self._connection.send_command("CLIENT", "KILL", "ID", number)
            self._connection.read_response()
        doubtful.clear()


class Links:
    """A thread's connections for commits: one to each node, made when it is needed."""

    def __init__(self, settings: StoreSettings, timeout_s: float, native: bool = False) -> None:
        self._settings = settings
        self._timeout_s = timeout_s
        self._native = native
        self._links: dict[str, Link] = {}

    def to(self, node: Node) -> Link:
        if node.name not in self._links:
            self._links[node.name] = Link(node, self._settings, self._timeout_s, self._native)
        return self._links[node.name]

    def drop(self) -> None:
        for link in self._links.values():
            link.drop()


def _block_in_kernel(sock: Any, timeout_s: float) -> None:
    """Lets the kernel do the waiting, so that a whole batch is one system call each way.

    A Python socket with a timeout polls and takes the interpreter's lock again for every part of a buffer that fits.
    """
    if isinstance(sock, ssl.SSLSocket | TlsSocket):
        return
    sock.settimeout(None)
    timeval = struct.pack("@ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)


def _joined(buffers: list[memoryview | bytes]) -> list[memoryview | bytes]:
    """Little is sent at once, for a system call costs more than to copy it."""
    return [b"".join(buffers)] if sum(map(len, buffers)) <= _JOINED_MAX else buffers
