"""The event loop's half of a step's path: frames in, answers out. The engine's half is engine/engine.py.

    api/stream -> Core.steps -> WorkQueue -> Engine -> Store -> Core.committed -> Stream.send -> api/stream

Everything here runs on the event loop, except the methods of `Answers`, which the engine and the committers call from
their threads and which only hand over to the loop.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram.v1 import stream_pb2
from engram_service.catalog import Catalog, Served
from engram_service.engine.engine import Advance, Engine
from engram_service.errors import (
    DeadlineExceededError,
    FailedPreconditionError,
    InternalError,
    InvalidArgumentError,
    ResourceExhaustedError,
    ServiceError,
    UnavailableError,
)
from engram_service.logs import named
from engram_service.metrics import Metrics
from engram_service.pauses import Pauses
from engram_service.rows import Rows, rows_of
from engram_service.runtimes.base import RuntimeStoppedError
from engram_service.scheduler import Batch, Tick
from engram_service.sessions.admission import FEEDBACK, QUIET, StepColumns, classify, column, read_columns
from engram_service.sessions.backlog import Backlog
from engram_service.sessions.handles import CLOSED, TAKEN_OVER, UNKNOWN
from engram_service.sessions.refusals import (
    Refused,
    bad_handles,
    behind_late,
    closed,
    errors_frame,
    fates,
    gaps,
    lost,
    taken_over,
    uncommitted,
)
from engram_service.sessions.repeats import Repeats, acknowledged
from engram_service.sessions.residency import Residency
from engram_service.sessions.shares import Shares
from engram_service.sessions.streams import Stream, event_frame, outputs_frame
from engram_service.sessions.table import NO_SLOT, NO_STREAM, Reference, References, SessionTable
from engram_service.settings import Settings
from engram_service.store import MetaFields, Store, Verdict
from engram_service.supervision import Supervisor
from engram_service.work import WorkQueue

log = logging.getLogger(__name__)

_HANDLE_NBYTES, _SEQ_NBYTES = 4, 8
_NO_FLAGS = np.zeros(1, np.uint8)
_RETRY_MS = 50
_SWEEP_S = 0.02
_FLUSH_POLL_S = 0.005


class Core:
    """Admits steps, answers them, and keeps the columns that say where every session stands."""

    def __init__(
        self,
        settings: Settings,
        table: SessionTable,
        queue: WorkQueue,
        catalog: Catalog,
        store: Store,
        metrics: Metrics,
        shares: Shares,
        supervisor: Supervisor,
        pauses: Pauses,
    ) -> None:
        self.pauses = pauses
        self.shares = shares
        self.table = table
        self.queue = queue
        self.catalog = catalog
        self.settings = settings
        self.metrics = metrics
        self.streams: dict[int, Stream] = {}
        self.draining = False
        self.store_trouble = ""  # why the store takes no commits just now; empty: it does
        self.changed = asyncio.Event()  # set whenever sessions became free; waiters clear it
        self.supervisor = supervisor
        self.ends = 0  # closes and detaches under way
        self.residency = Residency(self, store)
        self.repeats = Repeats(self)
        self.engine: Engine  # set by app.py: the two know each other
        self._loop = asyncio.get_running_loop()
        self._advances: set[Advance] = set()
        self._streams_made = 0
        self._backlog = Backlog()
        self._inputs_of: dict[int, Rows] = {}  # by model
        self._answered = 0  # rows, ever
        self._counted = 0  # rows in flight at the last count, and those that came since: no fewer than there are

    # Streams

    def connect(self, trace: str = "", tenant: str = "") -> Stream:
        """A new client stream of a tenant. Raises ResourceExhaustedError or, while draining, UnavailableError."""
        if self.draining:
            raise UnavailableError("DRAINING", "this server is going away; reconnect", retry_after_ms=_RETRY_MS)
        if len(self.streams) >= self.settings.streams_max:
            limit = self.settings.streams_max
            raise ResourceExhaustedError(
                "TOO_MANY_STREAMS", f"this server has {limit} streams, its limit", retry_after_ms=1000
            )
        share = self.shares.of(tenant)
        share.check_stream()
        self._streams_made += 1
        stream = Stream(self._streams_made, self.settings.stream_rows_max, trace, tenant)
        self.streams[stream.id] = stream
        share.streams.add(stream)
        return stream

    def disconnect(self, stream: Stream) -> None:
        """The client went away: what waits is dropped, what is under way is finished, its sessions are let go."""
        stream.end()
        self.streams.pop(stream.id, None)
        self.shares.of(stream.tenant).streams.discard(stream)
        self._drop_waiting(lambda batch: np.full(len(batch.waiting), batch.stream is stream))
        rows = stream.handles.attached()
        self.table.stream[rows] = NO_STREAM
        self.residency.let_go(rows)

    def rows_in_flight(self) -> int:
        return sum(stream.in_flight for stream in list(self.streams.values()))  # another thread scrapes

    # Frames in

    def steps(self, stream: Stream, frame: stream_pb2.StepsFrame) -> None:
        """Admits a frame: good rows wait for their tick, repeated ones are answered, bad ones are refused."""
        now = time.monotonic()
        if len(frame.handles) == _HANDLE_NBYTES and self._admit_one(stream, frame, now):
            return
        try:
            self._check_room(stream, len(frame.handles) // _HANDLE_NBYTES, frame.timeout_ms)
            columns = read_columns(frame, self.settings.frame_rows_max)
            if not len(columns):
                raise InvalidArgumentError("INVALID_FRAME", "the frame has no rows")
            rows = self.rows_of(stream, columns.handles)
            refused = bad_handles(rows)
            served = self._model_of(rows, refused)
            inputs = self._inputs(served, frame, columns)
            self.shares.of(stream.tenant).take(len(columns))
        except ServiceError as refusal:
            self._refuse_frame(stream, frame, refusal)
            return
        self._counted += len(columns)
        stream.in_flight += len(columns)
        if columns.acked is not None:
            self._acknowledge(
                rows if columns.source is None else self.rows_of(stream, column(frame.handles, np.uint32, "handles")),
                columns.acked,
            )
        self._admit(stream, served, rows, columns, inputs, refused, now, self._deadline(frame.timeout_ms, now))

    def acknowledge(self, stream: Stream, frame: stream_pb2.AcknowledgeFrame) -> None:
        handles = column(frame.handles, np.uint32, "handles")
        acked = column(frame.acknowledged_seqs, np.uint64, "acknowledged_seqs", len(handles))
        self._acknowledge(self.rows_of(stream, handles), acked)

    def rows_of(self, stream: Stream, handles: NDArray[np.uint32]) -> NDArray[np.int32]:
        """Rows of the sessions that these handles of a stream name, negative where they name none."""
        rows = stream.handles.rows_of(handles)
        safe = np.where(rows >= 0, rows, 0)
        mine = (self.table.stream[safe] == stream.id) & (self.table.handle[safe] == handles) | (rows < 0)
        return rows if mine.all() else np.where(mine, rows, UNKNOWN).astype(np.int32)

    def _acknowledge(self, rows: NDArray[np.int32], acked: NDArray[Any]) -> None:
        table = self.table
        known = rows >= 0
        if not known.all():
            rows, acked = rows[known], acked[known]
        np.maximum.at(table.acked, rows, np.minimum(acked, table.applied[rows]))

    def _deadline(self, timeout_ms: int, now: float) -> float:
        return now + (timeout_ms / 1000 if timeout_ms else self.settings.step_timeout_s)

    def _model_of(self, rows: NDArray[np.int32], refused: Refused) -> Served:
        known = rows[rows >= 0]
        if not len(known):
            raise refused[0][1]
        models = self.table.model[rows]
        model = int(self.table.model[known[0]])
        served = self.catalog.models[model]
        other = (rows >= 0) & (models != model)
        if other.any():
            message = f"this handle's session is not of model {served.reference}, as the frame's first is; one frame, one model"
            refused.append((other, InvalidArgumentError("INVALID_HANDLE", message)))
        return served

    def _inputs(self, served: Served, frame: stream_pb2.StepsFrame, columns: StepColumns) -> NDArray[np.uint8]:
        """Input rows as bytes, uint8 [n, input_nbytes]."""
        takes = self._takes(served)
        if frame.dtype and len(takes.specs) == 1 and frame.dtype != takes.specs[0].dtype:
            message = f"model {served.reference} takes {takes.specs[0].dtype}, not {frame.dtype}"
            raise InvalidArgumentError("INVALID_INPUT_DTYPE", message)
        rows = len(frame.handles) // 4
        if not frame.inputs and bool((columns.flags & FEEDBACK).all()):
            return np.zeros((len(columns), takes.nbytes), np.uint8)
        if len(frame.inputs) != rows * takes.nbytes:
            expected = f"{rows} rows of {takes} are {rows * takes.nbytes} bytes"
            raise InvalidArgumentError(
                "INVALID_INPUT_WIDTH",
                f"column inputs has {len(frame.inputs)} bytes; for model {served.reference}, {expected}",
            )
        inputs = np.frombuffer(frame.inputs, np.uint8).reshape(rows, takes.nbytes)
        return inputs if columns.source is None else inputs[columns.source]

    def _takes(self, served: Served) -> Rows:
        """What input rows of a model are made of."""
        found = self._inputs_of.get(served.index)
        if found is None:
            found = self._inputs_of[served.index] = Rows(served.bundle.schema.inputs)
        return found

    def _check_room(self, stream: Stream, rows: int, timeout_ms: int) -> None:
        """Room for the rows of a frame. Raises UnavailableError or ResourceExhaustedError."""
        if self.draining:
            raise UnavailableError("DRAINING", "this server is going away; reconnect", retry_after_ms=_RETRY_MS)
        limit = self._rows_max(timeout_ms)
        if self._counted >= limit:
            self._counted = self.rows_in_flight()
        # Where greedy clients have filled the queue, one that has less than its share is still let in.
        if self._counted >= limit and stream.in_flight + rows > limit // len(self.streams):
            message = f"{self._counted} rows are in flight, and {limit} are this server's limit just now"
            hint = self._backlog.retry_ms(time.monotonic(), rows)
            raise ResourceExhaustedError("QUEUE_FULL", message, retry_after_ms=hint)

    def _rows_max(self, timeout_ms: int) -> int:
        """Rows in flight before streams with more than their share are refused: no more than are done before the queue's time
        is up, or half of the frame's own, as far as it is known how fast they are done."""
        settings = self.settings
        rate, seconds = self._backlog.rate, settings.queue_s_max or math.inf
        if timeout_ms:
            seconds = min(seconds, timeout_ms / 2000)
        if not rate or seconds == math.inf:
            return settings.queue_rows_max
        return min(settings.queue_rows_max, max(settings.tick_rows_max, int(rate * seconds)))

    def _admit_one(self, stream: Stream, frame: stream_pb2.StepsFrame, now: float) -> bool:
        """Admits the usual frame of a client with one session, at a tenth of what columns cost for one row.

        False: something about it is not usual, and `steps` shall look at it.
        """
        row = stream.handles.row_of(int.from_bytes(frame.handles, "little"))
        unusual = (
            frame.flags
            or frame.repeats
            or frame.dtype
            or self.draining
            or self._counted >= self._rows_max(frame.timeout_ms)
        )
        if row < 0 or unusual or len(frame.seqs) != _SEQ_NBYTES or self.table.stream.item(row) != stream.id:
            return False
        table, seq = self.table, int.from_bytes(frame.seqs, "little")
        served = self.catalog.models[table.model.item(row)]
        takes = self._takes(served)
        if frame.acknowledged_seqs:
            if len(frame.acknowledged_seqs) != _SEQ_NBYTES:
                return False
            acked = min(int.from_bytes(frame.acknowledged_seqs, "little"), table.applied.item(row))
            table.acked[row] = max(acked, table.acked.item(row))
        fresh = seq == table.admitted.item(row) + 1 and seq <= table.acked.item(row) + served.arena.window
        if self.pauses.refusal(served.index):
            return False
        if not fresh or table.opening.item(row) or table.slot.item(row) == NO_SLOT or len(frame.inputs) != takes.nbytes:
            return False
        inputs = np.frombuffer(frame.inputs, np.uint8).reshape(1, takes.nbytes)
        if takes.faults(inputs, served.bundle.allows_non_finite):
            return False
        if not self.shares.of(stream.tenant).take_one():
            return False
        rows, seqs = np.array([row], np.int32), np.array([seq], np.uint64)
        self._counted += 1
        stream.in_flight += 1
        table.admitted[row] = seq
        deadline = self._deadline(frame.timeout_ms, now)
        handles = np.frombuffer(frame.handles, np.uint32)
        self.queue.add(
            served.index, Batch(stream, table.refer(rows), handles, seqs, _NO_FLAGS, inputs, True, now, deadline)
        )
        return True

    def _admit(
        self, stream: Stream, served: Served, rows: NDArray[np.int32], columns: StepColumns, inputs: NDArray[np.uint8],
        refused: Refused, now: float, deadline: float,
    ) -> None:  # fmt: skip
        table, seqs = self.table, columns.seqs
        self._refuse_unfit(served, rows, columns, inputs, refused)
        out = np.zeros(len(rows), np.bool_)
        for mask, _ in refused:
            out |= mask
        safe = np.where(rows >= 0, rows, 0) if out.any() else rows
        classes = classify(rows, seqs, table.admitted[safe], out)
        if classes.gap.any():
            refused += gaps(classes.gap, table.admitted[safe])
        if classes.repeated.any():
            self._repeat(stream, served, rows, columns, np.flatnonzero(classes.repeated), refused, deadline)
        if refused:
            self._refuse(stream, columns.handles, seqs, refused)
        if not classes.fresh.any():
            return
        if not classes.fresh.all():
            good = np.flatnonzero(classes.fresh)
            columns = columns.only(good)
            rows, inputs = rows[good], inputs[good]
        batch = Batch(
            stream,
            table.refer(rows),
            columns.handles,
            columns.seqs,
            columns.flags,
            inputs,
            classes.unique,
            now,
            deadline,
        )
        # Rows of one session stand in order, so the last assignment is the greatest seq.
        table.admitted[batch.rows] = batch.seqs
        self.residency.want(served, batch.rows)
        self.queue.add(served.index, batch)

    def _refuse_unfit(
        self, served: Served, rows: NDArray[np.int32], columns: StepColumns, inputs: NDArray[np.uint8], refused: Refused
    ) -> None:
        """Rows that no session could take: seq 0, inputs that are not finite, too many unacknowledged steps."""
        table = self.table
        if not columns.seqs.all():
            refused.append(
                (columns.seqs == 0, InvalidArgumentError("INVALID_SEQ", "seq counts from 1; 0 is not a step"))
            )
        takes, gives = self._takes(served), served.bundle.schema.outputs
        fed = (columns.flags & FEEDBACK).astype(np.bool_)
        if fed.any() and not served.bundle.schema.generates:
            sizes = f"gives {rows_of(gives)} and takes {takes}"
            message = f"model {served.reference} {sizes}: it cannot run on its own output"
            refused.append((fed, FailedPreconditionError("CANNOT_GENERATE", message)))
        for bad, reason, what in takes.faults(inputs, served.bundle.allows_non_finite):
            if (bad & ~fed).any():
                refused.append((bad & ~fed, InvalidArgumentError(reason, f"{what}; nothing was applied")))
        safe = np.where(rows >= 0, rows, 0)
        window = served.arena.window
        full = (
            (columns.seqs > table.acked[safe] + np.uint64(window)) & (columns.seqs > table.admitted[safe]) & (rows >= 0)
        )
        if full.any():
            message = (
                f"{window} outputs of this session are not acknowledged, the limit; acknowledge those that have arrived"
            )
            refused.append((full, ResourceExhaustedError("REPLY_WINDOW_FULL", message, retry_after_ms=_RETRY_MS)))
        if pause := self.pauses.refusal(served.index):
            refused.append(((columns.seqs > table.admitted[safe]) & (rows >= 0), pause))
        if table.opening[safe].any():
            held = table.opening[safe] & (rows >= 0)
            message = "the session is being opened, moved or closed just now; try again"
            refused.append((held, ResourceExhaustedError("QUEUE_FULL", message, retry_after_ms=_RETRY_MS)))

    # Repeated steps

    def _repeat(
        self, stream: Stream, served: Served, rows: NDArray[np.int32], columns: StepColumns, index: NDArray[np.intp],
        refused: Refused, deadline: float,
    ) -> None:  # fmt: skip
        """Answers steps that were accepted before: with the recorded output, or when the first answer comes."""
        table = self.table
        sessions, seqs, handles = rows[index], columns.seqs[index], columns.handles[index]
        quiet = (columns.flags[index] & QUIET).astype(np.bool_)
        gone = (seqs <= table.acked[sessions]) & ~quiet
        if gone.any():
            mask = np.zeros(len(rows), np.bool_)
            mask[index[gone]] = True
            refused.append((mask, acknowledged()))
        pending = (seqs > table.applied[sessions]) & ~gone
        if pending.any():
            self._prolong(sessions[pending], seqs[pending].max(), deadline)
            self.repeats.wait(stream, table.refer(sessions[pending]), handles[pending], seqs[pending], deadline)
        silent, loud = ~gone & ~pending & quiet, ~gone & ~pending & ~quiet
        if silent.any():
            self.send_outputs(stream, handles[silent], sessions[silent], seqs[silent], None)
        if loud.any():
            self.repeats.answer(stream, served, table.refer(sessions[loud]), handles[loud], seqs[loud], deadline)

    def _prolong(self, sessions: NDArray[np.int32], seq: np.uint64, deadline: float) -> None:
        """Steps under way have the time of whoever asks for them again, too."""
        self.queue.prolong(sessions, seq, deadline)
        for advance in list(self._advances):
            for part in advance.tick.parts:
                part.batch.prolong(sessions, seq, deadline)

    # Answers from the engine and the committers: their threads only hand over

    def advanced(self, advance: Advance) -> None:
        self._advances.add(advance)  # one operation, safe from any thread; only the sweep and the drain look at it

    def volatile(self, advance: Advance, rows: NDArray[np.intp]) -> None:
        self._loop.call_soon_threadsafe(self._answer_volatile, advance, rows)

    def committed(self, advance: Advance, job_rows: NDArray[np.intp], verdict: Verdict) -> None:
        self._loop.call_soon_threadsafe(self._on_committed, advance, job_rows, verdict)

    def flushed(self, sessions: References, seqs: NDArray[np.uint64], verdict: Verdict) -> None:
        self._loop.call_soon_threadsafe(self.residency.on_flushed, sessions, seqs, verdict)

    def failed(self, served: Served, tick: Tick, error: Exception) -> None:
        self._loop.call_soon_threadsafe(self._on_failed, served, tick, error)

    def broken(self, advance: Advance, index: NDArray[np.intp], error: Exception) -> None:
        self._loop.call_soon_threadsafe(self._on_broken, advance, index, error)

    def unpacked(self, advance: Advance, error: Exception) -> None:
        self._loop.call_soon_threadsafe(self._on_unpacked, advance, error)

    def _on_committed(self, advance: Advance, job_rows: NDArray[np.intp], verdict: Verdict) -> None:
        tick = advance.tick
        last = advance.committing[job_rows]
        sessions = tick.rows[last]
        index: NDArray[np.intp] | None = None
        if tick.last is not None:
            index = np.flatnonzero(np.isin(tick.rows, sessions))
        elif len(job_rows) < len(tick):
            index = last
        if verdict.ok:
            self.table.durable[sessions] = tick.seqs[last]
            self.metrics.stage_seconds.labels("commit").observe(time.monotonic() - advance.computed)
            self._answer(advance, sessions, tick.seqs[last], index)
        else:
            self._settle(advance, index)
            self.lose(sessions, verdict, pinned=True)
            self._refuse_index(advance, index, uncommitted(verdict))

    def _answer_volatile(self, advance: Advance, rows: NDArray[np.intp]) -> None:
        tick, table = advance.tick, self.table
        last = np.intersect1d(rows, tick.last) if tick.last is not None else rows
        sessions = tick.rows[last]
        clean = table.durable[sessions] == table.applied[sessions]
        table.dirty_since[sessions[clean]] = self.residency.clock()
        self._answer(advance, sessions, tick.seqs[last], None if len(rows) == len(tick) else rows)
        self.residency.flush_due(advance.served, sessions)

    def _answer(
        self, advance: Advance, sessions: NDArray[np.int32], seqs: NDArray[np.uint64], index: NDArray[np.intp] | None
    ) -> None:
        """Sends the outputs of the tick's rows in `index` (None: all) and lets their sessions go on."""
        table = self.table
        table.applied[sessions] = seqs
        table.used[sessions] = self.residency.clock()
        self.queue.release(sessions)
        for stream, rows in self._by_stream(advance, index):
            self._send_rows(stream, advance, rows)
        self.repeats.moved_on(table.refer(sessions))
        count = len(advance.tick) if index is None else len(index)
        self._answered += count
        self.metrics.steps.labels(advance.served.bundle.name, "ok").inc(count)
        self.metrics.stage_seconds.labels("total").observe(time.monotonic() - advance.tick.parts[0].batch.arrived)
        self._settle(advance, index)
        self.after_release()

    def _by_stream(self, advance: Advance, index: NDArray[np.intp] | None) -> list[tuple[Stream, NDArray[np.intp]]]:
        """The tick's rows in `index`, put together by the stream that sent them, less those answered by a deadline."""
        groups: dict[int, tuple[Stream, list[NDArray[np.intp]]]] = {}
        for part in advance.tick.parts:
            rows = np.arange(part.start, part.start + len(part.index))
            if index is not None:
                rows = rows[np.isin(rows, index, assume_unique=True)]
            if advance.answered is not None:
                rows = rows[~advance.answered[rows]]
            if len(rows):
                groups.setdefault(part.batch.stream.id, (part.batch.stream, []))[1].append(rows)
        return [
            (stream, pieces[0] if len(pieces) == 1 else np.concatenate(pieces)) for stream, pieces in groups.values()
        ]

    def _send_rows(self, stream: Stream, advance: Advance, rows: NDArray[np.intp]) -> None:
        tick = advance.tick
        quiet = (tick.flags[rows] & QUIET).astype(np.bool_)
        if quiet.any():
            silent = rows[quiet]
            self.send_outputs(stream, tick.handles[silent], tick.rows[silent], tick.seqs[silent], None)
            rows = rows[~quiet]
        if len(rows):
            whole = len(rows) == len(tick)
            outputs = advance.outputs if whole else advance.outputs[rows]
            self.send_outputs(stream, tick.handles[rows], tick.rows[rows], tick.seqs[rows], outputs)

    def send_outputs(
        self, stream: Stream, handles: NDArray[np.uint32], rows: NDArray[np.int32], seqs: NDArray[np.uint64],
        outputs: NDArray[np.uint8] | None,
    ) -> None:  # fmt: skip
        """Answers steps of sessions, under the handles that the stream gave with them."""
        durable = self.table.durable[rows] if self.table.interval[rows].any() else None
        stream.send(outputs_frame(handles, seqs, outputs, durable), len(rows))

    def _settle(self, advance: Advance, index: NDArray[np.intp] | None) -> None:
        advance.unanswered -= len(advance.tick) if index is None else len(index)
        if advance.unanswered <= 0:
            self._advances.discard(advance)

    def _on_failed(self, served: Served, tick: Tick, error: Exception) -> None:
        """The sessions go back to their records; their clients may send the same steps again."""
        advance = Advance(served, tick, np.empty((0, 0), np.uint8), 0.0, 0.0, unanswered=len(tick))
        self._go_back(advance, np.unique(tick.rows), None, _failure(served, error))
        if pause := self.pauses.refusal(served.index):  # what waits would be late
            self._drop_waiting(lambda batch: self.table.model[batch.rows[batch.waiting]] == served.index, pause)

    def _on_broken(self, advance: Advance, index: NDArray[np.intp], error: Exception) -> None:
        """Those of the tick that made it fail."""
        self._settle(advance, index)
        self._go_back(advance, np.unique(advance.tick.rows[index]), index, _failure(advance.served, error))

    def _on_unpacked(self, advance: Advance, error: Exception) -> None:
        sessions = advance.tick.rows[advance.committing]
        why = InternalError("INTERNAL", f"the server failed on the commit of this step: {type(error).__name__}")
        index = np.flatnonzero(np.isin(advance.tick.rows, sessions))
        self._settle(advance, index)
        self._go_back(advance, sessions, index, why)

    def _go_back(
        self, advance: Advance, sessions: NDArray[Any], index: NDArray[np.intp] | None, why: ServiceError
    ) -> None:  # fmt: skip
        """These sessions of a tick are as their records have them; the tick's rows in `index` (None: all) are refused."""
        kept, flushing = self.table.refer(sessions), bool(self.table.flushing[sessions].any())
        if not flushing:
            self._rewind(advance.served, sessions, why)
        self._refuse_index(advance, index, why)
        self.repeats.refuse(kept, why)
        if flushing:  # how far the records are is not known before that has ended
            self._loop.call_later(_FLUSH_POLL_S, self._rewind_when_flushed, advance.served, kept, why)
        else:
            self._let_on(sessions)

    def _rewind_when_flushed(self, served: Served, sessions: References, why: ServiceError) -> None:
        if self.table.flushing[sessions.rows].any():
            self._loop.call_later(_FLUSH_POLL_S, self._rewind_when_flushed, served, sessions, why)
            return
        self._rewind(served, sessions.rows, why)
        self._let_on(sessions.rows)

    def _rewind(self, served: Served, sessions: NDArray[Any], why: ServiceError) -> None:
        """The sessions are pinned."""
        self.residency.forget_slots(served, sessions)
        self._drop_waiting(lambda batch: np.isin(batch.rows[batch.waiting], sessions), why)
        for figures in (self.table.admitted, self.table.computed, self.table.applied):
            figures[sessions] = self.table.durable[sessions]

    def _let_on(self, sessions: NDArray[Any]) -> None:
        self.queue.release(sessions)
        self.after_release()

    def after_release(self) -> None:
        self.changed.set()
        self.residency.serve_wanting()

    # The store's health; called from its threads

    def on_trouble(self, why: str) -> None:
        self._loop.call_soon_threadsafe(self._set_trouble, why)

    def on_loss(self) -> None:
        self.residency.lost_data()
        self._loop.call_soon_threadsafe(self.residency.write_back)

    def _set_trouble(self, why: str) -> None:
        if why and not self.store_trouble:
            log.error("the store takes no writes: %s", why)
        elif not why:
            log.info("the store takes writes again")
        self.store_trouble = why
        self.metrics.redis_up.set(0 if why else 1)

    async def written_back(self, deadline: float) -> None:
        """Returns when no living session is still to be written back to a store that has lost its data."""
        while self.residency.writing_back and time.monotonic() < deadline:
            await asyncio.sleep(0.005)

    def meta(self, session: Reference) -> MetaFields | None:
        """What the hash of a session holds; for the store, from a committer thread."""
        table = self.table
        with self.queue.lock:
            if (row := table.row_of(session)) is None:
                return None
            served = self.catalog.models[int(table.model[row])]
            return MetaFields(table.id_of(row), served.reference, served.bundle.fingerprint, int(table.client_id[row]),
                              int(table.epoch[row]), int(table.created_ms[row]), int(table.losses[row]))  # fmt: skip

    # Refusals

    def _refuse_frame(self, stream: Stream, frame: stream_pb2.StepsFrame, refusal: ServiceError) -> None:
        """A frame of which no row could be used."""
        rows = len(frame.handles) // 4
        self.metrics.rows_refused.labels(refusal.reason).inc(max(1, rows))
        if rows and len(frame.handles) % 4 == 0 and len(frame.seqs) == rows * 8:
            handles, seqs = np.frombuffer(frame.handles, np.uint32), np.frombuffer(frame.seqs, np.uint64)
            fate = fates(self.table, self.rows_of(stream, handles), seqs)
            response = errors_frame(handles, seqs, [(np.ones(rows, np.bool_), refusal)], fate)
        else:
            response = stream_pb2.StreamResponse(errors=stream_pb2.ErrorsFrame(errors=[refusal.detail()]))
        stream.tell(response, max(1, rows))

    def _refuse(self, stream: Stream, handles: NDArray[np.uint32], seqs: NDArray[np.uint64], refused: Refused) -> None:
        response = errors_frame(handles, seqs, refused, fates(self.table, self.rows_of(stream, handles), seqs))
        for mask, refusal in refused:
            self.metrics.rows_refused.labels(refusal.reason).inc(int(mask.sum()))
        stream.send(response, len(response.errors.seqs) // 8)

    def refuse_rows(
        self, stream: Stream, handles: NDArray[Any], seqs: NDArray[np.uint64], refusal: ServiceError
    ) -> None:
        self._refuse(stream, handles, seqs, [(np.ones(len(seqs), np.bool_), refusal)])

    def _refuse_index(self, advance: Advance, index: NDArray[np.intp] | None, refusal: ServiceError) -> None:
        tick = advance.tick
        for stream, rows in self._by_stream(advance, index):
            self.refuse_rows(stream, tick.handles[rows], tick.seqs[rows], refusal)
            self.metrics.steps.labels(advance.served.bundle.name, refusal.reason.lower()).inc(len(rows))

    def _drop_waiting(self, wanted: Any, refusal: ServiceError | None = None) -> None:
        """Takes rows out of the queue, and tells their streams why. Without a refusal the streams are gone."""
        dropped = self._dropped(wanted)
        for batch, index in dropped:
            if refusal is not None:
                self.refuse_rows(batch.stream, batch.handles[index], batch.seqs[index], refusal)
            else:
                batch.stream.in_flight -= len(index)
        self._refuse_repeats(dropped, refusal or closed())

    def _dropped(self, wanted: Any) -> list[tuple[Batch, NDArray[np.intp]]]:
        """Takes rows out of the queue; their sessions will expect those seqs again."""
        dropped = self.queue.drop(wanted)
        for batch, index in dropped:
            np.minimum.at(self.table.admitted, batch.rows[index], batch.seqs[index] - np.uint64(1))
        return dropped

    def _refuse_repeats(self, dropped: list[tuple[Batch, NDArray[np.intp]]], refusal: ServiceError) -> None:
        for batch, index in dropped:
            self.repeats.refuse(batch.sessions[index], refusal, dropped=True)

    # Sessions that this server has no longer

    def lose(self, sessions: NDArray[np.int32], verdict: Verdict, pinned: bool = False) -> None:
        """The store has given these sessions to somebody else, or they are gone. `pinned`: their pins are the caller's."""
        if verdict.fenced:
            self.metrics.sessions_fenced.inc(len(sessions))
        else:
            self.metrics.sessions_expired.inc(len(sessions))
        self.dismiss(sessions, TAKEN_OVER if verdict.fenced else CLOSED, pinned)

    def lose_when_free(self, sessions: References, verdict: Verdict) -> None:
        """The same for interval sessions, which may be in a tick: their rows are forgotten after it."""
        sessions = sessions[self.table.alive(sessions)]
        rows = sessions.rows
        self._drop_waiting(lambda batch: np.isin(batch.rows[batch.waiting], rows), lost(verdict))
        free = ~self.table.pinned(rows)
        if free.any():
            self.lose(rows[free], verdict)
        if not free.all():
            self._loop.call_later(_FLUSH_POLL_S, self.lose_when_free, sessions[~free], verdict)

    def tell_durable(self, sessions: NDArray[Any]) -> None:
        """Interval durability: says to the streams what is safe now."""
        table = self.table
        for stream_id in np.unique(table.stream[sessions]).tolist():
            if stream := self.streams.get(stream_id):
                mine = sessions[table.stream[sessions] == stream_id]
                durable = stream_pb2.DurableFrame(
                    handles=table.handle[mine].tobytes(), durable_seqs=table.durable[mine].tobytes()
                )
                stream.send(stream_pb2.StreamResponse(durable=durable))

    def dismiss(self, sessions: NDArray[Any], why: int = CLOSED, pinned: bool = False) -> None:
        """Forgets sessions that this server holds no longer: whoever waits for something of theirs is refused, the streams that
        hold them are told, their handles are void. The one way by which rows are freed. None may be pinned, unless the pins are the
        caller's: then they stay until nothing waits for the sessions that an engine thread could take."""
        refusal = taken_over() if why == TAKEN_OVER else closed()
        self._drop_waiting(lambda batch: np.isin(batch.rows[batch.waiting], sessions), refusal)
        self.repeats.refuse(self.table.refer(sessions), refusal)
        self.detach(sessions, why)
        self.residency.give_up(sessions)
        with self.queue.lock:
            if pinned:
                self.table.busy[sessions] = False
            self.table.remove(sessions)
        self.changed.set()  # whoever waits for one of them looks again

    def hand_over(self, sessions: NDArray[np.int32]) -> None:
        """Before an open, move or close: waiting steps of these sessions are dropped; their clients send them again, or
        learn that somebody else has the session."""
        message = "the session is being opened, moved or closed just now; try again"
        refusal = ResourceExhaustedError("QUEUE_FULL", message, retry_after_ms=_RETRY_MS)
        self._drop_waiting(lambda batch: np.isin(batch.rows[batch.waiting], sessions), refusal)
        self.residency.unwant(sessions)

    def detach(self, sessions: NDArray[Any], why: int) -> None:
        """Voids the handles of these sessions and tells their streams why."""
        table = self.table
        sessions = sessions[table.stream[sessions] != NO_STREAM]
        kind = stream_pb2.EventFrame.TYPE_TAKEN_OVER if why == TAKEN_OVER else stream_pb2.EventFrame.TYPE_CLOSED
        for stream_id in np.unique(table.stream[sessions]).tolist():
            stream = self.streams.get(stream_id)
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
            stream.send(event_frame(kind, handles))
            if why == TAKEN_OVER:
                self.metrics.sessions_taken_over.inc(len(mine))

    async def quiesce(self, sessions: References, deadline: float) -> None:
        """Returns when no row of these sessions is under way. Their waiting rows must be dropped before."""
        while self.table.pinned(self.table.rows_of(sessions)).any():
            if not await self.changes(deadline):
                raise self.late()

    async def changes(self, deadline: float) -> bool:
        """Waits until sessions have become free; False: the deadline has come."""
        self.changed.clear()
        try:
            async with asyncio.timeout(max(0.0, deadline - time.monotonic()) if deadline < math.inf else None):
                await self.changed.wait()
        except TimeoutError:
            return False
        return True

    # Time

    async def sweep(self) -> None:
        """Deadlines of what waits, and how fast it is done; a few times a heartbeat, until cancelled."""
        while True:
            await asyncio.sleep(_SWEEP_S)
            now = time.monotonic()
            waiting = self.queue.waiting_rows
            if not self.store_trouble:
                self._backlog.observe(now, self._answered, waiting)
            if waiting:
                self._expire_waiting(now)
            for advance in list(self._advances):
                if any(part.batch.deadline < now for part in advance.tick.parts):
                    self._expire_advance(advance, now)
            self.repeats.expire(now)
            self.pauses.forget(now)

    def _expire_waiting(self, now: float) -> None:
        late = np.zeros(len(self.table.model), np.bool_)

        def expired(batch: Batch) -> NDArray[np.bool_]:
            sessions = batch.rows[batch.waiting]
            if batch.deadline < now:
                late[sessions] = True
            # A later step of a session cannot run without the one that is dropped.
            return late[sessions]

        dropped = self._dropped(expired)
        for batch, index in dropped:
            handles, seqs = batch.handles[index], batch.seqs[index]
            if batch.deadline < now:
                self.refuse_rows(batch.stream, handles, seqs, self.late())
            else:
                behind = gaps(np.ones(len(index), np.bool_), self.table.admitted[batch.rows[index]])
                self._refuse(batch.stream, handles, seqs, behind)
        self._refuse_repeats(dropped, behind_late())

    def _expire_advance(self, advance: Advance, now: float) -> None:
        """Answers rows whose commit did not come in time; should it come later, their seqs can be asked for again."""
        tick = advance.tick
        if advance.answered is None:
            advance.answered = np.zeros(len(tick), np.bool_)
        late = np.zeros(len(tick), np.bool_)
        for part in tick.parts:
            if part.batch.deadline < now:
                late[part.start : part.start + len(part.index)] = True
        waiting = np.isin(tick.rows, tick.rows[advance.committing]) & (self.table.applied[tick.rows] < tick.seqs)
        index = np.flatnonzero(late & waiting & ~advance.answered)
        if len(index):
            self._refuse_index(advance, index, self.late())
            advance.answered[index] = True

    def late(self) -> ServiceError:
        """What a row is told whose time is up."""
        if self.store_trouble:
            reason = "STORE_OUT_OF_MEMORY" if "OOM" in self.store_trouble else "STORE_UNAVAILABLE"
            message = f"the store takes no writes ({self.store_trouble}); repeat the step with the same seq"
            return UnavailableError(reason, message, retry_after_ms=500)
        return DeadlineExceededError("DEADLINE_EXCEEDED", "the step's time was up; repeat it with the same seq")

    # Drain

    async def drain(self, deadline: float) -> None:
        """Tells the streams, finishes what was accepted and makes everything durable."""
        self.draining = True
        for stream in list(self.streams.values()):
            stream.send(event_frame(stream_pb2.EventFrame.TYPE_DRAINING))
        while (
            self.queue.waiting_rows or self._advances or self.rows_in_flight() or self.ends
        ) and time.monotonic() < deadline:
            await asyncio.sleep(0.005)
        await self.residency.flush_all(deadline)
        for stream in list(self.streams.values()):
            stream.end()


def _failure(served: Served, error: Exception) -> InternalError:
    failed = f"model {served.reference} failed on this session's input: {type(error).__name__}"
    what = str(error) if isinstance(error, RuntimeStoppedError) else failed
    return InternalError("INTERNAL", f"{what}; nothing was applied", model=served.bundle.name)
