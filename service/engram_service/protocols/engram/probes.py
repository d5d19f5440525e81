"""Stands before grpc.health.v1, the one service without tokens: a load balancer has none.

Anybody may call it, so little of what they send is read: the message of one call at a time and for a second. A call that does
not come to its turn within a second, or comes in the second after one that was too large or did not come, is not read: a Check is
answered as one for `liveness`, whatever it asks for, for none shall have a server restarted; a Watch is refused. Made by
server.py; what health is, observability/health.py says.
"""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from engram_service.auth.holdback import Holdback
from engram_service.errors import DeadlineExceededError, InvalidArgumentError, ResourceExhaustedError, ServiceError
from engram_service.protocols.engram.health import LIVENESS, HealthService
from engram_service.protocols.engram.status import abort

_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
HEALTH = f"/{_SERVICE}/"
_READ_S = 1.0
_NBYTES_MAX = 1024  # of a request

Context = Any  # grpc.aio.ServicerContext[bytes, Message]; generic for type checkers alone


class Probes:
    """Reads requests for `service`. Event loop only."""

    def __init__(self, service: HealthService, holdback: Holdback) -> None:
        self._service = service
        self._holdback = holdback
        self._turn = asyncio.Lock()
        self._unread_until = 0.0

    def handlers(self) -> grpc.GenericRpcHandler:
        # As streams they are asked before their message is read; on the wire all kinds of calls are alike.
        kinds: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            name: grpc.stream_stream_rpc_method_handler(
                self._guarded(work), response_serializer=health_pb2.HealthCheckResponse.SerializeToString
            )
            for name, work in (("Check", self._check), ("Watch", self._watch))
        }
        return grpc.method_handlers_generic_handler(_SERVICE, kinds)

    def _guarded(self, work: Any) -> Any:
        async def handle(requests: Any, context: Context) -> None:
            try:
                await work(context)
            except ServiceError as refusal:
                await self._holdback.hold()
                await abort(context, refusal)
            except asyncio.CancelledError:
                await self._holdback.hold()
                raise

        return handle

    async def _check(self, context: Context) -> None:
        request = await self._asked(context) or health_pb2.HealthCheckRequest(service=LIVENESS)
        await context.write(await self._service.Check(request, context))

    async def _watch(self, context: Context) -> None:
        if (request := await self._asked(context)) is None:
            message = "too many ask for this server's health just now; use Check"
            raise ResourceExhaustedError("QUEUE_FULL", message, retry_after_ms=1000)
        await self._service.Watch(request, context)

    async def _asked(self, context: Context) -> Any:
        """The request of a call; None: it cannot be read now. Raises DeadlineExceededError, InvalidArgumentError."""
        try:
            async with asyncio.timeout(_READ_S):
                await self._turn.acquire()
        except TimeoutError:
            return None
        try:
            return await self._read(context)
        finally:
            self._turn.release()

    async def _read(self, context: Context) -> Any:
        loop = asyncio.get_running_loop()
        if loop.time() < self._unread_until:
            return None
        try:
            async with asyncio.timeout(_READ_S):
                data = await context.read()
            if data is grpc.aio.EOF:
                raise InvalidArgumentError("INVALID_FRAME", "the call has no request")
            if len(data) > _NBYTES_MAX:
                raise DecodeError
            return health_pb2.HealthCheckRequest.FromString(data)
        except TimeoutError:
            self._unread_until = loop.time() + _READ_S
            raise DeadlineExceededError("DEADLINE_EXCEEDED", f"no request came within {_READ_S:.0f} s") from None
        except DecodeError:
            self._unread_until = loop.time() + _READ_S
            message = f"the request is not a grpc.health.v1.HealthCheckRequest of at most {_NBYTES_MAX} bytes"
            raise InvalidArgumentError("INVALID_FRAME", message) from None
