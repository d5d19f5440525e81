"""Calls: what a caller waits for. One call is many rows; a gather is many callers' single rows. Used by _core.py.

A call knows nothing of sessions and seqs: rows are places in it, 0 to rows-1.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram._arrays import RowCodec
from engram._errors import EngramError

QUIET = 1
FEEDBACK = 2


class Call:
    """Rows that succeed or fail together.

    Attributes:
        inputs: uint8 [rows, input bytes]; None for rows that run on their own output.
        outputs: [rows, *output shape]; None for quiet rows.
        flags: QUIET and FEEDBACK, of every row.
        wide: rows are of different sessions, and one that fails leaves the others alone.
        open: rows sent and neither answered nor refused.
        left: rows neither answered nor refused.
    """

    def __init__(
        self,
        rows: int,
        inputs: NDArray[np.uint8] | None,
        outputs: NDArray[Any] | None,
        flags: int,
        wide: bool,
        future: asyncio.Future[Any],
        now: float,
    ) -> None:
        self.id = 0
        self.rows = rows
        self.inputs = inputs
        self.outputs = outputs
        self.flags = flags
        self.wide = wide
        self.future = future
        self.started = now
        self.deadline = 0.0
        self.open = 0
        self.trouble: EngramError | None = None  # the last retryable error: what a timeout will say
        self.left = rows
        self._errors: dict[int, EngramError] = {}

    def wanted(self, at: int) -> bool:
        """Whether somebody still waits for this row."""
        return not self.future.done()

    def all_wanted(self) -> NDArray[np.bool_] | None:
        """Which rows are still waited for; None: all of them."""
        return np.zeros(self.rows, np.bool_) if self.future.done() else None

    def settle(self, at: NDArray[np.int64], values: NDArray[Any] | None) -> None:
        """The rows' answers have come."""
        self.open -= len(at)
        self.left -= len(at)
        if self.outputs is not None and values is not None:
            self.outputs[at] = values
        if not self.left:
            self._finish()

    def refuse(self, at: int, error: EngramError) -> None:
        """A row was refused for good. A call that is not wide fails with it."""
        if not self.wide:
            self.fail(error)
            return
        self._errors[at] = error
        self.left -= 1
        if not self.left:
            self._finish()

    def fail(self, error: EngramError) -> None:
        """Fails the whole call now; rows that were sent may still be applied."""
        if not self.future.done():
            self.future.set_exception(error)

    def waiting(self) -> bool:
        return not self.future.done()

    def _finish(self) -> None:
        if self.future.done():
            return
        if not self._errors:
            self.future.set_result(self.outputs)
            return
        first = self._errors[min(self._errors)].copy()
        first.rows, first.outputs = self._errors, self.outputs
        self.future.set_exception(first)


class Gather(Call):
    """Single rows of many callers, who were ready together. Each has a future of its own."""

    def __init__(self, codec: RowCodec, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(0, None, None, 0, True, loop.create_future(), loop.time())
        self.codec = codec
        self.futures: list[asyncio.Future[NDArray[Any]]] = []
        self.slots: list[int] = []
        self.pieces: list[bytes] = []
        self.deadlines: list[float] = []
        self.earliest = math.inf

    def add(self, slot: int, row: bytes, deadline: float, future: asyncio.Future[NDArray[Any]]) -> None:
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

    def settle(self, at: NDArray[np.int64], values: NDArray[Any] | None) -> None:
        self.open -= len(at)
        futures = self.futures
        if values is None:
            values = self.codec.empty(len(at))
        # Copies: a view would keep the whole frame in memory as long as the caller keeps one row of it.
        for place, value in zip(at.tolist(), values, strict=True):
            future = futures[place]
            if not future.done():
                future.set_result(value.copy())

    def refuse(self, at: int, error: EngramError) -> None:
        future = self.futures[at]
        if not future.done():
            future.set_exception(error)

    def fail(self, error: EngramError) -> None:
        for future in self.futures:
            if not future.done():
                future.set_exception(error.copy())

    def expire(self, now: float, error: Callable[[], EngramError]) -> None:
        """Fails the rows whose time is up."""
        self.earliest = math.inf
        for future, deadline in zip(self.futures, self.deadlines, strict=True):
            if future.done():
                continue
            if deadline <= now:
                future.set_exception(error())
            elif deadline < self.earliest:
                self.earliest = deadline

    def waiting(self) -> bool:
        return any(not future.done() for future in self.futures)
