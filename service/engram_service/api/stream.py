"""The bidirectional stream: reads frames into the core and writes its answers. One reader and one writer a stream."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import grpc
from google.protobuf.message import DecodeError

from engram import __version__
from engram.v1 import stream_pb2
from engram_service.api.access import Access
from engram_service.api.status import abort
from engram_service.core import Core
from engram_service.errors import (
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    ServiceError,
    UnauthenticatedError,
)
from engram_service.sessions.ending import Asked, Endings
from engram_service.sessions.opening import Opened, Sessions, Wanted, new_id
from engram_service.sessions.streams import Stream
from engram_service.supervision import Supervisor
from engram_service.tenants import id_of, key_of
from engram_service.tokens import Caller

log = logging.getLogger(__name__)

Context: TypeAlias = "grpc.aio.ServicerContext[bytes, stream_pb2.StreamResponse]"


_OPENS_MAX = 64  # opens and closes of one stream that may wait for the store at once
_OPENS_NBYTES_MAX = 16 << 20  # of these and those behind them, before the stream is read no further
_OPEN_NBYTES = 1024  # of one, beside its frame


@dataclass(frozen=True, slots=True)
class _Slow:
    """What a frame asks for that waits for the store. A stream that ends cancels it unless it is to be finished all the same."""

    work: Callable[[], Awaitable[None]]
    finished: bool = False


@dataclass(slots=True, eq=False)
class _Guest:
    """Whose stream it is; `put_out` is set to end it."""

    caller: Caller
    peer: str
    heard: bool = False  # whether a frame has come
    put_out: asyncio.Future[ServiceError] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class StreamHandler:
    """Handles EngramService.Stream; requests come as bytes, so that garbage can be answered."""

    def __init__(self, core: Core, sessions: Sessions, endings: Endings, access: Access) -> None:
        self._core = core
        self._sessions = sessions
        self._endings = endings
        self._access = access
        self._guests: dict[Stream, _Guest] = {}
        address = core.settings.advertise
        self._greeting = (("engram-server", __version__), *((("engram-address", address),) if address else ()))

    async def handle(self, requests: Any, context: Context) -> None:
        try:
            caller = self._access.admit("Stream", context.invocation_metadata(), context.peer())
            stream = self._core.connect(trace_of(context), caller.tenant)
        except ServiceError as refusal:
            if isinstance(refusal, ResourceExhaustedError):
                await self._access.holdback.hold()
            await abort(context, refusal)
        told = {"stream": stream.id, "trace": stream.trace, "tenant": caller.tenant, "token": caller.token}
        log.info("stream opened", extra=told)
        guest = self._guests[stream] = _Guest(caller, context.peer())
        try:
            # At once, and not with the first answer: the client then knows that it was let in.
            await context.send_initial_metadata(self._greeting)
            await self._carry(stream, guest, context)
        finally:
            del self._guests[stream]
            self._core.disconnect(stream)
            log.info("stream ended", extra=told)
            if not guest.heard:
                await self._access.holdback.hold()
        if guest.put_out.done():
            await abort(context, guest.put_out.result())

    async def _carry(self, stream: Stream, guest: _Guest, context: Context) -> None:
        """Returns when the stream has ended, or has to."""
        read = self._core.supervisor.once("stream read", self._read(stream, guest, context))
        work = [read, asyncio.create_task(_write(stream, context))]
        waited: list[asyncio.Future[Any]] = [work[1], guest.put_out]
        try:
            await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
            if not guest.put_out.done():
                work[1].result()
        finally:
            for task in work:
                task.cancel()
        if guest.put_out.done():
            await asyncio.wait(work)

    def peers(self) -> list[str]:
        """Whose connections carry a stream."""
        return [guest.peer for guest in self._guests.values()]

    def tokens_changed(self) -> None:
        """Puts out those whose token has been revoked, has expired or has lost its right; the others go on."""
        self._core.shares.forget_room()
        for guest in self._guests.values():
            try:
                renewed = self._access.renewed(guest.caller, "Stream")
                if renewed.tenant != guest.caller.tenant:
                    raise UnauthenticatedError(
                        "TOKEN_UNKNOWN", "this token has been given to another tenant; connect again"
                    )
                guest.caller = renewed
            except ServiceError as refusal:
                if not guest.put_out.done():
                    self._access.audit.denied("Stream", guest.caller, guest.peer, refusal)
                    guest.put_out.set_result(refusal)

    async def _read(self, stream: Stream, guest: _Guest, context: Context) -> None:
        """Reads until the client has no more frames; then what is under way is answered, and the stream ends."""
        opens = _Opens(self._core.supervisor)
        try:
            while True:
                await stream.room()
                data: Any = await context.read()
                if data is grpc.aio.EOF:
                    break
                guest.heard = True
                if slow := self._handle(stream, data):
                    await opens.begin(slow, len(data))
            await opens.wait()
            while stream.in_flight and not stream.ended:
                await asyncio.sleep(0.005)
        finally:
            opens.cancel()
            stream.end()

    def _handle(self, stream: Stream, data: bytes) -> _Slow | None:
        """Does what a frame asks for, or returns what will."""
        limit = self._core.settings.frame_bytes_max
        try:
            if len(data) > limit:
                raise InvalidArgumentError("FRAME_TOO_LARGE", f"the frame has {len(data)} bytes; send at most {limit}")
            request = stream_pb2.StreamRequest.FromString(data)
            match request.WhichOneof("frame"):
                case "steps":
                    self._core.steps(stream, request.steps)
                case "acknowledge":
                    self._core.acknowledge(stream, request.acknowledge)
                case "open":
                    return _Slow(partial(self._open, stream, request.open, attach=False))
                case "attach":
                    return _Slow(partial(self._open, stream, request.attach, attach=True))
                case "close":
                    return self._closing(stream, request.close)
                case "confirm":
                    stream.confirmed(request.confirm.number)
                case _:
                    raise InvalidArgumentError("INVALID_FRAME", "the request has no frame that this server knows")
        except DecodeError:
            _say(stream, InvalidArgumentError("INVALID_FRAME", "the bytes are not an engram.v1.StreamRequest"))
        except ServiceError as refusal:
            _say(stream, refusal)
        except Exception as error:
            log.exception("a frame failed", extra={"stream": stream.id})
            _say(stream, InternalError("INTERNAL", f"the server failed on this frame: {type(error).__name__}"))
        return None

    async def _open(self, stream: Stream, frame: stream_pb2.OpenFrame | stream_pb2.AttachFrame, attach: bool) -> None:
        tenant = stream.tenant
        keys = [key_of(tenant, given or new_id()) for given in frame.session_ids]
        default = self._core.settings.durability == "interval"
        interval = default if frame.durability == 0 else frame.durability == stream_pb2.DURABILITY_INTERVAL
        wanted = Wanted(frame.model, frame.version, tenant, keys, interval, frame.client_id, frame.ttl_ms, attach)
        if isinstance(frame, stream_pb2.OpenFrame):
            wanted.confirms, wanted.constants = frame.confirms, frame.constants
        try:
            opened = await self._sessions.open(stream, wanted)
        except ServiceError as refusal:
            opened = Opened.refused(len(keys), keys, refusal)
        except Exception as error:
            log.exception("an open failed", extra={"stream": stream.id})
            failure = InternalError("INTERNAL", f"the server failed on this open: {type(error).__name__}")
            opened = Opened.refused(len(keys), keys, failure)
        made = any(not given for given in frame.session_ids)
        response = stream_pb2.OpenedFrame(
            request_id=frame.request_id,
            handles=opened.handles.tobytes(),
            seqs=opened.seqs.tobytes(),
            acknowledged_seqs=opened.acked.tobytes(),
            created=opened.created.tobytes(),
            session_ids=[id_of(key) for key in opened.ids] if made else [],
            model=None if opened.served is None else self._core.catalog.describe(opened.served),
            window=0 if opened.served is None else opened.served.arena.window,
            rows_max=self._core.settings.frame_rows_max,
            errors=[stream_pb2.RowError(row=row, error=refusal.detail()) for row, refusal in opened.errors.items()],
        )
        stream.tell(stream_pb2.StreamResponse(opened=response))

    def _closing(self, stream: Stream, frame: stream_pb2.CloseFrame) -> _Slow | None:
        """What a CloseFrame is about is settled as it is read; it is finished though the stream be gone by its turn."""
        try:
            asked = self._endings.asked(stream, frame)
        except ServiceError as refusal:
            _tell_closed(stream, frame.request_id, [(row, refusal) for row in range(len(frame.handles) // 4)])
            return None
        return _Slow(partial(self._close, stream, frame.request_id, asked, self._guests[stream]), finished=True)

    async def _close(self, stream: Stream, request_id: int, asked: Asked, guest: _Guest) -> None:
        outcome = "CANCELLED"
        try:
            errors = await self._endings.close(stream, asked)
            outcome = errors[0][1].reason if errors else "ok"
        finally:
            if asked.keys and not asked.detach:
                self._access.audit.closed(guest.caller, guest.peer, [id_of(key) for key in asked.keys], outcome)
        _tell_closed(stream, request_id, errors)


class _Opens:
    """The opens and closes of one stream, so many at a time, in their order.

    Those that wait for their turn are read nevertheless: what an open asks its client may be answered behind them.
    """

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._turns = asyncio.Semaphore(_OPENS_MAX)
        self._tasks: dict[asyncio.Task[None], _Slow] = {}
        self._nbytes = 0

    async def begin(self, slow: _Slow, frame_nbytes: int) -> None:
        """Returns when there is room for another."""
        nbytes = frame_nbytes + _OPEN_NBYTES

        async def in_turn() -> None:
            async with self._turns:
                await slow.work()

        def ended(task: asyncio.Task[None]) -> None:
            del self._tasks[task]
            self._nbytes -= nbytes

        task = self._supervisor.once("open or close", in_turn())
        self._tasks[task] = slow
        self._nbytes += nbytes
        task.add_done_callback(ended)
        while self._nbytes > _OPENS_NBYTES_MAX:
            await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)

    async def wait(self) -> None:
        if self._tasks:
            await asyncio.wait(self._tasks)

    def cancel(self) -> None:
        for task, slow in self._tasks.items():
            if not slow.finished:
                task.cancel()


async def _write(stream: Stream, context: Context) -> None:
    while (response := await stream.next()) is not None:
        await context.write(response)


def _tell_closed(stream: Stream, request_id: int, errors: list[tuple[int, ServiceError]]) -> None:
    rows = [stream_pb2.RowError(row=row, error=refusal.detail()) for row, refusal in errors]
    stream.tell(stream_pb2.StreamResponse(closed=stream_pb2.ClosedFrame(request_id=request_id, errors=rows)))


def _say(stream: Stream, refusal: ServiceError) -> None:
    """A frame that could not be used at all."""
    stream.tell(stream_pb2.StreamResponse(errors=stream_pb2.ErrorsFrame(errors=[refusal.detail()])))


def trace_of(context: Any) -> str:
    """The trace id of a W3C traceparent header; empty if there is none."""
    for key, value in context.invocation_metadata() or ():
        if key == "traceparent" and isinstance(value, str) and len(value.split("-")) == 4:
            return value.split("-")[1]
    return ""
