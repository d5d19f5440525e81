"""The streams of clients: who has which sessions open, and what of theirs is in flight. Event loop only.

A stream's id is 20 bits of number, which is used again, and bits that count the uses; wire/ gives them. What every batch asks about
streams stands in columns by number. Stream 0 is the server's own, for steps that come without a stream; where a row of it has CALL
in its stream's id, the rest is the number of the unary call that brought it.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.v1 import stream_pb2
from engram_service.auth.tenants import SERVER
from engram_service.auth.tokens import Caller
from engram_service.places import NATIVE
from engram_service.sessions.handles import Handles, HandleTable
from engram_service.sessions.shares import Shares, too_many_streams
from engram_service.wire.base import CALL, NUMBER_BITS, Wire

if NATIVE:
    import engram_native

LOCAL = 0
_NUMBER = np.uint32((1 << NUMBER_BITS) - 1)
_NUMBER_INT = int(_NUMBER)
_NOBODY = np.uint32(0xFFFFFFFF)


class Stream:
    """One stream."""

    def __init__(self, stream_id: int, streams: Streams, caller: Caller, peer: str, trace: str) -> None:
        self.id = stream_id
        self.caller = caller
        self.tenant = caller.tenant  # whose sessions it may open
        self.peer = peer
        self.trace = trace  # the trace id that the client sent (W3C trace context); for log lines
        self.ended = False
        self.opening = 0  # handles that opens under way may take
        self.handles = Handles(streams.handles, stream_id & _NUMBER_INT)
        self._streams = streams
        self._questions = itertools.count(1)
        self._asked: dict[int, asyncio.Future[None]] = {}  # by the number of a ConfirmFrame

    @property
    def in_flight(self) -> int:
        """Rows that have come and are not answered."""
        return self._streams.in_flight_of(self.id)

    def tell(self, response: stream_pb2.StreamResponse) -> None:
        """Sends a frame that answers no step. Until it has left it counts as a row, so that who sends what is refused and does not
        read is read no further."""
        if not self.ended:
            self._streams.wire.expect(self.id, 1)
            self._streams.wire.send(self.id, response, 1)

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

    def end(self) -> None:
        self.ended = True
        for number in self._asked:
            self.confirmed(number)


class Streams:
    """All of them, by id."""

    def __init__(self, wire: Wire, shares: Shares, streams_max: int) -> None:
        """`streams_max`: of this process."""
        self.wire = wire
        self.handles = HandleTable()
        self.in_flight = 0  # rows of all streams
        self._shares = shares
        shares.on_limited = self._limited
        self._streams_max = streams_max
        self._of: dict[int, Stream] = {}
        self._ids = np.full(64, _NOBODY, np.uint32)  # by number
        self._rows = np.zeros(64, np.int64)  # in flight
        self._tenants = np.full(64, SERVER, np.int32)  # whose stream it is; rows of calls are counted by shares.py
        self._by_tenant: NDArray[np.int64] | None = None  # rows in flight, while there are limits on them

    def __len__(self) -> int:
        return len(self._of) - (LOCAL in self._of)

    def get(self, stream_id: int) -> Stream | None:
        return self._of.get(LOCAL if stream_id & CALL else stream_id)

    def all(self) -> list[Stream]:
        """The clients' ones."""
        return [stream for stream in self._of.values() if stream.id != LOCAL]

    def add(self, stream_id: int, caller: Caller, peer: str = "", trace: str = "") -> Stream:
        """Raises ResourceExhaustedError."""
        tenant = SERVER
        if stream_id != LOCAL:
            if len(self) >= self._streams_max:
                raise too_many_streams(self._streams_max)
            share = self._shares.of(caller.tenant)
            share.take_stream()
            tenant = share.number
        number = stream_id & _NUMBER_INT
        if number >= len(self._ids):
            more = max(len(self._ids), number + 1 - len(self._ids))
            self._ids = np.concatenate([self._ids, np.full(more, _NOBODY, np.uint32)])
            self._rows = np.concatenate([self._rows, np.zeros(more, np.int64)])
            self._tenants = np.concatenate([self._tenants, np.full(more, SERVER, np.int32)])
        stream = self._of[stream_id] = Stream(stream_id, self, caller, peer, trace)
        self._ids[number], self._rows[number], self._tenants[number] = stream_id, 0, tenant
        return stream

    def remove(self, stream: Stream) -> None:
        """It has ended, and with it what it had in flight."""
        stream.end()
        number = stream.id & _NUMBER_INT
        del self._of[stream.id]
        if stream.id != LOCAL:
            self._shares.of(stream.tenant).give_stream()
        self.in_flight -= int(self._rows[number])
        if self._by_tenant is not None:
            self._by_tenant[self._tenants[number]] -= self._rows[number]
        self._ids[number], self._rows[number] = _NOBODY, 0
        stream.handles.forget()

    @property
    def columns(self) -> list[NDArray[Any]]:
        """Ids and rows in flight by number; where each stream's places begin, and how many it has used; of all places the rows
        of the session table, and the handles. Other arrays, once there are more."""
        places = self.handles
        return [self._ids, self._rows, places.starts, places.counts, places.rows, places.names]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of the columns, each of which is another array only when it is a longer one."""
        return len(self._ids), len(self.handles.starts), len(self.handles.rows)

    # Rows, by the id of their stream

    def rows_of(self, ids: NDArray[np.uint32], handles: NDArray[np.uint32]) -> NDArray[np.int32]:
        """Rows of the session table that these handles of streams name; negative where they name none. The streams are there."""
        return self.handles.rows_of(_numbers(ids), handles)

    def here(self, ids: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """Which of these streams are there."""
        # Whose number is beyond them is no other's.
        there: NDArray[np.bool_] = (self._ids.take(ids & _NUMBER, mode="clip") == ids) | (ids >= CALL)
        return there

    def in_flight_of(self, stream_id: int) -> int:
        stream = self.get(stream_id)
        return 0 if stream is None else int(self._rows[stream.id & _NUMBER_INT])

    def arrived(self, ids: NDArray[np.uint32]) -> None:
        """A row for each, which is in flight from now on. The streams are there."""
        if len(ids) == 1:
            number = _number(ids.item(0))
            self._rows[number] += 1
            if self._by_tenant is not None:
                self._by_tenant[self._tenants.item(number)] += 1
        else:
            numbers = _numbers(ids)
            np.add.at(self._rows, numbers, 1)
            if self._by_tenant is not None:
                np.add.at(self._by_tenant, self._tenants[numbers], 1)
        self.in_flight += len(ids)

    def answered(self, ids: NDArray[np.uint32]) -> None:
        """A row for each, which is answered, or given up. Of streams that have ended nothing is in flight."""
        if NATIVE and self._by_tenant is None:
            self.in_flight -= engram_native.leave(self._ids, self._rows, ids)
            return
        numbers = _numbers(ids)
        numbers = numbers[(self._ids[numbers] == ids) | (ids >= CALL)]
        np.subtract.at(self._rows, numbers, 1)
        if self._by_tenant is not None:
            np.subtract.at(self._by_tenant, self._tenants[numbers], 1)
        self.in_flight -= len(numbers)

    def to_check(self, ids: NDArray[np.uint32]) -> NDArray[np.bool_]:
        """Of which of these streams more rows may have come than their tenants may have in flight: of calls it is not known."""
        found: NDArray[np.bool_] = (ids >= CALL) | self._shares.over(self._tenants[_numbers(ids)])
        return found

    def _limited(self, limited: bool) -> None:
        """Rows are counted by tenant from now on, or no longer."""
        rows = self._shares.column.rows
        (np.add if limited else np.subtract).at(rows, self._tenants, self._rows)
        self._by_tenant = rows if limited else None


def _number(stream_id: int) -> int:
    return LOCAL if stream_id & CALL else stream_id & _NUMBER_INT


def _numbers(ids: NDArray[np.uint32]) -> NDArray[np.uint32]:
    return np.where(ids < CALL, ids & _NUMBER, np.uint32(LOCAL)).astype(np.uint32, copy=False)


def event_frame(kind: stream_pb2.EventFrame.Type, handles: NDArray[Any] | None = None) -> stream_pb2.StreamResponse:
    data = b"" if handles is None else handles.astype(np.uint32).tobytes()
    return stream_pb2.StreamResponse(event=stream_pb2.EventFrame(type=kind, handles=data))
