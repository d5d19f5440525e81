"""grpc.health.v1, the one service without tokens: a load balancer has none. It says that the server serves, and nothing else.

Anybody may call it, so little of what they send is read, and little is kept for them: the message of one call
at a time and for a second; beyond that, and for a second after one that was too large or did not come, a call is answered as if it
had asked for the whole server. Watchers have a limit. Made by server.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from engram_service.api.holdback import Holdback
from engram_service.api.status import abort
from engram_service.errors import DeadlineExceeded, InvalidArgument, NotFound, Refusal, ResourceExhausted

_SERVICE = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
HEALTH = f"/{_SERVICE}/"
_READ_S = 1.0
_NBYTES_MAX = 1024  # of a request
_WATCHERS_MAX = 256

Context = Any  # grpc.aio.ServicerContext[bytes, bytes]; generic for type checkers alone


class Probes:
    """The health of the whole server under the names of its services. Event loop only."""

    def __init__(self, services: Sequence[str], holdback: Holdback) -> None:
        self._names = ("", *services)
        self._holdback = holdback
        self._status: Any = health_pb2.HealthCheckResponse.NOT_SERVING
        self._changed = asyncio.Event()
        self._reading = False
        self._unread_until = 0.0
        self._watchers = 0

    def handlers(self) -> grpc.GenericRpcHandler:
        methods = {"Check": self._check, "List": self._list, "Watch": self._watch}
        # As streams they are asked before their message is read; on the wire all kinds of calls are alike.
        kinds: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            name: grpc.stream_stream_rpc_method_handler(self._guarded(work)) for name, work in methods.items()
        }
        return grpc.method_handlers_generic_handler(_SERVICE, kinds)

    def set_serving(self, serving: bool) -> None:
        kind = health_pb2.HealthCheckResponse
        self._status = kind.SERVING if serving else kind.NOT_SERVING
        self._changed.set()
        self._changed = asyncio.Event()

    def _guarded(self, work: Any) -> Any:
        async def handle(requests: Any, context: Context) -> None:
            try:
                await work(context)
            except Refusal as refusal:
                await self._holdback.hold()
                await abort(context, refusal)
            except asyncio.CancelledError:
                await self._holdback.hold()
                raise

        return handle

    async def _check(self, context: Context) -> None:
        name = await self._asked(context)
        if name not in self._names:
            raise NotFound("INVALID_ARGUMENT", f"there is no service {name!r} here")
        await self._say(context, self._status)

    async def _list(self, context: Context) -> None:
        statuses = {name: health_pb2.HealthCheckResponse(status=self._status) for name in self._names}
        response = health_pb2.HealthListResponse(statuses=statuses)  # type: ignore[attr-defined]  # newer than its stubs
        await context.write(response.SerializeToString())

    async def _watch(self, context: Context) -> None:
        if self._watchers >= _WATCHERS_MAX:
            message = f"{_WATCHERS_MAX} calls watch this server's health, its limit; ask with Check"
            raise ResourceExhausted("TOO_MANY_STREAMS", message, retry_after_ms=1000)
        self._watchers += 1
        try:
            known = await self._asked(context) in self._names
            said = None
            while True:
                changed = self._changed
                now = self._status if known else health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
                if now != said:
                    await self._say(context, now)
                    said = now
                await changed.wait()
        finally:
            self._watchers -= 1

    async def _say(self, context: Context, status: Any) -> None:
        await context.write(health_pb2.HealthCheckResponse(status=status).SerializeToString())

    async def _asked(self, context: Context) -> str:
        """The service that a call asks for. Raises DeadlineExceeded, InvalidArgument."""
        loop = asyncio.get_running_loop()
        if self._reading or loop.time() < self._unread_until:
            return ""
        self._reading = True
        try:
            async with asyncio.timeout(_READ_S):
                data = await context.read()
            if data is grpc.aio.EOF:
                raise InvalidArgument("INVALID_FRAME", "the call has no request")
            if len(data) > _NBYTES_MAX:
                raise DecodeError
            return str(health_pb2.HealthCheckRequest.FromString(data).service)
        except TimeoutError:
            self._unread_until = loop.time() + _READ_S
            raise DeadlineExceeded("DEADLINE_EXCEEDED", f"no request came within {_READ_S:.0f} s") from None
        except DecodeError:
            self._unread_until = loop.time() + _READ_S
            message = f"the request is not a grpc.health.v1.HealthCheckRequest of at most {_NBYTES_MAX} bytes"
            raise InvalidArgument("INVALID_FRAME", message) from None
        finally:
            self._reading = False
