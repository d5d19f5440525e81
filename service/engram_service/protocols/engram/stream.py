"""The bidirectional stream: what its events and its frames, other than of steps, mean. Event loop only; steps/loop.py calls it.

A stream's opens and closes wait for the store, so they are tasks; what they ask a client may be answered by frames behind them.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from google.protobuf.message import DecodeError

from engram.v1 import stream_pb2
from engram_service.auth.access import Access
from engram_service.auth.tenants import id_of, key_of
from engram_service.auth.tokens import Caller
from engram_service.catalog import Catalog
from engram_service.condition import Condition
from engram_service.errors import InternalError, InvalidArgumentError, ServiceError, UnauthenticatedError
from engram_service.pacing import Pacing
from engram_service.sessions.ending import Asked, Endings
from engram_service.sessions.ids import new_id
from engram_service.sessions.opening import Sessions
from engram_service.sessions.ownership import Ownership
from engram_service.sessions.requests import Opened, Wanted
from engram_service.sessions.shares import Shares
from engram_service.sessions.streams import Stream, Streams, event_frame
from engram_service.settings import Settings
from engram_service.steps.admission import Admission
from engram_service.supervision import Supervisor
from engram_service.wire.base import Begin, End, Event, HalfClose, Message, Step, Wire

log = logging.getLogger(__name__)

_OPENS_MAX = 64  # opens and closes of one stream that may wait for the store at once
_OPEN_NBYTES = 1024  # an open or close counts as a row under way for each of these that its frame has
_LOOK_S = 0.005
_BEGUN_MAX = 8  # opens and closes in a round of the event loop


@dataclass(frozen=True, slots=True)
class _Slow:
    """What a frame asks for that waits for the store. A stream that ends cancels it unless it is to be finished all the same."""

    work: Callable[[], Awaitable[None]]
    finished: bool = False


@dataclass(slots=True, eq=False)
class _Open:
    """The opens and closes of one stream, so many at a time, in their order."""

    turns: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_OPENS_MAX))
    tasks: dict[asyncio.Task[None], _Slow] = field(default_factory=dict)


class Calls(Protocol):
    """Who answers unary steps that come on this wire (step_calls.py)."""

    def begin(self, step: Step) -> None: ...

    def end(self, call: int) -> bool: ...


class StreamHandler:
    """All streams."""

    def __init__(
        self, settings: Settings, wire: Wire, streams: Streams, catalog: Catalog, admission: Admission,
        sessions: Sessions, endings: Endings, ownership: Ownership, shares: Shares, access: Access,
        condition: Condition, supervisor: Supervisor,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._wire = wire
        self._streams = streams
        self._catalog = catalog
        self._admission = admission
        self._sessions = sessions
        self._endings = endings
        self._ownership = ownership
        self._shares = shares
        self._access = access
        self._condition = condition
        self._supervisor = supervisor
        self._opens: dict[Stream, _Open] = {}
        self._pacing = Pacing(_BEGUN_MAX)
        self.calls: Calls | None = None

    def event(self, event: Event) -> None:
        """What has come on a stream beside steps. Never raises."""
        try:
            match event:
                case Message(number, data):
                    if (stream := self._streams.get(number)) is not None:
                        self._message(stream, data)
                case Begin():
                    self._begin(event)
                case HalfClose(number):
                    if (stream := self._streams.get(number)) is not None:
                        self._supervisor.once("stream's end", self._finish(stream))
                case Step() if self.calls is not None:
                    self.calls.begin(event)
                case End(number) if self.calls is None or not self.calls.end(number):
                    if (stream := self._streams.get(number)) is not None:
                        self._end(stream)
        except Exception as error:
            self._supervisor.failed("stream", error)

    def peers(self) -> list[str]:
        """Whose connections carry a stream."""
        return [stream.peer for stream in self._streams.all()]

    def tokens_changed(self) -> None:
        """Puts out those whose token has been revoked, has expired or has lost its right; the others go on."""
        self._shares.renew()
        for stream in self._streams.all():
            try:
                renewed = self._access.renewed(stream.caller, "Stream")
                if renewed.tenant != stream.tenant:
                    raise UnauthenticatedError(
                        "TOKEN_UNKNOWN", "this token has been given to another tenant; connect again"
                    )
                stream.caller = renewed
            except ServiceError as refusal:
                self._access.audit.denied("Stream", stream.caller, stream.peer, refusal)
                self._wire.finish(stream.id, refusal)

    def drain(self) -> None:
        """Tells all streams that this server goes away."""
        for stream in self._streams.all():
            self._wire.send(stream.id, event_frame(stream_pb2.EventFrame.TYPE_DRAINING), 0)

    def finish(self) -> None:
        """Ends all streams behind what was sent to them."""
        for stream in self._streams.all():
            self._wire.finish(stream.id)

    def _begin(self, begun: Begin) -> None:
        caller = begun.caller
        try:
            self._condition.check_open()
            stream = self._streams.add(begun.stream, caller, begun.peer, begun.trace)
        except ServiceError as refusal:
            self._wire.finish(begun.stream, refusal)
            return
        self._opens[stream] = _Open()
        log.info("stream opened", extra=_told(stream, caller))

    def _end(self, stream: Stream) -> None:
        for task, slow in self._opens.pop(stream).tasks.items():
            if not slow.finished:
                task.cancel()
        self._ownership.disconnect(stream)
        log.info("stream ended", extra=_told(stream, stream.caller))

    async def _finish(self, stream: Stream) -> None:
        """The client has no more frames: what is under way is answered, and the stream ends."""
        while not stream.ended and (self._opens[stream].tasks or stream.in_flight):
            await asyncio.sleep(_LOOK_S)
        self._wire.finish(stream.id)

    def _message(self, stream: Stream, data: bytes) -> None:
        if (slow := self._handle(stream, data)) is None:
            return
        opens, weight = self._opens[stream], 1 + len(data) // _OPEN_NBYTES
        self._wire.expect(stream.id, weight)

        async def in_turn() -> None:
            async with opens.turns:
                await self._pacing.turn()
                await slow.work()

        def ended(task: asyncio.Task[None]) -> None:
            del opens.tasks[task]
            self._wire.expect(stream.id, -weight)

        task = self._supervisor.once("open or close", in_turn())
        opens.tasks[task] = slow
        task.add_done_callback(ended)

    def _handle(self, stream: Stream, data: bytes) -> _Slow | None:
        """Does what a frame asks for, or returns what will."""
        limit = self._settings.frame_bytes_max
        try:
            if len(data) > limit:
                raise InvalidArgumentError("FRAME_TOO_LARGE", f"the frame has {len(data)} bytes; send at most {limit}")
            request = stream_pb2.StreamRequest.FromString(data)
            match request.WhichOneof("frame"):
                case "steps":
                    self._admission.admit_frame(stream, request.steps, time.monotonic())
                case "acknowledge":
                    self._admission.acknowledge(stream, request.acknowledge)
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
        default = self._settings.durability == "interval"
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
            model=None if opened.served is None else self._catalog.describe(opened.served),
            window=0 if opened.served is None else opened.served.arena.window,
            rows_max=self._settings.frame_rows_max,
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
        return _Slow(partial(self._close, stream, frame.request_id, asked), finished=True)

    async def _close(self, stream: Stream, request_id: int, asked: Asked) -> None:
        outcome = "CANCELLED"
        try:
            errors = await self._endings.close(stream, asked)
            outcome = errors[0][1].reason if errors else "ok"
        finally:
            if asked.keys and not asked.detach:
                self._access.audit.closed(stream.caller, stream.peer, [id_of(key) for key in asked.keys], outcome)
        _tell_closed(stream, request_id, errors)


def _tell_closed(stream: Stream, request_id: int, errors: list[tuple[int, ServiceError]]) -> None:
    rows = [stream_pb2.RowError(row=row, error=refusal.detail()) for row, refusal in errors]
    stream.tell(stream_pb2.StreamResponse(closed=stream_pb2.ClosedFrame(request_id=request_id, errors=rows)))


def _say(stream: Stream, refusal: ServiceError) -> None:
    """A frame that could not be used at all."""
    stream.tell(stream_pb2.StreamResponse(errors=stream_pb2.ErrorsFrame(errors=[refusal.detail()])))


def _told(stream: Stream, caller: Caller) -> dict[str, object]:
    return {"stream": stream.id, "trace": stream.trace, "tenant": caller.tenant, "token": caller.token}
