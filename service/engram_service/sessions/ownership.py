"""Sessions that this server holds no longer, or is about to give away: who waits for them is told, and their rows are freed.
Event loop only.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.v1 import stream_pb2
from engram_service.observability.logs import named
from engram_service.observability.metrics import Metrics
from engram_service.sessions.handles import CLOSED, TAKEN_OVER
from engram_service.sessions.pins import Pins
from engram_service.sessions.residency import Residency
from engram_service.sessions.streams import LOCAL, Stream, Streams, event_frame
from engram_service.sessions.table import NO_STREAM, References, SessionTable
from engram_service.steps.refusals import closed, held, lost, taken_over
from engram_service.steps.repeats import Repeats
from engram_service.steps.withdrawal import Withdrawal
from engram_service.store import Verdict
from engram_service.wire.base import Wire

log = logging.getLogger(__name__)

_LOOK_S = 0.005


class Ownership:
    """The one way by which rows of the session table are freed."""

    def __init__(
        self, table: SessionTable, wire: Wire, streams: Streams, pins: Pins, residency: Residency, repeats: Repeats,
        withdrawal: Withdrawal, metrics: Metrics,
    ) -> None:  # fmt: skip
        self._table = table
        self._wire = wire
        self._streams = streams
        self._pins = pins
        self._residency = residency
        self._repeats = repeats
        self._withdrawal = withdrawal
        self._metrics = metrics

    def disconnect(self, stream: Stream) -> None:
        """The client went away: what waits is dropped, what is under way is finished, its sessions are let go."""
        rows = stream.handles.attached()
        self._streams.remove(stream)
        self._withdrawal.of_stream(stream.id)
        self._table.stream[rows] = NO_STREAM
        self._residency.let_go(rows)

    def dismiss(self, sessions: NDArray[Any], why: int = CLOSED, pinned: bool = False) -> None:
        """Forgets sessions that this server holds no longer: whoever waits for something of theirs is refused, the streams that
        hold them are told, their handles are void. None may be pinned, unless the pins are the caller's."""
        refusal = taken_over() if why == TAKEN_OVER else closed()
        self._withdrawal.of_sessions(sessions, refusal)
        self._repeats.refuse(self._table.refer(sessions), refusal)
        self._detach(sessions, why)
        self._residency.give_up(sessions)
        if pinned:
            self._table.busy[sessions] = False
        self._table.remove(sessions)
        self._pins.tell()  # whoever waits for one of them looks again

    def lose(self, sessions: NDArray[np.int32], verdict: Verdict, pinned: bool = False) -> None:
        """The store has given these sessions to somebody else, or they are gone. `pinned`: their pins are the caller's."""
        if verdict.fenced:
            self._metrics.sessions_fenced.inc(len(sessions))
        else:
            self._metrics.sessions_expired.inc(len(sessions))
        self.dismiss(sessions, TAKEN_OVER if verdict.fenced else CLOSED, pinned)

    def lose_when_free(self, sessions: References, verdict: Verdict) -> None:
        """The same for interval sessions, which may be in a batch: their rows are forgotten after it."""
        sessions = sessions[self._table.alive(sessions)]
        rows = sessions.rows
        self._withdrawal.of_sessions(rows, lost(verdict))
        free = ~self._table.pinned(rows)
        if free.any():
            self.lose(rows[free], verdict)
        if not free.all():
            asyncio.get_running_loop().call_later(_LOOK_S, self.lose_when_free, sessions[~free], verdict)

    def hand_over(self, sessions: NDArray[np.int32]) -> None:
        """Before an open, move or close: waiting steps of these sessions are dropped; their clients send them again, or
        learn that somebody else has the session."""
        self._withdrawal.of_sessions(sessions, held())
        self._residency.unwant(sessions)

    def _detach(self, sessions: NDArray[Any], why: int) -> None:
        """Voids the handles of these sessions and tells their streams why."""
        table = self._table
        sessions = sessions[table.stream[sessions] != NO_STREAM]
        kind = stream_pb2.EventFrame.TYPE_TAKEN_OVER if why == TAKEN_OVER else stream_pb2.EventFrame.TYPE_CLOSED
        for stream_id in sorted(set(table.stream[sessions].tolist())):
            stream = self._streams.get(stream_id)
            mine = sessions[table.stream[sessions] == stream_id]
            table.stream[mine] = NO_STREAM
            if stream is None:
                continue
            handles = table.handle[mine]
            what = "taken over by a newer open" if why == TAKEN_OVER else "closed or expired"
            for row, handle in zip(mine.tolist(), handles.tolist(), strict=True):
                stream.handles.end(handle, why)
                log.info(
                    "session %s", what, extra={**named(table.id_of(row)), "stream": stream.id, "trace": stream.trace}
                )
            if stream_id != LOCAL:
                self._wire.send(stream_id, event_frame(kind, handles), 0)
            if why == TAKEN_OVER:
                self._metrics.sessions_taken_over.inc(len(mine))
