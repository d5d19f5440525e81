"""What goes back for steps: outputs, refusals, and word of what is durable. Event loop only.

An answer goes to the stream and handle that the step came with, never to whoever has the session by then.
"""

from __future__ import annotations

import time
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engram.v1 import stream_pb2
from engram_service.errors import ServiceError
from engram_service.observability.metrics import Metrics
from engram_service.sessions.streams import LOCAL, Stream, Streams
from engram_service.sessions.table import NO_STREAM, SessionTable
from engram_service.steps.refusals import Refused, errors_frame, fates
from engram_service.steps.unary_rows import UnaryRows
from engram_service.wire.base import CALL, Wire


class Caller(Protocol):
    """Who waits for steps that came without a stream."""

    def delivered(
        self, handles: NDArray[np.uint32], seqs: NDArray[np.uint64], outputs: NDArray[np.uint8] | None
    ) -> None: ...

    def refused(self, frame: stream_pb2.ErrorsFrame) -> None: ...


class Asking(Protocol):
    """Rows, as far as an answer needs them."""

    @property
    def streams(self) -> NDArray[np.uint32]: ...

    @property
    def handles(self) -> NDArray[np.uint32]: ...

    @property
    def seqs(self) -> NDArray[np.uint64]: ...


class Answers:
    """The way back of rows, each of which is in flight until it passes here."""

    def __init__(self, wire: Wire, streams: Streams, table: SessionTable, metrics: Metrics, unary: UnaryRows
    ) -> None:  # fmt: skip
        self._wire = wire
        self._streams = streams
        self._table = table
        self._metrics = metrics
        self._unary = unary
        self.local: Caller | None = None
        self.count = 0  # rows that were answered with outputs, ever
        self.given = 0.0  # when the last of them were given to the wire, monotonic

    def outputs(
        self, streams: NDArray[np.uint32], handles: NDArray[np.uint32], rows: NDArray[np.int32],
        seqs: NDArray[np.uint64], outputs: NDArray[np.uint8] | None,
    ) -> None:  # fmt: skip
        """Answers steps of sessions. outputs: uint8 [n, output_nbytes]; None: these wanted none."""
        self.count += len(streams)
        self._streams.answered(streams)
        self._unary.answered(streams)
        if len(streams) == 1 and streams.item(0) != LOCAL:
            row = rows.item(0)
            durable = self._table.durable[rows] if self._table.interval.item(row) else None
            self.given = time.monotonic()
            self._wire.answer(streams, handles, seqs, outputs, durable)
            return
        if np.count_nonzero(streams) < len(streams):
            mine = streams == LOCAL
            self.given = time.monotonic()
            if self.local is not None:
                self.local.delivered(handles[mine], seqs[mine], None if outputs is None else outputs[mine])
            if mine.all():
                return
            streams, handles, rows, seqs = streams[~mine], handles[~mine], rows[~mine], seqs[~mine]
            outputs = None if outputs is None else outputs[~mine]
        durable = self._table.durable[rows] if np.count_nonzero(self._table.interval[rows]) else None
        self.given = time.monotonic()
        self._wire.answer(streams, handles, seqs, outputs, durable)

    def refuse(
        self, streams: NDArray[np.uint32], handles: NDArray[np.uint32], seqs: NDArray[np.uint64], refused: Refused
    ) -> None:  # fmt: skip
        """Refuses the rows that a mask of `refused` has, each with the first that has it."""
        for mask, refusal in refused:
            self._metrics.rows_refused.labels(refusal.reason).inc(int(mask.sum()))
        if (calls := streams >= CALL).any():
            self._unary.refuse(
                streams[calls], handles[calls], seqs[calls], [(mask[calls], why) for mask, why in refused]
            )
            streams, handles, seqs = streams[~calls], handles[~calls], seqs[~calls]
            refused = [(mask[~calls], refusal) for mask, refusal in refused]
        for stream in np.unique(streams).tolist():
            mine = streams == stream
            known = self._streams.get(stream)
            if known is None:
                continue
            here = [(mask[mine], refusal) for mask, refusal in refused]
            fate = fates(self._table, self._streams.rows_of(streams[mine], handles[mine]), seqs[mine])
            response = errors_frame(handles[mine], seqs[mine], here, fate)
            if not (count := len(response.errors.seqs) // 8):
                continue
            self._streams.answered(np.full(count, stream, np.uint32))
            if stream != LOCAL:
                self._wire.send(stream, response, count)
            elif self.local is not None:
                self.local.refused(response.errors)

    def refuse_all(self, rows: Asking, refusal: ServiceError) -> None:
        self.refuse(rows.streams, rows.handles, rows.seqs, [(np.ones(len(rows.seqs), np.bool_), refusal)])

    def frame_refused(self, stream: Stream, response: stream_pb2.StreamResponse) -> None:
        """A frame of which no row was let in."""
        if stream.id != LOCAL:
            stream.tell(response)
        elif self.local is not None:
            self.local.refused(response.errors)

    def durable(self, sessions: NDArray[Any]) -> None:
        """Interval durability: says to the streams what is safe now."""
        table, streams = self._table, self._table.stream[sessions]
        order = np.argsort(streams, kind="stable")
        sessions, streams = sessions[order], streams[order]
        handles, seqs = table.handle[sessions].tobytes(), table.durable[sessions].tobytes()
        starts = np.flatnonzero(np.append(True, streams[1:] != streams[:-1])[: len(streams)]).tolist()
        for start, end in zip(starts, [*starts[1:], len(streams)], strict=False):  # none of no sessions
            stream = streams.item(start)
            if stream not in (NO_STREAM, LOCAL):
                frame = stream_pb2.DurableFrame(
                    handles=handles[4 * start : 4 * end], durable_seqs=seqs[8 * start : 8 * end]
                )
                self._wire.send(stream, stream_pb2.StreamResponse(durable=frame), 0)
