"""Keeps a session's opens, closes and moves apart: each holds the sessions that it is about, one after the other. Event loop only.

While a session is held none of its steps is admitted; those that waited were refused, and those under way are done.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager

import numpy as np
from numpy.typing import NDArray

from engram_service.condition import Condition
from engram_service.sessions.handles import CLOSED
from engram_service.sessions.ownership import Ownership
from engram_service.sessions.pins import Pins
from engram_service.sessions.residency import Residency
from engram_service.sessions.table import SessionTable

_FLUSH_POLL_S = 0.005


class Holds:
    """The keys that are held, each with the event that is set when it is let go of."""

    def __init__(
        self, table: SessionTable, pins: Pins, residency: Residency, ownership: Ownership, condition: Condition
    ) -> None:  # fmt: skip
        self._table = table
        self._pins = pins
        self._residency = residency
        self._ownership = ownership
        self._condition = condition
        self._held: dict[str, asyncio.Event] = {}

    @asynccontextmanager
    async def hold(self, keys: Sequence[str], deadline: float) -> AsyncIterator[None]:
        """Keeps others from opening, closing or moving these sessions, once none of their steps is under way. Raises ServiceError
        at the deadline (seconds, monotonic)."""
        mine = set(keys)
        while blocking := next((self._held[key] for key in mine if key in self._held), None):
            try:
                async with asyncio.timeout(None if deadline == float("inf") else max(0.0, deadline - time.monotonic())):
                    await blocking.wait()
            except TimeoutError:
                raise self._condition.late() from None
        released = asyncio.Event()
        self._held.update(dict.fromkeys(mine, released))
        try:
            await self._quiet(mine, deadline)
            yield
        finally:
            for key in mine:
                del self._held[key]
            rows = self._rows(mine)
            self._table.opening[rows] = False
            released.set()

    async def dismiss(self, keys: Sequence[str], deadline: float, why: int = CLOSED) -> None:
        """Forgets what this server knows of sessions that are held, once nothing of them is under way; their streams are told."""
        while len(rows := self._rows(keys)):
            if not self._table.pinned(rows).any():
                self._ownership.dismiss(rows, why)
                return
            await self._pins.quiesce(self._table.refer(rows), deadline)

    async def _quiet(self, keys: set[str], deadline: float) -> None:
        table = self._table
        rows = self._rows(keys)
        if not len(rows):
            return
        sessions = table.refer(rows)
        table.opening[rows] = True
        self._ownership.hand_over(rows)
        await self._pins.quiesce(sessions, deadline)
        while len(dirty := self._residency.dirty(rows=table.rows_of(sessions))) and not self._condition.store_trouble:
            self._residency.flush(dirty)
            await self._pins.quiesce(sessions, deadline)
            await asyncio.sleep(_FLUSH_POLL_S)

    def _rows(self, keys: Iterable[str]) -> NDArray[np.int32]:
        table = self._table
        return np.array([row for key in keys if (row := table.find(key)) is not None], np.int32)
