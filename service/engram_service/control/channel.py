"""Calls in both directions over a socket between two processes of one server: JSON, each message behind its length.

Whatever is waiting to be written leaves in one piece, so calls that are made at one time are one message to the kernel.
"""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import struct
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from engram.v1 import error_pb2
from engram_service.errors import InternalError, ServiceError, UnavailableError, of_detail
from engram_service.supervision import Supervisor

_LENGTH = struct.Struct("!I")
_RETRY_MS = 200

Verbs = Mapping[str, Callable[..., Awaitable[Any]]]


class Channel:
    """One end. Event loop only. What is called is a coroutine of `verbs`, with named arguments; its result is plain JSON."""

    def __init__(self, supervisor: Supervisor, verbs: Verbs) -> None:
        self._supervisor = supervisor
        self._verbs = verbs
        self._writer: asyncio.StreamWriter | None = None
        self._asked: dict[int, asyncio.Future[Any]] = {}
        self._made = 0
        self.there = asyncio.Event()  # the other end

    async def run(self, end: socket.socket, begin: dict[str, Any] | None = None) -> None:
        """Answers calls and takes answers until the other end is closed. `begin` is told before anything else: see `first`."""
        reader, self._writer = await asyncio.open_connection(sock=end)
        if begin is not None:
            self.tell("begin", **begin)
        self.there.set()
        try:
            while True:
                (nbytes,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
                self._heard(json.loads(await reader.readexactly(nbytes)))
        except (asyncio.IncompleteReadError, OSError):
            pass
        finally:
            self.there.clear()
            self._writer.close()
            self._writer = None
            for waiting in self._asked.values():
                if not waiting.done():
                    waiting.set_exception(_gone())

    async def call(self, verb: str, timeout_s: float | None = None, **arguments: Any) -> Any:
        """What the other end's verb returns. Raises the ServiceError that it raises; UnavailableError where the other end is gone,
        and TimeoutError."""
        self._made += 1
        number = self._made
        waiting = self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self._send({"verb": verb, "with": arguments, "number": number})
            async with asyncio.timeout(timeout_s):
                return await waiting
        finally:
            del self._asked[number]

    def tell(self, verb: str, **arguments: Any) -> None:
        """The same without an answer; where the other end is gone nothing happens."""
        if self._writer is not None:
            self._send({"verb": verb, "with": arguments})

    def _send(self, message: dict[str, Any]) -> None:
        if self._writer is None:
            raise _gone()
        self._writer.write(framed(message))

    def _heard(self, message: dict[str, Any]) -> None:
        if "verb" in message:
            self._supervisor.once(f"control {message['verb']}", self._answer(message))
            return
        waiting = self._asked.get(message["number"])
        if waiting is None or waiting.done():
            return
        if refusal := message.get("refusal"):
            waiting.set_exception(of_detail(error_pb2.ErrorDetail.FromString(base64.b64decode(refusal))))
        else:
            waiting.set_result(message["result"])

    async def _answer(self, message: dict[str, Any]) -> None:
        answer: dict[str, Any] = {}
        asker = self._writer
        try:
            answer["result"] = await self._verbs[message["verb"]](**message["with"])
        except ServiceError as refusal:
            answer["refusal"] = _packed(refusal)
        except Exception as error:
            why = f"the server failed on {message['verb']}: {type(error).__name__}"
            answer["refusal"] = _packed(InternalError("INTERNAL", why))
            raise
        finally:
            if "number" in message and answer and self._writer is not None and self._writer is asker:
                self._send(answer | {"number": message["number"]})


def framed(message: dict[str, Any]) -> bytes:
    """A message as it travels."""
    data = json.dumps(message, allow_nan=False, separators=(",", ":")).encode()
    return _LENGTH.pack(len(data)) + data


def first(end: socket.socket) -> dict[str, Any]:
    """What is told before anything else, from a blocking socket. Raises EOFError."""
    (nbytes,) = _LENGTH.unpack(_exactly(end, _LENGTH.size))
    begin: dict[str, Any] = json.loads(_exactly(end, nbytes))["with"]
    return begin


def _exactly(end: socket.socket, nbytes: int) -> bytes:
    parts = []
    while nbytes:
        if not (part := end.recv(min(nbytes, 1 << 16))):
            raise EOFError
        parts.append(part)
        nbytes -= len(part)
    return b"".join(parts)


def _packed(refusal: ServiceError) -> str:
    return base64.b64encode(refusal.detail().SerializeToString()).decode()


def _gone() -> UnavailableError:
    message = "the process that has the sessions is being started again; try again"
    return UnavailableError("STORE_UNAVAILABLE", message, retry_after_ms=_RETRY_MS)
