"""CloseSession: a session is deleted, whoever holds it. Event loop only.

A close that was begun is finished by the server, whether or not its caller is still there: a deadline that passes or a Redis that
hangs leave no session behind. Who asks again joins the close that is under way.
"""

from __future__ import annotations

import asyncio
import math
import time

from engram_service.errors import UnavailableError, no_session
from engram_service.manager.data_process import DataProcess
from engram_service.observability.metrics import Metrics
from engram_service.sessions.calls import StoreCalls
from engram_service.sessions.ids import check_id
from engram_service.settings import Settings
from engram_service.store import Store
from engram_service.supervision import Supervisor


class Closing:
    """Closes under way, by key."""

    def __init__(
        self, settings: Settings, store: Store, calls: StoreCalls, data: DataProcess, supervisor: Supervisor, metrics: Metrics
    ) -> None:  # fmt: skip
        self._settings = settings
        self._store = store
        self._calls = calls
        self._data = data
        self._supervisor = supervisor
        self._metrics = metrics
        self._tasks: dict[str, asyncio.Task[bool]] = {}

    @property
    def under_way(self) -> int:
        return len(self._tasks)

    async def delete(self, key: str) -> None:
        """Closes a session. Raises NotFoundError, UnavailableError."""
        check_id(key)
        deleting = self._tasks.get(key)
        if deleting is None:
            deadline = time.monotonic() + self._settings.step_timeout_s
            deleting = self._tasks[key] = self._supervisor.once("close", self._delete(key, deadline))
            deleting.add_done_callback(lambda task: self._tasks.pop(key, None))
        try:
            async with asyncio.timeout(self._settings.step_timeout_s):
                existed = await asyncio.shield(deleting)
        except TimeoutError:
            message = "the session is not closed yet: its end was begun and goes on; ask again to learn when it is done"
            raise UnavailableError("STORE_UNAVAILABLE", message, retry_after_ms=500) from None
        if not existed:
            raise no_session(key)

    async def _delete(self, key: str, deadline: float) -> bool:
        """Whether there was such a session. Until its claim is known nothing is begun, and that is given up at the deadline: later
        the id may be that of another session. The claim is then ended whatever comes."""
        existed = False
        call, store = self._calls.call, self._store
        while True:
            existed = bool(await call(deadline, store.exists, key)) or existed
            (token,) = await call(deadline, store.holders, [key])
            until = math.inf if token else deadline
            # What has no claim, for it is damaged, is deleted as it is.
            await call(until, store.delete, [key], [token.encode()] if token else None)
            (left,) = await call(until, store.holders, [key])
            await self._data.dismiss([key], [left])
            if not left or left == token:
                break
            if time.monotonic() > deadline:
                message = "the session was opened meanwhile; try again"
                raise UnavailableError("STORE_UNAVAILABLE", message, retry_after_ms=50)
        if existed:
            self._metrics.sessions_closed.inc()
        return existed
