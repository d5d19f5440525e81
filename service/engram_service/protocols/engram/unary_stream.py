"""Steps for clients without a stream: one stream of the server's own carries them, and answers go back to the calls.

The native wire is told which sessions this stream has, and makes rows of their usual steps by itself (steps/unary_rows.py): here
are the others. A call of those is found again by handle and seq. A handle names one session only, also when that is gone: a late
answer reaches nobody else.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engram.v1 import model_pb2, stream_pb2
from engram_service.auth.tenants import tenant_of
from engram_service.auth.tokens import Caller
from engram_service.catalog import Catalog
from engram_service.condition import Condition
from engram_service.errors import AbortedError, InternalError, of_detail
from engram_service.rows import rows_of
from engram_service.sessions.handles import ENDED
from engram_service.sessions.opening import Sessions
from engram_service.sessions.requests import Wanted
from engram_service.sessions.residency import Residency
from engram_service.sessions.shares import Shares
from engram_service.sessions.streams import LOCAL, Streams
from engram_service.sessions.table import NO_STREAM, SessionTable
from engram_service.settings import Settings
from engram_service.steps.admission import Admission
from engram_service.steps.refusals import taken_over
from engram_service.wire.base import FEEDBACK, PREFILL, StepModel

CLIENT_ID = 1  # of all unary callers: a session without a stream belongs to whoever steps it
_TRIES = 3
_TIDY_S = 1.0


@dataclass(slots=True, eq=False)
class _Call:
    """A call that waits for `left` rows."""

    outputs: NDArray[np.uint8]
    first: int
    left: int
    prefill: bool  # its outputs are not wanted
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    def answered(self, seq: int, output: NDArray[np.uint8] | None) -> None:
        """One of its rows; without an output where this call, or one that asked for the same step, wanted none."""
        if self.done.done():
            return
        if output is not None and len(output) != self.outputs.shape[1]:
            self.done.set_exception(
                InternalError("INTERNAL", "the answer does not fit the model; repeat the step with its seq")
            )
            return
        if output is not None:
            self.outputs[seq - self.first] = output
        self.left -= 1
        if not self.left:
            self.done.set_result(None)


@dataclass(frozen=True, slots=True)
class Asked:
    """What a StepRequest asks for, with its inputs as bytes."""

    session_id: str
    model: str
    version: str
    inputs: bytes
    rows: int
    seq: int
    prefill: bool
    generate: int
    timeout_s: float
    constants: Sequence[model_pb2.Constant] = ()  # of the session, if this makes it


class UnaryStream:
    """Opens sessions as they are stepped, and has their rows admitted like those of any stream."""

    def __init__(
        self, settings: Settings, table: SessionTable, catalog: Catalog, streams: Streams, admission: Admission,
        sessions: Sessions, residency: Residency, shares: Shares, condition: Condition,
    ) -> None:  # fmt: skip
        self._settings = settings
        self._table = table
        self._catalog = catalog
        self._admission = admission
        self._sessions = sessions
        self._residency = residency
        self._shares = shares
        self._condition = condition
        self._wire = streams.wire
        self._stream = streams.add(LOCAL, Caller())
        self._stream.handles.on_end = self._wire.forget
        self._opens: dict[str, asyncio.Event] = {}  # under way, by key
        self._calls: dict[tuple[int, int], list[_Call]] = {}  # by handle and seq: several that ask for the same step

    async def step(self, asked: Asked) -> tuple[int, NDArray[np.uint8]]:
        """The seq of the last row, and the outputs, uint8 [rows + generate, output_nbytes]. Raises ServiceError."""
        try:
            async with asyncio.timeout(asked.timeout_s):
                for attempt in range(_TRIES):
                    try:
                        with self._shares.of(tenant_of(asked.session_id)).unary(asked.rows + asked.generate):
                            return await self._step(asked)
                    except AbortedError as error:
                        # Another server had taken the session over since the last call. Where nothing was applied, or the
                        # step has a number by which it is known again, it is claimed again.
                        if attempt == _TRIES - 1 or (asked.seq == 0 and error.metadata.get("applied") == "unknown"):
                            raise
        except TimeoutError:
            raise self._condition.late() from None
        raise AssertionError("unreachable")

    async def tidy(self) -> None:
        """Lets go of sessions that nobody has stepped for a while, so that they cost nothing; runs until cancelled."""
        table = self._table
        while True:
            await asyncio.sleep(_TIDY_S)
            rows = self._stream.handles.attached()
            idle = table.used[rows] < self._residency.clock() - self._settings.resident_idle_s
            idle &= ~table.busy[rows] & ~table.opening[rows] & (table.admitted[rows] == table.applied[rows])
            for handle in table.handle[rows[idle]].tolist():
                self._stream.handles.end(handle, ENDED)
            table.stream[rows[idle]] = NO_STREAM
            self._residency.let_go(rows[idle])

    async def _step(self, asked: Asked) -> tuple[int, NDArray[np.uint8]]:
        table = self._table
        row = self._held(asked.session_id)
        while row is None and (opening := self._opens.get(asked.session_id)) is not None:
            await opening.wait()
            row = self._held(asked.session_id)
        if row is None or self._doubtful(row, asked):
            await self._open(asked)
            row = self._held(asked.session_id)
        if row is None:  # somebody has opened it meanwhile
            raise taken_over()
        handle = table.handle.item(row)
        served = self._catalog.models[int(table.model[row])]
        first = asked.seq or int(table.admitted[row]) + 1
        total = asked.rows + asked.generate
        call = _Call(np.zeros((total, served.arena.output_nbytes), np.uint8), first, total, asked.prefill)
        keys = [(handle, first + i) for i in range(total)]
        for key in keys:
            self._calls.setdefault(key, []).append(call)
        try:
            frame = self._frame(asked, handle, first, served.bundle.schema.input_nbytes)
            self._admission.admit_frame(self._stream, frame, time.monotonic())
            await call.done
        finally:
            for key in keys:
                if call in (waiting := self._calls.get(key, [])):
                    waiting.remove(call)
                if not waiting:
                    self._calls.pop(key, None)
        return first + total - 1, call.outputs

    def _held(self, key: str) -> int | None:
        """The row of a session that this stream has; to be used before anything is awaited."""
        row = self._table.find(key)
        return row if row is not None and self._table.stream.item(row) == self._stream.id else None

    def _doubtful(self, row: int, asked: Asked) -> bool:
        """Whether a step seems to be repeated or ahead, or of another model: another server may have had the session since, or a
        new one of its name. The next step needs no such doubt: its commit fails."""
        admitted, applied = self._table.admitted.item(row), self._table.applied.item(row)
        bundle = self._catalog.models[self._table.model.item(row)].bundle
        other = asked.model != bundle.name or asked.version not in ("", bundle.version)
        return other or (asked.seq not in (0, admitted + 1) and admitted == applied)

    async def _open(self, asked: Asked) -> None:
        wanted = Wanted(
            asked.model, asked.version, tenant_of(asked.session_id), [asked.session_id], False, CLIENT_ID, 0, False,
            shared=True, constants=asked.constants,
        )  # fmt: skip
        done = self._opens[asked.session_id] = asyncio.Event()
        try:
            opened = await self._sessions.open(self._stream, wanted, asked.timeout_s)
        finally:
            done.set()
            if self._opens.get(asked.session_id) is done:
                del self._opens[asked.session_id]
        if opened.errors:
            raise opened.errors[0]
        if (row := self._held(asked.session_id)) is not None:
            bundle = self._catalog.models[self._table.model.item(row)].bundle
            takes, gives = rows_of(bundle.schema.inputs), rows_of(bundle.schema.outputs)
            model = StepModel(bundle.name, bundle.version, takes, gives)
            self._wire.know(asked.session_id, self._table.handle.item(row), model)

    def _frame(self, asked: Asked, handle: int, first: int, input_nbytes: int) -> stream_pb2.StepsFrame:
        """The rows of a call. What came before them has arrived: a caller without a stream waits for each answer."""
        rows, inputs, fed = asked.rows, asked.inputs, 0
        if not rows:
            rows, inputs, fed = 1, bytes(input_nbytes), FEEDBACK
        repeats = np.zeros(rows, np.uint32)
        repeats[-1] = asked.generate - (1 if fed else 0)
        return stream_pb2.StepsFrame(
            handles=np.full(rows, handle, np.uint32).tobytes(),
            seqs=np.arange(first, first + rows, dtype=np.uint64).tobytes(),
            inputs=inputs,
            flags=np.full(rows, (PREFILL if asked.prefill else 0) | fed, np.uint8).tobytes(),
            repeats=repeats.tobytes() if asked.generate else b"",
            acknowledged_seqs=np.full(rows, first - 1, np.uint64).tobytes(),
            timeout_ms=max(1, int(asked.timeout_s * 1000)),
        )

    def delivered(
        self, handles: NDArray[np.uint32], seqs: NDArray[np.uint64], outputs: NDArray[np.uint8] | None
    ) -> None:  # fmt: skip
        """Answers.local: hands outputs to the calls that wait for them."""
        for i, key in enumerate(zip(handles.tolist(), seqs.tolist(), strict=True)):
            waiting = self._calls.pop(key, [])
            if left := [] if outputs is not None else [call for call in waiting if not call.prefill]:
                self._calls[key] = left  # their own rows bring the outputs
            for call in waiting:
                if call not in left:
                    call.answered(key[1], None if outputs is None else outputs[i])

    def refused(self, frame: stream_pb2.ErrorsFrame) -> None:
        """Answers.local: tells the calls why."""
        handles, seqs = np.frombuffer(frame.handles, np.uint32), np.frombuffer(frame.seqs, np.uint64)
        indexes = np.frombuffer(frame.error_indexes, np.uint32)
        # The first refused row says why; those behind it are only gaps.
        for i in np.argsort(seqs, kind="stable").tolist():
            error = frame.errors[int(indexes[i])]
            if error.reason == "DEADLINE_EXCEEDED":
                continue  # of one of the calls for this step; each has its own clock
            for call in self._calls.pop((int(handles[i]), int(seqs[i])), ()):
                if not call.done.done():
                    call.done.set_exception(of_detail(error))
