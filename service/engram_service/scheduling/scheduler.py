"""Which waiting rows make the next batch. Pure: arrays, no clock of its own; steps/loop.py owns it.

There is no timer: while a batch runs, arrivals gather, and the next one takes all that is ready, at most `rows_max` rows and at
most `run_max` consecutive steps of one session. Sessions that are busy keep their rows here, and so do rows whose deadline has
passed, until they are dropped.

Where not all that is ready fits, streams share the batch equally, row by row (a round robin with a quantum of one row): nobody has
a second row in it before everybody has a first one. While streams with many rows wait beside some with few, a batch is no longer
than about two milliseconds, so whoever comes while it is computed does not wait for long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from engram_service.places import distinct, seize
from engram_service.scheduling.columns import Steps, Waiting, joined, occurrence

FIXED_ROWS = 50  # a batch of one row takes about as long as so many rows more

_FEW = 16  # rows; a stream with no more of them waiting has few
_MANY = 128  # with more than these it has many
_SHARED_S = 0.002  # of computing and committing, while streams of both kinds are there
_SHARED_RUN = 2  # most consecutive steps of one session in such a batch; they run one after the other
_SHARED_MIN = 64  # rows of such a batch in any case
_LATELY_S = 1.0  # a stream of few rows counts as there for so long after its last one

_CALL = np.uint32(1 << 31)  # and more: the row came in a unary call; 0: its stream is the server's own

_Wanted: TypeAlias = Callable[[Steps, NDArray[np.intp]], NDArray[np.bool_]]


@dataclass(slots=True)
class Batch:
    """One call of the model: rows in the order in which they were taken, and the waves in which they run.

    Wave k holds the k-th step of each session of the batch. `last` indexes each session's last row.
    """

    steps: Steps
    waves: list[NDArray[np.intp] | None]  # None: all rows
    last: NDArray[np.intp] | None  # None: all rows

    def __len__(self) -> int:
        return len(self.steps)


class Scheduler:
    """The rows that wait, by model; models take turns."""

    def __init__(self, run_max: int) -> None:
        self._run_max = run_max
        self._waiting: dict[int, Waiting] = {}
        self._turn = 0
        self._few_at: dict[int, float] = {}  # by model, when a row of a stream with few of them was seen last
        self._rows_per_s: dict[int, float] = {}  # by model, of batches that are not small, with FIXED_ROWS for each

    @property
    def waiting_rows(self) -> int:
        return sum(waiting.count for waiting in self._waiting.values())

    def add(self, model: int, steps: Steps) -> None:
        if model not in self._waiting:
            self._waiting[model] = Waiting(steps.inputs.shape[1])
        self._waiting[model].add(steps)

    def next(self, model: int, busy: NDArray[np.bool_], rows_max: int, now: float) -> Batch | None:
        """The next batch of a model, or None where nothing is ready. Marks the sessions it takes in `busy`."""
        waiting = self._waiting[model]
        few = min(rows_max, _MANY)
        if (whole := waiting.whole) is not None and len(whole) <= few and seize(busy, whole.rows, whole.deadlines, now):
            waiting.take_whole()
            self._most(model, whole.streams, now)
            return Batch(whole, [None], None)
        places = waiting.places()
        columns, rows = waiting.columns, waiting.columns.rows[places]
        ready = ~busy[rows]
        if (late := columns.deadlines[places] < now).any():
            ready &= ~np.isin(rows, rows[late])  # behind a row whose time is up none may go
        if not ready.all():
            places, rows = places[ready], rows[ready]
        if not len(places):
            return None
        rows_max, run_max = self._bounds(model, columns.streams[places], rows_max, now)
        repeated = len(places) > 1 and not distinct(rows, len(busy))
        if repeated:
            runs = occurrence(rows)
            if (kept := runs < run_max).sum() < len(places):
                places, rows = places[kept], rows[kept]
        if len(places) > rows_max:
            rank = occurrence(_sharers(columns.streams[places], rows))
            chosen = np.sort(np.argsort(rank, kind="stable")[:rows_max])
            places, rows = places[chosen], rows[chosen]
        busy[rows] = True
        return batch_of(waiting.take(places), repeated)

    def models(self) -> list[int]:
        """Those for which rows wait, beginning with whose turn it is."""
        models = [model for model, waiting in self._waiting.items() if waiting.count]
        if len(models) > 1:
            self._turn += 1
            at = self._turn % len(models)
            models = models[at:] + models[:at]
        return models

    def took(self, model: int, rows: int, seconds: float) -> None:
        """How long a batch of so many rows was computed and committed."""
        if rows >= _SHARED_MIN:
            before = self._rows_per_s.get(model, 0.0)
            self._rows_per_s[model] = before + ((rows + FIXED_ROWS) / seconds - before) / 8

    # What is taken out without being computed. The rows come back in their order, by model.

    def drop_sessions(self, sessions: NDArray[Any]) -> Steps | None:
        return self._drop(lambda columns, places: np.isin(columns.rows[places], sessions))

    def drop_stream(self, stream: int) -> Steps | None:
        return self._drop(lambda columns, places: columns.streams[places] == stream)

    def drop_model(self, model: int) -> Steps | None:
        waiting = self._waiting.get(model)
        return waiting.take(waiting.places()) if waiting is not None and waiting.count else None

    def drop_late(self, now: float) -> Steps | None:
        """Rows whose time is up, and those behind them of the same session, which cannot run without."""

        def late(columns: Steps, places: NDArray[np.intp]) -> NDArray[np.bool_]:
            up = columns.deadlines[places] < now
            if not up.any():
                return up
            rows = columns.rows[places]
            first = np.full(int(rows.max()) + 1, len(places), np.intp)
            np.minimum.at(first, rows[up], np.flatnonzero(up))
            behind: NDArray[np.bool_] = np.arange(len(places)) >= first[rows]
            return behind

        return self._drop(late)

    def prolong(self, rows: NDArray[np.int32], seq: np.uint64, deadline: float) -> None:
        """What waits of these sessions up to this seq has time until then, if it had less."""
        for waiting in self._waiting.values():
            if waiting.count:
                places, columns = waiting.places(), waiting.columns
                these = places[np.isin(columns.rows[places], rows) & (columns.seqs[places] <= seq)]
                columns.deadlines[these] = np.maximum(columns.deadlines[these], deadline)

    def _drop(self, wanted: _Wanted) -> Steps | None:
        dropped: list[Steps] = []
        for waiting in self._waiting.values():
            if waiting.count:
                places = waiting.places()
                mask = wanted(waiting.columns, places)
                if mask.any():
                    dropped.append(waiting.take(places[mask]).without_inputs())  # models' inputs differ in width
        return joined(dropped) if dropped else None

    def _bounds(self, model: int, streams: NDArray[np.uint32], rows_max: int, now: float) -> tuple[int, int]:
        """How many rows a batch may have, and how many of one session."""
        if self._most(model, streams, now) <= _MANY or now - self._few_at.get(model, -_LATELY_S) >= _LATELY_S:
            return rows_max, self._run_max
        in_time = int(self._rows_per_s.get(model, 0.0) * _SHARED_S) - FIXED_ROWS
        return min(rows_max, max(_SHARED_MIN, in_time)), min(self._run_max, _SHARED_RUN)

    def _most(self, model: int, streams: NDArray[np.uint32], now: float) -> int:
        """The most rows that one of these streams has; whether one has few of them is noted."""
        rows = len(streams)
        if rows <= _FEW or (rows <= _MANY and np.count_nonzero(streams == streams[0]) <= _FEW):
            self._few_at[model] = now
            return rows  # or less, and none has many
        counts = np.unique(streams, return_counts=True)[1]
        if counts.min() <= _FEW:
            self._few_at[model] = now
        return int(counts.max())


def batch_of(steps: Steps, repeated: bool = True) -> Batch:
    """Rows as a batch. Not `repeated`: no session has two."""
    if not repeated:
        return Batch(steps, [None], None)
    wave = occurrence(steps.rows)
    waves: list[NDArray[np.intp] | None] = [np.flatnonzero(wave == k) for k in range(int(wave.max()) + 1)]
    order = np.lexsort((wave, steps.rows))
    ends = np.append(steps.rows[order][1:] != steps.rows[order][:-1], True)
    return Batch(steps, waves, np.sort(order[ends]))


def _sharers(streams: NDArray[np.uint32], rows: NDArray[np.int32]) -> NDArray[np.uint32]:
    """Who shares a batch: streams, and of steps that came without one their sessions."""
    without = (streams == 0) | (streams >= _CALL)
    return np.where(without, rows.astype(np.uint32) | _CALL, streams)
