"""Which waiting rows make the next tick. Pure: arrays and queues, no torch, no clock, no lock of its own.

Frames of one stream wait in the order in which they came; streams take turns. A tick takes all that is ready, at most
`rows_max` rows and at most `run_max` consecutive steps of one session; sessions that are busy keep their rows here.
Owned by work.WorkQueue, which calls it under its lock.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

_FAIR_SHARE_MIN = 32  # rows that each stream may place in a tick before others get a second turn


@dataclass(slots=True, eq=False)
class Batch:
    """The rows of one frame that were accepted, as columns; `waiting` indexes those that no tick has taken yet."""

    stream: Any  # who gets the answers; the scheduler uses its `.id` alone
    rows: NDArray[np.int32]  # session, as a row of the session table
    seqs: NDArray[np.uint64]
    flags: NDArray[np.uint8]
    inputs: NDArray[Any]  # [n, *input shape]
    unique: bool  # no session has two rows
    arrived: float  # seconds, monotonic
    deadline: float  # seconds, monotonic; inf: none
    waiting: NDArray[np.intp] = field(init=False)

    def __post_init__(self) -> None:
        self.waiting = np.arange(len(self.rows))


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one batch inside a tick: `index` into the batch, at `start` .. `start + len(index)` of the tick."""

    batch: Batch
    index: NDArray[np.intp]
    start: int


@dataclass(frozen=True, slots=True)
class Tick:
    """One batched advance: rows in the order in which they were taken, and the waves in which they run.

    Wave k holds the k-th step of each session in the tick. `last` indexes each session's last row.
    """

    parts: list[Part]
    rows: NDArray[np.int32]
    seqs: NDArray[np.uint64]
    flags: NDArray[np.uint8]
    waves: list[NDArray[np.intp] | None]  # None: all rows
    last: NDArray[np.intp] | None  # None: all rows

    def __len__(self) -> int:
        return len(self.rows)


class Scheduler:
    """The rows that wait for one model."""

    def __init__(self, run_max: int) -> None:
        self.run_max = run_max
        self.waiting_rows = 0
        self._queues: OrderedDict[int, deque[Batch]] = OrderedDict()

    def add(self, batch: Batch) -> None:
        self._queues.setdefault(batch.stream.id, deque()).append(batch)
        self.waiting_rows += len(batch.waiting)

    def next(self, busy: NDArray[np.bool_], rows_max: int) -> Tick | None:
        """The next tick, or None where nothing is ready. Marks the sessions it takes in `busy`."""
        if not self.waiting_rows:
            return None
        taken: list[tuple[Batch, NDArray[np.intp]]] = []
        room = rows_max
        share = max(_FAIR_SHARE_MIN, rows_max // len(self._queues))
        for quota in (share, rows_max):
            for stream_id in list(self._queues):
                room -= self._take(self._queues[stream_id], min(quota, room), busy, taken)
                if not room:
                    break
        self._rotate()
        self.waiting_rows -= rows_max - room
        return _tick(taken) if taken else None

    def drop(self, wanted: Callable[[Batch], NDArray[np.bool_]]) -> list[tuple[Batch, NDArray[np.intp]]]:
        """Takes out the waiting rows for which `wanted` (a mask over batch.waiting) is true, and returns them."""
        dropped: list[tuple[Batch, NDArray[np.intp]]] = []
        for queue in self._queues.values():
            for batch in queue:
                mask = wanted(batch)
                if mask.any():
                    dropped.append((batch, batch.waiting[mask]))
                    batch.waiting = batch.waiting[~mask]
                    self.waiting_rows -= int(mask.sum())
        self._forget_empty()
        return dropped

    def _take(
        self, queue: deque[Batch], quota: int, busy: NDArray[np.bool_], taken: list[tuple[Batch, NDArray[np.intp]]]
    ) -> int:
        count = 0
        for batch in queue:
            if count >= quota:
                break
            chosen = _ready(batch, busy, self.run_max)[: quota - count]
            if not len(chosen):
                continue
            busy[batch.rows[chosen]] = True
            if len(chosen) == len(batch.waiting):
                batch.waiting = batch.waiting[:0]
            else:
                batch.waiting = np.setdiff1d(batch.waiting, chosen, assume_unique=True)
            taken.append((batch, chosen))
            count += len(chosen)
        while queue and not len(queue[0].waiting):
            queue.popleft()
        return count

    def _rotate(self) -> None:
        """The stream that was served first goes to the end of the line."""
        self._forget_empty()
        if len(self._queues) > 1:
            self._queues.move_to_end(next(iter(self._queues)))

    def _forget_empty(self) -> None:
        for stream_id in [key for key, queue in self._queues.items() if not any(len(b.waiting) for b in queue)]:
            del self._queues[stream_id]


def _ready(batch: Batch, busy: NDArray[np.bool_], run_max: int) -> NDArray[np.intp]:
    """Waiting rows whose session is free, at most `run_max` of one session, in order."""
    waiting = batch.waiting
    rows = batch.rows[waiting]
    free = ~busy[rows]
    if not batch.unique:
        free &= _occurrence(rows) < run_max
    return waiting if free.all() else waiting[free]


def _occurrence(rows: NDArray[np.int32]) -> NDArray[np.intp]:
    """For each row, how many rows of the same session stand before it."""
    order = np.argsort(rows, kind="stable")
    by_session = rows[order]
    starts = np.flatnonzero(np.concatenate(([True], by_session[1:] != by_session[:-1])))
    lengths = np.diff(np.append(starts, len(rows)))
    result = np.empty(len(rows), np.intp)
    result[order] = np.arange(len(rows)) - np.repeat(starts, lengths)
    return result


def _tick(taken: list[tuple[Batch, NDArray[np.intp]]]) -> Tick:
    parts: list[Part] = []
    start = 0
    for batch, index in taken:
        parts.append(Part(batch, index, start))
        start += len(index)
    rows = _joined([part.batch.rows[part.index] for part in parts])
    seqs = _joined([part.batch.seqs[part.index] for part in parts])
    flags = _joined([part.batch.flags[part.index] for part in parts])
    if all(part.batch.unique for part in parts):
        # A session is marked busy as its first row is taken, so two batches never bring the same one.
        return Tick(parts, rows, seqs, flags, [None], None)
    wave = _occurrence(rows)
    waves: list[NDArray[np.intp] | None] = [np.flatnonzero(wave == k) for k in range(int(wave.max()) + 1)]
    order = np.lexsort((wave, rows))
    ends = np.append(rows[order][1:] != rows[order][:-1], True)
    return Tick(parts, rows, seqs, flags, waves, np.sort(order[ends]))


def _joined(columns: list[NDArray[Any]]) -> NDArray[Any]:
    return columns[0] if len(columns) == 1 else np.concatenate(columns)
