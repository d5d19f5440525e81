"""The gRPC server of the manager: every call but steps, health and reflection, which a wire relays to it over a private socket.
Handlers are thin; refusals are mapped here, once.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf import message_factory
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health

from engram.v1 import service_pb2
from engram_service.auth.access import Access
from engram_service.auth.holdback import Holdback
from engram_service.auth.tokens import Caller
from engram_service.errors import DeadlineExceededError, InternalError, InvalidArgumentError, ServiceError
from engram_service.observability.health import Health
from engram_service.protocols.engram import reflection
from engram_service.protocols.engram.call import Call
from engram_service.protocols.engram.confine import confine, ids_of
from engram_service.protocols.engram.gate import Gate
from engram_service.protocols.engram.health import HealthService
from engram_service.protocols.engram.probes import Probes
from engram_service.protocols.engram.status import abort
from engram_service.settings import Settings

log = logging.getLogger(__name__)

SERVICE = service_pb2.DESCRIPTOR.services_by_name["EngramService"]
_MESSAGE_MARGIN = 2  # gRPC itself refuses, without a reason, what is so many times over the limit
_KEEPALIVE_MS = 20_000
_HANDSHAKE_MS = 10_000  # until TLS is agreed on and the client's settings have come
_IDLE_MS = 120_000  # a connection without a call is closed; clients open another with their next one
_METADATA_NBYTES, _METADATA_NBYTES_MAX = 8 << 10, 16 << 10  # above the first gRPC refuses more and more of the calls


def options(settings: Settings) -> list[tuple[str, int]]:
    """What gRPC is told of its limits."""
    return [
        # A message that says that it is compressed is refused (UNIMPLEMENTED): gRPC would unpack it without any limit.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.per_message_decompression", 0),
        ("grpc.max_concurrent_streams", settings.connection_calls_max),
        # Windows do not grow: nobody may have the server keep more than this of a stream that it does not read.
        ("grpc.http2.bdp_probe", 0),
        ("grpc.max_metadata_size", _METADATA_NBYTES),
        ("grpc.absolute_max_metadata_size", _METADATA_NBYTES_MAX),
        ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", _IDLE_MS),
        ("grpc.max_receive_message_length", settings.frame_bytes_max * _MESSAGE_MARGIN),
        ("grpc.max_send_message_length", -1),
        ("grpc.so_reuseport", 0),
        ("grpc.keepalive_time_ms", _KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", _KEEPALIVE_MS // 2),
        ("grpc.http2.min_ping_interval_without_data_ms", 5000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


def add_standard(server: grpc.aio.Server, ready: Health, holdback: Holdback) -> None:
    """The services that stock clients look for: health and reflection."""
    probes = Probes(HealthService(ready, SERVICE.full_name), holdback)
    server.add_generic_rpc_handlers((probes.handlers(),))
    reflection.enable((SERVICE.full_name, health.SERVICE_NAME), server)


class Server:
    """Binds, serves, stops."""

    def __init__(self, settings: Settings, access: Access, ready: Health, *unary: object) -> None:
        """`unary`: those who have a method for each call."""
        self._server = grpc.aio.server(interceptors=[Gate(access, settings.calls_max)], options=options(settings))
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for method in SERVICE.methods:
            name = _snake(method.name)
            handle = next((getattr(part, name) for part in unary if hasattr(part, name)), None)
            if handle is not None:
                handlers[method.name] = unary_handler(Method(method, handle, settings, access), access)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),))
        self._holdback = access.holdback
        add_standard(self._server, ready, self._holdback)

    async def start(self, path: str) -> None:
        """Serves on a unix socket. Raises OSError."""
        try:
            self._server.add_insecure_port(f"unix:{path}")
        except RuntimeError as error:
            raise OSError(f"{path}: the socket cannot be bound") from error
        await self._server.start()

    async def stop(self, grace_s: float) -> None:
        self._holdback.release()
        await self._server.stop(grace_s)


def serialized(response: Message) -> bytes:
    return response.SerializeToString()


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


class Method:
    """One unary method: bytes in, response out."""

    def __init__(
        self, method: Any, handle: Callable[[Any, Call], Awaitable[Message]], settings: Settings, access: Access
    ) -> None:  # fmt: skip
        self.name: str = method.name
        self._type = method.input_type
        self._request = message_factory.GetMessageClass(method.input_type)
        self._handle = handle
        self._settings = settings
        self._access = access

    async def answer(self, data: bytes, caller: Caller, peer: str, left_s: float | None) -> Message:
        """The response to a caller who may call. Raises ServiceError."""
        ids: list[str] = []
        outcome = "ok"
        try:
            request = self._request.FromString(data)
            ids = ids_of(request)
            confine(request, caller.tenant)
            return await self._handle(request, Call(self._left_s(left_s), caller))
        except DecodeError:
            outcome = "INVALID_FRAME"
            raise InvalidArgumentError(outcome, f"the bytes are not an {self._type.full_name}") from None
        except ServiceError as refusal:
            outcome = refusal.reason
            raise
        except asyncio.CancelledError:
            outcome = "CANCELLED"
            raise
        except Exception as error:
            log.exception("%s failed", self.name)
            outcome = "INTERNAL"
            raise InternalError(outcome, f"the server failed on this call: {type(error).__name__}") from error
        finally:
            self._access.audit.done(self.name, caller, peer, ids, outcome)

    def _left_s(self, left: float | None) -> float:
        most = self._settings.step_timeout_s
        left_s = most if left is None else min(left, most)
        if left_s <= 0:
            raise DeadlineExceededError("DEADLINE_EXCEEDED", "the call's deadline had passed when it arrived")
        return left_s


def unary_handler(method: Method, access: Access) -> grpc.RpcMethodHandler[Any, Any]:
    async def call(data: bytes, context: grpc.aio.ServicerContext[bytes, Message]) -> Message:
        try:
            caller = access.admit(method.name, context.invocation_metadata(), access.peer(context))
            return await method.answer(data, caller, access.peer(context), context.time_remaining())
        except ServiceError as refusal:
            await abort(context, refusal)
        except asyncio.CancelledError:
            await access.holdback.hold()
            raise

    return grpc.unary_unary_rpc_method_handler(call, request_deserializer=None, response_serializer=serialized)
