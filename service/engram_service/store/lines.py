"""The event loop's ways to Redis, each for one commit at a time. None waits for longer than it is asked to.

What is not plainly written is the committers' to find out about, and so is everything while Redis is in trouble.
"""

from __future__ import annotations

import select
import time
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engram_service.places import NATIVE
from engram_service.store.committer import Committers
from engram_service.store.keys import META_PREFIX
from engram_service.store.links import INLINE_TIMEOUT_S, Links
from engram_service.store.nodes import Node
from engram_service.store.pending import Pending, Sent
from engram_service.store.record import RecordBlock, RecordLayout
from engram_service.store.tls import spoken
from engram_service.store.types import CommitJob
from engram_service.store.ways import Way

Source: TypeAlias = Any  # an engram_native.RecordSource

if NATIVE:
    import engram_native

_PACKED = np.empty((0, 0), np.uint8)  # records that the extension has put together itself
_WIDTHS_MAX = 8  # widths of records whose memory is kept


class Columns(Protocol):
    """Of the session table: what a record and its key are made of."""

    tag: NDArray[np.uint8]
    token: NDArray[np.uint8]
    ttl_ms: NDArray[np.uint64]
    acked: NDArray[np.uint64]
    epoch: NDArray[np.uint64]
    slot: NDArray[np.int32]


class Line(Protocol):
    """One way to Redis."""

    nbytes: int  # of the records that the last `write` has written

    def open(self) -> None:
        """Makes the connections beforehand, where Redis is there: the first commit need not wait for them."""

    def source(
        self, layout: RecordLayout, columns: Columns, states: list[NDArray[np.uint8]], outputs: NDArray[np.uint8]
    ) -> Source | None:  # fmt: skip
        """What `write` makes records of. states: the arena's, uint8 [slots, nbytes], none if they are on a device; outputs: the
        last ones, uint8 [slots, window, nbytes]. None: this line has no `write`."""

    def write(
        self, source: Source, rows: NDArray[np.int32], seqs: NDArray[np.uint64], states: list[NDArray[np.uint8]],
        wait_s: float,
    ) -> bool | None:  # fmt: skip
        """Writes the records of these rows of the table, and waits so long for the replies. True: all of them are written. False:
        it was begun, and `send` goes on with the job of the same rows. None: it was not."""

    def end(self) -> bool:
        """What `write` has begun is waited for, and not gone on with; whether all of it is written."""

    def send(self, job: CommitJob) -> None:
        """Never fails; what cannot be sent is the committers' to send again."""

    def ready(self, timeout_s: float) -> bool:
        """Whether `finish` need not wait, now or within a time."""

    def waits_on(self) -> int:
        """The descriptor that becomes readable with the next reply; to be asked while it is not ready."""

    def wants_write(self) -> bool:
        """Whether it also waits until that descriptor takes more."""

    def finish(self) -> None:
        """Takes the replies and tells the job."""

    def give_up(self) -> None:
        """The replies do not come: the connections that wait are dropped, and the committers go on."""


def line_of(committers: Committers) -> Line:
    """The extension's, where it is and can do what the URL asks for."""
    settings = committers.settings
    return NativeLine(committers) if NATIVE and settings.native and spoken(settings.url) else PythonLine(committers)


def _readable(descriptor: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


class PythonLine:
    """Sockets of redis-py, and NumPy. A Redis that answers late as it is asked to (WAIT) is left to the committers."""

    nbytes = 0

    def __init__(self, committers: Committers) -> None:
        self._committers = committers
        self._links = Links(committers.settings, INLINE_TIMEOUT_S)
        self._sent: Sent | None = None
        self._left: list[int] = []  # descriptors of connections whose replies have not begun to come

    def open(self) -> None:
        with self._committers.noting():
            for node in self._committers.nodes.all():
                self._links.to(node).opened([])

    def source(self, *_: Any) -> Source | None:
        return None

    def write(self, *_: Any) -> bool | None:
        return None

    def end(self) -> bool:
        return False

    def send(self, job: CommitJob) -> None:
        self._sent = sent = self._committers.send(self._links, job)
        nodes = [] if sent is None else [node for node in sent.parts if node.name not in sent.failures]
        self._left = [number for node in nodes if (number := self._links.to(node).waits_on()) is not None]

    def ready(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        while self._left:
            if not _readable(self._left[-1], max(0.0, deadline - time.monotonic())):
                return False
            self._left.pop()
        return True

    def waits_on(self) -> int:
        return self._left[-1]

    def wants_write(self) -> bool:
        return False  # it has waited for that

    def finish(self) -> None:
        sent, self._sent = self._sent, None
        if sent is not None:
            self._committers.receive(self._links, sent)

    def give_up(self) -> None:
        if self._sent is not None:
            for node in self._sent.parts:
                if self._links.to(node).waits_on() in self._left:
                    self._links.to(node).abandon(self._sent.pending.doubtful[node.name])
        self.finish()


class NativeLine:
    """The extension packs commands, sends them and counts replies, without the interpreter's lock."""

    def __init__(self, committers: Committers) -> None:
        self._committers = committers
        self._settings = committers.settings
        self._links = Links(committers.settings, INLINE_TIMEOUT_S, native=True)
        self._ways: dict[str, Way] = {}
        self._pending: Pending | None = None
        self._used: list[Way] = []
        self._failed = False
        wait = committers.settings.wait
        self._wait = b"" if wait is None else _command(*wait)
        self._scratch: dict[int, NDArray[np.uint8]] = {}  # by width: records of the commit that is under way
        self._single: Way | None = None  # where there is one node, and no cluster
        self._begun: Way | None = None  # what `write` has begun goes this way
        self._short = False  # it is written, on too few copies
        self.nbytes = 0

    def open(self) -> None:
        with self._committers.noting():
            for node in self._committers.nodes.all():
                self._way(node).open([])

    def source(
        self, layout: RecordLayout, columns: Columns, states: list[NDArray[np.uint8]], outputs: NDArray[np.uint8]
    ) -> Source | None:  # fmt: skip
        return engram_native.RecordSource(
            columns.tag, columns.token, columns.ttl_ms, columns.acked, columns.epoch, columns.slot, states, outputs,
            outputs.shape[1], layout.state_nbytes, layout.fingerprint, layout.runtime, META_PREFIX,
        )  # fmt: skip

    def write(
        self, source: Source, rows: NDArray[np.int32], seqs: NDArray[np.uint64], states: list[NDArray[np.uint8]],
        wait_s: float,
    ) -> bool | None:  # fmt: skip
        way = self._single
        if way is None or way.native is None or self._committers.troubled:
            return None
        way.mark = mark = self._committers.mark(way.node)
        now_ms = time.time_ns() // 1_000_000
        try:
            over = way.native.commit(source, rows, seqs, states, now_ms, mark.key, self._wait, wait_s)
        except OSError:  # of the connection, whose link is over: `send` finds that out
            over = None
        if over is None:
            self._begun = way
            return False
        self.nbytes, counter, waited = over
        if counter is not None:
            self._committers.counted(mark, counter)
        if self._wait and not self._enough(waited):
            self._begun, self._short = way, True
            return False
        return True

    def end(self) -> bool:
        way, self._begun, short, self._short = self._begun, None, self._short, False
        if way is None or short:
            return False
        with self._committers.noting():
            if way.native.progress(INLINE_TIMEOUT_S):
                kinds, _, _, waited = way.native.verdicts()
                return kinds is None and (not self._wait or self._enough(waited))
        doubtful: list[int] = []
        way.drop(doubtful)
        with self._committers.noting():
            way.link.opened(doubtful)  # so Redis takes no more of it
        return False

    def send(self, job: CommitJob) -> None:
        pending = Pending(job)
        self._used, self._failed, self._pending = [], False, pending
        if self._begun is not None:
            self._go_on(self._begun, pending)
            return
        if self._committers.troubled:
            self._failed = True
            return
        pending.begin()
        with self._committers.noting() as failure:
            blocks = job.blocks()
            for rows, block in blocks:
                values = self._packed(block, len(blocks) == 1)
                for node, at in self._committers.nodes.of_tags(job.tags if len(blocks) == 1 else job.tags[rows]):
                    way = self._way(node)
                    if way not in self._used:
                        self._used.append(way)
                    way.blocks.append((rows, values) if len(at) == len(rows) else (rows[at], values[at]))
            for way in self._used:
                if not way.is_open(self._committers):  # to open it may take long
                    way.blocks, way.done, self._failed = [], True, True
                    continue
                for rows, _ in way.blocks:
                    pending.unknown[rows] = True
                way.mark = self._committers.mark(way.node)
                with self._committers.noting() as own:
                    way.send(job, way.mark.key, self._wait, pending.doubtful[way.node.name])
                if own:
                    self._fail(way, pending)
        if failure:
            self._failed = True
            for way in self._used:
                self._fail(way, pending)

    def _go_on(self, way: Way, pending: Pending) -> None:
        """With what `write` has begun."""
        pending.begin()
        pending.unknown[:] = True
        if self._short:
            self._failed = True
        else:
            way.blocks, self._used = [(np.arange(len(pending.unknown)), _PACKED)], [way]
            if way.native.descriptor < 0:
                self._fail(way, pending)
        self._begun, self._short = None, False

    def ready(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s if timeout_s else 0.0
        for way in self._used:
            if not way.done:
                with self._committers.noting() as failure:
                    way.done = way.native.progress(max(0.0, deadline - time.monotonic()) if timeout_s else 0.0)
                if failure and self._pending is not None:
                    self._fail(way, self._pending)
                if not way.done:
                    return False
        return True

    def waits_on(self) -> int:
        return int(self._waiting().native.descriptor)

    def wants_write(self) -> bool:
        return bool(self._waiting().native.wants_write)

    def _waiting(self) -> Way:
        return next(way for way in self._used if not way.done)

    def finish(self) -> None:
        pending, self._pending = self._pending, None
        settled = not self._failed
        if pending is None:
            return
        for way in self._used:
            if way.native is not None and way.done and way.blocks:
                with self._committers.noting() as failure:
                    settled &= self._take(way, pending)
                if failure:
                    self._fail(way, pending)
                    settled = False
            way.blocks, way.done = [], False
        if not settled or self._failed:
            self._committers.go_on(pending)

    def give_up(self) -> None:
        for way in self._used:
            if not way.done and self._pending is not None:
                self._fail(way, self._pending)
        self.finish()

    def _take(self, way: Way, pending: Pending) -> bool:
        """The replies of a node; whether all that was sent there is settled."""
        kinds, errors, counter, waited = way.native.verdicts()
        # First, for who looks why a record is not there asks about losses.
        if counter is not None and way.mark is not None:
            self._committers.counted(way.mark, counter)
        if self._wait and not self._enough(waited):
            return False  # as safe as was asked for it is not yet: it is written again
        rows = way.blocks[0][0] if len(way.blocks) == 1 else np.concatenate([rows for rows, _ in way.blocks])
        if kinds is None:
            return pending.written(rows, None)
        texts = dict(errors)
        replies = [
            b"+OK" if kind == 43 else b"-" + texts.get(n, b"") if kind == 45 else b"$-1" for n, kind in enumerate(kinds)
        ]
        return pending.written(rows, replies)

    def _enough(self, waited: list[int]) -> bool:
        """Whether as many copies as were asked for have what was written."""
        return self._settings.waited(waited[0] if self._settings.ack == "replicated" else waited)

    def _way(self, node: Node) -> Way:
        way = self._ways.get(node.name)
        if way is None:
            way = self._ways[node.name] = Way(node, self._links.to(node))
            self._single = None if self._committers.nodes.in_slots else way
        return way

    def _fail(self, way: Way, pending: Pending) -> None:
        way.drop(pending.doubtful[way.node.name])
        way.done, way.blocks, self._failed = True, [], True

    def _packed(self, block: RecordBlock, alone: bool) -> NDArray[np.uint8]:
        """Records, in memory that is used again where no other block of the commit can be as wide: they stay until it is done."""
        if not alone:
            return block.packed()
        layout, rows = block.layout, len(block.seq)
        width = layout.record_nbytes(block.outputs.shape[1])
        out = self._scratch.get(width)
        if out is None or len(out) < rows:
            if len(self._scratch) >= _WIDTHS_MAX:
                self._scratch.clear()
            out = self._scratch[width] = np.empty((max(rows, 0 if out is None else 2 * len(out)), width), np.uint8)
        engram_native.pack_records(
            out[:rows], layout.fingerprint, layout.runtime, block.seq, block.acked, block.epoch, block.counts,
            list(block.states), block.outputs, block.now_ms,
        )  # fmt: skip
        return out[:rows]


def _command(*words: str | int) -> bytes:
    parts = [str(word).encode() for word in words]
    return b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
