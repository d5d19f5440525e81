"""The fallback wire, on grpc.aio: one reader and one writer a stream, for where the extension is not.

Streams come in through `handle`, which protocols/engram/server.py registers; connections, TLS and limits are gRPC's.
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import grpc
import numpy as np
from google.protobuf.message import DecodeError
from google.protobuf.message import Message as Proto
from numpy.typing import NDArray

from engram import __version__
from engram.v1 import stream_pb2
from engram_service.auth.access import Access
from engram_service.errors import InternalError, ResourceExhaustedError, ServiceError
from engram_service.observability.stages import EDGES
from engram_service.protocols.engram.status import abort
from engram_service.settings import Settings
from engram_service.wire.base import (
    FIRST,
    FLAGS_KNOWN,
    NOT_ACKNOWLEDGED,
    NUMBER_BITS,
    TAKEN,
    Arrived,
    Begin,
    End,
    Event,
    HalfClose,
    Message,
    StepModel,
    trace_of,
)

Context: TypeAlias = "grpc.aio.ServicerContext[bytes, stream_pb2.StreamResponse]"

_USES = 1 << (31 - NUMBER_BITS)


class _Call:
    """One stream's way out, and how much of it is under way."""

    def __init__(self, number: int, rows_max: int, written: Callable[[float, int], None]) -> None:
        self.id = number
        self.under_way = 0
        self.ending = False
        self.refusal: ServiceError | None = None
        self._rows_max = rows_max
        self._written = written
        self._outbox: deque[tuple[Proto, int, float]] = deque()
        self._freed = asyncio.Event()
        self._posted = asyncio.Event()

    def put(self, response: Proto, rows: int, since: float = 0.0) -> None:
        """`since`: when rows were answered, if that is to be known."""
        self._outbox.append((response, rows, since))
        self._posted.set()

    def free(self, rows: int) -> None:
        self.under_way -= rows
        self._freed.set()

    def end(self, refusal: ServiceError | None) -> None:
        if not self.ending:
            self.ending, self.refusal = True, refusal
        self._posted.set()
        self._freed.set()

    async def room(self) -> None:
        """Returns when another frame may be read: gRPC's flow control holds the client back until then."""
        while self.under_way >= self._rows_max and not self.ending:
            self._freed.clear()
            await self._freed.wait()

    async def write(self, context: Context) -> None:
        """Until the stream is to end and nothing is left. Rows are no longer under way when their answer is about to be written: a
        client that has it is to find its room free."""
        while True:
            while not self._outbox:
                if self.ending:
                    return
                self._posted.clear()
                await self._posted.wait()
            response, rows, since = self._outbox.popleft()
            self.free(rows)
            if since:
                self._written(time.monotonic() - since, rows)
            await context.write(response)  # type: ignore[arg-type]


class GrpcioWire:
    """Streams of a grpc.aio server."""

    name = "python"

    def __init__(self, settings: Settings, access: Access) -> None:
        self._settings = settings
        self._access = access
        self._calls: dict[int, _Call] = {}
        self._free: deque[int] = deque()  # ids of streams that are over, whose numbers are used again
        self._made = 0
        self._frames: list[tuple[int, stream_pb2.StepsFrame, float, float]] = []  # stream, frame, read, complete
        self._rows = 0
        self._written = [0] * (len(EDGES) + 1)
        self._written_s = 0.0
        self._events: list[tuple[int, Event]] = []
        self._arrived: Callable[[], None] = lambda: None
        address = settings.advertise
        self._greeting = (("engram-server", __version__), *((("engram-address", address),) if address else ()))

    def start(self, wake: Callable[[], None], turn: Callable[[], None]) -> None:
        self._arrived = wake

    def counters(self) -> dict[str, int]:
        """What is known here of what the native wire counts."""
        return {"streams": len(self._calls), "inbox_rows": self._rows, "inbox_events": len(self._events)}

    # In

    async def handle(self, requests: Any, context: Context) -> None:
        """The method EngramService.Stream; requests come as bytes, so that garbage can be answered."""
        try:
            caller = self._access.admit("Stream", context.invocation_metadata(), context.peer())
        except ServiceError as refusal:
            await abort(context, refusal)
        call = self._begun()
        heard = [False]
        self._note(Begin(call.id, caller, str(context.peer()), trace_of(context.invocation_metadata() or ())))
        try:
            # At once, and not with the first answer: the client then knows that it was let in.
            await context.send_initial_metadata(self._greeting)
            await self._carry(call, heard, context)
        finally:
            call.end(None)
            self._note(End(call.id))
            del self._calls[call.id]
            self._free.append(call.id)
            if not heard[0]:
                await self._access.holdback.hold()
        if call.refusal is not None:
            if isinstance(call.refusal, ResourceExhaustedError):
                await self._access.holdback.hold()
            await abort(context, call.refusal)

    async def _carry(self, call: _Call, heard: list[bool], context: Context) -> None:
        """Returns when the stream has ended, or has to."""
        reading, writing = (
            asyncio.create_task(work) for work in (self._read(call, heard, context), call.write(context))
        )
        try:
            await asyncio.wait([writing])
            writing.result()
        finally:
            for task in (reading, writing):
                task.cancel()
            await asyncio.wait([reading, writing])

    async def _read(self, call: _Call, heard: list[bool], context: Context) -> None:
        try:
            while True:
                await call.room()
                data: Any = await context.read()
                if data is grpc.aio.EOF:
                    self._note(HalfClose(call.id))
                    return
                heard[0] = True
                self._frame(call, data)
        except asyncio.CancelledError:
            raise
        except Exception:  # gRPC says so of a client that is gone
            call.end(InternalError("INTERNAL", "the stream broke"))

    def _frame(self, call: _Call, data: bytes) -> None:
        read = time.monotonic()
        steps = _usual(data, self._settings)
        if steps is None:
            self._note(Message(call.id, data))
            return
        rows = len(steps.handles) // 4
        call.under_way += rows
        self._frames.append((call.id, steps, read, time.monotonic()))
        self._rows += rows
        self._arrived()

    def _begun(self) -> _Call:
        if len(self._free) > _USES or (self._free and self._made >= (1 << NUMBER_BITS) - 1):
            last = self._free.popleft()
            number = last & ((1 << NUMBER_BITS) - 1)
            stream_id = number | (((last >> NUMBER_BITS) + 1) % _USES) << NUMBER_BITS
        else:
            self._made += 1  # number 0 is the server's own
            stream_id = self._made
        call = self._calls[stream_id] = _Call(stream_id, self._settings.stream_rows_max, self._wrote)
        return call

    def _note(self, event: Event) -> None:
        self._events.append((self._rows, event))
        self._arrived()

    def take(self) -> tuple[Arrived | None, Sequence[tuple[int, Event]]]:
        frames, events = self._frames, self._events
        self._frames, self._events, self._rows = [], [], 0
        return (_columns(frames) if frames else None), events

    # Out

    def answer(
        self, streams: NDArray[np.uint32], handles: NDArray[np.uint32], seqs: NDArray[np.uint64],
        outputs: NDArray[np.uint8] | None, durable: NDArray[np.uint64] | None,
    ) -> None:  # fmt: skip
        since = time.monotonic()
        if np.count_nonzero(streams[1:] < streams[:-1]):  # a stream's rows stand together
            order = np.argsort(streams, kind="stable")
            streams, handles, seqs = streams[order], handles[order], seqs[order]
            outputs = None if outputs is None else outputs[order]
            durable = None if durable is None else durable[order]
        starts = np.flatnonzero(np.append(True, streams[1:] != streams[:-1]))
        ends = np.append(starts[1:], len(streams))
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            call = self._calls.get(streams.item(start))
            if call is None:
                continue
            rows = slice(start, end)
            frame = stream_pb2.OutputsFrame(
                handles=handles[rows].tobytes(),
                seqs=seqs[rows].tobytes(),
                outputs=b"" if outputs is None else outputs[rows].tobytes(),
                durable_seqs=b"" if durable is None else durable[rows].tobytes(),
            )
            call.put(stream_pb2.StreamResponse(outputs=frame), end - start, since)

    def _wrote(self, took: float, rows: int) -> None:
        self._written[bisect_left(EDGES, took)] += rows
        self._written_s += took * rows

    def written(self) -> tuple[Sequence[int], float]:
        return self._written, self._written_s

    def expect(self, stream: int, rows: int) -> None:
        if (call := self._calls.get(stream)) is not None:
            call.free(-rows)

    def send(self, stream: int, response: Proto, rows: int) -> None:
        if (call := self._calls.get(stream)) is not None:
            call.put(response, rows)

    async def stop(self, grace_s: float) -> None:
        """The server that calls `handle` stops by itself."""

    def finish(self, stream: int, refusal: ServiceError | None = None) -> None:
        if (call := self._calls.get(stream)) is not None:
            call.end(refusal)

    # Unary steps, which do not pass here

    def know(self, key: str, handle: int, model: StepModel) -> None:
        """They are gRPC's calls."""

    def forget(self, handle: int) -> None:
        """So no handle is known."""

    def again(self, stream: int, given: bool, numbered: bool) -> bool:
        return False


def _usual(data: bytes, settings: Settings) -> stream_pb2.StepsFrame | None:
    """The steps that a message holds, if nothing about them is unusual or wrong."""
    if len(data) > settings.frame_bytes_max:
        return None
    try:
        request = stream_pb2.StreamRequest.FromString(data)
    except DecodeError:
        return None
    if request.WhichOneof("frame") != "steps":
        return None
    frame = request.steps
    rows, rest = divmod(len(frame.handles), 4)
    good = (
        not rest
        and 0 < rows <= settings.frame_rows_max
        and len(frame.seqs) == 8 * rows
        and frame.inputs
        and len(frame.inputs) % rows == 0
        and (not frame.flags or (len(frame.flags) == rows and max(frame.flags) <= FLAGS_KNOWN))
        and (not frame.acknowledged_seqs or len(frame.acknowledged_seqs) == 8 * rows)
        and not frame.repeats
        and not frame.dtype
    )
    return frame if good else None


def _columns(came: list[tuple[int, stream_pb2.StepsFrame, float, float]]) -> Arrived:
    frames = [frame for _, frame, _, _ in came]
    counts = np.array([len(frame.handles) // 4 for frame in frames])
    numbers = np.array([number for number, _, _, _ in came], np.uint32)
    times = np.array([(read, complete, 0.0, 0.0) for _, _, read, complete in came]).repeat(counts, axis=0)
    times[:, TAKEN] = time.monotonic()
    handles = np.frombuffer(b"".join([frame.handles for frame in frames]), np.uint32)
    flags = np.zeros(len(handles), np.uint8)
    acknowledged = np.full(len(handles), NOT_ACKNOWLEDGED)
    start = 0
    for count, frame in zip(counts.tolist(), frames, strict=True):
        if frame.flags:
            flags[start : start + count] = np.frombuffer(frame.flags, np.uint8)
        if frame.acknowledged_seqs:
            acknowledged[start : start + count] = np.frombuffer(frame.acknowledged_seqs, np.uint64)
        flags[start] |= FIRST
        start += count
    return Arrived(
        streams=np.repeat(numbers, counts),
        handles=handles,
        seqs=np.frombuffer(b"".join([frame.seqs for frame in frames]), np.uint64),
        acknowledged=acknowledged,
        flags=flags,
        timeouts_ms=np.repeat(np.array([frame.timeout_ms for frame in frames], np.uint32), counts),
        input_nbytes=np.repeat(np.array([len(frame.inputs) for frame in frames]) // counts, counts).astype(np.uint32),
        inputs=np.frombuffer(b"".join([frame.inputs for frame in frames]), np.uint8),
        times=times,
    )
