"""Which waiting rows make the next tick. Pure: arrays and queues, no torch, no clock, no lock of its own.

Frames of one stream wait in the order in which they came; streams take turns. A tick takes all that is ready, at most
`rows_max` rows and at most `run_max` consecutive steps of one session; sessions that are busy keep their rows here, and so do
rows whose deadline has passed, until they are dropped. Owned by work.WorkQueue, which calls it under its lock.

Streams are treated alike. Each has its share of a tick before any has more. While several step, none brings more than its turn into
a tick, even where there is room: whoever comes while a tick runs waits for its end. A stream with more than that waiting is large;
beside others its rows go in ticks of their own, without long runs, and every second tick is for the small ones.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

FIXED_ROWS = 50  # a tick of one row takes about as long as so many rows more

_FAIR_SHARE_MIN = 32  # rows that each stream may place in a tick before others get more
_TURN_MIN = 128  # rows that a stream may bring in any case
_TURN_S = 0.005  # and as many as take about so long
_RUN_SHARED = 2  # most consecutive steps of one session beside small streams; they run one after the other
_LATELY_S = 1.0  # a stream is one of those that step for so long after its last frame


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
        # Streams, and when their last frame came; the latest last.
        self._stepped: OrderedDict[int, float] = OrderedDict()
        self._large_next = False
        self._rows_per_s = 0.0  # of ticks that are not small

    def add(self, batch: Batch) -> None:
        self._queues.setdefault(batch.stream.id, deque()).append(batch)
        self._stepped[batch.stream.id] = batch.arrived
        self._stepped.move_to_end(batch.stream.id)
        self.waiting_rows += len(batch.waiting)

    def next(self, busy: NDArray[np.bool_], rows_max: int, now: float) -> Tick | None:
        """The next tick, or None where nothing is ready. Marks the sessions it takes in `busy`."""
        if not self.waiting_rows:
            return None
        while self._stepped and next(iter(self._stepped.values())) < now - _LATELY_S:
            self._stepped.popitem(last=False)
        streams = max(1, len(self._stepped))
        turn = max(_TURN_MIN, rows_max // streams, int(self._rows_per_s * _TURN_S))
        large = [key for key, queue in self._queues.items() if sum(len(batch.waiting) for batch in queue) > turn]
        if not 0 < len(large) < streams:
            return self._made(list(self._queues), rows_max, turn, self.run_max, busy, now)
        small = [key for key in self._queues if key not in large]
        for keys in (large, small) if self._large_next else (small, large):
            if tick := self._made(keys, rows_max, turn, min(self.run_max, _RUN_SHARED), busy, now):
                self._large_next = keys is small
                return tick
        return None

    def _made(
        self, keys: list[int], rows_max: int, turn: int, run_max: int, busy: NDArray[np.bool_], now: float
    ) -> Tick | None:  # fmt: skip
        """A tick of the rows of these streams."""
        if not keys:
            return None
        taken: list[tuple[Batch, NDArray[np.intp]]] = []
        brought = dict.fromkeys(keys, 0)
        room = rows_max
        for share in (max(_FAIR_SHARE_MIN, rows_max // len(keys)), rows_max):
            for key in keys:
                if (quota := min(share, turn - brought[key], room)) > 0:
                    count = self._take(self._queues[key], quota, run_max, busy, now, taken)
                    brought[key] += count
                    room -= count
        if taken:
            self._rotate(keys[0])
        self.waiting_rows -= rows_max - room
        return _tick(taken) if taken else None

    def took(self, rows: int, seconds: float) -> None:
        """How long a tick of so many rows was computed."""
        if rows >= _TURN_MIN // 2:
            self._rows_per_s += (rows / seconds - self._rows_per_s) / 8

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
        self, queue: deque[Batch], quota: int, run_max: int, busy: NDArray[np.bool_], now: float,
        taken: list[tuple[Batch, NDArray[np.intp]]],
    ) -> int:  # fmt: skip
        count = 0
        late = np.empty(0, np.int32)  # sessions with a row whose time is up, behind which none may go
        for batch in queue:
            if count >= quota:
                break
            if batch.deadline < now:
                late = np.concatenate([late, batch.rows[batch.waiting]])
                continue
            chosen = _ready(batch, busy, run_max, late)[: quota - count]
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

    def _rotate(self, first: int) -> None:
        """The stream that was served first goes to the end of the line."""
        self._queues.move_to_end(first)
        self._forget_empty()

    def _forget_empty(self) -> None:
        for stream_id in [key for key, queue in self._queues.items() if not any(len(b.waiting) for b in queue)]:
            del self._queues[stream_id]


def _ready(batch: Batch, busy: NDArray[np.bool_], run_max: int, late: NDArray[np.int32]) -> NDArray[np.intp]:
    """Waiting rows whose session is free and not `late`, at most `run_max` of one session, in order."""
    waiting = batch.waiting
    rows = batch.rows[waiting]
    free = ~busy[rows]
    if len(late):
        free &= ~np.isin(rows, late)
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
