"""Asks who calls before anything of a call is read, and lets so many in at a time. Every call passes here; made by server.py.

An interceptor of gRPC sees a call when its headers are there, and gRPC takes no message off the wire, and unpacks none, before a
handler asks for it. So what a caller without a token sends stays in the window of its stream, which is 64 KB. Only health is
open to all; see probes.py.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

import grpc

from engram_service.auth.access import SERVICE, Access
from engram_service.auth.tokens import Caller
from engram_service.errors import ResourceExhaustedError, ServiceError
from engram_service.protocols.engram.probes import HEALTH
from engram_service.protocols.engram.status import abort

_STREAM = f"{SERVICE}Stream"  # has a limit of its own, streams_max
_RETRY_MS = 500

Details: TypeAlias = grpc.HandlerCallDetails
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"  # generic for type checkers alone


class Gate(grpc.aio.ServerInterceptor):
    """Lets calls in whose caller is known and has the right: `calls_max` at a time, half of them of one tenant of several."""

    def __init__(self, access: Access, calls_max: int) -> None:
        self._access = access
        self._calls_max = calls_max
        self._tenant_max = max(1, calls_max // 2) if access.tokens.asked_for else calls_max
        self._calls = 0
        self._of: Counter[str] = Counter()  # by tenant

    async def intercept_service(
        self, continuation: Callable[[Details], Awaitable[Handler | None]], details: Details
    ) -> Handler | None:
        path = str(details.method)
        if path.startswith(HEALTH):
            return await continuation(details)
        caller: Caller | None = None
        try:
            caller = self._access.known(details.invocation_metadata)
            self._access.entitle(caller, path)
            if path != _STREAM:
                self._enter(caller.tenant)
        except ServiceError as refusal:
            return self._closed(path.rpartition("/")[2], caller, refusal)
        return await continuation(details)

    def _enter(self, tenant: str) -> None:
        """Counts the call in until its task is done. Raises ResourceExhaustedError."""
        task = asyncio.current_task()
        if task is None:
            return
        if self._calls >= self._calls_max or self._of[tenant] >= self._tenant_max:
            message = (
                f"{self._of[tenant]} calls of this tenant and {self._calls} of all are under way, this server's limit"
            )
            raise ResourceExhaustedError("QUEUE_FULL", message, retry_after_ms=_RETRY_MS)
        self._calls += 1
        self._of[tenant] += 1

        def leave(_: object) -> None:
            self._calls -= 1
            self._of[tenant] -= 1
            if not self._of[tenant]:
                del self._of[tenant]

        task.add_done_callback(leave)

    def _closed(self, method: str, caller: Caller | None, refusal: ServiceError) -> Handler:
        async def handle(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
            self._access.audit.denied(method, caller, self._access.peer(context), refusal)
            await self._access.holdback.hold()
            await abort(context, refusal)

        # On the wire this answers calls of every kind.
        return grpc.stream_stream_rpc_method_handler(handle)
