"""The committers: threads that write batches to Redis and say what became of each row.

A commit is repeated until Redis has said something about every row: under its token it may be written twice, and as one
session has one commit under way at most, never out of order. A connection whose fate is unknown is killed at the server
before its commands are sent again on another one: what it had still buffered must not come after later commits. In a cluster
that is so for each node; what is left buffered at a node that has lost the slot meanwhile does no harm: the node refuses it
(MOVED), or, a primary that others have replaced, throws it away with all that it has when it joins them again.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import redis
from numpy.typing import NDArray

from engram_service.store.generations import Generations, Mark
from engram_service.store.links import TIMEOUT_S, Link, Links
from engram_service.store.nodes import Node, Nodes, redirected
from engram_service.store.packing import commands, counting
from engram_service.store.pending import Pending, Sent
from engram_service.store.types import CommitJob, StoreSettings, StoreUnavailableError, Verdict
from engram_service.supervision import Supervisor

log = logging.getLogger(__name__)

_ASKING = b"*1\r\n$6\r\nASKING\r\n"
_LOST: tuple[type[Exception], ...] = (redis.exceptions.RedisError, OSError, StoreUnavailableError)

Diagnose = Callable[[CommitJob, NDArray[np.intp], Callable[[int], bytes]], Sequence[Verdict]]


class Committers:
    """A few committer threads, and a way to commit from the event loop."""

    def __init__(
        self, nodes: Nodes, settings: StoreSettings, generations: Generations, diagnose: Diagnose,
        trouble: Callable[[str], None], supervisor: Supervisor,
    ) -> None:  # fmt: skip
        self.nodes = nodes
        self._generations = generations
        self._supervisor = supervisor
        self._diagnose = diagnose
        self._trouble = trouble  # called with why commits fail, and with "" when they go through again
        self._troubled = False
        self._closed = threading.Event()
        self._jobs: queue.SimpleQueue[Pending | Link | None] = queue.SimpleQueue()
        self.settings = settings
        self._refused = ""  # why a link that was to be opened was not, the last time
        self._threads = [supervisor.thread(f"commit-{n}", self._run, self._closed) for n in range(settings.connections)]
        for thread in self._threads:
            thread.start()

    def submit(self, job: CommitJob) -> None:
        self._jobs.put(Pending(job))

    # What lines.py asks

    @property
    def troubled(self) -> bool:
        """Whether commits have failed, and none has gone through since."""
        return self._troubled

    def go_on(self, pending: Pending) -> None:
        """The committers see to the rest of a commit."""
        self._jobs.put(pending)

    def open(self, link: Link) -> None:
        """They open a link for a thread that must not wait for a peer that may hang; until then it commits through them."""
        self._jobs.put(link)

    def mark(self, node: Node) -> Mark:
        """Which counter says at a node that something was written."""
        return self._generations.mark(self._generations.key(self.nodes.generation_key(node)))

    def counted(self, mark: Mark, value: int) -> None:
        self._generations.counted(mark, value)

    @contextmanager
    def noting(self) -> Iterator[list[str]]:
        """Notes what fails, and goes on."""
        failures: list[str] = []
        try:
            yield failures
        except _LOST as error:
            failures.append(str(error) or type(error).__name__)
        except Exception:
            log.exception("a commit failed in a way that was not foreseen; it is tried again")
            failures.append("unforeseen failure")

    def send(self, links: Links, job: CommitJob) -> Sent | None:
        """Sends a commit on a caller's own links; None: the committers have it, for Redis is in trouble, or answers late as it is
        asked to."""
        pending = Pending(job)
        if self._troubled or self.settings.wait is not None:
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
                for rows, _, replies in self._replies(links, sent, node, parts):
                    settled &= pending.written(rows, replies)
        if not settled or sent.failures:
            self._jobs.put(pending)

    def close(self) -> None:
        self._closed.set()
        for _ in self._threads:
            self._jobs.put(None)

    def _run(self) -> None:
        links = Links(self.settings, TIMEOUT_S)
        while (pending := self._jobs.get()) is not None:
            if isinstance(pending, Link):
                self._open(pending)
                continue
            try:
                settled = self._receive(links, self._send(links, pending))
            except Exception as error:  # the job must not go with it: somebody waits for its rows
                self._supervisor.failed("commit", error)
                links.drop()
                settled = False
            if not settled and not self._closed.wait(pending.backoff_s()):
                self._jobs.put(pending)  # behind the others: what is for other nodes need not wait for it
        links.drop()

    def _open(self, link: Link) -> None:
        with self.noting() as failure:
            link.open()
        why = next(iter(failure), "")
        if why and why != self._refused and not self._troubled:  # else it is told already
            log.warning("Redis cannot be reached for commits from the event loop, which take longer so: %s", why)
        self._refused = why

    def _send(self, links: Links, pending: Pending) -> Sent:
        """Sends what is still to be written of a job, to each node what is its, and behind it what counts (generations.py)."""
        pending.begin()
        sent = Sent(pending, {})
        last: dict[Node, memoryview] = {}  # by node: what is still to be sent
        with self._noting(sent, ""):
            for rows, values in pending.blocks():
                for node, at in self.nodes.of_tags(pending.job.tags[rows]):
                    if node.name not in sent.failures:
                        share = (rows, values) if len(at) == len(rows) else (rows[at], values[at])
                        with self._noting(sent, node.name):
                            self._send_to(links, node, sent, last, *share)
            for node, buffer in last.items():
                if node.name not in sent.failures:
                    with self._noting(sent, node.name):
                        mark = self.mark(node)
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
        if sent.failures and self.nodes.in_slots:
            moved = any(redirected(why) for why in sent.failures.values())
            with self._noting(sent, ""):
                self.nodes.refresh()
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
                for rows, buffer, replies in self._replies(links, sent, node, parts):
                    if replies is not None and self.nodes.in_slots:
                        self._ask(links, pending, buffer, replies)
                    if why := self._settle(pending, rows, replies):
                        sent.failures[node.name] = why

    def _replies(
        self, links: Links, sent: Sent, node: Node, parts: list[tuple[NDArray[np.intp], memoryview]]
    ) -> Iterator[tuple[NDArray[np.intp], memoryview, list[bytes] | None]]:
        """Of a node, for each of the buffers that were sent there with its rows; None: all are OK."""
        count = sum(len(rows) for rows, _ in parts)
        replies, counter = links.to(node).receive(count, sent.pending.doubtful[node.name], counted=True)
        if counter.startswith(b":"):  # first, for who looks why a record is not there asks about losses
            self.counted(sent.marks[node], int(counter[1:]))
        start = 0
        for rows, buffer in parts:
            yield rows, buffer, None if replies is None else replies[start : start + len(rows)]
            start += len(rows)

    def _ask(self, links: Links, pending: Pending, buffer: memoryview, replies: list[bytes]) -> None:
        """Writes the rows of a slot that is just moving to where they are by now."""
        width = len(buffer) // len(replies)
        for n, reply in enumerate(replies):
            if reply.startswith(b"-ASK "):
                node = self.nodes.named(reply.split()[2].decode())
                # A connection of its own: the node's other one may have replies to rows of this job under way.
                link = Link(node, self.settings, TIMEOUT_S)
                doubtful = pending.doubtful[node.name]
                link.send([_ASKING, buffer[n * width : (n + 1) * width]], doubtful)
                answers, _ = link.receive(2, doubtful)
                link.drop()
                replies[n] = b"+OK" if answers is None else answers[1]

    @contextmanager
    def _noting(self, sent: Sent, name: str) -> Iterator[None]:
        """Notes what fails at a node, and goes on."""
        with self.noting() as failures:
            yield
        if failures:
            sent.failures[name] = failures[0]

    def _settle(self, pending: Pending, rows: NDArray[np.intp], replies: list[bytes] | None) -> str:
        """Tells the job what became of rows; returns why some must be written again, or nothing."""
        if pending.written(rows, replies) or replies is None:
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
