"""A bounded share of the server for calls that are no steps: so many at a time, so many of one tenant, the others in turn.

Listings, forks, exports and what else looks at Redis for one call run in a few threads of their own. Who asks for many of them
waits behind himself: tenants take turns, in the order in which each asked. Used by unary.py and memory.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter, deque
from collections.abc import AsyncIterator

from engram_service.errors import DeadlineExceededError, ResourceExhaustedError

_RETRY_MS = 500


class Turns:
    """Event loop only."""

    def __init__(self, name: str, at_once: int, of_tenant: int, waiting_max: int, tenant_waiting_max: int) -> None:
        """`name` is what is limited, as errors say it."""
        self._name = name
        self._at_once, self._of_tenant = at_once, of_tenant
        self._waiting_max, self._tenant_waiting_max = waiting_max, tenant_waiting_max
        self._running: Counter[str] = Counter()  # by tenant
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}  # by tenant, in the order of their turns

    @contextlib.asynccontextmanager
    async def turn(self, tenant: str, left_s: float) -> AsyncIterator[None]:
        """Lasts as long as the work. Raises ResourceExhaustedError where too many wait, DeadlineExceededError where none came."""
        await self._enter(tenant, left_s)
        try:
            yield
        finally:
            self._leave(tenant)

    async def _enter(self, tenant: str, left_s: float) -> None:
        if self._may_run(tenant) and not self._waiting:
            self._running[tenant] += 1
            return
        mine = self._waiting.get(tenant, ())
        if len(mine) >= self._tenant_waiting_max or sum(map(len, self._waiting.values())) >= self._waiting_max:
            message = f"{len(mine)} {self._name} of this tenant wait for their turn already, as many as may"
            raise ResourceExhaustedError("QUEUE_FULL", message, retry_after_ms=_RETRY_MS)
        given: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(given)
        self._give()
        try:
            async with asyncio.timeout(max(0.0, left_s)):
                await given
        except BaseException as error:
            self._give_up(tenant, given)
            if isinstance(error, TimeoutError):
                message = f"the call's time was up before its turn among the {self._name} came; nothing was done"
                raise DeadlineExceededError("DEADLINE_EXCEEDED", message) from None
            raise

    def _may_run(self, tenant: str) -> bool:
        return self._running.total() < self._at_once and self._running[tenant] < self._of_tenant

    def _give_up(self, tenant: str, given: asyncio.Future[None]) -> None:
        if given.done() and not given.cancelled():
            self._leave(tenant)
            return
        queue = self._waiting.get(tenant)
        if queue is not None and given in queue:
            queue.remove(given)
            if not queue:
                del self._waiting[tenant]

    def _leave(self, tenant: str) -> None:
        self._running[tenant] -= 1
        if not self._running[tenant]:
            del self._running[tenant]
        if tenant in self._waiting:
            self._waiting[tenant] = self._waiting.pop(tenant)  # the others come first
        self._give()

    def _give(self) -> None:
        """Gives the free turns to those who wait; a tenant that has just had one is the last to get another."""
        while (tenant := next((one for one in self._waiting if self._may_run(one)), None)) is not None:
            queue = self._waiting.pop(tenant)
            given = queue.popleft()
            if queue:
                self._waiting[tenant] = queue
            if not given.done():
                self._running[tenant] += 1
                given.set_result(None)
