"""What a client has of its connection: the link, whether it may be used and how long, and the sessions that are open."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import AsyncIterator, Sequence

from google.protobuf.message import Message

from engram._core import Core
from engram._errors import (
    ClientClosedError,
    DeadlineExceededError,
    EngramError,
    FailedPreconditionError,
    InvalidInputError,
)
from engram._link import Link, StreamLostError
from engram._manage import Models, Sessions
from engram._options import UNSET, ClientOptions, checked_seconds
from engram._poller import check, refuse_patched_threads
from engram._session import Session
from engram._unary import Response
from engram.v1 import stream_pb2


class Connected:
    """The part of AsyncClient that opening (_opening.py) and letting go of sessions (_letting_go.py) need."""

    def __init__(self, addresses: str | Sequence[str], options: ClientOptions) -> None:
        self.options = options
        self.addresses = (addresses,) if isinstance(addresses, str) else tuple(addresses)
        if not self.addresses:
            raise InvalidInputError("AsyncClient needs at least one address", reason="INVALID_ARGUMENT")
        self.options.check(self.addresses)
        refuse_patched_threads()
        self.sessions = Sessions(self._unary)
        self.models = Models(self._unary)
        self._client_id = secrets.randbits(63) | 1
        self._link: Link | None = None
        self._closed = False
        self._ended = asyncio.Event()
        self._open_sessions: dict[int, Session] = {}

    @property
    def _core(self) -> Core:
        if self._link is None:
            raise ClientClosedError("the client is not connected; use `async with`", reason="CLIENT_CLOSED")
        return self._link.core

    def _linked(self) -> Link:
        if self._closed:
            raise ClientClosedError("the client was closed", reason="CLIENT_CLOSED")
        if self._link is None:
            self._link = Link(self.addresses, self.options, self._client_id, (self._client_id & 0x3FFFFFFF) << 32)
        return self._here(self._link)

    def _here(self, link: Link) -> Link:
        """Raises FailedPreconditionError where this is another process, or another event loop, than the one of the connection."""
        if asyncio._get_running_loop() is not link.loop:
            check(link.mark)
            message = "this client is connected on another event loop; use one client for each loop, or `engram.Client`"
            raise FailedPreconditionError(message, reason="OTHER_EVENT_LOOP")
        return link

    def _timeout(self, timeout: float | None) -> float | None:
        if self._closed:
            raise ClientClosedError("the client was closed", reason="CLIENT_CLOSED")
        if self._link is not None:
            self._here(self._link)
        return self._seconds(timeout)

    def _seconds(self, timeout: float | None) -> float | None:
        return self.options.timeout_s if timeout == UNSET else checked_seconds("timeout", timeout)

    async def _unary(
        self, method: str, request: Message, response_type: type[Response], timeout: float | None
    ) -> Response:
        return await self._linked().unary(method, request, response_type, self._timeout(timeout))

    async def _request(
        self, request: stream_pb2.StreamRequest, deadline: float | None
    ) -> stream_pb2.StreamResponse | None:
        """A request on the stream; None if the stream was lost first. Raises DeadlineExceededError, UnavailableError."""
        link = self._linked()
        try:
            async with until(deadline):
                await link.up()
                return await link.request(request)
        except StreamLostError:
            return None

    def _ttl_ms(self) -> int:
        return int((self.options.ttl_s or 0) * 1000)


@contextlib.asynccontextmanager
async def until(deadline: float | None) -> AsyncIterator[None]:
    """Raises DeadlineExceededError at the deadline (the loop's time; None: never)."""
    try:
        async with asyncio.timeout_at(deadline):
            yield
    except TimeoutError as error:
        if isinstance(error, EngramError):
            raise
        raise DeadlineExceededError("the timeout passed before the server answered") from None
