"""Which waiting rows make the next tick. Pure: arrays and queues, no torch, no clock, no lock of its own.

Frames of one stream wait in the order in which they came; streams take turns. A tick takes all that is ready, at most
`rows_max` rows and at most `run_max` consecutive steps of one session; sessions that are busy keep their rows here, and so do
rows whose deadline has passed, until they are dropped. Owned by work.WorkQueue, which calls it under its lock.

Streams are treated alike: each has its share of a tick before any has more. A stream with many rows waiting is large.
Beside small ones the large have ticks of their own, one turn together and without long runs, and of four ticks three are for the
small: whoever comes while a turn is computed waits for its end, and overtakes its commit.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engram_service.sessions.table import References

FIXED_ROWS = 50  # a tick of one row takes about as long as so many rows more

_FAIR_SHARE_MIN = 16  # rows that each stream may place in a tick before others get more
_LARGE = 128  # rows; a stream with more of them waiting is large, if they also are more than a turn
_TURN_MIN = 64  # rows of a turn in any case
_TURN_S = (0.0018, 0.01)  # and as many as are computed in about so long; to pack and commit them takes as long again
_TURN_SEES = 2  # within these, a turn is so long that about so many small rows come meanwhile
_PASSES = 3  # ticks of small streams that may go before a turn that is ready
_LOOK = 512  # rows of a frame with runs that are looked at together
_RUN_SHARED = 2  # most consecutive steps of one session in a turn; they run one after the other
_LATELY_S = 1.0  # a stream is one of those that step for so long after its last frame


@dataclass(slots=True, eq=False)
class Batch:
    """The rows of one frame that were accepted, as columns; `waiting` indexes those that no tick has taken yet."""

    stream: Any  # who gets the answers; the scheduler uses its `.id` alone
    sessions: References
    handles: NDArray[np.uint32]  # what the stream calls them
    seqs: NDArray[np.uint64]
    flags: NDArray[np.uint8]
    inputs: NDArray[Any]  # [n, *input shape]
    unique: bool  # no session has two rows
    arrived: float  # seconds, monotonic
    deadline: float  # seconds, monotonic; inf: none
    waiting: NDArray[np.intp] = field(init=False)

    def __post_init__(self) -> None:
        self.waiting = np.arange(len(self.sessions))

    @property
    def rows(self) -> NDArray[np.int32]:
        """The sessions' rows: whoever frees one drops what waits of it before."""
        return self.sessions.rows

    def prolong(self, rows: NDArray[np.int32], seq: np.uint64, deadline: float) -> None:
        """Gives it time until then, if it had less and has a step of these sessions up to this seq."""
        if self.deadline < deadline and (np.isin(self.rows, rows) & (self.seqs <= seq)).any():
            self.deadline = deadline


@dataclass(frozen=True, slots=True)
class Part:
    """Rows of one batch inside a tick: `index` into the batch, at `start` .. `start + len(index)` of the tick."""

    batch: Batch
    index: NDArray[np.intp]
    start: int


@dataclass(frozen=True, slots=True)
class Tick:
    """One batched advance: rows in the order in which they were taken, and the waves in which they run.

    Wave k holds the k-th step of each session in the tick. `last` indexes each session's last row. `turn`: its rows are of large
    streams that have small ones beside them.
    """

    parts: list[Part]
    sessions: References
    handles: NDArray[np.uint32]
    seqs: NDArray[np.uint64]
    flags: NDArray[np.uint8]
    waves: list[NDArray[np.intp] | None]  # None: all rows
    last: NDArray[np.intp] | None  # None: all rows
    turn: bool = False

    def __len__(self) -> int:
        return len(self.sessions)

    @property
    def rows(self) -> NDArray[np.int32]:
        """The sessions' rows, which are pinned: the sessions are busy until the tick is answered."""
        return self.sessions.rows


class Scheduler:
    """The rows that wait for one model."""

    def __init__(self, run_max: int) -> None:
        self.run_max = run_max
        self.waiting_rows = 0
        self._queues: OrderedDict[int, deque[Batch]] = OrderedDict()
        self._waiting: dict[int, int] = {}  # rows of each queue
        self._stepped: OrderedDict[int, float] = OrderedDict()  # streams by when their last frame came; the latest last
        self._large: set[int] = set()  # streams that were large after their last frame
        self._passed = 0  # ticks of small streams since the last turn
        self._small_at = 0.0  # when a small stream's frame came last
        self._small_came = 0.0  # small rows of about the second before that
        self._rows_per_s = 0.0  # of ticks that are not small, with FIXED_ROWS for each

    def add(self, batch: Batch) -> None:
        key, count = batch.stream.id, len(batch.waiting)
        self._queues.setdefault(key, deque()).append(batch)
        self.waiting_rows += count
        self._waiting[key] = self._waiting.get(key, 0) + count
        self._stepped[key] = batch.arrived
        self._stepped.move_to_end(key)
        if self._waiting[key] > max(_LARGE, self._rows_in(_TURN_S[0])):
            self._large.add(key)
        else:
            self._large.discard(key)
            self._small_came = self._small_rows(batch.arrived) + count
            self._small_at = batch.arrived

    def next(self, busy: NDArray[np.bool_], rows_max: int, now: float, turns: bool = True) -> Tick | None:
        """The next tick, or None where nothing is ready. Marks the sessions it takes in `busy`. Without `turns` it is none."""
        if not self.waiting_rows:
            return None
        while self._stepped and next(iter(self._stepped.values())) < now - _LATELY_S:
            self._stepped.popitem(last=False)
        self._large &= self._queues.keys() | self._stepped.keys()
        large = [key for key in self._queues if key in self._large]
        if not large or self._stepped.keys() <= self._large:
            return self._made(list(self._queues), rows_max, self.run_max, busy, now)
        small = [key for key in self._queues if key not in self._large]
        for keys in (large, small) if self._passed >= _PASSES else (small, large):
            if keys is large and not turns:
                continue
            most = rows_max if keys is small else min(rows_max, self._turn(now))
            if tick := self._made(keys, most, min(self.run_max, _RUN_SHARED), busy, now):
                self._passed = self._passed + 1 if keys is small else 0
                return replace(tick, turn=keys is large)
        return None

    def _turn(self, now: float) -> int:
        least, most = _TURN_S
        return self._rows_in(min(most, max(least, _TURN_SEES / max(1.0, self._small_rows(now)))))

    def _rows_in(self, seconds: float) -> int:
        return max(_TURN_MIN, int(self._rows_per_s * seconds) - FIXED_ROWS)

    def _small_rows(self, now: float) -> float:
        """Small rows of about the last second."""
        return self._small_came * math.exp(min(0.0, self._small_at - now))

    def _made(self, keys: list[int], rows_max: int, run_max: int, busy: NDArray[np.bool_], now: float) -> Tick | None:
        """A tick of the rows of these streams."""
        taken: list[tuple[Batch, NDArray[np.intp]]] = []
        room = rows_max
        for share in (max(_FAIR_SHARE_MIN, rows_max // max(1, len(keys))), rows_max):
            for key in keys:
                if (quota := min(share, room)) > 0:
                    count = self._take(self._queues[key], quota, run_max, busy, now, taken)
                    self._waiting[key] -= count
                    room -= count
        if not taken:
            return None
        self.waiting_rows -= rows_max - room
        self._queues.move_to_end(keys[0])  # who was served first goes to the end of the line
        self._forget_empty()
        return _tick(taken)

    def took(self, rows: int, seconds: float) -> None:
        """How long a tick of so many rows was computed."""
        if rows >= _TURN_MIN:
            self._rows_per_s += ((rows + FIXED_ROWS) / seconds - self._rows_per_s) / 8

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
                    self._waiting[batch.stream.id] -= int(mask.sum())
        self._forget_empty()
        return dropped

    def prolong(self, rows: NDArray[np.int32], seq: np.uint64, deadline: float) -> None:
        """What waits of these sessions up to this seq has time until then, if it had less."""
        for queue in self._queues.values():
            for batch in queue:
                batch.prolong(rows, seq, deadline)

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
            places = _ready(batch, busy, run_max, late, quota - count)
            if not len(places):
                continue
            chosen, left = batch.waiting[places], np.ones(len(batch.waiting), np.bool_)
            left[places] = False
            batch.waiting = batch.waiting[left]
            taken.append((batch, chosen))
            count += len(chosen)
        while queue and not len(queue[0].waiting):
            queue.popleft()
        return count

    def _forget_empty(self) -> None:
        for key in [key for key, rows in self._waiting.items() if not rows]:
            del self._queues[key], self._waiting[key]


def _ready(batch: Batch, busy: NDArray[np.bool_], run_max: int, late: NDArray[np.int32], most: int) -> NDArray[np.intp]:
    """The places in `batch.waiting` of up to `most` rows whose session is free and not `late`, at most `run_max` of one session,
    in order. Marks their sessions in `busy`."""
    rows = batch.rows[batch.waiting]
    free = ~busy[rows]
    if len(late):
        free &= ~np.isin(rows, late)
    places = np.flatnonzero(free)
    if batch.unique:
        places = places[:most]
        busy[rows[places]] = True
        return places
    found: list[NDArray[np.intp]] = []
    for start in range(0, len(places), _LOOK):  # no further than is needed: thousands may wait
        some = places[start : start + _LOOK]
        some = some[~busy[rows[some]]]
        some = some[_occurrence(rows[some]) < run_max][:most]
        busy[rows[some]] = True
        found.append(some)
        most -= len(some)
        if not most:
            break
    return np.concatenate([places[:0], *found])


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
    sessions = References.joined([part.batch.sessions[part.index] for part in parts])
    rows = sessions.rows
    handles = _joined([part.batch.handles[part.index] for part in parts])
    seqs = _joined([part.batch.seqs[part.index] for part in parts])
    flags = _joined([part.batch.flags[part.index] for part in parts])
    if all(part.batch.unique for part in parts):
        # A session is marked busy as its first row is taken, so two batches never bring the same one.
        return Tick(parts, sessions, handles, seqs, flags, [None], None)
    wave = _occurrence(rows)
    waves: list[NDArray[np.intp] | None] = [np.flatnonzero(wave == k) for k in range(int(wave.max()) + 1)]
    order = np.lexsort((wave, rows))
    ends = np.append(rows[order][1:] != rows[order][:-1], True)
    return Tick(parts, sessions, handles, seqs, flags, waves, np.sort(order[ends]))


def _joined(columns: list[NDArray[Any]]) -> NDArray[Any]:
    return columns[0] if len(columns) == 1 else np.concatenate(columns)
