"""The handles of one stream: what its client calls the sessions that it has open. Used by streams.py.

A handle is 20 bits of place and 12 bits that count how often the place was used before. Places are used again, the longest
unused first, so that a stream on which sessions come and go does not grow; a handle that is out of date does not name the
session that has its place now, until the place has been used 4,096 times more.
"""

from __future__ import annotations

from collections import deque
from typing import Any

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


class Handles:
    """Places, the rows of the session table that they stand for (or why they are void), and the handles that they have now."""

    def __init__(self) -> None:
        self._rows = np.full(16, UNKNOWN, np.int32)
        self._names = np.zeros(16, np.uint32)
        self._count = 0
        self._free: deque[int] = deque()

    def __len__(self) -> int:
        """How many are in use."""
        return self._count - len(self._free)

    def name(self, row: int) -> int:
        """A new handle for a session-table row."""
        if len(self._free) > REMEMBERED:
            place = self._free.popleft()
            use = ((int(self._names[place]) >> PLACE_BITS) + 1) % _USES
        else:
            place, use = self._count, 0
            if place == len(self._rows):
                self._grow()
            self._count += 1
        handle = place | use << PLACE_BITS
        self._rows[place], self._names[place] = row, handle
        return handle

    def end(self, handle: int, why: int) -> None:
        """The handle is void from now on, and its place may be used again."""
        place = handle & int(_PLACE)
        if self.row_of(handle) >= 0:
            self._rows[place] = why
            self._free.append(place)

    def rows_of(self, handles: NDArray[np.uint32]) -> NDArray[np.int32]:
        """Session-table rows; negative where a handle is unknown or void."""
        places = handles & _PLACE
        known = places < self._count
        if not known.all():
            places = np.where(known, places, 0)
        known &= self._names[places] == handles
        rows = self._rows[places]
        return rows if known.all() else np.where(known, rows, UNKNOWN).astype(np.int32)

    def row_of(self, handle: int) -> int:
        """The same for one handle."""
        place = handle & int(_PLACE)
        if place >= self._count or self._names.item(place) != handle:
            return UNKNOWN
        return self._rows.item(place)

    def attached(self) -> NDArray[np.int32]:
        """The rows of all that are in use."""
        rows = self._rows[: self._count]
        return rows[rows >= 0]

    def _grow(self) -> None:
        more: Any = len(self._rows)
        self._rows = np.concatenate([self._rows, np.full(more, UNKNOWN, np.int32)])
        self._names = np.concatenate([self._names, np.zeros(more, np.uint32)])
