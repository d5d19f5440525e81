"""The committers: threads that write ticks to Redis and say what became of each row.

A commit is repeated until Redis has said something about every row: under its token it may be written twice, and as one
session has one commit under way at most, never out of order. A connection whose fate is unknown is killed at the server
before its commands are sent again on another one: what it had still buffered must not come after later commits.
"""

from __future__ import annotations

import logging
import queue
import socket
import ssl
import struct
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import redis
from numpy.typing import NDArray

from engram_service.store.packing import commands, read_replies
from engram_service.store.types import UNACKNOWLEDGED, CommitJob, StoreSettings, Verdict

log = logging.getLogger(__name__)

_BACKOFF_S = (0.02, 0.05, 0.1, 0.2, 0.5)
_TIMEOUT_S = 5.0  # without a reply for so long, a connection is given up
_INLINE_TIMEOUT_S = 1.0  # the same where an engine thread waits: the committers then go on with it
_SEND_BUFFER = 4 << 20  # a tick's commands at once, if the kernel allows so much
_LOST: tuple[type[Exception], ...] = (redis.exceptions.RedisError, OSError)

Diagnose = Callable[[CommitJob, NDArray[np.intp], Callable[[int], bytes]], Sequence[Verdict]]


class Link:
    """One connection for commits; not shared between threads."""

    def __init__(self, pool: redis.ConnectionPool, settings: StoreSettings, timeout_s: float) -> None:
        self._pool = pool
        self._settings = settings
        self._timeout_s = timeout_s
        self._connection: Any = None
        self._id = 0

    def send(self, buffer: memoryview, doubtful: list[int]) -> None:
        """Sends commands, whose replies `receive` then takes in the same order. Raises RedisError or OSError.

        `doubtful` has the ids of connections on which the same commands may still be buffered; they are killed first, and
        if this connection fails as well, it is added.
        """
        with self._giving_up(doubtful):
            connection = self._ready()
            self._kill(doubtful)
            connection.send_packed_command([buffer], check_health=False)

    def receive(self, count: int, doubtful: list[int]) -> list[bytes] | None:
        """The replies to `count` commands, or None if all are OK. Raises RedisError or OSError."""
        with self._giving_up(doubtful):
            if self._connection is None:
                raise redis.exceptions.ConnectionError("the connection was given up")
            replies = read_replies(self._connection._sock, count)
            return replies if self._acknowledged(self._connection) else [b"-" + UNACKNOWLEDGED.encode()] * count

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

    def drop(self) -> None:
        if self._connection is not None:
            self._connection.disconnect()
            self._connection = None

    def _ready(self) -> Any:
        if self._connection is None:
            connection: Any = self._pool.make_connection()
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


def _block_in_kernel(sock: socket.socket, timeout_s: float) -> None:
    """Lets the kernel do the waiting, so that a whole tick is one system call each way.

    A Python socket with a timeout polls and takes the interpreter's lock again for every part of a buffer that fits.
    """
    if isinstance(sock, ssl.SSLSocket):
        return
    sock.settimeout(None)
    timeval = struct.pack("@ll", int(timeout_s), int(timeout_s % 1 * 1e6))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)


class Committers:
    """A few committer threads, and a way to commit in the calling thread."""

    def __init__(self, url: str, settings: StoreSettings, diagnose: Diagnose, trouble: Callable[[str], None]) -> None:
        self._diagnose = diagnose
        self._trouble = trouble  # called with why commits fail, and with "" when they go through again
        self._troubled = False
        self._closed = threading.Event()
        self._jobs: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._pool = redis.ConnectionPool.from_url(
            url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S, protocol=2
        )
        self._settings = settings
        self._own = threading.local()  # the link of a thread that commits by itself
        self._threads = [
            threading.Thread(
                target=self._run, args=(Link(self._pool, settings, _TIMEOUT_S),), name=f"commit-{n}", daemon=True
            )
            for n in range(settings.connections)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: CommitJob) -> None:
        self._jobs.put(_Pending(job))

    def begin(self, job: CommitJob) -> Sent:
        """Sends a commit from the calling thread, which says `finish` before its next one."""
        pending = _Pending(job)
        return self._send(self._own_link(), pending) if not self._troubled else Sent(pending, [], "in trouble")

    def finish(self, sent: Sent) -> None:
        """Takes the replies; if Redis is in trouble, the committers go on with it."""
        if not self._receive(self._own_link(), sent):
            self._jobs.put(sent.pending)

    def _own_link(self) -> Link:
        if not hasattr(self._own, "link"):
            self._own.link = Link(self._pool, self._settings, _INLINE_TIMEOUT_S)
        link: Link = self._own.link
        return link

    def close(self) -> None:
        self._closed.set()
        for _ in self._threads:
            self._jobs.put(None)

    def _run(self, link: Link) -> None:
        while (pending := self._jobs.get()) is not None:
            attempt = 0
            while not self._receive(link, self._send(link, pending)) and not self._closed.wait(
                _BACKOFF_S[min(attempt, len(_BACKOFF_S) - 1)]
            ):
                attempt += 1
        link.drop()

    def _send(self, link: Link, pending: _Pending) -> Sent:
        """Sends what is still to be written of a job."""
        sent = Sent(pending, [])
        with self._noting(sent):
            for rows, values in pending.blocks():
                job = pending.job
                for part, buffer in commands(job.tags[rows], job.tokens[rows], values, job.ttl_ms[rows]):
                    link.send(buffer, pending.doubtful)
                    sent.parts.append(rows[part])
        return sent

    def _receive(self, link: Link, sent: Sent) -> bool:
        """Takes the replies to what was sent of a job; whether all of it is settled now."""
        with self._noting(sent):
            for rows in sent.parts:
                replies = link.receive(len(rows), sent.pending.doubtful)
                sent.failure = self._settle(sent.pending, rows, replies) or sent.failure
        if sent.failure or self._troubled:
            self._troubled = bool(sent.failure)
            self._trouble(sent.failure)
        return not sent.failure

    @contextmanager
    def _noting(self, sent: Sent) -> Iterator[None]:
        try:
            yield
        except _LOST as error:
            sent.failure = str(error) or type(error).__name__
        except Exception:
            log.exception("a commit failed in a way that was not foreseen; it is tried again")
            sent.failure = "unforeseen failure"

    def _settle(self, pending: _Pending, rows: NDArray[np.intp], replies: list[bytes] | None) -> str:
        """Tells the job what became of rows; returns why some must be written again, or nothing."""
        if replies is None:
            pending.done(rows, Verdict.OK)
            return ""
        kinds = np.array([b"+" if reply == b"+OK" else b"-" if reply.startswith(b"-") else b"0" for reply in replies])
        if (written := rows[kinds == b"+"]).size:
            pending.done(written, Verdict.OK)
        if (missing := rows[kinds == b"0"]).size:
            verdicts = np.array(self._diagnose(pending.job, missing, pending.record), dtype=object)
            for verdict in set(verdicts):
                pending.done(missing[verdicts == verdict], verdict)
        failed = next((reply for reply in replies if reply.startswith(b"-")), b"")
        return failed[1:].decode(errors="replace")


@dataclass(slots=True)
class Sent:
    """A job on its way: the rows of each buffer that was sent, and why something of it failed."""

    pending: _Pending
    parts: list[NDArray[np.intp]]
    failure: str = ""


class _Pending:
    """A job, its records once they are packed, and which of its rows Redis has not settled yet."""

    def __init__(self, job: CommitJob) -> None:
        self.job = job
        self.doubtful: list[
            int
        ] = []  # connections that may still have commands of this job buffered, whoever held them
        self._open = np.ones(len(job.tags), np.bool_)
        self._packed: list[tuple[NDArray[np.intp], NDArray[np.uint8]]] = []

    def blocks(self) -> list[tuple[NDArray[np.intp], NDArray[np.uint8]]]:
        """Rows still to be written, and their records, uint8 [rows, record bytes]."""
        if not self._packed:
            self._packed = [(rows, block.packed()) for rows, block in self.job.blocks]
        if self._open.all():
            return self._packed
        return [(rows[left], values[left]) for rows, values in self._packed if (left := self._open[rows]).any()]

    def record(self, row: int) -> bytes:
        rows, values = next((rows, values) for rows, values in self._packed if row in rows)
        return bytes(values[np.flatnonzero(rows == row)[0]])

    def done(self, rows: NDArray[np.intp], verdict: Verdict) -> None:
        self._open[rows] = False
        self.job.done(rows, verdict)
