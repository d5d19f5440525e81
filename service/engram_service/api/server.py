"""The gRPC server: the Engram service, health and reflection. Handlers are thin; refusals are mapped here, once."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from google.protobuf.message import DecodeError, Message
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from engram.v1 import service_pb2
from engram_service.api.access import Access
from engram_service.api.call import Call
from engram_service.api.confine import confine, ids_of
from engram_service.api.gate import Gate
from engram_service.api.health import HealthService
from engram_service.api.probes import Probes
from engram_service.api.status import abort
from engram_service.api.tls import Certificate
from engram_service.descriptors import connection_options
from engram_service.errors import DeadlineExceededError, InternalError, InvalidArgumentError, ServiceError
from engram_service.health import Health
from engram_service.settings import Settings
from engram_service.wire.grpcio import GrpcioWire

log = logging.getLogger(__name__)

SERVICE = service_pb2.DESCRIPTOR.services_by_name["EngramService"]
_MESSAGE_MARGIN = 2  # gRPC itself refuses, without a reason, what is so many times over the limit
_KEEPALIVE_MS = 20_000
_HANDSHAKE_MS = 10_000  # until TLS is agreed on and the client's settings have come
_IDLE_MS = 120_000  # a connection without a call is closed; clients open another with their next one
_METADATA_NBYTES, _METADATA_NBYTES_MAX = 8 << 10, 16 << 10  # above the first gRPC refuses more and more of the calls


class Server:
    """Binds, serves, says how it is, stops."""

    def __init__(
        self, settings: Settings, access: Access, certificate: Certificate | None, ready: Health, stream: GrpcioWire,
        *unary: object,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._certificate = certificate
        self._server = grpc.aio.server(
            interceptors=[Gate(access, settings.calls_max)],
            options=[
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
                *connection_options(),
            ],
        )
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
        for method in SERVICE.methods:
            if method.name == "Stream":
                handlers[method.name] = grpc.stream_stream_rpc_method_handler(
                    stream.handle, request_deserializer=None, response_serializer=_serialize
                )
            else:
                name = _snake(method.name)
                handle = next(getattr(one, name) for one in unary if hasattr(one, name))
                handlers[method.name] = _unary(method, handle, settings, access)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),))
        self._ready = ready
        self._holdback = access.holdback
        probes = Probes(HealthService(ready, SERVICE.full_name), self._holdback)
        self._server.add_generic_rpc_handlers((probes.handlers(),))
        names = (SERVICE.full_name, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self) -> int:
        """Serves; the bound port. Raises OSError where the address cannot be had."""
        try:
            if self._certificate is not None:
                port = self._server.add_secure_port(self._settings.listen, self._certificate.credentials())
            else:
                port = self._server.add_insecure_port(self._settings.listen)
        except RuntimeError as error:
            raise OSError(f"listen = {self._settings.listen}: the address is in use or cannot be bound") from error
        await self._server.start()
        self.set_serving(True)
        return int(port)

    def set_serving(self, serving: bool) -> None:
        """Says that this server takes clients, or that it is going away; whether it is ready is for `ready` to say."""
        self._ready.tell("server", "" if serving else "it is going away")

    async def stop(self, grace_s: float) -> None:
        self._holdback.release()
        await self._server.stop(grace_s)


def _serialize(response: Message) -> bytes:
    return response.SerializeToString()


def _left_s(context: grpc.aio.ServicerContext[bytes, Message], settings: Settings) -> float:
    left: float | None = context.time_remaining()
    left_s = settings.step_timeout_s if left is None else min(left, settings.step_timeout_s)
    if left_s <= 0:
        raise DeadlineExceededError("DEADLINE_EXCEEDED", "the call's deadline had passed when it arrived")
    return left_s


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def _unary(
    method: Any, handle: Callable[[Any, Call], Awaitable[Message]], settings: Settings, access: Access
) -> grpc.RpcMethodHandler[Any, Any]:
    from google.protobuf import message_factory

    request_type = message_factory.GetMessageClass(method.input_type)

    async def call(data: bytes, context: grpc.aio.ServicerContext[bytes, Message]) -> Message:
        try:
            caller = access.admit(method.name, context.invocation_metadata(), context.peer())
        except ServiceError as refusal:
            await abort(context, refusal)
        ids: list[str] = []
        try:
            request = request_type.FromString(data)
            ids = ids_of(request)
            confine(request, caller.tenant)
            response = await handle(request, Call(_left_s(context, settings), caller))
        except DecodeError:
            problem: ServiceError = InvalidArgumentError(
                "INVALID_FRAME", f"the bytes are not an {method.input_type.full_name}"
            )
        except ServiceError as refusal:
            problem = refusal
        except asyncio.CancelledError:
            access.audit.done(method.name, caller, context.peer(), ids, "CANCELLED")
            await access.holdback.hold()
            raise
        except Exception as error:
            log.exception("%s failed", method.name)
            problem = InternalError("INTERNAL", f"the server failed on this call: {type(error).__name__}")
        else:
            access.audit.done(method.name, caller, context.peer(), ids)
            return response
        access.audit.done(method.name, caller, context.peer(), ids, problem.reason)
        return await abort(context, problem)

    return grpc.unary_unary_rpc_method_handler(call, request_deserializer=None, response_serializer=_serialize)
