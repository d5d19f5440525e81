"""One connection of the HTTP port: uvicorn's protocol, which has no time limit for a request that never ends, under a guard."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from engram_service.protocols.http.guard import Doing, Guard

_LINGER_BYTES_MAX = 1 << 20
_READ_BYTES = 16 << 10  # taken from the socket at once; asyncio's own 256 KiB would be kept for each connection


class GuardedProtocol(H11Protocol):
    """Tells the guard what it is doing; refuses what is no request without a line in the log for each."""

    def __init__(self, guard: Guard, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._guard = guard
        self.doing = Doing.SENDING
        self._thrown_away = 0
        self.since = self.loop.time()

    # What asyncio calls

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        if hasattr(transport, "max_size"):
            transport.max_size = _READ_BYTES
        super().connection_made(transport)
        self._guard.enter(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._guard.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.doing is Doing.LINGERING:
            self._thrown_away += len(data)
            if self._thrown_away > _LINGER_BYTES_MAX:
                self.drop()
            return
        if self.doing is Doing.IDLE:
            self._now(Doing.SENDING)
        super().data_received(data)

    # What uvicorn calls

    def handle_events(self) -> None:
        before = self.cycle
        super().handle_events()
        if self.cycle is not before:
            self._now(Doing.ANSWERING)

    def on_response_complete(self) -> None:
        if self.conn.their_state is h11.SEND_BODY and not self.transport.is_closing():
            self._linger()  # nobody reads the rest of this body
            return
        self._now(Doing.IDLE)
        super().on_response_complete()  # which may begin the next one

    def send_400_response(self, msg: str) -> None:
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()  # in the middle of an answer
            return
        cycle: RequestResponseCycle | None = self.cycle  # none before the first request
        if cycle is not None:
            cycle.disconnected = True  # what it would answer, where its body is no body, nobody waits for
            cycle.message_event.set()
        too_long = len(self.conn.trailing_data[0]) > self._guard.limits.head_bytes_max
        self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE if too_long else HTTPStatus.BAD_REQUEST)

    # What the guard calls

    def waits(self) -> bool:
        return self.doing is not Doing.ANSWERING or self.transport.get_write_buffer_size() > 0

    def refuse(self) -> None:
        self._refuse(HTTPStatus.SERVICE_UNAVAILABLE)

    def drop(self) -> None:
        self._unset_keepalive_if_required()
        self.transport.abort()

    def _refuse(self, status: HTTPStatus) -> None:
        body = f"{status.value} {status.phrase}\n".encode()
        headers = [
            ("content-type", "text/plain; charset=utf-8"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        response = h11.Response(status_code=status.value, headers=headers, reason=status.phrase.encode())
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self._linger()

    def _linger(self) -> None:
        """Our side is closed, and theirs is read and thrown away for a moment, a megabyte at most: a socket that is closed with
        bytes unread resets the connection, and the answer may be lost on the way."""
        self._now(Doing.LINGERING)
        self._unset_keepalive_if_required()
        self.flow.resume_reading()
        self.transport.write_eof()

    def _now(self, doing: Doing) -> None:
        self.doing, self.since = doing, self.loop.time()
