"""The extension's wire: connections end in its threads, and steps come as columns. Other calls but steps are relayed to the
manager over a private unix socket, with who calls in metadata that no client can set.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Sequence
from functools import lru_cache

import engram_native
import numpy as np
from google.protobuf.message import Message as Proto
from numpy.typing import NDArray

from engram import __version__
from engram_service.auth.access import RIGHT_OF, Access
from engram_service.auth.tenants import id_of, tenant_of
from engram_service.auth.tls import Pems
from engram_service.auth.tokens import Caller, missing, unknown
from engram_service.errors import ResourceExhaustedError, ServiceError, UnavailableError
from engram_service.observability.stages import EDGES
from engram_service.protocols.engram.status import status_of
from engram_service.settings import Settings
from engram_service.wire.base import Arrived, Begin, End, Event, HalfClose, Message, Step, StepModel, trace_of

_MESSAGE_MARGIN = 2  # the wire itself refuses, without a reason, what is so many times over the limit
_HEADER_NBYTES = 16 << 10
_INBOX_NBYTES = 256 << 20
_HANDSHAKE_S, _IDLE_S, _KEEPALIVE_S = 10.0, 120.0, 20.0
if engram_native.__version__ != __version__:
    raise ImportError(
        f"engram-native is {engram_native.__version__} and engram {__version__}: install engram[native]=={__version__}"
    )

_NONE = np.empty(0, np.uint8)
_NO_SEQS = np.empty(0, np.uint64)


class NativeWire:
    """Streams and unary steps of an `engram_native.Wire`."""

    name = "native"

    def __init__(
        self, settings: Settings, access: Access, pems: Pems | None, connections_max: int, relay: str
    ) -> None:  # fmt: skip
        """`relay`: the path of the manager's socket."""
        self._access = access
        address = settings.advertise
        head = [("engram-server", __version__), *([("engram-address", address)] if address else [])]
        self._wire = engram_native.Wire(
            connections=connections_max, calls=settings.connection_calls_max, header_nbytes=_HEADER_NBYTES,
            message_nbytes=settings.frame_bytes_max * _MESSAGE_MARGIN, frame_nbytes=settings.frame_bytes_max,
            frame_rows=settings.frame_rows_max, rows=settings.stream_rows_max, inbox_nbytes=_INBOX_NBYTES,
            handshake_s=_HANDSHAKE_S, idle_s=_IDLE_S, keepalive_s=_KEEPALIVE_S, head=head, relay=relay,
            relayed=settings.calls_max, refusals={name: _told(refusal) for name, refusal in _REFUSALS.items()}, edges=EDGES,
            step_s=settings.step_timeout_s,
        )  # fmt: skip
        self.tokens_changed()
        if pems is not None:
            self.certify(pems)
        self._loop = asyncio.get_running_loop()

    def counters(self) -> dict[str, int]:
        return self._wire.counters()

    def listen(self, listeners: Sequence[socket.socket]) -> int:
        """Takes connections to these sockets from now on; their port."""
        bound = int(listeners[0].getsockname()[1])
        for listener in listeners:
            self._wire.listen(listener.detach())
        return bound

    def certify(self, pems: Pems) -> None:
        """Handshakes from now on are made with these."""
        self._wire.set_tls(*pems)

    def start(self, wake: Callable[[], None], turn: Callable[[], None]) -> None:
        self._loop.add_reader(self._wire.descriptor, turn)

    def take(self) -> tuple[Arrived | None, Sequence[tuple[int, Event]]]:
        rows, first, events = self._wire.take()
        if not rows:
            return None, [(0, made) for event in events if (made := self._event(event)) is not None]
        streams, handles = np.empty(rows, np.uint32), np.empty(rows, np.uint32)
        seqs, acknowledged = np.empty(rows, np.uint64), np.empty(rows, np.uint64)
        flags, timeouts, widths = np.empty(rows, np.uint8), np.empty(rows, np.uint32), np.empty(rows, np.uint32)
        inputs, times = np.empty(self._wire.input_nbytes, np.uint8), np.empty((rows, 4))
        self._wire.columns(streams, handles, seqs, acknowledged, flags, timeouts, widths, inputs, times)
        arrived = Arrived(streams, handles, seqs, acknowledged, flags, timeouts, widths, inputs, times)
        if not events:
            return arrived, ()
        return arrived, [
            (min(rows, event.rows_before - first), made) for event in events if (made := self._event(event)) is not None
        ]

    def answer(
        self, streams: NDArray[np.uint32], handles: NDArray[np.uint32], seqs: NDArray[np.uint64],
        outputs: NDArray[np.uint8] | None, durable: NDArray[np.uint64] | None,
    ) -> None:  # fmt: skip
        contiguous = np.ascontiguousarray
        self._wire.answer(
            contiguous(streams), contiguous(handles), contiguous(seqs),
            _NONE if outputs is None else contiguous(outputs), _NO_SEQS if durable is None else contiguous(durable),
        )  # fmt: skip

    def written(self) -> tuple[Sequence[int], float]:
        return self._wire.written()

    def expect(self, stream: int, rows: int) -> None:
        self._wire.expect(stream, rows)

    def send(self, stream: int, response: Proto, rows: int) -> None:
        self._wire.send(stream, response.SerializeToString(), rows)

    def respond(self, call: int, response: Proto) -> None:
        """The answer to a unary step."""
        self._wire.respond(call, response.SerializeToString())

    def finish(self, stream: int, refusal: ServiceError | None = None) -> None:
        if refusal is None:
            self._wire.finish(stream)
        else:
            self._wire.finish(stream, *_told(refusal))

    def know(self, key: str, handle: int, model: StepModel) -> None:
        self._wire.know(tenant_of(key), id_of(key), handle, _told_of(model))

    def forget(self, handle: int) -> None:
        self._wire.forget(handle)

    def again(self, stream: int, given: bool, numbered: bool) -> bool:
        return self._wire.again(stream, given, numbered)

    def tokens_changed(self) -> None:
        """Tells the wire which tokens there are. Those that have expired it knows too: their callers are told so."""
        book = self._access.tokens.book
        callers = None if book is None else book.callers
        may = [one for one in (callers or {}).values() if RIGHT_OF["Step"] in one.rights]
        self._wire.set_steppers(None if callers is None else {one.number: (one.tenant, one.expires) for one in may})
        self._wire.set_tokens(
            None if callers is None else {bytes.fromhex(digest): one.number for digest, one in callers.items()}
        )

    async def stop(self, grace_s: float) -> None:
        """What was sent has so long to leave."""
        self._wire.drain()
        loop, until = self._loop, self._loop.time() + grace_s
        while self._wire.counters()["connections"] and loop.time() < until:
            await asyncio.sleep(0.01)
        loop.remove_reader(self._wire.descriptor)
        self._wire.close()

    def _event(self, event: engram_native.Event) -> Event | None:
        match event.kind:
            case "message":
                return Message(event.call, event.data)
            case "half_close":
                return HalfClose(event.call)
            case "end":
                return End(event.call)
            case "refused":
                self._access.audit.refused(event.path.rpartition("/")[2], event.peer, dict(event.metadata)["reason"])
                return None
        try:
            caller = self._access.admitted(event.path.rpartition("/")[2], self._caller(event.identity), event.peer)
        except ServiceError as refusal:
            self.finish(event.call, refusal)
            return None
        if event.kind == "step":
            return Step(event.call, caller, event.peer, event.data, event.timeout_ms)
        return Begin(event.call, caller, event.peer, trace_of(event.metadata))

    def _caller(self, identity: int | None) -> Caller:
        """Who calls: the wire has let it in. Raises UnauthenticatedError where it was revoked meanwhile."""
        if identity is None:
            return self._access.tokens.caller("")
        found = self._access.tokens.numbered(identity)
        if found is None:
            raise unknown()
        return found


_REFUSALS: dict[str, ServiceError] = {
    "TOKEN_MISSING": missing(),
    "TOKEN_UNKNOWN": unknown(),
    "TOKEN_REVOKED": unknown(),
    "QUEUE_FULL": ResourceExhaustedError(
        "QUEUE_FULL", "as many calls as this server takes are under way", retry_after_ms=500
    ),
    "RELAY_UNAVAILABLE": UnavailableError("DRAINING", "this server takes no such calls just now", retry_after_ms=500),
}


def _told(refusal: ServiceError) -> tuple[int, str, bytes]:
    status = status_of(refusal)
    return status.code, status.message, status.SerializeToString()


@lru_cache(256)
def _told_of(model: StepModel) -> engram_native.StepModel:
    takes, gives = (
        (rows.nbytes, all(spec.dtype == "float32" for spec in rows.specs)) for rows in (model.takes, model.gives)
    )
    shape = list(model.gives.shape(1))
    return engram_native.StepModel(model.name, model.version, takes=takes, gives=gives, shape=shape)
