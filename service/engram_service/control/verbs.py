"""What a data process answers to its manager: what it knows of sessions, and what it does with them for others."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import numpy as np

from engram_service.control.metrics import told
from engram_service.observability.metrics import Metrics
from engram_service.sessions.handles import CLOSED, TAKEN_OVER
from engram_service.sessions.holds import Holds
from engram_service.sessions.pins import Pins
from engram_service.sessions.residency import Residency
from engram_service.sessions.table import NO_SLOT, NO_STREAM, Reference, SessionTable
from engram_service.store import Store

_WAIT_S_MAX = 0.5  # between looks at sessions that are waited for, where nothing happens


class Verbs:
    """One method for each. Event loop only."""

    def __init__(
        self, table: SessionTable, store: Store, holds: Holds, pins: Pins, residency: Residency, metrics: Metrics,
        reload: Callable[[], Awaitable[dict[str, Any]]],
    ) -> None:  # fmt: skip
        self._table = table
        self._store = store
        self._holds = holds
        self._pins = pins
        self._residency = residency
        self._metrics = metrics
        self._reload = reload

    async def ping(self) -> None:
        """It lives."""

    async def holds(self, keys: Sequence[str]) -> list[str]:
        table = self._table
        rows = [table.find(key) for key in keys]
        return ["" if row is None else "stored" if table.slot[row] == NO_SLOT else "device" for row in rows]

    async def flush(self, keys: Sequence[str], seqs: Sequence[int], left_s: float) -> list[int]:
        """For each session that a stream has here the last step that is in Redis, once that has all that was applied when it was
        asked, and is at `seqs`, or the time is up; -1: none has it here."""
        deadline = time.monotonic() + left_s
        return list(
            await asyncio.gather(*(self._flushed(key, seq, deadline) for key, seq in zip(keys, seqs, strict=True)))
        )

    async def release(self, keys: Sequence[str], left_s: float) -> None:
        """Before somebody else claims them: steps under way are done, what is volatile is committed, and they are let go of; their
        streams are told that they were taken over. Raises ServiceError."""
        deadline = time.monotonic() + left_s
        async with self._holds.hold(keys, deadline):
            await self._holds.dismiss(keys, deadline, TAKEN_OVER)

    async def dismiss(self, keys: Sequence[str], kept: Sequence[str]) -> None:
        """After a close or a move: sessions are forgotten that are here under other claims than those in `kept`."""
        for key, token in zip(keys, kept, strict=True):
            row = self._table.find(key)
            if row is not None and self._table.token[row].tobytes() != token.encode():
                async with self._holds.hold([key], float("inf")):
                    row = self._table.find(key)
                    if row is not None and self._table.token[row].tobytes() != token.encode():
                        await self._holds.dismiss([key], float("inf"), TAKEN_OVER if token else CLOSED)

    async def reload(self) -> dict[str, Any]:
        """Looks for models; what is not served and why, and whether it is worth to look again soon."""
        return await self._reload()

    async def metrics(self) -> list[dict[str, Any]]:
        return told(self._metrics.registry)

    async def written_back(self, left_s: float) -> None:
        """Redis may have lost its data: looks whether that is so, and returns when living sessions have been written back."""
        await asyncio.to_thread(self._store.look_for_loss)
        await self._residency.written_back(time.monotonic() + left_s)

    async def _flushed(self, key: str, seq: int, deadline: float) -> int:
        table, row = self._table, self._table.find(key)
        if row is None or table.stream[row] == NO_STREAM:
            return -1
        session: Reference = table.refer(np.array([row])).one(0)
        wanted = max(seq, int(table.applied[row]))
        while (row := table.row_of(session)) is not None and int(table.durable[row]) < wanted:
            if table.interval[row] and int(table.durable[row]) < min(wanted, int(table.applied[row])):
                self._residency.flush(np.array([row]))
            now = time.monotonic()
            if now > deadline:
                break
            await self._pins.changes(min(deadline, now + _WAIT_S_MAX))
        return -1 if row is None else int(table.durable[row])
