"""How many rows may be in flight: no more than are done before they would be late. Asked by admission.py."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from engram_service.condition import Condition
from engram_service.errors import ResourceExhaustedError, ServiceError
from engram_service.sessions.shares import Shares
from engram_service.sessions.streams import Stream, Streams
from engram_service.settings import Settings
from engram_service.steps.backlog import Backlog
from engram_service.steps.unary_rows import UnaryRows
from engram_service.wire.base import CALL, FIRST, Arrived

_FEW = 8  # frames; to look at each of so many costs less than at all at once


class Room:
    """Of the whole server."""

    def __init__(
        self, settings: Settings, streams: Streams, backlog: Backlog, condition: Condition, shares: Shares, unary: UnaryRows
    ) -> None:  # fmt: skip
        self._settings = settings
        self._streams = streams
        self._backlog = backlog
        self._condition = condition
        self._shares = shares
        self._unary = unary

    def refusals(self, arrived: Arrived, rows: NDArray[np.int32]) -> Iterator[tuple[slice, ServiceError]]:
        """The frames for which there is none, and why; each is refused before the next one is looked at. `rows`: of the session
        table; those of unary calls are there."""
        timeouts = arrived.timeouts_ms[arrived.timeouts_ms > 0]
        least = int(timeouts.min()) if len(timeouts) else 0
        tight = self._condition.draining or self._streams.in_flight > self.rows_max(least)
        if not tight and not self._shares.limited:
            return
        starts = np.flatnonzero(arrived.flags & FIRST)
        frames: Iterator[tuple[int, int]] = itertools.pairwise([*starts.tolist(), len(arrived)])
        if not tight and len(starts) > _FEW:
            to_check = self._streams.to_check(arrived.streams[starts])
            if not to_check.any():
                return
            frames = itertools.compress(frames, to_check.tolist())
        for start, end in frames:
            number, count = arrived.streams.item(start), end - start
            stream = self._streams.get(number)
            try:
                self._condition.check_open()
                self.check(number, 0, arrived.timeouts_ms.item(start), count)
                if number & CALL:
                    self._unary.take(number, rows.item(start))
                elif stream is not None:
                    self._shares.of(stream.tenant).check_rows()
            except ServiceError as refusal:
                yield slice(start, end), refusal

    def arrive(self, stream: Stream, rows: NDArray[np.uint32]) -> None:
        """Rows of a stream, which are in flight from now on. Raises ResourceExhaustedError, and then they are not."""
        self._streams.arrived(rows)
        try:
            self._shares.of(stream.tenant).check_rows()
        except ResourceExhaustedError:
            self._streams.answered(rows)
            raise

    def check(self, stream: int, rows: int, timeout_ms: int, counted: int = 0) -> None:
        """Room for more rows of a stream, or for those that are `counted` already. Raises ResourceExhaustedError."""
        limit, there = self.rows_max(timeout_ms), self._streams.in_flight - counted
        # Where greedy clients have filled the queue, one that has less than its share is still let in.
        if there >= limit and self._streams.in_flight_of(stream) + rows > limit // max(1, len(self._streams)):
            message = f"{there} rows are in flight, and {limit} are this server's limit just now"
            hint = self._backlog.retry_in_ms(rows + counted)
            raise ResourceExhaustedError("QUEUE_FULL", message, retry_after_ms=hint)

    def rows_max(self, timeout_ms: int) -> int:
        """Rows in flight before streams with more than their share are refused: no more than are done before the queue's time
        is up, or half of the frame's own, as far as it is known how fast they are done."""
        settings = self._settings
        rate, seconds = self._backlog.rate, settings.queue_s_max or math.inf
        if timeout_ms:
            seconds = min(seconds, timeout_ms / 2000)
        if not rate or seconds == math.inf:
            return settings.queue_rows_max
        return min(settings.queue_rows_max, max(settings.batch_rows_max, int(rate * seconds)))
