"""What a scrape of /metrics says, put together once for all who wait for it."""

from __future__ import annotations

import asyncio

from prometheus_client import CollectorRegistry, generate_latest


class Exposition:
    """The metrics as text. Whoever asks gets one that was begun after that; scrapes at the same time share it."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry
        self._next: asyncio.Task[bytes] | None = None

    async def text(self) -> bytes:
        if self._next is None:
            self._next = asyncio.create_task(self._render())
        return await asyncio.shield(self._next)

    async def _render(self) -> bytes:
        self._next = None  # who asks from now on wants a later one
        return generate_latest(self._registry)
