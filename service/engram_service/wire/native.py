"""The extension's wire: connections end in its threads, and steps come as columns. Other calls but steps are relayed to
protocols/engram/server.py over a private unix socket, with who calls in metadata that no client can set.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Callable, Mapping, Sequence

import engram_native
import numpy as np
from google.protobuf.message import Message as Proto
from numpy.typing import NDArray

from engram import __version__
from engram_service.auth.access import Access
from engram_service.auth.tls import Certificate
from engram_service.auth.tokens import Caller, missing, unknown
from engram_service.errors import ResourceExhaustedError, ServiceError, UnavailableError
from engram_service.observability.stages import EDGES
from engram_service.protocols.engram.status import status_of
from engram_service.settings import Settings, split_address
from engram_service.wire.base import Arrived, Begin, End, Event, HalfClose, Message, Step, trace_of

_MESSAGE_MARGIN = 2  # the wire itself refuses, without a reason, what is so many times over the limit
_HEADER_NBYTES = 16 << 10
_INBOX_NBYTES = 256 << 20
_HANDSHAKE_S, _IDLE_S, _KEEPALIVE_S = 10.0, 120.0, 20.0
_BACKLOG = 1024
_CERTIFICATE_S = 0.25  # between looks at the files
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
        self, settings: Settings, access: Access, certificate: Certificate | None, connections_max: int
    ) -> None:  # fmt: skip
        self._settings = settings
        self._access = access
        self._certificate = certificate
        self._folder = tempfile.mkdtemp(prefix="engram-")  # only its owner may enter
        self.relay = os.path.join(self._folder, "calls")
        address = settings.advertise
        head = [("engram-server", __version__), *([("engram-address", address)] if address else [])]
        self._wire = engram_native.Wire(
            connections=connections_max, calls=settings.connection_calls_max, header_nbytes=_HEADER_NBYTES,
            message_nbytes=settings.frame_bytes_max * _MESSAGE_MARGIN, frame_nbytes=settings.frame_bytes_max,
            frame_rows=settings.frame_rows_max, rows=settings.stream_rows_max, inbox_nbytes=_INBOX_NBYTES,
            handshake_s=_HANDSHAKE_S, idle_s=_IDLE_S, keepalive_s=_KEEPALIVE_S, head=head, relay=self.relay,
            relayed=settings.calls_max, refusals={name: _told(refusal) for name, refusal in _REFUSALS.items()}, edges=EDGES,
        )  # fmt: skip
        self._callers: dict[int, Caller] = {}  # by the number that the wire knows them under
        self._numbers: dict[str, int] = {}  # by digest
        self.tokens_changed()
        if certificate is not None:
            self._wire.set_tls(*certificate.pems)
        self._loop = asyncio.get_running_loop()

    def counters(self) -> dict[str, int]:
        return self._wire.counters()

    def listen(self) -> int:
        """Takes connections from now on; the bound port. Raises OSError where the address cannot be had."""
        host, port = split_address(self._settings.listen, "listen")
        try:
            listeners = _listeners(host, port)
        except OSError as error:
            why = f"listen = {self._settings.listen}: the address is in use or cannot be bound ({error.strerror or error})"
            raise OSError(why) from error
        bound = int(listeners[0].getsockname()[1])
        for listener in listeners:
            self._wire.listen(listener.detach())
        return bound

    def start(self, arrived: Callable[[], None]) -> None:
        self._loop.add_reader(self._wire.descriptor, arrived)

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

    def tokens_changed(self) -> None:
        """Tells the wire which tokens there are. Those that have expired it knows too: their callers are told so."""
        callers = self._access.tokens.callers()
        if callers is None:
            self._wire.set_tokens(None)
            return
        for digest in callers:
            self._numbers.setdefault(digest, len(self._numbers))
        self._callers = {self._numbers[digest]: caller for digest, caller in callers.items()}
        self._wire.set_tokens({bytes.fromhex(digest): self._numbers[digest] for digest in callers})

    @property
    def callers(self) -> Mapping[int, Caller]:
        return self._callers

    async def watch_certificate(self) -> None:
        """Reads certificate and key again when they have changed; runs until cancelled."""
        while self._certificate is not None:
            await asyncio.sleep(_CERTIFICATE_S)
            if await asyncio.to_thread(self._certificate.fetch) is not None:
                self._wire.set_tls(*self._certificate.pems)

    async def stop(self, grace_s: float) -> None:
        """What was sent has so long to leave."""
        self._wire.drain()
        loop, until = self._loop, self._loop.time() + grace_s
        while self._wire.counters()["connections"] and loop.time() < until:
            await asyncio.sleep(0.01)
        loop.remove_reader(self._wire.descriptor)
        self._wire.close()
        with contextlib.suppress(OSError):
            shutil.rmtree(self._folder)

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
        found = self._callers.get(identity)
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


def _listeners(host: str, port: int) -> list[socket.socket]:
    """A socket for each address of a name, on one port. Raises OSError."""
    found: list[socket.socket] = []
    try:
        for family, _, _, _, address in dict.fromkeys(
            socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        ):
            bound = (address[0], port or (found[0].getsockname()[1] if found else 0))
            dual = family == socket.AF_INET6 and address[0] == "::" and socket.has_dualstack_ipv6()
            found.append(socket.create_server(bound, family=family, backlog=_BACKLOG, dualstack_ipv6=dual))
            if dual:
                break
    except OSError:
        for one in found:
            one.close()
        raise
    return found
