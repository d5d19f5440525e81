"""Which sessions something is at work on: no step of theirs may start, and none of them may be forgotten. Event loop only."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from typing import Any

from numpy.typing import NDArray

from engram_service.errors import ServiceError
from engram_service.places import at
from engram_service.sessions.table import References, SessionTable


class Pins:
    """The table's column `busy`, and those who wait for it to change."""

    def __init__(self, table: SessionTable, late: Callable[[], ServiceError]) -> None:
        self._table = table
        self._late = late
        self._changed = asyncio.Event()
        self.on_release: Callable[[], None] = lambda: None  # rows that waited may go

    def hold(self, rows: NDArray[Any]) -> None:
        self._table.busy[rows] = True

    def release(self, rows: NDArray[Any]) -> None:
        """These sessions' next rows may go."""
        self._table.busy[at(rows)] = False
        self._changed.set()
        self.on_release()

    def tell(self) -> None:
        """Whoever waits for a session looks again."""
        self._changed.set()

    async def changes(self, deadline: float) -> bool:
        """Waits until sessions have become free; False: the deadline (seconds, monotonic) has come."""
        self._changed.clear()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic()) if deadline < math.inf else None):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def quiesce(self, sessions: References, deadline: float) -> None:
        """Returns when no row of these sessions is under way. Their waiting rows must be dropped before. Raises ServiceError."""
        while self._table.pinned(self._table.rows_of(sessions)).any():
            if not await self.changes(deadline):
                raise self._late()
