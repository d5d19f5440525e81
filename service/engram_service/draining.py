"""How a data process goes away: it takes nothing more, finishes what it accepted, and makes everything durable."""

from __future__ import annotations

import asyncio
import logging
import time

from engram_service.condition import Condition
from engram_service.protocols.engram.fronts import Front
from engram_service.protocols.engram.stream import StreamHandler
from engram_service.scheduling.scheduler import Scheduler
from engram_service.sessions.residency import Residency
from engram_service.sessions.streams import Streams
from engram_service.steps.advance import Advances
from engram_service.supervision import Supervisor

log = logging.getLogger(__name__)

_STOP_GRACE_S = 1.0
_LOOK_S = 0.005


class Drain:
    """Once, at the end."""

    def __init__(
        self, front: Front, stream: StreamHandler, streams: Streams, scheduler: Scheduler,
        advances: Advances, residency: Residency, condition: Condition, supervisor: Supervisor,
    ) -> None:  # fmt: skip
        self._front = front
        self._stream = stream
        self._streams = streams
        self._scheduler = scheduler
        self._advances = advances
        self._residency = residency
        self._condition = condition
        self._supervisor = supervisor

    async def run(self, timeout_s: float) -> None:
        log.info("draining")
        deadline = time.monotonic() + timeout_s
        self._condition.draining = True
        self._stream.drain()
        while self._busy() and time.monotonic() < deadline:
            await asyncio.sleep(_LOOK_S)
        await self._residency.flush_all(deadline)
        self._stream.finish()
        await self._front.stop(_STOP_GRACE_S)
        await self._supervisor.cancel()

    def _busy(self) -> bool:
        waiting = self._scheduler.waiting_rows or len(self._advances) or self._streams.in_flight
        return bool(waiting or self._condition.ends)
