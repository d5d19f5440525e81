"""Which sessions are in the arena: brings them in before their steps, commits the volatile ones, lets idle ones go.

Event loop only.
"""

from __future__ import annotations

import asyncio
import ctypes
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engram_service.catalog import Catalog, Served
from engram_service.condition import Condition
from engram_service.observability.logs import named
from engram_service.observability.metrics import Metrics
from engram_service.sessions.changes import RuntimeChanges
from engram_service.sessions.constants import Starts
from engram_service.sessions.eviction import GRACE_S, leaving
from engram_service.sessions.pins import Pins
from engram_service.sessions.table import NO_SLOT, NO_STREAM, References, SessionTable
from engram_service.settings import Settings
from engram_service.store import Records, Store, StoreUnavailableError, Verdict
from engram_service.supervision import Supervisor

log = logging.getLogger(__name__)

_HEARTBEAT_S = 0.05
_LOAD_RETRY_S = 0.1
_TOUCHED_MAX = 10_000  # sessions whose time is renewed in one beat: a session has a quarter of its time for it
_SPARE_SLOTS = 4  # part of the arena (1/n) that opens leave free for sessions that step


class Losses(Protocol):
    """Who is told of sessions that this server has no longer (ownership.py)."""

    def dismiss(self, sessions: NDArray[Any]) -> None: ...

    def lose(self, sessions: NDArray[np.int32], verdict: Verdict, pinned: bool = False) -> None: ...

    def lose_when_free(self, sessions: References, verdict: Verdict) -> None: ...


class Residency:
    """Slots of all arenas."""

    losses: Losses

    def __init__(
        self, settings: Settings, table: SessionTable, catalog: Catalog, store: Store, pins: Pins, condition: Condition,
        supervisor: Supervisor, metrics: Metrics, flush: Callable[[Served, References], None],
        durable: Callable[[NDArray[Any]], None],
    ) -> None:  # fmt: skip
        """`flush` commits sessions whose column `flushing` is set, and says so to `on_flushed`; `durable` tells their streams."""
        self._settings = settings
        self._table = table
        self._catalog = catalog
        self._store = store
        self._pins = pins
        self._condition = condition
        self._supervisor = supervisor
        self._metrics = metrics
        self._flush_later = flush
        self._tell_durable = durable
        self.starts = Starts(table)
        self._changes = RuntimeChanges(metrics)
        self._started = time.monotonic()
        self._wanting: dict[
            int, deque[int]
        ] = {}  # model -> rows that wait for a slot, and are pinned until they have it
        self._again: asyncio.TimerHandle | None = None  # of serve_wanting
        self._losses = self._losses_taken_up = (
            0  # times that the store lost its data: told, and begun to be written back
        )
        self._lost = np.empty(0, np.intp)  # what is being written back
        self._touching: asyncio.Task[None] | None = None

    def clock(self) -> float:
        """Seconds since the server started; small enough for float32 columns."""
        return time.monotonic() - self._started

    # In

    def want(self, served: Served, rows: NDArray[np.int32]) -> None:
        """Sees to it that these sessions get a slot; until then they are busy and their steps wait."""
        table = self._table
        absent = table.slot[rows] == NO_SLOT
        if not np.count_nonzero(absent):
            return
        missing = np.unique(rows[absent & ~table.busy[rows]])
        if len(missing):
            self._pins.hold(missing)
            self._wanting.setdefault(served.index, deque()).extend(missing.tolist())
            self.serve_wanting()

    def serve_wanting(self) -> None:
        """Gives slots to sessions that wait for one, as far as there are slots."""
        for model, waiting in self._wanting.items():
            if not waiting:
                continue
            served = self._catalog.models[model]
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
        table = self._table
        slots = served.arena.take(rows, self.clock())
        table.slot[rows] = slots
        table.used[rows] = self.clock()
        new = table.applied[rows] == 0
        if new.any():
            self._begin(served, rows[new], slots[new])
            self._pins.release(rows[new])
        old, places = rows[~new], slots[~new]
        for start in range(0, len(old), served.rows_max):
            part = slice(start, start + served.rows_max)
            self._supervisor.once("load", self._load(served, table.refer(old[part]), places[part]))

    def _begin(self, served: Served, rows: NDArray[np.int32], slots: NDArray[np.int32]) -> None:
        """Puts what sessions without steps begin with into their slots."""
        places, states = self.starts.states(served, rows)

        served.arena.reset(slots)
        if len(places):
            served.arena.load(slots[places], states)

    async def _load(self, served: Served, sessions: References, slots: NDArray[np.int32]) -> None:
        """Reads records of sessions that this server still holds; without them the sessions are lost to it.

        They are pinned all the while, and let go of whatever happens."""
        table, rows = self._table, sessions.rows
        lost: dict[int, Verdict] = dict.fromkeys(range(len(rows)), Verdict.GONE)  # by place, until it is known better
        try:
            found, lost = await self._read(served, table.tag[rows].copy(), table.token[rows].copy())
            for place in lost:
                log.warning("a session could not be read back", extra=named(table.id_of(rows.item(place))))
            good = np.array([n for n in range(len(rows)) if n not in lost], np.intp)
            # A store that came back with an older copy: what is at another step than its client is not what it was.
            if (other := found.seq != table.applied[rows[good]]).any():
                lost |= dict.fromkeys(good[other].tolist(), Verdict.FENCED)  # so it asks, and is told where it stands
                good, found = good[~other], found.only(np.flatnonzero(~other).tolist())
            if len(good):
                self.place(served, rows[good], slots[good], found)
        finally:
            self._pins.release(rows[[n for n in range(len(rows)) if n not in lost]])
            for verdict in set(lost.values()):
                self.losses.lose(rows[[n for n, own in lost.items() if own is verdict]], verdict, pinned=True)
            self.serve_wanting()

    async def _read(
        self, served: Served, tags: NDArray[np.uint8], tokens: NDArray[np.uint8]
    ) -> tuple[Records, dict[int, Verdict]]:
        """The records under these claims, and by place what became of the sessions that have none that can be used."""
        while True:
            try:
                values = await asyncio.to_thread(self._store.load, tags, tokens)
                there = [n for n, value in enumerate(values) if value is not None]
                records = served.layout.unpack([value for value in values if value is not None])
                for reason in records.errors.values():
                    log.error("a record cannot be used: %s", reason)
                sound = [k for k in range(len(there)) if k not in records.errors]
                missing = sorted(set(range(len(values))) - {there[k] for k in sound})
                verdicts = (
                    await asyncio.to_thread(self._store.diagnose, tags[missing], tokens[missing]) if missing else []
                )
            except StoreUnavailableError:
                await asyncio.sleep(_LOAD_RETRY_S)
                continue
            self._metrics.records_loaded.labels(served.bundle.name).inc(len(there))
            return records.only(sound), dict(zip(missing, verdicts, strict=True))

    def place(self, served: Served, rows: NDArray[np.int32], slots: NDArray[np.int32], records: Records) -> None:
        """Puts records into slots; batches from now on find them there."""
        self._table.slot[rows] = slots
        self._table.used[rows] = self.clock()
        self._changes.note(served, records)

        served.arena.reset(slots)
        stated = np.flatnonzero(~records.initial)
        if len(stated):
            served.arena.load(slots[stated], records.states[stated])
        served.arena.load_outputs(slots, records.seq, records.outputs, records.counts)

    def place_if_room(self, served: Served, rows: NDArray[np.int32], records: Records) -> None:
        """After an open: saves a second read, where slots are plenty."""
        arena = served.arena
        if arena.free - len(rows) > arena.capacity // _SPARE_SLOTS:
            self.place(served, rows, arena.take(rows, self.clock()), records)

    # Out

    def let_go(self, rows: NDArray[np.int32]) -> None:
        """The streams of these sessions are gone: what is volatile is committed soon, then the rows are forgotten."""
        self._table.used[rows] = -1e9  # first to be swept

    def give_up(self, rows: NDArray[Any]) -> None:
        """Frees the slots of sessions that are forgotten, and waits for none for them."""
        table = self._table
        self.unwant(rows)
        self.starts.forget(rows)
        for model in set(table.model[rows].tolist()):
            self.forget_slots(self._catalog.models[model], rows[table.model[rows] == model])

    def unwant(self, rows: NDArray[Any]) -> None:
        """Those of these sessions that wait for a slot wait no longer: they will ask again."""
        asked = set(rows.tolist())
        for model, waiting in self._wanting.items():
            if found := [row for row in waiting if row in asked]:
                self._wanting[model] = deque(row for row in waiting if row not in asked)
                self._pins.release(np.array(found, np.int32))
                self._pins.tell()

    def forget_slots(self, served: Served, rows: NDArray[Any]) -> None:
        """Frees the slots; the records have what is needed."""
        table = self._table
        held = rows[table.slot[rows] != NO_SLOT]
        served.arena.give_back(table.slot[held])
        table.slot[held] = NO_SLOT

    def _still(self, rows: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Which of these have nothing under way and nothing volatile."""
        table = self._table
        still: NDArray[np.bool_] = ~table.busy[rows] & ~table.opening[rows] & ~table.flushing[rows]
        still &= (table.admitted[rows] == table.applied[rows]) & (table.applied[rows] == table.durable[rows])
        return still

    def _evict(self, served: Served, count: int) -> None:
        """Makes room for others that wait."""
        rows, since = served.arena.holders()
        gone = leaving(self._table.used[rows], since, self._still(rows), self.clock(), count)
        if len(gone):
            self.forget_slots(served, rows[gone])

    # Durability interval

    def flush_due(self, served: Served, rows: NDArray[np.int32]) -> None:
        """Commits those that are `interval_steps` ahead of their record."""
        table = self._table
        ahead = table.applied[rows] - table.durable[rows] >= np.uint64(self._settings.interval_steps)
        if ahead.any():
            self._flush(served, rows[ahead])

    def _flush(self, served: Served, rows: NDArray[Any]) -> None:
        table = self._table
        rows = rows[~table.flushing[rows] & (table.slot[rows] != NO_SLOT) & (table.model[rows] == served.index)].astype(
            np.int32
        )
        table.flushing[rows] = True
        for start in range(0, len(rows), served.rows_max):
            sessions = table.refer(rows[start : start + served.rows_max])
            self._flush_later(served, sessions)

    def dirty(self, older_than: float = 0.0, rows: NDArray[Any] | None = None) -> NDArray[Any]:
        """Interval sessions (of these) whose record is behind by more than `older_than` seconds."""
        table = self._table
        at: Any = slice(table.high) if rows is None else rows
        behind = table.interval[at] & (table.applied[at] > table.durable[at]) & (table.model[at] >= 0)
        behind &= table.dirty_since[at] <= self.clock() - older_than
        return np.flatnonzero(behind) if rows is None else rows[behind]

    def flush(self, rows: NDArray[Any]) -> None:
        """Commits these sessions now."""
        for model in np.unique(self._table.model[rows]).tolist():
            self._flush(self._catalog.models[model], rows)

    async def flush_all(self, deadline: float) -> None:
        while len(rows := self.dirty()) and time.monotonic() < deadline:
            self.flush(rows)
            await asyncio.sleep(0.005)

    def on_flushed(self, sessions: References, seqs: NDArray[np.uint64], verdict: Verdict) -> None:
        table, rows = self._table, sessions.rows  # which were pinned until now
        table.flushing[rows] = False
        self._lost = np.setdiff1d(self._lost, rows) if len(self._lost) else self._lost
        self._pins.release(rows[~table.interval[rows]])
        if not verdict.ok:
            self.losses.lose_when_free(sessions, verdict)
            return
        table.durable[rows] = seqs
        table.dirty_since[rows] = self.clock()
        self._tell_durable(rows)
        self.serve_wanting()

    # A store that has lost its data

    def lost_data(self) -> None:
        """The store has lost data; `write_back` follows on the event loop. Called from the store's threads."""
        self._losses += 1

    def write_back(self) -> None:
        """Commits every resident session that is not in a batch (those write themselves back when their commit fails).

        Meanwhile sessions of durability step are held: a commit of theirs could be done before this one, and be undone by it.
        """
        table = self._table
        taken_up = self._losses
        self._place_new()
        rows = np.flatnonzero((table.slot[: table.high] != NO_SLOT) & ~table.busy[: table.high])
        self._pins.hold(rows[~table.interval[rows] & ~table.flushing[rows]])
        self.flush(rows)
        self._lost, self._losses_taken_up = rows, taken_up

    def _place_new(self) -> None:
        """Sessions that were opened and not yet stepped have no slot; they get one, as far as there are some, to be committed."""
        table = self._table
        for served in self._catalog.models:
            high = table.high
            new = (table.model[:high] == served.index) & (table.slot[:high] == NO_SLOT) & (table.applied[:high] == 0)
            new &= (table.stream[:high] != NO_STREAM) & ~table.busy[:high]
            self.want(served, np.flatnonzero(new)[: served.arena.free].astype(np.int32))

    @property
    def writing_back(self) -> bool:
        """Whether sessions are still to be written to a store that has lost its data. Also called from the store's threads."""
        if self._losses != self._losses_taken_up:
            return True
        return bool(self._table.flushing[self._lost].any())

    async def written_back(self, deadline: float) -> None:
        """Returns when no living session is still to be written back to a store that has lost its data."""
        while self.writing_back and time.monotonic() < deadline:
            await asyncio.sleep(0.005)

    # Heartbeat

    async def beat(self) -> None:
        """Interval commits, and the eviction of idle sessions; runs until cancelled."""
        settings = self._settings
        sweep_at = self.clock()
        while True:
            await asyncio.sleep(min(_HEARTBEAT_S, settings.interval_ms / 2000))
            rows = self.dirty(settings.interval_ms / 1000)
            if len(rows := rows[~self._table.opening[rows]]):
                self.flush(rows)
            self.serve_wanting()
            if self.clock() >= sweep_at:
                if not self._condition.store_trouble:  # a store that is away may come back empty, and need what is here
                    self._sweep(self.clock() - settings.resident_idle_s)
                if self._touching is None or self._touching.done():
                    self._touching = self._supervisor.once("touch", self._touch())  # commits do not wait for it
                sweep_at = self.clock() + 1.0

    async def _touch(self) -> None:
        """Renews the time of sessions that a stream holds: of those that step on and on, whose commits renew the record alone,
        and of those that are idle, which must not expire under their client."""
        table = self._table
        high, clock = table.high, self.clock()
        old = (clock - table.touched[:high]) * 1000 > table.ttl_ms[:high] / 4
        rows = np.flatnonzero(old & (table.stream[:high] != NO_STREAM) & (table.model[:high] >= 0))[:_TOUCHED_MAX]
        if len(rows):
            table.touched[rows] = clock
            ids = [table.id_of(row) for row in rows.tolist()]
            columns = (table.tag[rows].copy(), table.token[rows].copy(), table.ttl_ms[rows].copy())
            sessions = table.refer(rows)
            try:
                await asyncio.to_thread(self._store.touch, *columns)
                await asyncio.to_thread(self._store.tally.keep, ids, columns[2].tolist())
            except StoreUnavailableError:
                table.touched[table.rows_of(sessions)] = -1.0

    def _sweep(self, unused_since: float) -> None:
        """Frees the slots of idle sessions, and forgets those that no stream holds."""
        table, freed = self._table, False
        self.starts.trim()
        for served in self._catalog.models:
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
            self.losses.dismiss(np.flatnonzero(alone))
        if freed or alone.any():
            _give_memory_back()


def _give_memory_back() -> None:
    """After a burst the C library keeps freed memory in its pools; idle sessions must not cost what busy ones did."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)
