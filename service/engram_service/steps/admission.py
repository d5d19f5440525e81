"""Which of the rows that have come may go on. Good rows wait for their batch, repeated ones are answered, bad ones are refused
with a typed error that says why; nobody else is disturbed. Event loop only; vectorised over the rows of all streams.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.v1 import stream_pb2
from engram_service.catalog import Catalog, Served
from engram_service.condition import Condition
from engram_service.errors import (
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    ServiceError,
)
from engram_service.observability.metrics import Metrics
from engram_service.pauses import Pauses
from engram_service.places import distinct
from engram_service.rows import rows_of
from engram_service.scheduling.columns import Steps
from engram_service.scheduling.scheduler import Scheduler
from engram_service.sessions.residency import Residency
from engram_service.sessions.shares import Shares
from engram_service.sessions.streams import Stream, Streams
from engram_service.sessions.table import SessionTable
from engram_service.settings import Settings
from engram_service.steps.advance import Advances
from engram_service.steps.answers import Answers
from engram_service.steps.backlog import Backlog
from engram_service.steps.frames import classify, classify_frames, column, read_columns
from engram_service.steps.refusals import RETRY_MS, Refused, bad_handles, errors_frame, fates, gaps, held
from engram_service.steps.repeats import Asked, Repeats, acknowledged
from engram_service.steps.room import Room
from engram_service.steps.unary_rows import UnaryRows
from engram_service.steps.usual import Usual
from engram_service.wire.base import ADMITTED, CALL, FEEDBACK, FIRST, NOT_ACKNOWLEDGED, PREFILL, Arrived, Wire

log = logging.getLogger(__name__)

_HANDLE_NBYTES, _SEQ_NBYTES = 4, 8
_NOT_ACKNOWLEDGED = int(NOT_ACKNOWLEDGED)
_NO_FLAGS = np.zeros(1, np.uint8)


@dataclass(slots=True)
class _Rows:
    """Rows that have come for one model, with inputs of its width."""

    rows: NDArray[np.int32]  # of the session table; negative: none
    streams: NDArray[np.uint32]
    handles: NDArray[np.uint32]
    seqs: NDArray[np.uint64]
    flags: NDArray[np.uint8]
    deadlines: NDArray[np.float64]
    times: NDArray[np.float64]  # [n, 4]: wire/base.py
    inputs: NDArray[np.uint8]  # [n, input_nbytes]
    frames: NDArray[np.intp] | None = None  # of each row; None: as FIRST in `flags` has them

    def __len__(self) -> int:
        return len(self.rows)


class Admission:
    """Lets rows in."""

    def __init__(
        self, settings: Settings, table: SessionTable, catalog: Catalog, wire: Wire, streams: Streams, shares: Shares,
        scheduler: Scheduler, residency: Residency, repeats: Repeats, answers: Answers, condition: Condition,
        pauses: Pauses, metrics: Metrics, backlog: Backlog, advances: Advances, unary: UnaryRows,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._table = table
        self._catalog = catalog
        self._wire = wire
        self._streams = streams
        self._scheduler = scheduler
        self._residency = residency
        self._repeats = repeats
        self._answers = answers
        self._condition = condition
        self._pauses = pauses
        self._metrics = metrics
        self._room = Room(settings, streams, backlog, condition, shares, unary)
        self._advances = advances
        self._unary = unary
        self._usual = Usual(
            settings, table, catalog, streams, shares, scheduler, condition, pauses, self._room, wire.name == "native"
        )
        self.on_admit: Callable[[], None] = lambda: None

    # Rows that the wire brings as columns

    def admit(self, arrived: Arrived, now: float) -> None:
        """Rows of any streams, in the order in which they came. Never raises."""
        for part in self._unary.rounds(arrived) if len(arrived) > 1 else [arrived]:
            try:
                if self._usual.admit(part, now):
                    self.on_admit()
                else:
                    self._admit_all(part, now)
            except Exception as error:
                log.exception("rows could not be let in")
                failed = InternalError("INTERNAL", f"the server failed on this frame: {type(error).__name__}")
                self._refuse(part, self._streams.here(part.streams), failed)

    def _admit_all(self, arrived: Arrived, now: float) -> None:
        here = self._streams.here(arrived.streams)
        if np.count_nonzero(here) < len(here):  # a stream that was refused goes on for a moment
            arrived = _only(arrived, here)
            if not len(arrived):
                return
        self._streams.arrived(arrived.streams)
        rows = self._streams.rows_of(arrived.streams, arrived.handles)
        if arrived.streams.max() >= CALL and not (kept := self._unary.number(arrived, rows)).all():
            arrived, rows = _only(arrived, kept), rows[kept]
        self._acknowledge(rows, arrived.acknowledged)
        fits = np.ones(len(rows), np.bool_)
        for frame, refusal in self._room.refusals(arrived, rows):
            self._refuse(arrived, frame, refusal)
            fits[frame] = False
        if np.count_nonzero(fits) < len(fits):
            arrived, rows = _only(arrived, fits), rows[fits]
        known = rows >= 0
        if np.count_nonzero(known) < len(rows):
            refused = [(mask, refusal) for mask, refusal in bad_handles(rows)]
            self._answers.refuse(arrived.streams, arrived.handles, arrived.seqs, refused)
            arrived, rows = _only(arrived, known), rows[known]
        if not len(rows):
            return
        deadlines = self._usual.deadlines(arrived.timeouts_ms, now)
        models = self._table.model[rows]
        first = models.item(0)
        width = self._width(first)
        alike = (models == first) & (arrived.input_nbytes == width)
        if np.count_nonzero(alike) == len(rows):
            inputs = arrived.inputs.reshape(-1, width)
            self._admit(self._catalog.models[first], _rows(arrived, rows, deadlines, inputs), [], now)
        else:
            self._admit_mixed(arrived, rows, models, deadlines, now)

    def _admit_mixed(
        self, arrived: Arrived, rows: NDArray[np.int32], models: NDArray[np.int16], deadlines: NDArray[np.float64],
        now: float,
    ) -> None:  # fmt: skip
        """Rows of several models, or with inputs that do not fit theirs."""
        ends = np.cumsum(arrived.input_nbytes, dtype=np.int64)
        frame = np.maximum.accumulate(np.where(arrived.flags & FIRST, np.arange(len(rows)), 0))
        other = models != models[frame]
        for model in np.unique(models).tolist():
            served, width, mine = self._catalog.models[model], self._width(model), models == model
            if (bad := mine & other).any():
                references = self._catalog.models[int(models[frame[np.flatnonzero(bad)[0]]])].reference
                self._refuse(arrived, bad, _other_model(references))
            if (bad := mine & ~other & (arrived.input_nbytes != width)).any():
                n = int(np.flatnonzero(bad)[0])
                message = (
                    f"column inputs has {arrived.input_nbytes[n]} bytes a row; for model {served.reference},"
                    f" a row of {self._usual.inputs_of(served)} is {width} bytes"
                )
                self._refuse(arrived, bad, InvalidArgumentError("INVALID_INPUT_WIDTH", message))
            good = np.flatnonzero(mine & ~other & (arrived.input_nbytes == width))
            if len(good):
                inputs = arrived.inputs[(ends[good] - width)[:, None] + np.arange(width)]
                came = _rows(arrived.without_inputs(good), rows[good], deadlines[good], inputs, frame[good])
                self._admit(served, came, [], now)

    # Frames that are not like most

    def admit_frame(self, stream: Stream, frame: stream_pb2.StepsFrame, now: float) -> None:
        """A frame with repeats or a dtype, without inputs, or of which something is wrong."""
        try:
            self._condition.check_open()
            self._room.check(stream.id, len(frame.handles) // _HANDLE_NBYTES, frame.timeout_ms)
            columns = read_columns(frame, self._settings.frame_rows_max)
            if not len(columns):
                raise InvalidArgumentError("INVALID_FRAME", "the frame has no rows")
            rows = stream.handles.rows_of(columns.handles)
            refused = bad_handles(rows)
            served = self._model_of(rows, refused)
            inputs = self._read_inputs(served, frame, columns.flags, columns.source)
            streams = np.full(len(columns), stream.id, np.uint32)
            self._room.arrive(stream, streams)
        except ServiceError as refusal:
            self._refuse_frame(stream, frame, refusal)
            return
        self._wire.expect(stream.id, len(columns))
        if columns.acked is not None:
            own = (
                rows if columns.source is None else stream.handles.rows_of(column(frame.handles, np.uint32, "handles"))
            )
            self._acknowledge(own, columns.acked)
        deadlines = self._usual.deadlines(np.full(len(columns), frame.timeout_ms, np.uint32), now)
        times = np.full((len(columns), 4), now)
        came = _Rows(rows, streams, columns.handles, columns.seqs, columns.flags, deadlines, times, inputs)
        self._admit(served, came, refused, now)

    def acknowledge(self, stream: Stream, frame: stream_pb2.AcknowledgeFrame) -> None:
        handles = column(frame.handles, np.uint32, "handles")
        acked = column(frame.acknowledged_seqs, np.uint64, "acknowledged_seqs", len(handles))
        self._acknowledge(stream.handles.rows_of(handles), acked)

    # What both have in common

    def _admit(self, served: Served, came: _Rows, refused: Refused, now: float) -> None:
        table, rows, seqs = self._table, came.rows, came.seqs
        self._refuse_unfit(served, came, refused)
        if not refused and self._all_next(rows, seqs):
            self._let_in(served, came, slice(None), now)
            return
        out = np.zeros(len(rows), np.bool_)
        for mask, _ in refused:
            out |= mask
        safe = np.where(rows >= 0, rows, 0) if refused else rows
        classes = classify(rows, seqs, table.admitted[safe], out)
        if classes.fresh.all():
            self._let_in(served, came, slice(None), now)
            return
        frames = np.cumsum((came.flags & FIRST) != 0) if came.frames is None else came.frames
        classes = classify_frames(rows, seqs, table.admitted[safe], out, frames, classes)
        if classes.gap.any():
            refused += gaps(classes.gap, table.admitted[safe])
        if refused:
            self._answers.refuse(came.streams, came.handles, seqs, refused)
        if len(good := np.flatnonzero(classes.fresh)):
            self._let_in(served, came, good, now)
        if len(again := np.flatnonzero(classes.repeated)):  # which may be of steps that came with them
            self._repeat(served, came, again)

    def _all_next(self, rows: NDArray[np.int32], seqs: NDArray[np.uint64]) -> bool:
        """Whether each row is the next step of a session of its own."""
        due = seqs == self._table.admitted[rows] + np.uint64(1)
        return np.count_nonzero(due) == len(rows) and distinct(rows, len(self._table.model))

    def _let_in(self, served: Served, came: _Rows, good: NDArray[np.intp] | slice, now: float) -> None:
        """These rows wait for their batch from now on."""
        table, rows, seqs, times = self._table, came.rows, came.seqs, came.times[good]
        flags = came.flags[good] & np.uint8(PREFILL | FEEDBACK)
        times[:, ADMITTED] = time.monotonic()
        steps = Steps(rows[good], came.streams[good], came.handles[good], seqs[good], flags, came.deadlines[good],
                      times, came.inputs[good])  # fmt: skip
        # Rows of one session stand in order, so the last assignment is the greatest seq.
        table.admitted[steps.rows] = steps.seqs
        self._usual.latest = served
        self._residency.want(served, steps.rows)
        self._scheduler.add(served.index, steps)
        self.on_admit()

    def _refuse_unfit(self, served: Served, came: _Rows, refused: Refused) -> None:
        """Rows that no session could take: seq 0, inputs that are not finite, too many unacknowledged steps."""
        table, rows, seqs = self._table, came.rows, came.seqs
        if np.count_nonzero(seqs) < len(seqs):
            refused.append((seqs == 0, InvalidArgumentError("INVALID_SEQ", "seq counts from 1; 0 is not a step")))
        takes, gives = self._usual.inputs_of(served), served.bundle.schema.outputs
        fed = (came.flags & FEEDBACK).astype(np.bool_)
        if np.count_nonzero(fed) and not served.bundle.schema.generates:
            sizes = f"gives {rows_of(gives)} and takes {takes}"
            message = f"model {served.reference} {sizes}: it cannot run on its own output"
            refused.append((fed, FailedPreconditionError("CANNOT_GENERATE", message)))
        for bad, reason, what in takes.faults(came.inputs, served.bundle.allows_non_finite):
            if (bad & ~fed).any():
                refused.append((bad & ~fed, InvalidArgumentError(reason, f"{what}; nothing was applied")))
        known = rows >= 0
        safe = rows if np.count_nonzero(known) == len(rows) else np.where(known, rows, 0)
        window = served.arena.window
        full = seqs > table.acked[safe] + np.uint64(window)
        if np.count_nonzero(full) and (full := full & (seqs > table.admitted[safe]) & known).any():
            message = (
                f"{window} outputs of this session are not acknowledged, the limit; acknowledge those that have arrived"
            )
            refused.append((full, ResourceExhaustedError("REPLY_WINDOW_FULL", message, retry_after_ms=RETRY_MS)))
        if pause := self._pauses.refusal(served.index):
            refused.append(((seqs > table.admitted[safe]) & known, pause))
        if np.count_nonzero(opening := table.opening[safe] & known):
            refused.append((opening, held()))

    def _repeat(self, served: Served, came: _Rows, index: NDArray[np.intp]) -> None:
        """Answers steps that were accepted before: with the recorded output, or when the first answer comes."""
        table, sessions, seqs = self._table, came.rows[index], came.seqs[index]
        streams, handles, deadlines = came.streams[index], came.handles[index], came.deadlines[index]
        prefill = (came.flags[index] & PREFILL).astype(np.bool_)
        asked = Asked(streams, table.refer(sessions), handles, seqs)
        gone = (seqs <= table.acked[sessions]) & ~prefill
        if gone.any():
            self._answers.refuse_all(asked.only(gone), acknowledged())
        pending = (seqs > table.applied[sessions]) & ~gone
        if pending.any():
            until = (sessions[pending], seqs[pending].max(), float(deadlines[pending].max()))
            self._scheduler.prolong(*until)
            self._advances.prolong(*until)
            self._repeats.wait(asked.only(pending), deadlines[pending])
        silent, loud = ~gone & ~pending & prefill, ~gone & ~pending & ~prefill
        if silent.any():
            self._answers.outputs(streams[silent], handles[silent], sessions[silent], seqs[silent], None)
        if loud.any():
            self._repeats.answer(served, asked.only(loud), float(deadlines[loud].max()))

    def _acknowledge(self, rows: NDArray[np.int32], acked: NDArray[Any]) -> None:
        table = self._table
        told = (rows >= 0) & (acked != NOT_ACKNOWLEDGED)
        if (count := np.count_nonzero(told)) < len(told):
            if not count:
                return
            rows, acked = rows[told], acked[told]
        if len(rows) == 1:
            table.acked[rows] = np.maximum(table.acked[rows], np.minimum(acked, table.applied[rows]))
        else:
            np.maximum.at(table.acked, rows, np.minimum(acked, table.applied[rows]))

    def _width(self, model: int) -> int:
        return self._usual.inputs_of(self._catalog.models[model]).nbytes

    # Single frames

    def _model_of(self, rows: NDArray[np.int32], refused: Refused) -> Served:
        known = rows[rows >= 0]
        if not len(known):
            raise refused[0][1]
        models = self._table.model[rows]
        model = int(self._table.model[known[0]])
        served = self._catalog.models[model]
        other = (rows >= 0) & (models != model)
        if other.any():
            refused.append((other, _other_model(served.reference)))
        return served

    def _read_inputs(
        self, served: Served, frame: stream_pb2.StepsFrame, flags: NDArray[np.uint8], source: NDArray[np.intp] | None
    ) -> NDArray[np.uint8]:  # fmt: skip
        """Input rows as bytes, uint8 [n, input_nbytes]."""
        takes = self._usual.inputs_of(served)
        if frame.dtype and len(takes.specs) == 1 and frame.dtype != takes.specs[0].dtype:
            message = f"model {served.reference} takes {takes.specs[0].dtype}, not {frame.dtype}"
            raise InvalidArgumentError("INVALID_INPUT_DTYPE", message)
        rows = len(frame.handles) // _HANDLE_NBYTES
        if not frame.inputs and bool((flags & FEEDBACK).all()):
            return np.zeros((len(flags), takes.nbytes), np.uint8)
        if len(frame.inputs) != rows * takes.nbytes:
            expected = f"{rows} rows of {takes} are {rows * takes.nbytes} bytes"
            raise InvalidArgumentError(
                "INVALID_INPUT_WIDTH",
                f"column inputs has {len(frame.inputs)} bytes; for model {served.reference}, {expected}",
            )
        inputs = np.frombuffer(frame.inputs, np.uint8).reshape(rows, takes.nbytes)
        return inputs if source is None else inputs[source]

    # Refusals

    def _refuse(self, arrived: Arrived, which: NDArray[np.bool_] | slice, refusal: ServiceError) -> None:
        self._answers.refuse_all(arrived.without_inputs(which), refusal)

    def _refuse_frame(self, stream: Stream, frame: stream_pb2.StepsFrame, refusal: ServiceError) -> None:
        """A frame of which no row could be used."""
        rows = len(frame.handles) // _HANDLE_NBYTES
        self._metrics.rows_refused.labels(refusal.reason).inc(max(1, rows))
        if rows and len(frame.handles) % _HANDLE_NBYTES == 0 and len(frame.seqs) == rows * _SEQ_NBYTES:
            handles, seqs = np.frombuffer(frame.handles, np.uint32), np.frombuffer(frame.seqs, np.uint64)
            fate = fates(self._table, stream.handles.rows_of(handles), seqs)
            response = errors_frame(handles, seqs, [(np.ones(rows, np.bool_), refusal)], fate)
        else:
            response = stream_pb2.StreamResponse(errors=stream_pb2.ErrorsFrame(errors=[refusal.detail()]))
        self._answers.frame_refused(stream, response)


def _other_model(reference: str) -> InvalidArgumentError:
    message = f"this handle's session is not of model {reference}, as the frame's first is; one frame, one model"
    return InvalidArgumentError("INVALID_HANDLE", message)


def _rows(
    arrived: Arrived, rows: NDArray[np.int32], deadlines: NDArray[np.float64], inputs: NDArray[np.uint8],
    frames: NDArray[np.intp] | None = None,
) -> _Rows:  # fmt: skip
    return _Rows(rows, arrived.streams, arrived.handles, arrived.seqs, arrived.flags, deadlines, arrived.times, inputs,
                 frames)  # fmt: skip


def _only(arrived: Arrived, mask: NDArray[np.bool_]) -> Arrived:
    """The rows of a mask, with their inputs; the first that is left of a frame begins it."""
    frames = np.cumsum((arrived.flags & FIRST) != 0)[mask]
    kept = arrived.without_inputs(mask)
    kept.flags[np.flatnonzero(np.append(True, frames[1:] != frames[:-1])[: len(frames)])] |= FIRST
    inputs = arrived.inputs[np.repeat(mask, arrived.input_nbytes)]
    return replace(kept, inputs=inputs)
