"""The handles of all streams: what their clients call the sessions that they have open. Used by streams.py.

A handle is 20 bits of place and 12 bits that count how often the place was used before. Places are used again, the longest
unused first, so that a stream on which sessions come and go does not grow; a handle that is out of date does not name the
session that has its place now, until the place has been used 4,096 times more.

The places of all streams stand in two columns, each stream's in a segment, so that the rows of many streams are looked up at once.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

UNKNOWN = -1
TAKEN_OVER = -2
CLOSED = -3  # by somebody else, or expired
ENDED = -4  # closed or detached by this stream

PLACE_BITS = 20
PLACES_MAX = (1 << PLACE_BITS) - 1  # less one, for 0xFFFFFFFF is no handle
REMEMBERED = 1024  # places that were freed last, and are not used yet: of their handles it is known why they are void
_PLACE = np.uint32((1 << PLACE_BITS) - 1)
_USES = 1 << (32 - PLACE_BITS)
_SEGMENT_MIN = 4


class HandleTable:
    """Segments of places: the rows of the session table that they stand for (or why they are void), and the handles they have."""

    def __init__(self) -> None:
        self.rows = np.full(1024, UNKNOWN, np.int32)
        self.names = np.zeros(1024, np.uint32)
        self._high = 0
        self._free: defaultdict[int, list[int]] = defaultdict(list)  # starts of segments that nobody has, by length
        self.starts = np.zeros(64, np.int64)  # by the number of a stream
        self.counts = np.zeros(64, np.uint32)  # places that the stream has used

    def rows_of(self, numbers: NDArray[np.uint32], handles: NDArray[np.uint32]) -> NDArray[np.int32]:
        """Session-table rows of these handles of streams; negative where a handle is unknown or void."""
        places = handles & _PLACE
        known = places < self.counts[numbers]
        if np.count_nonzero(known) < len(known):
            places = np.where(known, places, np.uint32(0))
        at = self.starts[numbers] + places
        known &= self.names[at] == handles
        rows = self.rows[at]
        return rows if np.count_nonzero(known) == len(known) else np.where(known, rows, UNKNOWN).astype(np.int32)

    def make(self, number: int) -> None:
        """A stream with this number begins."""
        if number >= len(self.starts):
            more = max(2 * len(self.starts), number + 1)
            self.starts, self.counts = (
                np.concatenate([column, np.zeros(more - len(column), column.dtype)])
                for column in (self.starts, self.counts)
            )
        self.counts[number] = 0
        self.starts[number] = self.segment(_SEGMENT_MIN)

    def moved(self, number: int, start: int, count: int) -> None:
        self.starts[number], self.counts[number] = start, count

    def segment(self, length: int) -> int:
        """The start of a free segment."""
        if self._free[length]:
            return self._free[length].pop()
        start, self._high = self._high, self._high + length
        if self._high > len(self.rows):
            more = max(self._high, 2 * len(self.rows)) - len(self.rows)
            self.rows = np.concatenate([self.rows, np.full(more, UNKNOWN, np.int32)])
            self.names = np.concatenate([self.names, np.zeros(more, np.uint32)])
        return start

    def give_back(self, start: int, length: int) -> None:
        self._free[length].append(start)


class Handles:
    """The handles of one stream."""

    def __init__(self, table: HandleTable, number: int) -> None:
        table.make(number)
        self.on_end: Callable[[int], None] = lambda handle: None
        self._table = table
        self._number = number
        self._start = int(table.starts[number])
        self._length = _SEGMENT_MIN
        self._count = 0
        self._free: deque[int] = deque()

    def __len__(self) -> int:
        """How many are in use."""
        return self._count - len(self._free)

    def name(self, row: int) -> int:
        """A new handle for a session-table row."""
        table = self._table
        if len(self._free) > REMEMBERED:
            place = self._free.popleft()
            use = ((int(table.names[self._start + place]) >> PLACE_BITS) + 1) % _USES
        else:
            place, use = self._count, 0
            if place == self._length:
                self._grow()
            self._count += 1
            table.moved(self._number, self._start, self._count)
        handle = place | use << PLACE_BITS
        table.rows[self._start + place], table.names[self._start + place] = row, handle
        return handle

    def end(self, handle: int, why: int) -> None:
        """The handle is void from now on, and its place may be used again."""
        place = handle & int(_PLACE)
        if self.row_of(handle) >= 0:
            self._table.rows[self._start + place] = why
            self._free.append(place)
            self.on_end(handle)

    def rows_of(self, handles: NDArray[np.uint32]) -> NDArray[np.int32]:
        """Session-table rows; negative where a handle is unknown or void."""
        return self._table.rows_of(np.full(len(handles), self._number, np.uint32), handles)

    def row_of(self, handle: int) -> int:
        """The same for one handle."""
        place = handle & int(_PLACE)
        if place >= self._count or self._table.names.item(self._start + place) != handle:
            return UNKNOWN
        return self._table.rows.item(self._start + place)

    def attached(self) -> NDArray[np.int32]:
        """The rows of all that are in use."""
        rows = self._table.rows[self._start : self._start + self._count]
        return rows[rows >= 0]

    def forget(self) -> None:
        """The stream is gone."""
        self._table.moved(self._number, 0, 0)
        self._table.give_back(self._start, self._length)
        self._length = self._count = 0
        self._free.clear()

    def _grow(self) -> None:
        table, start = self._table, self._table.segment(2 * self._length)
        for column in (table.rows, table.names):
            column[start : start + self._length] = column[self._start : self._start + self._length]
        table.give_back(self._start, self._length)
        self._start, self._length = start, 2 * self._length
