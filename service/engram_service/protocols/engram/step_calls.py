"""Unary steps that the native wire brings as events: each is a task, until it is answered or its client has gone."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from engram_service.errors import InternalError, ServiceError
from engram_service.protocols.engram.server import Method
from engram_service.supervision import Supervisor
from engram_service.wire.base import Step

if TYPE_CHECKING:  # where it is not, this is not used
    from engram_service.wire.native import NativeWire


class StepCalls:
    """Those under way, by call."""

    def __init__(self, wire: NativeWire, method: Method, supervisor: Supervisor) -> None:
        self._wire = wire
        self._method = method
        self._supervisor = supervisor
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def begin(self, step: Step) -> None:
        self._tasks[step.call] = self._supervisor.once("step", self._answer(step, time.monotonic()))

    def end(self, call: int) -> bool:
        """The call is over, in whichever way; whether it is one of these."""
        task = self._tasks.pop(call, None)
        if task is not None:
            task.cancel()
        return task is not None

    async def _answer(self, step: Step, came: float) -> None:
        left_s = None if step.timeout_ms is None else step.timeout_ms / 1000 - (time.monotonic() - came)
        try:
            self._wire.respond(step.call, await self._method.answer(step.data, step.caller, step.peer, left_s))
        except ServiceError as refusal:
            self._wire.finish(step.call, refusal)
        except Exception as error:
            self._wire.finish(
                step.call, InternalError("INTERNAL", f"the server failed on this call: {type(error).__name__}")
            )
            raise
