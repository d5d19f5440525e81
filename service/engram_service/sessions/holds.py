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

from engram_service.core import Core
from engram_service.sessions.handles import CLOSED

_FLUSH_POLL_S = 0.005


class Holds:
    """The keys that are held, each with the event that is set when it is let go of."""

    def __init__(self, core: Core) -> None:
        self._core = core
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
                raise self._core.late() from None
        released = asyncio.Event()
        self._held.update(dict.fromkeys(mine, released))
        try:
            await self._quiet(mine, deadline)
            yield
        finally:
            for key in mine:
                del self._held[key]
            rows = self._rows(mine)
            self._core.table.opening[rows] = False
            released.set()

    async def dismiss(self, keys: Sequence[str], deadline: float, why: int = CLOSED) -> None:
        """Forgets what this server knows of sessions that are held, once nothing of them is under way; their streams are told."""
        while len(rows := self._rows(keys)):
            if not self._core.table.pinned(rows).any():
                self._core.dismiss(rows, why)
                return
            await self._core.quiesce(self._core.table.refer(rows), deadline)

    async def _quiet(self, keys: set[str], deadline: float) -> None:
        core, table = self._core, self._core.table
        rows = self._rows(keys)
        if not len(rows):
            return
        sessions = table.refer(rows)
        table.opening[rows] = True
        core.hand_over(rows)
        await core.quiesce(sessions, deadline)
        while len(dirty := np.intersect1d(core.residency.dirty(), table.rows_of(sessions))) and not core.store_trouble:
            core.residency.flush(dirty)
            await core.quiesce(sessions, deadline)
            await asyncio.sleep(_FLUSH_POLL_S)

    def _rows(self, keys: Iterable[str]) -> NDArray[np.int32]:
        table = self._core.table
        return np.array([row for key in keys if (row := table.find(key)) is not None], np.int32)
