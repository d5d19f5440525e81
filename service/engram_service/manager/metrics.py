"""What a scrape of /metrics says: the metrics of manager and data process, put together once for all who wait for it."""

from __future__ import annotations

import asyncio
from typing import Any

from prometheus_client import generate_latest

from engram_service.control.metrics import MANAGER, together, told
from engram_service.manager.data_process import DataProcess
from engram_service.observability.metrics import Metrics

_TIMEOUT_S = 2.0  # for the data process; without it a scrape says what the manager knows


class Gathered:
    """The metrics as text. Whoever asks gets one that was begun after that; scrapes at the same time share it. `text` belongs to
    the event loop of the HTTP port; the data process is asked on the manager's, which made this."""

    def __init__(self, metrics: Metrics) -> None:
        self.data: DataProcess | None = None
        self._metrics = metrics
        self._loop = asyncio.get_running_loop()
        self._next: asyncio.Task[bytes] | None = None

    async def text(self) -> bytes:
        if self._next is None:
            self._next = asyncio.create_task(self._render())
        return await asyncio.shield(self._next)

    async def _render(self) -> bytes:
        self._next = None  # who asks from now on wants a later one
        processes = {MANAGER: told(self._metrics.registry)}
        if self.data is not None:
            processes["0"] = await self._asked(self.data)
        return generate_latest(together(processes))

    async def _asked(self, data: DataProcess) -> list[dict[str, Any]]:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(data.metrics(_TIMEOUT_S), self._loop))
