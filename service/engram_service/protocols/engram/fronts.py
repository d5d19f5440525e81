"""Where clients connect: the native wire, or gRPC's own server, and what each does with calls that are no streams.

Steps, of streams and unary ones, are this process's; all other calls are relayed to the manager.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import grpc

from engram_service.auth.access import IDENTITY, PEER, Access
from engram_service.auth.tls import Certificate, Pems
from engram_service.auth.tokens import Caller
from engram_service.errors import UnavailableError
from engram_service.observability.health import Health
from engram_service.protocols.engram.call import Call
from engram_service.protocols.engram.gate import Gate
from engram_service.protocols.engram.server import SERVICE, Method, add_standard, options, serialized, unary_handler
from engram_service.protocols.engram.status import abort
from engram_service.protocols.engram.step_calls import StepCalls
from engram_service.protocols.engram.stream import StreamHandler
from engram_service.settings import Settings
from engram_service.supervision import Supervisor
from engram_service.wire.base import Wire
from engram_service.wire.grpcio import GrpcioWire

if TYPE_CHECKING:
    from engram_service.wire.native import NativeWire

_MANAGER, _NOT_READY = "manager", "the server is not ready"

Step = Callable[[Any, Call], Awaitable[Any]]


class Front(Protocol):
    """One of the two."""

    @property
    def wire(self) -> Wire: ...

    def connect(self, step: Step, handler: StreamHandler, supervisor: Supervisor) -> None:
        """`step` answers unary steps; `handler` hears what happens on streams."""

    async def start(self) -> int:
        """Takes connections from now on; the port. Raises OSError where the address cannot be had."""

    def certify(self, pems: Pems) -> None:
        """Another certificate is in force."""

    def hear(self, told: dict[str, Any]) -> None:
        """Whether the server can do its work, as the manager has it: Health.told."""

    async def stop(self, grace_s: float) -> None:
        """What was sent has so long to leave."""


class NativeFront:
    """The extension's wire, on sockets that the manager has bound."""

    def __init__(
        self, settings: Settings, access: Access, pems: Pems | None, connections_max: int, relay: str,
        listeners: Sequence[socket.socket],
    ) -> None:  # fmt: skip
        """Raises ImportError where the extension is not here."""
        from engram_service.wire.native import NativeWire

        self._settings = settings
        self._access = access
        self._listeners = listeners
        self._wire: NativeWire = NativeWire(settings, access, pems, connections_max, relay)

    @property
    def wire(self) -> NativeWire:
        return self._wire

    def connect(self, step: Step, handler: StreamHandler, supervisor: Supervisor) -> None:
        method = Method(SERVICE.methods_by_name["Step"], step, self._settings, self._access)
        handler.calls = StepCalls(self._wire, method, supervisor)

        def changed() -> None:
            self._wire.tokens_changed()
            handler.tokens_changed()

        self._access.tokens.on_change = changed

    async def start(self) -> int:
        return self._wire.listen(self._listeners)

    def certify(self, pems: Pems) -> None:
        self._wire.certify(pems)

    def hear(self, told: dict[str, Any]) -> None:
        """Health is relayed."""

    async def stop(self, grace_s: float) -> None:
        await self._wire.stop(grace_s)


class GrpcioFront:
    """A grpc.aio server, which binds for itself, reads its certificate for itself, and relays calls in Python."""

    def __init__(self, settings: Settings, access: Access, relay: str) -> None:
        """Raises SettingError."""
        self._settings = settings
        self._access = access
        self._relay = relay
        self._certificate = Certificate.of(settings)
        self._wire = GrpcioWire(settings, access)
        self._health = Health()
        self._health.fail(_MANAGER, _NOT_READY)  # until it says more
        self._server = grpc.aio.server(interceptors=[Gate(access, settings.calls_max)], options=options(settings))
        self._channel: grpc.aio.Channel | None = None

    @property
    def wire(self) -> GrpcioWire:
        return self._wire

    def connect(self, step: Step, handler: StreamHandler, supervisor: Supervisor) -> None:
        access = self._access
        handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
            method.name: grpc.unary_unary_rpc_method_handler(self._relayed(method.name)) for method in SERVICE.methods
        }
        handlers["Stream"] = grpc.stream_stream_rpc_method_handler(
            self._wire.handle, request_deserializer=None, response_serializer=serialized
        )
        handlers["Step"] = unary_handler(Method(SERVICE.methods_by_name["Step"], step, self._settings, access), access)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),))
        add_standard(self._server, self._health, access.holdback)
        access.tokens.on_change = handler.tokens_changed

    async def start(self) -> int:
        listen = self._settings.listen
        try:
            if self._certificate is not None:
                port = self._server.add_secure_port(listen, self._certificate.credentials())
            else:
                port = self._server.add_insecure_port(listen)
        except RuntimeError as error:
            raise OSError(f"listen = {listen}: the address is in use or cannot be bound") from error
        self._channel = grpc.aio.insecure_channel(
            f"unix:{self._relay}",
            options=[("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)],
        )
        await self._server.start()
        return int(port)

    def certify(self, pems: Pems) -> None:
        """It looks at the files itself, at each handshake."""

    def hear(self, told: dict[str, Any]) -> None:
        self._health.hear(_MANAGER, told)
        self._health.clear(_MANAGER)

    async def stop(self, grace_s: float) -> None:
        self._access.holdback.release()
        await self._server.stop(grace_s)
        if self._channel is not None:
            await self._channel.close()

    def _relayed(self, method: str) -> Any:
        """A method of the manager's, which is told who calls."""

        async def call(data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
            assert self._channel is not None
            caller: Caller = self._access.known(context.invocation_metadata())
            metadata = ((IDENTITY, str(caller.number)), (PEER, self._access.peer(context)))
            ask: Any = self._channel.unary_unary(f"/{SERVICE.full_name}/{method}")
            try:
                answer: bytes = await ask(data, timeout=context.time_remaining(), metadata=metadata)
                return answer
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.UNAVAILABLE and not error.trailing_metadata():
                    why = "this server takes no such calls just now"
                    await abort(context, UnavailableError("DRAINING", why, retry_after_ms=500))
                await context.abort(error.code(), error.details() or "", tuple(error.trailing_metadata() or ()))
            except asyncio.CancelledError:
                await self._access.holdback.hold()
                raise

        return call


def front_of(
    settings: Settings, access: Access, pems: Pems | None, connections_max: int, relay: str, listeners: Sequence[socket.socket]
) -> Front:  # fmt: skip
    """The native one, if there are listeners for it."""
    if listeners:
        return NativeFront(settings, access, pems, connections_max, relay, listeners)
    return GrpcioFront(settings, access, relay)
