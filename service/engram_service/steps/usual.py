"""Rows that are like most are let in at a fraction of what it costs to look at each: all of them or none. What is not let in here,
admission.py looks at. Event loop only.
"""

from __future__ import annotations

import time

import numpy as np
from numpy.typing import NDArray

from engram_service.catalog import Catalog, Served
from engram_service.condition import Condition
from engram_service.pauses import Pauses
from engram_service.places import NATIVE
from engram_service.rows import Rows
from engram_service.scheduling.columns import Steps
from engram_service.scheduling.scheduler import Scheduler
from engram_service.sessions.shares import Shares
from engram_service.sessions.streams import Streams
from engram_service.sessions.table import NO_SLOT, SessionTable
from engram_service.settings import Settings
from engram_service.steps.room import Room
from engram_service.wire.base import ADMITTED, CALL, FIRST, NOT_ACKNOWLEDGED, Arrived

if NATIVE:
    import engram_native

_NOT_ACKNOWLEDGED = int(NOT_ACKNOWLEDGED)
_NO_FLAGS = np.zeros(1, np.uint8)


class Usual:
    """Lets rows in that need no second look."""

    def __init__(
        self, settings: Settings, table: SessionTable, catalog: Catalog, streams: Streams, shares: Shares,
        scheduler: Scheduler, condition: Condition, pauses: Pauses, room: Room, native: bool,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._table = table
        self._catalog = catalog
        self._streams = streams
        self._shares = shares
        self._scheduler = scheduler
        self._condition = condition
        self._pauses = pauses
        self._room = room
        self._native = _Native(streams, table) if native and NATIVE else None
        self._takes: dict[int, Rows] = {}  # by model
        self.latest: Served | None = None  # whose rows were let in last

    def admit(self, arrived: Arrived, now: float) -> bool:
        """Whether these rows wait for their batch now; if not, nothing was done that is not done again."""
        return self._together(arrived, now) or (len(arrived) == 1 and self._one(arrived, now))

    def inputs_of(self, served: Served) -> Rows:
        """What input rows of a model are made of."""
        found = self._takes.get(served.index)
        if found is None:
            found = self._takes[served.index] = Rows(served.bundle.schema.inputs)
        return found

    def deadlines(self, timeouts_ms: NDArray[np.uint32], now: float) -> NDArray[np.float64]:
        if not np.count_nonzero(timeouts_ms):
            deadlines = np.empty(len(timeouts_ms))  # which np.full takes longer for
            deadlines.fill(now + self._settings.step_timeout_s)
            return deadlines
        return now + np.where(timeouts_ms > 0, timeouts_ms / 1000, self._settings.step_timeout_s)

    def _together(self, arrived: Arrived, now: float) -> bool:
        """Rows like most, of the model that was stepped last, at a fraction of what all checks cost. False: something about one is
        not usual, and nothing was done that is not done again."""
        served, streams = self.latest, self._streams
        if self._native is None or served is None or self._condition.draining or self._shares.limited:
            return False
        takes, timeouts = self.inputs_of(served), arrived.timeouts_ms
        least = int(timeouts[timeouts > 0].min()) if np.count_nonzero(timeouts) else 0
        if (
            len(arrived.inputs) != len(arrived) * takes.nbytes
            or streams.in_flight + len(arrived) > self._room.rows_max(least)
            or self._pauses.refusal(served.index) is not None
        ):
            return False
        inputs, floats = arrived.inputs.reshape(-1, takes.nbytes), 0
        if not takes.float_nbytes:
            if takes.faults(inputs, served.bundle.allows_non_finite):
                return False
        elif not served.bundle.allows_non_finite:
            floats = takes.float_nbytes
        rows = self._native.admit(arrived, inputs, served.index, served.arena.window, floats)
        if rows is None:
            return False
        arrived.times[:, ADMITTED] = time.monotonic()
        steps = Steps(rows, arrived.streams, arrived.handles, arrived.seqs, np.zeros(len(rows), np.uint8),
                      self.deadlines(timeouts, now), arrived.times, inputs)  # fmt: skip
        self._scheduler.add(served.index, steps)
        return True

    def _one(self, arrived: Arrived, now: float) -> bool:
        """The usual single row of a client with one session, at a fraction of what columns cost. False: something about it is not
        usual, and nothing was done."""
        table, stream, seq = self._table, self._streams.get(arrived.streams.item(0)), arrived.seqs.item(0)
        row = -1 if stream is None else stream.handles.row_of(arrived.handles.item(0))
        if row < 0 or arrived.flags.item(0) != FIRST or self._condition.draining or self._shares.limited:
            return False
        served, acked = self._catalog.models[table.model.item(row)], arrived.acknowledged.item(0)
        takes, timeout_ms = self.inputs_of(served), arrived.timeouts_ms.item(0)
        if not seq and arrived.streams.item(0) & CALL:  # the next one
            seq, acked = table.admitted.item(row) + 1, table.applied.item(row)
            arrived.seqs[0], arrived.acknowledged[0] = seq, acked
        acked = min(acked, table.applied.item(row)) if acked != _NOT_ACKNOWLEDGED else 0
        acked = max(acked, table.acked.item(row))
        unusual = (
            seq != table.admitted.item(row) + 1
            or seq > acked + served.arena.window
            or table.opening.item(row)
            or table.slot.item(row) == NO_SLOT
            or len(arrived.inputs) != takes.nbytes
            or self._streams.in_flight >= self._room.rows_max(timeout_ms)
            or self._pauses.refusal(served.index) is not None
        )
        if unusual:
            return False
        inputs = arrived.inputs.reshape(1, -1)
        if takes.faults(inputs, served.bundle.allows_non_finite):
            return False
        table.acked[row], table.admitted[row] = acked, seq
        self._streams.arrived(arrived.streams)
        deadline = now + (timeout_ms / 1000 if timeout_ms else self._settings.step_timeout_s)
        arrived.times[0, ADMITTED] = time.monotonic()
        steps = Steps(np.array([row], np.int32), arrived.streams, arrived.handles, arrived.seqs, _NO_FLAGS,
                      np.array([deadline]), arrived.times, inputs)  # fmt: skip
        self._scheduler.add(served.index, steps)
        self.latest = served
        return True


class _Native:
    """The columns of streams and table, as the extension knows them."""

    def __init__(self, streams: Streams, table: SessionTable) -> None:
        self._streams = streams
        self._table = table
        self._sizes: tuple[int, ...] = ()
        self._native: engram_native.Usual | None = None

    def admit(
        self, arrived: Arrived, inputs: NDArray[np.uint8], model: int, window: int, floats: int
    ) -> NDArray[np.int32] | None:  # fmt: skip
        """The sessions' rows, if these are rows of this model alone, without flags, each the next step of a session that has a
        slot and room for an output in its window: they are admitted then, and in flight. inputs: uint8 [n, input_nbytes], of
        floats of so many bytes, which are to be finite, or of what needs no look (0). None: but for what they acknowledge,
        nothing was done."""
        rows = np.empty(len(arrived), np.int32)
        admitted = self._known().admit(
            arrived.streams, arrived.handles, arrived.seqs, arrived.acknowledged, arrived.flags, arrived.input_nbytes,
            inputs, rows, model, window, inputs.shape[1], floats,
        )  # fmt: skip
        if not admitted:
            return None
        self._streams.in_flight += len(rows)
        return rows

    def _known(self) -> engram_native.Usual:
        """Made anew when there are more streams, places or sessions, and with them other columns."""
        table, found, sizes = self._table, self._native, (*self._streams.sizes, len(self._table.model))
        if found is None or sizes != self._sizes:
            ids, in_flight, starts, counts, rows, handles = self._streams.columns
            found = self._native = engram_native.Usual(
                ids, in_flight, starts, counts, rows, handles, table.model, table.slot, table.opening.view(np.uint8),
                table.admitted, table.applied, table.acked,
            )  # fmt: skip
            self._sizes = sizes
        return found
