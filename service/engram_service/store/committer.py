"""The committers: threads that write ticks to Redis and say what became of each row.

A commit is repeated until Redis has said something about every row: under its token it may be written twice, and as one
session has one commit under way at most, never out of order. A connection whose fate is unknown is killed at the server
before its commands are sent again on another one: what it had still buffered must not come after later commits. In a cluster
that is so for each node; what is left buffered at a node that has lost the slot meanwhile does no harm: the node refuses it
(MOVED), or, a primary that others have replaced, throws it away with all that it has when it joins them again.
"""

from __future__ import annotations

import logging
import queue
import select
import socket
import ssl
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import redis
from numpy.typing import NDArray

from engram_service.store.generations import Generations, Mark
from engram_service.store.nodes import Node, Nodes, redirected
from engram_service.store.packing import commands, counting, read_replies
from engram_service.store.types import UNACKNOWLEDGED, CommitJob, StoreSettings, StoreUnavailableError, Verdict
from engram_service.supervision import Supervisor

log = logging.getLogger(__name__)

_BACKOFF_S = (0.02, 0.05, 0.1, 0.2, 0.5)
_TIMEOUT_S = 5.0  # without a reply for so long, a connection is given up
_INLINE_TIMEOUT_S = 1.0  # the same for the event loop: the committers then go on with it
_SEND_BUFFER = 4 << 20  # a tick's commands at once, if the kernel allows so much
_JOINED_MAX = 64 << 10
_ASKING = b"*1\r\n$6\r\nASKING\r\n"
_UNACKNOWLEDGED = UNACKNOWLEDGED.encode()
_LOST: tuple[type[Exception], ...] = (redis.exceptions.RedisError, OSError, StoreUnavailableError)

Diagnose = Callable[[CommitJob, NDArray[np.intp], Callable[[int], bytes]], Sequence[Verdict]]


class Link:
    """One connection for commits; not shared between threads."""

    def __init__(self, node: Node, settings: StoreSettings, timeout_s: float) -> None:
        self._node = node
        self._settings = settings
        self._timeout_s = timeout_s
        self._connection: Any = None
        self._id = 0

    def send(self, buffers: list[memoryview | bytes], doubtful: list[int]) -> None:
        """Sends commands, whose replies `receive` then takes in the same order. Raises RedisError or OSError.

        `doubtful` has the ids of connections on which the same commands may still be buffered; they are killed first, and
        if this connection fails as well, it is added.
        """
        with self._giving_up(doubtful):
            connection = self._ready()
            self._kill(doubtful)
            connection.send_packed_command(_joined(buffers), check_health=False)

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
            connection: Any = pool.connection_class(**{**pool.connection_kwargs, "redis_connect_func": None})
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

    def __init__(self, settings: StoreSettings, timeout_s: float) -> None:
        self._settings = settings
        self._timeout_s = timeout_s
        self._links: dict[str, Link] = {}

    def to(self, node: Node) -> Link:
        if node.name not in self._links:
            self._links[node.name] = Link(node, self._settings, self._timeout_s)
        return self._links[node.name]

    def drop(self) -> None:
        for link in self._links.values():
            link.drop()


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


def _joined(buffers: list[memoryview | bytes]) -> list[memoryview | bytes]:
    """Little is sent at once, for a system call costs more than to copy it."""
    return [b"".join(buffers)] if sum(map(len, buffers)) <= _JOINED_MAX else buffers


class Committers:
    """A few committer threads, and a way to commit from the event loop."""

    def __init__(
        self, nodes: Nodes, settings: StoreSettings, generations: Generations, diagnose: Diagnose,
        trouble: Callable[[str], None], supervisor: Supervisor,
    ) -> None:  # fmt: skip
        self._nodes = nodes
        self._generations = generations
        self._supervisor = supervisor
        self._diagnose = diagnose
        self._trouble = trouble  # called with why commits fail, and with "" when they go through again
        self._troubled = False
        self._closed = threading.Event()
        self._jobs: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._settings = settings
        self._threads = [supervisor.thread(f"commit-{n}", self._run, self._closed) for n in range(settings.connections)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: CommitJob) -> None:
        self._jobs.put(_Pending(job))

    def line(self) -> Line:
        """A way to commit from the event loop."""
        return Line(self, Links(self._settings, _INLINE_TIMEOUT_S))

    def send(self, links: Links, job: CommitJob) -> Sent | None:
        """Sends a commit on a caller's own links; None: the committers have it, for Redis is in trouble, or answers late as it is
        asked to."""
        pending = _Pending(job)
        if self._troubled or self._settings.wait is not None:
            self._jobs.put(pending)
            return None
        return self._send(links, pending)

    def receive(self, links: Links, sent: Sent) -> None:
        """Takes the replies. What is not plainly written is the committers' to find out about."""
        pending, settled = sent.pending, not sent.failures
        for node, parts in sent.parts.items():
            if node.name in sent.failures:
                continue
            with self._noting(sent, node.name):
                replies, _ = self._replies(links, sent, node, parts)
                start = 0
                for rows, _ in parts:
                    own = None if replies is None else replies[start : start + len(rows)]
                    start += len(rows)
                    settled &= _settle_written(pending, rows, own)
        if not settled or sent.failures:
            self._jobs.put(pending)

    def close(self) -> None:
        self._closed.set()
        for _ in self._threads:
            self._jobs.put(None)

    def _run(self) -> None:
        links = Links(self._settings, _TIMEOUT_S)
        while (pending := self._jobs.get()) is not None:
            try:
                settled = self._receive(links, self._send(links, pending))
            except Exception as error:  # the job must not go with it: somebody waits for its rows
                self._supervisor.failed("commit", error)
                links.drop()
                settled = False
            if not settled and not self._closed.wait(pending.backoff_s()):
                self._jobs.put(pending)  # behind the others: what is for other nodes need not wait for it
        links.drop()

    def _send(self, links: Links, pending: _Pending) -> Sent:
        """Sends what is still to be written of a job, to each node what is its, and behind it what counts (generations.py)."""
        pending.begin()
        sent = Sent(pending, {})
        last: dict[Node, memoryview] = {}  # by node: what is still to be sent
        with self._noting(sent, ""):
            for rows, values in pending.blocks():
                for node, at in self._nodes.of_tags(pending.job.tags[rows]):
                    if node.name not in sent.failures:
                        share = (rows, values) if len(at) == len(rows) else (rows[at], values[at])
                        with self._noting(sent, node.name):
                            self._send_to(links, node, sent, last, *share)
            for node, buffer in last.items():
                if node.name not in sent.failures:
                    with self._noting(sent, node.name):
                        mark = self._generations.mark(self._generations.key(self._nodes.generation_key(node)))
                        links.to(node).send([buffer, counting(mark.key)], pending.doubtful[node.name])
                        sent.marks[node] = mark
        return sent

    def _send_to(
        self, links: Links, node: Node, sent: Sent, last: dict[Node, memoryview], rows: NDArray[np.intp],
        values: NDArray[np.uint8],
    ) -> None:  # fmt: skip
        job = sent.pending.job
        sent.pending.unknown[rows] = True
        for part, buffer in commands(job.tags[rows], job.tokens[rows], values, job.ttl_ms[rows]):
            if node in last:
                links.to(node).send([last[node]], sent.pending.doubtful[node.name])
            last[node] = buffer
            sent.parts.setdefault(node, []).append((rows[part], buffer))

    def _receive(self, links: Links, sent: Sent) -> bool:
        """Takes the replies to what was sent of a job; whether all of it is settled now."""
        self._take(links, sent)
        if sent.failures and self._nodes.in_slots:
            moved = any(redirected(why) for why in sent.failures.values())
            with self._noting(sent, ""):
                self._nodes.refresh()
                if moved:
                    sent = self._send(links, sent.pending)
                    self._take(links, sent)
        failure = next(iter(sent.failures.values()), "")
        if failure or self._troubled:
            self._troubled = bool(failure)
            self._trouble(failure)
        return not failure

    def _take(self, links: Links, sent: Sent) -> None:
        pending = sent.pending
        for node, parts in sent.parts.items():
            if node.name in sent.failures:
                continue
            with self._noting(sent, node.name):
                replies, _ = self._replies(links, sent, node, parts)
                start = 0
                for rows, buffer in parts:
                    own = None if replies is None else replies[start : start + len(rows)]
                    start += len(rows)
                    if own is not None and self._nodes.in_slots:
                        self._ask(links, pending, buffer, own)
                    if why := self._settle(pending, rows, own):
                        sent.failures[node.name] = why

    def _replies(
        self, links: Links, sent: Sent, node: Node, parts: list[tuple[NDArray[np.intp], memoryview]]
    ) -> tuple[list[bytes] | None, bytes]:
        """Of a node, as Link.receive gives them."""
        count = sum(len(rows) for rows, _ in parts)
        replies, counter = links.to(node).receive(count, sent.pending.doubtful[node.name], counted=True)
        if counter.startswith(b":"):  # first, for who looks why a record is not there asks about losses
            self._generations.counted(sent.marks[node], int(counter[1:]))
        return replies, counter

    def _ask(self, links: Links, pending: _Pending, buffer: memoryview, replies: list[bytes]) -> None:
        """Writes the rows of a slot that is just moving to where they are by now."""
        width = len(buffer) // len(replies)
        for n, reply in enumerate(replies):
            if reply.startswith(b"-ASK "):
                node = self._nodes.named(reply.split()[2].decode())
                # A connection of its own: the node's other one may have replies to rows of this job under way.
                link = Link(node, self._settings, _TIMEOUT_S)
                doubtful = pending.doubtful[node.name]
                link.send([_ASKING, buffer[n * width : (n + 1) * width]], doubtful)
                answers, _ = link.receive(2, doubtful)
                link.drop()
                replies[n] = b"+OK" if answers is None else answers[1]

    @contextmanager
    def _noting(self, sent: Sent, name: str) -> Iterator[None]:
        """Notes what fails at a node, and goes on."""
        try:
            yield
        except _LOST as error:
            sent.failures[name] = str(error) or type(error).__name__
        except Exception:
            log.exception("a commit failed in a way that was not foreseen; it is tried again")
            sent.failures[name] = "unforeseen failure"

    def _settle(self, pending: _Pending, rows: NDArray[np.intp], replies: list[bytes] | None) -> str:
        """Tells the job what became of rows; returns why some must be written again, or nothing."""
        if _settle_written(pending, rows, replies) or replies is None:
            return ""
        missing = rows[[reply[:1] not in (b"+", b"-") for reply in replies]]
        if missing.size:
            verdicts = np.array(self._diagnose(pending.job, missing, pending.record), dtype=object)
            for verdict in set(verdicts):
                own = missing[verdicts == verdict]
                late = pending.doubted[own]
                pending.done(own[~late], verdict)
                pending.done(own[late], verdict.late)
        failed = next((reply for reply in replies if reply.startswith(b"-")), b"")
        return failed[1:].decode(errors="replace")


def _settle_written(pending: _Pending, rows: NDArray[np.intp], replies: list[bytes] | None) -> bool:
    """Tells the job of the rows that were written (None: all of them); whether they all were."""
    if replies is None:
        pending.done(rows, Verdict.OK)
        return True
    pending.unknown[rows] = [reply.endswith(_UNACKNOWLEDGED) for reply in replies]
    written = np.array([reply == b"+OK" for reply in replies], np.bool_)
    if written.any():
        pending.done(rows[written], Verdict.OK)
    return bool(written.all())


def _readable(descriptor: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


class Line:
    """The event loop's way to Redis, for one commit at a time. It waits for no longer than it is asked to."""

    def __init__(self, committers: Committers, links: Links) -> None:
        self._committers = committers
        self._links = links
        self._sent: Sent | None = None
        self._left: list[int] = []  # descriptors of connections whose replies have not begun to come

    def send(self, job: CommitJob) -> None:
        """Never fails; what cannot be sent is the committers' to send again."""
        self._sent = sent = self._committers.send(self._links, job)
        nodes = [] if sent is None else [node for node in sent.parts if node.name not in sent.failures]
        self._left = [number for node in nodes if (number := self._links.to(node).waits_on()) is not None]

    def ready(self, timeout_s: float) -> bool:
        """Whether `finish` need not wait, now or within a time."""
        deadline = time.monotonic() + timeout_s
        while self._left:
            if not _readable(self._left[-1], max(0.0, deadline - time.monotonic())):
                return False
            self._left.pop()
        return True

    def waits_on(self) -> int:
        """The descriptor that becomes readable with the next reply; to be asked while it is not ready."""
        return self._left[-1]

    def finish(self) -> None:
        """Takes the replies and tells the job."""
        sent, self._sent = self._sent, None
        if sent is not None:
            self._committers.receive(self._links, sent)

    def give_up(self) -> None:
        """The replies do not come: the connections that wait are dropped, and the committers go on."""
        if self._sent is not None:
            for node in self._sent.parts:
                if self._links.to(node).waits_on() in self._left:
                    self._links.to(node).abandon(self._sent.pending.doubtful[node.name])
        self.finish()


@dataclass(slots=True)
class Sent:
    """A job on its way: by node's name what failed; rows and buffers that were sent to each node, and what was known of its
    counter then."""

    pending: _Pending
    failures: dict[str, str]
    parts: dict[Node, list[tuple[NDArray[np.intp], memoryview]]] = field(default_factory=dict)
    marks: dict[Node, Mark] = field(default_factory=dict)


class _Pending:
    """A job, its records once they are packed, and which of its rows Redis has not settled yet."""

    def __init__(self, job: CommitJob) -> None:
        self.job = job
        # By node: ids of connections, whoever held them, that may still have commands of this job buffered.
        self.doubtful: defaultdict[str, list[int]] = defaultdict(list)
        self._attempts = 0
        self.unknown = np.zeros(
            len(job.tags), np.bool_
        )  # rows that were sent, and of which Redis has not said what became
        self.doubted = np.zeros(len(job.tags), np.bool_)  # the same of earlier attempts
        self._open = np.ones(len(job.tags), np.bool_)
        self._packed: list[tuple[NDArray[np.intp], NDArray[np.uint8]]] = []

    def begin(self) -> None:
        """Another attempt: what was sent before without a word on it may have been written."""
        self.doubted |= self.unknown
        self.unknown[:] = False

    def backoff_s(self) -> float:
        """How long to wait after one more attempt has failed."""
        self._attempts += 1
        return _BACKOFF_S[min(self._attempts, len(_BACKOFF_S)) - 1]

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
