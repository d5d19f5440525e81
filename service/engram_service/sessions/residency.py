"""Which sessions are in the arena: brings them in before their steps, commits the volatile ones, lets idle ones go.

Event loop only; what touches the arena is posted to the engine, in order with the ticks that need it.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engram_service.catalog import Served
from engram_service.logs import named
from engram_service.sessions.eviction import GRACE_S, leaving
from engram_service.sessions.table import NO_SLOT, NO_STREAM
from engram_service.store import Records, Store, StoreUnavailable, Verdict

if TYPE_CHECKING:
    from engram_service.core import Core

log = logging.getLogger(__name__)

_HEARTBEAT_S = 0.05
_LOAD_RETRY_S = 0.1
_TOUCHED_MAX = 10_000  # sessions whose time is renewed in one beat: a session has a quarter of its time for it
_SPARE_SLOTS = 4  # part of the arena (1/n) that opens leave free for sessions that step


class Residency:
    """Slots of all arenas."""

    def __init__(self, core: Core, store: Store) -> None:
        self._core = core
        self._store = store
        self._started = time.monotonic()
        self._wanting: dict[int, deque[int]] = {}  # model -> sessions that wait for a slot
        self._again: asyncio.TimerHandle | None = None  # of serve_wanting
        self._tasks: set[asyncio.Task[None]] = set()
        self._losses = self._losses_taken_up = (
            0  # times that the store lost its data: told, and begun to be written back
        )
        self._lost = np.empty(0, np.intp)  # what is being written back

    def clock(self) -> float:
        """Seconds since the server started; small enough for float32 columns."""
        return time.monotonic() - self._started

    # In

    def want(self, served: Served, rows: NDArray[np.int32]) -> None:
        """Sees to it that these sessions get a slot; until then they are busy and their steps wait."""
        table = self._core.table
        missing = rows[(table.slot[rows] == NO_SLOT) & ~table.busy[rows]]
        if len(missing):
            missing = np.unique(missing)
            self._core.queue.hold(missing)
            self._wanting.setdefault(served.index, deque()).extend(missing.tolist())
            self.serve_wanting()

    def serve_wanting(self) -> None:
        """Gives slots to sessions that wait for one, as far as there are slots."""
        for model, waiting in self._wanting.items():
            if not waiting:
                continue
            served = self._core.catalog.models[model]
            if served.arena.free < len(waiting):
                self._evict(served, len(waiting) - served.arena.free)
            if count := min(served.arena.free, len(waiting)):
                self._bring(served, np.array([waiting.popleft() for _ in range(count)], np.int32))
            if waiting and self._again is None:  # nobody may step meanwhile, and so ask for it
                self._again = asyncio.get_running_loop().call_later(GRACE_S, self._serve_again)

    def _serve_again(self) -> None:
        self._again = None
        self.serve_wanting()

    def _bring(self, served: Served, rows: NDArray[np.int32]) -> None:
        table = self._core.table
        slots = served.arena.take(rows, self.clock())
        table.slot[rows] = slots
        table.used[rows] = self.clock()
        new = table.applied[rows] == 0
        if new.any():
            fresh = slots[new]
            self._core.queue.post(lambda: served.arena.reset(fresh))
            self._core.queue.release(rows[new])
        if not new.all():
            self._start(self._load(served, rows[~new], slots[~new]))

    async def _load(self, served: Served, rows: NDArray[np.int32], slots: NDArray[np.int32]) -> None:
        """Reads records of sessions that this server still holds; without them the sessions are lost to it."""
        core, table = self._core, self._core.table
        tags, tokens = table.tag[rows].copy(), table.token[rows].copy()
        while True:
            try:
                values = await asyncio.to_thread(self._store.load, tags, tokens)
                break
            except StoreUnavailable:
                await asyncio.sleep(_LOAD_RETRY_S)
        found = np.array([value is not None for value in values])
        core.metrics.records_loaded.labels(served.bundle.name).inc(int(found.sum()))
        records = served.layout.unpack([value for value in values if value is not None])
        for number, reason in records.errors.items():
            log.error("a record cannot be used: %s", reason, extra=named(table.id_of(int(rows[found][number]))))
        good = np.flatnonzero(found)[[i for i in range(int(found.sum())) if i not in records.errors]]
        if len(good):
            self.place(
                served,
                rows[good],
                slots[good],
                records.only([i for i in range(int(found.sum())) if i not in records.errors]),
            )
            core.queue.release(rows[good])
        lost = np.setdiff1d(np.arange(len(rows)), good)
        if len(lost):
            verdicts = await asyncio.to_thread(self._store.diagnose, tags[lost], tokens[lost])
            for row, verdict in zip(rows[lost].tolist(), verdicts, strict=True):
                core.lose(np.array([row], np.int32), verdict)
        core.after_release()

    def place(self, served: Served, rows: NDArray[np.int32], slots: NDArray[np.int32], records: Records) -> None:
        """Puts records into slots; ticks taken from now on find them there."""
        self._core.table.slot[rows] = slots
        self._core.table.used[rows] = self.clock()

        def load() -> None:
            served.arena.reset(slots)
            stated = np.flatnonzero(~records.initial)
            if len(stated):
                served.arena.load(slots[stated], records.states[stated])
            served.arena.load_outputs(slots, records.seq, records.outputs, records.counts)

        self._core.queue.post(load)

    def place_if_room(self, served: Served, rows: NDArray[np.int32], records: Records) -> None:
        """After an open: saves a second read, where slots are plenty."""
        arena = served.arena
        if arena.free - len(rows) > arena.capacity // _SPARE_SLOTS:
            self.place(served, rows, arena.take(rows, self.clock()), records)

    def with_outputs(self, served: Served, rows: NDArray[np.int32], then: Callable[[], None]) -> None:
        """Calls `then` once the kept outputs of these sessions can be read (or it is clear that they cannot)."""
        if (self._core.table.slot[rows] != NO_SLOT).all() and not self._core.table.busy[rows].any():
            # The job that filled the slot may still be on its way to the engine.
            loop = asyncio.get_running_loop()
            self._core.queue.post(lambda: _in_loop(loop, then))
            return
        self.want(served, rows)
        self._start(self._await_outputs(rows, then))

    async def _await_outputs(self, rows: NDArray[np.int32], then: Callable[[], None]) -> None:
        for _ in range(int(self._core.settings.step_timeout_s / _HEARTBEAT_S)):
            if not self._core.table.busy[rows].any():
                break
            await asyncio.sleep(_HEARTBEAT_S)
        then()

    # Out

    def let_go(self, rows: NDArray[np.int32]) -> None:
        """The streams of these sessions are gone: what is volatile is committed soon, then the rows are forgotten."""
        self._core.table.used[rows] = -1e9  # first to be swept

    def remove(self, rows: NDArray[Any]) -> None:
        """Forgets sessions that this server has no longer. They must not be in a tick."""
        table = self._core.table
        for model in np.unique(table.model[rows]).tolist():
            gone = rows[table.model[rows] == model]
            self.forget_slots(self._core.catalog.models[model], gone)
            if waiting := self._wanting.get(model):
                left = set(gone.tolist())
                self._wanting[model] = deque(row for row in waiting if row not in left)
        with self._core.queue.lock:
            table.remove(rows)

    def forget_slots(self, served: Served, rows: NDArray[Any]) -> None:
        """Frees the slots; the records have what is needed."""
        table = self._core.table
        held = rows[table.slot[rows] != NO_SLOT]
        served.arena.give_back(table.slot[held])
        table.slot[held] = NO_SLOT

    def _still(self, rows: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which of these have nothing under way and nothing volatile."""
        table = self._core.table
        still: NDArray[np.bool_] = ~table.busy[rows] & ~table.opening[rows] & ~table.flushing[rows]
        still &= (table.admitted[rows] == table.applied[rows]) & (table.applied[rows] == table.durable[rows])
        return still

    def _evict(self, served: Served, count: int) -> None:
        """Makes room for others that wait."""
        rows, since = served.arena.holders()
        gone = leaving(self._core.table.used[rows], since, self._still(rows), self.clock(), count)
        if len(gone):
            self.forget_slots(served, rows[gone])

    # Durability interval

    def flush_due(self, served: Served, rows: NDArray[np.int32]) -> None:
        """Commits those that are `interval_steps` ahead of their record."""
        table = self._core.table
        ahead = table.applied[rows] - table.durable[rows] >= np.uint64(self._core.settings.interval_steps)
        if ahead.any():
            self._flush(served, rows[ahead])

    def _flush(self, served: Served, rows: NDArray[Any]) -> None:
        table = self._core.table
        rows = rows[~table.flushing[rows] & (table.slot[rows] != NO_SLOT) & (table.model[rows] == served.index)].astype(
            np.int32
        )
        if len(rows):
            table.flushing[rows] = True
            tokens = table.token[rows]
            self._core.queue.post(lambda: self._core.engine.flush(served, rows, tokens))

    def dirty(self, older_than: float = 0.0) -> NDArray[np.intp]:
        """Interval sessions whose record is behind by more than `older_than` seconds."""
        table = self._core.table
        high = table.high
        behind = table.interval[:high] & (table.applied[:high] > table.durable[:high]) & (table.model[:high] >= 0)
        behind &= table.dirty_since[:high] <= self.clock() - older_than
        return np.flatnonzero(behind)

    def flush(self, rows: NDArray[Any]) -> None:
        """Commits these sessions now."""
        for model in np.unique(self._core.table.model[rows]).tolist():
            self._flush(self._core.catalog.models[model], rows)

    async def flush_all(self, deadline: float) -> None:
        while len(rows := self.dirty()) and time.monotonic() < deadline:
            self.flush(rows)
            await asyncio.sleep(0.005)

    def on_flushed(
        self, rows: NDArray[Any], tokens: NDArray[np.uint8], seqs: NDArray[np.uint64], verdict: Verdict
    ) -> None:
        core, table = self._core, self._core.table
        # While the store was away the session may have been closed or claimed anew, and its row be another's.
        same = (table.token[rows] == tokens).all(axis=1)
        rows, tokens, seqs = rows[same], tokens[same], seqs[same]
        table.flushing[rows] = False
        self._lost = np.setdiff1d(self._lost, rows)
        self._core.queue.release(rows[~table.interval[rows]])
        if not verdict.ok:
            core.lose_when_free(rows, tokens, verdict)
            return
        table.durable[rows] = seqs
        table.dirty_since[rows] = self.clock()
        core.tell_durable(rows)
        core.after_release()

    # A store that has lost its data

    def lost_data(self) -> None:
        """The store has lost its data; `write_back` follows on the event loop. Called from the store's threads."""
        self._losses += 1

    def write_back(self) -> None:
        """Commits every resident session that is not in a tick (those write themselves back when their commit fails).

        Meanwhile sessions of durability step are held: a commit of theirs could be done before this one, and be undone by it.
        """
        table = self._core.table
        taken_up = self._losses
        self._place_new()
        rows = np.flatnonzero((table.slot[: table.high] != NO_SLOT) & ~table.busy[: table.high])
        self._core.queue.hold(rows[~table.interval[rows] & ~table.flushing[rows]])
        self.flush(rows)
        self._lost, self._losses_taken_up = rows, taken_up

    def _place_new(self) -> None:
        """Sessions that were opened and not yet stepped have no slot; they get one, as far as there are some, to be committed."""
        table = self._core.table
        for served in self._core.catalog.models:
            high = table.high
            new = (table.model[:high] == served.index) & (table.slot[:high] == NO_SLOT) & (table.applied[:high] == 0)
            new &= (table.stream[:high] != NO_STREAM) & ~table.busy[:high]
            self.want(served, np.flatnonzero(new)[: served.arena.free].astype(np.int32))

    @property
    def writing_back(self) -> bool:
        """Whether sessions are still to be written to a store that has lost its data. Also called from the store's threads."""
        if self._losses != self._losses_taken_up:
            return True
        return bool(self._core.table.flushing[self._lost].any())

    # Heartbeat

    async def beat(self) -> None:
        """Interval commits, and the eviction of idle sessions; runs until cancelled."""
        settings = self._core.settings
        sweep_at = self.clock()
        while True:
            await asyncio.sleep(min(_HEARTBEAT_S, settings.interval_ms / 2000))
            if len(rows := self.dirty(settings.interval_ms / 1000)):
                self.flush(rows)
            self.serve_wanting()
            if self.clock() >= sweep_at:
                if not self._core.store_trouble:  # a store that is away may come back empty, and need what is here
                    self._sweep(self.clock() - settings.resident_idle_s)
                await self._touch()
                sweep_at = self.clock() + 1.0

    async def _touch(self) -> None:
        """Renews the time of sessions that a stream holds: of those that step on and on, whose commits renew the record alone,
        and of those that are idle, which must not expire under their client."""
        table = self._core.table
        high, clock = table.high, self.clock()
        old = (clock - table.touched[:high]) * 1000 > table.ttl_ms[:high] / 4
        rows = np.flatnonzero(old & (table.stream[:high] != NO_STREAM) & (table.model[:high] >= 0))[:_TOUCHED_MAX]
        if len(rows):
            table.touched[rows] = clock
            ids = [table.id_of(row) for row in rows.tolist()]
            columns = (table.tag[rows].copy(), table.token[rows].copy(), table.ttl_ms[rows].copy())
            try:
                await asyncio.to_thread(self._store.touch, *columns)
                await asyncio.to_thread(self._store.tally.keep, ids, columns[2].tolist())
            except StoreUnavailable:
                table.touched[rows] = -1.0

    def _sweep(self, unused_since: float) -> None:
        """Frees the slots of idle sessions, and forgets those that no stream holds."""
        table, freed = self._core.table, False
        for served in self._core.catalog.models:
            rows, _ = served.arena.holders()
            old = rows[self._still(rows) & (table.used[rows] < unused_since)]
            if len(old):
                self.forget_slots(served, old)
                served.arena.trim()
                freed = True
        high = table.high
        alone = (table.stream[:high] == NO_STREAM) & (table.model[:high] >= 0) & (table.slot[:high] == NO_SLOT)
        alone &= ~table.busy[:high] & ~table.opening[:high] & ~table.flushing[:high]
        if alone.any():
            self.remove(np.flatnonzero(alone))
        if freed or alone.any():
            _give_memory_back()

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _give_memory_back() -> None:
    """After a burst the C library keeps freed memory in its pools; idle sessions must not cost what busy ones did."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def _in_loop(loop: asyncio.AbstractEventLoop, then: Callable[[], None]) -> None:
    loop.call_soon_threadsafe(then)
