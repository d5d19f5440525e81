"""Rows of steps as columns: those that were admitted, those that wait, those of a batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(slots=True)  # not frozen: made for every batch, and that costs twice as much
class Steps:
    """Steps of one model, those of a session in order of seq."""

    rows: NDArray[np.int32]  # their sessions: whoever frees one drops what waits of it before
    streams: NDArray[np.uint32]  # who is answered
    handles: NDArray[np.uint32]  # what the stream calls the session
    seqs: NDArray[np.uint64]
    flags: NDArray[np.uint8]
    deadlines: NDArray[np.float64]  # seconds, monotonic
    times: NDArray[np.float64]  # [n, 4]: wire/base.py
    inputs: NDArray[np.uint8]  # [n, input_nbytes]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Steps:
        """Some of them, by an array, a mask or a slice."""
        return Steps(self.rows[index], self.streams[index], self.handles[index], self.seqs[index], self.flags[index],
                     self.deadlines[index], self.times[index], self.inputs[index])  # fmt: skip

    def without_inputs(self) -> Steps:
        """Of rows that are not going to be computed."""
        return replace(self, inputs=np.empty((len(self), 0), np.uint8))


class Waiting:
    """The rows that wait for one model, in the order in which they came. Places of taken rows are filled up now and then."""

    def __init__(self, input_nbytes: int) -> None:
        self._columns = _empty(64, input_nbytes)
        self._here = np.zeros(64, np.bool_)
        self._high = 0
        self._whole: Steps | None = None  # all that waits, as it came: mostly the next batch takes it so
        self.count = 0

    def add(self, steps: Steps) -> None:
        if not self.count:
            self._whole, self.count = steps, len(steps)
            return
        self._spill()
        self._append(steps)

    @property
    def whole(self) -> Steps | None:
        """All rows, where they came at once."""
        return self._whole

    def take_whole(self) -> None:
        """Takes them out."""
        self._whole, self.count = None, 0

    def _spill(self) -> None:
        if self._whole is not None:
            whole, self._whole, self.count, self._high = self._whole, None, 0, 0
            self._append(whole)

    def _append(self, steps: Steps) -> None:
        count = len(steps)
        if self._high + count > len(self._here):
            self._make_room(count)
        place = slice(self._high, self._high + count)
        for name in Steps.__slots__:
            getattr(self._columns, name)[place] = getattr(steps, name)
        self._here[place] = True
        self._high += count
        self.count += count

    def places(self) -> NDArray[np.intp]:
        """Where the rows are, in their order; `take` and the columns understand it."""
        self._spill()
        return np.flatnonzero(self._here[: self._high])

    @property
    def columns(self) -> Steps:
        """To be read at places."""
        return self._columns

    def take(self, places: NDArray[np.intp]) -> Steps:
        """Takes rows out."""
        taken = self._columns[places]
        self._here[places] = False
        self.count -= len(places)
        if not self.count:
            self._high = 0
        return taken

    def _make_room(self, more: int) -> None:
        places, width = self.places(), self._columns.inputs.shape[1]
        size = len(self._here)
        while self.count + more > size // 2:
            size *= 2
        old, self._columns = self._columns, _empty(size, width)
        for name in Steps.__slots__:
            getattr(self._columns, name)[: len(places)] = getattr(old, name)[places]
        self._here = np.zeros(size, np.bool_)
        self._here[: len(places)] = True
        self._high = len(places)


def _empty(size: int, input_nbytes: int) -> Steps:
    return Steps(
        np.empty(size, np.int32), np.empty(size, np.uint32), np.empty(size, np.uint32), np.empty(size, np.uint64),
        np.empty(size, np.uint8), np.empty(size), np.empty((size, 4)), np.empty((size, input_nbytes), np.uint8),
    )  # fmt: skip


def joined(some: list[Steps]) -> Steps:
    if len(some) == 1:
        return some[0]
    return Steps(*(np.concatenate([getattr(one, name) for one in some]) for name in Steps.__slots__))


def occurrence(values: NDArray[Any]) -> NDArray[np.intp]:
    """For each value, how many equal ones stand before it."""
    order = np.argsort(values, kind="stable")
    grouped = values[order]
    starts = np.flatnonzero(np.concatenate(([True], grouped[1:] != grouped[:-1])))
    lengths = np.diff(np.append(starts, len(values)))
    result = np.empty(len(values), np.intp)
    result[order] = np.arange(len(values)) - np.repeat(starts, lengths)
    return result
