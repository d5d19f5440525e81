"""Waits for a session's record to be at a step. Used by unary.py, for whatever reads a session's state.

The data process is asked first: what it has applied by then is in Redis before the record is read. Where the session is not at the
step yet, because its client has still to replay it, or another server holds it, all who wait for it share one look at Redis, which
comes when the data process says that the step is durable, or else ever more seldom.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from engram_service.auth.tenants import tenant_of
from engram_service.errors import ResourceExhaustedError, ServiceError, UnavailableError
from engram_service.manager.data_process import DataProcess
from engram_service.settings import Settings
from engram_service.store import SessionInfo
from engram_service.supervision import Supervisor

_LOOK_S, _LOOK_S_MAX = 0.01, 0.5  # between two looks at Redis for a session that another server may hold
_WAITING_MAX, _TENANT_WAITING_MAX = 4096, 1024
_LOOKS_AT_ONCE = 8
_RETRY_MS = 500

Describe = Callable[[str, float], Awaitable[SessionInfo]]


@dataclass(slots=True, eq=False)
class _Wait:
    seq: int
    found: asyncio.Future[SessionInfo] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Looks:
    """Those who wait, by session. Event loop only."""

    def __init__(self, settings: Settings, data: DataProcess, supervisor: Supervisor, describe: Describe) -> None:
        """`describe` reads a session with its record. Raises NotFoundError and whatever else the store may say."""
        self._settings = settings
        self._data = data
        self._supervisor = supervisor
        self._describe = describe
        self._waits: dict[str, list[_Wait]] = {}  # by key, while somebody looks after them
        self._waiting: Counter[str] = Counter()  # by tenant
        self._turns = asyncio.Semaphore(_LOOKS_AT_ONCE)

    async def committed(self, key: str, left_s: float, min_seq: int) -> SessionInfo:
        """The session with its record, once that has what this server has applied by now, and is at step `min_seq`: another
        server may hold the session, or its client may still have to replay it. Raises NotFoundError,
        UnavailableError, ResourceExhaustedError."""
        deadline = time.monotonic() + left_s
        (durable,) = await self._data.flush([key], [0], left_s)
        wanted = max(min_seq, durable)
        info = await self._describe(key, max(0.0, deadline - time.monotonic()))
        if info.seq >= wanted:
            return info
        wait, waits = self._enter(key, wanted)
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return await wait.found
        except TimeoutError:
            message = f"step {wanted} is not committed yet; try again"
            raise UnavailableError("STORE_UNAVAILABLE", message, retry_after_ms=_RETRY_MS) from None
        finally:
            self._waiting -= Counter((tenant_of(key),))
            waits.remove(wait)

    def _enter(self, key: str, seq: int) -> tuple[_Wait, list[_Wait]]:
        tenant = tenant_of(key)
        if self._waiting.total() >= _WAITING_MAX or self._waiting[tenant] >= _TENANT_WAITING_MAX:
            mine, all_ = self._waiting[tenant], self._waiting.total()
            message = f"{mine} calls of this tenant and {all_} of all wait for steps of sessions, as many as may"
            raise ResourceExhaustedError("QUEUE_FULL", message, retry_after_ms=_RETRY_MS)
        self._waiting[tenant] += 1
        wait = _Wait(seq)
        if key in self._waits:
            self._waits[key].append(wait)
        else:
            self._waits[key] = [wait]
            self._supervisor.once("look", self._look_after(key))
        return wait, self._waits[key]

    async def _look_after(self, key: str) -> None:
        """Looks until nobody waits for this session any more."""
        waits, pause_s = self._waits[key], _LOOK_S
        try:
            while left := [wait.seq for wait in waits if not wait.found.done()]:
                began, least = time.monotonic(), min(left)
                (durable,) = await self._data.flush([key], [least], pause_s)
                if durable < least:  # the data process has waited as long as that, or it does not hold the session
                    await asyncio.sleep(max(0.0, began + pause_s - time.monotonic()))
                async with self._turns:
                    await self._look(key, waits)
                pause_s = min(2 * pause_s, _LOOK_S_MAX)
        finally:
            del self._waits[key]

    async def _look(self, key: str, waits: list[_Wait]) -> None:
        try:
            info = await self._describe(key, self._settings.step_timeout_s)
            for wait in waits:
                if info.seq >= wait.seq and not wait.found.done():
                    wait.found.set_result(info)
        except ServiceError as refusal:
            for wait in waits:
                if not wait.found.done():
                    wait.found.set_exception(refusal)
