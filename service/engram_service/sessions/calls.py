"""Calls of the store from the event loop: each runs in a thread, and again while the store is away. Used by opening.py, ending.py
and the calls that the manager answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from typing import Any, TypeVar

from engram_service.errors import UnavailableError
from engram_service.sessions.together import Together
from engram_service.store import StoreUnavailableError

T = TypeVar("T")
R = TypeVar("R")

_RETRY_S = 0.1


class StoreCalls:
    """Calls that wait until living sessions have been written back to a store that has lost its data. Until the deadline (seconds,
    monotonic) each is made again while the store is away. Raises UnavailableError."""

    def __init__(self, written_back: Callable[[float], Awaitable[None]]) -> None:
        """`written_back(deadline)` returns when they have been."""
        self._written_back = written_back

    async def call(
        self, deadline: float, work: Callable[..., Any], *arguments: Any, pool: Executor | None = None
    ) -> Any:
        """Runs a blocking call of the store in a thread."""
        loop = asyncio.get_running_loop()
        return await self._again(deadline, lambda everybodys: loop.run_in_executor(pool, work, *arguments))

    async def together(self, deadline: float, work: Together[T, R], things: Sequence[T]) -> list[R]:
        """A call with others; but alone once such a one has failed for what may be their reason: a slot of the cluster that is
        just moving, a session whose hash no script can make sense of."""
        return await self._again(deadline, lambda everybodys: (work.ask if everybodys else work.alone)(things))

    async def _again(self, deadline: float, ask: Callable[[bool], Awaitable[T]]) -> T:
        """`ask` is told whether all that the store has refused so far, it would have refused everybody."""
        everybodys = True
        while True:
            try:
                await self._written_back(deadline)
                return await ask(everybodys)
            except StoreUnavailableError as error:
                if time.monotonic() + _RETRY_S > deadline:
                    raise UnavailableError(
                        "STORE_UNAVAILABLE", f"the store cannot be reached ({error})", retry_after_ms=500
                    ) from error
                everybodys = everybodys and error.everybodys
                await asyncio.sleep(_RETRY_S)
