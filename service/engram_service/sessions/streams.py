"""One client stream, as the core sees it: what it has in flight, and where its answers go.

Event loop only. api/stream.py makes one for each gRPC stream and api/unary.py one for all unary steps.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import deque
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.v1 import stream_pb2
from engram_service.sessions.handles import Handles


class Stream:
    """One stream of a client, or the one that the server itself has for unary steps."""

    def __init__(self, stream_id: int, rows_in_flight_max: int, trace: str = "", tenant: str = "") -> None:
        self.id = stream_id
        self.trace = trace  # the trace id that the client sent (W3C trace context); for log lines
        self.tenant = tenant  # whose sessions it may open
        self.in_flight = 0  # rows accepted whose answer is not on its way
        self.ended = False
        self.opening = 0  # handles that opens under way may take
        self.handles = Handles()
        self._rows_in_flight_max = rows_in_flight_max
        self._outbox: deque[tuple[stream_pb2.StreamResponse, int]] = deque()
        self._freed = asyncio.Event()
        self._posted = asyncio.Event()
        self._questions = itertools.count(1)
        self._asked: dict[int, asyncio.Future[None]] = {}  # by the number of a ConfirmFrame

    # Answers

    def send(self, response: stream_pb2.StreamResponse, rows: int = 0) -> None:
        """Queues a frame that answers `rows` rows. The queue is bounded by the rows in flight."""
        if self.ended:
            self.in_flight -= rows
            return
        self._outbox.append((response, rows))
        self._posted.set()

    def tell(self, response: stream_pb2.StreamResponse, rows: int = 1) -> None:
        """Queues a frame that answers nothing that was accepted. It counts as rows in flight, so that who sends what is refused and
        does not read is read no further."""
        self.in_flight += rows
        self.send(response, rows)

    async def next(self) -> stream_pb2.StreamResponse | None:
        """The next frame to write; None once the stream has ended and none is left.

        Its rows are no longer in flight from now on: a client that has its answer is to find its room free.
        """
        while not self._outbox:
            if self.ended:
                return None
            self._posted.clear()
            await self._posted.wait()
        response, rows = self._outbox.popleft()
        self.in_flight -= rows
        self._freed.set()
        return response

    async def confirm(self) -> None:
        """Asks the client whether it is still there; returns when it has said so, or the stream has ended."""
        if self.ended:
            return
        number = next(self._questions)
        self._asked[number] = asyncio.get_running_loop().create_future()
        try:
            self.tell(stream_pb2.StreamResponse(confirm=stream_pb2.ConfirmFrame(number=number)))
            await self._asked[number]
        finally:
            del self._asked[number]

    def confirmed(self, number: int) -> None:
        """The client has answered."""
        answered = self._asked.get(number)
        if answered is not None and not answered.done():
            answered.set_result(None)

    async def room(self) -> None:
        """Returns when another frame may be read: gRPC's flow control holds the client back until then."""
        while self.in_flight >= self._rows_in_flight_max and not self.ended:
            self._freed.clear()
            await self._freed.wait()

    def end(self) -> None:
        self.ended = True
        for number in self._asked:
            self.confirmed(number)
        self._posted.set()
        self._freed.set()


def outputs_frame(
    handles: NDArray[Any], seqs: NDArray[Any], outputs: NDArray[np.uint8] | None, durable: NDArray[Any] | None
) -> stream_pb2.StreamResponse:
    return stream_pb2.StreamResponse(
        outputs=stream_pb2.OutputsFrame(
            handles=handles.tobytes(),
            seqs=seqs.tobytes(),
            outputs=b"" if outputs is None else outputs.tobytes(),
            durable_seqs=b"" if durable is None else durable.tobytes(),
        )
    )


def event_frame(kind: stream_pb2.EventFrame.Type, handles: NDArray[Any] | None = None) -> stream_pb2.StreamResponse:
    data = b"" if handles is None else handles.astype(np.uint32).tobytes()
    return stream_pb2.StreamResponse(event=stream_pb2.EventFrame(type=kind, handles=data))
