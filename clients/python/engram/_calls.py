"""Calls: what a caller waits for. One call is many rows; a gather is many callers' single rows. Used by _core.py.

A call knows nothing of sessions and seqs: rows are places in it, 0 to rows-1.
"""

from __future__ import annotations

import asyncio
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram._errors import EngramError, Fate
from engram._tensors import Codec

PREFILL = 1
FEEDBACK = 2


class Answer(asyncio.Future[Any]):
    """What a caller waits for. A caller who is cancelled is known of before anything else is sent.

    Attributes:
        call, at: of which row it is, or of which call (at is None); set before a caller has it. No more than a weak reference:
            a call has its answers, and circles are found late.
    """

    __slots__ = ("at", "call")

    call: weakref.ref[Call]
    at: int | None

    def cancel(self, msg: Any | None = None) -> bool:
        cancelled = super().cancel(msg)
        if cancelled and (call := self.call()) is not None:
            call.gone(call, self.at)
        return cancelled


class Call:
    """Rows that succeed or fail together.

    Attributes:
        inputs: uint8 [rows, input bytes]; None for rows that run on their own output.
        codec: of the outputs; None for prefills.
        flags: PREFILL and FEEDBACK, of every row.
        wide: rows are of different sessions, and one that fails leaves the others alone.
        slots: the sessions, of a wide call one for each row.
        gone: called when whoever waits is cancelled, with the call and its row (None: all).
        open: rows sent and neither answered nor refused.
        left: rows neither answered nor refused.
    """

    slots: Sequence[int] | NDArray[np.int64]

    def __init__(
        self,
        rows: int,
        inputs: NDArray[np.uint8] | None,
        codec: Codec | None,
        flags: int,
        wide: bool,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.id = 0
        self.rows = rows
        self.inputs = inputs
        self.codec = codec
        self.outputs = None if codec is None else codec.empty(rows)
        self.flags = flags
        self.wide = wide
        self.slots = ()
        self.gone: Callable[[Call, int | None], None] = _nobody
        self.future = Answer(loop=loop)
        self.ref = weakref.ref(self)
        self.future.call, self.future.at = self.ref, None
        self.started = loop.time()
        self.deadline = 0.0
        self.open = 0
        self.trouble: EngramError | None = None  # the last retryable error: what a timeout will say
        self.left = rows
        self._errors: dict[int, EngramError] = {}
        self._done = np.zeros(rows if wide else 0, np.bool_)  # rows answered or refused, where they end in any order

    def wanted(self, at: int) -> bool:
        """Whether somebody still waits for this row."""
        return not self.future.done()

    def all_wanted(self) -> NDArray[np.bool_] | None:
        """Which rows are still waited for; None: all of them."""
        return np.zeros(self.rows, np.bool_) if self.future.done() else None

    def unfinished(self) -> list[int]:
        """The rows that are neither answered nor refused."""
        if self.wide:
            return np.flatnonzero(~self._done).tolist()
        return list(range(self.rows - self.left, self.rows))

    def settle(self, at: NDArray[np.int64], values: NDArray[Any] | None) -> Sequence[int] | None:
        """The rows' answers have come. Which of these, by their places in `at`, nobody waits for any more; None: all are waited
        for."""
        self.open -= len(at)
        if self.future.done():
            return range(len(at))
        self.left -= len(at)
        if self.wide:
            self._done[at] = True
        if self.outputs is not None and values is not None:
            self.outputs[at] = values
        if not self.left:
            self._finish()
        return None

    def refuse(self, at: int, error: EngramError) -> None:
        """A row was refused for good, with its own error. A call that is not wide fails with it."""
        if not self.wide:
            self._end(error)
            return
        if self._done[at] or self.future.done():
            return
        self._errors[at] = error
        self._done[at] = True
        self.left -= 1
        if not self.left:
            self._finish()

    def fail(self, error: EngramError, fates: dict[int, Fate]) -> None:
        """Fails the whole call now; `fates` are those of its unfinished rows."""
        if self.future.done():
            return
        if self.wide:
            for at, fate in fates.items():
                self.refuse(at, error.of_step(fate))
        else:
            self._end(error.of_step(next(iter(fates.values()))))

    def waiting(self) -> bool:
        return not self.future.done()

    def _end(self, error: EngramError) -> None:
        if self.future.done():
            return
        done = self.rows - self.left
        error.metadata.setdefault("row", str(done))
        error.outputs = self._given(done)
        self.future.set_exception(error)

    def _finish(self) -> None:
        if self.future.done():
            return
        if not self._errors:
            self.future.set_result(self._given(self.rows))
            return
        first = self._errors[min(self._errors)]
        raised = first.copy() if first.fate is None else first.of_step(first.fate)
        raised.rows, raised.outputs = self._errors, self._given(self.rows)
        self.future.set_exception(raised)

    def _given(self, rows: int) -> Any:
        """The outputs of the first so many rows, as callers get them."""
        return None if self.codec is None or self.outputs is None else self.codec.given(self.outputs[:rows])


def _nobody(call: Call, at: int | None) -> None:
    """Before the core has the call."""


class Gather(Call):
    """Single rows of many callers, who were ready together. Each has a future of its own."""

    codec: Codec

    def __init__(self, codec: Codec, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(0, None, codec, 0, True, loop)
        self.futures: list[Answer] = []
        self.slots: list[int] = []
        self.pieces: list[bytes] = []
        self.deadlines: list[float] = []
        self.earliest = math.inf

    def add(self, slot: int, row: bytes, deadline: float, future: Answer) -> None:
        future.call, future.at = self.ref, self.rows
        self.slots.append(slot)
        self.pieces.append(row)
        self.deadlines.append(deadline)
        if deadline < self.earliest:
            self.earliest = deadline
        if deadline > self.deadline:
            self.deadline = deadline
        self.futures.append(future)
        self.rows += 1

    def seal(self) -> None:
        """No more rows: the pieces become one array."""
        self.inputs = np.frombuffer(b"".join(self.pieces), np.uint8).reshape(self.rows, -1)
        self.pieces.clear()

    def wanted(self, at: int) -> bool:
        return not self.futures[at].done()

    def all_wanted(self) -> NDArray[np.bool_] | None:
        gone = [future.done() for future in self.futures]
        return ~np.array(gone) if True in gone else None

    def unfinished(self) -> list[int]:
        return [at for at, future in enumerate(self.futures) if not future.done()]

    def settle(self, at: NDArray[np.int64], values: NDArray[Any] | None) -> Sequence[int] | None:
        self.open -= len(at)
        futures, own = self.futures, self.codec.own
        if values is None:
            values = self.codec.empty(len(at))
        unwanted: list[int] = []
        for number, (place, value) in enumerate(zip(at.tolist(), values, strict=True)):
            future = futures[place]
            if not future.done():
                future.set_result(own(value))
            else:
                unwanted.append(number)
        return unwanted or None

    def refuse(self, at: int, error: EngramError) -> None:
        future = self.futures[at]
        if not future.done():
            future.set_exception(error)

    def fail(self, error: EngramError, fates: dict[int, Fate]) -> None:
        for at, fate in fates.items():
            self.refuse(at, error.of_step(fate))

    def expired(self, now: float) -> list[int]:
        """The rows whose time is up."""
        late: list[int] = []
        self.earliest = math.inf
        for at, (future, deadline) in enumerate(zip(self.futures, self.deadlines, strict=True)):
            if future.done():
                continue
            if deadline <= now:
                late.append(at)
            elif deadline < self.earliest:
                self.earliest = deadline
        return late

    def waiting(self) -> bool:
        return any(not future.done() for future in self.futures)
