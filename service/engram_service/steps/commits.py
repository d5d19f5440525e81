"""Commits from the event loop: sent at once, waited for in line for a moment, then through the loop's selector. Event loop only.

While a commit is under way its sessions are busy, and the loop goes on with others.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from engram_service.catalog import Served
from engram_service.observability.metrics import Metrics
from engram_service.sessions.table import Reference, SessionTable
from engram_service.steps.records import nbytes_of, pack_records
from engram_service.store import Blocks, CommitJob, Line, MetaFields, Source, Store, Verdict

IN_LINE_S = 0.002
_LINES_MAX = 4
_TIMEOUT_S = 1.0  # then the committers go on with it

Done = Callable[[NDArray[np.intp], Verdict], None]


class Commits:
    """A few lines to Redis, each with one commit under way at most."""

    def __init__(
        self, store: Store, table: SessionTable, metrics: Metrics, meta: Callable[[Reference], MetaFields | None]
    ) -> None:
        self._table = table
        self._metrics = metrics
        self._meta = meta
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._free: list[Line] = [store.line() for _ in range(_LINES_MAX)]
        self._parked: dict[Line, asyncio.TimerHandle] = {}
        self._sources: dict[int, tuple[NDArray[np.uint8], Source | None]] = {}  # by model, and of which table
        self.on_free: Callable[[], None] = lambda: None  # a line has come free

    def open(self) -> None:
        """Before the first commit."""
        for line in self._free:
            line.open()

    @property
    def full(self) -> bool:
        """Whether there is no line for another commit."""
        return not self._free

    def send(
        self, served: Served, sessions: NDArray[np.int32], seqs: NDArray[np.uint64], states: list[NDArray[np.uint8]],
        done: Done, wait_s: float = IN_LINE_S, busy: bool = True,
    ) -> bool:  # fmt: skip
        """Commits sessions at these seqs, and waits so long for the end. They are pinned until then, and there is a free line.

        states: what the sessions are at; none: as the arena has it. `busy`: they stay at it until they are written. True: all of it
        is written. Else `done` is told what became of which of them, on the event loop, now or later."""
        line = self._free[-1]
        if not states and served.arena.device != "cpu":
            states = [served.arena.packed(self._table.slot[sessions])]
        source = self._source(line, served)
        written = None if source is None else line.write(source, sessions, seqs, states, wait_s)
        self._metrics.commit_rows.inc(len(sessions))
        if written:
            self._metrics.commit_bytes.inc(line.nbytes)
            return True
        try:
            job = self._job(served, sessions, seqs, states, done, busy)
        except Exception:
            if line.end():
                return True
            raise
        self._free.pop()
        line.send(job)
        if line.ready(wait_s if written is None else 0.0):
            self._finish(line)
        else:
            self._park(line)
        return False

    def _source(self, line: Line, served: Served) -> Source | None:
        """What a line writes records of, if it can; made anew when the table has grown."""
        found = self._sources.get(served.index)
        if found is None or found[0] is not self._table.tag:
            arena = served.arena
            made = line.source(served.layout, self._table, arena.state_rows(), arena.output_rows)
            found = self._sources[served.index] = self._table.tag, made
        return found[1]

    def _job(
        self, served: Served, rows: NDArray[np.int32], seqs: NDArray[np.uint64], states: list[NDArray[np.uint8]],
        done: Done, busy: bool,
    ) -> CommitJob:  # fmt: skip
        """Records of sessions that are busy are put together when they are needed: what `write` has begun mostly ends well."""
        table, slots, sessions = self._table, self._table.slot[rows], self._table.refer(rows)
        acked, epochs = table.acked[rows], table.epoch[rows]
        self._metrics.commit_bytes.inc(nbytes_of(served, seqs, acked))

        def blocks() -> Blocks:
            return pack_records(served, slots, seqs, acked, epochs, states or [served.arena.packed(slots)])

        if not busy:
            now = blocks()
        return CommitJob(
            tags=table.tag[rows],
            tokens=table.token[rows],
            blocks=blocks if busy else lambda: now,
            ttl_ms=table.ttl_ms[rows],
            meta=lambda row: self._meta(sessions.one(row)),
            done=lambda places, verdict: self._here(done, places, verdict),
        )

    def _park(self, line: Line) -> None:
        """The rest of the wait is the selector's: it watches one connection after the other."""

        def going_on(number: int) -> None:
            self._leave(number)
            if line.ready(0.0):
                self._parked.pop(line).cancel()
                self._finish(line)
            else:
                self._watch(line, going_on)

        def late() -> None:
            self._leave(line.waits_on())
            del self._parked[line]
            line.give_up()
            self._freed(line)

        self._parked[line] = self._loop.call_later(_TIMEOUT_S, late)
        self._watch(line, going_on)

    def _watch(self, line: Line, going_on: Callable[[int], None]) -> None:
        number = line.waits_on()
        self._loop.add_reader(number, going_on, number)
        if line.wants_write():
            self._loop.add_writer(number, going_on, number)

    def _leave(self, number: int) -> None:
        self._loop.remove_reader(number)
        self._loop.remove_writer(number)

    def _finish(self, line: Line) -> None:
        line.finish()
        self._freed(line)

    def _freed(self, line: Line) -> None:
        self._free.append(line)
        self.on_free()

    def _here(self, done: Done, rows: NDArray[np.intp], verdict: Verdict) -> None:
        """On the event loop, for the committers have threads of their own."""
        if threading.get_ident() == self._thread:
            done(rows, verdict)
        else:
            self._loop.call_soon_threadsafe(done, rows, verdict)
