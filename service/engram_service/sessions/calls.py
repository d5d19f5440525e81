"""Calls of the store from the event loop: each runs in a thread, and again while the store is away. Used by opening.py, ending.py
and the calls that the manager answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Any

from engram_service.errors import UnavailableError
from engram_service.store import StoreUnavailableError

_RETRY_S = 0.1


class StoreCalls:
    """Calls that wait until living sessions have been written back to a store that has lost its data."""

    def __init__(self, written_back: Callable[[float], Awaitable[None]]) -> None:
        """`written_back(deadline)` returns when they have been."""
        self._written_back = written_back

    async def call(
        self, deadline: float, work: Callable[..., Any], *arguments: Any, pool: Executor | None = None
    ) -> Any:
        """Runs a blocking call of the store in a thread; while the store is away, again until the deadline (seconds, monotonic).
        Raises UnavailableError."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                await self._written_back(deadline)
                return await loop.run_in_executor(pool, work, *arguments)
            except StoreUnavailableError as error:
                if time.monotonic() + _RETRY_S > deadline:
                    raise UnavailableError(
                        "STORE_UNAVAILABLE", f"the store cannot be reached ({error})", retry_after_ms=500
                    ) from error
                await asyncio.sleep(_RETRY_S)
