"""grpc.health.v1: SERVING while /readyz says 200, by the same Health. `liveness` is SERVING as long as the process answers.

A liveness probe must not ask for the server's own name: a Redis that is away is no reason to restart servers. Nothing here waits
for a caller that does not read, as the servicer that comes with gRPC does, which then cannot be told anything any more.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from engram_service.observability.health import Health

LIVENESS = "liveness"

_LOOK_S = 0.25  # between looks for those who watch; who checks is told what is so then
_WATCHERS_MAX = 256  # they need no token

_Status = health_pb2.HealthCheckResponse


class HealthService(health_pb2_grpc.HealthServicer):
    """Says what a Health says under two names, the empty one and that of the service."""

    def __init__(self, ready: Health, service: str) -> None:
        self._ready = ready
        self._names = ("", service)
        self._watchers = 0

    async def Check(self, request: Any, context: Any) -> Any:  # noqa: N802 gRPC's name
        status = self._status(request.service)
        if status == _Status.SERVICE_UNKNOWN:
            known = ", ".join(repr(name) for name in (*self._names, LIVENESS))
            await context.abort(grpc.StatusCode.NOT_FOUND, f"no service of this name; there are {known}")
        return _Status(status=status)

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802 gRPC's name
        if self._watchers >= _WATCHERS_MAX:
            message = f"{_WATCHERS_MAX} callers watch already; use Check"
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message)
        self._watchers += 1
        last = None
        try:
            while True:
                if (status := self._status(request.service)) != last:
                    await context.write(_Status(status=status))
                    last = status
                await asyncio.sleep(_LOOK_S)
        finally:
            self._watchers -= 1

    def _status(self, name: str) -> Any:
        if name == LIVENESS:
            return _Status.SERVING
        if name not in self._names:
            return _Status.SERVICE_UNKNOWN
        return _Status.NOT_SERVING if self._ready.failures() else _Status.SERVING
