"""Waits for a session's record to be at a step. Used by unary.py, for whatever reads a session's state.

All who wait for one session share one look at Redis, and it comes only when the record may be there: where this server holds the
session, after its step is durable by what the table says, or else, since others may hold it, ever more seldom.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from engram_service.auth.tenants import tenant_of
from engram_service.errors import ResourceExhaustedError, ServiceError, UnavailableError
from engram_service.sessions.pins import Pins
from engram_service.sessions.residency import Residency
from engram_service.sessions.table import NO_STREAM, Reference, SessionTable
from engram_service.settings import Settings
from engram_service.store import SessionInfo
from engram_service.supervision import Supervisor

_ROUND_S = 0.01  # between two looks at the table
_LOOK_S, _LOOK_S_MAX = 0.01, 0.5  # between two looks at Redis for a session that another server may hold
_WAITING_MAX, _TENANT_WAITING_MAX = 4096, 1024
_LOOKS_AT_ONCE = 8
_RETRY_MS = 500

Describe = Callable[[str, float], Awaitable[SessionInfo]]


@dataclass(slots=True, eq=False)
class _Wait:
    min_seq: int
    applied: int  # by this server when the call came
    held: Reference | None  # the session then, if this server had it
    found: asyncio.Future[SessionInfo]

    @property
    def target(self) -> int:
        """The step that must be durable."""
        return max(self.min_seq, self.applied)


@dataclass(slots=True, eq=False)
class _Watched:
    """One session, and those who wait for it."""

    key: str
    pause_s: float = _LOOK_S
    next_look: float = 0.0
    looking: bool = False
    looked_at: int = -1  # the step that was durable when Redis was last looked at
    target: int = 0  # the least step that somebody waits for
    waits: list[_Wait] = field(default_factory=list)

    def count(self) -> None:
        self.target = min((wait.target for wait in self.waits), default=0)


class Looks:
    """Those who wait, by session. Event loop only."""

    def __init__(
        self, settings: Settings, table: SessionTable, pins: Pins, residency: Residency, supervisor: Supervisor,
        describe: Describe,
    ) -> None:  # fmt: skip
        """`describe` reads a session with its record. Raises NotFoundError and whatever else the store may say."""
        self._settings = settings
        self._table = table
        self._pins = pins
        self._residency = residency
        self._supervisor = supervisor
        self._describe = describe
        self._watched: dict[str, _Watched] = {}
        self._waiting: Counter[str] = Counter()  # by tenant
        self._round: asyncio.Task[Any] | None = None
        self._looking: set[asyncio.Task[Any]] = set()

    async def committed(self, key: str, left_s: float, min_seq: int) -> SessionInfo:
        """The session with its record, once that has what this server has applied by now, and is at step `min_seq`: another
        server may hold the session, or its client may still have to replay it. Raises NotFoundError,
        UnavailableError, ResourceExhaustedError."""
        deadline = time.monotonic() + left_s
        wait = self._asked(key, min_seq)
        if not self._behind(wait):
            info = await self._describe(key, left_s)
            if info.seq >= min_seq:
                return info
        self._enter(key, wait)
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                return await wait.found
        except TimeoutError:
            message = f"step {wait.target} is not committed yet; try again"
            raise UnavailableError("STORE_UNAVAILABLE", message, retry_after_ms=_RETRY_MS) from None
        finally:
            self._leave(key, wait)

    def _asked(self, key: str, min_seq: int) -> _Wait:
        table, row = self._table, self._table.find(key)
        found: asyncio.Future[SessionInfo] = asyncio.get_running_loop().create_future()
        if row is None:
            return _Wait(min_seq, 0, None, found)
        return _Wait(min_seq, int(table.applied[row]), table.refer(np.array([row])).one(0), found)

    def _enter(self, key: str, wait: _Wait) -> None:
        tenant = tenant_of(key)
        if self._waiting.total() >= _WAITING_MAX or self._waiting[tenant] >= _TENANT_WAITING_MAX:
            mine, all_ = self._waiting[tenant], self._waiting.total()
            message = f"{mine} calls of this tenant and {all_} of all wait for steps of sessions, as many as may"
            raise ResourceExhaustedError("QUEUE_FULL", message, retry_after_ms=_RETRY_MS)
        self._waiting[tenant] += 1
        watched = self._watched.setdefault(key, _Watched(key, next_look=time.monotonic() + _LOOK_S))
        watched.waits.append(wait)
        watched.count()
        if self._round is None or self._round.done():
            self._round = self._supervisor.once("looks", self._rounds())

    def _leave(self, key: str, wait: _Wait) -> None:
        self._waiting -= Counter((tenant_of(key),))
        watched = self._watched[key]
        watched.waits.remove(wait)
        watched.count()
        if not watched.waits:
            del self._watched[key]

    async def _rounds(self) -> None:
        """Looks after all who wait, until nobody does."""
        while self._watched:
            now = time.monotonic()
            due = [
                one for one in self._watched.values() if not one.looking and (now >= one.next_look or self._ready(one))
            ]
            for watched in sorted(due, key=lambda one: one.next_look)[: _LOOKS_AT_ONCE - len(self._looking)]:
                watched.looking = True
                task = self._supervisor.once("look", self._look(watched))
                self._looking.add(task)
                task.add_done_callback(self._looking.discard)
            await asyncio.sleep(_ROUND_S)
            await self._until_something_happens()

    async def _until_something_happens(self) -> None:
        """Returns when a step was done, or it is time to look at Redis again."""
        idle = [one for one in self._watched.values() if not one.looking]
        seconds = min((one.next_look for one in idle), default=0.0) - time.monotonic()
        if seconds > 0 and not any(map(self._ready, idle)):
            await self._pins.changes(time.monotonic() + min(seconds, _LOOK_S_MAX))

    def _ready(self, watched: _Watched) -> bool:
        """Whether this server holds the session, and somebody's step has become durable."""
        done = self._durable(watched.key)
        return done >= watched.target and done > watched.looked_at

    def _durable(self, key: str) -> int:
        table, row = self._table, self._table.find(key)
        return -1 if row is None or table.stream[row] == NO_STREAM else int(table.durable[row])

    def _behind(self, wait: _Wait) -> bool:
        """Whether what this server had applied when the call came is volatile yet; then it is committed now."""
        table, row = self._table, None if wait.held is None else self._table.row_of(wait.held)
        if row is None or not table.interval[row] or table.durable[row] >= wait.applied:
            return False
        self._residency.flush(np.array([row]))
        return True

    async def _look(self, watched: _Watched) -> None:
        watched.looked_at = self._durable(watched.key)
        try:
            waits = [wait for wait in watched.waits if not self._behind(wait)]
            if waits:
                info = await self._describe(watched.key, self._settings.step_timeout_s)
                for wait in waits:
                    if info.seq >= wait.min_seq and not wait.found.done():
                        wait.found.set_result(info)
        except ServiceError as refusal:
            for wait in watched.waits:
                if not wait.found.done():
                    wait.found.set_exception(refusal)
        finally:
            watched.looking = False
            watched.next_look = time.monotonic() + watched.pause_s
            watched.pause_s = min(2 * watched.pause_s, _LOOK_S_MAX)
